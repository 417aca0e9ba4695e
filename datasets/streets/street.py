"""The street itself: what kind of place it is, how it runs, and the ground it lies on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from datasets.streets.geometry import Camera, Points, Stage

Option = TypeVar("Option")

ROAD, SIDEWALK, PARKING, GROUND, TRACK, TERRAIN = 7, 8, 9, 6, 10, 22
FIRST, LAST = 0.9, 260.0  # metres ahead between which ground is drawn
FAR = 1e5  # sort key of the ground: behind everything


@dataclass(frozen=True)
class Place:
    """A kind of street: what stands there, and how densely (probabilities, or how many on average)."""

    name: str
    weight: float  # how often it is drawn
    lanes: tuple[int, int]  # in each direction
    walk: tuple[float, float]  # width of the sidewalk in metres
    verge: float  # chance of a green strip at the curb
    garden: tuple[float, float]  # metres from sidewalk to building
    building: tuple[str, ...]
    floors: tuple[int, int]
    gap: float  # chance that a lot is empty
    tree: float  # chance at each tree place
    parked: float  # chance at each parking place
    people: float
    traffic: float
    cycles: float
    boundary: tuple[str, ...]  # what closes a garden: fence, wall, hedge, none
    rails: float = 0.0  # chance of tram tracks
    base: str = "paving"  # ground away from the street


PLACES = (
    Place("a city street",
          0.28, (1, 2), (3.0, 5.4), 0.08, (0.0, 0.6), ("block", "block", "office"), (5, 8), 0.05, 0.42,
          0.55, 8.0, 3.4, 1.2, ("none", "fence"), rails=0.22),
    Place("a shopping street",
          0.19, (1, 1), (4.0, 6.5), 0.0, (0.0, 0.0), ("shop", "shop", "block"), (4, 6), 0.02, 0.34, 0.3,
          13.0, 2.2, 2.6, ("none",), rails=0.25),
    Place("a residential street",
          0.22, (1, 1), (1.8, 3.0), 0.1, (1.5, 4.0), ("house", "house", "block"), (2, 3), 0.14, 0.55,
          0.55, 3.2, 1.8, 1.2, ("fence", "wall", "hedge", "hedge", "fence"), base="grass"),
    Place("a tree-lined avenue",
          0.16, (1, 2), (2.8, 4.6), 0.4, (0.0, 3.0), ("block", "office", "house"), (3, 6), 0.08, 0.95,
          0.45, 5.4, 3.4, 1.6, ("none", "hedge", "fence"), rails=0.22),
    Place("a country road",
          0.07, (1, 1), (0.0, 0.0), 1.0, (5.0, 14.0), ("house", "hall", "house"), (1, 2), 0.72, 0.75,
          0.05, 0.4, 1.5, 0.5, ("fence", "none", "hedge", "rail"), base="grass"),
    Place("an industrial street",
          0.08, (1, 1), (1.8, 3.4), 0.2, (2.0, 7.0), ("hall", "hall", "office"), (2, 3), 0.2, 0.3, 0.4,
          1.2, 2.6, 0.5, ("fence", "wall", "wall", "fence"), base="plaza"),
)  # fmt: skip


@dataclass(frozen=True)
class Side:
    """The strips beside the road on one side, each a width in metres from the curb outwards."""

    sign: int  # -1 left, 1 right
    bay: float  # parking bay
    verge: float
    walk: float
    garden: float
    boundary: str
    is_parking: bool  # the bay is labelled as parking, not as road

    @property
    def facade(self) -> float:
        """Metres from the edge of the road to the buildings."""
        return self.bay + self.verge + self.walk + self.garden


@dataclass(frozen=True)
class Street:
    """A road that runs ahead, a little bent, with two sides."""

    place: Place
    camera: Camera
    half: float  # metres, half the width of the road
    lanes: int  # in each direction
    offset: float  # of the road's middle from the camera
    slope: float
    bend: float
    end: float  # metres ahead where another street closes the view
    crossing: tuple[float, float] | None  # a street that crosses, between two depths
    rails: bool
    sides: tuple[Side, Side]

    def x(self, lateral: ArrayLike, z: ArrayLike) -> NDArray[np.float64]:
        """World x of a point beside the road's middle line."""
        z = np.asarray(z, np.float64)
        return self.offset + self.slope * z + self.bend * z * z + np.asarray(lateral)

    def heading(self, z: float) -> float:
        """Angle of the road at a depth, 0 for straight ahead."""
        return float(np.arctan(self.slope + 2 * self.bend * z))

    def lane(self, number: int) -> float:
        """Lateral middle of a lane: 0 is the innermost on the right, -1 the innermost on the left."""
        width = self.half / self.lanes
        return (number + 0.5) * width

    def crosses(self, near: float, far: float) -> bool:
        """Whether a stretch of the roadside lies in the street that crosses."""
        return self.crossing is not None and near < self.crossing[1] and far > self.crossing[0]


def pick(rng: Generator, options: Sequence[Option], weights: Sequence[float] | None = None) -> Option:
    """One of the options; quicker than Generator.choice."""
    if weights is None:
        return options[int(rng.random() * len(options))]
    level, total = rng.random() * sum(weights), 0.0
    for option, weight in zip(options, weights, strict=True):
        total += weight
        if level < total:
            return option
    return options[-1]


def lay_out_street(rng: Generator) -> Street:
    """Draw a place, a camera and the course of the street."""
    place = pick(rng, PLACES, [place.weight for place in PLACES])
    camera = Camera(
        height=rng.uniform(1.15, 1.75), pitch=np.deg2rad(rng.uniform(0.6, 4.0)), focal=rng.uniform(0.72, 1.02)
    )
    lanes = int(rng.integers(place.lanes[0], place.lanes[1] + 1))
    half = lanes * rng.uniform(3.1, 3.8)
    ours = rng.integers(lanes)
    offset = -(ours + 0.5) * half / lanes + rng.uniform(-0.4, 0.4)
    crossing = None
    if rng.random() < 0.45:
        start = rng.uniform(14, 45)
        crossing = (start, start + rng.uniform(7, 12))
    return Street(
        place=place,
        camera=camera,
        half=half,
        lanes=lanes,
        offset=offset,
        slope=float(rng.normal(0, 0.045)),
        bend=float(rng.normal(0, 0.0011)),
        end=rng.uniform(70, 150),
        crossing=crossing,
        rails=rng.random() < place.rails,
        sides=(_lay_out_side(rng, place, -1), _lay_out_side(rng, place, 1)),
    )


def _lay_out_side(rng: Generator, place: Place, sign: int) -> Side:
    has_bay = rng.random() < 0.25 + place.parked
    return Side(
        sign=sign,
        bay=rng.uniform(2.1, 2.5) if has_bay and place.walk[1] > 0 else 0.0,
        verge=rng.uniform(1.2, 2.6) if rng.random() < place.verge else 0.0,
        walk=rng.uniform(*place.walk),
        garden=rng.uniform(*place.garden),
        boundary=pick(rng, place.boundary),
        is_parking=rng.random() < 0.3,
    )


# -- drawing the ground ------------------------------------------------------------------------------------


def strip(street: Street, inner: float, outer: float, near: float = FIRST, far: float = LAST) -> Points:
    """Quads of the ground between two lateral positions, following the street."""
    steps = max(2, int(np.ceil(np.log(far / near) / 0.42)) + 1) if street.bend else 2
    z = np.geomspace(near, far, steps)
    left, right = street.x(inner, z), street.x(outer, z)
    floor = np.zeros_like(z)
    edge0, edge1 = np.stack([left, floor, z], 1), np.stack([right, floor, z], 1)
    return np.stack([edge0[:-1], edge1[:-1], edge1[1:], edge0[1:]], axis=1)


def slab(street: Street, lateral: float, z: float, width: float, length: float) -> Points:
    """One flat rectangle on the ground, its near edge at `z`."""
    x0, x1 = street.x(lateral, z), street.x(lateral, z + length)
    return np.array(
        [
            (x0 - width / 2, 0, z),
            (x0 + width / 2, 0, z),
            (x1 + width / 2, 0, z + length),
            (x1 - width / 2, 0, z + length),
        ]
    )


def build_ground(stage: Stage, street: Street, rng: Generator) -> None:
    """Everything flat: base, strips beside the road, the road, its markings, the street that crosses."""
    base = street.place.base
    stage.thing({"grass": TERRAIN, "plaza": GROUND}.get(base, SIDEWALK), FAR)
    stage.add([(-400, 0, FIRST), (400, 0, FIRST), (400, 0, 900), (-400, 0, 900)], base)
    for side in street.sides:
        _build_side(stage, street, side, rng)
    stage.thing(ROAD, FAR, 2)
    stage.add(strip(street, -street.half, street.half), "asphalt")
    _build_patches(stage, street, rng)
    if street.rails:
        _build_rails(stage, street)
    stage.thing(ROAD, FAR, 4)
    _build_lines(stage, street, rng)
    if street.crossing is not None:
        _build_crossing(stage, street, *street.crossing, zebra=rng.random() < 0.65)
    elif rng.random() < 0.3 and street.place.walk[1] > 0:
        stage.thing(ROAD, FAR, 5)
        _build_zebra(stage, street, rng.uniform(9, 40))
    stage.thing(ROAD, FAR, 6)
    z, wide = street.end, [(-90.0, 0, 0), (90.0, 0, 0)]
    x = float(street.x(0, z))
    stage.add([(x + a, 0, z) for a, _, _ in wide] + [(x + a, 0, z + 11) for a, _, _ in wide[::-1]], "asphalt")


def _build_side(stage: Stage, street: Street, side: Side, rng: Generator) -> None:
    at = street.half
    strips = [
        (side.bay, PARKING if side.is_parking else ROAD, "bay" if side.is_parking else "asphalt"),
        (0.16 if side.walk else 0.0, SIDEWALK, "curb"),
        (side.verge, TERRAIN, "grass"),
        (side.walk, SIDEWALK, "paving"),
        (side.garden, *_garden_ground(street, side)),
    ]
    for width, label, material in strips:
        if width > 0.01:
            stage.thing(label, FAR, 1)
            stage.add(strip(street, side.sign * at, side.sign * (at + width)), material)
            at += width
    if side.walk > 1.5:  # rows of slabs
        inner = street.half + side.bay + side.verge + 0.16
        for share in (0.35, 0.7):
            stage.thing(SIDEWALK, FAR, 2)
            edge = side.sign * (inner + share * side.walk)
            stage.add(strip(street, edge - 0.02, edge + 0.02, far=30), "slab")


def _garden_ground(street: Street, side: Side) -> tuple[int, str]:
    if side.boundary == "none" and street.place.base != "grass":
        return SIDEWALK, "paving"
    return (GROUND, "plaza") if street.place.base == "plaza" else (TERRAIN, "grass")


def _build_patches(stage: Stage, street: Street, rng: Generator) -> None:
    """Repairs and manhole covers."""
    for _ in range(int(rng.integers(0, 5))):
        z, lateral = 4 + 36 * rng.random() ** 2, rng.uniform(-0.8, 0.8) * street.half
        stage.add(slab(street, lateral, z, rng.uniform(0.5, 1.6), rng.uniform(0.8, 4)), "patch")
    for _ in range(int(rng.integers(0, 3))):
        z, lateral = rng.uniform(5, 25), rng.uniform(-0.8, 0.8) * street.half
        angle = np.arange(8) * (np.pi / 4)
        x = street.x(lateral, z) + 0.38 * np.cos(angle)
        stage.add(np.stack([x, np.zeros(8), z + 0.38 * np.sin(angle)], 1), "patch", shade=0.8)


def _build_rails(stage: Stage, street: Street) -> None:
    lane = street.lane(-1)
    stage.thing(TRACK, FAR, 3)
    stage.add(strip(street, lane - 1.25, lane + 1.25), "track")
    for edge in (lane - 0.72, lane + 0.72):
        stage.add(strip(street, edge - 0.05, edge + 0.05, far=120), "rail")


def _build_lines(stage: Stage, street: Street, rng: Generator) -> None:
    """Lines between and beside the lanes."""
    if street.place.name == "a residential street" and rng.random() < 0.6:
        return
    colour = "yellow line" if rng.random() < 0.12 else "marking"
    solid = rng.random() < 0.25
    for lane in range(-street.lanes + 1, street.lanes):
        lateral = lane * street.half / street.lanes
        if lane == 0 and solid:
            stage.add(strip(street, lateral - 0.07, lateral + 0.07, far=street.end), colour)
        else:
            _build_dashes(stage, street, lateral, rng.uniform(2.2, 6.0), colour)
    if rng.random() < 0.6:
        for sign in (-1, 1):
            edge = sign * (street.half - 0.18)
            stage.add(strip(street, edge - 0.06, edge + 0.06, far=street.end), "marking")
    if street.lanes > 1 and rng.random() < 0.5:
        _build_arrow(stage, street, street.lane(0), rng.uniform(8, 18))


def _build_dashes(stage: Stage, street: Street, lateral: float, first: float, colour: str) -> None:
    z = first
    while z < min(street.end, 75):
        if not street.crosses(z, z + 3):
            stage.add(slab(street, lateral, z, 0.14, 3.0), colour)
        z += 7.5


def _build_arrow(stage: Stage, street: Street, lateral: float, z: float) -> None:
    stage.add(slab(street, lateral, z, 0.16, 2.6), "marking")
    x = float(street.x(lateral, z + 2.6))
    stage.add([(x - 0.4, 0, z + 2.5), (x + 0.4, 0, z + 2.5), (x, 0, z + 4.2)], "marking")


def _build_zebra(stage: Stage, street: Street, z: float) -> None:
    count = int(street.half * 2 / 1.0)
    for i in range(count):
        lateral = -street.half + (i + 0.5) * street.half * 2 / count
        stage.add(slab(street, lateral, z, 0.5, 3.0), "marking")


def _build_crossing(stage: Stage, street: Street, near: float, far: float, *, zebra: bool) -> None:
    """A street from side to side, with its stop line."""
    stage.thing(ROAD, FAR, 5)
    x0, x1 = float(street.x(0, near)), float(street.x(0, far))
    quad = [(x0 - 90, 0, near), (x0 + 90, 0, near), (x1 + 90, 0, far), (x1 - 90, 0, far)]
    stage.add(quad, "asphalt")
    if zebra and street.place.walk[1] > 0:
        _build_zebra(stage, street, near - 4.2)
    lateral = street.half / 2
    stage.add(slab(street, lateral, near - 5.4, street.half - 0.5, 0.45), "marking")
