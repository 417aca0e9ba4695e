"""Cars, trucks, buses, trams and trailers: a few prisms with windows, lights and wheels on their sides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike

from datasets.streets.geometry import Face, Points, Stage, faces_camera, inset
from datasets.streets.street import pick

CAR, TRUCK, BUS, CARAVAN, TRAILER, TRAIN = 26, 27, 28, 29, 30, 31
SIDES = ("left", "right", "front", "rear", "top")
_CORNERS = np.array(
    [(1, 0, 3, 2), (4, 5, 6, 7), (5, 1, 2, 6), (0, 4, 7, 3), (3, 7, 6, 2)]
)  # left edges first
_LIGHT = {"left": 0.9, "right": 0.9, "front": 0.95, "rear": 0.95, "top": 1.12}


@dataclass(frozen=True)
class Pose:
    """Where a vehicle stands on the ground, and where it heads: 0 away from the camera, pi towards it."""

    x: float
    z: float
    heading: float
    eye: float  # height of the camera, which decides what of the vehicle is seen

    def place(self, points: ArrayLike) -> Points:
        """Vehicle coordinates (..., 3) of (along, to the right, up) as world points."""
        array = np.asarray(points, np.float64)
        sin, cos = math.sin(self.heading), math.cos(self.heading)
        along, right = array[..., 0], array[..., 1]
        world = np.empty_like(array)
        world[..., 0] = self.x + along * sin + right * cos
        world[..., 1] = array[..., 2]
        world[..., 2] = self.z + along * cos - right * sin
        return world

    def face(self, side: str) -> Face:
        """Which way a side of the vehicle looks, for its light."""
        turn = {"front": 0.0, "right": 0.5, "rear": 1.0, "left": -0.5, "top": 0.0}[side] * np.pi
        if side == "top":
            return Face.UP
        angle = self.heading + turn
        if abs(np.sin(angle)) > 0.7:
            return Face.EAST if np.sin(angle) > 0 else Face.WEST
        return Face.SOUTH


@dataclass(frozen=True)
class Prism:
    """A box with four edges across the vehicle, each (along, half width, up)."""

    rear_low: tuple[float, float, float]
    front_low: tuple[float, float, float]
    front_high: tuple[float, float, float]
    rear_high: tuple[float, float, float]

    def sides(self) -> Points:
        """SIDES in vehicle coordinates (5, 4, 3), corners 00, 10, 11, 01 as seen from outside."""
        edges = (self.rear_low, self.front_low, self.front_high, self.rear_high)
        corners = np.array([(a, side * w, y) for side in (-1, 1) for a, w, y in edges])
        return corners[_CORNERS]


Decals = dict[str, Sequence[tuple[str, ArrayLike]]]  # by side: material and rectangles on it


def build_prism(stage: Stage, pose: Pose, prism: Prism, material: str, decals: Decals) -> None:
    """The sides of a prism that face the camera, each with what is painted on it."""
    quads = pose.place(prism.sides())
    for name, world, seen in zip(SIDES, quads, faces_camera(quads, pose.eye).tolist(), strict=True):
        if seen:
            light, face = _LIGHT[name], pose.face(name)
            stage.add(world, material, face=face, shade=light)
            for what, rectangles in decals.get(name, ()):
                stage.add(inset(world, rectangles), what, face=face, shade=light)


def build_tyres(stage: Stage, pose: Pose, axles: Sequence[float], half: float, radius: float) -> None:
    """Tyres as seen from behind or ahead; they go under the body."""
    for sign in (-1, 1):
        for axle in (min(axles), max(axles)):
            outer, inner, top = sign * half, sign * (half - 0.22), radius * 1.4
            tyre = [(axle, outer, 0.0), (axle, inner, 0.0), (axle, inner, top), (axle, outer, top)]
            stage.add(pose.place(tyre), "tyre", shade=0.9)


def build_wheels(stage: Stage, pose: Pose, axles: Sequence[float], half: float, radius: float) -> None:
    """Wheels on the side that is seen; they go over the body."""
    angle = np.arange(10) * (np.pi / 5)
    circle = np.stack([np.cos(angle), np.zeros(10), np.sin(angle)], axis=1)
    for sign in (-1, 1):
        plane = np.array([(0, sign * half, 0), (1, sign * half, 0), (1, sign * half, 1), (0, sign * half, 1)])
        if faces_camera(pose.place(plane if sign > 0 else plane[::-1])[None], pose.eye)[0]:
            for axle in axles:
                hub = np.array((axle, sign * (half + 0.02), radius))
                stage.add(pose.place(circle * radius + hub), "tyre")
                stage.add(pose.place(circle * radius * 0.6 + hub), "rim")


def cast_shadow(stage: Stage, pose: Pose, length: float, half: float, height: float) -> None:
    """Remember the outline on the ground."""
    outline = [
        (-length / 2, -half, 0),
        (length / 2, -half, 0),
        (length / 2, half, 0),
        (-length / 2, half, 0),
    ]
    stage.shadow(pose.place(outline), height)


def _columns(count: int, s0: float, s1: float, t0: float, t1: float, fill: float = 0.86) -> np.ndarray:
    step = (s1 - s0) / count
    start = s0 + step * (np.arange(count) + (1 - fill) / 2)
    return np.stack([start, start + fill * step, np.full(count, t0), np.full(count, t1)], axis=1)


CAR_SHAPES = {  # length, half width, height, hood and trunk in metres, height of the waist
    "hatchback": (4.0, 0.87, 1.50, 0.95, 0.05, 0.92),
    "sedan": (4.6, 0.90, 1.45, 1.10, 0.85, 0.92),
    "estate": (4.7, 0.90, 1.50, 1.10, 0.05, 0.94),
    "suv": (4.6, 0.95, 1.72, 1.00, 0.05, 1.04),
    "van": (5.2, 1.00, 2.15, 0.75, 0.02, 1.15),
}


def build_car(stage: Stage, pose: Pose, rng: Generator) -> None:
    """A car: lower body, cabin, lights, plates, wheels."""
    shape = pick(rng, tuple(CAR_SHAPES), (0.32, 0.2, 0.2, 0.18, 0.1))
    length, half, height, hood, trunk, waist = CAR_SHAPES[shape]
    scale = rng.uniform(0.95, 1.05)
    length, rear, front = length * scale, -length * scale / 2, length * scale / 2
    stage.thing(CAR, pose.z - length / 2 * abs(np.cos(pose.heading)) - 0.1, 4, counted=True)
    cast_shadow(stage, pose, length, half, height)
    axles = (rear + 0.8, front - 0.85)
    build_tyres(stage, pose, axles, half, 0.33)
    body = Prism(
        (rear, half, 0.2),
        (front, half * 0.95, 0.2),
        (front - 0.12, half * 0.9, waist - 0.2),
        (rear + 0.04, half * 0.97, waist),
    )
    rear_lights = (0.0, 0.17, 0.6, 0.9) if shape != "van" else (0.0, 0.1, 0.5, 0.95)
    lamps = [rear_lights, (1 - rear_lights[1], 1 - rear_lights[0], *rear_lights[2:])]
    decals: Decals = {
        "rear": [("trim", (0, 1, 0, 0.2)), ("tail light", lamps), ("plate", (0.36, 0.64, 0.34, 0.5))],
        "front": [
            ("trim", [(0, 1, 0, 0.16), (0.24, 0.76, 0.42, 0.72)]),
            ("head light", [(0.02, 0.22, 0.55, 0.85), (0.78, 0.98, 0.55, 0.85)]),
            ("plate", (0.36, 0.64, 0.2, 0.36)),
        ],
        "left": [("trim", [(0, 1, 0, 0.12), (0.42, 0.43, 0.15, 0.95), (0.66, 0.67, 0.15, 0.95)])],
        "right": [("trim", [(0, 1, 0, 0.12), (0.33, 0.34, 0.15, 0.95), (0.57, 0.58, 0.15, 0.95)])],
    }
    build_prism(stage, pose, body, "paint", decals)
    build_wheels(stage, pose, axles, half, 0.33)
    cabin = Prism(
        (rear + trunk, half * 0.95, waist - 0.03),
        (front - hood, half * 0.9, waist - 0.1),
        (front - hood - (0.85 if shape != "van" else 0.5), half * 0.74, height),
        (rear + trunk + (0.45 if shape == "sedan" else 0.22), half * 0.76, height),
    )
    solid = rng.random() < 0.4 if shape == "van" else False
    panes = [(0.06, 0.46, 0.16, 0.86), (0.5, 0.93, 0.16, 0.86)]
    build_prism(
        stage,
        pose,
        cabin,
        "paint",
        {
            "rear": [("trim", (0.49, 0.51, 0, 1))] if solid else [("glass", (0.09, 0.91, 0.2, 0.86))],
            "front": [("glass", (0.05, 0.95, 0.08, 0.9))],
            "left": [("glass", panes[:1] if solid else panes)],
            "right": [("glass", panes[1:] if solid else panes)],
        },
    )


def build_bus(stage: Stage, pose: Pose, rng: Generator) -> None:
    """A city bus."""
    length, half, height = rng.uniform(10, 12.5), 1.25, rng.uniform(2.9, 3.2)
    stage.thing(BUS, pose.z - length / 2 * abs(np.cos(pose.heading)), 4, counted=True)
    cast_shadow(stage, pose, length, half, height)
    axles = (-length / 2 + 2.6, length / 2 - 2.4)
    build_tyres(stage, pose, axles, half, 0.48)
    body = _box(length, half, 0.3, height)
    panes = _columns(7, 0.03, 0.97, 0.42, 0.86)
    doors = [(0.08, 0.18, 0.05, 0.86), (0.48, 0.58, 0.05, 0.86)]
    stripe = ("frame", (0, 1, 0.3, 0.36))
    decals: Decals = {
        "left": [stripe, ("lit glass", panes)],
        "right": [stripe, ("lit glass", panes), ("glass", [(1 - b, 1 - a, c, d) for a, b, c, d in doors])],
        "front": [
            ("lit glass", (0.05, 0.95, 0.36, 0.82)),
            ("destination", (0.2, 0.8, 0.85, 0.97)),
            ("head light", [(0.05, 0.2, 0.1, 0.2), (0.8, 0.95, 0.1, 0.2)]),
            ("plate", (0.4, 0.6, 0.05, 0.11)),
        ],
        "rear": [
            ("lit glass", (0.12, 0.88, 0.58, 0.86)),
            ("trim", (0.2, 0.8, 0.08, 0.4)),
            ("tail light", [(0.02, 0.12, 0.12, 0.36), (0.88, 0.98, 0.12, 0.36)]),
            ("plate", (0.42, 0.58, 0.42, 0.48)),
        ],
    }
    build_prism(stage, pose, body, "bus paint", decals)
    build_wheels(stage, pose, axles, half, 0.48)


def build_tram(stage: Stage, pose: Pose, rng: Generator) -> None:
    """A tram of two or three cars, with its contact arm."""
    cars, length, half, height = int(rng.integers(2, 4)), 8.5, 1.2, 3.5
    whole = cars * (length + 0.5)
    stage.thing(TRAIN, pose.z - whole / 2 * abs(np.cos(pose.heading)), 4, counted=True)
    cast_shadow(stage, pose, whole, half, height)
    towards = 1 if np.cos(pose.heading) < 0 else -1  # the far cars first
    middles = [(i - (cars - 1) / 2) * (length + 0.5) for i in range(cars)]
    for middle in sorted(middles, reverse=towards < 0):
        centre = pose.place((middle, 0, 0))
        car = Pose(float(centre[0]), float(centre[2]), pose.heading, pose.eye)
        panes = ("lit glass", _columns(5, 0.04, 0.96, 0.42, 0.8))
        stripe = ("frame", (0, 1, 0.28, 0.36))
        ends = [
            ("lit glass", (0.08, 0.92, 0.4, 0.82)),
            ("destination", (0.25, 0.75, 0.84, 0.94)),
            ("trim", (0, 1, 0, 0.1)),
        ]
        decals: Decals = {
            "left": [stripe, panes, ("trim", (0, 1, 0, 0.1))],
            "right": [stripe, panes, ("trim", (0, 1, 0, 0.1))],
            "front": [*ends, ("head light", [(0.1, 0.24, 0.18, 0.28), (0.76, 0.9, 0.18, 0.28)])],
            "rear": [*ends, ("tail light", [(0.06, 0.18, 0.16, 0.28), (0.82, 0.94, 0.16, 0.28)])],
        }
        build_prism(stage, car, _box(length, half, 0.15, height, nose=0.35), "tram paint", decals)
    arm = pose.place([(0.6, 0, height), (-0.6, 0, height + 0.9), (0.6, 0, height + 1.6)])
    stage.lines(np.stack([arm[:2], arm[1:]]), 0.09, "trim")


def build_truck(stage: Stage, pose: Pose, rng: Generator) -> None:
    """A lorry: cargo box and cab, the nearer of them last."""
    length, half = rng.uniform(6.5, 10.5), 1.22
    height, cab = rng.uniform(2.9, 3.7), 2.0
    stage.thing(TRUCK, pose.z - length / 2 * abs(np.cos(pose.heading)), 4, counted=True)
    cast_shadow(stage, pose, length, half, height)
    axles = (-length / 2 + 1.4, -length / 2 + 2.6, length / 2 - 1.2)
    build_tyres(stage, pose, axles, half, 0.5)
    cargo = _box(length - cab - 0.3, half, 0.75, height, middle=-(cab + 0.3) / 2)
    front = _box(cab, half, 0.35, min(height, 2.9), middle=(length - cab) / 2, nose=0.25)
    base = _box(length, half * 0.85, 0.4, 0.8)
    cargo_decals: Decals = {
        "rear": [
            ("trim", [(0.49, 0.51, 0, 1), (0, 1, 0, 0.07)]),
            ("tail light", [(0.02, 0.14, 0.0, 0.07), (0.86, 0.98, 0.0, 0.07)]),
        ],
        "left": [("board", (0.15, 0.8, 0.35, 0.75))] if rng.random() < 0.5 else [],
        "right": [("board", (0.15, 0.8, 0.35, 0.75))] if rng.random() < 0.5 else [],
    }
    cab_decals: Decals = {
        "front": [
            ("glass", (0.06, 0.94, 0.48, 0.86)),
            ("trim", (0.15, 0.85, 0.14, 0.4)),
            ("head light", [(0.02, 0.16, 0.14, 0.26), (0.84, 0.98, 0.14, 0.26)]),
            ("plate", (0.4, 0.6, 0.04, 0.11)),
        ],
        "left": [("glass", (0.12, 0.7, 0.5, 0.84))],
        "right": [("glass", (0.3, 0.88, 0.5, 0.84))],
    }
    build_prism(
        stage, pose, base, "trim", {"rear": [("tail light", [(0, 0.2, 0.2, 0.8), (0.8, 1, 0.2, 0.8)])]}
    )
    parts = [(cargo, "cargo", cargo_decals), (front, "paint", cab_decals)]
    for prism, material, decals in parts if np.cos(pose.heading) < 0 else parts[::-1]:
        build_prism(stage, pose, prism, material, decals)
    build_wheels(stage, pose, axles, half, 0.5)


def build_trailer(stage: Stage, pose: Pose, rng: Generator) -> None:
    """A caravan or a box trailer, parked."""
    is_caravan = rng.random() < 0.5
    length, half, height = (4.6, 1.1, 2.5) if is_caravan else (3.2, 0.9, 1.7)
    label = CARAVAN if is_caravan else TRAILER
    stage.thing(label, pose.z - length / 2 * abs(np.cos(pose.heading)), 4, counted=True)
    cast_shadow(stage, pose, length, half, height)
    build_tyres(stage, pose, (-0.2, 0.2), half, 0.32)
    pane: Decals = {
        "left": [("glass", [(0.15, 0.4, 0.5, 0.8), (0.55, 0.85, 0.5, 0.8)])],
        "right": [("glass", [(0.15, 0.4, 0.5, 0.8), (0.55, 0.85, 0.5, 0.8)])],
        "front": [("glass", (0.2, 0.8, 0.5, 0.82))],
        "rear": [("glass", (0.2, 0.8, 0.5, 0.82)), ("tail light", [(0, 0.1, 0.1, 0.3), (0.9, 1, 0.1, 0.3)])],
    }
    box = _box(length, half, 0.4, height, nose=0.25)
    build_prism(stage, pose, box, "frame" if is_caravan else "cargo", pane if is_caravan else {})
    build_wheels(stage, pose, (-0.2, 0.2), half, 0.32)


def _box(
    length: float, half: float, low: float, high: float, *, middle: float = 0.0, nose: float = 0.0
) -> Prism:
    rear, front = middle - length / 2, middle + length / 2
    return Prism(
        (rear, half, low), (front, half, low), (front - nose, half * 0.97, high), (rear, half * 0.97, high)
    )
