"""A running average of weights, which is better than the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential average of what is trained of a module; early on the decay is smaller: the start fades.

    decay  what remains of the average at each step, once (1 + n) / (10 + n) has grown to it at step n
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: value.detach().clone() for name, value in trained(module)}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights behind optimizer step `step`, counted from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in trained(module):
            self.tensors[name].lerp_(value, weight)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from an average that was saved."""
        for name, value in self.tensors.items():
            value.copy_(tensors[name])

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the average in the place of the weights for a while, in evaluation mode."""
        parameters = {name: value for name, value in module.named_parameters() if name in self.tensors}
        was_training, kept = module.training, {name: value.data for name, value in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.tensors[name]
            module.eval()
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = kept[name]
            module.train(was_training)


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of what is trained."""
    return ((name, value) for name, value in module.named_parameters() if value.requires_grad)


class AverageWeights(pl.Callback):
    """Keeps the average of what a run trains; grids, validation and saved weights are those of the average.

    The model's `average` is set to it, for whoever evaluates.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: WeightAverage | None = None
        self.found: Mapping[str, Tensor] = {}
        self.last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the weights as they are, or go on."""
        self.average = WeightAverage(pl_module, self.decay)
        if self.found:
            self.average.load(self.found)
        self.found, self.last_step = {}, trainer.global_step
        pl_module.average = self.average

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Take in the weights of each optimizer step."""
        if trainer.global_step != self.last_step and self.average is not None:
            self.last_step = trainer.global_step
            self.average.update(pl_module, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {} if self.average is None else dict(self.average.tensors)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what is loaded until the weights are on their device."""
        self.found = state_dict
