"""What the page of the demo is made of, read from the folders of the demo; what is missing is empty."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cldm.pictures import GAP, Rgb
from datasets.hint_encoding import hint_encoding
from datasets.hints import find_caption, read_hint
from datasets.label_space import LabelSpace
from datasets.streets import CONDITIONS
from datasets.streets.dataset import StreetsDataset

LABEL_SPACE = "cityscapes"
SPLIT = "val"

Steps = Mapping[str, Sequence[tuple[str, float | None]]]
"""By section of the page: commands, and the seconds that each took."""


class Frame(NamedTuple):
    """A validation frame of a rendered tree."""

    key: str  # such as camera-rain_000001_000006
    photo: Path
    labels: Path

    @property
    def condition(self) -> str:
        """Such as rain."""
        return self.key.partition("_")[0].partition("-")[2]

    @property
    def scene(self) -> str:
        """What the same scene of another domain has in common with it: condition and number."""
        return self.key.partition("-")[2]

    @property
    def caption(self) -> str:
        """Its sentence."""
        return find_caption(self.labels) or ""

    def colours(self) -> Rgb:
        """Its map, painted."""
        hint = read_hint(self.labels, "auto", hint_encoding(LabelSpace.load(LABEL_SPACE)), None)
        return (hint * 255).round().astype("uint8")


def frames_of(root: Path) -> list[Frame]:
    """The validation frames of a tree, in order."""
    photos, maps = (
        find(root, SPLIT) for find in (StreetsDataset.find_photos, StreetsDataset.find_label_maps)
    )
    return [Frame(key, photos[key], maps[key]) for key in sorted(photos.keys() & maps.keys())]


def one_of_each(frames: Sequence[Frame], number: int = 0) -> list[Frame]:
    """For each condition its frame `number`, or the last one."""
    by_condition = [[frame for frame in frames if frame.condition == name] for name in CONDITIONS]
    return [some[min(number, len(some) - 1)] for some in by_condition if some]


def sample_of(folder: Path, frame: Frame) -> Path | None:
    """The first sample that `generate.py` wrote for the map of a frame."""
    return next(iter(sorted(folder.rglob(f"{frame.labels.stem}_seed*.png"))), None)


def cut(sheet: Rgb, size: tuple[int, int]) -> list[list[Rgb]]:
    """The pictures of a sheet, row by row; the inverse of `cldm.pictures.sheet`."""
    height, width = size
    rows, columns = (range(0, sheet.shape[axis], side + GAP) for axis, side in enumerate(size))
    return [[sheet[y : y + height, x : x + width] for x in columns] for y in rows]


def read_card(path: Path) -> dict[str, Any]:
    """A card of the judge."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_commands(path: Path) -> dict[str, list[tuple[str, float | None]]]:
    """Commands by section, from lines of: start in seconds, section, command; the last one has no end."""
    if not path.is_file():
        return {}
    rows = [line.split("\t", 2) for line in path.read_text(encoding="utf-8").splitlines()]
    starts = [float(row[0]) for row in rows]
    found: dict[str, list[tuple[str, float | None]]] = {}
    for i, (start, section, command) in enumerate(rows):
        seconds = starts[i + 1] - float(start) if i + 1 < len(rows) else None
        found.setdefault(section, []).append((command, seconds))
    return found
