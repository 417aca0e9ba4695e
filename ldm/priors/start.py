"""How low sampling may start: what a prior does not know of an image, measured at a noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.priors.prior import Gaussian

START_LOSS = 0.01  # nats a value; what SCP-Diff's own start at 799 leaves where the prior's variance is 0.5


def start_loss(prior: Gaussian, mean: Tensor, variance: Tensor, abar: float) -> float:
    """Mean Kullback-Leibler divergence of the start at a level from an image's own noised latent, in nats.

    KL(q(x_t | image) || prior at t), divided by the number of values: how much of the image the start does
    not have. It falls with the noise, because both sides are noised alike (data processing inequality).

    prior           of the images, (B, h, w, C)
    mean, variance  (B, C, h, w) of the posteriors of the images' latents, scaled
    abar            level, in 0..1 without the ends
    """
    delta = mean.double().movedim(1, -1) - prior.mean
    own = abar * variance.double().movedim(1, -1) + (1 - abar)
    if prior.variance.ndim == prior.mean.ndim:
        start = abar * prior.variance + (1 - abar)
        return float(((own + abar * delta**2) / start - 1 - (own / start).log()).mean() / 2)
    channels = delta.shape[-1]
    start = abar * prior.variance + (1 - abar) * torch.eye(channels, dtype=delta.dtype)
    second = torch.diag_embed(own) + abar * delta[..., :, None] * delta[..., None, :]
    trace = torch.linalg.solve(start, second).diagonal(dim1=-2, dim2=-1).sum(-1)
    logs = torch.linalg.slogdet(start).logabsdet - own.log().sum(-1)
    return float((trace - channels + logs).mean() / (2 * channels))


def lowest_start(
    prior: Gaussian, mean: Tensor, variance: Tensor, abar: Sequence[float], loss: float = START_LOSS
) -> tuple[int, float]:
    """The lowest timestep at which the start loss is at most `loss`, and the loss there; else the last one.

    abar  T levels, falling; the other arguments as for `start_loss`
    """
    low, high = 0, len(abar) - 1
    while low < high:
        middle = (low + high) // 2
        if start_loss(prior, mean, variance, abar[middle]) <= loss:
            high = middle
        else:
            low = middle + 1
    return low, start_loss(prior, mean, variance, abar[low])
