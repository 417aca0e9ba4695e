"""Sample grids during training: the same maps, prompts and seeds, so that only the model changes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_only

from cldm.config import SampleConfig
from cldm.control_ldm import ControlLDM
from cldm.generate import generate
from cldm.pictures import overlay, sheet, write_png

log = logging.getLogger(__name__)

Samples = Sequence[Mapping[str, Any]]


class ImageLogger(pl.Callback):
    """Samples a fixed grid at step 0, every `batch_frequency` optimizer steps, and at the end.

    Written to <log_dir>/image_log/step=NNNNNN.png, a row for each sample: hint, image, overlay and, where
    there is one, the photo; and to the Lightning logger. Sampling draws from its own seeds alone, so training
    is bit by bit what it would be without.

    samples   what to sample: `hint` (H, W, C) in [0, 1], `txt`, perhaps `jpg`; by default the first ones of
              the training set
    settings  how to sample
    seed      of the first image; the next ones count up
    """

    def __init__(
        self,
        batch_frequency: int = 300,
        max_images: int = 4,
        *,
        samples: Samples | None = None,
        settings: SampleConfig | None = None,
        seed: int = 0,
    ) -> None:
        if batch_frequency < 1:
            raise ValueError(
                f"expected a batch_frequency of 1 or more optimizer steps, found {batch_frequency}"
            )
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        self.samples = samples
        self.settings = settings or SampleConfig()
        self.seed = seed
        self.last_step = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fix the folder: asking Lightning for it is a collective, so every rank does it here."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "image_log"

    def state_dict(self) -> dict[str, Any]:
        """The last step with a grid."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as before."""
        self.last_step = state_dict["last_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fix the samples and show what the untrained model makes of them."""
        if self.samples is None:
            dataset = trainer.train_dataloader.dataset
            self.samples = [dataset[i] for i in range(min(self.max_images, len(dataset)))]
        self.samples = self.samples[: self.max_images]
        if trainer.global_step == 0:
            self.log_grid(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log when a multiple of `batch_frequency` optimizer steps is reached."""
        if trainer.global_step % self.batch_frequency == 0:
            self.log_grid(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the result, but not that of a run which was told to stop and will go on."""
        if not trainer.should_stop:
            self.log_grid(trainer, pl_module)

    @rank_zero_only
    def log_grid(self, trainer: pl.Trainer, model: ControlLDM) -> None:
        """Sample and write one grid, once for each optimizer step."""
        step = trainer.global_step
        if step == self.last_step or not self.samples:
            return
        self.last_step = step
        try:
            with evaluating(trainer, model):
                images = self.sample(model)
        except torch.OutOfMemoryError:
            self.samples = self.samples[: len(self.samples) // 2]
            log.warning("out of memory: no grid at step %d, the next has %d rows", step, len(self.samples))
            return
        picture = sheet([grid_row(sample, image) for sample, image in zip(self.samples, images, strict=True)])
        self.folder.mkdir(parents=True, exist_ok=True)
        write_png(self.folder / f"step={step:06d}.png", picture)
        for logger in trainer.loggers:
            send_image(logger, "samples", picture, step)

    def sample(self, model: ControlLDM) -> NDArray[np.uint8]:
        """Images (B, H, W, 3) of the fixed samples."""
        assert self.samples is not None
        hints = np.stack([np.asarray(sample["hint"]) for sample in self.samples])
        hint = torch.from_numpy(hints).permute(0, 3, 1, 2).to(model.device)
        prompts = [sample["txt"] for sample in self.samples]
        seeds = range(self.seed, self.seed + len(prompts))
        return generate(model, hint, prompts, seeds, self.settings).numpy()


@contextmanager
def evaluating(trainer: pl.Trainer, model: ControlLDM) -> Iterator[None]:
    """Evaluation mode, no graph, the precision of the run, all stages there; what was before comes back.

    Compiled networks run as they are written, as other sizes than those of training would be compiled anew.
    """
    was_training = model.training
    model.eval()
    try:
        average = model.average.applied(model) if model.average else nullcontext()
        eager = torch.compiler.set_stance("force_eager") if model.is_compiled else nullcontext()
        precision = trainer.precision_plugin.forward_context()
        with torch.no_grad(), precision, model.lend_stages(), average, eager:
            yield
    finally:
        model.train(was_training)


def grid_row(sample: Mapping[str, Any], image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Hint, image, overlay and, where there is one, the photo."""
    row = [image]
    hint = np.asarray(sample["hint"])
    if hint.shape[-1] == 3:
        colours = (hint * 255).round().astype(np.uint8)
        row = [colours, image, overlay(image, colours)]
    if "jpg" in sample:
        row.append(((np.asarray(sample["jpg"]) + 1) * 127.5).round().astype(np.uint8))
    return row


def send_image(logger: Any, name: str, picture: NDArray[np.uint8], step: int) -> None:
    """Hand a picture to a Lightning logger that takes pictures."""
    if hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(key=name, images=[picture], step=step)
    elif hasattr(logger.experiment, "add_image"):  # TensorBoard
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
