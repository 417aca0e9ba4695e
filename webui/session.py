"""The model behind a page, and the one way to it: requests are checked, take turns, and leave PNG files."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cldm.config import SampleConfig, check_sample
from cldm.digests import fingerprint
from cldm.pictures import Rgb, overlay, write_png
from datasets.label_space import Size
from webui.condition import Hint

if TYPE_CHECKING:
    from cldm.cldm import ControlledModel

LIMITS: Mapping[str, tuple[float, float]] = {  # of what a visitor may ask for
    "num": (1, 8),
    "seed": (0, 2**32 - 1),  # a browser counts exactly up to 2**53
    "steps": (1, 100),
    "scale": (1, 20),
    "strength": (0, 2),
}
MAX_PROMPT = 1000  # characters
MAX_IMAGE_PIXELS = 1 << 20
PIXELS_AT_ONCE = 4 * 512 * 512  # of a batch
RESULTS = "results"  # the subfolder that images go to

StepReport = Callable[[int, int], None]  # steps done, steps in all


class Result(NamedTuple):
    """One image on disk."""

    seed: int
    image: Path  # a PNG with its settings
    mixed: Path  # the same under its hint


@dataclass(frozen=True)
class Order:
    """What a visitor asks for."""

    prompt: str
    num: int = 1
    seed: int = 0  # of the first image; the next count up
    sample: SampleConfig = field(default_factory=SampleConfig)

    def check(self) -> None:
        """Refuse numbers outside LIMITS and texts that are too long, each in a sentence."""
        for name, (least, most) in LIMITS.items():
            value = getattr(self if hasattr(self, name) else self.sample, name)
            if not least <= value <= most:  # NaN is not in any range
                raise ValueError(f"expected {name} in {least}..{most}, found {value}")
        for name, text in (("prompt", self.prompt), ("negative prompt", self.sample.negative_prompt)):
            if len(text) > MAX_PROMPT:
                raise ValueError(f"expected a {name} of at most {MAX_PROMPT} characters, found {len(text)}")
        check_sample(self.sample)


@dataclass
class Session:
    """A model with the settings that its images carry and the folder that they go to."""

    model: ControlledModel
    folder: Path
    size: Size | None = None  # of the images; None is that of each hint
    sample: SampleConfig = field(default_factory=SampleConfig)  # what a page starts with
    marks: Mapping[str, Any] = field(default_factory=dict)  # goes into every PNG
    turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def run(self, hint: Hint, order: Order, report: StepReport | None = None) -> list[Result]:
        """The images of an order, in batches of bounded size; ValueError says why there are none."""
        order.check()
        height, width = hint.colours.shape[:2]
        if height * width > MAX_IMAGE_PIXELS:
            raise ValueError(
                f"{hint.name}: expected a map of at most {MAX_IMAGE_PIXELS} pixels, found {height}x{width}; "
                "load a smaller one, or start the page with --size H W"
            )
        folder = self.folder / RESULTS / secrets.token_hex(8)
        folder.mkdir(parents=True)
        results: list[Result] = []
        batches = split(order.seed, order.num, max(1, PIXELS_AT_ONCE // (height * width)))
        for i, seeds in enumerate(batches):
            steps = (i * order.sample.steps, len(batches) * order.sample.steps)
            images = self._sample(hint, order, seeds, report and shifted(report, *steps))
            pairs = zip(seeds, images, strict=True)
            results += [self._write(folder, hint, order, seed, image) for seed, image in pairs]
        return results

    def _sample(
        self, hint: Hint, order: Order, seeds: list[int], report: Callable[[int], None] | None
    ) -> list[Rgb]:
        """One batch, while no other request computes."""
        import torch

        from cldm.generate import generate

        told = torch.from_numpy(hint.colours).permute(2, 0, 1)[None] / 255
        callback = None if report is None else lambda step, _: report(step + 1)
        with self.turn:
            images = generate(
                self.model, told, [order.prompt] * len(seeds), seeds, order.sample, callback=callback
            )
        return list(images.numpy())

    def _write(self, folder: Path, hint: Hint, order: Order, seed: int, image: Rgb) -> Result:
        stem = f"{safe_stem(hint.name)}_seed{seed}"
        settings = {
            **self.marks,
            **asdict(order.sample),
            "prompt": order.prompt,
            "seed": seed,
            "size": list(image.shape[:2]),
            "hint": hint.name,
            "hint_fingerprint": hint.digest,
        }
        result = Result(seed, folder / f"{stem}.png", folder / f"{stem}_overlay.png")
        write_png(result.image, image, settings)
        write_png(result.mixed, overlay(image, hint.colours))
        return result


def split(seed: int, num: int, at_once: int) -> list[list[int]]:
    """Seeds from `seed` on, `at_once` of them in a batch."""
    seeds = range(seed, seed + num)
    return [list(seeds[i : i + at_once]) for i in range(0, num, at_once)]


def shifted(report: StepReport, done: int, total: int) -> Callable[[int], None]:
    """A report of one batch's steps, counted from the first step of the first batch."""
    return lambda step: report(done + step, total)


def safe_stem(name: str) -> str:
    """The stem of a file's name as every file system takes it."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(name).stem)[:60].strip(".") or "image"


def load_session(
    folder: Path,
    checkpoint: Path,
    *,
    base: Path | None = None,
    config: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    size: Size | None = None,
) -> Session:
    """Read a model; what is not given is as its training run had it.

    Raises
        ValueError, OSError  one sentence
    """
    from cldm.model import load_model, load_model_config, model_config_of, place
    from cldm.recorded_run import read_recorded_run

    run = read_recorded_run(checkpoint)
    if run.hint not in (None, "colours"):
        raise ValueError(
            f"{checkpoint}: expected a control of colour maps, which this page paints, found one that was"
            f" trained with data.hint={run.hint}; sample it with generate.py"
        )
    model_config = load_model_config(config) if config else model_config_of(checkpoint, base)
    model = place(load_model(model_config, checkpoint, base), device, precision)
    marks = {
        "checkpoint": checkpoint.name,
        "checkpoint_fingerprint": fingerprint(checkpoint),
        "base_fingerprint": base and fingerprint(base),
        "config_fingerprint": config and fingerprint(config),
        "precision": precision,
    }
    return Session(model, folder, size or run.size, run.sample, marks)
