"""The model behind a page, and the one thread that computes: orders take turns there and leave PNG files.

One thread, because torch keeps helpers for each that computes. With two, one of them only reading the model,
there are more helpers than cores, they sleep between two layers, and sampling takes twice as long on a CPU.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cldm.config import SampleConfig
from cldm.digests import fingerprint
from cldm.pictures import Rgb, overlay, write_png
from datasets.label_space import Size
from webui.condition import Hint
from webui.label_runs import encode_labels
from webui.orders import WHOLE_RUN, Order
from webui.starts import Starts
from webui.uploads import MAX_IMAGE_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

    from cldm.cldm import ControlledModel
    from cldm.recorded_run import RecordedRun

PIXELS_AT_ONCE = 4 * 512 * 512  # of a batch
RESULTS = "results"  # the subfolder that images go to
PAUSE = 4  # times what a preview took; so previews take a fifth of the time at the most


class Stopped(Exception):
    """The visitor wants no more of it."""


class Progress(NamedTuple):
    """How far a request is."""

    done: int  # steps
    total: int
    pictures: list[Rgb] | None = None  # what its batch will be; None where the last ones still hold


class Result(NamedTuple):
    """One image on disk."""

    seed: int
    image: Path  # a PNG with its settings
    mixed: Path  # the same under its hint


Watch = Callable[[Progress], None]


@dataclass
class Session:
    """A model, perhaps still being read, with the settings of its images and the folder that they go to."""

    loading: Future[ControlledModel]
    folder: Path
    size: Size | None = None  # of the images; None is that of each hint
    sample: SampleConfig = field(default_factory=SampleConfig)  # what a page starts with
    marks: Mapping[str, Any] = field(default_factory=dict)  # goes into every PNG
    starts: Starts | None = None
    stages: list[str] = field(default_factory=list)  # of the reading of the model, so far
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "model"), repr=False)

    @property
    def model(self) -> ControlledModel:
        """The model, waited for as long as it takes."""
        return self.loading.result()

    def close(self, seconds: float) -> bool:
        """Take no more orders; whether those that are there come to an end within some seconds."""
        last = self.worker.submit(lambda: None)
        self.worker.shutdown(wait=False)
        return bool(wait_for([last], timeout=seconds).done)

    def run(
        self, hint: Hint, order: Order, watch: Watch | None = None, stop: threading.Event | None = None
    ) -> list[Result]:
        """The images of an order, in batches of bounded size; ValueError says why there are none.

        To be called in `worker`, where nobody else computes.

        watch  called after each step, from the thread that calls this, now and then with previews
        stop   once it is set, the batch in work is given up after its step; what is made is kept
        """
        order.check()
        height, width = hint.colours.shape[:2]
        if height * width > MAX_IMAGE_PIXELS:
            raise ValueError(
                f"{hint.name}: expected a map of at most {MAX_IMAGE_PIXELS} pixels, found {height}x{width}; "
                "load a smaller one, or start the page with --size H W"
            )
        folder = self.folder / RESULTS / secrets.token_hex(8)
        results: list[Result] = []
        batches = split(order.seed, order.num, max(1, PIXELS_AT_ONCE // (height * width)))
        for i, seeds in enumerate(batches):
            if stop is not None and stop.is_set():
                break
            told = None if watch is None else partial(shifted, watch, i / len(batches), len(batches))
            try:
                images = self._sample(hint, order, seeds, told, stop)
            except Stopped:
                break
            pairs = zip(seeds, images, strict=True)
            results += [self._write(folder, hint, order, seed, image) for seed, image in pairs]
        return results

    def _sample(
        self, hint: Hint, order: Order, seeds: list[int], watch: Watch | None, stop: threading.Event | None
    ) -> list[Rgb]:
        """One batch."""
        import torch

        from cldm.generate import decode, generate

        model, start = self.model, None
        if order.prior != WHOLE_RUN:
            if self.starts is None:
                raise ValueError("this page was started without a noise prior; choose none")
            start = self.starts.draw(model, hint, order, seeds)
        steps = len(start.timesteps) if start else order.sample.steps
        preview = Preview(lambda z: list(decode(model, z).numpy()))

        def after(step: int, z: Tensor) -> None:
            if stop is not None and stop.is_set():
                raise Stopped
            if watch is not None:
                watch(Progress(step + 1, steps, preview(z) if step + 1 < steps else None))

        told = torch.from_numpy(hint.colours).permute(2, 0, 1)[None] / 255
        prompts = [order.prompt] * len(seeds)
        images = generate(model, told, prompts, seeds, order.sample, start=start, callback=after)
        return list(images.numpy())

    def _write(self, folder: Path, hint: Hint, order: Order, seed: int, image: Rgb) -> Result:
        stem = f"{safe_stem(hint.name)}_seed{seed}"
        settings = {
            **self.marks,
            **order.settings(seed),
            "size": list(image.shape[:2]),
            "hint": hint.name,
            "hint_fingerprint": hint.digest,
        }
        if hint.labels is not None:
            settings |= {"map": encode_labels(hint.labels), "label_space": hint.space}
        folder.mkdir(parents=True, exist_ok=True)
        result = Result(seed, folder / f"{stem}.png", folder / f"{stem}_overlay.png")
        write_png(result.image, image, settings)
        write_png(result.mixed, overlay(image, hint.colours))
        return result


class Preview:
    """Pictures of what is predicted, as often as a fifth of the time allows; the first one at once."""

    def __init__(self, decode: Callable[[Tensor], list[Rgb]]) -> None:
        self.decode = decode
        self.due = 0.0

    def __call__(self, z: Tensor) -> list[Rgb] | None:
        """Pictures of latents (B, C, h, w); None where it is too early for the next ones."""
        begin = time.monotonic()
        if begin < self.due:
            return None
        pictures = self.decode(z)
        end = time.monotonic()
        self.due = end + PAUSE * (end - begin)
        return pictures


def split(seed: int, num: int, at_once: int) -> list[list[int]]:
    """Seeds from `seed` on, `at_once` of them in a batch."""
    seeds = range(seed, seed + num)
    return [list(seeds[i : i + at_once]) for i in range(0, num, at_once)]


def shifted(watch: Watch, before: float, batches: int, progress: Progress) -> None:
    """Tell of one batch's steps as of a part of all; `before` is the part that was done before it."""
    total = progress.total * batches
    watch(progress._replace(done=round(before * total) + progress.done, total=total))


def safe_stem(name: str) -> str:
    """The stem of a file's name, without what says that it is a map, as every file system takes it."""
    stem = re.sub(r"(_gtFine)?_(labelIds|labelTrainIds|color)$", "", Path(name).stem)
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", stem)[:60].strip(".") or "image"


def open_session(
    folder: Path,
    checkpoint: Path,
    run: RecordedRun,
    *,
    base: Path | None = None,
    config: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    size: Size | None = None,
    starts: Starts | None = None,
) -> Session:
    """A session whose model is read in the background; what is not given is as its training run had it.

    What is wrong with the files is said by `Session.model`: ValueError or OSError, one sentence.
    """
    marks = {
        "checkpoint": checkpoint.name,
        "checkpoint_fingerprint": fingerprint(checkpoint),
        "base_fingerprint": base and fingerprint(base),
        "config_fingerprint": config and fingerprint(config),
        "precision": precision,
    }

    stages = ["starting torch"]

    def read() -> ControlledModel:
        from cldm.model import load_model, load_model_config, model_config_of, place

        stages.append("finding out what it is")
        model_config = load_model_config(config) if config else model_config_of(checkpoint, base)
        stages.append("reading its weights")
        model = load_model(model_config, checkpoint, base)
        stages.append("placing it on its device")
        return place(model, device, precision)

    worker = ThreadPoolExecutor(1, "model")
    size = size or run.size
    return Session(worker.submit(read), folder, size, run.sample, marks, starts, stages, worker)
