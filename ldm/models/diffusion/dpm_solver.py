"""DPM-Solver++(2M) sampling (Lu et al. 2022, arXiv:2211.01095)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import StepCallback
from ldm.models.diffusion.guidance import EpsModel


def half_log_snr(abar: float) -> float:
    """lambda = log(alpha / sigma) with alpha^2 = abar, sigma^2 = 1 - abar; infinite without noise."""
    return 0.5 * math.log(abar / (1 - abar)) if abar < 1 else math.inf


@torch.no_grad()
def sample_dpm_solver(
    predict_eps: EpsModel,
    x: Tensor,
    timesteps: Sequence[int],
    abar: Sequence[float],
    *,
    end: float | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Carry `x` from noise level timesteps[0] down to level `end`, one step a timestep.

    Algorithm 2: second order from the predictions of this step and the one before. The first step is first
    order, and so is the last one of a run below 15 steps or of one that ends without noise, where the second
    order is unstable.

    x          (B, C, h, w)  latent at level timesteps[0]; the caller chose that level
    timesteps  S ints        strictly decreasing, each in [0, T)
    abar       T floats      cumulative product of 1 - beta, on the host
    end        level of the result; abar[0] by default, 1 is no noise
    returns    (B, C, h, w)  latent at level `end`
    """
    end = abar[0] if end is None else end
    levels = [*(abar[t] for t in timesteps), end]
    last = len(timesteps) - 1
    previous: Tensor | None = None
    for step, t in enumerate(timesteps):
        now, after = levels[step], levels[step + 1]
        h = half_log_snr(after) - half_log_snr(now)
        x_0 = (x - (1 - now) ** 0.5 * predict_eps(x, t)) / now**0.5
        data = x_0
        if previous is not None and not (step == last and (last < 14 or end == 1)):
            h_before = half_log_snr(now) - half_log_snr(levels[step - 1])
            data = x_0 + h / (2 * h_before) * (x_0 - previous)  # Algorithm 2, line 9
        x = ((1 - after) / (1 - now)) ** 0.5 * x - after**0.5 * math.expm1(-h) * data  # Eq. 9
        previous = x_0
        if callback is not None:
            callback(step, x_0)
    return x
