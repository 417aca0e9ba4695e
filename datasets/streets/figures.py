"""People on foot, on bicycles and on motorcycles, and the two-wheelers alone."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from datasets.streets.geometry import Points, Stage, disc, standing
from datasets.streets.street import pick
from datasets.streets.vehicles import Pose

PERSON, RIDER, MOTORCYCLE, BICYCLE, DYNAMIC = 24, 25, 32, 33, 5


def _feet(x: float, z: float, width: float) -> list[tuple[float, float, float]]:
    return [
        (x - width, 0, z - 0.12),
        (x + width, 0, z - 0.12),
        (x + width, 0, z + 0.12),
        (x - width, 0, z + 0.12),
    ]


def build_person(stage: Stage, x: float, z: float, rng: Generator, *, child: bool = False) -> None:
    """Someone who stands or walks, seen from any side."""
    tall = rng.uniform(1.58, 1.9) * (0.68 if child else 1.0)
    stage.thing(PERSON, z, 3, counted=True)
    stage.shadow(_feet(x, z, 0.2), tall)
    stride = rng.uniform(0.02, 0.3) * tall / 1.7
    lean, broad = rng.uniform(-0.03, 0.03), rng.uniform(0.2, 0.27) * tall / 1.7
    hip, neck = 0.5 * tall, 0.84 * tall
    swing = rng.uniform(-0.14, 0.14)
    for sign, shade in ((-1, 0.82), (1, 1.0)):
        foot = sign * stride
        leg = [(foot - 0.06, 0), (foot + 0.09, 0), (sign * 0.06 + 0.09, hip), (sign * 0.06 - 0.09, hip)]
        stage.add(standing(x, z, leg), "trousers", shade=shade)
    arms = [
        [
            (-broad, neck - 0.04),
            (-broad + 0.09, neck),
            (-broad + 0.06 + swing, hip),
            (-broad - 0.04 + swing, hip),
        ],
        [
            (broad - 0.09, neck),
            (broad, neck - 0.04),
            (broad + 0.04 - swing, hip),
            (broad - 0.06 - swing, hip),
        ],
    ]
    stage.add(standing(x, z, arms), "coat", shade=0.8)
    long_coat = 0.14 * tall if rng.random() < 0.3 else 0.0
    torso = [
        (-broad * 0.75, hip - 0.04 - long_coat),
        (broad * 0.75, hip - 0.04 - long_coat),
        (broad + lean, neck - 0.06),
        (broad * 0.6 + lean, neck),
        (-broad * 0.6 + lean, neck),
        (-broad + lean, neck - 0.06),
    ]
    stage.add(standing(x, z, torso), "coat")
    _build_head(stage, x + lean, z, tall, "hair", rng)
    if rng.random() < 0.3 and not child:
        side = broad * pick(rng, (-1.1, 1.1))
        bag = [
            (side - 0.12, hip - 0.25),
            (side + 0.12, hip - 0.25),
            (side + 0.12, hip + 0.08),
            (side - 0.12, hip + 0.08),
        ]
        stage.add(standing(x, z, bag), "bag")


def _build_head(stage: Stage, x: float, z: float, tall: float, cover: str, rng: Generator) -> None:
    radius = 0.072 * tall
    y = tall - radius * 1.15
    turned = rng.random() < 0.45  # the back of the head
    stage.add(disc(x, y, z, radius, 8, 1.2), cover if turned else "skin")
    cap = [(-radius, y + 0.1 * radius), (radius, y + 0.1 * radius), (0.7 * radius, y + 1.25 * radius)]
    stage.add(standing(x, z, [*cap, (-0.7 * radius, y + 1.25 * radius)]), cover)


def build_bicycle(stage: Stage, pose: Pose, rng: Generator, *, ridden: bool = False) -> None:
    """A bicycle, with someone on it or not."""
    stage.thing(BICYCLE, pose.z, 3, counted=True)
    stage.shadow(pose.place([(-0.9, -0.2, 0), (0.9, -0.2, 0), (0.9, 0.2, 0), (-0.9, 0.2, 0)]), 1.0)
    for along in (-0.52, 0.52):
        _build_wheel(stage, pose, along, 0.34, 0.05)
    frame = [
        ((-0.52, 0, 0.34), (-0.05, 0, 0.3)),
        ((-0.05, 0, 0.3), (-0.2, 0, 0.9)),
        ((-0.2, 0, 0.82), (0.38, 0, 0.84)),
        ((-0.05, 0, 0.3), (0.36, 0, 0.8)),
        ((0.52, 0, 0.34), (0.36, 0, 1.0)),
        ((0.36, -0.27, 1.02), (0.36, 0.27, 1.02)),
        ((-0.32, 0, 0.93), (-0.08, 0, 0.93)),
    ]
    stage.lines(pose.place(frame), 0.06, "paint")
    if ridden:
        _build_rider(stage, pose, rng, seat=0.95, reach=0.36, bars=1.05)


def _build_wheel(stage: Stage, pose: Pose, along: float, radius: float, width: float) -> None:
    angle = np.arange(10) * (np.pi / 5)
    circle = np.stack([np.cos(angle), np.zeros(10), np.sin(angle)], axis=1)
    hub = np.array((along, 0, radius))
    stage.add(pose.place(circle * radius + hub), "tyre")
    stage.add(pose.place(circle * radius * 0.72 + hub), "spokes")
    stage.lines(pose.place([(along, 0, 0), (along, 0, 2 * radius)]), width, "tyre")


def build_motorcycle(stage: Stage, pose: Pose, rng: Generator, *, ridden: bool = False) -> None:
    """A motorcycle or a scooter, with someone on it or not."""
    stage.thing(MOTORCYCLE, pose.z, 3, counted=True)
    stage.shadow(pose.place([(-1, -0.35, 0), (1, -0.35, 0), (1, 0.35, 0), (-1, 0.35, 0)]), 1.1)
    for along in (-0.68, 0.7):
        _build_wheel(stage, pose, along, 0.31, 0.15)
    side = [
        [(-0.85, 0, 0.62), (-0.2, 0, 0.4), (0.35, 0, 0.45), (0.45, 0, 0.9), (-0.1, 0, 0.82), (-0.8, 0, 0.86)],
        [(-0.35, 0, 0.22), (0.3, 0, 0.22), (0.4, 0, 0.5), (-0.3, 0, 0.5), (-0.3, 0, 0.4), (-0.35, 0, 0.3)],
    ]
    stage.add(pose.place(side[1]), "trim")
    stage.add(pose.place(side[0]), "paint")
    across = [(0, -0.2, 0.4), (0, 0.2, 0.4), (0, 0.17, 0.9), (0, -0.17, 0.9)]
    stage.add(pose.place(across), "paint", shade=0.9)
    bars = [
        ((0.45, -0.36, 1.02), (0.45, 0.36, 1.02)),
        ((0.7, 0, 0.31), (0.42, 0, 1.02)),
        ((-0.85, 0, 0.84), (-0.2, 0, 0.86)),
    ]
    stage.lines(pose.place(bars), 0.1, "trim")
    towards = np.cos(pose.heading) < -0.2
    lamp = pose.place((0.6, 0, 0.85) if towards else (-0.88, 0, 0.72))
    stage.add(
        disc(float(lamp[0]), float(lamp[1]), float(lamp[2]), 0.1, 8),
        "head light" if towards else "tail light",
    )
    if ridden:
        _build_rider(stage, pose, rng, seat=0.85, reach=0.42, bars=1.02)


def _build_rider(stage: Stage, pose: Pose, rng: Generator, *, seat: float, reach: float, bars: float) -> None:
    """Someone in the saddle: bent forward, hands on the bars."""
    stage.thing(RIDER, pose.z - 0.05, 3, counted=True)
    tall = rng.uniform(0.78, 0.92)  # from saddle to crown
    lean = rng.uniform(0.1, 0.3)
    hip, neck = np.array((-0.2, 0, seat)), np.array((-0.2 + lean, 0, seat + 0.62 * tall))
    knee, foot = np.array((0.12, 0, seat * 0.62)), np.array((-0.04, 0, 0.22))
    for sign, shade in ((-1, 0.8), (1, 1.0)):
        out, up = np.array((0, 0.1 * sign, 0)), np.array((0, 0, -0.1 * sign))
        joints = [hip + out, knee + 1.3 * out + up, foot + out]
        legs = pose.place([(joints[0], joints[1]), (joints[1], joints[2])])
        stage.lines(legs, 0.15, "trousers", shade=shade)
    _build_trunk(stage, pose.place(hip), pose.place(neck))
    hands = [(neck + np.array((0, 0.18 * s, -0.08)), np.array((reach, 0.24 * s, bars))) for s in (-1, 1)]
    stage.lines(pose.place(hands), 0.1, "coat", shade=0.85)
    head = pose.place(neck + np.array((0.05, 0, 0)))
    cover = "helmet" if rng.random() < 0.7 else "hair"
    _build_head(stage, float(head[0]), float(head[2]), float(head[1]) + 0.26, cover, rng)


def _build_trunk(stage: Stage, hip: Points, neck: Points) -> None:
    """The upper body, as wide from the side as from behind."""
    outline = [
        (hip[0] - 0.16, hip[1] - 0.05, hip[2]),
        (hip[0] + 0.16, hip[1] - 0.05, hip[2]),
        (neck[0] + 0.21, neck[1] - 0.08, neck[2]),
        (neck[0] + 0.1, neck[1] + 0.03, neck[2]),
        (neck[0] - 0.1, neck[1] + 0.03, neck[2]),
        (neck[0] - 0.21, neck[1] - 0.08, neck[2]),
    ]
    stage.add(outline, "coat")


def build_dog_or_pram(stage: Stage, x: float, z: float, rng: Generator) -> None:
    """Something that moves and is none of the classes."""
    stage.thing(DYNAMIC, z, 3)
    stage.shadow(_feet(x, z, 0.35), 0.6)
    if rng.random() < 0.5:
        stage.add(standing(x, z, [(-0.35, 0.32), (0.3, 0.32), (0.3, 0.56), (-0.35, 0.56)]), "hair")
        stage.lines(standing(x, z, [[(-0.28, 0), (-0.28, 0.35)], [(0.25, 0), (0.25, 0.35)]]), 0.09, "hair")
        stage.add(disc(x + 0.4, 0.62, z, 0.14, 7), "hair")
        return
    stage.add(standing(x, z, [(-0.35, 0.35), (0.35, 0.35), (0.45, 0.8), (-0.4, 0.95)]), "bag")
    stage.lines(standing(x, z, [[(0.4, 0.7), (0.7, 1.0)]]), 0.06, "trim")
    for dx in (-0.28, 0.28):
        stage.add(disc(x + dx, 0.15, z, 0.15, 8), "tyre")
