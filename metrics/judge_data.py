"""Photos and label maps of a Streets tree in memory, and crops that are a function of (seed, step)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from datasets.base import to_signed
from datasets.label_space import LabelSpace, Rgb, Size, resize_labels
from datasets.streets import CONDITIONS
from datasets.streets.caption import WEATHER
from datasets.streets.dataset import StreetsDataset
from datasets.streets.photos import read_frames
from datasets.streets.tree import count_cores
from metrics.segmentation import VOID

SMOOTH_WINDOW = 5  # pixels
LEAST_PIXELS = 20  # from which a class counts as shown in a frame


@dataclass(frozen=True)
class LabelledFrames:
    """Photos of one size with what the judge has to say of them."""

    images: Rgb  # (N, H, W, 3)
    labels: NDArray[np.uint8]  # (N, H, W) train ids, 255 = void
    conditions: NDArray[np.int64]  # (N,) number in CONDITIONS
    keys: list[str]

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.keys)


@dataclass(frozen=True)
class Augmentation:
    """Fields of `metrics.judge_stage.AugmentConfig`."""

    gain: float
    shift: float
    blur: float
    blur_sigma: float
    smooth: float = 0.0
    smooth_contrast: float = 50.0


def condition_of(key: str) -> int:
    """The condition of a frame, which its city names: camera-night_000000_000004."""
    name = key.partition("_")[0].partition("-")[2]
    if name not in CONDITIONS:
        raise ValueError(
            f"expected a frame of a Streets tree, such as camera-night_000000_000004, found {key}; render"
            " them: python tool_make_streets.py"
        )
    return CONDITIONS.index(name)


def condition_in(prompt: str) -> int | None:
    """The condition that a prompt names in the words of the captions; None if none or several are."""
    named = [i for i, condition in enumerate(CONDITIONS) if WEATHER[condition] in prompt]
    return named[0] if len(named) == 1 else None


def read_labelled(root: str | Path, split: str, size: Size, count: int | None = None) -> LabelledFrames:
    """All frames of a split, or the first `count` by their number, so that the conditions take turns."""
    if count is None:
        count = max(1, len(StreetsDataset.find_photos(Path(root), split)))
    frames = read_frames(root, split, size, count)
    maps = StreetsDataset.label_maps(root, split)
    if lost := [key for key in frames.keys if key not in maps]:
        raise FileNotFoundError(
            f"{root}: expected a label map for each photo of {split}, found none for {lost[0]}"
        )

    def read(key: str) -> NDArray[np.uint8]:
        return resize_labels(StreetsDataset.read_train_ids(maps[key]), size)

    with ThreadPoolExecutor(count_cores()) as pool:
        labels = np.stack(list(pool.map(read, frames.keys)))
    conditions = np.array([condition_of(key) for key in frames.keys])
    return LabelledFrames(frames.images, labels, conditions, frames.keys)


def class_weights(labels: NDArray[np.uint8], num_classes: int, power: float) -> NDArray[np.float64]:
    """(K,) share of each class to the power of -`power`, of mean 1 over the pixels; 0 where there is none."""
    count = np.bincount(labels.ravel(), minlength=256)[:num_classes].astype(np.float64)
    share = count / count.sum()
    weights = np.where(share > 0, np.maximum(share, 1e-12) ** -power, 0)
    return weights / (weights * share).sum()


def rarest_classes(
    labels: NDArray[np.uint8], num_classes: int, power: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of each frame the class that the fewest frames show, and its chance to be drawn (Hoyer et al. 2022).

    (N,) class, void in a frame that shows none; (N,) chances, by the share of frames to the power of -`power`
    """
    shown = np.stack([(labels == k).sum(axis=(1, 2)) >= LEAST_PIXELS for k in range(num_classes)], axis=1)
    share = shown.mean(axis=0).clip(min=1 / len(labels))
    among = np.where(shown, share, np.inf)
    rarest = np.where(shown.any(axis=1), among.argmin(axis=1), VOID)
    weights = np.minimum(among.min(axis=1), 1) ** -power
    return rarest, weights / weights.sum()


class LabelledCrops:
    """Batch number `step` of a training run, whatever was drawn before it: a resume needs the step alone."""

    def __init__(
        self,
        frames: LabelledFrames,
        steps: int,
        *,
        seed: int,
        batch: int,
        crop: Size,
        rare_power: float,
        rare_share: float = 0.0,
        augmentation: Augmentation,
    ) -> None:
        self.frames, self.steps, self.seed = frames, steps, seed
        self.batch, self.crop, self.augmentation = batch, crop, augmentation
        num_classes = LabelSpace.load(StreetsDataset.label_space).num_classes
        self.rare_share = rare_share
        self.rarest, self.chances = rarest_classes(frames.labels, num_classes, rare_power)

    def __len__(self) -> int:
        """Number of batches."""
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Frames drawn by their chances, half mirrored, light and focus changed."""
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.choice(len(self.frames), size=self.batch, p=self.chances)
        images = np.empty((self.batch, *self.crop, 3), np.uint8)
        labels = np.empty((self.batch, *self.crop), np.uint8)
        for row, i in enumerate(chosen):
            window = self.window(i, rng)
            image, ids = self.frames.images[i][window], self.frames.labels[i][window]
            side = slice(None, None, -1 if rng.random() < 0.5 else 1)
            images[row], labels[row] = change(image[:, side], self.augmentation, rng), ids[:, side]
        return {
            "jpg": to_signed(images),
            "label": labels.astype(np.int64),
            "condition": self.frames.conditions[chosen],
            "txt": [self.frames.keys[i] for i in chosen],
            "step": step,
        }

    def window(self, frame: int, rng: np.random.Generator) -> tuple[slice, slice]:
        """Rows and columns of a crop: anywhere, or around a pixel of the frame's rarest class."""
        labels = self.frames.labels[frame]
        room = [limit - side for limit, side in zip(labels.shape, self.crop, strict=True)]
        low, high = [0, 0], room
        if rng.random() < self.rare_share:
            places = np.flatnonzero(labels == self.rarest[frame])
            if len(places):
                at = np.unravel_index(rng.choice(places), labels.shape)
                low = [max(0, int(p) - side + 1) for p, side in zip(at, self.crop, strict=True)]
                high = [min(limit, int(p)) for p, limit in zip(at, room, strict=True)]
        y, x = (int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))
        return slice(y, y + self.crop[0]), slice(x, x + self.crop[1])


def change(image: Rgb, how: Augmentation, rng: np.random.Generator) -> Rgb:
    """Another exposure, white balance and focus of (H, W, 3)."""
    gain = 1 + how.gain * rng.uniform(-1, 1, 3)
    shift = how.shift * rng.uniform(-1, 1)
    changed = np.ascontiguousarray(image) * gain.astype(np.float32) + np.float32(shift)
    blurred, sigma = rng.random() < how.blur, rng.uniform(0.1, how.blur_sigma)
    if blurred:
        changed = cv2.GaussianBlur(changed, (0, 0), sigma)
    smoothed, contrast = rng.random() < how.smooth, rng.uniform(0, how.smooth_contrast)
    if smoothed:
        changed = cv2.bilateralFilter(changed, SMOOTH_WINDOW, contrast, SMOOTH_WINDOW / 2)
    return np.asarray(changed.clip(0, 255).round(), np.uint8)
