"""One pass over images, a block at a time: nothing is held but a block, nothing is computed twice.

What a network makes of a block is a file that is named by the hash of everything it depends on: of the
images, of the label maps, of the network and its settings. So a pass that was stopped goes on, real images
are measured once for all evaluations, and blocks that several processes made come together as those of one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from cldm.digests import sha256_of
from cldm.tensor_files import CheckpointError, read_tensors
from cldm.tensor_writing import write_tensors
from datasets.streets.tree import count_cores
from metrics.image_sets import Item, Reader

log = logging.getLogger(__name__)

BLOCK = 32  # images; part of no figure, since blocks merge exactly


@dataclass(frozen=True)
class Block:
    """Images of a block, in order; samples of one map are never parted."""

    items: Sequence[Item]
    images: NDArray[np.uint8]  # (n, H, W, 3)
    labels: NDArray[np.uint8] | None  # (n, H, W) train ids, where every item has a map

    def groups(self) -> list[slice]:
        """The images of each map."""
        keys = [item.key for item in self.items]
        starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(keys)], strict=True)]


class Work(Protocol):
    """What is computed of each block."""

    @property
    def name(self) -> str:
        """Of its folder in the cache."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides its result, but for the files."""
        ...

    def __call__(self, block: Block) -> dict[str, NDArray[Any]]:
        """Arrays by name; an empty one is not kept."""
        ...


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of the blocks."""

    index: int = 0
    count: int = 1


WHOLE = Shard()


class Digests:
    """SHA-256 of files, each read once in a run."""

    def __init__(self) -> None:
        self.known: dict[Path, str] = {}

    def of(self, path: Path) -> str:
        """Hash of one file."""
        if path not in self.known:
            self.known[path] = sha256_of(path)
        return self.known[path]

    def of_set(self, paths: Sequence[Path]) -> str:
        """Hash of files in their order, whatever they are called."""
        return hashlib.sha256("\n".join(self.of(path) for path in paths).encode()).hexdigest()


def split(items: Sequence[Item]) -> list[list[Item]]:
    """Items in blocks, with all samples of a map in one."""
    blocks: list[list[Item]] = []
    for item in items:
        if not blocks or (len(blocks[-1]) >= BLOCK and blocks[-1][-1].key != item.key):
            blocks.append([])
        blocks[-1].append(item)
    return blocks


def place_of(work: Work, items: Sequence[Item], digests: Digests, cache: Path) -> Path:
    """The file of one block."""
    rows = [
        [
            item.key,
            *(digests.of(p) for p in (item.picture.path, item.labels, item.predicted) if p is not None),
        ]
        for item in items
    ]
    text = json.dumps([work.identity, rows], sort_keys=True)
    return cache / work.name / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.safetensors"


def run_pass(
    items: Sequence[Item],
    works: Sequence[Work],
    reader: Reader,
    *,
    cache: Path,
    digests: Digests,
    what: str,
    shard: Shard = WHOLE,
) -> dict[str, list[Path]]:
    """Compute what is missing, with a progress bar; the blocks of each work in order.

    Blocks of other shards that nobody has computed yet are left out of the lists.
    """
    found: dict[str, list[Path]] = {work.name: [] for work in works}
    with ThreadPoolExecutor(count_cores()) as pool, tqdm(total=len(items), desc=what, unit="image") as bar:
        for number, some in enumerate(split(items)):
            places = {work.name: place_of(work, some, digests, cache) for work in works}
            waiting = [work for work in works if not is_whole(places[work.name])]
            if waiting and number % shard.count == shard.index:
                block = read_block(some, reader, pool)
                for work in waiting:
                    compute(work, block, places[work.name])
                waiting = []
            missing = {work.name for work in waiting}
            for name, place in places.items():
                if name not in missing:
                    found[name].append(place)
            bar.update(len(some))
    return found


def read_block(items: Sequence[Item], reader: Reader, pool: ThreadPoolExecutor) -> Block:
    """Images and maps of some items."""
    images = np.stack(list(pool.map(reader.image, items)))
    paths = [item.labels for item in items if item.labels is not None]
    labels = np.stack(list(pool.map(reader.labels, paths))) if len(paths) == len(items) else None
    return Block(items, images, labels)


def compute(work: Work, block: Block, place: Path) -> None:
    """Compute one block and write it whole or not at all."""
    arrays = {name: array for name, array in work(block).items() if array.size}
    place.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    # a block may have nothing to say, and a file without tensors is not written
    tensors["images"] = torch.tensor([len(block.items)])
    write_tensors(place, tensors, {"identity": json.dumps(work.identity, sort_keys=True)})


def is_whole(place: Path) -> bool:
    """Whether a block is there and can be read; a damaged one is computed again."""
    if not place.is_file():
        return False
    try:
        read_tensors(place)
    except CheckpointError as error:
        log.warning("%s; it is computed again", error)
        return False
    return True


def rows_of(places: Sequence[Path], name: str) -> Iterator[NDArray[Any]]:
    """An array of each block that has it, in order."""
    for place in places:
        tensors = read_tensors(place)
        if name in tensors:
            yield tensors[name].numpy()
