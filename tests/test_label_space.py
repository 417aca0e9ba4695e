"""Label spaces and the reading and resizing of label maps, against plain loops, torch and Pillow."""

from __future__ import annotations

import csv
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datasets.files import read_image, read_labels
from datasets.label_space import PALETTES, LabelSpace, resize_labels

CITYSCAPES = LabelSpace.load("cityscapes")
SAMPLES = Path(__file__).parents[2] / "shared" / "data"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"no real samples at {SAMPLES}")


def rows() -> list[dict[str, str]]:
    """The palette table as it is on disk, read without LabelSpace."""
    with (PALETTES / "cityscapes.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def train_id_of(file_id: int) -> int:
    """Train id of one file id by searching the table; negative train ids are void."""
    (train_id,) = [int(row["trainId"]) for row in rows() if int(row["id"]) == file_id]
    return 255 if train_id < 0 else train_id


def colour_of(train_id: int) -> tuple[int, int, int]:
    """Colour of one train id by searching the table."""
    for row in rows():
        if int(row["trainId"]) == train_id != 255:
            return int(row["R"]), int(row["G"]), int(row["B"])
    return 0, 0, 0


def test_the_classes_are_those_of_the_benchmark() -> None:
    assert CITYSCAPES.num_classes == 19
    assert CITYSCAPES.void == 255
    assert CITYSCAPES.names[:3] == ("road", "sidewalk", "building")
    assert CITYSCAPES.names[18] == "bicycle"
    assert CITYSCAPES.file_ids == (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    assert CITYSCAPES.colours.tolist() == [list(colour_of(k)) for k in range(19)]
    assert LabelSpace.load("cityscapes") is CITYSCAPES


def test_an_unknown_label_space_is_answered_with_the_near_one() -> None:
    with pytest.raises(ValueError, match=r"'cityscape'.*did you mean 'cityscapes'"):
        LabelSpace.load("cityscape")


def test_a_shared_label_space_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        CITYSCAPES.colours[0] = 0


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_every_file_id_gets_the_train_id_of_the_table(dtype: type) -> None:
    ids = np.array([[int(row["id"]) for row in rows()]], dtype)
    expected = [train_id_of(i) for i in ids[0].tolist()]
    train_ids = CITYSCAPES.to_train_ids(ids, "map")
    assert train_ids.tolist() == [expected]
    assert train_ids.dtype == np.uint8


def test_a_licence_plate_is_void_in_both_spellings() -> None:
    assert CITYSCAPES.to_train_ids(np.array([[-1]], np.int8), "map").item() == 255
    assert CITYSCAPES.to_train_ids(np.array([[255]], np.uint8), "map").item() == 255
    assert CITYSCAPES.to_train_ids(np.array([[255]], np.uint16), "map").item() == 255


@pytest.mark.parametrize(
    ("dtype", "strange"),
    [(np.uint8, 34), (np.uint8, 254), (np.int32, 263), (np.int64, -2), (np.uint16, 65535)],
)
def test_an_unknown_file_id_is_named_with_its_file(dtype: type, strange: int) -> None:
    ids = np.array([[7, strange], [strange, 7]], dtype)
    with pytest.raises(ValueError, match=rf"a/b\.png: .*-?0\.\.33, 255, found {strange} in 2 pixels"):
        CITYSCAPES.to_train_ids(ids, "a/b.png")


def test_train_ids_are_the_classes_and_void_only() -> None:
    valid = np.array([[*range(19), 255]], np.int64)
    np.testing.assert_array_equal(CITYSCAPES.check_train_ids(valid, "map"), valid)
    with pytest.raises(ValueError, match=r"map\.png: .*train ids 0\.\.18, 255, found 19, 33 in 2 pixels"):
        CITYSCAPES.check_train_ids(np.array([[0, 19, 33]]), "map.png")


@pytest.mark.parametrize("ids", [np.zeros((2, 2)), np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), bool)])
def test_only_integer_maps_are_label_maps(ids: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected an integer map \(H, W\)"):
        CITYSCAPES.to_train_ids(ids, "map")


def test_painting_equals_a_loop_over_pixels() -> None:
    ids = np.random.default_rng(0).choice([*range(19), 255], (9, 13)).astype(np.uint8)
    loop = np.array([[colour_of(int(k)) for k in row] for row in ids])
    np.testing.assert_array_equal(CITYSCAPES.paint(ids), loop)


def test_painting_refuses_ids_without_a_colour() -> None:
    with pytest.raises(ValueError, match="found 19"):
        CITYSCAPES.paint(np.array([[19]]))


@given(st.lists(st.sampled_from([*range(19), 255]), min_size=1, max_size=64))
def test_colours_read_back_as_the_ids_they_were_painted_from(ids: list[int]) -> None:
    painted = CITYSCAPES.paint(np.array([ids]))
    assert CITYSCAPES.from_colours(painted, "map").tolist() == [ids]


@pytest.mark.parametrize(
    ("colour", "train_id"),
    [
        ((0, 0, 0), 255),
        ((111, 74, 0), 255),  # dynamic
        ((250, 170, 160), 255),  # parking
        ((0, 0, 142), 13),  # car and licence plate
        ((153, 153, 153), 5),  # pole and polegroup
    ],
)
def test_shared_and_void_colours(colour: tuple[int, int, int], train_id: int) -> None:
    assert CITYSCAPES.from_colours(np.array([[colour]], np.uint8), "map").item() == train_id


def test_unknown_colours_are_counted_and_shown() -> None:
    rgb = np.array([[(1, 2, 3), (128, 64, 128), (255, 255, 255), (255, 255, 255)]], np.uint8)
    with pytest.raises(ValueError, match=r"c\.png: .*3 pixels in 2 other.*\(255, 255, 255\), \(1, 2, 3\)"):
        CITYSCAPES.from_colours(rgb, "c.png")
    with pytest.raises(ValueError, match="expected uint8 colours"):
        CITYSCAPES.from_colours(rgb / 255, "c.png")


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 200), st.integers(1, 200), st.integers(0, 9))
def test_resized_ids_are_those_of_torch_and_none_is_new(h: int, w: int, H: int, W: int, seed: int) -> None:
    ids = np.random.default_rng(seed).choice([*range(19), 255], (h, w)).astype(np.uint8)
    resized = resize_labels(ids, (H, W))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(ids)[None, None], (H, W), mode="nearest-exact"
    )
    # A centre on the border of two pixels falls to either side in torch's float32, by processor and size.
    is_sure = np.outer(*([(2 * i + 1) * n % (2 * m) != 0 for i in range(m)] for n, m in ((h, H), (w, W))))
    np.testing.assert_array_equal(resized[is_sure], expected[0, 0].numpy()[is_sure])
    rows, columns = ([Fraction(2 * i + 1, 2 * m) * n // 1 for i in range(m)] for n, m in ((h, H), (w, W)))
    np.testing.assert_array_equal(resized, ids[np.ix_(rows, columns)])
    assert resized.dtype == ids.dtype
    assert set(np.unique(resized)) <= set(np.unique(ids))


@pytest.mark.parametrize("source", [(1024, 2048), (1052, 1914), (128, 256), (375, 500)])
def test_resized_ids_are_those_of_torch_at_real_sizes(source: tuple[int, int]) -> None:
    ids = np.random.default_rng(0).integers(0, 19, source, np.uint8)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(ids)[None, None], (512, 1024), mode="nearest-exact"
    )
    np.testing.assert_array_equal(resize_labels(ids, (512, 1024)), expected[0, 0].numpy())


IDS = np.array([[0, 7, 33], [26, 11, 255]], np.uint8)


def test_greyscale_palette_and_deep_files_keep_their_ids(tmp_path: Path) -> None:
    palette = Image.new("P", IDS.shape[::-1])
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    palette.putdata(IDS.ravel().tolist())
    palette.save(tmp_path / "palette.png")
    Image.fromarray(IDS).save(tmp_path / "grey.png")
    Image.fromarray(IDS.astype(np.uint16) * 250).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "palette.png") as file:
        assert file.mode == "P"
    np.testing.assert_array_equal(read_labels(tmp_path / "palette.png"), IDS)
    np.testing.assert_array_equal(read_labels(tmp_path / "grey.png"), IDS)
    np.testing.assert_array_equal(read_labels(tmp_path / "deep.png"), IDS.astype(int) * 250)


def test_a_jpeg_is_no_label_map_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "labels.png"
    Image.fromarray(IDS).save(path, format="JPEG")
    with pytest.raises(ValueError, match=r"labels\.png: expected a lossless label map .*found JPEG"):
        read_labels(path)


def test_a_tiff_is_a_label_map_unless_it_holds_jpeg(tmp_path: Path) -> None:
    Image.fromarray(IDS).save(tmp_path / "plain.tif", compression="tiff_lzw")
    Image.fromarray(IDS).save(tmp_path / "lossy.tif", compression="jpeg")
    np.testing.assert_array_equal(read_labels(tmp_path / "plain.tif"), IDS)
    with pytest.raises(ValueError, match=r"lossy\.tif: .*compression jpeg"):
        read_labels(tmp_path / "lossy.tif")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_colour_map_is_told_from_a_map_of_ids(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "color.png")
    with pytest.raises(ValueError, match=r"color\.png: .*colour map.*from_colours"):
        read_labels(tmp_path / "color.png")


def test_a_map_with_alpha_is_refused(tmp_path: Path) -> None:
    Image.new("LA", (4, 4)).save(tmp_path / "alpha.png")
    with pytest.raises(ValueError, match="found mode LA"):
        read_labels(tmp_path / "alpha.png")


@pytest.mark.parametrize("read", [read_labels, read_image])
def test_a_file_that_does_not_decode_is_named(tmp_path: Path, read: object) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for name, content in {
        "cut.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "page.png": b"<html>",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent.png")


def test_images_come_as_rgb(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    alpha = np.random.default_rng(1).integers(0, 256, (5, 7, 1), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(np.concatenate([rgb, alpha], axis=2)).save(tmp_path / "rgba.png")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png"), rgb)
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), rgb)
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.repeat(rgb[..., :1], 3, axis=2))


def test_an_orientation_tag_does_not_turn_a_photo_away_from_its_labels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to display
    Image.new("RGB", (32, 16)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (16, 32, 3)


@needs_samples
def test_real_label_ids_equal_a_loop_over_the_table() -> None:
    path = next((SAMPLES / "cityscapes/gtFine/val").glob("*/*_000294_gtFine_labelIds.png"))
    ids = np.asarray(Image.open(path))
    expected = np.full(ids.shape, 99)
    for file_id in np.unique(ids).tolist():
        expected[ids == file_id] = train_id_of(file_id)
    np.testing.assert_array_equal(CITYSCAPES.to_train_ids(read_labels(path), "map"), expected)


@needs_samples
def test_real_palette_maps_are_train_ids_and_instance_maps_are_not() -> None:
    for path in (SAMPLES / "gta/labels").glob("*.png"):
        ids = CITYSCAPES.check_train_ids(read_labels(path), str(path))
        np.testing.assert_array_equal(ids, np.asarray(Image.open(path)))
        np.testing.assert_array_equal(CITYSCAPES.from_colours(CITYSCAPES.paint(ids), "map"), ids)
    instances = next((SAMPLES / "cityscapes/gtFine/train").glob("*/*_instanceIds.png"))
    with pytest.raises(ValueError, match=r"instanceIds.*found"):
        CITYSCAPES.to_train_ids(read_labels(instances), str(instances))
