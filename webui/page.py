"""The page of a condition: what to paint and how on the left, the images on the right."""

from __future__ import annotations

import inspect
import logging
import secrets
from dataclasses import replace
from typing import Any

import gradio as gr

from cldm.config import SAMPLER_NAMES
from webui.look import show_legend, show_refusal
from webui.painter import Painter, Picture
from webui.session import LIMITS, MAX_PROMPT, Order

log = logging.getLogger(__name__)

Parts = dict[str, Any]  # the widgets of a page by name

NOTHING = "Pick an example or load a file."
EMPTY = "The images appear here."
QUIET = {"api_visibility": "private", "show_progress": "hidden"}  # events that are the page's own affair


def build_page(painter: Painter) -> gr.Blocks:
    """All of a page: its widgets, then what they do."""
    condition = painter.condition
    with gr.Blocks(title=condition.title, analytics_enabled=False) as page:
        gr.Markdown(f"# {condition.title}\n{condition.summary}", elem_id="head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                parts = {**choose_hint(painter), **choose_settings(painter)}
            with gr.Column(scale=6, min_width=320, elem_id="right"):
                parts |= show_results(condition.noun)
        connect_hint(painter, parts)
        connect_paint(painter, parts)
    return page


def choose_hint(painter: Painter) -> Parts:
    """Examples, a file, and the hint as it was understood; the page starts with the first example."""
    first, pictures, kinds = painter.examples[0], painter.thumbnails(), list(painter.condition.kinds)
    parts: Parts = {}
    with gr.Tabs():
        with gr.Tab("Examples"):
            parts["examples"] = gr.Gallery(
                pictures, show_label=False, columns=3, height="auto", allow_preview=False, interactive=False,
                buttons=[], selected_index=0, elem_id="examples",
            )  # fmt: skip
        with gr.Tab("Your own"):
            parts["file"] = gr.File(label=painter.condition.upload, height=140, elem_id="file")
            parts["kind"] = gr.Radio(kinds, value=kinds[0], label="The file holds", elem_id="kind")
    # Not shown, but a value that the page and the API hand over like every other.
    parts["example"] = gr.Textbox(first.hint.name, label="Example", visible=False)
    parts["told"] = gr.Image(
        pictures[0],
        label="What the model is told",
        format="png",
        interactive=False,
        buttons=[],
        elem_id="told",
    )
    parts["legend"] = gr.Markdown(show_legend(first.hint.legend), elem_id="legend")
    parts["prompt"] = gr.Textbox(
        first.prompt, label="Prompt", lines=2, max_length=MAX_PROMPT, elem_id="prompt"
    )
    return parts


def choose_settings(painter: Painter) -> Parts:
    """How to sample, with what a page starts with, and the button."""
    default, noun = painter.session.sample, painter.condition.noun
    parts: Parts = {"num": bounded_slider("num", 2, "Number of images")}
    with gr.Row():
        parts["seed"] = gr.Number(
            0,
            label="Seed of the first image",
            precision=0,
            minimum=0,
            maximum=LIMITS["seed"][1],
            elem_id="seed",
        )
        parts["reseed"] = gr.Button("New seed", size="sm", min_width=90, scale=0, elem_id="reseed")
    with gr.Accordion("More settings", open=False, elem_id="more"):
        parts["negative_prompt"] = gr.Textbox(
            default.negative_prompt, label="Negative prompt", max_length=MAX_PROMPT, elem_id="negative_prompt"
        )
        parts["steps"] = bounded_slider("steps", default.steps, "Steps")
        parts["scale"] = bounded_slider(
            "scale", default.scale, "Guidance: how closely to follow the prompt", 0.5
        )
        parts["strength"] = bounded_slider("strength", default.strength, f"Strength of the {noun}", 0.05)
        parts["sampler"] = gr.Radio(list(SAMPLER_NAMES), value=default.sampler, label="Sampler")
    parts["paint"] = gr.Button("Paint", variant="primary", size="lg", elem_id="paint")
    return parts


def bounded_slider(name: str, value: float, label: str, step: float = 1) -> gr.Slider:
    """A slider over the limits of a setting; a start beyond them moves to the nearer one."""
    least, most = LIMITS[name]
    return gr.Slider(least, most, value=min(max(value, least), most), step=step, label=label, elem_id=name)


def show_results(noun: str) -> Parts:
    """Where the images appear."""
    images = gr.Gallery(
        label=f"Images, each beside itself under the {noun}", columns=2, height="auto", format="png",
        interactive=False, buttons=["download", "fullscreen"], elem_id="images",
    )  # fmt: skip
    return {"images": images, "note": gr.Markdown(EMPTY, elem_id="note")}


def connect_hint(painter: Painter, parts: Parts) -> None:
    """What was chosen last is what the model is told, and is shown as soon as it is chosen."""

    def look_at(file: str | None, kind: str, example: str) -> tuple[Any, str]:
        if not file and not example:
            return None, NOTHING
        try:
            hint = painter.find_hint(file, kind, example)
        except ValueError as error:
            return None, show_refusal(str(error))
        return hint.colours, show_legend(hint.legend)

    def pick(prompt: str, event: gr.SelectData) -> tuple[Any, ...]:
        example = painter.examples[event.index].hint
        told = painter.thumbnails()[event.index], show_legend(example.legend)
        return example.name, None, painter.prompt_for(example.name, prompt), *told

    def load(file: str | None, kind: str) -> tuple[Any, ...]:
        return "", gr.Gallery(selected_index=None), *look_at(file, kind, "")

    def some(*names: str) -> list[Any]:
        return [parts[name] for name in names]

    parts["examples"].select(
        pick, some("prompt"), some("example", "file", "prompt", "told", "legend"), **QUIET
    )
    for event in (parts["file"].upload, parts["file"].clear):
        event(load, some("file", "kind"), some("example", "examples", "told", "legend"), **QUIET)
    parts["kind"].input(look_at, some("file", "kind", "example"), some("told", "legend"), **QUIET)


def connect_paint(painter: Painter, parts: Parts) -> None:
    """The two buttons; `generate` is also what the API offers, under these names."""

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
        sampler: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - gradio finds it by its default
    ) -> tuple[list[Picture], str]:
        def report(done: int, total: int) -> None:
            progress((done, total), desc="Painting", unit="steps")

        sample = replace(
            painter.session.sample,
            negative_prompt=negative_prompt,
            steps=int(steps),
            scale=scale,
            strength=strength,
            sampler=sampler,
        )
        order = Order(prompt, int(num), int(seed or 0), sample)  # an emptied field is 0
        try:
            return painter.paint(painter.find_hint(file, kind, example), order, report)
        except ValueError as error:
            log.info("refused: %s", error)
            raise gr.Error(str(error), print_exception=False) from error

    names = list(inspect.signature(generate).parameters)[:-1]
    parts["paint"].click(
        generate,
        [parts[name] for name in names],
        [parts["images"], parts["note"]],
        api_name="generate",
        show_progress_on=parts["images"],
    )
    parts["reseed"].click(
        lambda: secrets.randbelow(int(LIMITS["seed"][1]) + 1), outputs=parts["seed"], **QUIET
    )
