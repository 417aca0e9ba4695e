"""Images that `generate.py` wrote, each with the frame whose map it was made from and its prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cldm.pictures import read_settings
from datasets.files import read_image
from datasets.label_space import Rgb
from datasets.streets.tree import count_cores

NAME = re.compile(r"(?P<hint>.+)_seed\d+\.png")  # contact sheets and partial files have other names


@dataclass(frozen=True)
class Samples:
    """Images of one size; those of one map have the same key."""

    images: Rgb  # (N, H, W, 3)
    keys: list[str]  # of the frame whose map it was
    prompts: list[str]  # "" where the file does not tell

    def __len__(self) -> int:
        """Number of images."""
        return len(self.keys)


def read_samples(folder: str | Path) -> Samples:
    """Every image <name of the hint>_seed<N>.png below a folder."""
    paths = sorted(p for p in Path(folder).rglob("*.png") if NAME.fullmatch(p.name) and p.name[0] != ".")
    if not paths:
        raise FileNotFoundError(
            f"{folder}: expected images <hint>_seed<N>.png, found none; make some:"
            f" python generate.py --ckpt FILE --hint MAPS --out {folder}"
        )
    with ThreadPoolExecutor(count_cores()) as pool:
        images = list(pool.map(read_image, paths))
        settings = [found or {} for found in pool.map(read_settings, paths)]
    check_sizes(paths, images)
    keys = [key_of(str(found.get("hint", path.name))) for path, found in zip(paths, settings, strict=True)]
    return Samples(np.stack(images), keys, [str(found.get("prompt", "")) for found in settings])


def check_sizes(paths: Sequence[Path], images: Sequence[Rgb]) -> None:
    """Refuse images of several sizes."""
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            (h, w), (H, W) = images[0].shape[:2], image.shape[:2]
            raise ValueError(
                f"expected images of one size, found {h}x{w} in {paths[0]} and {H}x{W} in {path}"
            )


def key_of(name: str) -> str:
    """The frame that a hint or an image of it belongs to: what stands before _gtFine, or before _seed."""
    found = NAME.fullmatch(name)
    stem = found["hint"] if found else Path(name).stem
    return stem.partition("_gtFine")[0]
