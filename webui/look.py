"""How a page looks: system fonts, so that nothing is fetched, one accent, maps in hard pixels."""

from __future__ import annotations

import html
from collections.abc import Mapping

import gradio as gr

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "Consolas", "Menlo", "monospace")

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
#told .image-container, #told .image-frame, #told button { width: 100%; height: auto; }
#told img { width: 100%; height: auto; max-height: 220px; object-fit: contain; }
#examples img, #told img { image-rendering: pixelated; }
#images .caption-label { position: static; max-width: none; border: 0; width: 100%; }

.legend { display: flex; flex-wrap: wrap; gap: 4px 12px; font-size: var(--text-sm); }
.legend span { display: inline-flex; align-items: center; gap: 5px; }
.legend i { width: 12px; height: 12px; border-radius: 3px; border: 1px solid var(--border-color-primary); }
.refusal { color: var(--error-text-color); overflow-wrap: anywhere; }
#note { color: var(--body-text-color-subdued); }
#reseed { align-self: end; }

@media (min-width: 900px) { #right { position: sticky; top: 12px; } }
"""


def make_theme() -> gr.themes.Base:
    """Gradio's default theme in our colours and in fonts that every machine has."""
    return gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=SANS, font_mono=MONO)


def show_legend(legend: Mapping[str, tuple[int, int, int]]) -> str:
    """HTML of names beside their colours."""
    rows = (
        f'<span><i style="background: rgb({r}, {g}, {b})"></i>{html.escape(name)}</span>'
        for name, (r, g, b) in legend.items()
    )
    return f'<div class="legend">{"".join(rows)}</div>'


def show_refusal(sentence: str) -> str:
    """HTML of a sentence that says why something cannot be used."""
    return f'<div class="refusal" role="alert">{html.escape(sentence)}</div>'
