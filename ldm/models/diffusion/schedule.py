"""The noise schedule: its buffers, the formulas on them, and which timesteps a sampler visits.

Notation of Ho et al. 2020 (arXiv:2006.11239): x_t ~ N(sqrt(abar_t) x_0, 1 - abar_t), abar_t = prod(1 - beta).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BETA_SCHEDULES = {
    # Stable Diffusion calls "linear" what is linear in sqrt(beta); diffusers calls it "scaled_linear".
    "linear": lambda start, end, n: (
        torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64, device="cpu") ** 2
    )
}


def make_betas(schedule: str, linear_start: float, linear_end: float, timesteps: int) -> Tensor:
    """(timesteps,) float64 noise added at each step."""
    if schedule not in BETA_SCHEDULES:
        raise ValueError(f"unknown beta_schedule {schedule!r}; choose one of {', '.join(BETA_SCHEDULES)}")
    return BETA_SCHEDULES[schedule](linear_start, linear_end, timesteps)


def schedule_buffers(betas: Tensor) -> dict[str, Tensor]:
    """The buffers that published checkpoints hold, from (T,) float64 betas; all (T,) float32."""
    alphas = 1 - betas
    abar = alphas.cumprod(0)
    abar_prev = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
    posterior_variance = betas * (1 - abar_prev) / (1 - abar)  # Eq. 7
    buffers = {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": abar_prev,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(),
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": posterior_variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * abar_prev.sqrt() / (1 - abar),  # Eq. 7
        "posterior_mean_coef2": (1 - abar_prev) * alphas.sqrt() / (1 - abar),
        "logvar": torch.zeros_like(betas),
    }
    return {name: values.float() for name, values in buffers.items()}


def at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """values[t] shaped to multiply `like`: (T,), (B,) -> (B, 1, 1, ...)."""
    return values[t].view(-1, *[1] * (like.ndim - 1))


def min_snr_weights(abar: Tensor, gamma: float, parameterization: str) -> Tensor:
    """Loss weights of noise levels, in the shape of `abar`: what is nearly clean counts less.

    min(SNR, gamma) / SNR for a predicted eps, / (SNR + 1) for a predicted v, with SNR = abar / (1 - abar)
    (Hang et al. 2023, arXiv:2303.09556, section 3.4).
    """
    snr = abar / (1 - abar)
    return snr.clamp(max=gamma) / (snr if parameterization == "eps" else snr + 1)


class NoiseSchedule(nn.Module):
    """Mix-in: schedule buffers on the module itself, where checkpoints have them, and the formulas.

    In all of them t is (B,) int64 and latents are (B, C, h, w).
    """

    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor

    def register_schedule(self, betas: Tensor) -> None:
        """Register the buffers of `schedule_buffers`."""
        for name, values in schedule_buffers(betas).items():
            self.register_buffer(name, values)

    @property
    def num_timesteps(self) -> int:
        """Number of noise levels T."""
        return len(self.betas)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t given x_0 (Eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = at(self.sqrt_alphas_cumprod, t, x_start) * x_start
        return signal + at(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of x_{t-1} given x_t and x_0 (Eq. 7)."""
        mean = at(self.posterior_mean_coef1, t, x_t) * x_start + at(self.posterior_mean_coef2, t, x_t) * x_t
        variance = at(self.posterior_variance, t, x_t)
        return mean, variance, at(self.posterior_log_variance_clipped, t, x_t)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 from x_t and the noise in it (Eq. 4 solved for x_0)."""
        scaled = at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        return scaled - at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * noise

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Velocity v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans and Ho 2022, section 4)."""
        return at(self.sqrt_alphas_cumprod, t, x) * noise - at(self.sqrt_one_minus_alphas_cumprod, t, x) * x

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = sqrt(abar) x_t - sqrt(1 - abar) v."""
        return at(self.sqrt_alphas_cumprod, t, x_t) * x_t - at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * v

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """eps = sqrt(abar) v + sqrt(1 - abar) x_t."""
        return at(self.sqrt_alphas_cumprod, t, x_t) * v + at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * x_t


def check_steps(num_steps: int, num_timesteps: int) -> None:
    """Refuse a number of steps that the schedule does not have."""
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"steps must lie in 1..{num_timesteps}, found {num_steps}")


def ddim_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """Exactly `num_steps` decreasing timesteps, evenly spaced, the last one 1.

    i * T / S + 1 as published (20 steps of 1000: 951, 901, ..., 1), rounded down where S does not divide T.
    Only S = T has no room for the + 1 and ends at 0.
    """
    check_steps(num_steps, num_timesteps)
    offset = int(num_steps < num_timesteps)
    return [i * num_timesteps // num_steps + offset for i in reversed(range(num_steps))]


def uniform_timesteps(num_steps: int, num_timesteps: int = 1000) -> list[int]:
    """Exactly `num_steps` decreasing timesteps from T - 1 on, evenly spaced so that one more would be 0.

    The spacing of DPM-Solver++ (20 steps of 1000: 999, 949, ..., 50). Only S = T visits 0 itself.
    """
    check_steps(num_steps, num_timesteps)
    if num_steps == num_timesteps:
        return list(reversed(range(num_timesteps)))
    # Divided first, so that a tie such as 499.5 falls where numpy.linspace, in diffusers, lets it.
    stride = (num_timesteps - 1) / num_steps
    return [round(i * stride) for i in reversed(range(1, num_steps + 1))]


def timesteps_from(
    start: int, grid: Sequence[int], num_steps: int | None = None, num_timesteps: int = 1000
) -> list[int]:
    """Decreasing timesteps of a run that starts in the midst of noising; the first one is `start`.

    start      0..T-1, whether it is on the grid or not
    grid       timesteps of a whole run; those below `start` follow it
    num_steps  exactly so many instead, from `start` down as `uniform_timesteps` spaces them
    """
    if not 0 <= start < num_timesteps:
        raise ValueError(f"expected a timestep in 0..{num_timesteps - 1} to start from, found {start}")
    if num_steps is None:
        return [start, *(t for t in grid if t < start)]
    if not 1 <= num_steps <= start + 1:
        raise ValueError(
            f"expected 1..{start + 1} steps, as there are timesteps from {start} down, found {num_steps}"
        )
    return uniform_timesteps(num_steps, start + 1)
