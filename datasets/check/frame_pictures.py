"""Pictures of frames for people: the photo, the map in colours with void hatched, and the words to it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datasets.base import resize_image
from datasets.check import spread
from datasets.check.findings import SEVERITIES, Finding, Frame, Report
from datasets.check.listing import Source
from datasets.files import read_image, read_labels
from datasets.label_space import Ids, LabelSpace, Rgb, Size, resize_labels
from datasets.segmentation import SegmentationDataset

HEIGHT, WIDEST = 160, 400  # pixels of a picture on a sheet
HATCH = ((0, 0, 0), (200, 200, 200))
HATCH_STEP = 6
BLANK = (70, 70, 70)
FONT_SIZE = 12

Item = TypeVar("Item")


class Panels(NamedTuple):
    """One row of a sheet, all of one height; what the map is laid over is the photo."""

    photo: Rgb
    painted: Rgb
    words: Rgb


def sheet_rows(source: Source, report: Report, count: int) -> list[Panels]:
    """The frames that a person should see, each with its findings."""
    findings: dict[tuple[str | None, str | None], list[Finding]] = {}
    for item in report.findings:
        findings.setdefault((item.split, item.key), []).append(item)
    return [
        frame_panels(source, frame, findings.get((frame.split, frame.key), []))
        for frame in frames_to_show(report, count)
    ]


def frames_to_show(report: Report, count: int) -> list[Frame]:
    """At most `count` frames: one of each code in turn, errors first, then others from all over."""
    frames = {(frame.split, frame.key): frame for listed in report.frames.values() for frame in listed}
    by_code: dict[str, list[tuple[str | None, str | None]]] = {}
    for severity in SEVERITIES:
        for item in report.of(severity):
            if (item.split, item.key) in frames:
                by_code.setdefault(item.code, []).append((item.split, item.key))
    turns = zip_longest(*by_code.values())
    shown = dict.fromkeys(place for turn in turns for place in turn if place is not None)
    everything = list(frames)
    shown |= dict.fromkeys(spread(everything, count))
    return [frames[split, key] for split, key in list(shown)[:count] if split is not None and key is not None]


def frame_panels(source: Source, frame: Frame, findings: Sequence[Finding]) -> Panels:
    """A frame as it is on disk, however damaged; what cannot be read is grey."""
    photo, painted = _or_none(read_image, frame.photo), _or_none(_painter(source), frame)
    height, width = next((p.shape[:2] for p in (photo, painted) if p is not None), (HEIGHT, 2 * HEIGHT))
    size = (HEIGHT, max(1, min(WIDEST, round(HEIGHT * width / height))))
    blank = np.full((*size, 3), BLANK, np.uint8)
    lines = [f"{frame.split}  {frame.key}", *(f"{item.severity} {item.code}" for item in findings)]
    lines.append(source.sentence if frame.prompt is None else frame.prompt)
    return Panels(
        blank if photo is None else resize_image(photo, size),
        blank if painted is None else resize_labels(painted, size),
        words(lines, size),
    )


def paint_with_void(space: LabelSpace, train_ids: Ids) -> Rgb:
    """(H, W, 3) colours of a map of train ids, with void hatched: it is no black class."""
    painted = space.paint(train_ids)
    height, width = train_ids.shape
    step = max(1, height * HATCH_STEP // HEIGHT)
    stripes = (np.arange(height)[:, None] + np.arange(width)) // step % 2
    void = train_ids == space.void
    painted[void] = np.array(HATCH, np.uint8)[stripes][void]
    return painted


def words(lines: Sequence[str], size: Size) -> Rgb:
    """Lines of text on white, as large as suits the height; what does not fit is cut off."""
    height, width = size
    image, font = Image.new("RGB", (width, height), "white"), max(FONT_SIZE, FONT_SIZE * height // HEIGHT)
    text = "\n".join(part for line in lines for part in textwrap.wrap(line, width // (font // 2 + 1)) or [""])
    ImageDraw.Draw(image).multiline_text(
        (font // 2, font // 3), text, "black", font=ImageFont.load_default(font), spacing=font // 4
    )
    return np.array(image)


def _painter(source: Source) -> Callable[[Frame], Rgb]:
    """What shows the map of a frame: its classes, or the control as it is."""

    def paint(frame: Frame) -> Rgb:
        if frame.labels is None or source.space is None:
            return read_image(frame.photo if frame.control is None else frame.control)
        if issubclass(source.cls, SegmentationDataset):
            ids = source.cls.read_train_ids(frame.labels)
        else:
            ids = source.space.to_train_ids(read_labels(frame.labels), str(frame.labels))
        return paint_with_void(source.space, ids)

    return paint


def _or_none(read: Callable[[Item], Rgb], item: Item) -> Rgb | None:
    try:
        return read(item)
    except (ValueError, OSError):
        return None
