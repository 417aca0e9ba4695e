"""Frechet distance between two sets of feature vectors, each taken for a Gaussian.

On the features of the Streets judge this is the "Streets feature distance". It is no FID: that name belongs
to one network and one size, and the numbers do not compare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NAME = "Streets feature distance"


@dataclass(frozen=True)
class FeatureMoments:
    """Count, mean and scatter of feature vectors in float64; parts merge exactly, in any order."""

    count: int
    mean: NDArray[np.float64]  # (D,)
    scatter: NDArray[np.float64]  # (D, D) sum of the products of deviations from the mean

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> FeatureMoments:
        """Moments of (N, D) features."""
        if features.ndim != 2 or not len(features):
            raise ValueError(f"expected features (N, D) of at least one image, found {features.shape}")
        values = features.astype(np.float64)
        mean = values.mean(axis=0)
        deviations = values - mean
        return cls(len(values), mean, deviations.T @ deviations)

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Moments of two disjoint sets together (Chan, Golub and LeVeque 1983)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return FeatureMoments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(D, D), with N - 1 in the divisor."""
        if self.count < 2:
            raise ValueError(f"expected features of at least 2 images, found {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)), for Gaussians (Dowson and Landau 1982).

    The trace of (A B)^(1/2) is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric, so eigenvalues that
    rounding made negative are simply zero and nothing becomes complex.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"expected features of one size, found {a.mean.shape[0]} and {b.mean.shape[0]}")
    first, second = a.covariance, b.covariance
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ second @ root).clip(min=0)
    delta = a.mean - b.mean
    distance = delta @ delta + np.trace(first) + np.trace(second) - 2 * np.sqrt(cross).sum()
    return max(0.0, float(distance))
