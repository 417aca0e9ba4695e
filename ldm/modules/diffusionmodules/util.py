"""Small pieces that the networks share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Where a map has as few pixels in all its batch, and its layer as many channels, the work is to read the
# weight. Forward and backward of 1280 channels on one core with AMX, by oneDNN and by a product: at 8x8 216
# and 160 ms in float32, 112 and 35 ms in bf16; at 16x16 603 and 547 ms, 169 and 89 ms.
FEW_PIXELS, MANY_CHANNELS = 256, 512


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


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with a border of zeros; a single matrix product on small maps of many channels.

    oneDNN brings a weight into an order of its own at each call, and its gradient back. On small maps of a
    CPU that takes longer than the sums.
    """

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(channels, out_channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h / stride, w / stride), rounded up."""
        stride = self.stride[0]
        size = tuple((side - 1) // stride + 1 for side in x.shape[2:])
        few = x.shape[0] * size[0] * size[1] <= FEW_PIXELS
        if not few or self.in_channels < MANY_CHANNELS or x.device.type != "cpu":
            return super().forward(x)
        if self.weight.is_contiguous():
            patches = F.unfold(x, 3, padding=1, stride=stride).transpose(1, 2)
            weight = self.weight.flatten(1)
        else:  # channels last
            padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
            windows = padded.unfold(1, 3, stride).unfold(2, 3, stride)
            patches = windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)
            weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, self.bias).transpose(1, 2).unflatten(2, size)


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
