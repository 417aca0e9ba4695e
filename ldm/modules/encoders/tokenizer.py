"""CLIP byte-pair tokens from the vocabulary that open-clip ships, so no file is fetched.

Both text encoders use these ids; they differ in the padding alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

VOCAB_SIZE = 49408
CONTEXT_LENGTH = 77
CHUNK_LENGTH = CONTEXT_LENGTH - 2  # what is left between the start and the end token
START_ID = 49406
END_ID = 49407


@lru_cache(maxsize=1)
def _tokenizer() -> SimpleTokenizer:
    # The one file, not the package: importing open_clip builds models that are not needed here, for seconds.
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("open-clip-torch is not installed: pip install -r requirements.txt")
    spec = importlib.util.spec_from_file_location(
        "open_clip_tokenizer", Path(package.origin).with_name("tokenizer.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def encode(text: str) -> list[int]:
    """Token ids of `text` without start, end or padding, of any length.

    The text is repaired (ftfy), freed of HTML entities and repeated blanks, and lower-cased.
    """
    return list(_tokenizer().encode(text))


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens with their ids, and the merges in their order, under the names that CLIP's own files use."""
    tokenizer = _tokenizer()
    words = [*tokenizer.encoder][:START_ID]  # open-clip spells the two special ones in another way
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges


def chunk_tokens(texts: Sequence[str], pad_id: int) -> Tensor:
    """Token ids in chunks of one context each; the longest text sets the number of chunks.

    Every chunk is START, up to 75 tokens, END, padding. A text that needs fewer chunks than the
    longest gets empty ones (START, END, padding), so that all encodings stack; nothing is cut off.

    texts    B strings
    returns  (B, n, 77) int64 on the CPU, n >= 1
    """
    if not texts:
        raise ValueError("expected at least one prompt, found an empty list; pass [''] for an empty prompt")
    rows = [encode(text) for text in texts]
    num_chunks = max(1, *(-(-len(row) // CHUNK_LENGTH) for row in rows))
    starts = range(0, num_chunks * CHUNK_LENGTH, CHUNK_LENGTH)
    chunks = [[_frame(row[start : start + CHUNK_LENGTH], pad_id) for start in starts] for row in rows]
    return torch.tensor(chunks, dtype=torch.int64, device="cpu")


def _frame(ids: list[int], pad_id: int) -> list[int]:
    return [START_ID, *ids, END_ID] + [pad_id] * (CHUNK_LENGTH - len(ids))
