"""A running average of weights, which is better than the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential average of a module's parameters; early on the decay is smaller, so that the start fades.

    decay  what remains of the average at each step, once (1 + n) / (10 + n) has grown to it at step n
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights behind optimizer step `step`, counted from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in module.named_parameters():
            self.tensors[name].lerp_(value, weight)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from an average that was saved."""
        for name, value in self.tensors.items():
            value.copy_(tensors[name])

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the average in the place of the weights for a while, in evaluation mode."""
        parameters, was_training = dict(module.named_parameters()), module.training
        trained = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.tensors[name]
            module.eval()
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = trained[name]
            module.train(was_training)
