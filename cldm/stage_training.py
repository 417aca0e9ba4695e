"""What the trainings of all stages share: steps that the batch names, a rate for each, AdamW, clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import nn

from ldm.models.learning_rate import rate_factor


def noise_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The generator of the noise of a step."""
    # 1 sets it apart from the generator that draws the batch of the same step
    state = int(np.random.SeedSequence([seed, step, 1]).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(state)


class StageTraining(pl.LightningModule):
    """Trains a network on batches that name their `step`.

    Learning rate and noise are functions of that number, so that a run can go on from its weights, its
    optimizer's moments and the number.

    trained  the part whose parameters are trained
    how      the section `train` of a stage: seed, lr, warmup, steps, weight_decay, clip (0 is none)
    """

    def __init__(self, trained: nn.Module, how: DictConfig) -> None:
        super().__init__()
        self.trained, self.how = trained, how

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Give the optimizer the rate of the step."""
        how = self.how
        step = int(batch["step"])
        rate = how.lr * rate_factor(step, schedule="cosine", warmup=how.warmup, steps=how.steps)
        for group in self.optimizers(use_pl_optimizer=False).param_groups:
            group["lr"] = rate

    def noise_of(self, batch: Mapping[str, Any]) -> torch.Generator:
        """The generator of a batch's noise."""
        return noise_generator(self.how.seed, int(batch["step"]), self.device)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the norm of the gradient; Lightning refuses to, for a fused optimizer under autocast."""
        if self.how.clip:
            torch.nn.utils.clip_grad_norm_(self.trained.parameters(), self.how.clip)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW in its fused form, which is five times as fast on a CPU.

        The vectors of single words do not decay, or those of words that are not used would vanish.
        """
        words = [p for name, p in self.trained.named_parameters() if "token_embedding" in name]
        others = [p for name, p in self.trained.named_parameters() if "token_embedding" not in name]
        groups = [
            {"params": some, "weight_decay": decay}
            for some, decay in ((others, self.how.weight_decay), (words, 0.0))
            if some
        ]
        return torch.optim.AdamW(groups, lr=self.how.lr, betas=(0.9, 0.99), fused=True)
