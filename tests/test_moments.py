"""Moments against numpy's two passes over everything, whatever the batches, the shards and the order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ldm.priors.moments import VOID, LatentMoments, Moments

K, C, H, W = 5, 3, 4, 6
NEVER = K - 1  # the class that no image shows
Data = tuple[NDArray, NDArray, NDArray]


def make_data(count: int, seed: int = 0) -> Data:
    """Means far from 0, variances, and labels with void, a class of one pixel and a class of none."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, VOID], (count, H, W), p=[0.5, 0.3, 0.1, 0.1])
    labels[count // 2, 1, 2] = 3
    means = 5 + rng.normal(size=(count, C, H, W)) * 2 + labels.clip(max=9)[:, None]
    return means, rng.uniform(0, 0.5, (count, C, H, W)), labels


def in_batches(data: Data, sizes: Sequence[int], *, covariance: bool = False) -> LatentMoments:
    found, start = LatentMoments.empty((C, H, W), K, covariance=covariance), 0
    for size in sizes:
        found.update(*(part[start : start + size] for part in data))
        start += size
    assert start == len(data[0])
    return found


def two_pass(values: NDArray, variances: NDArray, weights: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Mean (C,), variance (C,) and covariance (C, C) of rows (N, C) with weights (N,)."""
    if not len(values):
        return np.zeros(C), np.zeros(C), np.zeros((C, C))
    mean = np.average(values, axis=0, weights=weights)
    own = np.average(variances, axis=0, weights=weights)
    variance = np.average((values - mean) ** 2, axis=0, weights=weights) + own
    return mean, variance, np.cov(values.T, aweights=weights, ddof=0).reshape(C, C) + np.diag(own)


def rows_of(data: Data, chosen: NDArray) -> tuple[NDArray, NDArray]:
    """Values and variances (N, C) of the pixels of a mask (B, h, w)."""
    return tuple(np.moveaxis(part, 1, -1)[chosen] for part in data[:2])


def assert_exact(found: LatentMoments, data: Data) -> None:
    """Every group of every table, against two passes over its pixels."""
    labels = data[2]

    def check(table: Moments, index: tuple, chosen: NDArray, weights: NDArray, count: int) -> None:
        mean, variance, covariance = two_pass(*rows_of(data, chosen), weights[chosen])
        assert table.count[index] == count
        np.testing.assert_allclose(table.mean[index], mean, rtol=1e-10, atol=1e-12)
        expected = covariance if table.has_covariance else variance
        np.testing.assert_allclose(table.variance[index], expected, rtol=1e-10, atol=1e-12)

    alike = np.ones(labels.shape)
    here = np.zeros(labels.shape, bool)
    for y, x in np.ndindex(H, W):
        here[:] = False
        here[:, y, x] = True
        check(found.places, (y, x), here, alike, len(labels))
        for k in range(K):
            check(found.joint, (k, y, x), here & (labels == k), alike, int((labels[:, y, x] == k).sum()))
    for k in range(K):
        chosen = labels == k
        in_image = chosen.sum(axis=(1, 2))
        check(found.classes, (k,), chosen, alike, int(chosen.sum()))
        once = alike / np.maximum(in_image, 1)[:, None, None]
        check(found.classes_by_image, (k,), chosen, once, int((in_image > 0).sum()))


def assert_same(found: LatentMoments, expected: LatentMoments) -> None:
    for name, array in expected.arrays().items():
        np.testing.assert_allclose(found.arrays()[name], array, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("sizes", [[13], [1] * 13, [4, 4, 4, 1], [10, 3]])
def test_moments_are_those_of_two_passes_over_everything(sizes: list[int], covariance: bool) -> None:
    data = make_data(13)
    found = in_batches(data, sizes, covariance=covariance)
    assert_exact(found, data)
    assert found.images == 13
    assert found.classes.count[NEVER] == 0
    assert found.classes.count[3] == found.joint.count[3].sum() == 1


@settings(max_examples=60)
@given(st.data())
def test_any_split_and_any_order_of_merging_gives_the_same(draw: st.DataObject) -> None:
    count = draw.draw(st.integers(1, 9))
    data = make_data(count, seed=draw.draw(st.integers(0, 10**6)))
    shard = np.array(draw.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    covariance = draw.draw(st.booleans())
    parts = []
    for number in range(4):
        own = tuple(part[shard == number] for part in data)
        batch = draw.draw(st.integers(1, 4))
        sizes = [len(own[0][i : i + batch]) for i in range(0, len(own[0]), batch)]
        parts.append(in_batches(own, sizes, covariance=covariance))
    while len(parts) > 1:  # a random tree: any two, in either order
        first = parts.pop(draw.draw(st.integers(0, len(parts) - 1)))
        second = parts.pop(draw.draw(st.integers(0, len(parts) - 1)))
        parts.append(first.merge(second))
    assert_exact(parts[0], data)


def test_a_drawn_latent_has_the_moments_that_the_posterior_says() -> None:
    rng = np.random.default_rng(0)
    means, variances, labels = make_data(3)
    repeats = 20_000
    drawn = rng.normal(np.repeat(means, repeats, 0), np.repeat(variances, repeats, 0) ** 0.5)
    found = in_batches((means, variances, labels), [3])
    np.testing.assert_allclose(found.places.mean, drawn.mean(0).transpose(1, 2, 0), atol=0.05)
    np.testing.assert_allclose(found.places.variance, drawn.var(0).transpose(1, 2, 0), rtol=0.03)


def test_one_random_pixel_of_a_class_in_each_image_has_the_moments_by_image() -> None:
    means, variances, labels = make_data(6)
    rng = np.random.default_rng(0)
    drawn = []
    for i in range(6):
        own = np.argwhere(labels[i] == 1)
        places = own[rng.integers(len(own), size=40_000)]
        at = (i, slice(None), *places.T)
        drawn.append(rng.normal(means[at], variances[at] ** 0.5))
    found = in_batches((means, variances, labels), [6]).classes_by_image
    together = np.concatenate(drawn)
    np.testing.assert_allclose(found.mean[1], together.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(found.variance[1], together.var(axis=0), rtol=0.02)


def test_far_from_zero_no_digits_are_lost() -> None:
    rng = np.random.default_rng(0)
    means = 1e4 + rng.normal(size=(50, C, H, W)) * 1e-2
    labels = np.zeros((50, H, W), np.uint8)
    found = in_batches((means, np.zeros_like(means), labels), [7] * 7 + [1])
    exact = np.var(means.astype(np.longdouble), axis=0).astype(np.float64)
    # float64 keeps 1e4 to 2e-12, which is 2e-10 of the deviations
    np.testing.assert_allclose(found.places.variance, exact.transpose(1, 2, 0), rtol=2e-9)


def test_arrays_make_the_same_moments_again_and_others_are_refused() -> None:
    found = in_batches(make_data(4), [4], covariance=True)
    arrays = found.arrays()
    assert_same(LatentMoments.from_arrays(arrays), found)
    without = {name: array for name, array in arrays.items() if name != "joint.mean"}
    with pytest.raises(ValueError, match=r"found others: joint\.mean"):
        LatentMoments.from_arrays(without)
    with pytest.raises(ValueError, match=r"expected joint\.mean float64 \(5, 4, 6, 3\), found .* \(4, 4, 6"):
        LatentMoments.from_arrays({**arrays, "joint.mean": arrays["joint.mean"][:4]})
    with pytest.raises(ValueError, match="counts of 0 or more in places"):
        LatentMoments.from_arrays({**arrays, "places.count": -arrays["places.count"]})
    with pytest.raises(ValueError, match="sums of squares of 0 or more"):
        LatentMoments.from_arrays({**arrays, "places.m2": -arrays["places.m2"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, v, y: (m, v, np.where(y == 2, 17, y)), r"expected labels 0\.\.4 and 255 = void, found 17"),
        (lambda m, v, y: (m, v, np.where(y == 2, -1, y)), r"found -1"),
        (lambda m, v, y: (m, v, y + 0.5), "expected integer labels"),
        (lambda m, v, y: (m[:, :, :2], v, y), "expected latents and variances"),
        (lambda m, v, y: (m * np.nan, v, y), "expected finite latents"),
        (lambda m, v, y: (m, -v, y), "variances of 0 or more"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_adds_nothing(change, message: str) -> None:
    data = make_data(4)
    found = in_batches(data, [4])
    with pytest.raises(ValueError, match=message):
        found.update(*change(*data))
    assert_exact(found, data)
    with pytest.raises(ValueError, match="to merge with, found"):
        found.merge(LatentMoments.empty((C, H, W + 1), K))


def test_150_classes_at_64x64_need_a_fraction_of_a_gigabyte() -> None:
    whole = LatentMoments.empty((4, 64, 64), 150)
    assert sum(array.nbytes for array in whole.arrays().values()) < 50e6
    full = LatentMoments.empty((4, 64, 64), 150, covariance=True)
    assert sum(array.nbytes for array in full.arrays().values()) < 110e6
