"""Who stands where: a whole scene from one random generator, in metres and apart from its appearance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from datasets.streets import buildings, figures, furniture, plants, vehicles
from datasets.streets.geometry import Stage
from datasets.streets.street import Side, Street, build_ground, lay_out_street, pick

LOT = {"block": (9, 18), "shop": (8, 15), "office": (16, 30), "house": (8, 13), "hall": (18, 34)}  # metres
TRAM_ROOM = 24.0  # metres before and behind the middle of a tram that other traffic leaves free


@dataclass(frozen=True)
class Scene:
    """A street and everything on it."""

    street: Street
    stage: Stage


def build_scene(seed: int) -> Scene:
    """The scene of a seed; nothing but the seed decides it."""
    rng = np.random.default_rng([seed, 0])
    street, stage = lay_out_street(rng), Stage()
    build_ground(stage, street, rng)
    if street.place.name == "a country road" or rng.random() < 0.3:
        plants.build_woods(stage, street, rng)
    if street.place.name != "a country road":
        buildings.build_backdrop(stage, street, rng)
    for side in street.sides:
        _build_lots(stage, street, side, rng)
        _build_trees(stage, street, side, rng)
        _build_parked(stage, street, side, rng)
        _build_furniture(stage, street, side, rng)
        _build_walkers(stage, street, side, rng)
    _build_traffic(stage, street, rng)
    _build_at_crossing(stage, street, rng)
    if rng.random() < 0.04:
        furniture.build_bridge(stage, street, rng.uniform(28, 60), rng)
    if rng.random() < 0.75:
        furniture.build_bonnet(stage, street, rng)
    return Scene(street, stage)


# -- beside the road ---------------------------------------------------------------------------------------


def _build_lots(stage: Stage, street: Street, side: Side, rng: Generator) -> None:
    z = rng.uniform(1.5, 6)
    while z < street.end - 3:
        kind = pick(rng, street.place.building)
        far = min(z + rng.uniform(*LOT[kind]), street.end - 1)
        if street.crosses(z, far):
            z, far = _before_or_after(street, z)
        if far - z > 4:
            empty = rng.random() < street.place.gap
            if empty:
                _build_clump(stage, street, side, z, far, rng)
            else:
                buildings.build_building(stage, street, side, z, far, kind, rng)
            _build_boundary(stage, street, side, z, far, rng)
            _build_garden(stage, street, side, z, far, rng)
        z = far + (rng.uniform(1, 7) if kind in ("house", "hall") else 0.0)


def _before_or_after(street: Street, near: float) -> tuple[float, float]:
    """The lot that is left of a stretch which a street crosses; one of no length behind the crossing."""
    assert street.crossing is not None
    start, end = street.crossing
    return (near, start - 1.0) if start - near > 6 else (end + 1.0, end + 1.0)


def _build_boundary(
    stage: Stage, street: Street, side: Side, near: float, far: float, rng: Generator
) -> None:
    kind = side.boundary
    if kind == "none" or (side.garden < 1 and kind != "fence") or rng.random() < 0.25:
        return
    builders = {
        "fence": furniture.build_fence,
        "wall": furniture.build_wall,
        "hedge": furniture.build_hedge,
        "rail": furniture.build_guard_rail,
    }
    opening = rng.uniform(0.0, 3.5)  # a gate
    if far - near - opening > 2:
        builders[kind](stage, street, side, max(near, 2.0), far - opening, rng)


def _build_garden(stage: Stage, street: Street, side: Side, near: float, far: float, rng: Generator) -> None:
    if side.garden < 2:
        return
    edge = street.half + side.bay + side.verge + side.walk
    for z in np.arange(max(near, 6.0) + 1, far, 4.5)[::-1]:
        chance, lateral = rng.random(), side.sign * (edge + rng.uniform(0.9, side.garden - 0.4))
        if chance < 0.28 and z > 9:
            plants.build_tree(stage, float(street.x(lateral, z)), float(z), rng, layer=1, key=far)
        elif chance < 0.62:
            plants.build_bush(stage, float(street.x(lateral, z)), float(z), rng, key=far)


def _build_clump(stage: Stage, street: Street, side: Side, near: float, far: float, rng: Generator) -> None:
    """Trees where no house stands, or a parking lot with cars."""
    edge = street.half + side.facade
    for z in np.arange(max(near, 7.0), far, 3.6)[::-1]:
        if rng.random() < street.place.tree * 0.6:
            lateral = side.sign * (edge + rng.uniform(0, 9))
            plants.build_tree(stage, float(street.x(lateral, z)), float(z), rng, layer=0, key=far)
    if near > 12 and rng.random() < 0.3:
        lateral = side.sign * (edge + 2.5)
        pose = vehicles.Pose(
            float(street.x(lateral, near)), near + 2, side.sign * np.pi / 2, street.camera.height
        )
        (vehicles.build_trailer if rng.random() < 0.5 else vehicles.build_car)(stage, pose, rng)


def _build_trees(stage: Stage, street: Street, side: Side, rng: Generator) -> None:
    if side.walk + side.verge < 1.2 or side.garden > 9:
        return
    lateral = side.sign * (street.half + side.bay + max(side.verge / 2, 0.5))
    z, spacing = rng.uniform(7, 16), rng.uniform(7, 13)
    while z < min(street.end, 100):
        if rng.random() < street.place.tree and not street.crosses(z - 1, z + 1):
            plants.build_tree(stage, float(street.x(lateral, z)), z, rng, wild=False)
        z += spacing * rng.uniform(0.85, 1.2)


def _build_parked(stage: Stage, street: Street, side: Side, rng: Generator) -> None:
    if side.bay == 0:
        return
    lateral = side.sign * (street.half + side.bay / 2)
    z = rng.uniform(7.5, 14)
    while z < min(street.end, 85):
        if rng.random() < street.place.parked and not street.crosses(z - 4, z + 5):
            heading = street.heading(z) + (np.pi if side.sign < 0 else 0.0) + rng.normal(0, 0.03)
            pose = vehicles.Pose(float(street.x(lateral, z)), z, heading, street.camera.height)
            kind = rng.random()
            builder = vehicles.build_truck if kind < 0.008 else vehicles.build_car
            if 0.008 < kind < 0.022:
                builder = vehicles.build_trailer
            if 0.022 < kind < 0.11:
                _two_wheelers(stage, street, lateral, z, rng)
            else:
                builder(stage, pose, rng)
        z += rng.uniform(5.6, 7.2)


def _two_wheelers(stage: Stage, street: Street, lateral: float, z: float, rng: Generator) -> None:
    """Bicycles or motorcycles in a row, parked askew."""
    builder = figures.build_bicycle if rng.random() < 0.78 else figures.build_motorcycle
    turn = rng.uniform(0.7, 2.4)
    for i in range(int(rng.integers(1, 4)))[::-1]:
        at = z + 0.9 * i
        pose = vehicles.Pose(
            float(street.x(lateral, at)), at, turn + rng.normal(0, 0.12), street.camera.height
        )
        builder(stage, pose, rng)


def _build_furniture(stage: Stage, street: Street, side: Side, rng: Generator) -> None:
    """Lamps, signs, poles, boxes and parked bicycles on the sidewalk."""
    curb = side.sign * (street.half + side.bay + 0.45)
    if rng.random() < 0.8:
        z, spacing = rng.uniform(7, 26), rng.uniform(22, 34)
        while z < 85:
            furniture.build_lamp(stage, float(street.x(curb, z)), z, -side.sign, rng)
            z += spacing
    inner = side.sign * (street.half + side.facade - side.garden - 0.4)
    busy = min(1.0, street.place.people / 5)
    for z in rng.uniform(6, 60, int(rng.poisson(1.6))).tolist():
        furniture.build_sign(stage, float(street.x(curb, z)), z, rng)
    for z in rng.uniform(6, 60, int(rng.poisson(1.3))).tolist():
        furniture.build_pole(stage, float(street.x(curb, z)), z, rng)
    for z in rng.uniform(6, 40, int(rng.poisson(0.9 * busy))).tolist():
        furniture.build_box(stage, float(street.x(inner, z)), z, rng)
    for z in rng.uniform(6, 35, int(rng.poisson(0.42 * street.place.cycles))).tolist():
        _two_wheelers(stage, street, inner, z, rng)


def _build_walkers(stage: Stage, street: Street, side: Side, rng: Generator) -> None:
    start = street.half + side.bay + side.verge + 0.4
    for _ in range(int(rng.poisson(street.place.people / 2))):
        z = 6 + 44 * rng.random() ** 1.3
        lateral = side.sign * (start + rng.random() * max(side.walk - 0.7, 0.2))
        x = float(street.x(lateral, z))
        figures.build_person(stage, x, z, rng)
        company = rng.random()
        if company < 0.25:
            figures.build_person(stage, x + 0.55, z + 0.2, rng, child=company < 0.07)
        elif company > 0.95:
            figures.build_dog_or_pram(stage, x - 0.8, z, rng)


# -- on the road -------------------------------------------------------------------------------------------


def _build_traffic(stage: Stage, street: Street, rng: Generator) -> None:
    """Vehicles in the lanes, ahead and oncoming."""
    tram = rng.uniform(24, 55) if street.rails and rng.random() < 0.65 else None
    if tram is not None:
        vehicles.build_tram(stage, _pose(street, street.lane(-1), tram, np.pi), rng)
    for lane in range(-street.lanes, street.lanes):
        z = rng.uniform(9, 40) if lane >= 0 else rng.uniform(8, 30)
        while z < min(street.end, 95):
            is_free = lane != -1 or tram is None or abs(z - tram) > TRAM_ROOM
            if is_free and rng.random() < 0.17 * street.place.traffic:
                z += _build_vehicle(stage, street, lane, z, rng)
            z += rng.uniform(7, 14)
    for _ in range(int(rng.poisson(0.33 * street.place.cycles))):
        sign = pick(rng, (-1, 1))
        z = 7 + 30 * rng.random()
        lateral = sign * (street.half - rng.uniform(0.3, 0.9))
        pose = _pose(street, lateral, z, (np.pi if sign < 0 else 0.0) + rng.normal(0, 0.2))
        figures.build_bicycle(stage, pose, rng, ridden=True)


def _build_vehicle(stage: Stage, street: Street, lane: int, z: float, rng: Generator) -> float:
    """Put something into a lane; returns the metres that it takes up."""
    lateral = street.lane(lane) + rng.normal(0, 0.15)
    pose = _pose(street, lateral, z, 0.0 if lane >= 0 else np.pi)
    industrial = 2.5 if street.place.name == "an industrial street" else 1.0
    builders = (vehicles.build_car, vehicles.build_bus, vehicles.build_truck, _ridden_motorcycle)
    builder = pick(rng, builders, (0.90, 0.019, 0.014 * industrial, 0.05))
    is_long = builder in (vehicles.build_bus, vehicles.build_truck)
    if z < 16 and is_long:
        pose = _pose(street, lateral, z + 9, 0.0 if lane >= 0 else np.pi)
    builder(stage, pose, rng)
    return 18.0 if is_long else 8.0


def _ridden_motorcycle(stage: Stage, pose: vehicles.Pose, rng: Generator) -> None:
    figures.build_motorcycle(stage, pose, rng, ridden=True)


def _pose(street: Street, lateral: float, z: float, turn: float) -> vehicles.Pose:
    return vehicles.Pose(float(street.x(lateral, z)), z, street.heading(z) + turn, street.camera.height)


def _build_at_crossing(stage: Stage, street: Street, rng: Generator) -> None:
    """Signals, people and vehicles where a street crosses."""
    if street.crossing is None:
        return
    near, far = street.crossing
    walks = street.place.walk[1] > 0
    if walks and rng.random() < 0.75:
        for side in street.sides:
            x = float(street.x(side.sign * (street.half + 0.5), near - 1))
            furniture.build_traffic_light(stage, x, near - 1, -side.sign, rng)
            x = float(street.x(side.sign * (street.half + 0.5), far + 1))
            furniture.build_traffic_light(stage, x, far + 1, -side.sign, rng)
    for _ in range(int(rng.poisson(0.16 * street.place.people)) if walks else 0):
        z = near - rng.uniform(1.6, 3.8)
        figures.build_person(stage, float(street.x(rng.uniform(-1, 1) * street.half, z)), z, rng)
    for way, z in ((1, near + (far - near) * 0.3), (-1, near + (far - near) * 0.75)):
        x = rng.uniform(-22, 22)
        if rng.random() < 0.55:
            pose = vehicles.Pose(x, z, way * np.pi / 2 + rng.normal(0, 0.05), street.camera.height)
            builders = (
                vehicles.build_car,
                vehicles.build_bus,
                vehicles.build_truck,
                _cyclist,
                _ridden_motorcycle,
            )
            builder = pick(rng, builders, (0.70, 0.036, 0.034, 0.16, 0.07))
            builder(stage, pose, rng)


def _cyclist(stage: Stage, pose: vehicles.Pose, rng: Generator) -> None:
    figures.build_bicycle(stage, pose, rng, ridden=True)
