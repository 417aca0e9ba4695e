"""A latent diffusion model to use: networks, schedule, and the ways between image and latent.

`ldm.models.diffusion.ddpm.LatentDiffusion` trains one; this part of it does without Lightning, whose import
takes longer than that of all else together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.models.diffusion.schedule import NoiseSchedule, make_betas
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config

Cond = dict[str, Any]
"""`c_crossattn`: [text (B, L, D)], `c_concat`: [hint (B, C, H, W)] or None."""


class DiffusionWrapper(nn.Module):
    """Gives the UNet the name that checkpoints know it by, `model.diffusion_model`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = unet


class LatentModel(NoiseSchedule):
    """Diffusion in the latent space of a frozen autoencoder, conditioned on frozen text embeddings.

    The parameters are those of the published model YAML files. Latents are "times scale_factor" everywhere
    but inside the autoencoder.
    """

    unused_params: ClassVar[frozenset[str]] = frozenset(
        {
            "num_timesteps_cond",
            "log_every_t",
            "image_size",
            "channels",
            "conditioning_key",
            "monitor",
            "use_ema",
            "ckpt_path",
            "ignore_keys",
            "clip_denoised",
            "given_betas",
            "loss_type",
            "first_stage_key",  # these two matter in training alone
            "cond_stage_key",
        }
    )
    fixed_params: ClassVar[dict[str, Any]] = {
        "cond_stage_trainable": False,
        "learn_logvar": False,
        "scale_by_std": False,
        "v_posterior": 0.0,
    }

    def __init__(
        self,
        *,
        unet_config: Mapping[str, Any],
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        linear_start: float = 0.00085,
        linear_end: float = 0.0120,
        scale_factor: float = 0.18215,
        parameterization: str = "eps",
    ) -> None:
        super().__init__()
        if parameterization not in ("eps", "v"):
            raise ValueError(f"parameterization must be 'eps' or 'v', found {parameterization!r}")
        self.parameterization = parameterization
        self.scale_factor = scale_factor
        self.register_schedule(make_betas(beta_schedule, linear_start, linear_end, timesteps))
        self.model = DiffusionWrapper(instantiate_from_config(unet_config))
        self.first_stage_model = instantiate_from_config(first_stage_config)
        self.cond_stage_model = instantiate_from_config(cond_stage_config)
        for module in self.frozen_modules:
            module.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.betas.device

    @property
    def frozen_modules(self) -> tuple[nn.Module, nn.Module]:
        """First stage and text encoder."""
        return self.first_stage_model, self.cond_stage_model

    def train(self, mode: bool = True) -> LatentModel:
        """Switch the mode of what is trained; first stage and text encoder stay in evaluation mode."""
        super().train(mode)
        for module in self.frozen_modules:
            module.eval()
        return self

    # -- image to latent and back ------------------------------------------------------------------------

    @torch.no_grad()
    def encode_first_stage(self, image: Tensor) -> DiagonalGaussianDistribution:
        """(B, 3, H, W) in [-1, 1] -> distribution of the latent, not scaled."""
        with self.full_precision():
            return self.first_stage_model.encode(image)

    def get_first_stage_encoding(self, posterior: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """Draw a latent (B, C, h, w) and scale it; a tensor is taken as the draw."""
        z = posterior if isinstance(posterior, Tensor) else posterior.sample()
        return self.scale_factor * z

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Latent (B, C, h, w) -> image (B, 3, H, W), about [-1, 1]."""
        with self.full_precision():
            return self.first_stage_model.decode(z / self.scale_factor)

    def full_precision(self) -> torch.autocast:
        """Keep the first stage out of autocast: fp16 can overflow in it, bf16 shows in the image."""
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def get_learned_conditioning(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, L, D), L = 77 for each chunk that the longest of them needs."""
        return self.cond_stage_model(list(texts))

    # -- prediction --------------------------------------------------------------------------------------

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the network predicts, eps or v: x_noisy (B, C, h, w), t (B,) -> (B, C, h, w)."""
        return self.model.diffusion_model(x_noisy, t, join_context(cond["c_crossattn"]))

    def predict_eps(self, x: Tensor, t: int, cond: Cond) -> Tensor:
        """Noise in `x`, all of it at level `t`, whatever the network predicts."""
        levels = torch.full((len(x),), t, device=x.device)
        prediction = self.apply_model(x, levels, cond)
        return (
            prediction
            if self.parameterization == "eps"
            else self.predict_eps_from_z_and_v(x, levels, prediction)
        )


def channels_first(images: Tensor, device: torch.device) -> Tensor:
    """(B, H, W, C) -> contiguous (B, C, H, W) float32 on `device`."""
    images = torch.as_tensor(images).to(device=device, dtype=torch.float32)
    return images.permute(0, 3, 1, 2).contiguous()


def join_context(parts: Sequence[Any]) -> Any:
    """The parts of a condition as one; a single part, also a precomputed one, is passed on as it is."""
    return torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0]
