"""Whether ids mean what they are taken for: the sky is above, the road below, and walls more than poles.

A map whose ids are all one too high, or that holds train ids under the name of label ids, holds known ids and
passes every other check. So the maps of a split are read in other ways too, and the reading under which the
classes lie where they usually do, as large as they usually are, is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from datasets.label_space import LabelSpace, read_table

# Any four street scenes tell; other scenes differ more from each other.
LEAST_FRAMES = {"cityscapes": 4}
LEAST_FRAMES_ELSE = 20
# Nats a pixel by which another reading must be more plausible. Calibrated on real and rendered street scenes,
# where maps that are shifted or hold train ids gain 1.2 to 5, and right ones nothing.
MARGIN = 0.6
STRANGE = 1e-4  # share of the pixels that an id which is not of the label space would have
NARROW, WIDE = 0.17, 0.35  # spread of the height of a class, as a share of the picture's
UNPLACED = 0.5

# Share of the labelled pixels in Cityscapes' training set, by train id, as published.
CITYSCAPES = (
    *(0.369, 0.061, 0.228, 0.0066, 0.0088, 0.0123, 0.0021, 0.0055, 0.159, 0.0116),
    *(0.040, 0.0122, 0.0014, 0.070, 0.0027, 0.0024, 0.0023, 0.0010, 0.0041),
)
CITYSCAPES_VOID = {"ego vehicle": 0.04, "out of roi": 0.02, "static": 0.02, "ground": 0.015, "parking": 0.01}
# Where a class usually lies: 0 is the top of the picture, 1 its bottom. By words of its name.
HEIGHTS = {
    **dict.fromkeys(("sky", "sky-other", "clouds", "ceiling", "ceiling-other", "ceiling-tile"), 0.15),
    **dict.fromkeys(("chandelier", "fan", "traffic light", "skyscraper"), 0.25),
    **dict.fromkeys(("building", "vegetation", "tree", "mountain", "hill", "building-other"), 0.35),
    **dict.fromkeys(("car", "truck", "bus", "person", "rider", "train"), 0.55),
    **dict.fromkeys(("road", "floor", "grass", "sand", "rug", "carpet", "runway", "dirt track"), 0.8),
    **dict.fromkeys(("pavement", "snow", "dirt", "floor-wood", "floor-tile", "floor-other"), 0.8),
    **dict.fromkeys(("floor-marble", "floor-stone", "gravel", "playingfield"), 0.8),
    **dict.fromkeys(("sidewalk", "terrain", "earth", "field", "parking", "ground", "rail track"), 0.72),
    **dict.fromkeys(("ego vehicle",), 0.95),
}


@dataclass
class IdCounts:
    """Pixels of each raw value 0..255 in a split's maps."""

    pixels: NDArray[np.float64]  # (256,) on a small grid, so that every frame counts alike
    heights: NDArray[np.float64]  # (256,) sum of the heights of those, 0 at the top and 1 at the bottom
    all_pixels: NDArray[np.float64]  # (256,) of the maps themselves
    frames: int = 0

    @classmethod
    def none(cls) -> IdCounts:
        """Of no frames."""
        return cls(np.zeros(256), np.zeros(256), np.zeros(256))

    def add(
        self, pixels: NDArray[np.float64], heights: NDArray[np.float64], all_pixels: NDArray[np.float64]
    ) -> None:
        """Count a frame."""
        self.pixels += pixels
        self.heights += heights
        self.all_pixels += all_pixels
        self.frames += 1


@dataclass(frozen=True)
class Prior:
    """What is known of each file id of a label space beforehand."""

    shares: NDArray[np.float64]  # (256,) of the pixels; `STRANGE` of ids that it does not have
    heights: NDArray[np.float64]  # (256,) mean
    spreads: NDArray[np.float64]  # (256,)

    def plausibility(self, counts: IdCounts, file_ids: NDArray[np.intp]) -> float:
        """Mean log likelihood of a pixel, if raw value v stands for the file id `file_ids[v]` (-1: none)."""
        seen = np.flatnonzero(counts.pixels)
        share = counts.pixels[seen] / counts.pixels.sum()
        height = counts.heights[seen] / counts.pixels[seen]
        ids = file_ids[seen]
        away = (height - self.heights[ids]) / self.spreads[ids]
        log_likelihood = np.log(self.shares[ids]) - away**2 / 2 - np.log(self.spreads[ids])
        return float(share @ np.where(ids < 0, np.log(STRANGE), log_likelihood))


def better_reading(space: LabelSpace, counts: IdCounts, *, train_ids: bool) -> tuple[str, float] | None:
    """Another reading of raw values that is clearly more plausible, in words, and by how much; or None.

    train_ids  whether the values are taken for train ids, and not for label ids
    """
    labelled = counts.pixels.sum() - counts.pixels[[0, 255]].sum()
    if counts.frames < LEAST_FRAMES.get(space.name, LEAST_FRAMES_ELSE) or not labelled:
        return None
    prior, table = prior_of(space.name), readings(space, train_ids=train_ids)
    scores = {name: prior.plausibility(counts, file_ids) for name, file_ids in table.items()}
    best = max(scores, key=lambda name: scores[name])  # of equals the first, which is "as it is"
    gain = scores[best] - scores[AS_IT_IS]
    return (best, gain) if gain > MARGIN else None


AS_IT_IS = "as they are"


def readings(space: LabelSpace, *, train_ids: bool) -> Mapping[str, NDArray[np.intp]]:
    """By description: the file id (256,) that each raw value would stand for, -1 for none."""
    as_label_ids = np.full(256, -1)
    for row in space.row_ids:
        as_label_ids[row % 256] = row % 256
    as_label_ids[space.void_file_id % 256] = space.void_file_id % 256
    as_train_ids = np.full(256, -1)
    as_train_ids[: space.num_classes] = np.array(space.file_ids) % 256
    as_train_ids[space.void] = space.void_file_id % 256
    plain, other = (as_train_ids, as_label_ids) if train_ids else (as_label_ids, as_train_ids)
    found = {
        AS_IT_IS: plain,
        "one too high": np.concatenate([[-1], plain[:-1]]),
        "one too low": np.concatenate([plain[1:], [-1]]),
        "label ids" if train_ids else "train ids": other,
    }
    found["one too high"][255] = plain[255]  # void stays where it is when the others are moved
    found["one too low"][255] = plain[255]
    return found


@cache
def prior_of(name: str) -> Prior:
    """Of a label space: shares as published where they are, and the usual heights of well-known classes."""
    space = LabelSpace.load(name)
    known = _published_shares(space)
    shares, heights, spreads = np.full(256, STRANGE), np.full(256, UNPLACED), np.full(256, WIDE)
    for file_id, train_id, class_name in zip(
        space.row_ids, space.row_train_ids, space.row_names, strict=True
    ):
        place = file_id % 256
        void_share = CITYSCAPES_VOID.get(class_name, 0.004) if name == "cityscapes" else 0.05
        shares[place] = void_share if train_id == space.void else known[train_id]
        if class_name in HEIGHTS:
            heights[place], spreads[place] = HEIGHTS[class_name], NARROW
    if not any(train_id == space.void for train_id in space.row_train_ids):
        shares[space.void] = 0.05
    shares[space.void_file_id % 256] = max(0.05, shares[space.void_file_id % 256])
    return Prior(shares, heights, spreads)


def _published_shares(space: LabelSpace) -> NDArray[np.float64]:
    """(K,) by train id; the same for all classes where no figures are published."""
    if space.name == "cityscapes":
        return np.array(CITYSCAPES)
    rows = read_table(space.name)
    if "pixel_ratio" in rows[0]:
        ratios = {int(row["trainId"]): float(row["pixel_ratio"] or 0) for row in rows}
        return np.array([max(ratios[k], 2e-4) for k in range(space.num_classes)])
    return np.full(space.num_classes, 1 / space.num_classes)
