"""From hints and prompts to images: the one way, used by the logger, the scripts and the web page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from cldm.cldm import ControlledModel, HintFeatures, guess_mode_scales
from cldm.config import SampleConfig
from ldm.models.diffusion.ddim import StepCallback, sample_ddim
from ldm.models.diffusion.dpm_solver import sample_dpm_solver
from ldm.models.diffusion.guidance import EpsModel, classifier_free_guidance
from ldm.models.diffusion.schedule import ddim_timesteps, uniform_timesteps

DECODED_AT_ONCE = 4 * 64 * 64  # latent pixels: four images of 512x512

EncodeTexts: TypeAlias = Callable[[list[str]], Tensor]
"""B texts -> (B, L, D), L the same for all of a call."""


class Sampler(NamedTuple):
    """A sampler, the timesteps that it is made for, and what it needs of the settings."""

    run: Callable[..., Tensor]
    timesteps: Callable[[int, int], list[int]]
    is_stochastic: bool  # takes eta


SAMPLERS = {
    "ddim": Sampler(sample_ddim, ddim_timesteps, True),
    # Ends without noise, as diffusers' scheduler does: its last step is a long one, and first order.
    "dpm++2m": Sampler(partial(sample_dpm_solver, end=1.0), uniform_timesteps, False),
}


class Start(NamedTuple):
    """Where sampling starts, if not from noise at the first timestep of the sampler."""

    latents: Tensor  # (B, C, h, w) at the level of the first timestep
    timesteps: Sequence[int]  # decreasing: one network evaluation each


@torch.no_grad()
def generate(
    model: ControlledModel,
    hint: Tensor | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SampleConfig,
    *,
    size: tuple[int, int] | None = None,
    start: Start | None = None,
    encode_texts: EncodeTexts | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Sample one image for each seed; the same seed gives the same image whatever else is in the batch.

    hint          (B or 1, C, H, W) in [0, 1]; None samples without control and needs `size`
    prompts       B texts; the negative prompt is one of the settings
    seeds         B integers, each the only source of randomness of its image
    size          (H, W) of the images, multiples of 64; by default that of the hint
    start         latents to start from and the timesteps to walk, in the place of `settings.steps`
    encode_texts  by default the model encodes the texts of this call
    callback      called after each step with its number and the predicted latent
    returns       (B, H, W, 3) uint8 on the CPU

    Raises
        ValueError  a size, a number or a name that does not fit, or a result that is not finite
    """
    check_counts(hint, prompts, seeds)
    sampler = find_sampler(settings.sampler)
    height, width = image_size(hint, size)
    down = model.first_stage_model.downsampling
    shape = (model.first_stage_model.embed_dim, height // down, width // down)
    timesteps = start.timesteps if start else sampler.timesteps(settings.steps, model.num_timesteps)
    draws = len(timesteps) if sampler.is_stochastic and settings.eta > 0 else 0
    # A start is of the first draw as well, so the noise of the steps is always that of the later ones.
    noise, *later = draw_noise(seeds, 1 + draws, shape).to(model.device)
    pending = iter(later)
    options = {"eta": settings.eta, "noise_like": lambda _: next(pending)} if sampler.is_stochastic else {}
    z = sampler.run(
        guided_predictor(model, hint, prompts, settings, encode_texts),
        noise if start is None else check_start(start, noise.shape).to(noise),
        timesteps,
        model.alphas_cumprod.double().tolist(),
        callback=callback,
        **options,
    )
    return decode(model, z)


def draw_noise(seeds: Sequence[int], draws: int, shape: tuple[int, ...]) -> Tensor:
    """(draws, B, *shape) normal noise, each image's from its own seed.

    Drawn on the CPU, so that a seed means the same image everywhere; before the run, so that no step waits.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(draws, *shape, generator=g) for g in generators], dim=1)


def guided_predictor(
    model: ControlledModel,
    hint: Tensor | None,
    prompts: Sequence[str],
    settings: SampleConfig,
    encode_texts: EncodeTexts | None = None,
) -> EpsModel:
    """A noise predictor with hint, prompts and guidance in it; all that is constant is computed here."""
    guided = settings.scale != 1
    negatives = [settings.negative_prompt] * len(prompts) if guided else []
    cond = {"c_crossattn": [(encode_texts or model.get_learned_conditioning)([*negatives, *prompts])]}
    if hint is not None:
        features = model.control_model.encode_hint(hint.to(model.device)).features
        features = features.expand(len(prompts), -1, -1, -1)
        both = guided and not settings.guess_mode  # in guess mode the unconditional half has no control
        cond["c_concat"] = [HintFeatures(features.repeat(2, 1, 1, 1) if both else features)]
        scales = model.control_scales
        fading = guess_mode_scales(settings.strength, len(scales))
        strengths = fading if settings.guess_mode else [settings.strength] * len(scales)
        cond["control_scales"] = [s * scale for s, scale in zip(strengths, scales, strict=True)]
    cond = model.precompute_cond(cond)

    def predict_eps(x: Tensor, t: int) -> Tensor:
        return model.predict_eps(x, t, cond)

    return classifier_free_guidance(predict_eps, settings.scale) if guided else predict_eps


def decode(model: ControlledModel, z: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> images (B, H, W, 3) uint8 on the CPU, a few at a time to bound the memory."""
    at_once = max(1, DECODED_AT_ONCE // (z.shape[-2] * z.shape[-1]))
    images = torch.cat([model.decode_first_stage(part).float() for part in z.split(at_once)])
    if not images.isfinite().all():
        raise ValueError(
            "the sampled image is not finite; use float32 (--precision 32, train.precision=32-true), "
            "or check the weights for NaN"
        )
    return to_uint8(images)


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 on the CPU."""
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def check_counts(hint: Tensor | None, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Refuse prompts, seeds and hints that do not belong together."""
    rows = len(seeds) if hint is None or len(hint) == 1 else len(hint)
    if not len(prompts) == len(seeds) == rows or not rows:
        raise ValueError(
            f"expected a prompt and a seed for each image, and one hint or as many, found {len(prompts)} "
            f"prompts, {len(seeds)} seeds and {0 if hint is None else len(hint)} hints"
        )


def check_start(start: Start, shape: tuple[int, ...]) -> Tensor:
    """The latents of a start, if they are of the batch and there is a timestep for them."""
    if tuple(start.latents.shape) != tuple(shape) or not start.timesteps:
        raise ValueError(
            f"expected latents {tuple(shape)} to start from and a timestep or more, found"
            f" {tuple(start.latents.shape)} and {len(start.timesteps)} timesteps"
        )
    return start.latents


def find_sampler(name: str) -> Sampler:
    """Look a sampler up by name."""
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def image_size(hint: Tensor | None, size: tuple[int, int] | None) -> tuple[int, int]:
    """Size of the images: asked for, or that of the hint; the two must agree and be multiples of 64."""
    of_hint = None if hint is None else (hint.shape[-2], hint.shape[-1])
    height, width = size or of_hint or (0, 0)
    if not height or height % 64 or width % 64:
        raise ValueError(f"expected a size in multiples of 64, found {height}x{width}")
    if of_hint not in (None, (height, width)):
        raise ValueError(
            f"expected a hint of {height}x{width}, found {of_hint[0]}x{of_hint[1]}; resize it first"
        )
    return height, width
