"""How a page looks: system fonts, so that nothing is fetched, one accent, maps in hard pixels."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

import cv2
import gradio as gr

from cldm.pictures import Rgb
from webui.session import Progress

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "Consolas", "Menlo", "monospace")

PREVIEW_QUALITY = 80

CSS = """
.gradio-container {
  width: 100% !important; max-width: 1320px !important; margin: 0 auto !important;
  overflow: visible !important;  /* or nothing in it can stick */
}
#head h1 { margin-bottom: 0.1em; }
#head p { color: var(--body-text-color-subdued); margin-top: 0; }

/* Pictures in their own shape, a gallery as high as they are. */
#examples .grid-wrap, #images .grid-wrap { height: auto; max-height: none; min-height: 0; overflow: visible; }
#examples .thumbnail-item, #images .thumbnail-item { aspect-ratio: auto; height: auto; }
#examples .thumbnail-item img, #images .thumbnail-item img { height: auto; display: block; }
#examples .grid-container, #images .grid-container { grid-template-rows: none; grid-auto-rows: auto; }
#examples .gallery-item, #images .gallery-item { height: auto; }
#images .grid-wrap:has(img) { padding-top: 34px; }  /* below the label */
#shown .image-container, #shown .image-frame, #shown button { width: 100%; height: auto; }
#shown img { width: 100%; height: auto; max-height: 420px; object-fit: contain; }
#examples img, #shown img { image-rendering: pixelated; }
#images .caption-label { position: static; max-width: none; border: 0; width: 100%; }

.told { font-size: var(--text-sm); color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
#told { padding: 0; }
#live:not(:has(.live)) { display: none; }
.live .previews { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 6px; }
.live img { width: 100%; border-radius: var(--radius-sm); display: block; }
.live .bar { height: 6px; margin-top: 8px; border-radius: 3px; background: var(--background-fill-secondary); }
.live .bar i { display: block; height: 100%; border-radius: 3px; background: var(--color-accent); }
.live p { font-size: var(--text-sm); color: var(--body-text-color-subdued); margin: 4px 0 0; }
.refusal { color: var(--error-text-color); overflow-wrap: anywhere; }
#note { color: var(--body-text-color-subdued); }
#reseed, #resize { align-self: end; }

@media (min-width: 900px) { #right { position: sticky; top: 12px; } }
"""


def make_theme() -> gr.themes.Base:
    """Gradio's default theme in our colours and in fonts that every machine has."""
    return gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=SANS, font_mono=MONO)


def show_told(name: str, found: str) -> str:
    """HTML of what a file was taken for."""
    said = f": {html.escape(found)}" if found else ""
    return f'<div class="told"><b>{html.escape(name)}</b>{said}</div>'


def show_progress(progress: Progress, pictures: Sequence[Rgb], is_ready: bool) -> str:
    """HTML of how far a request is, and of what its images will be."""
    done, total, _ = progress
    waiting = "waiting for its turn" if is_ready else "waiting for the model"
    said = f"step {done} of {total}" if done else waiting
    shown = "".join(f'<img src="{as_data(picture)}" alt="preview">' for picture in pictures)
    return (
        f'<div class="live" role="progressbar" aria-valuemin="0" aria-valuemax="{total}" '
        f'aria-valuenow="{done}" aria-label="{said}"><div class="previews">{shown}</div>'
        f'<div class="bar"><i style="width: {100 * done / total:.0f}%"></i></div><p>{said}</p></div>'
    )


def as_data(picture: Rgb) -> str:
    """A picture as an address that holds it, so that a preview leaves no file."""
    content = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, PREVIEW_QUALITY])[1]
    return f"data:image/jpeg;base64,{base64.b64encode(content.tobytes()).decode()}"


def show_refusal(sentence: str) -> str:
    """HTML of a sentence that says why something cannot be used."""
    return f'<div class="refusal" role="alert">{html.escape(sentence)}</div>'
