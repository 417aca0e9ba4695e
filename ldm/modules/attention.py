"""Attention and the spatial transformer of Stable Diffusion (Rombach et al. 2022, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.modules.diffusionmodules.util import maybe_checkpoint, zero_module

KeyValue: TypeAlias = tuple[Tensor, Tensor]
Context: TypeAlias = "Tensor | Mapping[nn.Module, KeyValue]"
"""Text embeddings (B, L, D), or what every cross-attention makes of them (`project_context`)."""


# Scores of a head, up to which the backward of torch's fused CPU kernel in bf16 loses against plain products:
# for 16x1x512x512 18 ms against 10 ms of both passes, for 2x8x1024x1024 62 against 103.
SLOW_BELOW = 512 * 512


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention by torch; all tensors (B, N, heads, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    small = q.shape[-2] * k.shape[-2] <= SLOW_BELOW
    if small and q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention by xformers; all tensors (B, N, heads, d)."""
    import xformers.ops

    return xformers.ops.memory_efficient_attention(q, k, v)


ATTENTION_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": sdpa_attention,
    "xformers": xformers_attention,
}


def attention_backend(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Look a backend up by name; fail at construction, not in the first step, when it cannot be used."""
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; choose one of {', '.join(ATTENTION_BACKENDS)}")
    if name == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except (ImportError, OSError) as error:
            raise ValueError(
                f"attention backend 'xformers' cannot be imported ({error}); "
                "install the xformers build for this torch, or use attn_backend=sdpa"
            ) from error
    return ATTENTION_BACKENDS[name]


class CrossAttention(nn.Module):
    """Multi-head attention from `x` to `context`, or to `x` itself when it is built without `context_dim`."""

    def __init__(
        self, query_dim: int, context_dim: int | None, heads: int, dim_head: int, attn_backend: str = "sdpa"
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.is_cross = context_dim is not None
        self.attend = attention_backend(attn_backend)
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(0.0))

    def project(self, context: Tensor) -> KeyValue:
        """Keys and values of `context`, each (B, L, heads, d)."""
        split = (self.heads, -1)
        return self.to_k(context).unflatten(-1, split), self.to_v(context).unflatten(-1, split)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """(B, N, query_dim) -> (B, N, query_dim)."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        k, v = (
            context[self] if isinstance(context, Mapping) else self.project(x if context is None else context)
        )
        return self.to_out(self.attend(q, k, v).flatten(2))


@torch.no_grad()
def project_context(context: Tensor, *networks: nn.Module) -> dict[nn.Module, KeyValue]:
    """Keys and values of one text for every cross-attention of `networks`.

    They do not depend on the noise level, so a sampling run needs them once. The result stands for `context`
    in the forward pass of any of the networks.
    """
    modules = [module for network in networks for module in network.modules()]
    return {m: m.project(context) for m in modules if isinstance(m, CrossAttention) and m.is_cross}


class GEGLU(nn.Module):
    """Linear layer gated by the exact GELU of its second half (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two-layer perceptron of width 4 * dim."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, perceptron; each behind a LayerNorm and a residual."""

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        context_dim: int | None,
        *,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
        attn_backend: str = "sdpa",
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.attn1 = CrossAttention(dim, None, heads, dim_head, attn_backend)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head, attn_backend)
        self.ff = FeedForward(dim, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """(B, N, dim) -> (B, N, dim)."""
        return maybe_checkpoint(self._forward, x, context, active=self.use_checkpoint)

    def _forward(self, x: Tensor, context: Context | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, between a projection in and a zero one out."""

    def __init__(
        self,
        channels: int,
        heads: int,
        dim_head: int,
        context_dim: int | None,
        *,
        depth: int = 1,
        use_linear: bool = False,
        norm_groups: int = 32,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
        attn_backend: str = "sdpa",
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.use_linear = use_linear
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if use_linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner,
                heads,
                dim_head,
                context_dim,
                dropout=dropout,
                use_checkpoint=use_checkpoint,
                attn_backend=attn_backend,
            )
            for _ in range(depth)
        )
        proj_out = nn.Linear(inner, channels) if use_linear else nn.Conv2d(inner, channels, 1)
        self.proj_out = zero_module(proj_out)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        size = x.shape[-2:]
        h = self.norm(x)
        h = self.proj_in(to_tokens(h)) if self.use_linear else to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        h = to_map(self.proj_out(h), size) if self.use_linear else self.proj_out(to_map(h, size))
        return x + h


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h*w, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """(B, h*w, C) -> (B, C, h, w), contiguous: the convolution that follows runs faster on it."""
    return x.transpose(1, 2).unflatten(2, tuple(size)).contiguous()
