"""Trees, bushes and far woods."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from datasets.streets.geometry import Points, Stage, standing
from datasets.streets.street import Street, pick

VEGETATION = 21


def _blobs(x: float, y: float, z: float, offsets: Points, radii: Points, wobble: Points) -> Points:
    """Leafy discs (k, 11, 3); `wobble` (k, 11) changes their outline."""
    angle = np.arange(11) * (2 * np.pi / 11)
    reach = radii[:, None] * wobble
    right = x + offsets[:, :1] + reach * np.cos(angle)
    up = y + offsets[:, 1:] + reach * np.sin(angle)
    return np.stack([right, up, np.full_like(up, z)], axis=-1)


def _foliage(
    stage: Stage, x: float, y: float, z: float, wide: float, tall: float, rng: Generator, count: int = 16
) -> None:
    """A crown of `count` blobs: dark ones below and behind, bright ones above."""
    angle, out = rng.random(count) * 2 * np.pi, np.sqrt(rng.random(count)) * 0.72
    offsets = np.stack([np.cos(angle) * out * wide, np.sin(angle) * out * tall], axis=1)
    order = np.argsort(offsets[:, 1] + 0.25 * tall * rng.random(count))
    offsets = offsets[order]
    radii = (0.22 + 0.9 / count**0.5 * rng.uniform(0.35, 1.0, count)) * min(wide, tall)
    points = _blobs(x, y, z, offsets, radii, rng.uniform(0.8, 1.15, (count, 11)))
    height = offsets[:, 1] / tall
    shade = 0.86 + 0.28 * height + 0.1 * rng.random(count)
    under = points.copy()
    under[..., 1] -= 0.16 * radii[:, None]
    stage.add(under, "leaf", shade=shade * 0.72)
    split = int(count * 0.55)
    stage.add(points[:split], "leaf", shade=shade[:split])
    stage.add(points[split:], "leaf top", shade=shade[split:])


def build_tree(
    stage: Stage,
    x: float,
    z: float,
    rng: Generator,
    *,
    layer: int = 2,
    key: float | None = None,
    wild: bool = True,
) -> None:
    """A tree: round, slim, young, or a conifer where it is `wild`."""
    stage.thing(VEGETATION, z if key is None else key, layer)
    kind = pick(rng, ("round", "slim", "conifer", "young"), (0.6, 0.12, 0.14 if wild else 0.0, 0.16))
    if kind == "conifer":
        _conifer(stage, x, z, rng)
        return
    clear = {"round": rng.uniform(1.9, 3.2), "slim": rng.uniform(0.8, 1.6), "young": rng.uniform(1.7, 2.3)}[
        str(kind)
    ]
    wide = {"round": rng.uniform(1.9, 3.6), "slim": rng.uniform(0.9, 1.3), "young": rng.uniform(0.8, 1.4)}[
        str(kind)
    ]
    tall = {"round": wide * rng.uniform(0.85, 1.2), "slim": rng.uniform(2.6, 4.2), "young": wide}[kind]
    thick = 0.055 * (wide + tall) * (0.6 if kind == "young" else 0.75)
    top = clear + 0.7 * tall
    stage.shadow(_round(x, z, wide), clear + tall)
    stage.add(standing(x, z, [(-thick, 0), (thick, 0), (thick * 0.6, top), (-thick * 0.6, top)]), "trunk")
    limbs = [[(0, clear * 0.9), (sign * wide * 0.5, clear + tall * 0.7)] for sign in (-1, 1)]
    stage.lines(standing(x, z, limbs), thick * 0.8, "trunk")
    _foliage(stage, x, clear + tall * 0.85, z, wide, tall, rng, 11 if z > 45 else 20 if z > 18 else 34)


def _conifer(stage: Stage, x: float, z: float, rng: Generator) -> None:
    tall, wide = rng.uniform(5, 10), rng.uniform(1.3, 2.2)
    stage.shadow(_round(x, z, wide), tall)
    stage.add(standing(x, z, [(-0.14, 0), (0.14, 0), (0.14, 1.2), (-0.14, 1.2)]), "trunk")
    for i in range(5):
        y0, y1 = 0.7 + i * tall * 0.17, 0.7 + (i + 1.9) * tall * 0.17
        reach = wide * (1 - i * 0.18)
        tier = [(-reach, y0), (reach, y0), (0.12, y1), (-0.12, y1)]
        stage.add(standing(x, z, tier), "needle", shade=0.82 + 0.09 * i)


def _round(x: float, z: float, radius: float) -> Points:
    angle = np.arange(8) * (np.pi / 4)
    return np.stack([x + radius * np.cos(angle), np.zeros(8), z + radius * 0.8 * np.sin(angle)], axis=1)


def build_bush(stage: Stage, x: float, z: float, rng: Generator, key: float | None = None) -> None:
    """A bush."""
    stage.thing(VEGETATION, z if key is None else key, 1)
    wide = rng.uniform(0.5, 1.3)
    stage.shadow(_round(x, z, wide), 0.8)
    _foliage(stage, x, wide * 0.6, z, wide, wide * 0.7, rng, 8)


def build_woods(stage: Stage, street: Street, rng: Generator) -> None:
    """Far trees along the horizon."""
    stage.thing(VEGETATION, 1000 + street.end, 0)
    count = 26
    x = np.linspace(-170, 170, count) + rng.uniform(-4, 4, count) + float(street.x(0, street.end))
    tall = rng.uniform(4, 11, count)
    offsets = np.stack([x, tall * 0.55], axis=1)
    wobble = rng.uniform(0.8, 1.15, (count, 11))
    stage.add(
        _blobs(0, 0, street.end + 40, offsets, tall, wobble), "leaf", shade=rng.uniform(0.75, 0.95, count)
    )
