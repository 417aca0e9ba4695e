"""Small pieces that the networks share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding of noise levels, cosines before sines (Vaswani et al. 2017, section 3.5).

    timesteps  (B,)      any real dtype; fractions allowed
    returns    (B, dim)  float32; the last column is zero when `dim` is odd
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter of `module` to zero and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def maybe_checkpoint(function: Callable[..., Tensor], *inputs: object, active: bool) -> Tensor:
    """Call `function`; when `active`, recompute it in backward instead of storing its activations.

    Without a gradient to come, in a frozen block whose inputs need none, there is nothing to save.
    """
    owner = getattr(function, "__self__", None)
    parameters = owner.parameters() if isinstance(owner, nn.Module) else ()
    tensors = (x for x in (*inputs, *parameters) if isinstance(x, Tensor))
    if active and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
