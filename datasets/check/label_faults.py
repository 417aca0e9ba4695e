"""What one label map is examined for, and which mistake explains ids that its label space does not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datasets.check.alignment import GRID
from datasets.check.palette_guess import guess_palette
from datasets.files import read_image
from datasets.label_space import LabelSpace, RawIds, resize_labels

# Pixels between two others in a row or column whose ids lie on either side of theirs, for each boundary. Maps
# that were drawn have up to 0.06 of them, rendered and real ones; ids that were interpolated 0.17 and more.
BLENDED = 0.12
LEAST_BOUNDARIES = 100
INSTANCE_BASE = 1000  # an instance id is its class times this, and a number

Histogram = NDArray[np.float64]  # (256,) by raw value
Fault = tuple[str, str]  # code and message


@dataclass
class LabelRecord:
    """A map that was read: its ids, which the caller drops, what is wrong with it, and its counts."""

    faults: list[Fault] = field(default_factory=list)
    ids: RawIds | None = None  # (H, W) as the file holds them, known or not; None of a file without ids
    pixels: Histogram | None = None
    on_grid: Histogram | None = None  # pixels of a small grid, and below the sum of their heights
    heights: Histogram | None = None  # 0 is the top of the picture, 1 its bottom
    void: int = 0  # pixels


def examine_labels(
    path: Path, read: Callable[[Path], RawIds], space: LabelSpace, *, train_ids: bool
) -> LabelRecord:
    """Read a map to its end and check it against its label space; no fault of the file is raised.

    read       gives the raw ids of a file, or a ValueError that says why not
    train_ids  whether the file is taken for one of train ids
    """
    record = LabelRecord()
    try:
        ids = record.ids = read(path)
    except (ValueError, OSError) as error:
        record.faults.append(explain_unreadable(path, str(error)))
        return record
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        message = (
            f"{path}: expected an integer map (H, W), found {ids.dtype} {ids.shape}; save it as greyscale"
        )
        record.faults.append(("unreadable-label", message))
        record.ids = None
        return record
    check = space.check_train_ids if train_ids else space.check_file_ids
    try:
        check(ids, where=str(path))
    except ValueError as error:
        record.faults.append(explain_unknown(path, ids, space, str(error)))
    else:
        if share_blended(ids) > BLENDED:
            record.faults.append(("blended-ids", _blended(path)))
        if ids.dtype != np.uint8:
            message = (
                f"{path}: expected 8 bits for each id, found {ids.dtype}; its ids are known, so it is read"
            )
            record.faults.append(("deep-map", message))
    count(ids, space, record, train_ids=train_ids)
    if record.void == ids.size:
        message = f"{path}: expected a map that shows classes, found void in all pixels; replace or remove it"
        record.faults.append(("all-void", message))
    return record


def count(ids: RawIds, space: LabelSpace, record: LabelRecord, *, train_ids: bool) -> None:
    """Fill in the counts; values above 255 take no part, and -1 is 255."""
    values = np.where((ids < -1) | (ids > 255), 254, ids) if ids.dtype != np.uint8 else ids
    values = values.astype(np.uint8)
    record.pixels = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    grid = resize_labels(values, GRID)
    height = np.repeat((np.arange(GRID[0]) + 0.5) / GRID[0], GRID[1])
    record.on_grid = np.bincount(grid.ravel(), minlength=256).astype(np.float64)
    record.heights = np.bincount(grid.ravel(), weights=height, minlength=256).astype(np.float64)
    record.void = int(record.pixels[void_values(space, train_ids=train_ids)].sum())


def void_values(space: LabelSpace, *, train_ids: bool) -> list[int]:
    """The raw values that mean void."""
    if train_ids:
        return [space.void]
    rows = zip(space.row_ids, space.row_train_ids, strict=True)
    return sorted({space.void_file_id % 256, *(i % 256 for i, k in rows if k == space.void)})


def share_blended(ids: RawIds) -> float:
    """Pixels that lie between two neighbours, by place and by id, for each boundary; 0 of few boundaries.

    Interpolation makes such pixels wherever two regions meet; a drawn map has them only by chance.
    """
    between = boundaries = 0
    for view in (ids, ids.T):
        first, middle, last = view[:, :-2], view[:, 1:-1], view[:, 2:]
        rising, falling = (first < middle) & (middle < last), (first > middle) & (middle > last)
        between += int((rising | falling).sum())
        higher, lower = np.maximum(view[:, 1:], view[:, :-1]), np.minimum(view[:, 1:], view[:, :-1])
        boundaries += int((higher - lower >= 2).sum())
    return between / boundaries if boundaries >= LEAST_BOUNDARIES else 0.0


def explain_unreadable(path: Path, reason: str) -> Fault:
    """Why a file gives no ids: a JPEG, a painted map, or a damaged file."""
    try:
        with Image.open(path) as image:
            found, mode = image.format, image.mode
    except (OSError, SyntaxError, ValueError):
        return "damaged-label", reason
    if found in ("JPEG", "WEBP"):
        return "jpeg-label", reason
    if mode not in ("RGB", "RGBA"):
        return ("damaged-label" if "that decodes" in reason else "unreadable-label"), reason
    try:
        guess = guess_palette(read_image(path))
    except ValueError:
        return "damaged-label", reason
    told = "no known palette explains its colours" if guess is None else guess.sentence()
    return "colour-label", f"{reason} Here {told}."


def explain_unknown(path: Path, ids: RawIds, space: LabelSpace, reason: str) -> Fault:
    """What a map with unknown ids is: a map of instances, interpolated ids, or one of another space."""
    values = np.unique(ids).astype(np.int64)
    classes = np.where(values >= INSTANCE_BASE, values // INSTANCE_BASE, values)
    if values.max() >= INSTANCE_BASE and np.isin(classes, np.array(space.row_ids) % 256).all():
        message = (
            f"{path}: expected ids of classes, found instance ids (class x {INSTANCE_BASE} + number) up to"
            f" {values.max()}; name the labelIds file of the frame, or divide by {INSTANCE_BASE}"
        )
        return "instance-ids", message
    if share_blended(ids) > BLENDED:
        return "blended-ids", f"{_blended(path)} {reason}"
    return "unknown-ids", reason


def _blended(path: Path) -> str:
    return (
        f"{path}: expected ids that are never mixed, found ids between those of their neighbours along the"
        " boundaries; it was resized with interpolation: make it again, with the nearest neighbour."
    )
