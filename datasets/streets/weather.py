"""What light, weather and the camera do to a painted scene. All of it after the labels are taken."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from datasets.streets.colours import SNOW, tables
from datasets.streets.geometry import Camera
from datasets.streets.layout import Scene
from datasets.streets.materials import MATERIAL_INDEX

Image = NDArray[np.float32]  # (H, W, 3) in 0..255
Plane = NDArray[np.float32]  # (H, W)

SKIES = {  # colour above, colour at the horizon
    "clear": ((92, 144, 214), (196, 216, 236)),
    "rain": ((112, 118, 126), (158, 162, 168)),
    "fog": ((196, 199, 202), (196, 199, 202)),
    "snow": ((184, 190, 198), (208, 212, 218)),
    "night": ((10, 13, 28), (34, 36, 56)),
}
CANOPY = 4.0  # metres; taller things let light in below, buses and trams apart
AIR = {  # colour of the air, and the range of metres after which 1/e of a colour is left
    "clear": ((190, 206, 226), 600, 900),
    "rain": ((150, 155, 162), 110, 160),
    "fog": ((196, 199, 202), 16, 34),
    "snow": ((206, 211, 218), 80, 120),
    "night": ((24, 26, 42), 250, 400),
}


@dataclass(frozen=True)
class Shot:
    """A painted scene with what is known of each pixel."""

    scene: Scene
    size: tuple[int, int]
    material: NDArray[np.intp]  # (H, W)
    depth: Plane  # metres
    shine: Image  # light that the surface itself gives
    rng: Generator  # of noise; one for each seed, domain and condition

    @property
    def camera(self) -> Camera:
        """The scene's camera."""
        return self.scene.street.camera

    @property
    def pixel(self) -> float:
        """Pixels for one of a 128 pixel high image."""
        return self.size[0] / 128

    @property
    def ground(self) -> NDArray[np.bool_]:
        """Where the ground is seen."""
        return tables().ground[self.material]

    def lateral(self) -> Plane:
        """(H, W) metres to the right of the camera."""
        columns = np.arange(self.size[1], dtype=np.float32) + 0.5 - self.size[1] / 2
        return np.asarray(self.depth * columns / (self.camera.focal * self.size[1]), np.float32)


# -- sky ---------------------------------------------------------------------------------------------------


def draw_sky(
    size: tuple[int, int], horizon: float, domain: str, condition: str, rng: Generator
) -> NDArray[np.uint16]:
    """A canvas (H, W, 4) with the sky in its colours and 0 as the number of every pixel."""
    height, width = size[0] // 2, size[1] // 2  # no finer than the image, which is half of the canvas
    top, low = (np.array(colour, np.float32) for colour in SKIES[condition])
    if domain == "game" and condition == "clear":
        top, low = np.array((58, 128, 232), np.float32), np.array((186, 222, 250), np.float32)
    t = ((np.arange(height) + 0.5) / max(horizon / 2, 1)).clip(0, 1).astype(np.float32)[:, None, None] ** 1.3
    sky = np.broadcast_to((1 - t) * top + t * low, (height, width, 3))
    if condition != "fog":
        sky = _clouds(sky, (height, width), domain, condition, rng)
    canvas = np.zeros((*size, 4), np.uint16)
    canvas[..., :3] = np.repeat(np.repeat(sky.astype(np.uint16), 2, axis=0), 2, axis=1)
    return canvas


def _clouds(sky: Image, size: tuple[int, int], domain: str, condition: str, rng: Generator) -> Image:
    cover = rng.uniform(-0.5, 0.6)
    noise = _noise((64, 64), (4, 8, 16), rng)
    noise = cv2.resize(noise, (size[1] * 2, size[0]), interpolation=cv2.INTER_CUBIC)[:, : size[1]]
    edge = 12.0 if domain == "game" else 1.6
    amount = (edge * (noise - 0.45 + cover)).clip(0, 1)[..., None] * 0.85
    colour = {
        "clear": (246, 248, 252),
        "rain": (96, 100, 106),
        "snow": (172, 178, 186),
        "night": (30, 32, 48),
    }
    return sky * (1 - amount) + np.array(colour[condition], np.float32) * amount


def _noise(shape: tuple[int, int], cells: tuple[int, ...], rng: Generator) -> Plane:
    """Smooth noise of about unit spread, the sum of grids that are `cells` high."""
    total = np.zeros(shape, np.float32)
    for cell in cells:
        grid = rng.standard_normal((cell, max(2, cell * shape[1] // shape[0])), dtype=np.float32)
        total += cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_LINEAR)
    return total / np.float32(len(cells) ** 0.5)


# -- surfaces ----------------------------------------------------------------------------------------------


def add_texture(image: Image, shot: Shot) -> None:
    """Roughness of the surfaces: on the ground in perspective, elsewhere upright."""
    height = shot.size[0]
    grain = tables().grain[shot.material]
    fine = _noise(shot.size, (height // 2, height // 4, height // 10), shot.rng)
    tile = _noise((256, 256), (256, 128, 32, 12), shot.rng)
    across = (shot.lateral() * 16) % 256
    along = np.broadcast_to((shot.depth * 5) % 256, across.shape)
    flat = cv2.remap(
        tile, across.astype(np.float32), along.astype(np.float32), cv2.INTER_LINEAR, None, cv2.BORDER_WRAP
    )
    near = np.float32(1) / (1 + shot.depth / 25)  # far grains are smaller than a pixel
    rough = np.where(shot.ground, flat * near * 1.2, fine)
    image *= (1 + 0.085 * grain * rough)[..., None]


def add_shadows(image: Image, shot: Shot, condition: str, sun: int) -> None:
    """Darken the ground under things, and in sunshine beside them."""
    height, width = shot.size
    contact, cast = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
    shift = np.array((-sun * 0.9, 0, 0.25))
    for outline, tall in shot.scene.stage.shadows:
        middle = outline.mean(axis=0)
        _fill(contact, shot, middle + 1.12 * (outline - middle), 150 if tall < CANOPY else 45)
        if condition == "clear":
            moved = np.concatenate([outline, outline + shift * tall])
            hull = cv2.convexHull(moved[:, [0, 2]].astype(np.float32))[:, 0]
            ground = np.stack([hull[:, 0], np.zeros(len(hull)), hull[:, 1]], axis=1)
            _fill(cast, shot, ground, 130)
    if condition == "clear":
        _building_shadow(cast, shot, sun)
    soft = 1.4 * shot.pixel
    shade = cv2.GaussianBlur(contact, (0, 0), soft).astype(np.float32) / 255
    if condition == "clear":
        sharp = cv2.GaussianBlur(cast, (0, 0), 0.6 * shot.pixel).astype(np.float32) / 255
        shade = np.maximum(shade * 0.8, sharp)
    if condition == "night":
        shade *= 0.5
    image *= (1 - shade * shot.ground)[..., None]


def _fill(mask: NDArray[np.uint8], shot: Shot, outline: NDArray[np.float64], value: int) -> None:
    if outline[:, 2].min() < 1.5:
        return
    flat, _ = shot.camera.project(outline, shot.size)
    points = ((flat - 0.5) * 16).clip(-60000, 60000).round().astype(np.int32)
    cv2.fillConvexPoly(mask, points, value, 8, 4)


def _building_shadow(mask: NDArray[np.uint8], shot: Shot, sun: int) -> None:
    """The houses on the sunny side shade the ground before them."""
    street = shot.scene.street
    side = street.sides[(sun + 1) // 2]
    edge = side.sign * (street.half + side.facade)
    reach = street.place.floors[0] * 3.1 * 0.7
    if street.place.gap > 0.3:
        return
    z = np.array([2.5, 20.0, 60.0, street.end])
    outer, inner = street.x(edge, z), street.x(edge - side.sign * reach, z)
    for i in range(len(z) - 1):
        quad = [
            (outer[i], 0, z[i]),
            (inner[i], 0, z[i]),
            (inner[i + 1], 0, z[i + 1]),
            (outer[i + 1], 0, z[i + 1]),
        ]
        _fill(mask, shot, np.array(quad), 105)


# -- conditions --------------------------------------------------------------------------------------------


def add_haze(image: Image, shot: Shot, condition: str) -> Image:
    """Mix in the air's colour with the distance (Koschmieder's law); the sky has it already."""
    colour, nearest, farthest = AIR[condition]
    reach = np.float32(shot.rng.uniform(nearest, farthest))
    clear = np.exp(-shot.depth / reach)[..., None]
    if condition != "fog":  # there the sky is nothing but air
        clear = np.where(shot.material[..., None] == 0, np.float32(1), clear)
    return image * clear + np.array(colour, np.float32) * (1 - clear)


def add_snow(image: Image, shot: Shot) -> Image:
    """Snow on the ground, less of it where wheels run."""
    street = shot.scene.street
    cover = tables().snow[shot.material].astype(np.float32) * shot.ground
    tile = _noise((128, 128), (128, 32, 8), shot.rng)
    lateral = shot.lateral()
    across, along = (lateral * 9) % 128, (shot.depth * 4) % 128
    patches = cv2.remap(tile, across, along, cv2.INTER_LINEAR, None, cv2.BORDER_WRAP)
    lane = street.half / street.lanes
    middle = lateral - street.x(0, shot.depth).astype(np.float32)
    off_track = np.abs(np.abs(middle % lane - lane / 2) - 0.75)
    wheels = np.exp(-((off_track / 0.42) ** 2)) * (cover < 0.5) * (np.abs(middle) < street.half)
    cover = (cover * (1 + 0.2 * patches) - 0.3 * wheels + 0.12 * (cover > 0) * (cover < 0.5)).clip(0, 0.97)[
        ..., None
    ]
    return image * (1 - cover) + SNOW.astype(np.float32) * cover


def add_flakes(image: Image, shot: Shot) -> Image:
    """Falling snow, near flakes large and blurred."""
    height, width = shot.size
    layer = np.zeros((height, width), np.uint8)
    for count, radius, value in ((240, 0.38, 190), (90, 0.62, 215), (22, 1.05, 235)):
        where = shot.rng.random((count, 2)) * (width, height)
        for x, y in (where * 16).astype(int).tolist():
            cv2.circle(layer, (x, y), int(radius * 16 * shot.pixel), value, -1, cv2.LINE_AA, 4)
    amount = cv2.GaussianBlur(layer, (0, 0), 0.45 * shot.pixel).astype(np.float32)[..., None] / 255 * 0.85
    return image * (1 - amount) + 250 * amount


def add_wet_ground(image: Image, shot: Shot, mirror: Image) -> Image:
    """A dark ground that reflects what stands on it, the more the flatter it is seen."""
    flow = cv2.GaussianBlur(mirror, (0, 0), sigmaX=0.7 * shot.pixel, sigmaY=3.0 * shot.pixel)
    smooth = (tables().snow[shot.material] < 0.9).astype(np.float32) * shot.ground  # not the grass
    puddles = _noise(shot.size, (6, 12, 24), shot.rng)
    share = (0.26 + 0.012 * np.minimum(shot.depth, 22) + 0.09 * puddles).clip(0.1, 0.68) * smooth
    dark = image * np.where(shot.ground, 0.62, 0.86)[..., None].astype(np.float32)
    return dark * (1 - share[..., None]) + flow * share[..., None]


def add_streaks(image: Image, shot: Shot) -> Image:
    """Rain drawn out by the exposure."""
    height, width = shot.size
    layer = np.zeros((height, width), np.uint8)
    slant = shot.rng.uniform(-0.25, 0.25)
    where = shot.rng.random((170, 3))
    for u, v, w in where.tolist():
        length = (0.03 + 0.07 * w) * height
        start = (int(u * width * 16), int(v * height * 16))
        stop = (int((u * width + slant * length) * 16), int((v * height + length) * 16))
        cv2.line(layer, start, stop, int(70 + 90 * w), max(1, round(0.5 * shot.pixel)), cv2.LINE_AA, 4)
    amount = np.asarray(layer[..., None] * (0.5 / 255), np.float32)
    return image * (1 - amount) + np.float32(214) * amount


def add_night_light(image: Image, shot: Shot) -> Image:
    """Pools of the street lamps, and our own head lights on what is ahead."""
    pools = np.zeros(shot.size, np.uint8)
    for x, y, z in shot.scene.stage.lamps:
        for height, reach, value in ((0.0, 5.0, 70), (0.0, 3.0, 120), (y * 0.45, 2.6, 46)):
            centre, depth = shot.camera.project(np.array([(x, height, z)]), shot.size)
            scale = shot.camera.focal * shot.size[1] / float(depth[0])
            flat = 0.28 if height == 0 else 0.9
            axes = (int(reach * scale * 16), int(max(reach * scale * flat, 1) * 16))
            point = tuple(int(c * 16) for c in centre[0].clip(-3000, 3000))
            cv2.ellipse(pools, point, axes, 0, 0, 360, value, -1, 8, 4)
    pools_soft = cv2.GaussianBlur(pools, (0, 0), 4 * shot.pixel).astype(np.float32)[..., None] / 255
    rows = np.arange(shot.size[0], dtype=np.float32)[:, None]
    drop = (rows - shot.camera.horizon(shot.size)) / np.float32(shot.camera.focal * shot.size[1])
    rise = np.clip((-drop * shot.depth - 0.1) * 3, -20, 20)
    low = 1 / (1 + np.exp(rise))  # full below the height of the lamps
    beam = np.exp(-((shot.lateral() / (1.6 + 0.13 * shot.depth)) ** 2)) * np.exp(-shot.depth / 26) * low
    unlit = np.isin(shot.material, (0, MATERIAL_INDEX["hood"]))[..., None]  # the sky, and our own car
    light = pools_soft * np.array((5.4, 4.0, 1.9), np.float32) + beam[..., None] * np.array(
        (3.1, 2.75, 1.75), np.float32
    )
    dark = shot.shine.max(axis=2, keepdims=True) < 30
    return image * (1 + light * dark * ~unlit)


def add_glow(image: Image, shot: Shot, strength: float) -> Image:
    """Light that spreads around lamps."""
    wide = cv2.GaussianBlur(shot.shine, (0, 0), 4.5 * shot.pixel)
    tight = cv2.GaussianBlur(shot.shine, (0, 0), 1.3 * shot.pixel)
    return image + strength * (0.55 * wide + 0.4 * tight)


# -- the camera --------------------------------------------------------------------------------------------


def expose(image: Image, shot: Shot, condition: str) -> Image:
    """Lens and sensor: softness, vignette, cast, a flatter curve, grain."""
    rng, (height, width) = shot.rng, shot.size
    image = np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.25, 0.42) * shot.pixel**0.6), np.float32)
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)
    vignette = 1 - rng.uniform(0.1, 0.26) * (0.6 * x**2 + 0.4 * y**2)
    gradient = 1 + rng.uniform(-0.07, 0.07) * x
    cast = 1 + np.array(rng.uniform(-0.022, 0.022, 3), np.float32)
    if condition == "clear":
        cast = cast * np.array((1.25, 1.21, 1.16), np.float32)
    image = image * np.asarray((vignette * gradient)[..., None] * cast, np.float32)
    image = np.float32(4) + image if condition == "night" else np.float32(9) + image * np.float32(0.95)
    sigma = rng.uniform(1.4, 2.8) * (1.5 if condition == "night" else 1.0)
    grey = rng.standard_normal((height, width, 1), dtype=np.float32)
    colour = rng.standard_normal((height, width, 3), dtype=np.float32)
    return np.asarray(image + sigma * (grey + 0.5 * colour), np.float32)
