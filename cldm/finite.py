"""A loss that is not a number costs one optimizer step, is named, and stops a run when it goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.models.optimizer import AdamWInBackward

log = logging.getLogger(__name__)


class FiniteLoss(pl.Callback):
    """Skips optimizer steps whose loss is not finite on any rank, names their samples, counts them.

    The decision stays on the device: a fused optimizer leaves its weights and moments as they are where
    `found_inf` is set; from any other one the gradients are taken away. What was skipped is read every
    `every` steps, as reading waits for the device.

    limit  skipped steps that a run bears

    Raises
        FloatingPointError  more than that
    """

    def __init__(self, limit: int, every: int = 10) -> None:
        self.limit, self.every = limit, every
        self.skipped = 0
        self.last_step = 0
        self.bad: list[Tensor] = []  # of the batches of this step
        self.keys: list[list[str]] = []
        self.steps: list[tuple[int, Tensor, list[list[str]], list[Tensor]]] = []  # not read yet

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Mapping[str, Any], batch_idx: int
    ) -> None:
        """Remember whose batch it is."""
        self.keys.append([str(key) for key in batch.get("key", ())])

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Look at a loss without reading it."""
        self.bad.append(~torch.isfinite(loss.detach()))
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, AdamWInBackward):
                optimizer.found_inf = self.bad[-1].float()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Decide for all ranks whether the step is done."""
        bad = torch.stack(self.bad).any().float()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if optimizer.param_groups[0].get("fused"):
            optimizer.found_inf, optimizer.grad_scale = bad, None
        elif bad:  # waits for the device
            optimizer.zero_grad(set_to_none=True)
        self.steps.append((trainer.global_step + 1, bad, self.keys, self.bad))
        self.bad, self.keys = [], []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Read now and then."""
        if len(self.steps) >= self.every:
            self.read()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the rest."""
        self.read()

    def read(self) -> None:
        """Count and name what was skipped since the last reading."""
        steps, self.steps = self.steps, []
        flags = torch.stack([bad for _, bad, _, _ in steps]).tolist() if steps else []
        for (step, _, keys, losses), is_bad in zip(steps, flags, strict=True):
            if not is_bad:
                continue
            self.skipped += 1
            own = [key for some, bad in zip(keys, losses, strict=True) if bad.item() for key in some]
            log.warning(
                "skipped optimizer step %d (%d of at most %d): its loss is not finite, with the samples %s",
                step,
                self.skipped,
                self.limit,
                ", ".join(own) or "of another process",
            )
        if self.skipped > self.limit:
            raise FloatingPointError(
                f"expected at most {self.limit} steps with a loss that is not finite, found {self.skipped};"
                " lower train.lr, set train.clip, or look at the samples that are named above"
            )

    def state_dict(self) -> dict[str, Any]:
        """How many were skipped."""
        self.read()
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped = state_dict["skipped"]
