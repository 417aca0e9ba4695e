"""The page's work under one name, for programs; docs/webui.md has the client."""

from __future__ import annotations

import inspect
import secrets
from typing import Any

import gradio as gr

from webui.events import SETTINGS, order_of, refusing
from webui.loading import ONE_AT_A_TIME, checked_size
from webui.orders import typed
from webui.painter import Done, Painter

LIKE: dict[str, Any] = {"str": "text", "int": 1, "float": 1.5, "bool": True}  # values of a type


def offer_api(painter: Painter, parts: dict[str, Any]) -> None:
    """`/generate`: its parameters are those of the function here, its defaults those of the page."""

    def generate(
        file: Any,
        kind: str,
        example: str,
        prompt: str,
        negative_prompt: str,
        num: int,
        seed: int,
        steps: int,
        scale: float,
        strength: float,
        guess_mode: bool,
        sampler: str,
        eta: float,
        prior: str,
        start: int,
        height: int,
        width: int,
    ) -> tuple[list[str], str]:
        asked = {
            name: typed(value, name, LIKE[types[name]]) for name, value in locals().items() if name in types
        }
        size = checked_size(height, width) if height or width else None
        hint = painter.find_hint(path_of(file), kind, example, size)
        order = order_of(painter, {name: asked[name] for name in SETTINGS})
        *_, done = painter.paint(hint, order, secrets.token_hex(8), previews=False)
        assert isinstance(done, Done)
        return done.files, done.note

    parameters = inspect.signature(generate).parameters
    types = {name: parameter.annotation for name, parameter in parameters.items() if name != "file"}
    # Not shown; the page has an editor in their place.
    hidden = {
        "file": gr.File(visible=False),
        "kind": gr.Textbox(next(iter(painter.condition.kinds)), visible=False),
        "example": gr.Textbox(painter.examples[0].hint.name if painter.examples else "", visible=False),
        "height": gr.Number(0, precision=0, visible=False),
        "width": gr.Number(0, precision=0, visible=False),
    }
    inputs = [hidden[name] if name in hidden else parts[name] for name in parameters]
    answers = [gr.File(file_count="multiple", visible=False), gr.Textbox(visible=False)]
    # As they were sent: the widgets take True for 1, and say nothing of what they cannot read.
    gr.Button(visible=False).click(
        refusing(generate), inputs, answers, api_name="generate", preprocess=False, **ONE_AT_A_TIME
    )


def path_of(file: Any) -> str | None:
    """Where an uploaded file is; Gradio has checked that it was uploaded."""
    if isinstance(file, dict):
        return str(file["path"])
    if file is not None:
        raise ValueError("expected one file, found several")
    return None
