"""The label-map editor as a Gradio component: brush, rectangle, fill, replace, pick, undo on a map of ids."""

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
from webui.label_runs import MAX_PIXELS, Payload, decode_labels, encode_labels

MAX_TEXT = 200 << 10  # characters of `runs`: what the server takes of a message, less room for the rest
JPEG_QUALITY = 85

HERE = Path(__file__).parent
# Each uses those before it.
SCRIPTS = ("label_map.js", "label_history.js", "label_view.js", "label_editor.js")


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
        if len(payload["runs"]) > MAX_TEXT:
            raise gr.Error(
                f"the label map: expected at most {MAX_TEXT * 3 // 8} runs of one class, found"
                f" {len(payload['runs']) * 3 // 8}; a map of areas is needed, or a smaller one.",
                print_exception=False,
            )
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


def encode_photo(photo: Rgb) -> str:
    """A picture as a data URL, which needs no file on the server."""
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        raise ValueError(f"the photo: expected uint8 (H, W, 3), found {photo.dtype} {photo.shape}.")
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
