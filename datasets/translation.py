"""Maps of one label space in the classes of another: by name, and by names that mean the same outdoors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from datasets.label_space import Ids, LabelSpace

# What stands in streets and what it is called elsewhere, the nearest name first.
SAME: dict[str, tuple[str, ...]] = {
    "sidewalk": ("pavement", "pavement-merged"),
    "building": ("building-other", "building-other-merged", "house", "skyscraper"),
    "wall": ("wall-other", "wall-other-merged", "wall-concrete", "wall-brick", "wall-stone"),
    "fence": ("fence-merged", "railing"),
    "pole": ("streetlight", "column"),
    "traffic sign": ("signboard", "stop sign"),
    "vegetation": ("tree", "tree-merged", "plant", "plant-other", "bush", "palm", "leaves"),
    "terrain": ("grass", "grass-merged", "dirt", "dirt-merged", "earth", "field", "mud", "sand"),
    "sky": ("sky-other", "sky-other-merged", "clouds"),
    "rider": ("person",),
    "truck": ("van",),
    "train": ("bus",),
    "motorcycle": ("minibike",),
}
UNKNOWN_SHOWN = 3  # classes that a sentence lists


class Translation(NamedTuple):
    """A map in other classes."""

    labels: Ids
    lost: float  # part of the pixels that had a class and have none now
    lost_names: tuple[str, ...]  # of their classes, the largest first


def translate(labels: Ids, source: LabelSpace, target: LabelSpace) -> Translation:
    """Train ids of `source` as train ids of `target`; a class that is unknown there becomes void."""
    if source is target:
        return Translation(labels, 0.0, ())
    table = np.full(256, target.void, np.uint8)
    table[: source.num_classes] = [train_id_of(name, target) for name in source.names]
    translated = np.take(table, labels)
    lost = (translated == target.void) & (labels != source.void)
    counts = np.bincount(labels[lost].ravel(), minlength=256)
    largest = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]][:UNKNOWN_SHOWN]
    return Translation(translated, float(lost.mean()), tuple(source.names[k] for k in largest))


def train_id_of(name: str, target: LabelSpace) -> int:
    """The class of `target` that a name stands for, else void."""
    groups = [(key, *names) for key, names in SAME.items() if name in (key, *names)]
    nearest_first = [name, *(alike for group in groups for alike in group)]
    return next((target.names.index(n) for n in nearest_first if n in target.names), target.void)
