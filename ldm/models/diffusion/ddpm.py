"""The training module of a latent diffusion model; `cldm.cldm.ControlLDM` adds the control branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.models.diffusion.draws import NOISE, OFFSET, POSTERIOR, Draws
from ldm.models.diffusion.latent import Cond, LatentModel, channels_first
from ldm.models.diffusion.memory import PosteriorMemory
from ldm.models.diffusion.schedule import min_snr_weights
from ldm.models.optimizer import AdamWInBackward
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

Batch = Mapping[str, Any]


class LatentDiffusion(LatentModel, pl.LightningModule):
    """A latent model as Lightning trains it; in a batch, images and texts have the two keys."""

    def __init__(
        self,
        *,
        first_stage_key: str = "jpg",
        cond_stage_key: str = "txt",
        **latent_model: Any,  # the parameters of LatentModel, which names and checks them
    ) -> None:
        super().__init__(**latent_model)
        self.first_stage_key = first_stage_key
        self.cond_stage_key = cond_stage_key
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

    # -- a batch -----------------------------------------------------------------------------------------

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
