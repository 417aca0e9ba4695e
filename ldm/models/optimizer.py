"""AdamW that takes each gradient as soon as backward has it, so that they are never all in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 100_000_000  # weights; with fewer the many small updates cost a miniature a third of its step


class AdamWInBackward(torch.optim.AdamW):
    """Fused AdamW (Loshchilov, Hutter 2019) whose steps happen inside backward, the same bit by bit.

    A hook updates each weight and frees its gradient, which saves the memory of all gradients, as many bytes
    as the weights have. So a step has to be one backward, and nothing may want to see or change all gradients
    in between: no accumulation, no clipping, no averaging over processes. Where `found_inf` is set before
    backward, the step changes nothing. Its state is that of AdamW.
    """

    param_groups: list[dict[str, Any]]
    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[nn.Parameter], lr: float, **options: Any) -> None:
        super().__init__(params, lr=lr, fused=True, **options)
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(self.update)
            for group in self.param_groups
            for parameter in group["params"]
        ]

    def update(self, parameter: nn.Parameter) -> None:
        """Step with one weight alone; only what all weights of a run share may stand in its group."""
        groups = self.param_groups
        self.param_groups = [{**groups[0], "params": [parameter]}]
        try:
            super().step()
        finally:
            self.param_groups = groups
        parameter.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, whose backward updates."""
        return None if closure is None else closure()

    def release(self) -> None:
        """Take the hooks away, so that a later optimizer does not share the gradients with this one."""
        for hook in self.hooks:
            hook.remove()


def pays_in_backward(params: Iterable[nn.Parameter], device: torch.device) -> bool:
    """Whether updating inside backward is the better default: on a CPU, where there is much to save."""
    return device.type == "cpu" and sum(parameter.numel() for parameter in params) >= LARGE
