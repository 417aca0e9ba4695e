"""The Gaussian that the autoencoder's encoder returns."""

from __future__ import annotations

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """Independent normal distributions, one for each latent value.

    parameters  (B, 2C, h, w)  mean and log-variance along the channels
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        """(B, C, h, w) standard deviation."""
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """(B, C, h, w) variance."""
        return torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw (B, C, h, w) on the device of the parameters."""
        return self.at(
            torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        )

    def at(self, noise: Tensor) -> Tensor:
        """The value (B, C, h, w) that standard normal `noise` of that shape stands for."""
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """(B, C, h, w) most likely value."""
        return self.mean

    def kl(self) -> Tensor:
        """(B,) Kullback-Leibler divergence to the standard normal (Kingma and Welling 2014, appendix B)."""
        return 0.5 * (self.mean**2 + self.var - 1 - self.logvar).sum(dim=(1, 2, 3))
