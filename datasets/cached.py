"""A data set whose photos were encoded before: what `cldm.cache` writes from, and the reader of it.

A row is one view of one frame (`datasets.framing.Views`); rows are in the order of frames, then of views.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from tqdm import tqdm

from datasets.base import FramedDataset, View, to_signed
from datasets.files import write_text
from datasets.framing import Views
from datasets.prompts import CLASSES

SAMPLES, FILES = "samples", "files.json"  # in the folder of a cache
Digests = dict[str, list[Any]]  # by path: bytes, time of the last change in ns, digest of the content


class ViewRows:
    """Every row of a cache, before it is encoded; for a torch DataLoader with `collate_rows`."""

    def __init__(self, source: FramedDataset, views: Views) -> None:
        self.source, self.views = source, views

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.source) * len(self.views)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """`jpg` (H, W, 3) in [-1, 1] and, as uint8, `ids` (H, W) or `control` (H, W, 3) or both."""
        index, number = divmod(row, len(self.views))
        try:
            photo, view = self.source.view(index, lambda frame, _: self.views.window(frame, index, number))
        except (ValueError, OSError) as error:
            return {"fault": str(error)}  # an exception of a loader process would arrive as its traceback
        stored = {"ids": view.ids, "control": view.control}
        return {"jpg": to_signed(photo), **{name: x for name, x in stored.items() if x is not None}}


def collate_rows(rows: list[dict[str, Any]]) -> dict[str, NDArray]:
    """Rows as one batch.

    Raises
        ValueError  a frame that cannot be read
    """
    if faults := [row["fault"] for row in rows if "fault" in row]:
        raise ValueError(faults[0])
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class CachedDataset:
    """The samples of `source` with `moments` (2C, h, w) of their photo in its place; see `cldm.cache`.

    Shards are mapped, so a sample costs the reading of its own bytes.
    """

    def __init__(self, source: FramedDataset, views: Views, folder: str | Path) -> None:
        self.source, self.views = source, views
        self.shards = sorted((Path(folder) / SAMPLES).glob("*.safetensors"))
        self.rows_of_shard = rows_in(self.shards[0])

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One frame as a sample, the same every time."""
        return self.sample(index, np.random.default_rng(index))

    def sample(self, index: int, rng: np.random.Generator, shown: int | None = None) -> dict[str, Any]:
        """One frame as a sample, its view drawn by `rng`; one that shows train id `shown`, if any."""
        number = self.views.draw(rng)
        if shown is not None and self.views.crops > 1:
            number = self.draw_showing(shown, index, number, rng)
        row = index * len(self.views) + number
        moments = self.read("moments", row).astype(np.float32)
        return {"moments": moments, **self.source.conditions(self.view(row), rng)}

    def view(self, row: int) -> View:
        """What the sample of a row shows."""
        names = mapped(self.shards[row // self.rows_of_shard]).keys()
        ids, control = (self.read(name, row) if name in names else None for name in ("ids", "control"))
        return View(self.source.key_of(row // len(self.views)), ids, control)

    def read(self, name: str, row: int) -> NDArray:
        """One of the arrays of a row."""
        shard, place = divmod(row, self.rows_of_shard)
        return mapped(self.shards[shard]).get_slice(name)[place]

    def draw_showing(self, shown: int, index: int, number: int, rng: np.random.Generator) -> int:
        """A view in which a train id is seen, on the side of view `number`; that one if there is none."""
        sides, first = len(self.views.sides), index * len(self.views)
        space, side = self.source.space, number % sides
        assert space is not None
        found = [
            other
            for other in range(side, len(self.views), sides)
            if (space.to_train_ids(self.read("ids", first + other), self.source.key_of(index)) == shown).any()
        ]
        return int(rng.choice(found)) if found else number

    def texts(self) -> set[str]:
        """Every prompt that a sample can have, none among them."""
        by_view = CLASSES in self.source.prompts.names
        step = 1 if by_view else len(self.views)
        rows = range(0, len(self) * len(self.views), step)
        views = (
            self.view(row) for row in tqdm(rows, desc="reading prompts", unit="view", disable=not by_view)
        )
        return {"", *(self.source.prompt_of(view) for view in views)}


def identity_of_rows(source: FramedDataset, views: Views, folder: str | Path) -> dict[str, Any]:
    """What the rows of a cache depend on, the networks aside; JSON values.

    folder  of the cache; digests of the files are kept there, so that an unchanged file is read once
    """
    framing, drawn = views.framing, views.framing.crop == "random"
    if framing.size is None:
        raise ValueError(
            "expected data.size=[HEIGHT,WIDTH] for a cache, found none: all rows are of one size"
        )
    encoding = getattr(source, "encoding", None)
    return {
        "data": digest_of_files(source, Path(folder)),
        "size": list(framing.size),
        "crop": framing.crop,
        "zoom": list(framing.zoom),
        "mirrored": list(views.sides),
        "crops": views.crops,
        "seed": views.seed if drawn else None,
        "void ids": encoding is not None and encoding.tells_void_apart,
    }


def digest_of_files(source: FramedDataset, folder: Path) -> str:
    """Digest of the contents of all files of a data set, in the order of its frames."""
    known = read_digests(folder / FILES)
    frames = [(source.key_of(index), source.files(index)) for index in range(len(source))]
    with ThreadPoolExecutor() as pool:
        files = list(dict.fromkeys(str(path) for _, paths in frames for path in paths))
        rows = tqdm(
            pool.map(lambda file: digest_row(file, known.get(file)), files), "checking files", len(files)
        )
        found = dict(zip(files, rows, strict=True))
    if found != known:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FILES, json.dumps(found))
    whole = hashlib.blake2b(digest_size=16)
    for key, paths in frames:
        whole.update(json.dumps([key, *(found[str(path)][2] for path in paths)]).encode())
    return whole.hexdigest()


def digest_row(file: str, known: list[Any] | None) -> list[Any]:
    """Bytes, time of the last change and digest of a file; the known digest if the others are known."""
    state = Path(file).stat()
    if known is not None and known[:2] == [state.st_size, state.st_mtime_ns]:
        return known
    with Path(file).open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return [state.st_size, state.st_mtime_ns, digest]


def read_digests(path: Path) -> Digests:
    """Digests of an earlier run; none if there are none, or if the file was damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    rows = found.items() if isinstance(found, dict) else ()
    return {file: row for file, row in rows if isinstance(row, list) and len(row) == 3}


@cache
def mapped(path: Path) -> Any:
    """A shard, mapped once by each process."""
    return safe_open(path, framework="numpy")


def rows_in(path: Path) -> int:
    """Number of rows of a shard."""
    return int(mapped(path).get_slice("moments").get_shape()[0])
