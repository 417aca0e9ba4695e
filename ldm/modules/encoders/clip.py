"""The two CLIP text transformers, under the names that the published checkpoints use.

Radford et al. 2021 (arXiv:2103.00020): a causal pre-norm transformer. OpenAI's ViT-L/14 comes with
the Hugging Face names, LAION's ViT-H/14 with those of open-clip. Attribute names are checkpoint keys.
No module holds a buffer: on the meta device there is nothing but parameters to fill.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.encoders.tokenizer import CONTEXT_LENGTH, VOCAB_SIZE

MLP_RATIO = 4


def causal_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attend to the own and earlier positions only. All are (B, L, C) with C = num_heads * head size."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(1, 2).flatten(2)


def run_blocks(x: Tensor, blocks: nn.Module, num_blocks: int) -> Tensor:
    """Run the first `num_blocks` children of `blocks` on x (B, L, C)."""
    for block in islice(blocks.children(), num_blocks):
        x = block(x)
    return x


def feed_forward(width: int, names: tuple[str, str], activation: nn.Module) -> nn.Sequential:
    """Two linear layers under the given names, four times as wide in between."""
    up, down = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)
    return nn.Sequential(OrderedDict([(names[0], up), ("act", activation), (names[1], down)]))


@torch.no_grad()
def init_text_weights(model: nn.Module, num_layers: int) -> None:
    """Start values for training from scratch; a checkpoint overwrites all of them.

    Embeddings N(0, 0.02); matrices N(0, 1 / fan-in); those that add to the residual stream are divided
    by sqrt(2 * num_layers), so that its variance does not grow with depth (as in GPT-2).
    """
    for name, weight in model.named_parameters():
        if "embedding" in name:
            nn.init.normal_(weight, std=0.02)
        elif weight.ndim == 2:
            residual = name.endswith(("out_proj.weight", "fc2.weight", "c_proj.weight"))
            nn.init.normal_(weight, std=(weight.shape[1] * (2 * num_layers if residual else 1)) ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that ViT-L/14 was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return x * torch.sigmoid(1.702 * x)


class SplitAttention(nn.Module):
    """Causal self-attention with one projection each for queries, keys and values."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(causal_attention(q, k, v, self.num_heads))


class FusedAttention(nn.Module):
    """Causal self-attention with queries, keys and values stacked in one projection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(causal_attention(q, k, v, self.num_heads))


class ClipBlock(nn.Module):
    """One block of ViT-L/14's text transformer."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = SplitAttention(width, num_heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = feed_forward(width, ("fc1", "fc2"), QuickGELU())
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class OpenClipBlock(nn.Module):
    """One block of ViT-H/14's text transformer."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = FusedAttention(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = feed_forward(width, ("c_fc", "c_proj"), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ClipEmbeddings(nn.Module):
    """Token and position embeddings of ViT-L/14."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB_SIZE, width)
        self.position_embedding = nn.Embedding(CONTEXT_LENGTH, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, L, C)."""
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class ClipText(nn.Module):
    """The text transformer of OpenAI's ViT-L/14."""

    def __init__(self, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(width)
        blocks = (ClipBlock(width, num_heads) for _ in range(num_layers))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.final_layer_norm = nn.LayerNorm(width)
        init_text_weights(self, num_layers)

    def forward(self, tokens: Tensor, num_blocks: int, *, normalize: bool = True) -> Tensor:
        """Hidden state after the first `num_blocks` blocks, (B, L) -> (B, L, C)."""
        x = run_blocks(self.embeddings(tokens), self.encoder["layers"], num_blocks)
        return self.final_layer_norm(x) if normalize else x


class OpenClipText(nn.Module):
    """The text tower of LAION's ViT-H/14.

    `text_projection` and `logit_scale` have no use here; they are held because the checkpoints hold them.
    """

    def __init__(self, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(CONTEXT_LENGTH, width))
        self.text_projection = nn.Parameter(torch.empty(width, width))
        self.logit_scale = nn.Parameter(torch.full((), math.log(1 / 0.07)))
        blocks = (OpenClipBlock(width, num_heads) for _ in range(num_layers))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.token_embedding = nn.Embedding(VOCAB_SIZE, width)
        self.ln_final = nn.LayerNorm(width)
        init_text_weights(self, num_layers)

    def forward(self, tokens: Tensor, num_blocks: int) -> Tensor:
        """Normalised hidden state after the first `num_blocks` blocks, (B, L) -> (B, L, C)."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        return self.ln_final(run_blocks(x, self.transformer["resblocks"], num_blocks))
