"""Training of the first stage on images alone: what is minimised, how it starts, what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

FEATURE_FLOOR = 1e-3  # added to the length of a feature vector, which is of order 1 to 10
STRENGTH_FLOOR = 0.01  # of details, below which their strength has no slope to speak of


@dataclass(frozen=True)
class LossWeights:
    """What each term of the loss counts; all terms are means over the values of the images."""

    pixel: float = 1.0  # absolute difference, more at edges
    square: float = 0.0  # squared difference, more at edges
    pyramid: float = 1.0  # absolute difference of the Laplacian pyramids, summed over their levels
    pyramid_levels: int = 3
    energy: float = 0.0  # absolute difference of the local strength of details, summed over the pyramid
    edge: float = 1.0  # how much more an edge of mean strength counts than a flat place
    kl: float = 1e-4  # nats for each image value: 1 / 48 of nats for each latent value at 8x down
    features: float = 0.0  # `feature_distance` under a network that was trained before


def image_gradient(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W) length of the forward differences, averaged over the channels."""
    dx = F.pad(x[..., 1:] - x[..., :-1], (0, 1))
    dy = F.pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1))
    return (dx**2 + dy**2).sqrt().mean(dim=1, keepdim=True)


def edge_weights(x: Tensor, strength: float) -> Tensor:
    """(B, 1, H, W) of mean 1 over the batch, larger at edges and beside them; thin things are all edge.

    The image is smoothed first, so that grain does not count as edges; a gradient counts up to four times
    the mean, so that a few hard contrasts do not take it all.
    """
    smooth = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    gradient = image_gradient(smooth)
    relative = (gradient / gradient.mean().clamp(min=1e-6)).clamp(max=4)
    weights = 1 + strength * F.max_pool2d(relative, 3, stride=1, padding=1)
    return weights / weights.mean()


def laplacian_pyramid(x: Tensor, levels: int) -> list[Tensor]:
    """Details at 1, 1/2, ... of the size, then what is left: `levels` + 1 tensors (Burt and Adelson 1983).

    Means of 2x2 stand for the Gaussian and repeated values for its inverse.
    """
    bands = []
    for _ in range(levels):
        coarse = F.avg_pool2d(x, 2)
        bands.append(x - F.interpolate(coarse, scale_factor=2.0, mode="nearest"))
        x = coarse
    return [*bands, x]


def local_strength(band: Tensor) -> Tensor:
    """Root mean square of details over windows of 4x4; what texture keeps when its grain lies elsewhere."""
    return (F.avg_pool2d(band**2, 4, stride=2) + STRENGTH_FLOOR**2).sqrt()


def feature_distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Distance of two lists of feature maps (B, C, h, w): LPIPS without learned weights (Zhang et al. 2018).

    Squared distance of the channel vectors at unit length, averaged over places and images, summed over maps.
    """
    terms = [
        (unit_channels(a) - unit_channels(b)).pow(2).sum(dim=1).mean()
        for a, b in zip(found, expected, strict=True)
    ]
    return torch.stack(terms).sum()


def unit_channels(maps: Tensor) -> Tensor:
    """Feature vectors at unit length, in float32."""
    maps = maps.float()
    return maps / (maps.pow(2).sum(dim=1, keepdim=True).sqrt() + FEATURE_FLOOR)


def loss_terms(
    x: Tensor, reconstruction: Tensor, posterior: DiagonalGaussianDistribution, weights: LossWeights
) -> dict[str, Tensor]:
    """Each term of the loss by its name in `LossWeights`, not weighted."""
    difference = reconstruction - x
    at = edge_weights(x, weights.edge)
    levels = weights.pyramid_levels
    bands = laplacian_pyramid(difference, levels)  # linear, so one pyramid does for both
    pairs = zip(*(laplacian_pyramid(image, levels)[:levels] for image in (x, reconstruction)), strict=True)
    strengths = [(local_strength(a) - local_strength(b)).abs().mean() for a, b in pairs if weights.energy]
    return {
        "pixel": (at * difference.abs()).mean(),
        "square": (at * difference**2).mean(),
        "pyramid": torch.stack([band.abs().mean() for band in bands]).sum(),
        "energy": torch.stack(strengths).sum() if strengths else x.new_zeros(()),
        "kl": posterior.kl().sum() / x.numel(),
    }


def principal_code(images: NDArray[np.uint8], channels: int, block: int = 8) -> tuple[Tensor, Tensor]:
    """The best linear code of blocks: weight (C, 3, b, b) and bias (C,) of a convolution of stride b.

    The first principal components, each with mean 0 and standard deviation 1 over the blocks of `images`
    (N, H, W, 3).
    """
    n, height, width, _ = images.shape
    x = images.reshape(n, height // block, block, width // block, block, 3).transpose(0, 1, 3, 5, 2, 4)
    rows = x.reshape(-1, 3 * block**2) / 127.5 - 1
    mean = rows.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(rows, rowvar=False))
    code = (vectors[:, ::-1][:, :channels] / np.sqrt(values[::-1][:channels])).T
    weight, bias = torch.from_numpy(code.copy()).float(), torch.from_numpy(-code @ mean).float()
    return weight.unflatten(1, (3, block, block)), bias


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB from a mean squared error of images in [-1, 1]."""
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def frame_psnr(x: Tensor, reconstruction: Tensor, edge_share: float = 0.1) -> tuple[Tensor, Tensor]:
    """(B,) and (B,) PSNR of all pixels, and of the share of pixels with the strongest gradient in `x`."""
    error = ((reconstruction.clamp(-1, 1) - x) ** 2).mean(dim=1).flatten(1)
    gradient = image_gradient(x).flatten(1)
    strongest = gradient.topk(max(1, round(edge_share * gradient.shape[1])), dim=1).indices
    return psnr(error.mean(dim=1)), psnr(error.gather(1, strongest).mean(dim=1))


@torch.no_grad()
def standardise_latents(autoencoder: AutoencoderKL, mean: Tensor, std: Tensor, scale_factor: float) -> None:
    """Change the unit of the latents so that `scale_factor` times them has mean 0 and standard deviation 1.

    Every channel is shifted and scaled in the 1x1 convolution behind the encoder, and back in the one before
    the decoder, so images are encoded and decoded as before.

    mean, std  (C,)  of the latents as they are
    """
    unit = std * scale_factor
    weight, bias = autoencoder.quant_conv.weight, autoencoder.quant_conv.bias
    size = len(mean)
    weight[:size] /= unit[:, None, None, None]
    bias[:size] = (bias[:size] - mean) / unit
    bias[size:] -= 2 * unit.log()
    after = autoencoder.post_quant_conv
    after.bias += after.weight[..., 0, 0] @ mean
    after.weight *= unit[:, None, None]


def to_images(jpg: Tensor) -> Tensor:
    """(B, H, W, 3) -> (B, 3, H, W), a view that lies channels-last."""
    return jpg.permute(0, 3, 1, 2)
