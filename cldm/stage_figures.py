"""Figures and pictures of a stage while it runs: one line and one picture now and then."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from cldm.pictures import Rgb, write_png
from cldm.slices import TrainingSlice

log = logging.getLogger(__name__)


class StageFigures(pl.Callback):
    """Measures the averaged weights at the start, every `freq` optimizer steps and at the end.

    A line goes to <folder>/log.jsonl and a picture to <folder>/pictures/step=NNNNNN.png. A subclass says what
    is measured.
    """

    def __init__(self, running: TrainingSlice, folder: str | Path, *, freq: int) -> None:
        self.running = running
        self.folder = Path(folder)
        self.freq = freq
        self.last_step = -1
        self.last: dict[str, Any] = {}

    @abstractmethod
    def take(self) -> tuple[dict[str, float], Rgb | None]:
        """Figures by name and a picture; the network holds its averaged weights, in evaluation mode."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show where the slice begins."""
        self.measure(trainer.callback_metrics)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Measure at multiples of `freq`."""
        if self.running.progress.step % self.freq == 0:
            self.measure(trainer.callback_metrics)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what the slice reached."""
        self.measure(trainer.callback_metrics)

    def measure(self, losses: Mapping[str, Any]) -> None:
        """Once for each step: take the figures, write the line and the picture."""
        progress = self.running.progress
        if progress.step == self.last_step:
            return
        self.last_step = progress.step
        self.running.count_time()
        # other shapes than those of training: compiling for them would take longer than the figures do
        with torch.compiler.set_stance("force_eager"), self.running.average.applied(self.running.network):
            figures, picture = self.take()
        times = {"cpu_hours": progress.cpu_seconds / 3600, "wall_hours": progress.wall_seconds / 3600}
        numbers = {**losses, **figures, **times}
        self.last = {"step": progress.step, **{name: round(float(v), 4) for name, v in numbers.items()}}
        log.info("%s", json.dumps(self.last))
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.last) + "\n")
        if picture is not None:
            target = self.folder / "pictures" / f"step={progress.step:06d}.png"
            target.parent.mkdir(exist_ok=True)
            write_png(target, picture, self.last)
