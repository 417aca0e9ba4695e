"""The folder of a run over the maps of a data set: sample/, real/ and gt_label/ by number, and a manifest.

    sample/000012.png     the image, with its settings in it
    gt_label/000012.png   the map that it was made from: train ids, 255 = void, at the size of the image
    real/000012.png       the photo of that map: a link to it, under the suffix of its content
    manifest.jsonl        a line of JSON for each image: its name and its settings

Which map image n shows and which seed it has depends on n, the run's seed and the maps alone. So shards,
batches and a larger number of images change nothing about it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from cldm.pictures import Rgb, is_made, write_png
from cldm.whole_files import whole_file

SAMPLES, REAL, LABELS = "sample", "real", "gt_label"
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}
FRAMES = 1 << 20  # of a data set, at most: seeds of one run are then all different
SEEDS = 1 << 32  # torch's generator takes as many
SAVE_SECONDS = 60.0  # between two manifests

Files: TypeAlias = tuple[Rgb, NDArray[np.integer], "Path | Rgb"]
"""Image (H, W, 3), map (H, W) of train ids, and photo: a file, or pixels (H, W, 3)."""


@dataclass(frozen=True)
class Job:
    """One image to make."""

    number: int  # of the image in the run
    frame: int  # index of its map in the split
    repeat: int  # images of that map before it
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)  # all that determines the image; JSON values

    @property
    def name(self) -> str:
        """Name of its files without a suffix."""
        return f"{self.number:06d}"


def plan(keys: Sequence[str], total: int | None, seed: int) -> list[Job]:
    """The images of a run, without settings: every map once, then every map again.

    Maps come in the order of a hash of their keys, so that any number of first ones is a fair choice, and the
    same for every seed.

    keys   of the maps of the split
    total  number of images; None is one for each map
    seed   of the run
    """
    if not 0 < len(keys) <= FRAMES:
        raise ValueError(f"expected 1 to {FRAMES} label maps, found {len(keys)}")
    order = sorted(range(len(keys)), key=lambda i: hashlib.sha256(keys[i].encode()).digest())
    jobs = []
    for number in range(len(keys) if total is None else total):
        repeat, place = divmod(number, len(keys))
        frame = order[place]
        jobs.append(Job(number, frame, repeat, image_seed(seed, frame, repeat)))
    return jobs


def image_seed(seed: int, frame: int, repeat: int) -> int:
    """The seed of an image: those of a run are all different, those of two runs begin elsewhere."""
    first = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return (first + frame + repeat * FRAMES) % SEEDS


def shard_of(jobs: Sequence[Job], number: int, count: int) -> list[Job]:
    """Part `number`, from 1, of `count` of the images, neighbours together."""
    return list(jobs[len(jobs) * (number - 1) // count : len(jobs) * number // count])


def batches(jobs: Sequence[Job], length: Callable[[Job], int], size: int) -> list[list[Job]]:
    """At most `size` jobs together, all of one length, in the order of their numbers within it."""
    by_length: dict[int, list[Job]] = {}
    for job in jobs:
        by_length.setdefault(length(job), []).append(job)
    return [some[i : i + size] for some in by_length.values() for i in range(0, len(some), size)]


class SampleTree:
    """The folder of a run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, folder: str, job: Job) -> Path:
        """Where one of the PNG files of an image is."""
        return self.root / folder / f"{job.name}.png"

    def missing(self, jobs: Iterable[Job], *, overwrite: bool) -> list[Job]:
        """Images that are not there with these settings, map and photo with them.

        Raises
            ValueError  one that is there with other settings, unless they are to be overwritten
        """
        names = {folder: names_in(self.root / folder) for folder in (REAL, LABELS)}
        made = {
            job.number: is_made(
                self.path(SAMPLES, job), job.settings, overwrite=overwrite, elsewhere="--save_dir"
            )
            for job in jobs
        }
        return [
            job for job in jobs if not (made[job.number] and all(job.name in some for some in names.values()))
        ]

    def fill(
        self,
        jobs: Sequence[Job],
        todo: Sequence[Job],
        batches: Iterable[Sequence[Job]],
        make: Callable[[Sequence[Job]], Iterable[Files]],
        *,
        manifest: str,
        copy: bool,
    ) -> None:
        """Make what is to be done, and write the manifest of what is there, now and then and in the end.

        todo      of the jobs; the others are there
        batches   of what is to be done
        make      gives image, map and photo of each job of a batch, as `write` takes them
        manifest  name of the file
        """
        lost = {job.number for job in todo}
        saved = time.monotonic()
        try:
            with tqdm(total=len(todo), unit="image") as bar:
                for batch in batches:
                    for job, files in zip(batch, make(batch), strict=True):
                        self.write(job, *files, copy=copy)
                        lost.remove(job.number)
                        bar.update()
                    if time.monotonic() - saved > SAVE_SECONDS:
                        self.write_manifest((job for job in jobs if job.number not in lost), manifest)
                        saved = time.monotonic()
        finally:
            if len(lost) < len(jobs):
                self.write_manifest((job for job in jobs if job.number not in lost), manifest)

    def write(
        self, job: Job, image: Rgb, label: NDArray[np.integer], photo: Path | Rgb, *, copy: bool
    ) -> None:
        """Write the files of an image, the sample last.

        image  (H, W, 3)
        label  (H, W) train ids
        photo  a file to link or copy, or pixels (H, W, 3)
        """
        for folder in (SAMPLES, REAL, LABELS):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        write_png(self.path(LABELS, job), label.astype(np.uint8))
        if isinstance(photo, Path):
            put(photo, self.root / REAL / f"{job.name}{true_suffix(photo)}", copy=copy)
        else:
            write_png(self.path(REAL, job), photo)
        write_png(self.path(SAMPLES, job), image, job.settings)

    def write_manifest(self, jobs: Iterable[Job], name: str) -> None:
        """A line for each of the images, which are there."""
        lines = (
            json.dumps({"image": f"{SAMPLES}/{job.name}.png", **job.settings}, sort_keys=True) for job in jobs
        )
        write_lines(self.root / name, list(lines))


def names_in(folder: Path) -> set[str]:
    """Names of the files of a folder without their suffixes; hidden ones are left out."""
    return {path.stem for path in folder.glob("*") if not path.name.startswith(".")}


def true_suffix(photo: Path) -> str:
    """The suffix of what a picture file holds."""
    with Image.open(photo) as image:
        return SUFFIXES.get(str(image.format), photo.suffix.lower())


def put(source: Path, target: Path, *, copy: bool) -> None:
    """Link to a file, or copy it where that is asked for, or where there are no links."""
    with whole_file(target) as partial:
        if copy or not linked(source, partial):
            shutil.copyfile(source, partial)


def linked(source: Path, target: Path) -> bool:
    """Make `target` a relative link to `source`, so that both can be moved; False where links cannot be."""
    try:
        target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()))
    except OSError:
        return False
    return True


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a text file whole or not at all; one that holds these lines already is left as it is."""
    text = "".join(f"{line}\n" for line in lines)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def with_settings(job: Job, settings: Mapping[str, Any]) -> Job:
    """The job with what determines its image."""
    own = {"seed": job.seed, "frame": job.frame, "repeat": job.repeat}
    return Job(job.number, job.frame, job.repeat, job.seed, {**settings, **own})
