"""Moments of latents over places, over classes, and over classes at places, in one pass over the images.

Count, mean and M2 (the sum of squared deviations from the mean) in float64, in memory that does not depend
on the number of images. Any two sets of images merge exactly, in any order (Chan, Golub and LeVeque 1983).
Latents are "times scale_factor", as everywhere outside the autoencoder. They enter as the mean and variance
of their posterior: Var z = Var mean + E variance, so the moments are those of drawn latents without a draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

VOID = 255  # the label that is no class


@dataclass
class Moments:
    """Count, mean and M2 of the vectors of C channels in each group.

    count  (*groups,) int64
    mean   (*groups, C)
    m2     (*groups, C), or with the covariance of the channels (*groups, C, C)
    """

    count: Counts
    mean: Floats
    m2: Floats

    @classmethod
    def empty(cls, groups: tuple[int, ...], channels: int, *, covariance: bool = False) -> Moments:
        """Moments of nothing."""
        second = (channels, channels) if covariance else (channels,)
        return cls(np.zeros(groups, np.int64), np.zeros((*groups, channels)), np.zeros((*groups, *second)))

    @property
    def has_covariance(self) -> bool:
        """Whether M2 holds the products of different channels as well."""
        return self.m2.ndim > self.mean.ndim

    @property
    def variance(self) -> Floats:
        """In the shape of `m2`; with the count in the divisor, and 0 where there is nothing."""
        return self.m2 / beside(np.maximum(self.count, 1), self.m2)

    def merge(self, other: Moments) -> Moments:
        """Moments of two disjoint samples together, exact whatever the split."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        delta = other.mean - self.mean
        mean = self.mean + delta * beside(share, delta)
        between = squares(delta, covariance=self.has_covariance)
        m2 = self.m2 + other.m2 + between * beside(self.count * share, between)
        return Moments(count, mean, m2)

    def pooled(self) -> Moments:
        """Moments of all groups along the first axis together."""
        count = self.count.sum(axis=0)
        sums = (self.mean * beside(self.count, self.mean)).sum(axis=0)
        mean = sums / beside(np.maximum(count, 1), sums)
        between = squares(self.mean - mean, covariance=self.has_covariance)
        m2 = (self.m2 + between * beside(self.count, between)).sum(axis=0)
        return Moments(count, mean, m2)


def squares(deviations: Floats, *, covariance: bool) -> Floats:
    """(..., C) -> their squares (..., C), or all products (..., C, C)."""
    return deviations[..., :, None] * deviations[..., None, :] if covariance else deviations**2


def beside(counts: NDArray, values: NDArray) -> NDArray:
    """`counts` (*groups,) shaped to multiply `values` (*groups, ...)."""
    return counts.reshape(counts.shape + (1,) * (values.ndim - counts.ndim))


def sums_by_group(group: Counts, rows: Floats, num_groups: int) -> Floats:
    """(N, ...) rows of groups (N,) -> their sums (num_groups, ...)."""
    width = int(np.prod(rows.shape[1:]))
    cells = group[:, None] * width + np.arange(width)
    sums = np.bincount(cells.ravel(), rows.ravel(), num_groups * width).astype(np.float64, copy=False)
    return sums.reshape(num_groups, *rows.shape[1:])


def moments_by_group(
    group: Counts, values: Floats, variances: Floats, num_groups: int, *, covariance: bool
) -> Moments:
    """Moments of N values (N, C), each with a variance (N, C) of its own, by their group (N,)."""
    count = np.bincount(group, minlength=num_groups)
    mean = sums_by_group(group, values, num_groups) / np.maximum(count, 1)[:, None]
    second = squares(values - mean[group], covariance=covariance)
    channels = np.arange(values.shape[1])
    second[(..., channels, channels) if covariance else (..., channels)] += variances
    return Moments(count, mean, sums_by_group(group, second, num_groups))


@dataclass
class LatentMoments:
    """All moments that a prior is made of, of images whose latents are (C, h, w) and show K classes.

    places            (h, w)     every image at each place
    classes           (K,)       every latent pixel of a class alike
    classes_by_image  (K,)       every image that shows a class alike: the expectation over one random pixel
                                 of the class in each, which is what SCP-Diff draws
    joint             (K, h, w)  the images that show a class at a place
    """

    places: Moments
    classes: Moments
    classes_by_image: Moments
    joint: Moments

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int], num_classes: int, *, covariance: bool = False
    ) -> LatentMoments:
        """Moments of no image; `shape` is that of a latent, (C, h, w)."""
        channels, *place = shape
        groups = (tuple(place), (num_classes,), (num_classes,), (num_classes, *place))
        return cls(*(Moments.empty(group, channels, covariance=covariance) for group in groups))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent."""
        height, width, channels = self.places.mean.shape
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes.count)

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.places.count.max())

    @property
    def has_covariance(self) -> bool:
        """Whether the moments hold the covariance of the channels."""
        return self.places.has_covariance

    def update(self, mean: Any, variance: Any, labels: Any) -> None:
        """Add the images of a batch; arrays, or tensors on the CPU.

        mean      (B, C, h, w)  of the posterior, times the scale factor
        variance  (B, C, h, w)  of the posterior, times its square
        labels    (B, h, w)     integers, 0..K-1 or 255 = void, which counts for its place alone

        Raises
            ValueError  shapes, labels or values that do not fit; nothing is added then
        """
        values, variances = (
            np.asarray(part, dtype=np.float64).transpose(0, 2, 3, 1) for part in (mean, variance)
        )
        labels = np.asarray(labels)
        self.check(values, variances, labels)
        self.add_places(values, variances)
        image, row, column = np.nonzero(labels != VOID)
        known = labels[image, row, column].astype(np.int64), values[image, row, column]
        self.add_classes(image, len(labels), *known, variances[image, row, column])
        place = row * labels.shape[2] + column
        self.add_joint(place, *known, variances[image, row, column])

    def check(self, values: Floats, variances: Floats, labels: NDArray) -> None:
        """Refuse a batch that does not fit, by what was expected and what was found."""
        channels, height, width = self.shape
        expected = (len(labels), height, width)
        if values.shape != (*expected, channels) or variances.shape != values.shape:
            raise ValueError(
                f"expected latents and variances (B, h, w, C) of {(*expected, channels)}, found"
                f" {values.shape} and {variances.shape}"
            )
        if labels.shape != expected or labels.dtype.kind not in "iu":
            raise ValueError(
                f"expected integer labels (B, h, w) of {expected}, found {labels.dtype} {labels.shape}"
            )
        strange = labels[(labels != VOID) & ((labels < 0) | (labels >= self.num_classes))]
        if strange.size:
            raise ValueError(
                f"expected labels 0..{self.num_classes - 1} and {VOID} = void, found"
                f" {', '.join(map(str, np.unique(strange)[:5]))}"
            )
        if not (np.isfinite(values).all() and np.isfinite(variances).all() and (variances >= 0).all()):
            raise ValueError("expected finite latents and variances of 0 or more, found others")

    def add_places(self, values: Floats, variances: Floats) -> None:
        """Add latents (B, h, w, C) to their places."""
        second = np.zeros((*values.shape[:3], *self.places.m2.shape[2:]))
        channels = np.arange(values.shape[3])
        second[(..., channels, channels) if self.has_covariance else (..., channels)] = variances
        batch = Moments(np.ones(values.shape[:3], np.int64), values, second)
        self.places = self.places.merge(batch.pooled())

    def add_classes(
        self, image: Counts, num_images: int, labels: Counts, values: Floats, variances: Floats
    ) -> None:
        """Add N latent pixels, each with the number of its image in the batch and its label, both (N,)."""
        K = self.num_classes
        flat = moments_by_group(
            image * K + labels, values, variances, num_images * K, covariance=self.has_covariance
        )
        groups = (num_images, K)
        by_image = Moments(
            flat.count.reshape(groups),
            flat.mean.reshape(*groups, *flat.mean.shape[1:]),
            flat.m2.reshape(*groups, *flat.m2.shape[1:]),
        )
        self.classes = self.classes.merge(by_image.pooled())
        once = Moments(np.minimum(by_image.count, 1), by_image.mean, by_image.variance)
        self.classes_by_image = self.classes_by_image.merge(once.pooled())

    def add_joint(self, place: Counts, labels: Counts, values: Floats, variances: Floats) -> None:
        """Add N latent pixels to the cells of their label and place, both (N,).

        Only cells that the batch touches are worked on, so that a batch costs the same for any K.
        """
        channels, height, width = self.shape
        touched, group = np.unique(labels * (height * width) + place, return_inverse=True)
        batch = moments_by_group(group, values, variances, len(touched), covariance=self.has_covariance)
        # Views: what is written to them is written to the moments.
        count = self.joint.count.reshape(-1)
        mean = self.joint.mean.reshape(-1, channels)
        m2 = self.joint.m2.reshape(-1, *batch.m2.shape[1:])
        merged = Moments(count[touched], mean[touched], m2[touched]).merge(batch)
        count[touched], mean[touched], m2[touched] = merged.count, merged.mean, merged.m2

    def merge(self, other: LatentMoments) -> LatentMoments:
        """Moments of two disjoint sets of images together.

        Raises
            ValueError  moments of other latents or classes
        """
        ours, theirs = self.arrays(), other.arrays()
        for name, array in ours.items():
            if theirs[name].shape != array.shape:
                raise ValueError(
                    f"expected moments with {name} {array.shape} to merge with, found {theirs[name].shape}"
                )
        return LatentMoments(
            self.places.merge(other.places),
            self.classes.merge(other.classes),
            self.classes_by_image.merge(other.classes_by_image),
            self.joint.merge(other.joint),
        )

    def arrays(self) -> dict[str, NDArray]:
        """Every array as `table.part`, such as `joint.mean`."""
        return {
            f"{table}.{part}": array
            for table in vars(self)
            for part, array in vars(getattr(self, table)).items()
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray]) -> LatentMoments:
        """Moments of what `arrays` returned.

        Raises
            ValueError  names, types, shapes or values that no moments have
        """
        parts = tuple(Moments.__dataclass_fields__)
        names = [f"{table}.{part}" for table in cls.__dataclass_fields__ for part in parts]
        if set(arrays) != set(names):
            odd = sorted(set(arrays) ^ set(names))
            raise ValueError(f"expected the arrays {', '.join(names)}, found others: {', '.join(odd)}")
        tables = (
            Moments(*(arrays[f"{table}.{part}"] for part in parts)) for table in cls.__dataclass_fields__
        )
        found = cls(*tables)
        found.check_arrays()
        return found

    def check_arrays(self) -> None:
        """Refuse arrays that do not belong together, or that are no moments."""
        if self.places.mean.ndim != 3 or self.classes.count.ndim != 1:
            raise ValueError(
                f"expected places.mean (h, w, C) and classes.count (K,), found {self.places.mean.shape} and"
                f" {self.classes.count.shape}"
            )
        empty = LatentMoments.empty(self.shape, self.num_classes, covariance=self.places.has_covariance)
        found = self.arrays()
        for name, like in empty.arrays().items():
            array = found[name]
            if array.shape != like.shape or array.dtype != like.dtype:
                raise ValueError(
                    f"expected {name} {like.dtype} {like.shape}, found {array.dtype} {array.shape}"
                )
            if not np.isfinite(array).all() or (name.endswith("count") and (array < 0).any()):
                raise ValueError(f"expected finite values and counts of 0 or more in {name}, found others")
        for table in (self.places, self.classes, self.classes_by_image, self.joint):
            own = np.diagonal(table.m2, axis1=-2, axis2=-1) if table.has_covariance else table.m2
            if (own < 0).any():
                raise ValueError(f"expected sums of squares of 0 or more, found {own.min()}")
