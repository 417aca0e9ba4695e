"""Pictures for people: overlays, sheets, and PNG files that carry the settings they were made with."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from cldm.whole_files import whole_file

log = logging.getLogger(__name__)

Rgb = NDArray[np.uint8]
"""(H, W, 3) uint8."""

SETTINGS_KEY = "scenecontrol"
GAP = 4  # white pixels between the pictures of a sheet


def overlay(image: Rgb, colours: Rgb, opacity: float = 0.5) -> Rgb:
    """Lay a painted map over an image of the same size."""
    mixed = (1 - opacity) * image.astype(np.float32) + opacity * colours.astype(np.float32)
    return mixed.round().astype(np.uint8)


def sheet(rows: Sequence[Sequence[Rgb]]) -> Rgb:
    """Rows of pictures as one, with white gaps; the largest picture sets the size of a cell."""
    height, width = (max(picture.shape[axis] for row in rows for picture in row) for axis in (0, 1))
    columns = max(len(row) for row in rows)
    size = (len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    canvas = np.full(size, 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            y, x = i * (height + GAP), j * (width + GAP)
            canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return canvas


def write_png(path: Path, picture: Rgb, settings: Mapping[str, Any] | None = None) -> None:
    """Write a PNG whole or not at all; `settings` go into its text as JSON."""
    notes = PngImagePlugin.PngInfo()
    if settings is not None:
        notes.add_itxt(SETTINGS_KEY, json.dumps(settings, sort_keys=True))
    with whole_file(path) as partial:
        Image.fromarray(np.ascontiguousarray(picture)).save(partial, format="PNG", pnginfo=notes)


def is_whole(path: Path) -> bool:
    """Whether a file is a picture that decodes to its last pixel."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for a foreign, a cut and a damaged file
        return False
    return True


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings in a PNG of `write_png`; None for another or a damaged file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return json.loads(image.info[SETTINGS_KEY])
    except (OSError, KeyError, AttributeError, ValueError, SyntaxError, RecursionError):
        return None


def is_made(path: Path, settings: Mapping[str, Any], *, overwrite: bool, elsewhere: str = "--out") -> bool:
    """Whether a picture is there with these settings; a damaged one is not.

    overwrite  a picture with other settings is to be made again; else it is refused
    elsewhere  the flag that names another folder

    Raises
        ValueError  the picture has other settings
    """
    if not path.exists():
        return False
    if not is_whole(path):
        log.warning("%s is damaged and is made again", path)
        return False
    found = read_settings(path) or {}
    differing = [name for name, value in settings.items() if found.get(name) != value]
    if differing and not overwrite:
        name = differing[0]
        raise ValueError(
            f"{path} is there with other settings ({name} {found.get(name)!r}, now {settings[name]!r});"
            f" choose another {elsewhere}, or --overwrite"
        )
    return not differing
