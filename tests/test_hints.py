"""Hints from what users have: what a file is taken for, and what becomes of its pixels."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.hint_encoding import hint_encoding
from datasets.hints import HINT_TYPES, detect_hint_type, find_caption, find_hints, read_hint
from datasets.label_space import PALETTES, LabelSpace

SPACE = LabelSpace.load("cityscapes")
ENCODING = hint_encoding(SPACE)
RNG = np.random.default_rng(0)


def table() -> tuple[dict[int, int], dict[int, tuple[int, int, int]]]:
    """Train id of each label id, and colour of each train id, read from the palette table by hand."""
    with (PALETTES / "cityscapes.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    to_train = {int(row["id"]): int(row["trainId"]) for row in rows if int(row["id"]) >= 0}
    to_train = {key: value if value >= 0 else 255 for key, value in to_train.items()}
    colours = {255: (0, 0, 0)}
    for row in rows:
        if 0 <= int(row["trainId"]) < 255:
            colours.setdefault(int(row["trainId"]), tuple(int(row[channel]) for channel in "RGB"))
    return to_train, colours


TO_TRAIN, COLOURS = table()


def painted(train_ids: np.ndarray) -> np.ndarray:
    """The map in its colours, pixel by pixel."""
    return np.array([[COLOURS[int(i)] for i in row] for row in train_ids], np.uint8)


def save(path: Path, array: np.ndarray, palette: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette is not None:
        image.putpalette(palette.ravel().tolist())
    image.save(path)
    return path


@pytest.fixture
def label_ids() -> np.ndarray:
    return RNG.choice([key for key in TO_TRAIN if key < 34], (64, 128)).astype(np.uint8)


@pytest.fixture
def train_ids(label_ids: np.ndarray) -> np.ndarray:
    return np.vectorize(TO_TRAIN.get)(label_ids).astype(np.uint8)


@pytest.mark.parametrize("kind", ["auto", "label_ids"])
def test_label_ids_are_painted(
    tmp_path: Path, label_ids: np.ndarray, train_ids: np.ndarray, kind: str
) -> None:
    path = save(tmp_path / "ulm_gtFine_labelIds.png", label_ids)
    hint = read_hint(path, kind, ENCODING, None)
    assert (hint.dtype, hint.shape) == (np.float32, (64, 128, 3))
    np.testing.assert_allclose(hint * 255, painted(train_ids), atol=1e-4)


@pytest.mark.parametrize("kind", ["auto", "train_ids"])
def test_train_ids_are_painted(tmp_path: Path, train_ids: np.ndarray, kind: str) -> None:
    path = save(tmp_path / "0001_labelTrainIds.png", train_ids)
    np.testing.assert_allclose(read_hint(path, kind, ENCODING, None) * 255, painted(train_ids), atol=1e-4)


@pytest.mark.parametrize("kind", ["auto", "colours", "image"])
def test_a_painted_map_stays_as_it_is(tmp_path: Path, train_ids: np.ndarray, kind: str) -> None:
    path = save(tmp_path / "any name.png", painted(train_ids))
    np.testing.assert_allclose(read_hint(path, kind, ENCODING, None) * 255, painted(train_ids), atol=1e-4)


def test_a_palette_png_is_read_by_its_indices_and_not_by_its_colours(
    tmp_path: Path, train_ids: np.ndarray
) -> None:
    wrong_colours = RNG.integers(0, 256, (256, 3), np.uint8)
    path = save(tmp_path / "x_labelTrainIds.png", train_ids, wrong_colours)
    assert Image.open(path).mode == "P"
    np.testing.assert_allclose(read_hint(path, "auto", ENCODING, None) * 255, painted(train_ids), atol=1e-4)


def test_a_picture_is_taken_pixel_by_pixel(tmp_path: Path) -> None:
    picture = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    path = save(tmp_path / "edges.png", picture)
    hint = read_hint(path, "image", ENCODING, None)
    assert hint.dtype == np.float32
    assert (hint == picture.astype(np.float32) / np.float32(255)).all()
    small = read_hint(path, "image", ENCODING, (128, 64))
    assert (small == np.repeat(hint, 2, axis=0)).all(), "resized to the nearest pixel"


@pytest.mark.parametrize("kind", ["label_ids", "colours"])
def test_resizing_makes_no_new_class(
    tmp_path: Path, label_ids: np.ndarray, train_ids: np.ndarray, kind: str
) -> None:
    path = save(tmp_path / "a.png", label_ids if kind == "label_ids" else painted(train_ids))
    hint = (read_hint(path, kind, ENCODING, (128, 256)) * 255).round().astype(np.uint8)
    assert (hint == painted(train_ids).repeat(2, axis=0).repeat(2, axis=1)).all()
    shrunk = (read_hint(path, kind, ENCODING, (64, 64)) * 255).round().astype(np.uint8)
    assert {*map(tuple, shrunk.reshape(-1, 3))} <= {*COLOURS.values()}


@pytest.mark.parametrize(
    ("name", "array", "kind", "said"),
    [
        ("a.png", np.full((64, 64), 200, np.uint8), "label_ids", "200"),
        ("a.png", np.full((64, 64), 26, np.uint8), "train_ids", "26"),
        ("a.png", np.full((64, 64, 3), 1, np.uint8), "colours", "(1, 1, 1)"),
        ("a.png", np.full((64, 64), 3, np.uint8), "auto", "--hint_type"),
        ("a.png", np.zeros((60, 64), np.uint8), "label_ids", "64x64"),
        ("a.png", np.zeros((64, 64), np.uint8), "pixels", ", ".join(HINT_TYPES)),
        ("a.jpg", np.zeros((64, 64), np.uint8), "label_ids", "lossless"),
    ],
    ids=["label_id", "train_id", "colour", "ambiguous", "size", "type", "jpeg"],
)
def test_what_does_not_fit_is_said(
    tmp_path: Path, name: str, array: np.ndarray, kind: str, said: str
) -> None:
    path = save(tmp_path / name, array)
    with pytest.raises(ValueError, match=r"\S") as error:
        read_hint(path, kind, ENCODING, None)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_is_its_own_list_and_a_folder_is_searched_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", ".hidden.png", "notes.txt"):
        save(tmp_path / name, np.zeros((8, 8), np.uint8)) if not name.endswith("txt") else None
    (tmp_path / "notes.txt").touch()
    found = [str(path.relative_to(tmp_path)) for path in find_hints(tmp_path)]
    assert found == ["a.JPG", "b.png", "sub/c.webp"]
    assert find_hints(tmp_path / ".hidden.png") == [tmp_path / ".hidden.png"], "asked for by name"


def test_one_map_is_taken_of_each_frame_of_a_cityscapes_tree(tmp_path: Path) -> None:
    kinds = ("color", "instanceIds", "labelIds", "labelTrainIds", "instanceTrainIds")
    for kind in kinds:
        save(tmp_path / f"ulm/ulm_000000_000019_gtFine_{kind}.png", np.zeros((8, 8), np.uint8))
    for kind in kinds[:2]:
        save(tmp_path / f"bonn/bonn_000000_000019_gtFine_{kind}.png", np.zeros((8, 8), np.uint8))
    save(tmp_path / "ulm/ulm_000001_000019_gtFine_labelTrainIds.png", np.zeros((8, 8), np.uint8))
    assert [path.name for path in find_hints(tmp_path)] == [
        "bonn_000000_000019_gtFine_color.png",
        "ulm_000000_000019_gtFine_labelIds.png",
        "ulm_000001_000019_gtFine_labelTrainIds.png",
    ]


def test_a_folder_without_a_picture_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="no picture"):
        find_hints(tmp_path)


# -- real samples -----------------------------------------------------------------------------------------


def test_real_cityscapes_maps_are_one_a_frame_and_keep_their_classes(real_data: Path) -> None:
    folder = real_data / "cityscapes/gtFine/val"
    found = find_hints(folder)
    assert {path.name for path in found} == {path.name for path in folder.rglob("*_labelIds.png")}
    label_ids = np.asarray(Image.open(found[0]))
    hint = (read_hint(found[0], "auto", ENCODING, None) * 255).round().astype(np.uint8)
    pixels = Counter()
    for label_id, count in zip(*np.unique(label_ids, return_counts=True), strict=True):
        pixels[COLOURS[TO_TRAIN[int(label_id)]]] += int(count)
    colours, counts = np.unique(hint.reshape(-1, 3), axis=0, return_counts=True)
    assert dict(zip(map(tuple, colours.tolist()), counts.tolist(), strict=True)) == dict(pixels)


def test_real_gta_maps_are_read_as_train_ids(real_data: Path) -> None:
    found = find_hints(real_data / "gta/labels")
    assert {detect_hint_type(path) for path in found} == {"train_ids"}
    ids = np.asarray(Image.open(found[0]))
    hint = (read_hint(found[0], "auto", ENCODING, (512, 1024)) * 255).round().astype(np.uint8)
    assert {*map(tuple, np.unique(hint.reshape(-1, 3), axis=0).tolist())} <= {
        COLOURS[int(i)] for i in np.unique(ids)
    }
    assert len(np.unique(ids)) > 5


def test_the_kind_of_hint_decides_which_map_of_a_frame_is_taken(tmp_path: Path) -> None:
    for kind in ("labelIds", "labelTrainIds", "color", "instanceIds"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / f"a_gtFine_{kind}.png")
    taken = {
        kind: [path.stem.rpartition("_")[2] for path in find_hints(tmp_path, kind)] for kind in HINT_TYPES
    }
    assert taken == {
        "auto": ["labelIds"],
        "label_ids": ["labelIds"],
        "train_ids": ["labelTrainIds"],
        "colours": ["color"],
        "image": ["color"],
    }


def test_a_caption_is_found_above_the_map_by_the_name_of_its_frame(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text(json.dumps({"a_1": "a wet street"}), encoding="utf-8")
    folder = tmp_path / "gtFine/val/city"
    assert find_caption(folder / "a_1_gtFine_labelIds.png") == "a wet street"
    assert find_caption(folder / "a_2_gtFine_labelIds.png") is None
    assert find_caption(tmp_path.parent / "a_1_gtFine_labelIds.png") is None
