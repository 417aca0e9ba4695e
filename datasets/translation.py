"""Maps of one label space in the classes of another: by name, and by names that mean the same outdoors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from datasets.label_space import Ids, LabelSpace

# What stands in streets and has other names elsewhere; what is not here and has no namesake becomes void.
SAME: dict[str, tuple[str, ...]] = {
    "sidewalk": ("sidewalk", "pavement", "pavement-merged"),
    "building": ("building", "house", "skyscraper", "building-other", "building-other-merged"),
    "wall": ("wall", "wall-other", "wall-brick", "wall-concrete", "wall-stone", "wall-other-merged"),
    "fence": ("fence", "fence-merged", "railing"),
    "pole": ("pole", "streetlight", "column"),
    "traffic light": ("traffic light",),
    "traffic sign": ("traffic sign", "stop sign", "signboard"),
    "vegetation": ("vegetation", "tree", "plant", "palm", "bush", "tree-merged", "plant-other", "leaves"),
    "terrain": ("terrain", "grass", "earth", "field", "dirt", "mud", "sand", "grass-merged", "dirt-merged"),
    "sky": ("sky", "sky-other", "clouds", "sky-other-merged"),
    "truck": ("truck", "van"),
    "motorcycle": ("motorcycle", "minibike"),
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
    groups = [set(names) | {key} for key, names in SAME.items()]
    alike = {name}.union(*(group for group in groups if name in group))
    found = [k for k, theirs in enumerate(target.names) if theirs in alike]
    exact = [k for k in found if target.names[k] == name]
    return (exact or found or [target.void])[0]
