"""Figures of a segmenter for a card: ours, the ceiling's, and the ratio, with intervals over maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metrics.judging import ratios
from metrics.segmentation import (
    Margins,
    bootstrap_interval,
    mean_accuracy_of,
    mean_iou_of,
    pixel_accuracy_of,
    score_of,
    sum_by,
)

Card = dict[str, Any]
Statistic = Callable[[NDArray[np.number]], NDArray[np.float64]]

STATISTICS: dict[str, Statistic] = {
    "miou": mean_iou_of,
    "pixel_accuracy": pixel_accuracy_of,
    "class_accuracy": mean_accuracy_of,
}
CONVENTIONS = {
    "miou": "mean IoU of the classes that the maps have",
    "miou_absent_as_zero": "mean IoU of all classes, absent ones as 0",
    "pixel_accuracy": "pixel accuracy, void left out",
    "pixel_accuracy_with_void": "pixel accuracy, void as missed",
    "class_accuracy": "mean class accuracy",
}


def segmentation_card(
    margins: Margins, keys: Sequence[str], names: Sequence[str], pixels: int, resamples: int
) -> Card:
    """Scores of all images together; intervals of 95 % are over maps, as samples of one map are no new maps.

    pixels  of an image, void included
    """
    found, by_map = score_of(margins), sum_by(margins, keys)
    known = [value or 0.0 for value in found.iou]
    return {
        "images": len(margins),
        "maps": len(by_map),
        "miou": found.miou,
        "miou_absent_as_zero": float(np.mean(known)),
        "pixel_accuracy": found.pixel_accuracy,
        "pixel_accuracy_with_void": float(margins[:, 0].sum() / (pixels * len(margins))),
        "class_accuracy": found.class_accuracy,
        "intervals": {k: interval(by_map, statistic, resamples) for k, statistic in STATISTICS.items()},
        "iou": dict(zip(names, found.iou, strict=True)),
        "absent": [names[k] for k in found.absent],
    }


def interval(by_map: NDArray[np.number], statistic: Statistic, resamples: int) -> list[float] | None:
    """Of 95 %; None of a single map."""
    if len(by_map) < 2:
        return None
    found = bootstrap_interval(by_map, statistic, resamples=resamples)
    return [found.low, found.high]


def beside_ceiling(
    ours: tuple[Margins, Sequence[str]],
    ceiling: tuple[Margins, Sequence[str]],
    names: Sequence[str],
    *,
    pixels: int,
    resamples: int,
) -> Card:
    """Ours, the real images' of the same maps, and the ratio; each as margins and keys.

    The interval of the ratio draws maps, and with each its samples and its real image.
    """
    first = segmentation_card(*ours, names, pixels, resamples)
    second = segmentation_card(*ceiling, names, pixels, resamples)
    a, b = (by_key(*each) for each in (ours, ceiling))
    shared = [key for key in a if key in b]
    pairs = np.stack([np.stack([a[key], b[key]]) for key in shared])
    ratio: Card = ratios(first, second)
    for name in ("pixel_accuracy", "class_accuracy"):
        ratio[name] = first[name] / second[name] if second[name] else None
    ratio["interval"] = interval(pairs, ratio_of_ious, resamples)
    return {"samples": first, "ceiling": second, "ratio": ratio}


def by_key(margins: Margins, keys: Sequence[str]) -> dict[str, Margins]:
    """(3, K) margins of each map."""
    return dict(zip(dict.fromkeys(keys), sum_by(margins, keys), strict=True))


def ratio_of_ious(pairs: NDArray[np.number]) -> NDArray[np.float64]:
    """(R, 2, 3, K) -> (R,) mean IoU of the first by that of the second."""
    ours, ceiling = mean_iou_of(pairs[:, 0]), mean_iou_of(pairs[:, 1])
    return np.where(ceiling > 0, ours / np.maximum(ceiling, 1e-12), np.nan)
