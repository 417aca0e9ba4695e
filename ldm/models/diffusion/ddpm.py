"""The training module of a latent diffusion model; `cldm.cldm.ControlLDM` adds the control branch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.models.diffusion.draws import NOISE, OFFSET, POSTERIOR, Draws
from ldm.models.diffusion.memory import PosteriorMemory
from ldm.models.diffusion.schedule import NoiseSchedule, make_betas, min_snr_weights
from ldm.models.optimizer import AdamWInBackward
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

Batch = Mapping[str, Any]
Cond = dict[str, Any]
"""`c_crossattn`: [text (B, L, D)], `c_concat`: [hint (B, C, H, W)] or None."""


class DiffusionWrapper(nn.Module):
    """Gives the UNet the name that checkpoints know it by, `model.diffusion_model`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = unet


class LatentDiffusion(NoiseSchedule, pl.LightningModule):
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
        first_stage_key: str = "jpg",
        cond_stage_key: str = "txt",
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
        self.first_stage_key = first_stage_key
        self.cond_stage_key = cond_stage_key
        self.scale_factor = scale_factor
        self.learning_rate = 1e-5
        self.memory: PosteriorMemory | None = None  # settable; keeps what was encoded, by the batch's `key`
        self.known_texts: Callable[[Sequence[str]], Tensor] | None = None  # settable; their embeddings
        self.lend_stages: Callable[[], AbstractContextManager[None]] = nullcontext  # settable; see cldm.shelf
        self.noise_seed = 0  # settable; of the draws for samples that have a number
        self.rate_schedule: Callable[[int], float] | None = None  # settable; part of the rate at a step
        self.update_in_backward = False  # settable; where gradients need not all be there
        self.in_backward: AdamWInBackward | None = None  # of this training
        self.average: Any = None  # settable; a cldm.averaging.WeightAverage to evaluate with
        self.is_compiled = False  # settable; see cldm.fast_path
        self.validation_loss: tuple[int, float] | None = None  # settable; the last one and its step
        self.offset_noise = 0.0  # settable; standard deviation of what a channel's noise has in common
        self.min_snr_gamma = 0.0  # settable; 0 weighs all noise levels alike
        self.register_schedule(make_betas(beta_schedule, linear_start, linear_end, timesteps))
        self.model = DiffusionWrapper(instantiate_from_config(unet_config))
        self.first_stage_model = instantiate_from_config(first_stage_config)
        self.cond_stage_model = instantiate_from_config(cond_stage_config)
        for module in self.frozen_modules:
            module.requires_grad_(False).eval()

    @property
    def frozen_modules(self) -> tuple[nn.Module, nn.Module]:
        """First stage and text encoder."""
        return self.first_stage_model, self.cond_stage_model

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Switch the mode of what is trained; first stage and text encoder stay in evaluation mode."""
        super().train(mode)
        for module in self.frozen_modules:
            module.eval()
        return self

    # -- data to latents and back ------------------------------------------------------------------------

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

    def get_input(self, batch: Batch, k: str, bs: int | None = None) -> tuple[Tensor, Cond]:
        """Latent and condition of a batch whose image (B, H, W, 3) in [-1, 1] has the key `k`.

        bs  use the first `bs` samples only
        """
        posterior = self.posterior_of(batch, k, bs)
        noise = self.draws_of(batch, bs).normal(POSTERIOR, posterior.mean.shape)
        z = self.get_first_stage_encoding(posterior.at(noise)).float()
        texts = batch[self.cond_stage_key][:bs]
        if self.known_texts and self.training:
            return z, {"c_crossattn": [self.known_texts(texts).to(self.device, non_blocking=True)]}
        return z, {"c_crossattn": [self.get_learned_conditioning(texts)]}

    def posterior_of(self, batch: Batch, k: str, bs: int | None = None) -> DiagonalGaussianDistribution:
        """The latent's distribution, not scaled: of the batch's `moments` (B, 2C, h, w), or of its image."""
        if "moments" in batch:
            return DiagonalGaussianDistribution(batch["moments"][:bs].to(self.device, torch.float32))
        image = channels_first(batch[k][:bs], self.device)
        if self.memory and self.training:
            return self.memory.recall(batch["key"][:bs], image, self.encode_first_stage)
        return self.encode_first_stage(image)

    def draws_of(self, batch: Batch, bs: int | None = None) -> Draws:
        """What is random about a batch, by the `number` of each sample where it has them."""
        numbers = batch["number"][:bs].tolist() if "number" in batch else None
        return Draws(self.noise_seed, numbers, self.device)

    # -- training ----------------------------------------------------------------------------------------

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """As Lightning does, but numbers stay on the host, which uses them: reading waits for the device."""
        moved = {name: value for name, value in batch.items() if name != "number"}
        moved = super().transfer_batch_to_device(moved, device, dataloader_idx)
        return moved | ({"number": batch["number"]} if "number" in batch else {})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch at random noise levels (Ho et al. 2020, Algorithm 1)."""
        x_start, cond = self.get_input(batch, self.first_stage_key)
        draws = self.draws_of(batch)
        t, noise = draws.levels(len(x_start), self.num_timesteps), draws.normal(NOISE, x_start.shape)
        if self.offset_noise:  # Guttenberg 2023: so that the mean brightness is learned as well
            noise = noise + self.offset_noise * draws.normal(OFFSET, x_start[..., :1, :1].shape)
        loss, logs = self.p_losses(x_start, cond, t, noise)
        self.log_dict(logs, prog_bar=True, batch_size=len(x_start))
        return loss

    def p_losses(
        self, x_start: Tensor, cond: Cond, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the prediction at noise levels `t`, and what to log.

        With `min_snr_gamma` the loss is weighted by level; what is logged never is.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        prediction = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        target = noise if self.parameterization == "eps" else self.get_v(x_start, noise, t)
        simple = loss = F.mse_loss(prediction.float(), target.float())
        if self.min_snr_gamma:
            weights = min_snr_weights(self.alphas_cumprod[t], self.min_snr_gamma, self.parameterization)
            errors = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
            loss = (weights * errors).mean()
        return loss, {f"{'train' if self.training else 'val'}/loss_simple": simple.detach()}

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

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer gets: nothing frozen."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the gradient; Lightning's own refuses to, for a fused optimizer under autocast."""
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.trainable_parameters(), gradient_clip_val)

    def configure_optimizers(self) -> Any:
        """Fused AdamW, on a CPU five times as fast as the loop over parameters; inside backward if it can be.

        In 16-mixed a fused one would unscale the gradients itself, after they are clipped, so not then.
        """
        self.release_optimizer()
        how = self._trainer
        clips, scales = how and how.gradient_clip_val, how and how.precision == "16-mixed"
        whole = clips or scales or how is None or how.accumulate_grad_batches > 1 or how.world_size > 1
        optimizer: torch.optim.AdamW
        if self.update_in_backward and not whole:
            optimizer = self.in_backward = AdamWInBackward(self.trainable_parameters(), self.learning_rate)
        else:
            fused = not (clips and scales)
            optimizer = torch.optim.AdamW(self.trainable_parameters(), self.learning_rate, fused=fused)
        if self.rate_schedule is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_end(self) -> None:
        """Leave no hooks of the optimizer behind."""
        self.release_optimizer()

    def release_optimizer(self) -> None:
        """End what updates inside backward, also of a training that failed."""
        if self.in_backward is not None:
            self.in_backward.release()
            self.in_backward = None


def channels_first(images: Tensor, device: torch.device) -> Tensor:
    """(B, H, W, C) -> contiguous (B, C, H, W) float32 on `device`."""
    images = torch.as_tensor(images).to(device=device, dtype=torch.float32)
    return images.permute(0, 3, 1, 2).contiguous()


def join_context(parts: Sequence[Any]) -> Any:
    """The parts of a condition as one; a single part, also a precomputed one, is passed on as it is."""
    return torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0]
