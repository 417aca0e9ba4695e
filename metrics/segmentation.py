"""How well predicted label maps agree with true ones; exact whatever the order, with intervals over images.

A segmenter is any callable from images to label maps. What is kept of each image is its confusion matrix, so
that parts merge exactly and images can be drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.classification import multiclass_confusion_matrix

Segmenter = Callable[[NDArray[np.uint8]], NDArray[np.integer]]
"""(B, H, W, 3) uint8 images -> (B, H, W) train ids 0..K-1, never void."""

Counts = NDArray[np.int64]
"""(N, K, K) pixels of each image by true class (row) and predicted class (column); void is not in it."""

Margins = NDArray[np.int64]
"""(N, 3, K) pixels of each image and class: hits, true, predicted. All that the scores need of the counts."""

VOID = 255
RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """Where a score lies if other images of the same kind had been drawn."""

    low: float
    high: float

    def is_apart_from(self, other: Interval) -> bool:
        """Whether the two have no value in common."""
        return self.high < other.low or other.high < self.low


@dataclass(frozen=True)
class Scores:
    """Scores of all pixels together; a class that the true maps do not have counts in none of the means."""

    miou: float
    pixel_accuracy: float
    class_accuracy: float  # mean over the classes of the share of their pixels that is found
    iou: list[float | None]  # by class; None where the true maps do not have it
    absent: list[int]  # those classes


def confusion_matrices(
    truth: NDArray[np.integer], predicted: NDArray[np.integer], num_classes: int, void: int = VOID
) -> Counts:
    """Count each image of a batch.

    truth      (N, H, W) train ids; pixels of `void` are not counted
    predicted  (N, H, W) train ids
    """
    if truth.shape != predicted.shape or truth.ndim != 3:
        raise ValueError(
            f"expected true and predicted maps (N, H, W) of one shape, found {truth.shape} and"
            f" {predicted.shape}"
        )
    for what, ids in (("true", truth[truth != void]), ("predicted", predicted)):
        if ids.size and not (ids.min() >= 0 and ids.max() < num_classes):
            raise ValueError(
                f"expected {what} train ids 0..{num_classes - 1}, found {int(ids.min())}..{int(ids.max())}"
            )
    # not validated once more: its checks sort all pixels
    count = partial(
        multiclass_confusion_matrix, num_classes=num_classes, ignore_index=void, validate_args=False
    )
    maps = (torch.from_numpy(ids.astype(np.int64)) for ids in (predicted, truth))
    return np.stack([count(found, true).numpy() for found, true in zip(*maps, strict=True)])


class ConfusionStream:
    """Takes in batches of maps; `counts` are those of a single pass, whatever the batches.

    Its images are known by their place, so parts of a data set are joined with `np.concatenate`.
    """

    def __init__(self, num_classes: int, void: int = VOID) -> None:
        self.num_classes, self.void = num_classes, void
        self.parts: list[Counts] = []

    def update(self, truth: NDArray[np.integer], predicted: NDArray[np.integer]) -> None:
        """Count a batch."""
        self.parts.append(confusion_matrices(truth, predicted, self.num_classes, self.void))

    @property
    def counts(self) -> Counts:
        """Of every image so far."""
        empty = np.zeros((0, self.num_classes, self.num_classes), np.int64)
        return np.concatenate([empty, *self.parts])


def sum_by(counts: Counts, groups: Sequence[str]) -> Counts:
    """One matrix for each group, in the order of first appearance: samples of one map are no new maps."""
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    total = np.zeros((len(names), *counts.shape[1:]), np.int64)
    np.add.at(total, [names[group] for group in groups], counts)
    return total


def margins_of(matrices: NDArray[np.number]) -> NDArray[np.number]:
    """(..., K, K) -> (..., 3, K): hits, true and predicted pixels of each class."""
    hits = np.diagonal(matrices, axis1=-2, axis2=-1)
    return np.stack([hits, matrices.sum(axis=-1), matrices.sum(axis=-2)], axis=-2)


def ious_of(margins: NDArray[np.number]) -> NDArray[np.float64]:
    """(..., 3, K) -> (..., K) intersection over union; NaN for a class without a true pixel."""
    hits, truth, predicted = (margins[..., i, :].astype(np.float64) for i in range(3))
    return np.where(truth > 0, hits / np.maximum(truth + predicted - hits, 1), np.nan)


def accuracies_of(margins: NDArray[np.number]) -> NDArray[np.float64]:
    """(..., 3, K) -> (..., K) share of a class's pixels that is found; NaN for a class without one."""
    hits, truth = (margins[..., i, :].astype(np.float64) for i in range(2))
    return np.where(truth > 0, hits / np.maximum(truth, 1), np.nan)


def mean_iou_of(margins: NDArray[np.number]) -> NDArray[np.float64]:
    """(..., 3, K) -> (...) mean over the classes that the true maps have; NaN without any."""
    return mean_of_known(ious_of(margins))


def mean_accuracy_of(margins: NDArray[np.number]) -> NDArray[np.float64]:
    """(..., 3, K) -> (...) the same mean of the classes' accuracies."""
    return mean_of_known(accuracies_of(margins))


def pixel_accuracy_of(margins: NDArray[np.number]) -> NDArray[np.float64]:
    """(..., 3, K) -> (...) share of the pixels with a class that is found; NaN without any."""
    hits, truth = (margins[..., i, :].sum(axis=-1).astype(np.float64) for i in range(2))
    return np.where(truth > 0, hits / np.maximum(truth, 1), np.nan)


def class_ious(matrices: NDArray[np.number]) -> NDArray[np.float64]:
    """(..., K, K) -> (..., K) intersection over union; NaN for a class without a true pixel."""
    return ious_of(margins_of(matrices))


def mean_iou(matrices: NDArray[np.number]) -> NDArray[np.float64]:
    """(..., K, K) -> (...) mean over the classes that the true maps have; NaN without any."""
    return mean_iou_of(margins_of(matrices))


def mean_of_known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    return np.where(count > 0, np.where(known, values, 0).sum(axis=-1) / np.maximum(count, 1), np.nan)


def score(counts: Counts) -> Scores:
    """Scores of all images together."""
    return score_of(margins_of(counts))


def score_of(margins: NDArray[np.number]) -> Scores:
    """Scores of all images together."""
    total = margins.sum(axis=0)
    if not total.any():
        raise ValueError(f"expected pixels with a class, found {len(margins)} maps that are void all over")
    ious = ious_of(total)
    return Scores(
        miou=float(mean_iou_of(total)),
        pixel_accuracy=float(pixel_accuracy_of(total)),
        class_accuracy=float(mean_accuracy_of(total)),
        iou=[None if np.isnan(value) else float(value) for value in ious],
        absent=np.flatnonzero(np.isnan(ious)).tolist(),
    )


def bootstrap_interval(
    counts: NDArray[np.number],
    statistic: Callable[[NDArray[np.number]], NDArray[np.float64]] = mean_iou,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic of sums over images, which are drawn again with replacement.

    counts     (N, ...) what is summed: confusion matrices, their margins, ...
    statistic  (R, ...) -> (R,)
    """
    n, shape = len(counts), counts.shape[1:]
    if n < 2:
        raise ValueError(f"expected at least 2 images for an interval, found {n}")
    rng = np.random.default_rng(seed)
    times = rng.multinomial(n, np.full(n, 1 / n), size=resamples)  # how often each image is drawn
    # float64 holds counts up to 2**53 exactly, and its matrix product is the fast one
    sums = times.astype(np.float64) @ counts.reshape(n, -1).astype(np.float64)
    values = statistic(sums.reshape(resamples, *shape))
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
