"""Moments of latents at another size: places that lie between cells become mixtures of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldm.priors.moments import Floats, LatentMoments, Moments, beside, squares


def resampled(moments: LatentMoments, size: tuple[int, int]) -> LatentMoments:
    """Moments for latents of another size (h, w), for want of images of that size.

    Each new cell is the mixture of the old ones that it covers, or lies between, weighted by their shares and
    counts: its first two moments are the weighted means of theirs, its count the weighted mean of theirs,
    rounded, at least 1 where there is any. Moments by class have no place and stay. What another size does
    to latents beside moving them is not known here: a pixel of the latent shows more or less of the scene.
    """
    rows, columns = (weights_of(old, new) for old, new in zip(moments.shape[1:], size, strict=True))
    return LatentMoments(
        mixed(moments.places, rows, columns),
        moments.classes,
        moments.classes_by_image,
        mixed(moments.joint, rows, columns),
    )


def weights_of(old: int, new: int) -> Floats:
    """(new, old) shares of old cells in new ones along a side, each row 1 in sum.

    A side that shrinks is averaged over the area, one that grows interpolated between the centres of cells.
    """
    if new <= old:
        edges = np.arange(new + 1) * (old / new)
        overlap = np.minimum.outer(edges[1:], np.arange(1, old + 1)) - np.maximum.outer(
            edges[:-1], np.arange(old)
        )
        return np.maximum(overlap, 0) * (new / old)
    centres = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    return np.maximum(1 - np.abs(centres[:, None] - np.arange(old)), 0)


def mixed(moments: Moments, rows: Floats, columns: Floats) -> Moments:
    """Moments (..., h, w) with rows (h', h) and columns (w', w) mixed."""
    full = moments.has_covariance
    weights = mix(moments.count.astype(np.float64), rows, columns, 0)
    safe = np.where(weights > 0, weights, 1)
    # Around the mean of all cells, so that little cancels when its square is taken off again.
    counts = beside(moments.count, moments.mean)
    centre = (moments.mean * counts).reshape(-1, moments.mean.shape[-1]).sum(0) / max(1, moments.count.sum())
    off = moments.mean - centre
    second = moments.m2 + squares(off, covariance=full) * beside(moments.count, moments.m2)
    mean = mix(off * counts, rows, columns, 1) / beside(safe, off)
    count = np.where(weights > 0, np.maximum(np.rint(weights), 1), 0).astype(np.int64)
    trailing = 2 if full else 1
    variance = mix(second, rows, columns, trailing) / beside(safe, second) - squares(mean, covariance=full)
    own = (..., *[np.arange(off.shape[-1])] * trailing)
    variance[own] = np.maximum(variance[own], 0)
    return Moments(
        count, np.where(beside(weights, mean) > 0, mean + centre, 0), variance * beside(count, variance)
    )


def mix(values: NDArray, rows: Floats, columns: Floats, trailing: int) -> Floats:
    """(..., h, w, *trailing) -> (..., h', w', *trailing)."""
    axis = values.ndim - trailing - 2
    across = np.moveaxis(np.tensordot(rows, values, (1, axis)), 0, axis)
    return np.moveaxis(np.tensordot(columns, across, (1, axis + 1)), 0, axis + 1)
