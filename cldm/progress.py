"""A progress bar in optimizer steps."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from tqdm import tqdm

log = logging.getLogger(__name__)

REFRESH_SECONDS = 0.5  # reading the loss waits for the device, so not at every step


def duration(seconds: float) -> str:
    """Seconds in words, such as 2:00:00 or 3 days, 4:05:06."""
    return str(timedelta(seconds=round(seconds)))


class StepProgressBar(pl.callbacks.ProgressBar):
    """Optimizer steps done and to do, loss and images a second; projects the duration of a run on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0
        self.bar: tqdm | None = None
        self.is_active = True
        self.is_projected = False

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all ranks but the first."""
        self.is_active = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        self.bar = tqdm(total=trainer.max_steps, unit="step", desc="training", disable=not self.is_active)
        self.is_projected = pl_module.device.type != "cpu"
        self.start = self.shown = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar when an optimizer step is done."""
        assert self.bar is not None
        self.images += len(batch["txt"]) * trainer.world_size
        now, step = time.monotonic(), trainer.global_step
        if step > 0 and not self.is_projected:
            self.is_projected = True
            self.project(now - self.start, trainer.max_steps)
        if now - self.shown > REFRESH_SECONDS or step == trainer.max_steps:
            self.bar.update(step - self.bar.n)
            speed = self.images / (now - self.start)
            metrics = {name: f"{value:.4f}" for name, value in trainer.callback_metrics.items()}
            self.bar.set_postfix({**metrics, "images/s": f"{speed:.2f}"})
            self.shown = now

    def project(self, seconds: float, max_steps: int) -> None:
        """Say how long the whole run takes at the speed of the first step."""
        whole = duration(seconds * max_steps)
        log.info("the first step took %.1f s on the CPU; %d steps take about %s", seconds, max_steps, whole)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar."""
        self.on_train_end(trainer, pl_module)
