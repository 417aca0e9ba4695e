"""The page of a condition: the map on the left, what to make of it and the images on the right."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np

from cldm.config import SAMPLER_NAMES
from webui.api import offer_api
from webui.events import EMPTY, connect_model, connect_paint, connect_results, connect_settings
from webui.label_editor import LabelEditor
from webui.loading import connect_editor, connect_picture
from webui.look import show_told
from webui.orders import LIMITS, MAX_PROMPT, PRIORS, WHOLE_RUN
from webui.painter import Painter
from webui.uploads import STEP

Parts = dict[str, Any]  # the widgets of a page by name

FIRST_START = 799  # the first step that the authors of the priors take


def build_page(painter: Painter) -> gr.Blocks:
    """All of a page: its widgets, then what they do."""
    condition = painter.condition
    with gr.Blocks(title=condition.title, analytics_enabled=False) as page:
        gr.Markdown(f"# {condition.title}\n{condition.summary}", elem_id="head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320, elem_id="left"):
                parts = edit_map(painter) if condition.space else load_picture(painter)
            with gr.Column(scale=5, min_width=320, elem_id="right"):
                parts |= {**ask(painter), **show_results(painter)}
                with gr.Accordion("More settings", open=False, elem_id="more"):
                    parts |= choose_sampling(painter)
        (connect_editor if condition.space else connect_picture)(painter, parts)
        connect_model(page, painter, parts)
        connect_paint(page, painter, parts)
        connect_results(parts)
        connect_settings(painter, parts)
        offer_api(painter, parts)
    return page


# -- the hint ---------------------------------------------------------------------------------------------


def edit_map(painter: Painter) -> Parts:
    """The editor with the first example in it, and what else can be loaded into it."""
    condition, first = painter.condition, painter.examples[0].hint
    assert condition.space is not None
    assert first.labels is not None
    parts: Parts = {"name": gr.State(first.name)}
    parts["editor"] = LabelEditor(condition.space, first.labels, elem_id="editor")
    parts["told"] = gr.HTML(show_told(first.name, first.found), elem_id="told")
    with gr.Tabs():
        with gr.Tab("Examples"):
            parts["examples"] = gr.Gallery(
                painter.thumbnails(), show_label=False, columns=3, height="auto", allow_preview=False,
                interactive=False, buttons=[], selected_index=0, elem_id="examples",
            )  # fmt: skip
        with gr.Tab("Your own map"):
            parts |= choose_file(painter)
        if painter.segment is not None:
            with gr.Tab("A photo"):
                parts["photo"] = gr.File(label="A photo, read by the segmenter", height=140, elem_id="photo")
        with gr.Tab("Size"):
            parts |= choose_size(np.shape(first.labels))
    return parts


def load_picture(painter: Painter) -> Parts:
    """A file, and the hint as it was understood."""
    parts = choose_file(painter)
    parts["shown"] = gr.Image(
        label="What the model is told", format="png", interactive=False, buttons=[], elem_id="shown"
    )
    parts["told"] = gr.HTML("", elem_id="told")
    return parts


def choose_file(painter: Painter) -> Parts:
    """A visitor's own file, and what is in it."""
    kinds = list(painter.condition.kinds)
    return {
        "file": gr.File(label=painter.condition.upload, height=140, elem_id="file"),
        "kind": gr.Radio(
            kinds, value=kinds[0], label="The file holds", elem_id="kind", visible=len(kinds) > 1
        ),
    }


def choose_size(size: tuple[int, ...]) -> Parts:
    """Height and width of map and images."""
    bounds: dict[str, Any] = {"precision": 0, "step": STEP, "minimum": STEP, "min_width": 90}
    with gr.Row():
        height = gr.Number(size[0], label="Height", elem_id="height", **bounds)
        width = gr.Number(size[1], label="Width", elem_id="width", **bounds)
        resize = gr.Button("Resize the map", size="sm", min_width=120, scale=0, elem_id="resize")
    return {"height": height, "width": width, "resize": resize}


# -- what to make of it -----------------------------------------------------------------------------------


def ask(painter: Painter) -> Parts:
    """What to paint, how many, and the two buttons."""
    prompt = painter.examples[0].prompt if painter.examples else ""
    parts: Parts = {
        "prompt": gr.Textbox(prompt, label="Prompt", lines=2, max_length=MAX_PROMPT, elem_id="prompt")
    }
    with gr.Row():
        parts["num"] = bounded_slider("num", 2, "Images")
        parts["seed"] = gr.Number(
            0, label="Seed of the first", precision=0, minimum=0, maximum=LIMITS["seed"][1], min_width=110,
            elem_id="seed",
        )  # fmt: skip
        parts["reseed"] = gr.Button("New seed", size="sm", min_width=90, scale=0, elem_id="reseed")
    with gr.Row():
        parts["paint"] = gr.Button("Paint", variant="primary", size="lg", scale=3, elem_id="paint")
        parts["stop"] = gr.Button("Stop", size="lg", scale=1, min_width=80, interactive=False, elem_id="stop")
    return parts


def choose_sampling(painter: Painter) -> Parts:
    """How to sample, in detail."""
    default, noun = painter.session.sample, painter.condition.noun
    parts: Parts = {
        "negative_prompt": gr.Textbox(
            default.negative_prompt, label="Negative prompt", max_length=MAX_PROMPT, elem_id="negative_prompt"
        ),
        "steps": bounded_slider("steps", default.steps, "Steps"),
        "scale": bounded_slider("scale", default.scale, "Guidance: how closely to follow the prompt", 0.5),
        "strength": bounded_slider("strength", default.strength, f"Strength of the {noun}", 0.05),
        "guess_mode": gr.Checkbox(
            default.guess_mode, label=f"Guess mode: the {noun} does without the prompt", elem_id="guess_mode"
        ),
        "sampler": gr.Radio(list(SAMPLER_NAMES), value=default.sampler, label="Sampler", elem_id="sampler"),
        "eta": bounded_slider("eta", default.eta, "Randomness of DDIM (eta)", 0.05),
    }
    has_prior = painter.session.starts is not None
    kinds = PRIORS if has_prior else (WHOLE_RUN,)
    parts["prior"] = gr.Dropdown(
        list(kinds), value=WHOLE_RUN, label="Noise prior", visible=has_prior, elem_id="prior"
    )
    parts["start"] = bounded_slider("start", FIRST_START, "First timestep, with a prior")
    parts["start"].visible = has_prior
    parts["restore"] = gr.UploadButton(
        "Take the settings of an image", size="sm", file_types=[".png"], elem_id="restore"
    )
    return parts


def bounded_slider(name: str, value: float, label: str, step: float = 1) -> gr.Slider:
    """A slider over the limits of a setting; a start beyond them moves to the nearer one."""
    least, most = LIMITS[name]
    start = min(max(value, least), most)
    return gr.Slider(least, most, value=start, step=step, label=label, min_width=160, elem_id=name)


# -- the images -------------------------------------------------------------------------------------------


def show_results(painter: Painter) -> Parts:
    """Where the images appear, first as previews."""
    views = [("Images", 0), (f"Under the {painter.condition.noun}", 1)]
    return {
        "results": gr.State([]),
        "live": gr.HTML("", elem_id="live"),
        "images": gr.Gallery(
            label="Images", columns=2, height="auto", format="png", interactive=False,
            buttons=["download", "fullscreen"], elem_id="images", visible=False,
        ),
        "view": gr.Radio(views, value=0, show_label=False, elem_id="view", visible=False),
        "note": gr.Markdown(EMPTY, elem_id="note"),
        "files": gr.File(
            label="Files", file_count="multiple", interactive=False, visible=False, elem_id="files"
        ),
    }  # fmt: skip
