"""Pictures for people: overlays, sheets, and PNG files that other programs can read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cldm.pictures import GAP, is_whole, overlay, read_settings, sheet, write_png

RNG = np.random.default_rng(0)


def noise(height: int = 6, width: int = 10) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def test_an_overlay_is_the_mean_of_image_and_map() -> None:
    image, colours = noise(), noise()
    assert image.dtype == np.uint8
    exact = (image.astype(np.float64) + colours.astype(np.float64)) / 2
    assert np.abs(overlay(image, colours) - exact).max() <= 0.5
    assert (overlay(image, colours, 0.0) == image).all()
    assert (overlay(image, colours, 1.0) == colours).all()
    quarter = np.full((1, 1, 3), 200, np.uint8), np.full((1, 1, 3), 100, np.uint8)
    assert overlay(*quarter, opacity=0.25).tolist() == [[[175, 175, 175]]]


def test_a_sheet_has_every_picture_at_its_place_and_white_between() -> None:
    rows = [[noise(), noise(), noise()], [noise()], [noise(), noise()]]
    canvas = sheet(rows)
    assert canvas.shape == (3 * 6 + 2 * GAP, 3 * 10 + 2 * GAP, 3)
    seen = np.zeros(canvas.shape[:2], bool)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            place = slice(i * (6 + GAP), i * (6 + GAP) + 6), slice(j * (10 + GAP), j * (10 + GAP) + 10)
            assert (canvas[place] == picture).all()
            seen[place] = True
    assert (canvas[~seen] == 255).all()
    assert (~seen).any()


def test_the_largest_picture_of_a_sheet_sets_its_cells() -> None:
    small, wide, high = noise(4, 5), noise(4, 9), noise(7, 5)
    canvas = sheet([[small, wide], [high]])
    assert canvas.shape == (2 * 7 + GAP, 2 * 9 + GAP, 3)
    assert (canvas[:4, :5] == small).all()
    assert (canvas[:4, 9 + GAP : 18 + GAP] == wide).all()
    assert (canvas[7 + GAP :, :5] == high).all()
    assert (canvas[4 : 7 + GAP] == 255).all()


def test_a_png_holds_its_pixels_and_its_settings_for_any_reader(tmp_path: Path) -> None:
    picture, settings = (
        noise(),
        {"prompt": 'a "wet" road, Stra\u00dfe', "seed": 3, "size": [64, 128], "scale": 9.0},
    )
    write_png(tmp_path / "a.png", picture, settings)
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert (np.asarray(image) == picture).all()
        assert json.loads(image.text["scenecontrol"]) == settings
    assert read_settings(tmp_path / "a.png") == settings
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"], "no partial file stays"


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", noise())
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(TypeError):
        write_png(tmp_path / "a.png", np.zeros((4, 4, 7), np.float64))
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_other_and_damaged_files_have_no_settings(tmp_path: Path) -> None:
    write_png(tmp_path / "whole.png", noise(64, 64), {"seed": 0})
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    Image.fromarray(noise()).save(tmp_path / "foreign.png")
    damaged = ("cut", "empty", "text")
    assert [read_settings(tmp_path / f"{name}.png") for name in (*damaged, "foreign")] == [None] * 4
    assert [is_whole(tmp_path / f"{name}.png") for name in damaged] == [False] * 3
    assert is_whole(tmp_path / "whole.png")
    assert is_whole(tmp_path / "foreign.png")
