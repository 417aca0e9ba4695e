"""What the widgets of a page do: paint, stop, show, and take the settings of an image."""

from __future__ import annotations

import functools
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from cldm.pictures import Rgb
from datasets.label_space import Ids
from webui.condition import Hint
from webui.loading import MAP_PARTS, QUIET, map_values, unchanged
from webui.look import show_progress, show_refusal
from webui.orders import LIMITS, Order
from webui.painter import Done, Painter

log = logging.getLogger(__name__)

SETTINGS = (
    *("prompt", "negative_prompt", "num", "seed", "steps", "scale", "strength", "guess_mode", "sampler"),
    *("eta", "prior", "start"),
)
AT_ONCE = 8  # orders that wait for the model in their own right and can be stopped at once; others queue
LOOK_SECONDS = 0.3  # between two looks at whether the model is there
EMPTY = "The images appear here."
RESULT_PARTS = ("live", "results", "images", "view", "files", "note")


def refusing(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose refusals Gradio shows and hands to callers as they are."""

    @functools.wraps(work)
    def refusing_work(*args: Any) -> Any:
        try:
            return work(*args)
        except (ValueError, OSError) as error:
            raise refusal(error) from error

    return refusing_work


def refusal(error: Exception) -> gr.Error:
    """A refusal as Gradio shows it; what the system says of files stays in the log."""
    log.info("refused: %s", error)
    said = str(error) if isinstance(error, ValueError) else "a file of the server cannot be read or written"
    return gr.Error(said, print_exception=False)


def order_of(painter: Painter, settings: dict[str, Any]) -> Order:
    """The order that the widgets or a caller of the API ask for."""
    sample = replace(
        painter.session.sample,
        steps=int(settings["steps"]),
        guess_mode=bool(settings["guess_mode"]),
        **{name: settings[name] for name in ("negative_prompt", "scale", "strength", "sampler", "eta")},
    )
    numbers = {name: int(settings[name] or 0) for name in ("num", "seed", "start")}  # an emptied field is 0
    return Order(settings["prompt"], sample=sample, prior=settings["prior"], **numbers)


def connect_model(page: gr.Blocks, painter: Painter, parts: dict[str, Any]) -> None:
    """A note on the model while it is read."""

    def wait() -> Iterator[str]:
        begin, loading, stages = time.monotonic(), painter.session.loading, painter.session.stages
        while not loading.done():
            stage, seconds = (stages or ["reading"])[-1], time.monotonic() - begin
            yield f"The model comes: {stage} ({seconds:.0f} s). The map can be painted meanwhile."
            time.sleep(LOOK_SECONDS)
        error = loading.exception()
        yield EMPTY if error is None else f"The model cannot be read: {error}"

    page.load(wait, outputs=parts["note"], concurrency_limit=None, **QUIET)


def connect_paint(page: gr.Blocks, painter: Painter, parts: dict[str, Any]) -> None:
    """The two buttons."""

    def from_editor(labels: Ids, name: str) -> Hint:
        return painter.edited(labels, name)

    def from_file(file: str | None, kind: str) -> Hint:
        return painter.find_hint(file, kind, "")

    find = from_editor if painter.condition.space else from_file

    # Gradio puts the request where it stands, so before what is of any number.
    def paint(request: gr.Request, first: Any, second: str, *settings: Any) -> Iterator[tuple[Any, ...]]:
        pictures: list[Rgb] = []
        try:
            order = order_of(painter, dict(zip(SETTINGS, settings, strict=True)))
            for item in painter.paint(find(first, second), order, request.session_hash or ""):
                if isinstance(item, Done):
                    yield "" if item.results else gr.skip(), *result_values(item)
                else:
                    pictures = item.pictures or pictures
                    live = show_progress(item, pictures, painter.session.loading.done())
                    yield live, *(gr.skip() for _ in RESULT_PARTS[1:])
        except (ValueError, OSError) as error:
            raise refusal(error) from error

    hint_parts = ("editor", "name") if painter.condition.space else ("file", "kind")
    inputs = [parts[name] for name in (*hint_parts, *SETTINGS)]
    buttons = [parts["paint"], parts["stop"]]

    def expect(request: gr.Request) -> tuple[gr.Button, gr.Button]:
        painter.expect(request.session_hash or "")
        return buttons_while(busy=True)

    # First, and at once, so that an order that waits for others can be stopped, too.
    asked = parts["paint"].click(expect, outputs=buttons, concurrency_limit=None, **QUIET)
    outputs = [parts[name] for name in RESULT_PARTS]
    done = asked.then(paint, inputs, outputs, concurrency_limit=AT_ONCE, **QUIET)
    done.then(lambda: buttons_while(busy=False), outputs=buttons, concurrency_limit=None, **QUIET)
    done.failure(lambda: "", outputs=parts["live"], concurrency_limit=None, **QUIET)

    def stop(request: gr.Request) -> None:
        painter.stop(request.session_hash or "")

    def leave(request: gr.Request) -> None:
        painter.leave(request.session_hash or "")

    parts["stop"].click(stop, concurrency_limit=None, **QUIET)
    page.unload(leave)


def buttons_while(*, busy: bool) -> tuple[gr.Button, gr.Button]:
    """The buttons that paint and stop."""
    return gr.Button(interactive=not busy), gr.Button(interactive=busy)


def result_values(done: Done) -> tuple[Any, ...]:
    """What came of an order, for RESULT_PARTS but the first."""
    results = [(result.seed, str(result.image), str(result.mixed)) for result in done.results]
    if not results:
        return *(gr.skip() for _ in RESULT_PARTS[1:-1]), done.note
    images = gr.Gallery(captioned(results, under=False), visible=True)
    view = gr.Radio(value=0, visible=True)
    return results, images, view, gr.File(done.files, visible=True), done.note


def captioned(results: list[tuple[int, str, str]], *, under: bool) -> list[tuple[str, str]]:
    """The images with their seeds, or the same under the hint."""
    return [(mixed if under else image, f"seed {seed}") for seed, image, mixed in results]


def connect_results(parts: dict[str, Any]) -> None:
    """The images by themselves or under the hint; the seed of one that is clicked."""

    def view(results: list[tuple[int, str, str]], under: int) -> list[tuple[str, str]]:
        return captioned(results, under=bool(under))

    def take_seed(results: list[tuple[int, str, str]], event: gr.SelectData) -> int:
        return results[event.index][0]

    parts["view"].input(view, [parts["results"], parts["view"]], parts["images"], **QUIET)
    parts["images"].select(take_seed, parts["results"], parts["seed"], **QUIET)


def connect_settings(painter: Painter, parts: dict[str, Any]) -> None:
    """A new seed; the settings and the map of an image that was made before."""
    most = int(LIMITS["seed"][1])
    parts["reseed"].click(lambda: secrets.randbelow(most + 1), outputs=parts["seed"], **QUIET)
    has_editor = painter.condition.space is not None

    def restore(file: str) -> tuple[Any, ...]:
        try:
            order, hint = painter.restore(file, Order("", sample=painter.session.sample))
        except ValueError as error:
            log.info("refused: %s", error)
            kept, told = [gr.skip() for _ in SETTINGS], show_refusal(str(error))
            return *kept, *(unchanged(told) if has_editor else (told,))
        values = [getattr(order if hasattr(order, name) else order.sample, name) for name in SETTINGS]
        if not has_editor:
            return *values, ""
        return *values, *(unchanged() if hint is None else map_values(hint))

    outputs = [parts[name] for name in (*SETTINGS, *(MAP_PARTS if has_editor else ("told",)))]
    parts["restore"].upload(restore, parts["restore"], outputs, **QUIET)
