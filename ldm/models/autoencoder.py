"""The first stage: an autoencoder with a Gaussian latent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder, VAEArch
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class AutoencoderKL(nn.Module):
    """Encode images to latents and back.

    embed_dim  channels of the latent
    ddconfig   fields of `VAEArch`
    """

    unused_params: ClassVar[frozenset[str]] = frozenset(
        {"lossconfig", "monitor", "image_key", "colorize_nlabels", "ckpt_path", "ignore_keys"}
    )

    def __init__(self, embed_dim: int, ddconfig: Mapping[str, Any]) -> None:
        super().__init__()
        arch = VAEArch.from_config(ddconfig)
        self.encoder = Encoder(arch)
        self.decoder = Decoder(arch)
        self.quant_conv = nn.Conv2d(2 * arch.z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, arch.z_channels, 1)
        self.embed_dim = embed_dim
        self.downsampling = 2 ** (len(arch.widths) - 1)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """(B, 3, H, W) in [-1, 1] -> distribution of (B, embed_dim, h, w), not scaled."""
        x = x.to(self.quant_conv.weight.dtype)
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """(B, embed_dim, h, w), not scaled -> (B, 3, H, W), about [-1, 1], in the dtype of `z`."""
        return self.decoder(self.post_quant_conv(z.to(self.quant_conv.weight.dtype))).to(z.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruction from a drawn latent, and the distribution it was drawn from."""
        posterior = self.encode(x)
        return self.decode(posterior.sample()), posterior
