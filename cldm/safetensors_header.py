"""The header of a safetensors file, held against itself: names, types, shapes and places of the tensors.

The format: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any, NoReturn

ELEMENT_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
NOTES = "__metadata__"


def parse_header(raw: bytes) -> dict[str, Any]:
    """The header by tensor name, each entry with `dtype`, `shape` and `data_offsets`; notes as text for text.

    Raises
        ValueError  what is wrong, in a few words: no JSON, a name twice, a tensor that its bytes do not make,
                    bytes that belong to two tensors or to none
    """
    try:
        header = json.loads(raw, object_pairs_hook=_once, parse_constant=_no_number)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError("it is no JSON") from error
    if not isinstance(header, dict):
        raise ValueError("it is no table of tensors")
    notes = header.get(NOTES, {})
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise ValueError("its notes are not text")
    places = sorted(_place(name, entry) for name, entry in header.items() if name != NOTES)
    for (_, end), (start, _) in pairwise([(0, 0), *places]):
        if start != end:
            raise ValueError(f"byte {min(start, end)} belongs to {'two tensors' if start < end else 'none'}")
    return header


def data_bytes(header: dict[str, Any]) -> int:
    """Bytes of all tensors."""
    return max((entry["data_offsets"][1] for name, entry in header.items() if name != NOTES), default=0)


def _place(name: str, entry: Any) -> tuple[int, int]:
    """First byte of a tensor and the one behind its last."""
    name.encode()  # a lone surrogate is no name
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:60]} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise ValueError(f"{name[:60]} is of type {str(dtype)[:20]}")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise ValueError(f"the shape or the place of {name[:60]} is none")
    if offsets[1] - offsets[0] != math.prod(shape) * ELEMENT_BYTES[dtype]:
        raise ValueError(f"{name[:60]} has more or fewer bytes than its shape")
    return offsets[0], offsets[1]


def _are_counts(values: Any) -> bool:
    """Whether this is a list of integers that count something."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of JSON; readers differ in which of two equal names they take."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("it has a name twice")
    return table


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}")
