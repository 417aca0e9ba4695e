"""Which part of a frame becomes a sample: the same for its photo, its label map and its hint.

A window is chosen in the pixels of the frame and cut before anything is resized, so a map is resized once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from datasets.label_space import Size

CROPS = ("none", "centre", "random")
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Window:
    """A part of a frame of `frame` pixels (H, W), and whether it is mirrored."""

    frame: Size
    top: int
    left: int
    height: int
    width: int
    mirrored: bool = False

    def cut(self, picture: NDArray[Scalar]) -> NDArray[Scalar]:
        """The part of an (H, W) or (H, W, C) picture of the frame, which may have another resolution."""
        (top, bottom), (left, right) = (
            _edges(start, length, whole, size)
            for start, length, whole, size in zip(
                (self.top, self.left), (self.height, self.width), self.frame, picture.shape[:2], strict=True
            )
        )
        part = picture[top:bottom, left:right]
        return part[:, ::-1] if self.mirrored else part


@dataclass(frozen=True)
class Framing:
    """How frames of any size become samples of one.

    size  (H, W) of a sample; None is that of its frame
    crop  "none" takes whole frames and changes their aspect ratio, as the predecessors do; "centre" and
          "random" take a window of the sample's aspect ratio, the largest that there is divided by a zoom
    zoom  lowest and highest, of random windows; their logarithm is uniform
    flip  share of samples that are mirrored
    """

    size: Size | None
    crop: str = "none"
    zoom: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.zoom
        if self.crop not in CROPS:
            raise ValueError(f"unknown crop {self.crop!r}: expected one of {', '.join(CROPS)}")
        if not 1 <= low <= high:
            raise ValueError(f"expected a zoom of [LOW,HIGH] with 1 <= LOW <= HIGH, found [{low},{high}]")
        if high > 1 and self.crop != "random":
            raise ValueError(f"expected crop 'random' for a zoom of [{low},{high}], found {self.crop!r}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"expected a share of mirrored samples in 0..1, found {self.flip}")

    @property
    def is_fixed(self) -> bool:
        """Whether a frame gives the same sample every time."""
        return self.crop != "random" and self.flip in (0, 1)

    def window(self, frame: Size, rng: np.random.Generator) -> Window:
        """The window of one sample of a frame (H, W); four draws, whatever the settings."""
        zoom, y, x, mirror = rng.random(4)
        return self.window_at(frame, (zoom, y, x), mirrored=bool(mirror < self.flip))

    def window_at(self, frame: Size, draws: Sequence[float], *, mirrored: bool) -> Window:
        """The window of a frame (H, W) for three draws in 0..1: of the zoom, the row and the column."""
        zoom, y, x = draws
        low, high = self.zoom
        height, width = self.largest(frame, zoom=low * (high / low) ** zoom)
        if self.crop != "random":
            y = x = 0.5
        top, left = (
            int(place * (limit - side + 1))
            for place, limit, side in zip((y, x), frame, (height, width), strict=True)
        )
        return Window(frame, top, left, height, width, mirrored)

    def moved(self, window: Window, pixel: Size, rng: np.random.Generator) -> Window:
        """A random window, moved to where it shows a pixel (row, column) of the frame; others stay."""
        if self.crop != "random":
            return window
        top, left = (
            int(rng.integers(max(0, at - side + 1), min(at, limit - side) + 1))
            for at, limit, side in zip(pixel, window.frame, (window.height, window.width), strict=True)
        )
        return replace(window, top=top, left=left)

    def largest(self, frame: Size, zoom: float = 1.0) -> Size:
        """(H, W) of a window: the whole frame, or the largest of the sample's aspect ratio over `zoom`."""
        if self.crop == "none":
            return frame
        shape = self.size or frame
        scale = min(whole / side for whole, side in zip(frame, shape, strict=True)) / zoom
        height, width = (max(1, min(w, round(s * scale))) for w, s in zip(frame, shape, strict=True))
        return height, width


@dataclass(frozen=True)
class Views:
    """The windows of each frame that a cache keeps, numbered from 0.

    crops  windows of a frame with random crops, drawn once for all by (seed, frame); others have one
    """

    framing: Framing
    crops: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise ValueError(f"expected 1 or more crops of a frame to keep, found {self.crops}")
        if self.crops > 1 and self.framing.crop != "random":
            raise ValueError(
                f"expected one crop of a frame to keep, as crop {self.framing.crop!r} has, found {self.crops}"
            )

    def __len__(self) -> int:
        """Views of a frame."""
        return self.crops * len(self.sides)

    @property
    def sides(self) -> tuple[bool, ...]:
        """Whether mirrored: the sides that samples show."""
        return tuple(
            side for side, shown in ((False, self.framing.flip < 1), (True, self.framing.flip > 0)) if shown
        )

    def window(self, frame: Size, index: int, view: int) -> Window:
        """The window of view number `view` of frame number `index`."""
        crop, side = divmod(view, len(self.sides))
        draws = np.random.default_rng([self.seed, 2, index, crop]).random(3)
        return self.framing.window_at(frame, draws.tolist(), mirrored=self.sides[side])

    def draw(self, rng: np.random.Generator) -> int:
        """The view of one sample; four draws as for `Framing.window`, so both mirror the same samples."""
        crop, _, _, mirror = rng.random(4)
        return int(crop * self.crops) * len(self.sides) + self.sides.index(bool(mirror < self.framing.flip))


def _edges(start: int, length: int, whole: int, size: int) -> tuple[int, int]:
    """First and last + 1 of `size` pixels that show start .. start + length of `whole`."""
    first = start * size // whole
    return first, max(first + 1, (start + length) * size // whole)
