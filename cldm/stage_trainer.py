"""Lightning's loop for a stage of the Streets base: one device, steps in order, no checkpoints of its own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset

from cldm.progress import StepProgressBar
from cldm.slices import TrainingSlice
from cldm.stage_figures import StageFigures
from cldm.trainer import quiet_lightning


def steps_from(batches: Dataset, first: int) -> DataLoader:
    """The batches from number `first` on, as they are."""
    return DataLoader(batches, batch_size=None, sampler=range(first, len(batches)))


def build_stage_trainer(
    steps: int, precision: str, callbacks: Sequence[pl.Callback], **options: Any
) -> pl.Trainer:
    """A trainer for `steps` optimizer steps; into a file goes no progress bar."""
    quiet_lightning()
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # cutting a crop needs none
    bar = [StepProgressBar()] if sys.stderr.isatty() else []
    return pl.Trainer(
        accelerator="auto",
        devices=1,
        precision=precision,
        max_steps=steps,
        callbacks=[*callbacks, *bar],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bool(bar),
        **options,
    )


def train_slice(
    module: pl.LightningModule,
    make_batches: Callable[[], Dataset],
    train: DictConfig,
    running: TrainingSlice,
    figures: StageFigures,
) -> None:
    """Go on where the run stands until the time of the slice is over; a complete run is loaded and measured.

    make_batches  those of the whole run, asked for only if there is something left to do
    train         the section of the stage's settings
    """
    step = running.progress.step
    if step < train.steps:
        trainer = build_stage_trainer(train.steps - step, train.precision, [running, figures])
        trainer.fit(module, steps_from(make_batches(), step))
    else:
        running.load_weights()
        figures.measure({})
