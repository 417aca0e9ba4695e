"""Frechet distance of features: against scipy's matrix square root and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from numpy.typing import NDArray

from metrics.frechet import FeatureMoments, frechet_distance


def features(
    n: int, d: int = 8, seed: int = 0, scale: float = 1.0, shift: float = 0.0
) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d, d))
    return (scale * rng.normal(size=(n, d)) @ mixing + shift + 3).astype(np.float32)


def test_the_distance_is_that_of_scipys_square_root() -> None:
    a, b = features(200), features(300, seed=1, scale=1.5, shift=0.3)
    first, second = (np.cov(x.astype(np.float64), rowvar=False) for x in (a, b))
    delta = a.astype(np.float64).mean(axis=0) - b.astype(np.float64).mean(axis=0)
    root = scipy.linalg.sqrtm(first @ second)
    expected = delta @ delta + np.trace(first + second) - 2 * np.trace(root).real
    found = frechet_distance(FeatureMoments.of(a), FeatureMoments.of(b))
    assert found == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(FeatureMoments.of(b), FeatureMoments.of(a)) == pytest.approx(found, rel=1e-8)


def test_a_shift_alone_is_its_squared_length() -> None:
    a = features(100)
    shifted = a.astype(np.float64) + np.arange(8)
    found = frechet_distance(FeatureMoments.of(a), FeatureMoments.of(shifted))
    assert found == pytest.approx(np.sum(np.arange(8) ** 2), rel=1e-9)


def test_a_scale_alone_is_the_squared_difference_of_the_deviations() -> None:
    a = features(100).astype(np.float64)
    a -= a.mean(axis=0)
    expected = (2 - 1) ** 2 * np.trace(np.cov(a, rowvar=False))
    assert frechet_distance(FeatureMoments.of(a), FeatureMoments.of(2 * a)) == pytest.approx(
        expected, rel=1e-9
    )


def test_a_set_has_no_distance_from_itself_even_with_dead_features() -> None:
    a = features(50)
    a[:, 3] = 0  # a covariance that is not of full rank: rounding makes eigenvalues negative
    moments = FeatureMoments.of(a)
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-6)


def test_parts_merge_to_one_pass_in_any_order() -> None:
    a = features(31)
    parts = [FeatureMoments.of(a[i:j]) for i, j in ((0, 1), (1, 12), (12, 31))]
    for first, second, third in (parts, parts[::-1]):
        merged = first.merge(second).merge(third)
        assert merged.count == 31
        np.testing.assert_allclose(merged.mean, a.astype(np.float64).mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(merged.covariance, np.cov(a.astype(np.float64), rowvar=False), rtol=1e-10)


def test_too_few_images_and_features_of_two_sizes_are_refused() -> None:
    one, many, other = (FeatureMoments.of(features(n, d)) for n, d in ((1, 8), (9, 8), (9, 4)))
    with pytest.raises(ValueError, match="at least 2 images, found 1"):
        frechet_distance(one, many)
    with pytest.raises(ValueError, match="features of one size, found 8 and 4"):
        frechet_distance(many, other)
    with pytest.raises(ValueError, match=r"expected features \(N, D\)"):
        FeatureMoments.of(np.zeros((0, 4)))
