"""A text encoder that encodes what it was given before no second time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.modules.encoders.modules import TextEmbedder

KEPT = 512  # chunks of 75 tokens; 0.2 MB each at the width of SD1.5


class TextMemory:
    """Called as a text encoder is; the last ones are kept, in chunks as the encoder cuts them.

    Each chunk is encoded alone, so that a text is the same whatever is beside it.
    """

    def __init__(self, encoder: TextEmbedder) -> None:
        self.encoder = encoder
        self.known: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def chunks(self, text: str) -> int:
        """Chunks of 75 tokens that a text needs."""
        return self.encoder.tokenize([text]).shape[1]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, 77 n, width), n the chunks of the longest; others get empty ones."""
        tokens = self.encoder.tokenize(texts)
        encoded = torch.stack([self.encode(tuple(chunk)) for chunk in tokens.flatten(0, 1).tolist()])
        return encoded.reshape(len(texts), -1, encoded.shape[-1])

    def encode(self, chunk: tuple[int, ...]) -> Tensor:
        """One chunk of 77 tokens -> (77, width)."""
        if chunk not in self.known:
            device = next(self.encoder.parameters()).device
            self.known[chunk] = self.encoder.encode_tokens(torch.tensor([chunk], device=device))[0]
        self.known.move_to_end(chunk)
        found = self.known[chunk]
        while len(self.known) > KEPT:
            self.known.popitem(last=False)
        return found
