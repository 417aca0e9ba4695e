"""The stage that trains the autoencoder: its figures and pictures while it runs, and the file it ends in."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cldm.averaging import WeightAverage
from cldm.generate import to_uint8
from cldm.pictures import Rgb, sheet, write_png
from cldm.slices import TrainingSlice
from cldm.tensor_writing import write_tensors
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.autoencoder_training import (
    AutoencoderTraining,
    LossWeights,
    frame_psnr,
    principal_code,
    standardise_latents,
    to_images,
)
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution as Gaussian
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

PREFIX = "first_stage_model."
GUIDE_FRAMES = 200  # of the training photos, for the best linear code of their blocks
CHUNK = 8  # frames at once, where no gradient is needed


class Reconstructions(pl.Callback):
    """Measures the averaged autoencoder on fixed frames and shows some: original beside reconstruction.

    At the start, every `freq` optimizer steps and at the end, a line goes to <folder>/log.jsonl and a picture
    to <folder>/pictures/step=NNNNNN.png.

    frames  (N, H, W, 3) uint8 that are not trained on
    """

    def __init__(
        self, frames: Rgb, running: TrainingSlice, folder: str | Path, *, freq: int, pictures: int
    ) -> None:
        self.frames, self.running = frames, running
        self.folder = Path(folder)
        self.freq, self.pictures = freq, pictures
        self.last_step = -1
        self.last: dict[str, Any] = {}

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
        """Once for each step: reconstruct, write the line and the picture."""
        progress = self.running.progress
        if progress.step == self.last_step:
            return
        self.last_step = progress.step
        self.running.count_time()
        network: AutoencoderKL = self.running.network
        with self.running.average.applied(network):
            pictures, figures = reconstruct(network, self.frames)
        times = {"cpu_hours": progress.cpu_seconds / 3600, "wall_hours": progress.wall_seconds / 3600}
        numbers = {**losses, **figures, **times}
        self.last = {"step": progress.step, **{name: round(float(v), 4) for name, v in numbers.items()}}
        log.info("%s", json.dumps(self.last))
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.last) + "\n")
        rows = spread(len(self.frames), self.pictures)
        if rows:
            target = self.folder / "pictures" / f"step={progress.step:06d}.png"
            target.parent.mkdir(exist_ok=True)
            write_png(target, sheet([[self.frames[i], pictures[i]] for i in rows]), self.last)


def build_training(config: DictConfig, model_file: DictConfig, photos: Rgb) -> AutoencoderTraining:
    """The first stage of a model file, to be trained under the settings of a `VAEStage` on `photos`."""
    params = OmegaConf.to_container(model_file.model.params.first_stage_config, resolve=True)
    network = instantiate_from_config(params)
    names = ("lr", "warmup", "steps", "seed", "weight_decay", "clip", "start_logvar", "guide_steps")
    settings = {name: config.train[name] for name in names}
    some = photos[spread(len(photos), GUIDE_FRAMES)]
    guide = (
        principal_code(some, network.embed_dim, network.downsampling) if config.train.guide_steps else None
    )
    return AutoencoderTraining(network, LossWeights(**config.loss), guide=guide, **settings)


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices from all over 0..total - 1."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def to_signed(frames: Rgb) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) in [-1, 1]."""
    return to_images(torch.from_numpy(frames).float() / 127.5 - 1)


def encode_in_chunks(autoencoder: AutoencoderKL, frames: Rgb) -> Iterator[tuple[Tensor, Gaussian]]:
    """Images in [-1, 1] and their posteriors, some frames at a time."""
    device = autoencoder.quant_conv.weight.device
    for start in range(0, len(frames), CHUNK):
        x = to_signed(frames[start : start + CHUNK]).to(device)
        yield x, autoencoder.encode(x)


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, frames: Rgb) -> tuple[NDArray[np.uint8], dict[str, float]]:
    """Frames through the most likely latent and back, and the mean figures of that.

    psnr, edge_psnr  dB; of all pixels, and of the tenth with the strongest gradient
    latent_noise     standard deviation within the posteriors over that of all latents
    """
    pictures, figures, posteriors = [], [], []
    for x, posterior in encode_in_chunks(autoencoder, frames):
        found = autoencoder.decode(posterior.mode()).clamp(-1, 1)
        figures.append(torch.stack(frame_psnr(x, found)))
        pictures.append(to_uint8(found).numpy())
        posteriors.append(posterior)
    every, edges = torch.cat(figures, dim=1).mean(dim=1).tolist()
    _, std, within = latent_moments(posteriors)
    noise = (within / std).mean().item()
    return np.concatenate(pictures), {"psnr": every, "edge_psnr": edges, "latent_noise": noise}


def latent_moments(posteriors: Sequence[Gaussian]) -> tuple[Tensor, Tensor, Tensor]:
    """Of drawn latents, each (C,) float64: mean, standard deviation, and the part of it within posteriors."""
    mean, var = (
        torch.cat([getattr(posterior, name).double().cpu() for posterior in posteriors])
        for name in ("mean", "var")
    )
    within = var.mean(dim=(0, 2, 3))
    return mean.mean(dim=(0, 2, 3)), (mean.var(dim=(0, 2, 3), correction=0) + within).sqrt(), within.sqrt()


@torch.no_grad()
def write_first_stage(
    path: str | Path,
    autoencoder: AutoencoderKL,
    average: WeightAverage,
    frames: Rgb,
    scale_factor: float,
    notes: Mapping[str, str],
) -> dict[str, Any]:
    """Write the averaged weights in fp16 under the published names, with standardised latents.

    frames        what the moments of the latents are measured on
    scale_factor  of the model file: times the latents, it makes their standard deviation 1
    returns       the moments before the change of unit
    """
    with average.applied(autoencoder):
        final = copy.deepcopy(autoencoder)
    mean, std, _ = latent_moments([posterior for _, posterior in encode_in_chunks(final, frames)])
    standardise_latents(final, mean.float(), std.float(), scale_factor)
    tensors = {f"{PREFIX}{key}": value.half() for key, value in final.state_dict().items()}
    moments = {"scale_factor": scale_factor, "raw_mean": mean.tolist(), "raw_std": std.tolist()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {**notes, "latents": json.dumps(moments)})
    return moments
