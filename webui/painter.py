"""What a page does, apart from its widgets: find the hint, make the images, stop."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cldm.pictures import Rgb, read_settings, write_png
from datasets.label_space import Ids, LabelSpace, Size, resize_labels
from datasets.translation import translate
from webui.condition import Condition, Example, Hint
from webui.folder import KEPT, tidy
from webui.label_runs import decode_labels
from webui.orders import WHOLE_RUN, Order, order_from
from webui.session import Progress, Result, Session, safe_stem
from webui.uploads import MAX_IMAGE_PIXELS, check_picture, fitting_size, without_folder

WAIT_SECONDS = 0.2  # between two looks at whether an order that waits was stopped

log = logging.getLogger(__name__)

Segment = Callable[[Rgb], Ids]
"""A photo (H, W, 3) -> (H, W) train ids."""


class Done(NamedTuple):
    """What came of an order."""

    results: list[Result]
    map_file: Path | None  # label ids, of a hint that is a label map
    note: str

    @property
    def files(self) -> list[str]:
        """What there is to take away."""
        paths = [result.image for result in self.results] + ([self.map_file] if self.map_file else [])
        return [str(path) for path in paths]


@dataclass
class Painter:
    """A condition with a model and the hints to pick from."""

    condition: Condition
    session: Session
    examples: Sequence[Example] = field(default_factory=list)
    segment: Segment | None = None
    running: dict[str, threading.Event] = field(default_factory=dict, repr=False)  # by visitor

    # -- hints -------------------------------------------------------------------------------------------

    def find_hint(self, file: str | None, kind: str, example: str, size: Size | None = None) -> Hint:
        """The hint of a file that was loaded, else of a picked example; ValueError says what is wrong."""
        if file:
            if kind not in self.condition.kinds:
                raise ValueError(f"expected one of {', '.join(self.condition.kinds)}, found {kind[:50]!r}")
            return self.condition.read(Path(file), self.condition.kinds[kind], size or self.session.size)
        hints = {found.hint.name: found.hint for found in self.examples}
        if example not in hints:
            known = f" or the name of an example ({', '.join(hints)})" if hints else ""
            raise ValueError(f"expected a file{known}, found neither")
        return self.resized(hints[example], size)

    def resized(self, hint: Hint, size: Size | None) -> Hint:
        """A label map at another size, to the nearest pixel."""
        if size is None or hint.labels is None or hint.labels.shape == size:
            return hint
        return self.edited(resize_labels(hint.labels, size), hint.name)

    def edited(self, labels: Ids, name: str) -> Hint:
        """The hint of a map out of the editor."""
        if self.condition.from_labels is None:
            raise ValueError("this page paints from pictures; it has no editor")
        return self.condition.from_labels(labels, safe_stem(name))

    def from_photo(self, file: str, size: Size | None) -> tuple[Hint, Rgb]:
        """A photo's map by the segmenter, and the photo in the size of the map."""
        import cv2

        from datasets.files import read_image

        if self.segment is None:
            raise ValueError("this page was started without a segmenter; load a map")
        path = Path(file)
        with without_folder(path):
            own = check_picture(path)
            height, width = size or self.session.size or fitting_size(own)
            photo = cv2.resize(read_image(path), (width, height), interpolation=cv2.INTER_AREA)
        try:
            labels = self.session.worker.submit(self.segment, photo).result()
        except (OSError, ImportError) as error:
            log.warning("the segmenter: %s", error)
            raise ValueError("the segmenter cannot be read; the log of the page says why") from error
        return self.edited(labels, path.name)._replace(found="what the segmenter sees in the photo"), photo

    def prompt_for(self, example: str, prompt: str) -> str:
        """The caption of an example, unless the visitor wrote a prompt."""
        captions = {found.hint.name: found.prompt for found in self.examples}
        return captions[example] if not prompt.strip() or prompt in captions.values() else prompt

    def thumbnails(self) -> list[str]:
        """A picture of each example, written on the first call."""
        folder = self.session.folder / KEPT / "thumbnails"
        paths = [folder / f"{i}.png" for i in range(len(self.examples))]
        for path, example in zip(paths, self.examples, strict=True):
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                write_png(path, example.hint.colours)
        return [str(path) for path in paths]

    def restore(self, file: str, default: Order) -> tuple[Order, Hint | None]:
        """Order and map of an image that a page made; ValueError says why there are none."""
        path = Path(file)
        with without_folder(path):
            check_picture(path)
        settings = read_settings(path)
        if not isinstance(settings, dict):
            raise ValueError(f"{path.name}: expected a PNG of this page or of generate.py, found no settings")
        order = order_from(settings, default)
        if order.prior != WHOLE_RUN and self.session.starts is None:
            raise ValueError(
                f"{path.name}: it began from the noise prior {order.prior}; start the page with --prior FILE"
            )
        if self.condition.space is None or "map" not in settings:
            return order, None
        space = LabelSpace.load(str(settings.get("label_space", self.condition.space.name))[:50])
        labels = decode_labels(settings["map"], space, MAX_IMAGE_PIXELS)
        labels = resize_labels(labels, fitting_size(np.shape(labels)))  # of an image that was made: no change
        labels = translate(labels, space, self.condition.space).labels
        return order, self.edited(labels, str(settings.get("hint", path.name)))

    # -- images ------------------------------------------------------------------------------------------

    def expect(self, visitor: str) -> None:
        """A visitor asks for something, which `stop` ends from now on, though it may wait for its turn."""
        self.running[visitor] = threading.Event()

    def paint(
        self, hint: Hint, order: Order, visitor: str = "", *, previews: bool = True
    ) -> Iterator[Progress | Done]:
        """How far it is, step by step, and at last what came of it.

        visitor  whose `stop` ends it; a visitor who is gone, so that nothing more is taken, ends it as well
        """
        order.check()
        told: queue.SimpleQueue[Progress | Done | Exception] = queue.SimpleQueue()
        stop = self.running.setdefault(visitor, threading.Event())

        def work() -> None:
            try:
                tidy(self.session.folder)
                results = self.session.run(hint, order, told.put if previews else None, stop)
                told.put(self.finish(hint, order, results))
            except Exception as error:  # raised where the visitor is answered
                told.put(error)

        begin, job = time.perf_counter(), self.session.worker.submit(work)
        try:
            yield Progress(0, order.sample.steps)
            while True:
                try:
                    item = told.get(timeout=WAIT_SECONDS)
                except queue.Empty:
                    if stop.is_set() and job.cancel():  # before its turn has come
                        told.put(self.finish(hint, order, []))
                    continue
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, Done):
                    seconds = time.perf_counter() - begin
                    yield item._replace(note=f"{item.note} in {seconds:.1f} s.")
                    return
                yield item
        finally:
            stop.set()
            self.leave(visitor, stop)

    def stop(self, visitor: str) -> bool:
        """End what a visitor is waiting for, after the step that is computed; whether there was something."""
        found = self.running.get(visitor)
        if found is not None:
            found.set()
        return found is not None

    def leave(self, visitor: str, stop: threading.Event | None = None) -> None:
        """Forget a visitor who is answered or gone; `stop` is what is forgotten, if not whatever there is."""
        found = self.running.get(visitor)
        if found is not None and stop in (None, found):
            found.set()
            self.running.pop(visitor, None)

    def close(self, seconds: float) -> bool:
        """Stop all that is painted; whether it came to an end within some seconds."""
        for stop in list(self.running.values()):
            stop.set()
        return self.session.close(seconds)

    def finish(self, hint: Hint, order: Order, results: list[Result]) -> Done:
        """What an order came to, on disk and in words."""
        height, width = hint.colours.shape[:2]
        many = f"{len(results)} images" if len(results) != 1 else "1 image"
        note = f"{many} of {height}x{width}, each a PNG with its settings,"
        if len(results) < order.num:
            note = f"Stopped: {len(results)} of {order.num} images of {height}x{width},"
        if not results or hint.labels is None:
            return Done(results, None, note)
        return Done(results, self.write_map(hint, results[0].image.parent), note)

    def write_map(self, hint: Hint, folder: Path) -> Path:
        """The label ids of a hint, as the data sets have them."""
        space = self.condition.space
        if space is None or hint.labels is None:
            raise ValueError(f"{hint.name}: expected a label map, found a picture")
        ids = space.to_file_ids(hint.labels, hint.name)
        path = folder / f"{safe_stem(hint.name)}_labelIds.png"
        write_png(path, ids)
        return path
