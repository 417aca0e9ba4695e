"""From polygons to pixels: one canvas at twice the size holds the colours and the number of the polygon."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from datasets.streets.geometry import Camera, Points, Polygons

SUPER = 2  # canvas pixels for each image pixel, per side
SHIFT = 4  # fractional bits of OpenCV's coordinates
REACH = 1 << 14  # canvas pixels; farther points are pulled in, because OpenCV counts in 32 bits
THINNEST = 1.02  # canvas pixels of a line; OpenCV adds its border, which makes one image pixel of it


@dataclass(frozen=True)
class View:
    """Polygons as a camera sees them, at a size."""

    polygons: Polygons
    camera: Camera
    size: tuple[int, int]
    points: Points  # (N, 2) column and row on the canvas
    depth: NDArray[np.float64]  # (N,)

    @cached_property
    def seen(self) -> NDArray[np.bool_]:
        """(P,) which polygons touch the canvas."""
        starts = self.polygons.starts[:-1]
        low, high = np.minimum.reduceat(self.points, starts), np.maximum.reduceat(self.points, starts)
        height, width = self.size[0] * SUPER, self.size[1] * SUPER
        return (high[:, 0] >= 0) & (low[:, 0] < width) & (high[:, 1] >= 0) & (low[:, 1] < height)

    @cached_property
    def inverse_depth(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(P,) a and b, so that 1 / depth = a + b * column on each polygon; exact on upright planes."""
        starts = self.polygons.starts
        count = np.diff(starts)
        mean = np.add.reduceat(self.points[:, 0], starts[:-1]) / count
        value = 1 / self.depth
        mean_value = np.add.reduceat(value, starts[:-1]) / count
        off = self.points[:, 0] - np.repeat(mean, count)
        slope = np.add.reduceat(off * value, starts[:-1]) / (np.add.reduceat(off * off, starts[:-1]) + 1.0)
        return (mean_value - slope * mean).astype(np.float32), slope.astype(np.float32)


def look(polygons: Polygons, camera: Camera, size: tuple[int, int], *, mirrored: bool = False) -> View:
    """Project; `mirrored` shows what a wet ground reflects."""
    points = polygons.points * (1, -1, 1) if mirrored else polygons.points
    flat, depth = camera.project(points, size)
    flat = flat * SUPER - 0.5  # OpenCV counts from the middle of the first pixel
    _widen_lines(flat, depth, polygons, camera.focal * size[1] * SUPER)
    return View(polygons, camera, size, flat.clip(-REACH, REACH), depth)


def _widen_lines(flat: Points, depth: NDArray[np.float64], polygons: Polygons, focal: float) -> None:
    """Pull the doubled ends of each line apart, in place."""
    lines = np.flatnonzero(polygons.radius)
    corners = polygons.starts[lines][:, None] + np.arange(4)
    ends = flat[corners]
    along = ends[:, 2] - ends[:, 0]
    length = np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-6)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1) / length[:, None]
    width = 2 * polygons.radius[lines, None] * focal / depth[corners]
    half = np.maximum(width - 1, THINNEST) / 2
    flat[corners] += normal[:, None] * (half * np.array([-1, 1, 1, -1]))[..., None]


def paint(view: View, canvas: NDArray[np.uint16], colours: NDArray[np.float64]) -> None:
    """Fill every seen polygon in order; `canvas` (H, W, 4) takes its colour and its number + 1."""
    points = np.round(view.points * (1 << SHIFT)).astype(np.int32)
    shown = np.flatnonzero(view.seen)
    starts = view.polygons.starts
    begins, ends = starts[shown].tolist(), starts[shown + 1].tolist()
    values = np.concatenate([colours[shown].clip(0, 255).round(), shown[:, None] + 1.0], axis=1).tolist()
    fill = cv2.fillConvexPoly
    for begin, end, value in zip(begins, ends, values, strict=True):
        fill(canvas, points[begin:end], value, 8, SHIFT)
