"""Label maps: which ids a data set knows, their colours, and how maps are resized.

A label map stays a map of ids from the file to the network. File ids become train ids 0..K-1 with
void = 255 in one table lookup; colours are painted from train ids, never resized or averaged.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint8]  # (H, W) train ids, 255 = void
RawIds = NDArray[np.integer]  # (H, W) ids as a file holds them
Rgb = NDArray[np.uint8]  # (H, W, 3)
Size = tuple[int, int]  # (H, W)
Scalar = TypeVar("Scalar", bound=np.generic)

PALETTES = Path(__file__).parent / "palettes"
SPACES = ("ade20k", "cityscapes", "coco_panoptic133", "cocostuff")
_UNKNOWN = 254  # table entry of ids that the label space does not have; no data set has 254 classes
_SHOWN = 5  # offenders that an error lists


@dataclass(frozen=True, eq=False)
class LabelSpace:
    """The classes of a data set, one row for each file id of its palette table.

    Several file ids may share a train id (all void classes do) or a colour (pole and polegroup).
    `names`, `file_ids` and `colours` are in train-id order and hold the K scored classes only.
    """

    name: str
    row_ids: tuple[int, ...]
    row_train_ids: tuple[int, ...]
    row_names: tuple[str, ...]
    row_colours: tuple[tuple[int, int, int], ...]

    void: ClassVar[int] = 255

    @classmethod
    def load(cls, name: str) -> LabelSpace:
        """The label space of `palettes/<name>.tsv`; the same object on every call."""
        return _load(name)

    @property
    def num_classes(self) -> int:
        """K, the number of train ids without void."""
        return len(self._rows)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Class names, by train id."""
        return tuple(self.row_names[row] for row in self._rows)

    @cached_property
    def file_ids(self) -> tuple[int, ...]:
        """The file id of each train id."""
        return tuple(self.row_ids[row] for row in self._rows)

    @cached_property
    def void_file_id(self) -> int:
        """A file id that stands for void: the first that the table has, else 255."""
        voids = [i for i, k in zip(self.row_ids, self.row_train_ids, strict=True) if k == self.void]
        return voids[0] if voids else self.void

    @cached_property
    def colours(self) -> Rgb:
        """(K, 3) colours, by train id."""
        return self._colour_table[: self.num_classes]

    def to_train_ids(self, label_ids: RawIds, where: str) -> Ids:
        """Train ids of a map of file ids; `where` names the file in an error.

        A negative id counts as void in both spellings: -1, and the 255 that uint8 makes of it.
        """
        return self._translate(self._train_id_table, label_ids, where, "label ids")

    def to_file_ids(self, train_ids: RawIds, where: str) -> Ids:
        """File ids of a map of train ids: of a class its own, of void `void_file_id`."""
        return np.take(self._file_id_table, self.check_train_ids(train_ids, where))

    def check_file_ids(self, file_ids: RawIds, where: str) -> Ids:
        """The same map as uint8 (-1 is 255), if it holds only file ids of the table; ValueError if not."""
        self.to_train_ids(file_ids, where)
        return file_ids.astype(np.uint8, copy=False)

    def check_train_ids(self, train_ids: RawIds, where: str) -> Ids:
        """The same map as uint8, if it holds only 0..K-1 and void; ValueError if not."""
        return self._translate(self._identity_table, train_ids, where, "train ids")

    def paint(self, train_ids: RawIds) -> Rgb:
        """(H, W, 3) colours of a map of train ids; void is black."""
        return np.take(self._colour_table, self.check_train_ids(train_ids, "paint"), axis=0)

    def from_colours(self, rgb: Rgb, where: str) -> Ids:
        """Train ids of a painted map; only exact colours count.

        Where classes share a colour the scored one wins over void, then the lower train id: in
        Cityscapes a licence plate reads as car and a polegroup as pole. Black and the colours of
        void classes (dynamic, parking, ...) read as void.
        """
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
            raise ValueError(f"{where}: expected uint8 colours (H, W, 3), found {rgb.dtype} {rgb.shape}.")
        known, train_ids = self._colour_codes
        codes = _colour_codes(rgb)
        slots = np.searchsorted(known, codes).clip(max=len(known) - 1)
        strange = known[slots] != codes
        if strange.any():
            raise ValueError(self._strange_colours(rgb[strange], where))
        return train_ids[slots]

    def _strange_colours(self, pixels: NDArray[np.uint8], where: str) -> str:
        colours, counts = np.unique(pixels, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:_SHOWN]
        shown = ", ".join(f"({r}, {g}, {b})" for r, g, b in colours[order].tolist())
        return (
            f"{where}: expected the colours of {self.name}, found {len(pixels)} pixels in {len(colours)}"
            f" other colours, most often {shown}. Resizing and JPEG blend colours: use the original PNG."
        )

    def _translate(self, table: Ids, ids: RawIds, where: str, kind: str) -> Ids:
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(f"{where}: expected an integer map (H, W), found {ids.dtype} {ids.shape}.")
        translated = np.take(table, ids.astype(np.uint8, copy=False))  # -1 wraps to 255, which is void
        strange = translated == _UNKNOWN
        if ids.dtype != np.uint8:
            strange |= (ids < -1) | (ids > 255)
        if strange.any():
            found = np.unique(ids[strange])
            shown = ", ".join(map(str, found[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")
            valid = np.flatnonzero(table != _UNKNOWN)
            raise ValueError(
                f"{where}: expected {self.name} {kind} {_ranges(valid.tolist())}, found {shown} in"
                f" {int(strange.sum())} pixels. Check that the map belongs to {self.name} and holds {kind}."
            )
        return translated

    @cached_property
    def _rows(self) -> tuple[int, ...]:
        """The first row of each train id."""
        num_classes = len(set(self.row_train_ids) - {self.void})
        return tuple(self.row_train_ids.index(k) for k in range(num_classes))

    @cached_property
    def _train_id_table(self) -> Ids:
        table = np.full(256, _UNKNOWN, np.uint8)
        table[np.array(self.row_ids) % 256] = self.row_train_ids
        table[self.void_file_id] = self.void
        return _frozen(table)

    @cached_property
    def _file_id_table(self) -> Ids:
        table = np.full(256, self.void_file_id, np.uint8)
        table[: self.num_classes] = np.array(self.file_ids) % 256
        return _frozen(table)

    @cached_property
    def _identity_table(self) -> Ids:
        table = np.full(256, _UNKNOWN, np.uint8)
        table[: self.num_classes] = np.arange(self.num_classes)
        table[self.void] = self.void
        return _frozen(table)

    @cached_property
    def _colour_table(self) -> Rgb:
        table = np.zeros((256, 3), np.uint8)
        table[: self.num_classes] = [self.row_colours[row] for row in self._rows]
        return _frozen(table)

    @cached_property
    def _colour_codes(self) -> tuple[NDArray[np.uint32], Ids]:
        """Known colours as sorted codes, and the train id of each."""
        rows = [((0, 0, 0), self.void), *zip(self.row_colours, self.row_train_ids, strict=True)]
        winners: dict[int, int] = {}
        for (r, g, b), train_id in rows:
            code = r << 16 | g << 8 | b
            winners[code] = min(train_id, winners.get(code, self.void))  # void is the largest id
        codes = sorted(winners)
        return (
            _frozen(np.array(codes, np.uint32)),
            _frozen(np.array([winners[code] for code in codes], np.uint8)),
        )


def resize_labels(ids: NDArray[Scalar], size: Size) -> NDArray[Scalar]:
    """The id nearest to each pixel centre of an (H, W) grid, as torch's `nearest-exact` has it.

    Where a centre falls on the border of two pixels the later one is taken; torch's rounding takes either.

    A painted map (H, W, 3) is taken as well.
    """
    rows, columns = (_nearest(n, m) for n, m in zip(ids.shape[:2], size, strict=True))
    return ids[rows[:, None], columns]


def _nearest(n: int, m: int) -> NDArray[np.intp]:
    """Source index, of n, for each of m pixels: floor((i + 1/2) n / m), in integers, so it is exact."""
    return (2 * np.arange(m) + 1) * n // (2 * m)


@cache
def _load(name: str) -> LabelSpace:
    if name not in SPACES:
        near = difflib.get_close_matches(name, SPACES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown label space {name!r}: expected one of {', '.join(SPACES)}{hint}")
    rows = read_table(name)
    train_ids = [int(row["trainId"]) for row in rows]
    return LabelSpace(
        name=name,
        row_ids=tuple(int(row.get("png_id", row["id"])) for row in rows),  # COCO's own ids are not the files'
        row_train_ids=tuple(LabelSpace.void if train_id < 0 else train_id for train_id in train_ids),
        row_names=tuple(row["name"] for row in rows),
        row_colours=tuple((int(row["R"]), int(row["G"]), int(row["B"])) for row in rows),
    )


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of `palettes/<name>.tsv`."""
    with (PALETTES / f"{name}.tsv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def _colour_codes(rgb: Rgb) -> NDArray[np.uint32]:
    r, g, b = (rgb[..., c].astype(np.uint32) for c in range(3))
    return np.asarray(r << 16 | g << 8 | b, np.uint32)


def _ranges(values: Sequence[int]) -> str:
    """'0..18, 255' for a sorted list."""
    starts = [v for v in values if v - 1 not in values]
    ends = [v for v in values if v + 1 not in values]
    return ", ".join(f"{a}..{b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True))


def _frozen(array: NDArray) -> NDArray:
    array.setflags(write=False)  # label spaces are shared
    return array
