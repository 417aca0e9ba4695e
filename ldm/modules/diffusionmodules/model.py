"""Encoder and decoder of the first-stage autoencoder (Rombach et al. 2022, appendix G)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.attention import sdpa_attention, to_map, to_tokens
from ldm.modules.diffusionmodules.blocks import Upsample


@dataclass(frozen=True, kw_only=True)
class VAEArch:
    """Sizes of an autoencoder, under the names of `ddconfig` in the published YAML files."""

    ch: int = 128
    ch_mult: Sequence[int] = (
        1,
        2,
        4,
        4,
    )  # width of each level, in ch; each level but the last halves the size
    num_res_blocks: int = 2
    in_channels: int = 3
    out_ch: int = 3
    z_channels: int = 4
    double_z: bool = True  # the encoder returns mean and log-variance
    attn_resolutions: Sequence[int] = ()  # attention stands in the middle only
    resolution: int = 256  # no effect: the network is convolutional
    dropout: float = 0.0
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if list(self.attn_resolutions):
            raise ValueError(f"attn_resolutions={list(self.attn_resolutions)} is not supported; only [] is")

    @classmethod
    def from_config(cls, ddconfig: Mapping[str, Any]) -> VAEArch:
        """The sizes in a `ddconfig`; an unknown one is refused."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in ddconfig if name not in known]:
            raise ValueError(f"ddconfig has no parameter {unknown[0]!r}; known are {', '.join(known)}")
        return cls(**ddconfig)

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.ch * mult for mult in self.ch_mult]

    def norm(self, channels: int) -> nn.GroupNorm:
        """The group norm of this network."""
        return nn.GroupNorm(self.norm_groups, channels, eps=1e-6)

    def res_block(self, channels: int, out_channels: int) -> ResnetBlock:
        """A residual block of this network."""
        return ResnetBlock(self, channels, out_channels)


class ResnetBlock(nn.Module):
    """Two convolutions behind norms, without a noise level."""

    def __init__(self, arch: VAEArch, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = arch.norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = arch.norm(out_channels)
        self.dropout = nn.Dropout(arch.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels."""

    def __init__(self, arch: VAEArch, channels: int) -> None:
        super().__init__()
        self.norm = arch.norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        h = self.norm(x)
        q, k, v = (to_tokens(layer(h)).unsqueeze(2) for layer in (self.q, self.k, self.v))
        return x + self.proj_out(to_map(sdpa_attention(q, k, v).squeeze(2), x.shape[-2:]))


class Downsample(nn.Module):
    """Halve the size; padded at the right and the bottom only, as the published weights expect."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The blocks of one resolution and the resampling behind them, if any."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks, then `downsample` or `upsample`."""
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, arch: VAEArch, channels: int) -> None:
        super().__init__()
        self.block_1 = arch.res_block(channels, channels)
        self.attn_1 = AttnBlock(arch, channels)
        self.block_2 = arch.res_block(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image to the parameters of a latent distribution, 8x down with the published sizes."""

    def __init__(self, arch: VAEArch) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(arch.in_channels, arch.ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = arch.ch
        for i, width in enumerate(arch.widths):
            sizes = [channels] + [width] * arch.num_res_blocks
            level = Level(arch.res_block(a, b) for a, b in pairwise(sizes))
            if i < len(arch.widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            channels = width
        self.mid = Middle(arch, channels)
        self.norm_out = arch.norm(channels)
        self.conv_out = nn.Conv2d(channels, arch.z_channels * (1 + arch.double_z), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 2 * z_channels, H / 8, W / 8)."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent to image, 8x up with the published sizes."""

    def __init__(self, arch: VAEArch) -> None:
        super().__init__()
        channels = arch.widths[-1]
        self.conv_in = nn.Conv2d(arch.z_channels, channels, 3, padding=1)
        self.mid = Middle(arch, channels)
        levels: list[Level] = []
        for i, width in reversed(list(enumerate(arch.widths))):
            sizes = [channels] + [width] * (arch.num_res_blocks + 1)
            level = Level(arch.res_block(a, b) for a, b in pairwise(sizes))
            if i > 0:
                level.upsample = Upsample(width)
            levels.append(level)
            channels = width
        self.up = nn.ModuleList(reversed(levels))  # published files count the levels from the image side
        self.norm_out = arch.norm(channels)
        self.conv_out = nn.Conv2d(channels, arch.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, z_channels, h, w) -> (B, 3, 8h, 8w), about [-1, 1]."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
