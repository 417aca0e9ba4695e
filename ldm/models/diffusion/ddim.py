"""DDIM sampling (Song et al. 2021, arXiv:2010.02502)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.models.diffusion.guidance import EpsModel

StepCallback = Callable[[int, Tensor], None]
"""Called after each step with its number, from 0, and the predicted x_0 (B, C, h, w)."""


@torch.no_grad()
def sample_ddim(
    predict_eps: EpsModel,
    x: Tensor,
    timesteps: Sequence[int],
    abar: Sequence[float],
    *,
    eta: float = 0.0,
    noise_like: Callable[[Tensor], Tensor] = torch.randn_like,
    callback: StepCallback | None = None,
) -> Tensor:
    """Carry `x` from noise level timesteps[0] down to level abar[0], one step a timestep.

    Eq. 12 and 16; their alpha_t is our abar[t].

    x           (B, C, h, w)  latent at level timesteps[0]; the caller chose that level
    timesteps   S ints        strictly decreasing, each in [0, T)
    abar        T floats      cumulative product of 1 - beta, on the host
    eta         0 is deterministic, 1 is ancestral sampling
    noise_like  draws the noise of a step; not called at eta 0
    returns     (B, C, h, w)  latent at level abar[0], where Stable Diffusion ends
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"expected eta in 0..1, found {eta}")
    levels = [*(abar[t] for t in timesteps), abar[0]]
    for step, t in enumerate(timesteps):
        now, after = levels[step], levels[step + 1]
        eps = predict_eps(x, t)
        x_0 = (x - (1 - now) ** 0.5 * eps) / now**0.5
        sigma = eta * ((1 - after) / (1 - now) * (1 - now / after)) ** 0.5  # Eq. 16
        x = after**0.5 * x_0 + (1 - after - sigma**2) ** 0.5 * eps  # Eq. 12
        if sigma > 0:
            x = x + sigma * noise_like(x)
        if callback is not None:
            callback(step, x_0)
    return x
