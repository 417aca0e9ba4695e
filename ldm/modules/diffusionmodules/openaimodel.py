"""The denoising UNet of Stable Diffusion, and the encoder half that a control branch copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.modules.attention import Context, SpatialTransformer
from ldm.modules.diffusionmodules.blocks import Downsample, ResBlock, TimestepEmbedSequential, Upsample
from ldm.modules.diffusionmodules.util import timestep_embedding, zero_module


@dataclass(frozen=True, kw_only=True)
class UNetArch:
    """Sizes of a UNet, under the names of the published YAML files."""

    in_channels: int = 4
    model_channels: int = 320
    channel_mult: Sequence[int] = (1, 2, 4, 4)  # width of each level, in model_channels
    num_res_blocks: int | Sequence[int] = 2  # residual blocks of a level
    attention_resolutions: Sequence[int] = (4, 2, 1)  # downsampling factors at which transformers stand
    num_heads: int = -1  # give this ...
    num_head_channels: int = -1  # ... or the width of one head
    transformer_depth: int = 1
    context_dim: int | None = 768  # width of the text embeddings
    use_linear_in_transformer: bool = False
    dropout: float = 0.0
    norm_groups: int = 32
    use_checkpoint: bool = False  # recompute activations in backward: less memory, a third more time
    attn_backend: str = "sdpa"

    def __post_init__(self) -> None:
        if (self.num_heads == -1) == (self.num_head_channels == -1):
            raise ValueError(
                f"set num_heads or num_head_channels, found {self.num_heads} and {self.num_head_channels}"
            )

    @property
    def emb_channels(self) -> int:
        """Width of the noise-level embedding."""
        return 4 * self.model_channels

    @property
    def level_blocks(self) -> list[int]:
        """Residual blocks of each level."""
        n = self.num_res_blocks
        return [n] * len(self.channel_mult) if isinstance(n, int) else list(n)

    def res_block(self, channels: int, out_channels: int) -> ResBlock:
        """A residual block of this network."""
        return ResBlock(
            channels,
            self.emb_channels,
            out_channels,
            dropout=self.dropout,
            norm_groups=self.norm_groups,
            use_checkpoint=self.use_checkpoint,
        )

    def transformer(self, channels: int) -> SpatialTransformer:
        """A spatial transformer of this network."""
        heads = self.num_heads if self.num_head_channels == -1 else channels // self.num_head_channels
        return SpatialTransformer(
            channels,
            heads,
            channels // heads,
            self.context_dim,
            depth=self.transformer_depth,
            use_linear=self.use_linear_in_transformer,
            norm_groups=self.norm_groups,
            dropout=self.dropout,
            use_checkpoint=self.use_checkpoint,
            attn_backend=self.attn_backend,
        )

    def level_layers(self, channels: int, out_channels: int, factor: int) -> list[nn.Module]:
        """One residual block, and a transformer where attention stands at this downsampling factor."""
        layers: list[nn.Module] = [self.res_block(channels, out_channels)]
        return [*layers, self.transformer(out_channels)] if factor in self.attention_resolutions else layers


class UNetEncoder(nn.Module):
    """The half that UNet and control branch share: noise-level embedding, input blocks, middle block.

    `block_channels` are the widths of what the input blocks return, in order.
    """

    arch_class: ClassVar[type] = UNetArch
    unused_params: ClassVar[frozenset[str]] = frozenset(
        {"image_size", "legacy", "use_fp16", "use_new_attention_order", "num_heads_upsample"}
    )
    fixed_params: ClassVar[dict[str, Any]] = {
        "use_spatial_transformer": True,
        "dims": 2,
        "conv_resample": True,
        "num_classes": None,
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "n_embed": None,
        "disable_self_attentions": None,
        "num_attention_blocks": None,
        "disable_middle_self_attn": False,
        "adm_in_channels": None,
    }

    def __init__(self, arch: UNetArch) -> None:
        super().__init__()
        self.model_channels = arch.model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(arch.model_channels, arch.emb_channels),
            nn.SiLU(),
            nn.Linear(arch.emb_channels, arch.emb_channels),
        )
        self.input_blocks, self.block_channels = build_input_blocks(arch)
        width = self.block_channels[-1]
        self.middle_block = TimestepEmbedSequential(
            arch.res_block(width, width), arch.transformer(width), arch.res_block(width, width)
        )

    def embed_time(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """(B,) noise levels -> (B, E) in the dtype of `like`."""
        return self.time_embed(timestep_embedding(timesteps, self.model_channels).to(like.dtype))

    def encode(
        self, x: Tensor, emb: Tensor, context: Context | None, hint_features: Tensor | None = None
    ) -> list[Tensor]:
        """Return the output of every input block, then of the middle block.

        `hint_features` (B, model_channels, h, w) are added behind the first block (Zhang et al. 2023, Eq. 2).
        """
        outputs: list[Tensor] = []
        h = x
        for block in self.input_blocks:
            h = block(h, emb, context)
            if hint_features is not None and not outputs:
                h = h + hint_features
            outputs.append(h)
        return [*outputs, self.middle_block(h, emb, context)]

    @property
    def weight_dtype(self) -> Any:
        """The dtype that inputs are cast to."""
        return self.time_embed[0].weight.dtype


def build_input_blocks(arch: UNetArch) -> tuple[nn.ModuleList, list[int]]:
    """The down path: a convolution, then for each level its blocks and, but for the last, a downsampling."""
    channels = arch.model_channels
    blocks: list[nn.Module] = [TimestepEmbedSequential(nn.Conv2d(arch.in_channels, channels, 3, padding=1))]
    widths = [channels]
    for level, (mult, num_blocks) in enumerate(zip(arch.channel_mult, arch.level_blocks, strict=True)):
        for _ in range(num_blocks):
            out = mult * arch.model_channels
            blocks.append(TimestepEmbedSequential(*arch.level_layers(channels, out, 2**level)))
            channels = out
            widths.append(channels)
        if level < len(arch.channel_mult) - 1:
            blocks.append(TimestepEmbedSequential(Downsample(channels)))
            widths.append(channels)
    return nn.ModuleList(blocks), widths


def build_output_blocks(arch: UNetArch, skip_channels: Sequence[int]) -> nn.ModuleList:
    """The up path: each block takes one skip of the down path, the last block of a level upsamples."""
    skips = list(skip_channels)
    channels = skips[-1]
    blocks: list[nn.Module] = []
    for level in reversed(range(len(arch.channel_mult))):
        num_blocks = arch.level_blocks[level] + 1
        for i in range(num_blocks):
            out = arch.channel_mult[level] * arch.model_channels
            layers = arch.level_layers(channels + skips.pop(), out, 2**level)
            if level and i == num_blocks - 1:
                layers.append(Upsample(out))
            blocks.append(TimestepEmbedSequential(*layers))
            channels = out
    return nn.ModuleList(blocks)


class UNetModel(UNetEncoder):
    """Predicts noise (or velocity) from a noisy latent, its noise level and the text.

    Keyword arguments are the fields of `UNetArch`, and `out_channels`.
    """

    # Two networks in two files are built from one set of sizes, so the keywords cross into UNetArch unnamed;
    # it refuses what it does not know.
    def __init__(self, *, out_channels: int = 4, **arch: Any) -> None:
        sizes = UNetArch(**arch)
        super().__init__(sizes)
        self.output_blocks = build_output_blocks(sizes, self.block_channels)
        self.out = nn.Sequential(
            nn.GroupNorm(sizes.norm_groups, sizes.model_channels),
            nn.SiLU(),
            zero_module(nn.Conv2d(sizes.model_channels, out_channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Context | None = None) -> Tensor:
        """x (B, C, h, w), timesteps (B,), context (B, L, D) -> (B, out_channels, h, w), dtype of `x`."""
        emb, outputs = self.run_encoder(x, timesteps, context)
        return self.decode(outputs, emb, context).to(x.dtype)

    def run_encoder(
        self, x: Tensor, timesteps: Tensor, context: Context | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Noise-level embedding and the outputs of the encoder."""
        h = x.to(self.weight_dtype)
        emb = self.embed_time(timesteps, h)
        return emb, self.encode(h, emb, context)

    def decode(self, outputs: Sequence[Tensor], emb: Tensor, context: Context | None) -> Tensor:
        """Turn what `encode` returned, control added or not, into the prediction."""
        *skips, h = outputs
        for block, skip in zip(self.output_blocks, reversed(skips), strict=True):
            h = block(torch.cat([h, skip], dim=1), emb, context)
        return self.out(h)
