"""Write rendered frames as the tree of Cityscapes, in parallel, continuing where an earlier run stopped."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from datasets.base import CAPTIONS, check_size
from datasets.files import read_labels, write_bytes, write_text
from datasets.label_space import LabelSpace, Rgb, Size
from datasets.streets import CONDITIONS, RENDERER_VERSION
from datasets.streets.caption import compose_caption
from datasets.streets.render import Frame, render_frame, renderer_hash
from datasets.streets.street import lay_out_street

log = logging.getLogger(__name__)

CARD = "streets.json"
SPLITS = ("train", "val")
BLOCK = 1_000_000  # seeds of a split; train and val have a block each, so they never share a scene


@dataclass(frozen=True)
class Plan:
    """What to render."""

    domain: str = "camera"
    conditions: tuple[str, ...] = CONDITIONS  # frames take them in turn
    size: Size = (128, 256)
    train: int = 4000
    val: int = 500
    seed: int = 0


@dataclass(frozen=True)
class Item:
    """One frame of the tree."""

    split: str
    block: int
    number: int
    domain: str
    condition: str

    @property
    def seed(self) -> int:
        """The seed of its scene."""
        return self.block * BLOCK + self.number

    @property
    def city(self) -> str:
        """The folder that stands for a city."""
        return f"{self.domain}-{self.condition}"

    @property
    def stem(self) -> str:
        """City, sequence and frame, as Cityscapes names them."""
        return f"{self.city}_{self.block:06d}_{self.number:06d}"

    def paths(self, root: Path) -> dict[str, Path]:
        """Its files, the photo last."""
        labels = root / "gtFine" / self.split / self.city / f"{self.stem}_gtFine_"
        names = {kind: Path(f"{labels}{kind}.png") for kind in ("color", "labelIds", "instanceIds")}
        photo = root / "leftImg8bit" / self.split / self.city / f"{self.stem}_leftImg8bit.png"
        return {**names, "photo": photo}


def list_items(plan: Plan) -> list[Item]:
    """Every frame of a plan."""
    counts = {"train": plan.train, "val": plan.val}
    if max(counts.values()) > BLOCK:
        raise ValueError(
            f"expected at most {BLOCK} frames in a split, found {max(counts.values())}; render less."
        )
    return [
        Item(split, 2 * plan.seed + place, n, plan.domain, plan.conditions[n % len(plan.conditions)])
        for place, split in enumerate(SPLITS)
        for n in range(counts[split])
    ]


def make_tree(
    root: str | Path, plan: Plan | None = None, *, size: Size | None = None, workers: int = 0
) -> None:
    """Render what is missing of a plan under `root`, with a progress bar; frames that are there are kept.

    plan     by default `Plan()`
    size     instead of the plan's
    workers  processes; 0 takes one for each core
    """
    root, plan = Path(root), plan or Plan()
    size = check_size(size or plan.size)
    items = list_items(plan)
    _check_card(root, size)
    for folder in {path.parent for item in items for path in item.paths(root).values()}:
        folder.mkdir(parents=True, exist_ok=True)
    waiting = [item for item in items if not all(path.exists() for path in item.paths(root).values())]
    log.info("%s: %d frames to render, %d are there", root, len(waiting), len(items) - len(waiting))
    captions = dict(_render_all(waiting, root, size, workers or count_cores()))
    for item in items:
        if item.stem not in captions:
            captions[item.stem] = caption_on_disk(item, root)
    path = root / CAPTIONS
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_text(path, json.dumps(dict(sorted((known | captions).items())), indent=0) + "\n")


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_card(root: Path, size: Size) -> None:
    """Write which renderer and size the tree has; refuse to mix it with another."""
    card = {"renderer": RENDERER_VERSION, "renderer_hash": renderer_hash(), "size": list(size)}
    path = root / CARD
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != card:
            raise ValueError(
                f"{path}: expected frames of renderer {card['renderer']} ({renderer_hash()[:12]}) at"
                f" {size[0]}x{size[1]}, found {found}; choose another folder or remove this one."
            )
        return
    if any((root / folder).exists() for folder in ("leftImg8bit", "gtFine")):
        raise ValueError(
            f"{root} holds frames that were not rendered here; choose another folder, --out or data.root"
        )
    root.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(card) + "\n")


def _render_all(items: list[Item], root: Path, size: Size, workers: int) -> Iterator[tuple[str, str]]:
    """Stem and caption of each frame as it is written."""
    work = partial(write_item, root=root, size=size)
    bar = partial(tqdm, total=len(items), unit="frame", desc=f"rendering {root}", disable=not items)
    if workers == 1 or len(items) < 32:
        yield from bar(map(work, items))
        return
    # A forked child of a process with threads can hang, and torch may be loaded here.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_use_one_thread) as pool:
        yield from bar(pool.map(work, items, chunksize=8))


def _use_one_thread() -> None:
    cv2.setNumThreads(1)  # the processes are the threads


def write_item(item: Item, root: Path, size: Size) -> tuple[str, str]:
    """Render one frame and write its four files; returns its stem and its caption."""
    frame = render_frame(item.seed, size, domain=item.domain, condition=item.condition)
    for kind, path in item.paths(root).items():
        write_bytes(path, encode(frame, kind))
    return item.stem, frame.caption


def encode(frame: Frame, kind: str) -> bytes:
    """One file of a frame, as PNG."""
    pixels: dict[str, NDArray] = {
        "photo": frame.image[..., ::-1],
        "color": paint_label_ids(frame.label_ids)[..., [2, 1, 0, 3]],
        "labelIds": frame.label_ids,
        "instanceIds": frame.instance_ids,
    }
    done, content = cv2.imencode(".png", np.ascontiguousarray(pixels[kind]))
    if not done:
        raise OSError(f"OpenCV could not encode a PNG of {pixels[kind].dtype} {pixels[kind].shape}.")
    return content.tobytes()


def paint_label_ids(label_ids: NDArray[np.uint8]) -> Rgb:
    """(H, W, 4) red, green, blue and full alpha, in Cityscapes' colours of all ids, void ones too."""
    return _colour_table()[label_ids]


@cache
def _colour_table() -> Rgb:
    space = LabelSpace.load("cityscapes")
    table = np.full((256, 4), 255, np.uint8)
    for label, colour in zip(space.row_ids, space.row_colours, strict=True):
        table[label % 256, :3] = colour
    return table


def caption_on_disk(item: Item, root: Path) -> str:
    """The caption of a frame that an earlier run wrote."""
    place = lay_out_street(np.random.default_rng([item.seed, 0])).place
    labels = np.asarray(read_labels(item.paths(root)["labelIds"]), np.uint8)
    return compose_caption(place.name, item.domain, item.condition, labels)


def label_statistics(seeds: Iterable[int], size: Size) -> NDArray[np.int64]:
    """(256,) pixels of each label id over the scenes of `seeds`."""
    total = np.zeros(256, np.int64)
    for seed in seeds:
        total += np.bincount(render_frame(seed, size, domain="game").label_ids.ravel(), minlength=256)
    return total
