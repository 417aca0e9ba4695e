"""The label-map editor as a Gradio component: brush, rectangle, fill, replace, pick, undo on a map of ids.

On the wire a map is `{"height": H, "width": W, "runs": BASE64}`: two bytes for each run of one id in
row-major order, first its length less one, then the id; longer runs are cut at 256. Runs and not deflate,
because the browser deflates only asynchronously: a button that is clicked right after a stroke would send the
map before it. They are small enough: Cityscapes at 512x1024 takes 12 to 28 KiB, where the server takes 256.
"""

from __future__ import annotations

import base64
import io
import json
from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.component_meta import ComponentMeta, updateable
from numpy.typing import NDArray
from PIL import Image

from datasets.label_space import Ids, LabelSpace, Rgb

MAX_PIXELS = 1 << 21  # 1024x2048, a frame of Cityscapes
MAX_TEXT = 200 << 10  # characters of `runs`: what the server takes of a message, less room for the rest of it
LONGEST = 256  # pixels of a run
JPEG_QUALITY = 85

HERE = Path(__file__).parent
# Each uses those before it.
SCRIPTS = ("label_map.js", "label_history.js", "label_view.js", "label_editor.js")
RELOAD = "reload the page and try again."

Payload = dict[str, Any]


class _WithoutStub(ComponentMeta):
    """ComponentMeta that writes no file: Gradio's own puts a .pyi beside the source when it is imported."""

    def __new__(mcs, name: str, bases: tuple[type, ...], attrs: dict[str, Any]) -> Any:
        attrs["__init__"] = updateable(attrs["__init__"])
        return ABCMeta.__new__(mcs, name, bases, attrs)


class LabelEditor(gr.HTML, metaclass=_WithoutStub):
    """A label map that a visitor can paint on.

    space       whose classes can be painted
    labels      (H, W) train ids, 255 = void: what the page starts with
    max_pixels  of a map that the browser sends
    kwargs      what gr.HTML takes: elem_id, visible, ...

    A handler receives (H, W) uint8 train ids, and returns such a map, or a pair of it and a photo to show
    under it: (H, W, 3) uint8, or None for none. `input` is the event of a finished edit; `change` is told of
    maps from Python too. A map of another content starts a new undo history.
    """

    def __init__(
        self, space: LabelSpace, labels: NDArray[np.uint8], *, max_pixels: int = MAX_PIXELS, **kwargs: Any
    ) -> None:
        # Private names: gr.HTML puts what is named like an argument into the page's JSON.
        self._space = space
        self._max_pixels = max_pixels
        super().__init__(
            labels,
            html_template=read_asset("label_editor.html"),
            css_template=read_asset("label_editor.css"),
            js_on_load=write_script(space),
            apply_default_css=False,
            **kwargs,
        )

    def preprocess(self, payload: Any) -> Ids:  # type: ignore[override]  # gr.HTML's own is text
        """The map that the browser sent; gr.Error, which the page shows as it is, if it is none."""
        try:
            return decode_labels(payload, self._space, self._max_pixels)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def postprocess(self, value: Any) -> Payload:  # type: ignore[override]  # as above
        """What the browser is sent for a map, or for a pair of a map and a photo."""
        labels, photo = value if isinstance(value, tuple) else (value, None)
        payload = encode_labels(self._space.check_train_ids(labels, "the label map"))
        # Always there, so that the browser can tell what Python says from what it said itself.
        return {**payload, "photo": "" if photo is None else encode_photo(photo)}

    def api_info(self) -> dict[str, Any]:
        """The wire format as a JSON schema."""
        return {
            "type": "object",
            "title": "label map",
            "properties": {
                "height": {"type": "integer"},
                "width": {"type": "integer"},
                "runs": {"type": "string", "description": "base64 of pairs of bytes: length less one, id"},
            },
            "required": ["height", "width", "runs"],
        }

    def example_payload(self) -> Payload:
        """A map as the API takes it."""
        return encode_labels(self.example_value())

    def example_value(self) -> Ids:
        """A map as a handler receives it."""
        return np.zeros((64, 128), np.uint8)


def read_asset(name: str) -> str:
    """A file of the component's front end."""
    return (HERE / name).read_text(encoding="utf-8")


def write_script(space: LabelSpace) -> str:
    """What the browser runs: the palette, then the files.

    The palette is no prop of gr.HTML, because Gradio 6 drops those at the first gr.update; and it is JSON in
    a string, because gr.HTML takes every quoted word of its script for the name of an event.
    """
    palette = json.dumps(json.dumps(list_palette(space)))
    return "\n".join(['"use strict";', f"const palette = JSON.parse({palette});", *map(read_asset, SCRIPTS)])


def list_palette(space: LabelSpace) -> list[dict[str, Any]]:
    """Id, name and colour of what can be painted, in the order of the label space, then void."""
    rows = zip((*space.names, "void"), [*space.colours.tolist(), [0, 0, 0]], strict=True)
    ids = (*range(space.num_classes), space.void)
    return [{"id": k, "name": name, "colour": colour} for k, (name, colour) in zip(ids, rows, strict=True)]


def encode_labels(labels: Ids) -> Payload:
    """The wire format of a map; ValueError if its runs are more than the server would take back."""
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
    if len(text) > MAX_TEXT:
        raise ValueError(
            f"the label map: expected at most {MAX_TEXT * 3 // 8} runs of one class, found {len(pairs)};"
            " a map of areas is needed, not of noise, or a smaller one."
        )
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


def encode_photo(photo: Rgb) -> str:
    """A picture as a data URL, which needs no file on the server."""
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        raise ValueError(f"the photo: expected uint8 (H, W, 3), found {photo.dtype} {photo.shape}.")
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


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
