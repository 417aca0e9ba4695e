"""Text encoders of Stable Diffusion: prompts in, the context of the cross-attention out.

`FrozenCLIPEmbedder` belongs to SD1.5, `FrozenOpenCLIPEmbedder` to SD2.1. Both are built from sizes alone
and filled from the checkpoint; neither construction nor use reaches a hub.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.encoders.clip import ClipText, OpenClipText
from ldm.modules.encoders.tokenizer import CONTEXT_LENGTH, END_ID, chunk_tokens


class TextEmbedder(nn.Module):
    """What the two encoders share: checks, chunks of 75 tokens, every chunk encoded once.

    A subclass sets `pad_id`, builds its transformer and implements `encode_tokens`.
    """

    pad_id: int

    def __init__(self, width: int, num_layers: int, num_heads: int, max_length: int) -> None:
        super().__init__()
        if max_length != CONTEXT_LENGTH:
            raise ValueError(
                f"expected max_length {CONTEXT_LENGTH}, the context of CLIP, found {max_length} in "
                "cond_stage_config; remove it, because longer prompts are encoded in chunks"
            )
        if num_layers < 1 or width % num_heads:
            raise ValueError(
                f"expected num_layers >= 1 and a width that num_heads divides, found {num_layers} layers, "
                f"width {width} and {num_heads} heads in cond_stage_config; change one of them"
            )
        self.width = width
        self.frozen = False

    def freeze(self) -> None:
        """Stop gradients and stay in eval mode, whatever `train` is called with later."""
        self.frozen = True
        self.eval()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> TextEmbedder:
        """As for every module, but a frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids, (B, n, 77) int64 on the CPU; n chunks of 75 tokens hold the longest text."""
        return chunk_tokens([texts] if isinstance(texts, str) else texts, self.pad_id)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encode one chunk a row, (N, 77) int64 -> (N, 77, width)."""
        raise NotImplementedError(f"{type(self).__name__} must implement encode_tokens")

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Encode B prompts, of any length, to (B, 77 * n, width); see `tokenize` for n.

        Prompt and negative prompt go into one call, which gives them the same n.
        """
        tokens = self.tokenize(texts)
        # A batch often repeats its prompt, and short prompts share their empty chunks.
        chunks, index = torch.unique(tokens.flatten(0, 1), dim=0, return_inverse=True)
        device = next(self.parameters()).device
        encoded = self.encode_tokens(chunks.to(device))
        return encoded[index.to(device)].reshape(tokens.shape[0], -1, self.width)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """The same as calling the module."""
        return self(texts)


class FrozenCLIPEmbedder(TextEmbedder):
    """Text encoder of SD1.5: CLIP ViT-L/14, last hidden state after the final norm.

    version, device   accepted because published YAML files hold them; without effect
    freeze            no gradients, always in eval mode
    layer             "last"; "penultimate", which leaves out the last block; or "hidden"
    layer_idx         with "hidden": which hidden state, without the final norm; 0 is the embeddings
    skip_layers       how many more of the last blocks to leave out ("clip skip" 2 is skip_layers=1)
    """

    pad_id = END_ID

    def __init__(
        self,
        *,
        version: str = "openai/clip-vit-large-patch14",
        device: str = "cpu",
        max_length: int = CONTEXT_LENGTH,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
        skip_layers: int = 0,
        width: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
    ) -> None:
        super().__init__(width, num_layers, num_heads, max_length)
        self.normalize = layer != "hidden"
        self.num_blocks = _clip_depth(layer, layer_idx, skip_layers, num_layers)
        self.transformer = nn.ModuleDict({"text_model": ClipText(width, num_layers, num_heads)})
        if freeze:
            self.freeze()

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encode one chunk a row, (N, 77) int64 -> (N, 77, width)."""
        return self.transformer["text_model"](tokens, self.num_blocks, normalize=self.normalize)


class FrozenOpenCLIPEmbedder(TextEmbedder):
    """Text encoder of SD2.1: OpenCLIP ViT-H/14, penultimate hidden state through the final norm.

    arch, version, device   accepted because published YAML files hold them; without effect
    freeze                  no gradients, always in eval mode
    layer                   "penultimate": the last block is held but not run; or "last"
    """

    pad_id = 0

    def __init__(
        self,
        *,
        arch: str = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: str = "cpu",
        max_length: int = CONTEXT_LENGTH,
        freeze: bool = True,
        layer: str = "penultimate",
        width: int = 1024,
        num_layers: int = 24,
        num_heads: int = 16,
    ) -> None:
        super().__init__(width, num_layers, num_heads, max_length)
        self.num_blocks = _look_up(layer, {"last": num_layers, "penultimate": num_layers - 1})
        self.model = OpenClipText(width, num_layers, num_heads)
        if freeze:
            self.freeze()

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encode one chunk a row, (N, 77) int64 -> (N, 77, width)."""
        return self.model(tokens, self.num_blocks)


def _clip_depth(layer: str, layer_idx: int | None, skip_layers: int, num_layers: int) -> int:
    """Number of blocks to run; a negative layer_idx counts from the end."""
    hidden = -1 if layer_idx is None else layer_idx if layer_idx >= 0 else layer_idx + num_layers + 1
    depths = {"last": num_layers, "penultimate": num_layers - 1, "hidden": hidden}
    depth = _look_up(layer, depths) - skip_layers
    if skip_layers < 0 or not 0 <= depth <= num_layers:
        raise ValueError(
            f"expected layer, layer_idx and skip_layers to name a state of {num_layers} layers, found "
            f"{layer!r}, {layer_idx}, {skip_layers} in cond_stage_config; "
            f"'hidden' needs a layer_idx in 0..{num_layers}"
        )
    return depth


def _look_up(layer: str, table: dict[str, int]) -> int:
    if layer not in table:
        raise ValueError(f"unknown layer {layer!r} in cond_stage_config; choose one of {', '.join(table)}")
    return table[layer]
