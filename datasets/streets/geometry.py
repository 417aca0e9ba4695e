"""A stage of coloured polygons in metres, and the camera that turns them into pixels.

World axes: x to the right, y up from the ground, z forward; the camera stands at (0, height, 0). What is
put on the stage is grouped into things; a thing is painted behind every thing with a smaller sort key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from datasets.streets.materials import MATERIAL_INDEX

Points = NDArray[np.float64]
_AROUND_S, _AROUND_T = (
    np.array((0, 1, 1, 0)),
    np.array((2, 2, 3, 3)),
)  # bounds of a rectangle, corner by corner
NEAR = 0.5  # metres; nothing is built nearer, this only keeps the division finite


class Face(IntEnum):
    """Where a surface looks, which decides its light."""

    NONE = 0
    UP = 1
    EAST = 2  # towards +x
    WEST = 3
    SOUTH = 4  # towards the camera


@dataclass(frozen=True)
class Camera:
    """A pinhole above the ground, looking along +z and down by `pitch`."""

    height: float  # metres
    pitch: float  # radians
    focal: float  # in image widths, so that a scene is the same at every size

    def project(self, points: Points, size: tuple[int, int]) -> tuple[Points, NDArray[np.float64]]:
        """Pixel coordinates (N, 2) as (column, row), measured from the image's corner, and depths (N,)."""
        height, width = size
        sin, cos = float(np.sin(self.pitch)), float(np.cos(self.pitch))
        y = points[:, 1] - self.height
        depth = np.maximum(points[:, 2] * cos - y * sin, NEAR)
        scale = self.focal * width / depth
        column = width / 2 + scale * points[:, 0]
        row = height / 2 - scale * (y * cos + points[:, 2] * sin)
        return np.stack([column, row], axis=1), depth

    def horizon(self, size: tuple[int, int]) -> float:
        """Row of the horizon."""
        return size[0] / 2 - self.focal * size[1] * float(np.tan(self.pitch))

    def ground_depth(self, size: tuple[int, int]) -> NDArray[np.float64]:
        """(H,) depth of the ground seen in each row; far away at and above the horizon."""
        slope = (np.arange(size[0]) + 0.5 - size[0] / 2) / (self.focal * size[1])
        sin, cos = float(np.sin(self.pitch)), float(np.cos(self.pitch))
        drop = np.maximum(slope * cos + sin, 1e-4)  # metres down for each metre of depth
        return self.height / drop


class Chunk(NamedTuple):
    """Polygons of one shape count, material and thing."""

    order: tuple[float, int]
    points: Points  # (k, n, 3)
    material: int
    face: int
    shade: ArrayLike
    tint: ArrayLike
    thing: int
    radius: float  # of lines: half their width in metres; 0 for surfaces


@dataclass
class Stage:
    """The things of a scene, in the order they were put there."""

    chunks: list[Chunk] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # Cityscapes label id, by thing
    instances: list[int] = field(default_factory=list)  # -1 where the class has none, by thing
    lamps: list[tuple[float, float, float]] = field(default_factory=list)
    shadows: list[tuple[Points, float]] = field(default_factory=list)  # ground outline, height of the caster
    _order: tuple[float, int] = (0.0, 0)
    _counts: dict[int, int] = field(default_factory=dict)

    def thing(self, label: int, depth: float, layer: int = 0, *, counted: bool = False) -> int:
        """Begin a thing: farther ones are painted first, then lower layers. Its number also tints it."""
        self._order = (-depth, layer)
        number = self._counts.get(label, 0)
        self._counts[label] = number + counted
        self.labels.append(label)
        self.instances.append(number if counted else -1)
        return len(self.labels) - 1

    def part(self, label: int) -> int:
        """Continue the thing at its place, under another label (a sign on its pole)."""
        self.labels.append(label)
        self.instances.append(-1)
        return len(self.labels) - 1

    def add(
        self,
        points: ArrayLike,
        material: str,
        *,
        face: int = Face.NONE,
        shade: ArrayLike = 1.0,
        tint: ArrayLike | None = None,
    ) -> None:
        """Convex polygons (k, n, 3) or one (n, 3), painted in this order."""
        array = np.asarray(points, np.float64)
        self._put(array[None] if array.ndim == 2 else array, material, face, shade, tint, 0.0)

    def lines(self, points: ArrayLike, width: float, material: str, *, shade: float = 1.0) -> None:
        """Segments (k, 2, 3) or one (2, 3); never thinner than a pixel."""
        array = np.asarray(points, np.float64).reshape(-1, 2, 3)
        self._put(array[:, [0, 0, 1, 1]], material, Face.NONE, shade, None, width / 2)

    def lamp(self, x: float, y: float, z: float) -> None:
        """Remember a light that shines at night."""
        self.lamps.append((x, y, z))

    def shadow(self, outline: ArrayLike, height: float) -> None:
        """Remember what stands on the ground, for its shadow."""
        self.shadows.append((np.asarray(outline, np.float64), height))

    def _put(
        self,
        points: Points,
        material: str,
        face: int,
        shade: ArrayLike,
        tint: ArrayLike | None,
        radius: float,
    ) -> None:
        thing = len(self.labels) - 1
        tint = thing if tint is None else tint
        number = MATERIAL_INDEX[material]
        self.chunks.append(Chunk(self._order, points, number, face, shade, tint, thing, radius))


@dataclass(frozen=True)
class Polygons:
    """A finished stage, as arrays over its P polygons and N points, in painting order."""

    points: Points  # (N, 3)
    starts: NDArray[np.intp]  # (P + 1,)
    material: NDArray[np.intp]
    face: NDArray[np.intp]
    shade: NDArray[np.float64]
    tint: NDArray[np.intp]
    thing: NDArray[np.intp]
    radius: NDArray[np.float64]


def finish(stage: Stage) -> Polygons:
    """Sort the chunks from far to near and lay them end to end."""
    chunks = sorted(stage.chunks, key=lambda chunk: chunk.order)
    counts = [len(chunk.points) for chunk in chunks]
    corners = np.repeat([chunk.points.shape[1] for chunk in chunks], counts)

    return Polygons(
        points=np.concatenate([chunk.points.reshape(-1, 3) for chunk in chunks]),
        starts=np.concatenate([[0], np.cumsum(corners)]),
        material=np.repeat([chunk.material for chunk in chunks], counts),
        face=np.repeat([chunk.face for chunk in chunks], counts),
        shade=_spread([chunk.shade for chunk in chunks], counts, np.float64),
        tint=_spread([chunk.tint for chunk in chunks], counts, np.intp),
        thing=np.repeat([chunk.thing for chunk in chunks], counts),
        radius=np.repeat([chunk.radius for chunk in chunks], counts),
    )


def _spread(values: Sequence[ArrayLike], counts: Sequence[int], dtype: type) -> NDArray:
    """One value for each polygon, from one for each chunk or from an array of them."""
    arrays = {i: value for i, value in enumerate(values) if isinstance(value, np.ndarray)}
    spread: NDArray = np.repeat(
        np.array([0 if i in arrays else v for i, v in enumerate(values)], dtype), counts
    )
    ends = np.cumsum(counts).tolist()
    for i, array in arrays.items():
        spread[ends[i] - counts[i] : ends[i]] = array
    return spread


def inset(quad: ArrayLike, rectangles: ArrayLike) -> Points:
    """Rectangles (k, 4) of (s0, s1, t0, t1) in [0, 1] on a quad of corners 00, 10, 11, 01, as (k, 4, 3)."""
    p00, p10, p11, p01 = np.asarray(quad, np.float64)
    bounds = np.asarray(rectangles, np.float64).reshape(-1, 4)
    s, t = bounds[:, _AROUND_S, None], bounds[:, _AROUND_T, None]
    return p00 + s * (p10 - p00) + t * (p01 - p00) + (s * t) * (p00 - p10 + p11 - p01)


def disc(x: float, y: float, z: float, radius: float, sides: int = 10, squash: float = 1.0) -> Points:
    """A regular polygon that faces the camera, (sides, 3)."""
    angle = np.arange(sides) * (2 * np.pi / sides) + np.pi / sides
    points = np.empty((sides, 3))
    points[:, 0], points[:, 1] = x + radius * np.cos(angle), y + radius * squash * np.sin(angle)
    points[:, 2] = z
    return points


def standing(x: float, z: float, outline: ArrayLike) -> Points:
    """Polygons (..., 2) of (right, up) metres, set upright at (x, z) to face the camera."""
    flat = np.asarray(outline, np.float64)
    points = np.empty((*flat.shape[:-1], 3))
    points[..., :2], points[..., 2] = flat, z
    points[..., 0] += x
    return points


def rise(height: float) -> Points:
    """The way up, in metres."""
    return np.array((0.0, height, 0.0))


def faces_camera(quads: Points, camera_height: float) -> NDArray[np.bool_]:
    """Which quads (k, 4, 3), anticlockwise seen from outside, show their outside."""
    a, b = quads[:, 1] - quads[:, 0], quads[:, 3] - quads[:, 0]
    view = quads[:, 0] - rise(camera_height)
    volume = (
        view[:, 0] * (a[:, 1] * b[:, 2] - a[:, 2] * b[:, 1])
        + view[:, 1] * (a[:, 2] * b[:, 0] - a[:, 0] * b[:, 2])
        + view[:, 2] * (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])
    )
    return np.asarray(volume > 0)
