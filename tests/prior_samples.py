"""What the tests of sampling from priors share: streets, a tiny model, and a prior of made-up moments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cldm.cldm import ControlLDM
from cldm.prior_file import Prior, PriorCard, write_prior
from cldm.prior_pass import encoder_fingerprint
from datasets.label_space import LabelSpace
from ldm.priors.moments import VOID, LatentMoments, Moments

SIZE, LATENT, C, K = (64, 128), (8, 16), 4, 19
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def random_moments(
    seed: int = 0, latent: tuple[int, int] = LATENT, covariance: bool = False
) -> LatentMoments:
    """Moments of 50 images that no data set has; some cells are empty, some classes unseen."""
    rng = np.random.default_rng(seed)

    def table(*groups: int, low: int) -> Moments:
        count = rng.integers(low, 50, groups)
        mean = rng.normal(0, 0.8, (*groups, C)) * (count > 0)[..., None]
        if not covariance:
            return Moments(count, mean, rng.uniform(0.05, 0.9, (*groups, C)) * count[..., None])
        factor = rng.normal(0, 0.5, (*groups, C, C))
        return Moments(count, mean, factor @ factor.swapaxes(-1, -2) * count[..., None, None])

    places, joint = table(*latent, low=1), table(K, *latent, low=-20)
    joint.count.clip(0, out=joint.count)
    joint.mean[joint.count == 0] = joint.m2[joint.count == 0] = 0
    places.count[:] = 50
    return LatentMoments(places, table(K, low=1), table(K, low=1), joint)


def write_random_prior(
    path: Path, model: ControlLDM, moments: LatentMoments | None = None, **change: Any
) -> LatentMoments:
    """A file of such moments that fits the tiny model at SIZE."""
    moments = random_moments() if moments is None else moments
    latent = moments.shape[1:]
    card = PriorCard(
        dataset="streets",
        split="train",
        rows={},
        selection={},
        total=50,
        first_stage=encoder_fingerprint(model.first_stage_model),
        scale_factor=model.scale_factor,
        size=(8 * latent[0], 8 * latent[1]),
        label_space="cityscapes",
        classes=tuple(LabelSpace.load("cityscapes").names),
        covered=((0, 50),),
    )
    card = PriorCard(**{**vars(card), **change})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_prior(path, Prior(card, moments))
    return moments


def joint_by_loops(
    moments: LatentMoments, label: NDArray[np.integer], shrinkage: float
) -> tuple[NDArray, NDArray]:
    """Mean and variance (C, h, w) of spatial-class-joint, a cell at a time from the sums of x and x^2."""
    mean, variance = (np.zeros((C, *label.shape)) for _ in range(2))
    for y, x in np.ndindex(label.shape):
        spatial = moments.places.mean[y, x], moments.places.m2[y, x] / moments.places.count[y, x]
        k = label[y, x]
        n = 0 if k == VOID else moments.joint.count[k, y, x]
        first, second, total = 0.0, 0.0, 0.0
        parts = [(shrinkage if n else 1.0, *spatial)]
        if n:
            parts.append((n, moments.joint.mean[k, y, x], moments.joint.m2[k, y, x] / n))
        for weight, m, v in parts:
            first, second, total = first + weight * m, second + weight * (v + m**2), total + weight
        mean[:, y, x] = first / total
        variance[:, y, x] = second / total - (first / total) ** 2
    return mean, variance


def ddim_by_loops(
    model: ControlLDM, x: NDArray, timesteps: list[int], hint: Tensor, prompt: str, scale: float
) -> NDArray[np.uint8]:
    """DDIM as its paper has it, in float64, from given latents (1, C, h, w); an image (H, W, 3)."""

    def predict(x: NDArray, t: int, text: str) -> NDArray:
        cond = {"c_crossattn": [model.get_learned_conditioning([text])], "c_concat": [hint]}
        return model.apply_model(torch.from_numpy(x).float(), torch.tensor([t]), cond).double().numpy()

    with torch.no_grad():
        for t, after in zip(timesteps, [*(ABAR[t] for t in timesteps[1:]), ABAR[0]], strict=True):
            eps = (1 - scale) * predict(x, t, "") + scale * predict(x, t, prompt)
            x_0 = (x - (1 - ABAR[t]) ** 0.5 * eps) / ABAR[t] ** 0.5
            x = after**0.5 * x_0 + (1 - after) ** 0.5 * eps
        return decoded(model, x)


def decoded(model: ControlLDM, x: NDArray) -> NDArray[np.uint8]:
    """The image (H, W, 3) of a latent (1, C, h, w)."""
    with torch.no_grad():
        image = model.decode_first_stage(torch.from_numpy(x).float())[0].permute(1, 2, 0).double()
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def noise_of(seed: int) -> NDArray:
    """The first noise (1, C, h, w) of a seed."""
    return torch.randn(1, C, *LATENT, generator=torch.Generator().manual_seed(seed)).double().numpy()


def files_below(folder: Path) -> Iterator[str]:
    """Names of all files and links of a folder, relative to it."""
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if not path.is_dir())
