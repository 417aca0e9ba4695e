"""What becomes the hint of a page: examples, files, photos and sizes, into the editor or as a picture."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import gradio as gr

from cldm.pictures import Rgb
from datasets.label_space import Ids, Size
from webui.condition import Hint
from webui.look import show_refusal, show_told
from webui.painter import Painter
from webui.uploads import MAX_IMAGE_PIXELS, STEP

log = logging.getLogger(__name__)

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # the page's own affair
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
MAP_PARTS = ("editor", "name", "told", "height", "width")  # what a new map changes


class IntoEditor:
    """Handlers of events: they return values for MAP_PARTS; a refusal is told and leaves the map alone."""

    def __init__(self, painter: Painter) -> None:
        self.painter = painter

    def pick(self, prompt: str, event: gr.SelectData) -> tuple[Any, ...]:
        """An example that was clicked, and the prompt that belongs to it."""
        example = self.painter.examples[event.index].hint
        return *map_values(example), self.painter.prompt_for(example.name, prompt)

    def load(self, file: str | None, kind: str) -> tuple[Any, ...]:
        """A file of the visitor."""
        return unless_refused(lambda: self.painter.find_hint(file, kind, "")) if file else unchanged()

    def read_photo(self, file: str | None) -> tuple[Any, ...]:
        """The map that the segmenter makes of a photo, over it."""
        return unless_refused(lambda: self.painter.from_photo(file, None)) if file else unchanged()

    def resize(self, labels: Ids, name: str, height: float | None, width: float | None) -> tuple[Any, ...]:
        """The map in the editor at another size."""
        painter = self.painter
        return unless_refused(
            lambda: painter.resized(painter.edited(labels, name), checked_size(height, width))
        )


def map_values(hint: Hint, photo: Rgb | None = None) -> tuple[Any, ...]:
    """Values for MAP_PARTS."""
    assert hint.labels is not None
    value = hint.labels if photo is None else (hint.labels, photo)
    return value, hint.name, show_told(hint.name, hint.found), *hint.labels.shape


def unchanged(told: Any = None) -> tuple[Any, ...]:
    """Values for MAP_PARTS that leave the map as it is; `told` is said of it, if anything."""
    return tuple(told if told and name == "told" else gr.skip() for name in MAP_PARTS)


def unless_refused(work: Callable[[], Hint | tuple[Hint, Rgb]]) -> tuple[Any, ...]:
    """Values for MAP_PARTS of the hint that `work` finds, or the reason why it finds none."""
    try:
        found = work()
    except ValueError as error:
        log.info("refused: %s", error)
        return unchanged(show_refusal(str(error)))
    return map_values(found) if isinstance(found, Hint) else map_values(*found)


def connect_editor(painter: Painter, parts: dict[str, Any]) -> None:
    """Whatever is loaded last is the map in the editor."""
    into, outputs = IntoEditor(painter), [parts[name] for name in MAP_PARTS]
    parts["examples"].select(into.pick, parts["prompt"], [*outputs, parts["prompt"]], **QUIET)
    for event in (parts["file"].upload, parts["kind"].input):
        event(into.load, [parts["file"], parts["kind"]], outputs, **QUIET)
    sized = [parts[name] for name in ("editor", "name", "height", "width")]
    parts["resize"].click(into.resize, sized, outputs, **QUIET)
    if "photo" in parts:
        parts["photo"].upload(into.read_photo, parts["photo"], outputs, **QUIET, **ONE_AT_A_TIME)


def checked_size(height: float | None, width: float | None) -> Size:
    """A size that images can have, else ValueError."""
    size = int(height or 0), int(width or 0)
    if min(size) < STEP or size[0] % STEP or size[1] % STEP or size[0] * size[1] > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"expected height and width in multiples of {STEP}, at most {MAX_IMAGE_PIXELS} pixels in all, "
            f"found {size[0]}x{size[1]}"
        )
    return size


def connect_picture(painter: Painter, parts: dict[str, Any]) -> None:
    """The picture that was loaded is shown as the model sees it."""

    def look(file: str | None, kind: str) -> tuple[Any, ...]:
        if not file:
            return None, ""
        try:
            hint = painter.find_hint(file, kind, "")
        except ValueError as error:
            log.info("refused: %s", error)
            return None, show_refusal(str(error))
        return hint.colours, show_told(hint.name, hint.found)

    outputs = [parts["shown"], parts["told"]]
    for event in (parts["file"].upload, parts["file"].clear):
        event(look, [parts["file"], parts["kind"]], outputs, **QUIET)
