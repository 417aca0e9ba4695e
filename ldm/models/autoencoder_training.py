"""Training of the first stage on images alone: what is minimised, and the module that does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

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


def learning_rate(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """Linear up over `warmup` steps, then half a cosine down to a hundredth of the peak at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


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


class AutoencoderTraining(pl.LightningModule):
    """Trains an autoencoder on batches of `jpg` and `step`.

    Learning rate and noise are functions of the step that the batch names, so that a run can go on from
    its weights, its optimizer's moments and that number.

    clip          largest norm of the gradient; 0 is none
    start_logvar  added to the log-variance of the posterior before the first step: at 0 it starts near 1,
                  and the noise drowns the latents until the network has made them large
    guide         weight and bias of `principal_code`, which the latents are drawn to at first
    guide_steps   over which that pull fades: by itself the network stays for long with a single component
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        weights: LossWeights,
        *,
        lr: float,
        warmup: int,
        steps: int,
        seed: int = 0,
        weight_decay: float = 0.0,
        clip: float = 0.0,
        start_logvar: float = 0.0,
        guide: tuple[Tensor, Tensor] | None = None,
        guide_steps: int = 0,
    ) -> None:
        super().__init__()
        # 4-D weights alone lie channels-last; convolutions then take and give images that do
        self.autoencoder = autoencoder.to(memory_format=torch.channels_last)
        with torch.no_grad():
            self.autoencoder.quant_conv.bias[autoencoder.embed_dim :] += start_logvar
        self.weights = weights
        self.lr, self.warmup, self.steps = lr, warmup, steps
        self.seed, self.weight_decay, self.clip = seed, weight_decay, clip
        self.guide, self.guide_steps = guide, guide_steps if guide else 0

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Encode, draw a latent, decode, compare."""
        step = int(batch["step"])
        self.set_learning_rate(step)
        x = to_images(batch["jpg"])
        # under autocast the network's output is bf16: too coarse for sums and logarithms
        posterior = DiagonalGaussianDistribution(self.autoencoder.encode(x).parameters.float())
        z = posterior.sample(noise_generator(self.seed, step, x.device))
        reconstruction = self.autoencoder.decode(z).float()
        terms = loss_terms(x, reconstruction, posterior, self.weights)
        loss = torch.stack([getattr(self.weights, name) * term for name, term in terms.items()]).sum()
        if step < self.guide_steps:
            loss = loss + (1 - step / self.guide_steps) * self.distance_to_guide(x, posterior.mean)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(x))
        return loss

    def distance_to_guide(self, x: Tensor, latent: Tensor) -> Tensor:
        """Mean squared distance of the latent from the linear code of `x`."""
        assert self.guide is not None
        weight, bias = (tensor.to(x) for tensor in self.guide)
        return F.mse_loss(latent, F.conv2d(x.float(), weight, bias, stride=weight.shape[-1]))

    def set_learning_rate(self, step: int) -> None:
        """Give the optimizer the rate of a step."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        rate = learning_rate(step, peak=self.lr, warmup=self.warmup, steps=self.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the norm of the gradient; Lightning refuses to, for a fused optimizer under autocast."""
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW in its fused form, which is five times as fast on a CPU."""
        decay = self.weight_decay
        return torch.optim.AdamW(
            self.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=decay, fused=True
        )


def to_images(jpg: Tensor) -> Tensor:
    """(B, H, W, 3) -> (B, 3, H, W), a view that lies channels-last."""
    return jpg.permute(0, 3, 1, 2)


def noise_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The generator of the latent noise of a step."""
    # 1 sets it apart from the generator that draws the crops of the same step
    state = int(np.random.SeedSequence([seed, step, 1]).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(state)
