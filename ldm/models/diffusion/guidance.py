"""Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

EpsModel: TypeAlias = Callable[[Tensor, int], Tensor]
"""(x (B, C, h, w), timestep) -> predicted noise (B, C, h, w)."""


def classifier_free_guidance(predict_eps: EpsModel, scale: float) -> EpsModel:
    """Guide a predictor that knows two conditions, in one batch.

    predict_eps  takes 2B latents: first half without, second half with the prompt
    scale        eps = eps_u + scale * (eps_c - eps_u); 1 is no guidance
    returns      a predictor of B latents
    """

    def guided(x: Tensor, t: int) -> Tensor:
        eps_u, eps_c = predict_eps(torch.cat([x, x]), t).chunk(2)
        return eps_u + scale * (eps_c - eps_u)

    return guided
