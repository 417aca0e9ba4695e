"""Hint encodings against the tables on disk, read row by row, and against detectron2's and SPADE's rules."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.cityscapes import CityscapesDataset
from datasets.hint_encoding import hint_encoding
from datasets.hints import read_hint
from datasets.label_space import PALETTES, SPACES, LabelSpace

CLASSES = {"ade20k": 150, "cityscapes": 19, "coco_panoptic133": 133, "cocostuff": 171}
AMBIGUOUS = {"ade20k": {(140, 140, 140)}}  # road and skyscraper


def rows(name: str) -> list[dict[str, str]]:
    """A table as it is on disk."""
    with (PALETTES / f"{name}.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def rgb_of(row: dict[str, str]) -> list[int]:
    """The colour of a row."""
    return [int(row[channel]) for channel in "RGB"]


def file_id_of(row: dict[str, str]) -> int:
    """What a file holds for a row, in a byte."""
    return int(row.get("png_id", row["id"])) % 256


def every_id(space: LabelSpace) -> np.ndarray:
    """A map of all file ids."""
    return np.array([sorted({i % 256 for i in space.row_ids})], np.uint8)


@pytest.mark.parametrize("name", SPACES)
def test_every_space_has_the_classes_of_its_protocol(name: str) -> None:
    space = LabelSpace.load(name)
    assert space.num_classes == CLASSES[name]
    ids = every_id(space)
    for file_id, train_id in zip(ids[0], space.to_train_ids(ids, name)[0], strict=True):
        (expected,) = {int(row["trainId"]) for row in rows(name) if file_id_of(row) == file_id}
        assert train_id == expected % 256
    train_ids = np.array([[*range(space.num_classes), 255]], np.uint8)
    file_ids = space.to_file_ids(train_ids, name)
    np.testing.assert_array_equal(space.to_train_ids(file_ids, name), train_ids)


@pytest.mark.parametrize("name", SPACES)
def test_colours_go_back_to_ids_but_for_the_documented_pair(name: str) -> None:
    space = LabelSpace.load(name)
    ids = np.array([[*range(space.num_classes), 255]], np.uint8)
    painted = space.paint(ids)
    back = space.from_colours(painted, name)
    differing = {tuple(rgb) for rgb in painted[back != ids].tolist()}
    assert differing == AMBIGUOUS.get(name, set())
    if differing:
        assert space.names[back[0, list(space.names).index("skyscraper")]] == "road"


def test_coco_stuff_has_the_colours_of_the_bit_rule() -> None:
    space = LabelSpace.load("cocostuff")
    for file_id, colour in zip(space.file_ids, space.colours.tolist(), strict=True):
        rule, value = [0, 0, 0], file_id + 1
        for bit in range(8):
            for channel in range(3):
                rule[channel] |= (value >> channel & 1) << (7 - bit)
            value >>= 3
        assert colour == rule


def test_the_default_paints_classes_and_leaves_void_black() -> None:
    for name in SPACES:
        space = LabelSpace.load(name)
        encoding, ids = hint_encoding(space), every_id(space)
        found = encoding.encode(ids)
        assert (found.dtype, found.shape, encoding.channels) == (np.float32, (*ids.shape, 3), 3)
        np.testing.assert_array_equal(
            np.round(found * 255), space.paint(space.to_train_ids(ids, name)).astype(float)
        )
        assert not encoding.tells_void_apart
        with pytest.raises(ValueError, match="read-only"):
            encoding.table[0] = 0


def test_label_colours_are_those_of_every_row_of_cityscapes() -> None:
    space = LabelSpace.load("cityscapes")
    encoding = hint_encoding(space, "label_colours")
    for row in rows("cityscapes"):
        found = encoding.encode(np.array([[file_id_of(row)]], np.uint8))
        assert np.round(found * 255).ravel().tolist() == rgb_of(row)
    assert encoding.tells_void_apart


def test_cityscapes_in_the_colours_of_ade20k() -> None:
    encoding = hint_encoding(LabelSpace.load("cityscapes"), "ade20k_colours")
    ade = {row["name"]: rgb_of(row) for row in rows("ade20k")}
    named = {"road": "road", "sky": "sky", "vegetation": "tree", "person": "person", "train": "bus"}
    for row in rows("cityscapes"):
        found = np.round(encoding.encode(np.array([[file_id_of(row)]], np.uint8)) * 255).ravel().tolist()
        if row["name"] in named:
            assert found == ade[named[row["name"]]]
        if int(row["trainId"]) in (-1, 255):
            assert found == [0, 0, 0]
    assert not encoding.tells_void_apart


def test_the_grid_of_scp_diff_counts_in_sevens() -> None:
    encoding = hint_encoding(LabelSpace.load("ade20k"), "scp_diff_grid")
    grid = [(i * 30, j * 30, k * 30) for i in range(7) for j in range(7) for k in range(7)]
    ids = np.arange(151, dtype=np.uint8)[None]
    np.testing.assert_allclose(encoding.encode(ids)[0] * 255, grid[:151], atol=1e-4)


@pytest.mark.parametrize("name", SPACES)
def test_one_hot_has_a_channel_for_each_class_and_one_for_void(name: str) -> None:
    space = LabelSpace.load(name)
    encoding, ids = hint_encoding(space, "onehot"), every_id(space)
    found = encoding.encode(ids)
    assert encoding.channels == CLASSES[name] + 1
    assert (found.sum(axis=-1) == 1).all()
    train_ids = space.to_train_ids(ids, name).astype(int)
    np.testing.assert_array_equal(found.argmax(axis=-1), np.where(train_ids == 255, CLASSES[name], train_ids))


def test_an_unknown_encoding_is_answered_with_those_of_the_space() -> None:
    with pytest.raises(ValueError, match=r"'one_hot' of cityscapes: expected .* did you mean 'onehot'"):
        hint_encoding(LabelSpace.load("cityscapes"), "one_hot")
    with pytest.raises(ValueError, match="expected one of colours, onehot, scp_diff_grid"):
        hint_encoding(LabelSpace.load("ade20k"), "label_colours")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One frame in which two void classes lie beside a road."""
    ids = np.full((64, 128), 7, np.uint8)
    ids[:, :40], ids[:, 40:60] = 9, 1  # parking, ego vehicle
    photo = tmp_path / "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png"
    labels = tmp_path / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png"
    train_ids = np.where(ids == 7, 0, 255).astype(np.uint8)
    trains = labels.with_name("ulm_000000_000019_gtFine_labelTrainIds.png")
    for path, array in ((photo, np.zeros((64, 128, 3), np.uint8)), (labels, ids), (trains, train_ids)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
    return tmp_path


def test_a_data_set_shows_void_classes_where_it_has_label_ids(tree: Path) -> None:
    sample = CityscapesDataset(tree, size=(64, 128), hint="label_colours")[0]
    assert np.round(sample["hint"][0, 0] * 255).tolist() == [250, 170, 160]
    assert np.round(sample["hint"][0, 50] * 255).tolist() == [0, 0, 0]
    assert sample["label"][0, [0, 50, 100]].tolist() == [255, 255, 0]
    next(tree.rglob("*_labelIds.png")).unlink()
    assert CityscapesDataset(tree, size=(64, 128), hint="onehot")[0]["hint"].shape == (64, 128, 20)
    with pytest.raises(ValueError, match=r"labelTrainIds.png: expected label ids, because .*'label_colours'"):
        CityscapesDataset(tree, size=(64, 128), hint="label_colours")[0]


def test_a_hint_file_of_train_ids_cannot_tell_void_classes_apart(tree: Path) -> None:
    encoding = hint_encoding(LabelSpace.load("cityscapes"), "label_colours")
    labels, trains = (next(tree.rglob(f"*_{kind}.png")) for kind in ("labelIds", "labelTrainIds"))
    hint = read_hint(labels, "auto", encoding, None)
    assert np.round(hint[0, 0] * 255).tolist() == [250, 170, 160]
    with pytest.raises(ValueError, match="found train ids"):
        read_hint(trains, "auto", encoding, None)
