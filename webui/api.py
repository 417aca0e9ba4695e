"""The page's work under one name, for programs; docs/webui.md has the client."""

from __future__ import annotations

import inspect
import secrets
from typing import Any

import gradio as gr

from webui.events import SETTINGS, order_of, refusing
from webui.loading import ONE_AT_A_TIME, checked_size
from webui.painter import Done, Painter


def offer_api(painter: Painter, parts: dict[str, Any]) -> None:
    """`/generate`: its parameters are those of the function here, its defaults those of the page."""

    def generate(
        file: str | None,
        kind: str,
        example: str,
        prompt: str,
        negative_prompt: str,
        num: float,
        seed: float | None,
        steps: float,
        scale: float,
        strength: float,
        guess_mode: bool,
        sampler: str,
        eta: float,
        prior: str,
        start: float,
        height: float,
        width: float,
    ) -> tuple[list[str], str]:
        asked = dict(locals())
        size = checked_size(height, width) if height or width else None
        hint = painter.find_hint(file, kind, example, size)
        order = order_of(painter, {name: asked[name] for name in SETTINGS})
        *_, done = painter.paint(hint, order, secrets.token_hex(8))
        assert isinstance(done, Done)
        return done.files, done.note

    # Not shown; the page has an editor in their place.
    hidden = {
        "file": gr.File(visible=False),
        "kind": gr.Textbox(next(iter(painter.condition.kinds)), visible=False),
        "example": gr.Textbox(painter.examples[0].hint.name if painter.examples else "", visible=False),
        "height": gr.Number(0, precision=0, visible=False),
        "width": gr.Number(0, precision=0, visible=False),
    }
    inputs = [
        hidden[name] if name in hidden else parts[name] for name in inspect.signature(generate).parameters
    ]
    answers = [gr.File(file_count="multiple", visible=False), gr.Textbox(visible=False)]
    gr.Button(visible=False).click(refusing(generate), inputs, answers, api_name="generate", **ONE_AT_A_TIME)
