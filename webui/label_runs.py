"""A label map as text: runs of one id, as the editor sends them and as images carry their map.

On the wire a map is `{"height": H, "width": W, "runs": BASE64}`: two bytes for each run of one id in
row-major order, first its length less one, then the id; longer runs are cut at 256. Runs and not deflate,
because the browser deflates only asynchronously: a button that is clicked right after a stroke would send the
map before it. They are small enough: Cityscapes at 512x1024 takes 12 to 28 KiB, where the server takes 256.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.label_space import Ids, LabelSpace

MAX_PIXELS = 1 << 21  # 1024x2048, a frame of Cityscapes
LONGEST = 256  # pixels of a run
RELOAD = "reload the page and try again."

Payload = dict[str, Any]


def encode_labels(labels: Ids) -> Payload:
    """The wire format of a map."""
    height, width = labels.shape
    flat = np.ascontiguousarray(labels, np.uint8).ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(starts, append=flat.size)
    pieces = -(-lengths // LONGEST)
    last = np.cumsum(pieces) - 1
    pairs = np.full((int(pieces.sum()), 2), LONGEST - 1, np.uint8)
    pairs[last, 0] = lengths - (pieces - 1) * LONGEST - 1
    pairs[:, 1] = np.repeat(flat[starts], pieces)
    text = base64.b64encode(pairs.tobytes()).decode()
    return {"height": height, "width": width, "runs": text}


def decode_labels(payload: object, space: LabelSpace, max_pixels: int = MAX_PIXELS) -> Ids:
    """The (H, W) train ids of a wire format that anybody may have written; other keys are ignored.

    Memory and time are bounded by `max_pixels` and not by what the payload says: every run is at least one
    pixel, and the pixels are counted before they are laid out.

    Raises
        ValueError  one sentence: what was expected, what was found, what to do
    """
    if not isinstance(payload, dict) or not {"height", "width", "runs"} <= payload.keys():
        found = "one without" if isinstance(payload, dict) else _type(payload)
        raise _refusal("an object with height, width and runs", found)
    height, width, runs = payload["height"], payload["width"], payload["runs"]
    for name, side in (("height", height), ("width", width)):
        if type(side) is not int or not 1 <= side <= max_pixels:
            found = _type(side) if type(side) is not int else "one below 1" if side < 1 else "a larger one"
            raise _refusal(f"a whole number from 1 to {max_pixels} as {name}", found)
    if height * width > max_pixels:
        raise _refusal(f"at most {max_pixels} pixels", f"{height}x{width}")
    if not isinstance(runs, str) or len(runs) > -(-2 * height * width // 3) * 4:
        found = f"{len(runs)} characters" if isinstance(runs, str) else _type(runs)
        raise _refusal(f"text for at most {height * width} runs", found)
    pairs = _read_pairs(runs)
    lengths, ids = pairs[:, 0].astype(np.int64) + 1, pairs[:, 1]
    if lengths.sum() != height * width:
        raise _refusal(f"runs of {height}x{width} pixels together", f"{int(lengths.sum())} pixels")
    strange = ids[(ids >= space.num_classes) & (ids != space.void)]
    if strange.size:
        raise _refusal(f"ids from 0 to {space.num_classes - 1} or {space.void}", f"{int(strange[0])}")
    return np.repeat(ids, lengths).reshape(height, width)


def _read_pairs(runs: str) -> NDArray[np.uint8]:
    try:
        data = base64.b64decode(runs, validate=True)
    except ValueError:
        raise _refusal("base64 as runs", "other text") from None
    if len(data) % 2:
        raise _refusal("pairs of bytes as runs", f"{len(data)} bytes")
    return np.frombuffer(data, np.uint8).reshape(-1, 2)


def _refusal(expected: str, found: str) -> ValueError:
    return ValueError(f"the label map: expected {expected}, found {found}; {RELOAD}")


def _type(value: object) -> str:
    return f"a value of type {type(value).__name__}"
