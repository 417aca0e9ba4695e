"""Render one frame: labels from the layout alone, then the picture under a domain and a condition."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from datasets.base import check_size
from datasets.label_space import Rgb, Size, resize_labels
from datasets.streets import CONDITIONS, DOMAINS, weather
from datasets.streets.caption import compose_caption
from datasets.streets.colours import Palette, colour_polygons, tables
from datasets.streets.geometry import Polygons, finish
from datasets.streets.layout import Scene, build_scene
from datasets.streets.materials import MATERIAL_INDEX
from datasets.streets.raster import SUPER, View, look, paint

SKY = 23


@dataclass(frozen=True)
class Frame:
    """One picture with its labels."""

    image: Rgb  # (H, W, 3)
    label_ids: NDArray[np.uint8]  # (H, W) Cityscapes label ids
    instance_ids: NDArray[np.uint16]  # (H, W) label id, or label id * 1000 + number
    caption: str


def render_frame(
    seed: int, size: Size = (128, 256), *, domain: str = "camera", condition: str = "clear"
) -> Frame:
    """The frame of a seed; the labels depend on the seed and the size only."""
    if domain not in DOMAINS or condition not in CONDITIONS:
        raise ValueError(
            f"expected a domain of {', '.join(DOMAINS)} and a condition of {', '.join(CONDITIONS)},"
            f" found {domain!r} and {condition!r}."
        )
    check_size(size)
    scene = build_scene(seed)
    polygons = finish(scene.stage)
    view = look(polygons, scene.street.camera, size)
    number = (DOMAINS.index(domain), CONDITIONS.index(condition))
    noise = np.random.default_rng([seed, 2, *number])
    sun = 1 if np.random.default_rng([seed, 3]).random() < 0.5 else -1
    palette = colour_polygons(polygons, domain, condition, sun, np.random.default_rng([seed, 1]))
    horizon = scene.street.camera.horizon(size) * SUPER
    canvas = weather.draw_sky((size[0] * SUPER, size[1] * SUPER), horizon, domain, condition, noise)
    paint(view, canvas, palette.colours)
    number_map = resize_labels(canvas[..., 3], size).astype(np.intp)
    label_ids, instance_ids = _labels(scene, polygons, number_map)
    shot = _shot(scene, view, palette, number_map, noise)
    image = cv2.resize(canvas, size[::-1], interpolation=cv2.INTER_AREA)[..., :3].astype(np.float32)
    image = _develop(image, shot, polygons, palette, domain, condition, sun)
    caption = compose_caption(scene.street.place.name, domain, condition, label_ids)
    return Frame(image.clip(0, 255).round().astype(np.uint8), label_ids, instance_ids, caption)


def _labels(
    scene: Scene, polygons: Polygons, number_map: NDArray[np.intp]
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Label and instance ids by the polygon that each pixel shows; 0 is the sky."""
    label = np.array(scene.stage.labels)[polygons.thing]
    number = np.array(scene.stage.instances)[polygons.thing]
    instance = np.where(number >= 0, label * 1000 + number, label)
    label, instance = np.concatenate([[SKY], label]), np.concatenate([[SKY], instance])
    return label.astype(np.uint8)[number_map], instance.astype(np.uint16)[number_map]


def _shot(
    scene: Scene, view: View, palette: Palette, number_map: NDArray[np.intp], noise: np.random.Generator
) -> weather.Shot:
    """What is known of each pixel."""
    material = np.concatenate([[0], view.polygons.material])[number_map]
    offset, slope = (np.concatenate([[0], v]).astype(np.float32)[number_map] for v in view.inverse_depth)
    columns = (np.arange(view.size[1], dtype=np.float32) + 0.5) * SUPER
    depth = 1 / np.maximum(offset + slope * columns, 1e-3)
    flat = scene.street.camera.ground_depth(view.size)[:, None].astype(np.float32)
    depth = np.where(tables().ground[material], np.minimum(flat, 400), depth)
    shine = np.concatenate([np.zeros((1, 3)), palette.shine]).astype(np.float32)[number_map]
    return weather.Shot(scene, view.size, material, depth.astype(np.float32), shine, noise)


def _develop(
    image: weather.Image,
    shot: weather.Shot,
    polygons: Polygons,
    palette: Palette,
    domain: str,
    condition: str,
    sun: int,
) -> weather.Image:
    """Surfaces, weather, light and lens, in this order."""
    if domain == "camera":
        weather.add_texture(image, shot)
    if condition == "snow":
        image = weather.add_snow(image, shot)
    weather.add_shadows(image, shot, condition, sun)
    if condition == "rain":
        image = weather.add_wet_ground(image, shot, _mirror(shot, polygons, palette))
    if condition == "night":
        image = weather.add_night_light(image, shot)
    image = weather.add_haze(image, shot, condition)
    if condition != "clear":
        image = weather.add_glow(image, shot, 1.0 if condition == "night" else 0.5)
    if condition == "rain":
        image = weather.add_streaks(image, shot)
    elif condition == "snow":
        image = weather.add_flakes(image, shot)
    return weather.expose(image, shot, condition) if domain == "camera" else image


def _mirror(shot: weather.Shot, polygons: Polygons, palette: Palette) -> weather.Image:
    """The scene upside down under the ground, at half the size: what a wet road shows."""
    height, width = shot.size
    view = look(polygons, shot.camera, (height // SUPER, width // SUPER), mirrored=True)
    view.seen[tables().ground[polygons.material] | (polygons.material == MATERIAL_INDEX["hood"])] = False
    canvas = np.empty((height, width, 4), np.uint16)
    canvas[..., :3] = np.array(weather.SKIES["rain"][1], np.uint16)
    paint(view, canvas, palette.colours + palette.shine)
    return canvas[..., :3].astype(np.float32)


@cache
def renderer_hash() -> str:
    """sha256 over the sources of the renderer.

    Its pixels would not do: rounding in numpy and OpenCV differs between processors and versions by a grey
    level, and the same renderer would go by two names. Any change of the code, though, changes this.
    """
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_text(encoding="utf-8").encode())
    return digest.hexdigest()


SOURCES = (
    "buildings.py",
    "caption.py",
    "colours.py",
    "figures.py",
    "furniture.py",
    "geometry.py",
    "layout.py",
    "materials.py",
    "plants.py",
    "raster.py",
    "render.py",
    "street.py",
    "vehicles.py",
    "weather.py",
)
