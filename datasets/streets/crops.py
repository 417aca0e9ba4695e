"""Photos of the rendered tree held in memory, and batches of crops that are a function of (seed, step).

The base model is trained on photos and captions alone, so no label map is read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from datasets.base import check_size, resize_image, to_signed
from datasets.label_space import Rgb, Size, read_image
from datasets.streets.dataset import StreetsDataset, read_captions
from datasets.streets.tree import count_cores


@dataclass(frozen=True)
class Frames:
    """Photos of one size with their captions."""

    images: Rgb  # (N, H, W, 3)
    captions: list[str]
    keys: list[str]

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.keys)


class CropBatch(TypedDict):
    """A training batch without label maps."""

    jpg: NDArray[np.float32]  # (B, h, w, 3) in [-1, 1]
    txt: list[str]
    step: int


def read_frames(root: str | Path, split: str, size: Size, count: int) -> Frames:
    """The first `count` photos of a split by their number, so that the conditions take turns."""
    photos = StreetsDataset.find_photos(Path(root), split)
    if not 0 < count <= len(photos):
        raise FileNotFoundError(
            f"{root}: expected {count} photos of {split}, found {len(photos)}; render more:"
            f" python tool_make_streets.py --out {root} --{split} {count}"
        )
    keys = sorted(photos, key=frame_order)[:count]
    captions = read_captions(Path(root))
    images = np.empty((count, *check_size(size), 3), np.uint8)

    def fill(i: int) -> None:
        images[i] = resize_image(read_image(photos[keys[i]]), size)

    with ThreadPoolExecutor(count_cores()) as pool:
        list(pool.map(fill, range(count)))
    return Frames(images, [captions[key] for key in keys], keys)


def frame_order(key: str) -> tuple[str, ...]:
    """Sequence and frame before the city, which names domain and condition."""
    city, *numbers = key.split("_")
    return (*numbers, city)


def join_frames(parts: Sequence[Frames]) -> Frames:
    """Frames of several trees as one set."""
    return Frames(
        np.concatenate([part.images for part in parts]),
        [caption for part in parts for caption in part.captions],
        [key for part in parts for key in part.keys],
    )


class Crops:
    """Batch number `step` of a training run, whatever was drawn before it: a resume needs the step alone.

    Crops are small at first, which shows more scenes for the same cost; the last share of the steps takes
    larger ones, because group norms and attention see other statistics in a whole frame than in a corner.

    batch       crops in a batch of small ones; a batch of larger ones has as many pixels
    last_share  of the steps, 0 to 1
    """

    def __init__(
        self,
        frames: Frames,
        steps: int,
        *,
        seed: int,
        batch: int,
        crop: Size,
        last_crop: Size,
        last_share: float,
    ) -> None:
        whole = frames.images.shape[1:3]
        for size in (crop, last_crop):
            if any(side > limit for side, limit in zip(size, whole, strict=True)):
                raise ValueError(
                    f"expected crops of at most {whole[0]}x{whole[1]}, found {size[0]}x{size[1]}"
                )
        self.frames, self.steps, self.seed = frames, steps, seed
        self.batch, self.crop, self.last_crop = batch, crop, last_crop
        self.first_large = steps - round(steps * last_share)

    def __len__(self) -> int:
        """Number of batches."""
        return self.steps

    def __getitem__(self, step: int) -> CropBatch:
        """Frames drawn with replacement, places uniform, half of the crops mirrored."""
        rng = np.random.default_rng([self.seed, step])
        (height, width), count = self.shape_at(step)
        chosen = rng.integers(len(self.frames), size=count)
        crops = np.empty((count, height, width, 3), np.uint8)
        for row, i in zip(crops, chosen, strict=True):
            image = self.frames.images[i]
            y, x = (int(rng.integers(a - b + 1)) for a, b in zip(image.shape, (height, width), strict=False))
            cut = image[y : y + height, x : x + width]
            row[:] = cut[:, ::-1] if rng.random() < 0.5 else cut
        return {"jpg": to_signed(crops), "txt": [self.frames.captions[i] for i in chosen], "step": step}

    def shape_at(self, step: int) -> tuple[Size, int]:
        """Size and number of the crops of a step."""
        if step < self.first_large:
            return self.crop, self.batch
        ratio = (self.last_crop[0] * self.last_crop[1]) / (self.crop[0] * self.crop[1])
        return self.last_crop, max(1, round(self.batch / ratio))
