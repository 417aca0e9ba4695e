"""Sampling from a noise prior: frames with their label maps become starts, and starts images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cldm.cldm import ControlledModel
from cldm.config import SampleConfig
from cldm.generate import Start, find_sampler, generate
from cldm.text_memory import TextMemory
from ldm.models.diffusion.latent import channels_first
from ldm.models.diffusion.schedule import timesteps_from
from ldm.priors.moments import LatentMoments
from ldm.priors.prior import NoisePrior
from ldm.priors.start import lowest_start

Frame = Mapping[str, Any]
"""A sample of a data set: `hint` (H, W, C) in [0, 1], `label` (H, W) train ids, `txt`, `jpg` (H, W, 3)."""


def make_prior(
    model: ControlledModel,
    moments: LatentMoments | None,
    size: Sequence[int],
    num_classes: int,
    **options: Any,
) -> NoisePrior:
    """A prior for the latents of a model, images of a size (H, W), and maps of some classes.

    moments  None for the kinds that need none
    options  of `NoisePrior`
    """
    down = model.first_stage_model.downsampling
    if moments is None:
        shape = (model.first_stage_model.embed_dim, size[0] // down, size[1] // down)
        moments = LatentMoments.empty(shape, num_classes)
    return NoisePrior(moments, downsampling=down, **options)


def timesteps_of(
    settings: SampleConfig, start: int, num_steps: int | None, num_timesteps: int = 1000
) -> list[int]:
    """The timesteps of a run that starts at `start`: of the sampler's grid, or `num_steps` of them."""
    grid = find_sampler(settings.sampler).timesteps(settings.steps, num_timesteps)
    return timesteps_from(start, grid, num_steps, num_timesteps)


class PriorSampler:
    """Samples images for frames, each started by a prior at the first of some timesteps."""

    def __init__(
        self, model: ControlledModel, prior: NoisePrior, timesteps: Sequence[int], settings: SampleConfig
    ) -> None:
        self.model, self.prior, self.timesteps, self.settings = model, prior, timesteps, settings
        self.abar = float(model.alphas_cumprod.double()[timesteps[0]])
        self.texts = TextMemory(model.cond_stage_model)

    def __call__(
        self, frames: Sequence[Frame], prompts: Sequence[str], seeds: Sequence[int]
    ) -> NDArray[np.uint8]:
        """Images (B, H, W, 3), each of its frame, prompt and seed alone, to rounding."""
        hints = torch.from_numpy(np.stack([frame["hint"] for frame in frames])).permute(0, 3, 1, 2)
        latents = self.prior.draw(labels_of(frames), self.abar, seeds, self.own_latents(frames))
        start = Start(latents, self.timesteps)
        options = {"start": start, "encode_texts": self.texts}
        return generate(self.model, hints, prompts, seeds, self.settings, **options).numpy()

    def own_latents(self, frames: Sequence[Frame]) -> Tensor | None:
        """Latents (B, C, h, w) of the photos, for the kind that starts from them."""
        return encode_photos(self.model, frames)[0] if self.prior.kind == "x0" else None

    def text_length(self, prompt: str) -> int:
        """Chunks that an image's prompts are encoded in; in a batch the longest would set it for all."""
        return max(map(self.texts.chunks, (prompt, self.settings.negative_prompt)))


def labels_of(frames: Sequence[Frame]) -> Tensor:
    """(B, H, W) train ids, 255 = void."""
    return torch.from_numpy(np.stack([np.asarray(frame["label"], np.int64) for frame in frames]))


@torch.no_grad()
def encode_photos(model: ControlledModel, frames: Sequence[Frame]) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, C, h, w) of the latents of the photos of frames, scaled, on the CPU.

    One at a time: what a network makes of an image depends on those beside it, in the last bits.
    """
    found = [model.encode_first_stage(channels_first(frame["jpg"][None], model.device)) for frame in frames]
    mean, variance = (torch.cat([getattr(one, name) for one in found]).cpu() for name in ("mean", "var"))
    return mean * model.scale_factor, variance * model.scale_factor**2


def choose_start(model: ControlledModel, prior: NoisePrior, frames: Sequence[Frame]) -> tuple[int, float]:
    """The lowest timestep at which a start knows enough of held-out frames, and its loss in nats a value."""
    abar = model.alphas_cumprod.double().tolist()
    mean, variance = encode_photos(model, frames)
    return lowest_start(prior.gaussian(labels_of(frames)), mean, variance, abar)
