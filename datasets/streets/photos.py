"""Photos of rendered trees held in memory, with their captions: what the stages of the base train on.

The base learns from photos and captions alone, so no label map is read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from datasets import find_entry, missing_paths
from datasets.base import check_size, resize_image
from datasets.files import read_image
from datasets.label_space import Rgb, Size
from datasets.streets import CONDITIONS
from datasets.streets.dataset import StreetsDataset, captions_of_tree
from datasets.streets.tree import Plan, count_cores

LEAST_VAL = 100  # validation frames of a tree that is rendered here


class PhotosWanted(Protocol):
    """Which photos of which trees; a section of a stage's settings."""

    camera_root: str
    game_root: str
    camera_frames: int
    game_frames: int
    val_frames: int
    size: Sequence[int]


def trees_of(data: PhotosWanted) -> list[tuple[str, str, int]]:
    """Domain, root and number of training photos of each tree that is used."""
    rows = [
        ("camera", data.camera_root, data.camera_frames),
        ("game", data.game_root, data.game_frames),
    ]
    return [row for row in rows if row[2] > 0]


def make_missing_trees(data: PhotosWanted) -> None:
    """Render the trees that are not there yet."""
    for domain, root, count in trees_of(data):
        if missing_paths("streets", root):
            height, width = data.size
            plan = Plan(domain, size=(height, width), train=count, val=max(LEAST_VAL, data.val_frames))
            find_entry("streets").make(root, plan=plan)


def read_photos(data: PhotosWanted, split: str) -> Frames:
    """Photos of a split, tree after tree."""
    height, width = data.size
    return join_frames(
        [
            read_frames(root, split, (height, width), count if split == "train" else data.val_frames)
            for _, root, count in trees_of(data)
        ]
    )


def captions_by_condition(root: str | Path) -> list[str]:
    """The caption of one validation frame of each condition."""
    keys = sorted(StreetsDataset.find_photos(Path(root), "val"), key=frame_order)[: len(CONDITIONS)]
    captions = captions_of_tree(Path(root))
    return [captions[key] for key in keys]


@dataclass(frozen=True)
class Frames:
    """Photos of one size with their captions."""

    images: Rgb  # (N, H, W, 3)
    captions: list[str]
    keys: list[str]

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.keys)


def read_frames(root: str | Path, split: str, size: Size, count: int) -> Frames:
    """The first `count` photos of a split by their number, so that the conditions take turns."""
    photos = StreetsDataset.find_photos(Path(root), split)
    if not 0 < count <= len(photos):
        raise FileNotFoundError(
            f"{root}: expected {count} photos of {split}, found {len(photos)}; render more:"
            f" python tool_make_streets.py --out {root} --{split} {count}"
        )
    keys = sorted(photos, key=frame_order)[:count]
    captions = captions_of_tree(Path(root))
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
