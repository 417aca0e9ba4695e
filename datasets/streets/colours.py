"""The colour of each polygon: what its material is made of, which way it looks, the weather, the domain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from datasets.streets.geometry import Face, Polygons
from datasets.streets.materials import MATERIALS

Colours = NDArray[np.float64]

TINTS = 4096  # random tints of a scene
SNOW = np.array((236.0, 240.0, 246.0))
AMBIENT = np.array((0.235, 0.26, 0.36))  # of the day's light at night
_LAMPS_ON = {"clear": 0.0, "rain": 0.4, "fog": 0.45, "snow": 0.35, "night": 1.0}
_TRAFFIC_LAMPS = ("tail light", "head light", "red lens", "amber lens", "green lens", "destination")


@dataclass(frozen=True)
class Tables:
    """The materials as arrays, by number."""

    colours: Colours  # (M, most, 3)
    count: NDArray[np.intp]
    vary: NDArray[np.float64]
    grain: NDArray[np.float32]
    glow: Colours
    lit: NDArray[np.float64]
    ground: NDArray[np.bool_]
    snow: NDArray[np.float64]
    traffic_lamp: NDArray[np.bool_]
    facing_up: NDArray[np.float64]  # share of snow on what faces up


@cache
def tables() -> Tables:
    """The material table, laid out once."""
    most = max(len(material.colours) for material in MATERIALS)
    return Tables(
        colours=np.array([(m.colours * most)[:most] for m in MATERIALS], np.float64),
        count=np.array([len(m.colours) for m in MATERIALS]),
        vary=np.array([m.vary for m in MATERIALS]),
        grain=np.array([m.grain for m in MATERIALS], np.float32),
        glow=np.array([m.glow or (0, 0, 0) for m in MATERIALS], np.float64),
        lit=np.array([m.lit if m.glow else 0.0 for m in MATERIALS]),
        ground=np.array([m.ground for m in MATERIALS]),
        snow=np.array([m.snow for m in MATERIALS]),
        traffic_lamp=np.array([m.name in _TRAFFIC_LAMPS for m in MATERIALS]),
        facing_up=np.array([0.0 if m.ground or m.name == "hood" else 0.62 for m in MATERIALS]),
    )


@dataclass(frozen=True)
class Palette:
    """Colours (P, 3) of the polygons as painted, and what they shine (P, 3)."""

    colours: Colours
    shine: Colours


def colour_polygons(polygons: Polygons, domain: str, condition: str, sun: int, rng: Generator) -> Palette:
    """Choose and light the colours; `rng` is the scene's own, so a car keeps its colour in any weather.

    sun  -1 where it shines from the left, 1 from the right
    """
    table, material = tables(), polygons.material
    random = rng.random((TINTS, 6))[polygons.tint * 7919 % TINTS]
    choice = (random[:, 0] * table.count[material]).astype(np.intp)
    colours = table.colours[material, choice]
    spread = table.vary[material, None]
    colours = colours + spread * (2 * random[:, 1:2] - 1) + 0.35 * spread * (2 * random[:, 2:5] - 1)
    colours = colours * (polygons.shade * _light(polygons.face, condition, sun, domain))[:, None]
    colours = _domain_colours(colours, domain)
    if condition == "snow":
        white = np.where(polygons.face == Face.UP, table.facing_up[material], 0)
        white = np.maximum(white, table.snow[material] * ~table.ground[material])[:, None]
        colours = colours * (1 - white) + SNOW * np.minimum(polygons.shade[:, None], 1.0) * white
    lit = random[:, 5] < table.lit[material]
    shine = table.glow[material] * lit[:, None] * (0.55 + 0.45 * random[:, 1:2])
    return _switch_on(colours, shine, condition, table.traffic_lamp[material])


def _light(face: NDArray[np.intp], condition: str, sun: int, domain: str) -> NDArray[np.float64]:
    """How much light a surface takes, by where it looks."""
    light = np.array([1.0, 1.04, 0.97, 0.95, 0.93])
    if condition == "clear":
        light = np.array([1.0, 1.12, 1.14, 0.74, 0.9] if sun > 0 else [1.0, 1.12, 0.74, 1.14, 0.9])
    if domain == "game":
        light = 1 + 1.25 * (light - 1)
    return light[face]


def _domain_colours(colours: Colours, domain: str) -> Colours:
    """A game is more colourful than a camera."""
    grey = colours @ np.array((0.299, 0.587, 0.114))
    strength, gain = (1.5, 1.12) if domain == "game" else (0.86, 0.96)
    return (grey[:, None] + strength * (colours - grey[:, None])) * gain


def _switch_on(colours: Colours, shine: Colours, condition: str, traffic: NDArray[np.bool_]) -> Palette:
    """At night all lamps are on; in bad weather those of the traffic are."""
    level = _LAMPS_ON[condition]
    if condition == "night":
        dark = colours * AMBIENT
        return Palette(np.maximum(dark, shine), shine)
    shine = shine * (traffic * level)[:, None]
    return Palette(np.maximum(colours, shine * 1.6), shine)
