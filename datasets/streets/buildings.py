"""Rows of buildings along the street: facades with windows, doors, shops and roofs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from datasets.streets.geometry import Face, Points, Stage, inset
from datasets.streets.street import Side, Street, pick

BUILDING = 11
STOREY = 3.1  # metres
SHOP_GLASS = 2.75  # metres to the upper edge of a shop window
DETAIL = 48.0  # metres ahead up to which frames, sills and doors are drawn


@dataclass(frozen=True)
class Shell:
    """The walls of a building before anything is put on them."""

    facade: Points  # along the street, corners from near below to near above
    end: Points  # towards the camera, corners from the street outwards
    sign: int  # the side of the street
    material: str
    floors: int
    ground: float  # height of the ground floor in metres
    is_near: bool  # near enough for frames, sills and doors

    @property
    def face(self) -> Face:
        """Where the facade looks."""
        return Face.EAST if self.sign < 0 else Face.WEST

    @property
    def height(self) -> float:
        """Metres to the eaves."""
        return float(self.facade[2, 1])

    @property
    def length(self) -> float:
        """Metres along the street."""
        return float(self.facade[1, 2] - self.facade[0, 2])

    def storeys(self, columns: int, width: float, tall: float) -> Points:
        """The grid of windows above the ground floor."""
        return _grid(columns, self.floors - 1, self.ground / self.height, 0.96, width, tall)


def build_building(
    stage: Stage, street: Street, side: Side, near: float, far: float, kind: str, rng: Generator
) -> None:
    """One building beside the street, between two depths."""
    stage.thing(BUILDING, far, 0)
    floors = int(rng.integers(street.place.floors[0], street.place.floors[1] + 1))
    ground = 3.9 if kind == "shop" else 3.3
    height = ground + (floors - 1) * STOREY + rng.uniform(0.3, 1.0)
    lateral = side.sign * (street.half + side.facade)
    depth = rng.uniform(8, 14)
    facade = _upright(street, lateral, near, far, height)
    end = _end_wall(street, lateral, side.sign * depth, near, height)
    material = _wall_material(kind, rng)
    shell = Shell(facade, end, side.sign, material, floors, ground, near < DETAIL)
    BUILDERS[kind](stage, shell, rng)


def _wall_material(kind: str, rng: Generator) -> str:
    if kind == "hall":
        return "metal hall" if rng.random() < 0.6 else "brick"
    if kind == "office":
        return "concrete" if rng.random() < 0.6 else "curtain"
    return pick(rng, ("facade", "facade", "facade", "brick", "concrete"))


def _upright(street: Street, lateral: float, near: float, far: float, height: float) -> Points:
    """A wall along the street, corners from near below to near above."""
    x0, x1 = float(street.x(lateral, near)), float(street.x(lateral, far))
    return np.array([(x0, 0, near), (x1, 0, far), (x1, height, far), (x0, height, near)])


def _end_wall(street: Street, lateral: float, depth: float, z: float, height: float) -> Points:
    """The wall that looks at the camera, corners from the street outwards."""
    x = float(street.x(lateral, z))
    return np.array([(x, 0, z), (x + depth, 0, z), (x + depth, height, z), (x, height, z)])


def _lay_walls(stage: Stage, shell: Shell) -> None:
    stage.add(shell.end, shell.material, face=Face.SOUTH)
    stage.add(shell.facade, shell.material, face=shell.face)


def _grid(columns: int, rows: int, bottom: float, top: float, width: float, height: float) -> Points:
    """Rectangles (k, 4) of a grid of windows; `width` and `height` are shares of a cell."""
    s = np.tile((np.arange(columns) + 0.5) / columns, rows)
    t = bottom + np.repeat((np.arange(rows) + 0.5) / rows, columns) * (top - bottom)
    half_s, half_t = width / columns / 2, height * (top - bottom) / rows / 2
    return np.stack([s - half_s, s + half_s, t - half_t, t + half_t], axis=1)


def _tints(stage: Stage, count: int, rng: Generator) -> np.ndarray:
    """A number for each window, so that each is lit or dark on its own."""
    return rng.integers(0, 1 << 16, count)


def _windows(
    stage: Stage, wall: Points, grid: Points, face: Face, rng: Generator, *, material: str, frames: bool
) -> None:
    if frames:
        grown = grid + np.array([-1, 1, -1, 1]) * (grid[0, 1] - grid[0, 0]) * np.array([0.16, 0.16, 0, 0])
        grown[:, 2] -= 0.1 * (grid[0, 3] - grid[0, 2])
        grown[:, 3] += 0.07 * (grid[0, 3] - grid[0, 2])
        stage.add(inset(wall, grown), "frame", face=face)
    stage.add(inset(wall, grid), material, face=face, tint=_tints(stage, len(grid), rng))
    if frames:  # the casement bar
        bars = grid.copy()
        middle, thick = (grid[:, 0] + grid[:, 1]) / 2, 0.06 * (grid[:, 1] - grid[:, 0])
        bars[:, 0], bars[:, 1] = middle - thick, middle + thick
        stage.add(inset(wall, bars), "frame", face=face, shade=0.9)


def _block(stage: Stage, shell: Shell, rng: Generator) -> None:
    """A town building: windows in rows over a ground floor with a door."""
    facade, face, height = shell.facade, shell.face, shell.height
    _lay_walls(stage, shell)
    columns = max(2, round(shell.length / rng.uniform(2.3, 3.2)))
    upper = shell.storeys(columns, rng.uniform(0.36, 0.52), 0.52)
    _windows(stage, facade, upper, face, rng, material="window", frames=shell.is_near and rng.random() < 0.7)
    lower = _grid(columns, 1, 0.02, shell.ground / height, 0.5, 0.5)
    if shell.is_near:
        door = int(rng.integers(columns))
        _windows(stage, facade, np.delete(lower, door, 0), face, rng, material="window", frames=False)
        s = (door + 0.5) / columns
        stage.add(inset(facade, (s - 0.2 / columns, s + 0.2 / columns, 0, 2.4 / height)), "door", face=face)
        _trimmings(stage, shell, columns, rng)
    side = shell.storeys(3, 0.34, 0.5)
    _windows(stage, shell.end, side, Face.SOUTH, rng, material="window", frames=False)
    _flat_or_mansard(stage, shell, rng)


def _trimmings(stage: Stage, shell: Shell, columns: int, rng: Generator) -> None:
    """A darker plinth, a band above the ground floor, balconies."""
    facade, face, height = shell.facade, shell.face, shell.height
    stage.add(inset(facade, (0, 1, 0, 0.7 / height)), "concrete", face=face, shade=0.75)
    if rng.random() < 0.6:
        t = (shell.ground - 0.15) / height
        stage.add(inset(facade, (0, 1, t, t + 0.3 / height)), "cornice", face=face)
    if rng.random() < 0.35:
        level = shell.ground + STOREY * np.arange(1, shell.floors - 1)
        cells = np.sort(rng.permutation(columns)[: max(1, columns // 3)])
        spans = [
            ((c + 0.05) / columns, (c + 0.95) / columns, (y - 0.1) / height, (y + 0.95) / height)
            for c in cells.tolist()
            for y in level.tolist()
        ]
        if spans:
            stage.add(inset(facade, spans), "frame", face=face, shade=0.88)


def _flat_or_mansard(stage: Stage, shell: Shell, rng: Generator) -> None:
    """A cornice, then nothing more or a steep roof with dormers."""
    facade, end, sign = shell.facade, shell.end, shell.sign
    face, height = shell.face, shell.height
    stage.add(inset(facade, (0, 1, 0.975, 1.0)), "cornice", face=face)
    stage.add(inset(end, (0, 1, 0.975, 1.0)), "cornice", face=Face.SOUTH)
    if rng.random() < 0.55:
        back, up = sign * 2.6, 2.8
        top = facade[[3, 2, 2, 3]] + np.array([(0, 0, 0), (0, 0, 0), (back, up, 0), (back, up, 0)])
        gable = end[[3, 2, 2, 3]] + np.array([(0, 0, 0), (0, 0, 0), (-back, up, 0), (back, up, 0)])
        stage.add(gable, "roof", face=Face.SOUTH, shade=0.85)
        stage.add(top, "roof", face=Face.UP)
        if height < 14:
            count = max(1, int(shell.length / 4))
            dormers = _grid(count, 1, 0.1, 0.8, 0.3, 0.9)
            stage.add(inset(top, dormers), "window", face=face, tint=_tints(stage, count, rng), shade=1.0)


def _shop(stage: Stage, shell: Shell, rng: Generator) -> None:
    """Shop windows below, flats above."""
    facade, face, height = shell.facade, shell.face, shell.height
    _lay_walls(stage, shell)
    columns = max(2, round(shell.length / rng.uniform(2.4, 3.0)))
    upper = shell.storeys(columns, rng.uniform(0.38, 0.55), 0.55)
    _windows(stage, facade, upper, face, rng, material="window", frames=shell.is_near and rng.random() < 0.7)
    shops = max(1, round(shell.length / rng.uniform(5, 8)))
    level = SHOP_GLASS / height
    glass = _grid(shops, 1, 0.25 / height, level, 0.86, 1.0)
    stage.add(inset(facade, (0, 1, 0, shell.ground / height * 0.93)), "concrete", face=face, shade=0.8)
    stage.add(inset(facade, glass), "shop", face=face, tint=_tints(stage, shops, rng))
    boards = _grid(shops, 1, level + 0.15 / height, (shell.ground - 0.25) / height, 0.92, 1.0)
    stage.add(inset(facade, boards), "board", face=face, tint=_tints(stage, shops, rng))
    if shell.is_near:
        doors = glass.copy()
        doors[:, 0], doors[:, 2] = glass[:, 0] * 0.25 + glass[:, 1] * 0.75, 0
        stage.add(inset(facade, doors), "door", face=face, tint=_tints(stage, shops, rng))
        for i in range(shops):
            if rng.random() < 0.4:
                _awning(stage, shell, i / shops, (i + 1) / shops, rng)
    side = shell.storeys(3, 0.34, 0.5)
    _windows(stage, shell.end, side, Face.SOUTH, rng, material="window", frames=False)
    _flat_or_mansard(stage, shell, rng)


def _awning(stage: Stage, shell: Shell, s0: float, s1: float, rng: Generator) -> None:
    margin, level, sign = 0.08 * (s1 - s0), SHOP_GLASS / shell.height, shell.sign
    top = inset(shell.facade, (s0 + margin, s1 - margin, level - 0.02, level + 0.03))[0]
    out = np.array([(-sign * 1.3, -0.55, 0)])
    quad = np.stack([top[0] + out[0], top[1] + out[0], top[2], top[3]])
    tint = int(rng.integers(1 << 16))
    stage.add(quad, "awning", face=Face.UP, tint=tint)
    stage.add(
        np.stack([quad[0] - (0, 0.25, 0), quad[1] - (0, 0.25, 0), quad[1], quad[0]]),
        "awning",
        face=shell.face,
        tint=tint,
        shade=0.8,
    )


def _office(stage: Stage, shell: Shell, rng: Generator) -> None:
    """Bands of glass."""
    facade, face, height = shell.facade, shell.face, shell.height
    _lay_walls(stage, shell)
    columns = max(3, round(shell.length / (2.0 if shell.is_near else 4.0)))
    width, tall = (0.9, 0.62) if rng.random() < 0.6 else (0.62, 0.8)
    for wall, looks, count in ((shell.end, Face.SOUTH, 5), (facade, face, columns)):
        grid = shell.storeys(count, width, tall)
        _windows(stage, wall, grid, looks, rng, material="office", frames=False)
    lobby = _grid(max(2, columns // 2), 1, 0.02, (shell.ground - 0.4) / height, 0.88, 1.0)
    stage.add(inset(facade, lobby), "shop", face=face, tint=_tints(stage, len(lobby), rng))
    stage.add(inset(facade, (0, 1, 0.975, 1.0)), "cornice", face=face)


def _house(stage: Stage, shell: Shell, rng: Generator) -> None:
    """A small house with a pitched roof, its ridge along the street or across it."""
    facade, face, height = shell.facade, shell.face, shell.height
    _lay_walls(stage, shell)
    columns = max(2, round(shell.length / 3.0))
    grid = _grid(columns, shell.floors, 0.08, 0.97, 0.42, 0.5)
    door = int(rng.integers(columns))
    _windows(stage, facade, np.delete(grid, door, 0), face, rng, material="window", frames=shell.is_near)
    s = (door + 0.5) / columns
    stage.add(inset(facade, (s - 0.17 / columns, s + 0.17 / columns, 0, 2.3 / height)), "door", face=face)
    side = _grid(2, shell.floors, 0.1, 0.95, 0.3, 0.48)
    _windows(stage, shell.end, side, Face.SOUTH, rng, material="window", frames=shell.is_near)
    _pitched_roof(stage, shell, along=rng.random() < 0.6, rise=rng.uniform(2.6, 4.4))


def _pitched_roof(stage: Stage, shell: Shell, *, along: bool, rise: float) -> None:
    facade, end, material = shell.facade, shell.end, shell.material
    middle = (end[1, 0] - end[0, 0]) / 2
    eaves = -0.08 * middle
    if along:
        ridge = np.array([(middle, rise, 0), (middle, rise, 0)])
        stage.add(np.stack([end[3], end[2], end[3] + ridge[0]]), material, face=Face.SOUTH)
        overhang = np.array([(eaves, -0.2, -0.3), (eaves, -0.2, 0.3)])
        stage.add(facade[[3, 2, 2, 3]] + np.concatenate([overhang, ridge]), "roof", face=Face.UP)
        return
    apex = (facade[3] + facade[2]) / 2 + np.array((0, rise, 0))
    back = apex + np.array((2 * middle, 0, 0))
    stage.add(np.stack([end[3] + (eaves, -0.2, 0), end[2] + (0, -0.2, 0), back, apex]), "roof", face=Face.UP)
    stage.add(np.stack([facade[3], facade[2], apex]), material, face=shell.face)


def _hall(stage: Stage, shell: Shell, rng: Generator) -> None:
    """A workshop or warehouse: gates, a band of windows, a board."""
    facade, face, height = shell.facade, shell.face, shell.height
    _lay_walls(stage, shell)
    gates = max(1, round(shell.length / rng.uniform(5, 9)))
    stage.add(
        inset(facade, _grid(gates, 1, 0, min(0.75, 3.8 / height), 0.55, 1.0)), "cornice", face=face, shade=0.8
    )
    band = _grid(max(2, round(shell.length / 3)), 1, 0.78, 0.9, 0.9, 1.0)
    _windows(stage, facade, band, face, rng, material="office", frames=False)
    if rng.random() < 0.6:
        stage.add(inset(shell.end, (0.1, 0.6, 0.72, 0.9)), "board", face=Face.SOUTH)
    stage.add(inset(facade, (0, 1, 0.96, 1.0)), "trim", face=face)
    stage.add(inset(shell.end, (0, 1, 0.96, 1.0)), "trim", face=Face.SOUTH)


BUILDERS = {"block": _block, "shop": _shop, "office": _office, "house": _house, "hall": _hall}


def build_backdrop(stage: Stage, street: Street, rng: Generator) -> None:
    """Buildings across the end of the street, so that no view ends in nothing."""
    x, z = float(street.x(-95, street.end)), street.end + 16
    while x < float(street.x(95, street.end)):
        width = rng.uniform(12, 26)
        floors = int(rng.integers(street.place.floors[0], street.place.floors[1] + 2))
        height = 3.4 + floors * STOREY
        stage.thing(BUILDING, 900 + z, 0)
        wall = np.array([(x, 0, z), (x + width, 0, z), (x + width, height, z), (x, height, z)])
        stage.add(wall, pick(rng, ("facade", "brick", "concrete", "facade")), face=Face.SOUTH)
        grid = _grid(int(width / 3), floors, 0.06, 0.95, 0.45, 0.5)
        _windows(stage, wall, grid, Face.SOUTH, rng, material="window", frames=False)
        if rng.random() < 0.6:
            rise = rng.uniform(2, 4)
            roof = wall[[3, 2, 2, 3]] + np.array([(0, 0, 0), (0, 0, 0), (-2, rise, 0), (2, rise, 0)])
            stage.add(roof, "roof", face=Face.UP)
        x += width + (rng.uniform(2, 9) if rng.random() < 0.3 else 0.0)
