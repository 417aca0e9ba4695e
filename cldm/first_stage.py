"""The stage that trains the autoencoder: its figures and pictures while it runs, and the file it ends in."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import functional as F

from cldm.averaging import WeightAverage
from cldm.generate import to_uint8
from cldm.pictures import Rgb, sheet
from cldm.slices import TrainingSlice
from cldm.stage_figures import StageFigures
from cldm.stage_training import StageTraining
from cldm.tensor_writing import write_tensors
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.autoencoder_training import (
    LossWeights,
    feature_distance,
    frame_psnr,
    loss_terms,
    principal_code,
    standardise_latents,
    to_images,
)
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution as Gaussian
from ldm.util import instantiate_from_config

FeatureMaps = Callable[[Tensor], Sequence[Tensor]]

PREFIX = "first_stage_model."
GUIDE_FRAMES = 200  # of the training photos, for the best linear code of their blocks
CHUNK = 8  # frames at once, where no gradient is needed


class Reconstructions(StageFigures):
    """Figures of the autoencoder on fixed frames, and some of them: original beside reconstruction.

    frames  (N, H, W, 3) uint8 that are not trained on
    """

    def __init__(
        self, frames: Rgb, running: TrainingSlice, folder: str | Path, *, freq: int, pictures: int
    ) -> None:
        super().__init__(running, folder, freq=freq)
        self.frames = frames
        self.pictures = pictures

    def take(self) -> tuple[dict[str, float], Rgb | None]:
        """Reconstruct the frames."""
        found, figures = reconstruct(self.running.network, self.frames)
        rows = spread(len(self.frames), self.pictures)
        return figures, sheet([[self.frames[i], found[i]] for i in rows]) if rows else None


class AutoencoderTraining(StageTraining):
    """Trains an autoencoder on batches of `jpg` and `step`.

    how    a `VAETrainConfig`. Its start_logvar is added to the log-variance of the posterior before the first
           step: at 0 it starts near 1, and the noise drowns the latents until the network has made them large
    guide  weight and bias of `principal_code`, which the latents are drawn to at first, with a strength that
           fades over how.guide_steps: by itself the network stays for long with a single component
    features  images in [-1, 1] -> feature maps of a frozen network, compared from step how.features_from on
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        weights: LossWeights,
        how: DictConfig,
        guide: tuple[Tensor, Tensor] | None = None,
        features: FeatureMaps | None = None,
    ) -> None:
        # 4-D weights alone lie channels-last; convolutions then take and give images that do
        super().__init__(autoencoder.to(memory_format=torch.channels_last), how)
        self.autoencoder = autoencoder
        with torch.no_grad():
            autoencoder.quant_conv.bias[autoencoder.embed_dim :] += how.start_logvar
        self.weights = weights
        self.guide, self.guide_steps = guide, how.guide_steps if guide else 0
        self.features = features

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Encode, draw a latent, decode, compare."""
        step, x = int(batch["step"]), to_images(batch["jpg"])
        # under autocast the network's output is bf16: too coarse for sums and logarithms
        posterior = Gaussian(self.autoencoder.encode(x).parameters.float())
        reconstruction = self.autoencoder.decode(posterior.sample(self.noise_of(batch))).float()
        terms = loss_terms(x, reconstruction, posterior, self.weights)
        loss = torch.stack([getattr(self.weights, name) * term for name, term in terms.items()]).sum()
        if step < self.guide_steps:
            loss = loss + (1 - step / self.guide_steps) * self.distance_to_guide(x, posterior.mean)
        if self.features is not None and step >= self.how.features_from:
            with torch.no_grad():
                expected = self.features(x)
            loss = loss + self.weights.features * feature_distance(self.features(reconstruction), expected)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(x))
        return loss

    def distance_to_guide(self, x: Tensor, latent: Tensor) -> Tensor:
        """Mean squared distance of the latent from the linear code of `x`."""
        assert self.guide is not None
        weight, bias = (tensor.to(x) for tensor in self.guide)
        return F.mse_loss(latent, F.conv2d(x.float(), weight, bias, stride=weight.shape[-1]))


def build_training(
    config: DictConfig, model_file: DictConfig, photos: Rgb, features: FeatureMaps | None = None
) -> AutoencoderTraining:
    """The first stage of a model file, to be trained under the settings of a `VAEStage` on `photos`."""
    params = OmegaConf.to_container(model_file.model.params.first_stage_config, resolve=True)
    network = instantiate_from_config(params)
    guide = None
    if config.train.guide_steps:
        some = photos[spread(len(photos), GUIDE_FRAMES)]
        guide = principal_code(some, network.embed_dim, network.downsampling)
    return AutoencoderTraining(network, LossWeights(**config.loss), config.train, guide, features)


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices from all over 0..total - 1."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def to_signed(frames: Rgb) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) in [-1, 1]."""
    return to_images(torch.from_numpy(np.ascontiguousarray(frames)).float() / 127.5 - 1)


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
