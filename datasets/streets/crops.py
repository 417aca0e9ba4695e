"""Batches of crops that are a function of (seed, step)."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from datasets.base import to_signed
from datasets.label_space import Size
from datasets.streets.photos import Frames


class CropBatch(TypedDict):
    """A training batch without label maps."""

    jpg: NDArray[np.float32]  # (B, h, w, 3) in [-1, 1]
    txt: list[str]
    step: int


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
