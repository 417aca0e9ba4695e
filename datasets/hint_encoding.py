"""Hints of label maps: the colours, or the channels, in which a control branch was taught to see ids."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from datasets.label_space import Ids, LabelSpace, Rgb, read_table

Table = NDArray[np.float32]  # (256, C) in [0, 1], by file id


@dataclass(frozen=True, eq=False)
class HintEncoding:
    """What each file id of a label space looks like in a hint."""

    name: str
    space: LabelSpace
    table: Table

    @property
    def channels(self) -> int:
        """C, the channels of a hint."""
        return self.table.shape[1]

    @cached_property
    def tells_void_apart(self) -> bool:
        """Whether it shows more than the train ids say, so that maps of train ids are not enough."""
        known = np.array(self.space.row_ids) % 256
        return any(len(np.unique(rows, axis=0)) > 1 for rows in self._rows_of_each_train_id(known))

    def encode(self, file_ids: Ids) -> NDArray[np.float32]:
        """(H, W, C) in [0, 1] of checked file ids, in one lookup."""
        return np.take(self.table, file_ids, axis=0)

    def _rows_of_each_train_id(self, known: NDArray[np.intp]) -> list[Table]:
        train_ids = np.array(self.space.row_train_ids)
        return [self.table[known[train_ids == k]] for k in np.unique(train_ids)]


def train_colours(space: LabelSpace) -> Table:
    """The colours of the scored classes; void is black. ControlNet 1.0 and 1.1 on ADE20K."""
    return _by_train_id(space, space.colours)


def file_colours(space: LabelSpace) -> Table:
    """The colours of all file ids, those of void too, as in `gtFine_color`: SCP-Diff on Cityscapes."""
    table = np.zeros((256, 3), np.float32)
    table[np.array(space.row_ids) % 256] = np.array(space.row_colours, np.float32) / 255
    return table


def ade20k_colours(space: LabelSpace) -> Table:
    """Cityscapes in the colours of the nearest ADE20K classes: for published segmentation ControlNets."""
    rows = {int(row["trainId"]): row for row in read_table("cityscapes_to_ade20k")}
    colours = [[int(rows[k][channel]) for channel in "RGB"] for k in range(space.num_classes)]
    return _by_train_id(space, np.array(colours, np.uint8))


def scp_diff_grid(space: LabelSpace) -> Table:
    """Id n as 30 times its three digits to base 7: SCP-Diff on ADE20K."""
    table = np.zeros((256, 3), np.float32)
    for n in space.row_ids:
        table[n] = [n // 49 * 30, n // 7 % 7 * 30, n % 7 * 30]
    return table / np.float32(255)


def one_hot(space: LabelSpace) -> Table:
    """A channel for each class and a last one for void: DGInStyle's 20 on Cityscapes."""
    table = np.zeros((256, space.num_classes + 1), np.float32)
    for file_id, train_id in zip(space.row_ids, space.row_train_ids, strict=True):
        table[file_id % 256, min(train_id, space.num_classes)] = 1
    table[space.void_file_id] = np.eye(space.num_classes + 1)[-1]
    return table


# By name: the only label space that it is for, or None, and what makes its table. The first is the default.
ENCODINGS: dict[str, tuple[str | None, Callable[[LabelSpace], Table]]] = {
    "colours": (None, train_colours),
    "onehot": (None, one_hot),
    "label_colours": ("cityscapes", file_colours),
    "ade20k_colours": ("cityscapes", ade20k_colours),
    "scp_diff_grid": ("ade20k", scp_diff_grid),
}


def seen_as_one_hot(encoding: HintEncoding, void: str | None = None) -> Table:
    """(K + 1, C): what an encoding shows where one-hot has its k-th channel; void is the last.

    void  the class whose look stands for all of void, where the encoding tells those classes apart

    Raises
        ValueError  void of several looks and none chosen, or a class that is not void
    """
    space = encoding.space
    if encoding.name == "onehot":
        raise ValueError(f"expected another encoding than onehot of {space.name}, which is one-hot already")
    ids: dict[int, list[int]] = {k: [] for k in (*range(space.num_classes), space.void)}
    for file_id, train_id in zip(space.row_ids, space.row_train_ids, strict=True):
        ids[train_id].append(file_id % 256)
    names = dict(zip(space.row_names, space.row_ids, strict=True))
    if void is not None and names.get(void, -1) % 256 not in ids[space.void]:
        known = ", ".join(name for name, i in names.items() if i % 256 in ids[space.void])
        raise ValueError(f"expected a void class of {space.name}: {known or 'it has none'}, found {void!r}")
    ids[space.void] = [names[void] % 256] if void else [*ids[space.void], space.void_file_id]
    looks = [np.unique(encoding.table[some], axis=0) for some in ids.values()]
    if any(len(rows) > 1 for rows in looks):
        raise ValueError(
            f"the hint encoding {encoding.name!r} shows the void classes of {space.name} in {len(looks[-1])} "
            "ways and one-hot in one; choose whose stands for all of them, such as --void unlabeled"
        )
    return np.concatenate(looks)


@cache
def hint_encoding(space: LabelSpace, name: str = "colours") -> HintEncoding:
    """The encoding `name` of a label space; read-only, because it is shared."""
    known = [key for key, (only, _) in ENCODINGS.items() if only in (None, space.name)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown hint encoding {name!r} of {space.name}: expected one of {', '.join(known)}{hint}"
        )
    table = ENCODINGS[name][1](space)
    table.setflags(write=False)
    return HintEncoding(name, space, table)


def _by_train_id(space: LabelSpace, colours: Rgb) -> Table:
    table = np.zeros((256, 3), np.float32)
    for file_id, train_id in zip(space.row_ids, space.row_train_ids, strict=True):
        if train_id != space.void:
            table[file_id % 256] = colours[train_id].astype(np.float32) / 255
    return table
