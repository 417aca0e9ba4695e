"""Scores of label maps: against torchmetrics, plain loops and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from metrics.segmentation import (
    ConfusionStream,
    Interval,
    bootstrap_interval,
    class_ious,
    confusion_matrices,
    mean_iou,
    score,
    sum_by,
)

K = 5


def maps(n: int = 6, seed: int = 0, classes: int = K) -> tuple[NDArray, NDArray]:
    """True maps with void and without class 3; predictions that agree with about half of them."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 2, 4, 255], size=(n, 8, 12), p=[0.4, 0.2, 0.2, 0.1, 0.1]).astype(np.uint8)
    noise = rng.integers(0, classes, truth.shape).astype(np.uint8)
    keep = (rng.random(truth.shape) < 0.5) & (truth != 255)
    return truth, np.where(keep, truth, noise)


def test_matrices_are_those_of_a_loop_over_pixels() -> None:
    truth, predicted = maps()
    expected = np.zeros((len(truth), K, K), np.int64)
    for n, y, x in np.ndindex(truth.shape):
        if truth[n, y, x] != 255:
            expected[n, truth[n, y, x], predicted[n, y, x]] += 1
    assert np.array_equal(confusion_matrices(truth, predicted, K), expected)


def test_scores_are_those_of_torchmetrics_and_of_a_loop_over_classes() -> None:
    truth, predicted = maps()
    found = score(confusion_matrices(truth, predicted, K))
    t, p = torch.from_numpy(truth.astype(int)), torch.from_numpy(predicted.astype(int))
    matrix = MulticlassConfusionMatrix(K, ignore_index=255)(p, t).numpy()
    jaccard = MulticlassJaccardIndex(K, ignore_index=255, average="none")(p, t).tolist()
    present = [0, 1, 2, 4]
    assert found.absent == [3]
    assert found.iou[3] is None
    assert [found.iou[k] for k in present] == pytest.approx([jaccard[k] for k in present])
    assert found.miou == pytest.approx(np.mean([jaccard[k] for k in present]))
    seen = truth != 255
    assert found.pixel_accuracy == pytest.approx((truth == predicted)[seen].mean())
    recalls = [(predicted == k)[truth == k].mean() for k in present]
    assert found.class_accuracy == pytest.approx(np.mean(recalls))
    assert matrix.sum() == seen.sum()


def test_a_predicted_class_that_no_map_has_lowers_others_and_counts_as_no_class() -> None:
    truth = np.zeros((1, 2, 2), np.uint8)
    predicted = np.array([[[0, 0], [0, 1]]], np.uint8)
    found = score(confusion_matrices(truth, predicted, 3))
    assert found.iou == [0.75, None, None]
    assert found.miou == 0.75


def test_parts_merge_to_one_pass_in_any_split() -> None:
    truth, predicted = maps(9)
    whole = confusion_matrices(truth, predicted, K)
    stream = ConfusionStream(K)
    for part in (slice(0, 2), slice(2, 3), slice(3, 9)):
        stream.update(truth[part], predicted[part])
    assert np.array_equal(stream.counts, whole)
    assert ConfusionStream(K).counts.shape == (0, K, K)


def test_samples_of_one_map_are_one_image() -> None:
    counts = confusion_matrices(*maps(5), K)
    summed = sum_by(counts, ["b", "a", "b", "c", "a"])
    assert np.array_equal(summed, [counts[0] + counts[2], counts[1] + counts[4], counts[3]])
    assert score(summed) == score(counts)


def test_an_interval_is_that_of_images_drawn_again_one_by_one() -> None:
    counts = confusion_matrices(*maps(30), K)
    found = bootstrap_interval(counts, resamples=4000)
    rng = np.random.default_rng(1)
    drawn = [mean_iou(counts[rng.integers(30, size=30)].sum(axis=0)) for _ in range(4000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))
    assert found == bootstrap_interval(counts, resamples=4000)


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    # Pixel accuracy of images that are each all right or all wrong: a share of coin tosses.
    def accuracy(matrices: NDArray) -> NDArray:
        return np.trace(matrices, axis1=-2, axis2=-1) / matrices.sum(axis=(-2, -1))

    rng, held, runs, share = np.random.default_rng(2), 0, 200, 0.4
    for run in range(runs):
        right = rng.random(60) < share
        counts = np.zeros((60, 2, 2), np.int64)
        counts[:, 0, 0], counts[:, 0, 1] = 7 * right, 7 * ~right
        interval = bootstrap_interval(counts, accuracy, seed=run, resamples=400)
        held += interval.low <= share <= interval.high
    assert abs(held / runs - 0.95) < 4 * (0.95 * 0.05 / runs) ** 0.5


def test_a_class_that_a_drawing_lacks_counts_in_no_mean_of_it() -> None:
    matrices = np.array([[[3, 1], [0, 0]], [[2, 0], [1, 1]]])
    assert class_ious(matrices)[0] == pytest.approx([0.75, np.nan], nan_ok=True)
    assert mean_iou(matrices) == pytest.approx([0.75, (2 / 3 + 1 / 2) / 2])


def test_intervals_are_apart_only_without_a_common_value() -> None:
    a = Interval(0.2, 0.4)
    assert a.is_apart_from(Interval(0.41, 0.5))
    assert Interval(0.41, 0.5).is_apart_from(a)
    assert not a.is_apart_from(Interval(0.4, 0.5))
    assert not a.is_apart_from(Interval(0.1, 0.9))


@pytest.mark.parametrize(
    ("truth", "predicted", "said"),
    [
        (np.zeros((1, 2, 2)), np.zeros((1, 2, 3)), r"of one shape, found \(1, 2, 2\) and \(1, 2, 3\)"),
        (np.full((1, 2, 2), 7), np.zeros((1, 2, 2)), r"true train ids 0\.\.4, found 7\.\.7"),
        (np.zeros((1, 2, 2)), np.full((1, 2, 2), 255), r"predicted train ids 0\.\.4, found 255\.\.255"),
    ],
)
def test_what_is_no_pair_of_maps_is_refused(truth: NDArray, predicted: NDArray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        confusion_matrices(truth.astype(np.uint8), predicted.astype(np.uint8), K)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="1 maps that are void all over"):
        score(confusion_matrices(np.full((1, 2, 2), 255), np.zeros((1, 2, 2), int), K))
    with pytest.raises(ValueError, match="at least 2 images for an interval, found 1"):
        bootstrap_interval(np.ones((1, 2, 2), np.int64))
