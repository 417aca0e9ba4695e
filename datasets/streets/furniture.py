"""What people put beside a road: walls, fences, hedges, lamps, signs, signals, boxes; and our own bonnet."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from datasets.streets.geometry import Face, Points, Stage, disc, inset, rise, standing
from datasets.streets.street import Side, Street, pick

EGO, STATIC, WALL, FENCE, GUARD_RAIL, BRIDGE = 1, 4, 12, 13, 14, 15
LOW = 1.15  # metres; the top of a lower box is seen from above
POLE, POLE_GROUP, TRAFFIC_LIGHT, TRAFFIC_SIGN, HEDGE = 17, 18, 19, 20, 21


# -- boundaries --------------------------------------------------------------------------------------------


def _line_at(street: Street, side: Side, near: float, far: float) -> tuple[Points, Points]:
    lateral = side.sign * (street.half + side.bay + side.verge + side.walk + 0.3)
    ends = [(float(street.x(lateral, z)), 0.0, z) for z in (near, far)]
    return np.array(ends[0]), np.array(ends[1])


def _barrier(
    stage: Stage,
    street: Street,
    side: Side,
    near: float,
    far: float,
    height: float,
    thick: float,
    material: str,
) -> None:
    """A solid row: its long face, its near end, its top."""
    a, b = _line_at(street, side, near, far)
    up, back = np.array((0, height, 0)), np.array((side.sign * thick, 0, 0))
    face = Face.EAST if side.sign < 0 else Face.WEST
    stage.add([a, a + back, a + back + up, a + up], material, face=Face.SOUTH)
    pieces = max(1, int((far - near) / 4))
    cuts = np.linspace(0, 1, pieces + 1)
    rows = np.stack([cuts[:-1], cuts[1:], np.zeros(pieces), np.ones(pieces)], axis=1)
    stage.add(inset([a, b, b + up, a + up], rows), material, face=face)
    if height < street.camera.height:
        stage.add([a + up, b + up, b + up + back, a + up + back], material, face=Face.UP)


def build_hedge(stage: Stage, street: Street, side: Side, near: float, far: float, rng: Generator) -> None:
    """A cut hedge along the garden."""
    stage.thing(HEDGE, far, 2)
    height = rng.uniform(0.9, 1.7)
    _barrier(stage, street, side, near, far, height, 0.6, "hedge")


def build_wall(stage: Stage, street: Street, side: Side, near: float, far: float, rng: Generator) -> None:
    """A garden or factory wall."""
    stage.thing(WALL, far, 2)
    height = rng.uniform(1.1, 2.4)
    _barrier(stage, street, side, near, far, height, 0.3, "stone wall")
    a, b = _line_at(street, side, near, far)
    top, low = np.array((0, height, 0)), np.array((0, height - 0.15, 0))
    stage.add([a + low, b + low, b + top, a + top], "cornice", face=Face.EAST if side.sign < 0 else Face.WEST)


def build_fence(stage: Stage, street: Street, side: Side, near: float, far: float, rng: Generator) -> None:
    """A fence of boards, or of bars; its outline is all fence, as annotators draw it."""
    stage.thing(FENCE, far, 2)
    height = rng.uniform(0.95, 1.9)
    face = Face.EAST if side.sign < 0 else Face.WEST
    material = "wood fence" if rng.random() < 0.5 else "metal fence"
    _barrier(stage, street, side, near, far, height, 0.08, material)
    a, b = _line_at(street, side, near, far)
    panel = [a, b, b + rise(height), a + rise(height)]
    gaps = min(28, max(3, int((far - near) / (0.3 if near < 15 else 0.7))))
    step = (np.arange(gaps) + 0.5) / gaps
    share = 0.12 if material == "wood fence" else 0.3
    slots = np.stack(
        [step - share / gaps, step + share / gaps, np.full(gaps, 0.08), np.full(gaps, 0.9)], axis=1
    )
    stage.add(inset(panel, slots), material, face=face, shade=0.62 if material == "wood fence" else 1.5)


def build_guard_rail(
    stage: Stage, street: Street, side: Side, near: float, far: float, rng: Generator
) -> None:
    """A steel rail on posts."""
    stage.thing(GUARD_RAIL, far, 2)
    lateral = side.sign * (street.half + 0.7)
    a, b = (np.array((float(street.x(lateral, z)), 0.0, z)) for z in (near, far))
    face = Face.EAST if side.sign < 0 else Face.WEST
    stage.add([a + rise(0.45), b + rise(0.45), b + rise(0.78), a + rise(0.78)], "guard rail", face=face)
    posts = np.linspace(0, 1, max(2, int((far - near) / 3)), endpoint=False)[:, None] * (b - a) + a
    stage.lines(np.stack([posts, posts + rise(0.6)], axis=1), 0.12, "metal fence")


def build_bridge(stage: Stage, street: Street, z: float, rng: Generator) -> None:
    """A bridge over the street."""
    stage.thing(BRIDGE, z + 8, 1)
    x, low, high = float(street.x(0, z)), rng.uniform(4.8, 6.0), rng.uniform(7.0, 7.8)
    reach = street.half + max(side.facade for side in street.sides) + 10
    stage.add(
        [(x - reach, low, z), (x + reach, low, z), (x + reach, high, z), (x - reach, high, z)],
        "bridge",
        face=Face.SOUTH,
    )
    stage.add(
        [(x - reach, low, z + 8), (x + reach, low, z + 8), (x + reach, low, z), (x - reach, low, z)],
        "bridge",
        shade=0.5,
    )
    stage.add(
        [(x - reach, high, z), (x + reach, high, z), (x + reach, high + 0.9, z), (x - reach, high + 0.9, z)],
        "metal fence",
        face=Face.SOUTH,
    )
    for side in street.sides:
        lateral = side.sign * (street.half + 0.8 + side.bay)
        px = float(street.x(lateral, z + 1))
        stage.add(
            [(px - 0.5, 0, z), (px + 0.5, 0, z), (px + 0.5, low, z), (px - 0.5, low, z)],
            "bridge",
            face=Face.SOUTH,
            shade=0.9,
        )


# -- poles and what hangs on them --------------------------------------------------------------------------


def _post(stage: Stage, x: float, z: float, height: float, width: float) -> None:
    stage.shadow(
        [(x - 0.15, 0, z - 0.1), (x + 0.15, 0, z - 0.1), (x + 0.15, 0, z + 0.1), (x - 0.15, 0, z + 0.1)], 0.4
    )
    stage.lines([(x, 0, z), (x, height, z)], width, "pole")


def build_lamp(stage: Stage, x: float, z: float, towards: int, rng: Generator) -> None:
    """A street lamp that leans over the road."""
    stage.thing(POLE, z, 3)
    height, reach = rng.uniform(5.0, 8.5), towards * rng.uniform(0.8, 2.2)
    _post(stage, x, z, height, 0.17)
    stage.lines([(x, height, z), (x + reach, height + 0.35, z)], 0.11, "pole")
    head = [
        (reach - 0.35, height + 0.26),
        (reach + 0.35, height + 0.26),
        (reach + 0.25, height + 0.46),
        (reach - 0.25, height + 0.46),
    ]
    stage.add(standing(x, z, head), "lamp")
    stage.lamp(x + reach, height + 0.3, z)


def build_traffic_light(stage: Stage, x: float, z: float, towards: int, rng: Generator) -> None:
    """Signals on a pole, sometimes one more over the road."""
    stage.thing(POLE, z, 3)
    _post(stage, x, z, 3.3, 0.15)
    phase = int(rng.integers(3))
    arm = rng.random() < 0.3
    if arm:
        stage.lines([(x, 3.2, z), (x, 5.6, z)], 0.16, "pole")
        stage.lines([(x, 5.5, z), (x + towards * 3.6, 5.7, z)], 0.12, "pole")
    stage.part(TRAFFIC_LIGHT)
    _signal(stage, x - towards * 0.05, 2.3, z, phase)
    if arm:
        _signal(stage, x + towards * 3.4, 4.9, z, phase)


def _signal(stage: Stage, x: float, y: float, z: float, phase: int) -> None:
    stage.add(standing(x, z, [(-0.2, y), (0.2, y), (0.2, y + 1.05), (-0.2, y + 1.05)]), "signal")
    for i, lens in enumerate(("green lens", "amber lens", "red lens")):
        stage.add(disc(x, y + 0.19 + i * 0.33, z, 0.13, 8), lens if i == phase else "dark lens")


def _regular(sides: int, radius: float, turn: float = 0.0) -> Points:
    angle = np.arange(sides) * (2 * np.pi / sides) + turn
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


_ROUND, _WARNING, _YIELD = _regular(10, 0.34), _regular(3, 0.46, np.pi / 2), _regular(3, 0.46, -np.pi / 2)
_STOP, _DIAMOND = _regular(8, 0.38, np.pi / 8), _regular(4, 0.42)
_SQUARE = _regular(4, 0.45, np.pi / 4)
_BAR = np.array([(-0.24, -0.06), (0.24, -0.06), (0.24, 0.06), (-0.24, 0.06)])
_PLATE = np.array([(-0.85, -0.35), (0.85, -0.35), (0.85, 0.35), (-0.85, 0.35)])
SIGNS = (  # outlines from back to front, each with its colour
    ((_ROUND, "sign red"), (_ROUND * 0.68, "sign white")),
    ((_ROUND, "sign blue"), (_BAR, "sign white")),
    ((_ROUND, "sign red"), (_BAR, "sign white")),
    ((_WARNING, "sign red"), (_WARNING * 0.6, "sign white")),
    ((_YIELD, "sign red"), (_YIELD * 0.6, "sign white")),
    ((_STOP, "sign red"), (_BAR, "sign white")),
    ((_DIAMOND, "sign white"), (_DIAMOND * 0.7, "sign yellow")),
    ((_SQUARE, "sign blue"), (_SQUARE * 0.45, "sign white")),
    ((_PLATE, "sign yellow"), (_PLATE * (0.7, 0.15), "trim")),
    ((_PLATE * (1.2, 1.4), "sign green"), (_PLATE * (0.8, 0.2), "sign white")),
    ((_PLATE * (1.1, 1.3), "sign blue"), (_PLATE * (0.8, 0.25), "sign white")),
)


def build_sign(stage: Stage, x: float, z: float, rng: Generator) -> None:
    """One or two traffic signs on a post."""
    stage.thing(POLE, z, 3)
    big = int(rng.integers(len(SIGNS)))
    high = rng.uniform(2.2, 3.0)
    _post(stage, x, z, high + 0.3, 0.09)
    stage.part(TRAFFIC_SIGN)
    choices = [big] if rng.random() < 0.7 or big > 7 else [big, int(rng.integers(8))]
    for i, choice in enumerate(choices):
        for outline, colour in SIGNS[choice]:
            stage.add(standing(x, z, outline + np.array((0, high - 0.85 * i))), colour)


def build_pole(stage: Stage, x: float, z: float, rng: Generator) -> None:
    """A plain pole, or a group of them."""
    group = rng.random() < 0.12
    stage.thing(POLE_GROUP if group else POLE, z, 3)
    height = rng.uniform(3.0, 8.0)
    _post(stage, x, z, height, 0.13)
    if group:
        stage.lines([(x + 0.25, 0, z), (x + 0.25, height * 0.8, z)], 0.13, "pole")


def build_box(stage: Stage, x: float, z: float, rng: Generator) -> None:
    """A bin, a switch box, an advertising board or a bench."""
    stage.thing(STATIC, z, 3)
    sizes = ((0.3, 0.95), (0.45, 1.25), (0.65, 2.2), (0.9, 0.5), (0.12, 0.9))
    wide, tall = pick(rng, sizes)
    stage.shadow(
        [(x - wide, 0, z - 0.3), (x + wide, 0, z - 0.3), (x + wide, 0, z + 0.3), (x - wide, 0, z + 0.3)], tall
    )
    stage.add(
        standing(x, z, [(-wide, 0), (wide, 0), (wide, tall), (-wide, tall)]), "street box", face=Face.SOUTH
    )
    if tall > 2:
        panel = [(-wide * 0.8, 0.6), (wide * 0.8, 0.6), (wide * 0.8, tall * 0.93), (-wide * 0.8, tall * 0.93)]
        stage.add(standing(x, z, panel), "board")
    elif tall < LOW:
        stage.add(
            [(x - wide, tall, z), (x + wide, tall, z), (x + wide, tall, z + 0.5), (x - wide, tall, z + 0.5)],
            "street box",
            face=Face.UP,
        )


def build_bonnet(stage: Stage, street: Street, rng: Generator) -> None:
    """The bonnet of the camera's own car, along the bottom of the image."""
    stage.thing(EGO, -10, 9)
    camera = street.camera
    z, angle = 2.0, np.linspace(-1, 1, 13)
    bottom = 0.25 / camera.focal * z  # half the height of a 2:1 image, at this depth
    arch = rng.uniform(0.035, 0.085) * z / camera.focal
    up = -bottom + arch * (1 - 0.55 * angle**2) - z * np.tan(camera.pitch) + camera.height
    wide = 0.56 / camera.focal * z
    top = np.stack([wide * angle, up, np.full(13, z)], axis=1)
    low = camera.height - 6.0
    stage.add([*top, (wide, low, z), (-wide, low, z)], "hood")
    for drop, shade in ((0.3, 1.12), (0.55, 1.0), (0.8, 0.88)):  # it bends down towards us
        stage.add([*(top - rise(drop * arch)), (wide, low, z), (-wide, low, z)], "hood", shade=shade)
