"""The cards of `tool_judge_streets.py --images` as a table and as bars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets.label_space import LabelSpace
from metrics.page import Html, bars, table, tag

CONTROLS = {"shipped": 1, "fresh": 2}  # whose samples were judged, and the number of the page's colour
PHOTOS = ("photos", 0)
LABEL_SPACE = "cityscapes"


def score_table(cards: Mapping[str, Mapping[str, Any]]) -> Html:
    """Scores of all classes together, and what else the judge is asked."""
    header = [
        "",
        "mIoU",
        "95 % interval",
        "of the ceiling",
        "pixels right",
        "weather right",
        "feature distance",
    ]
    ceiling = next(iter(cards.values()))["ceiling"]
    rows = [["photos of these maps (ceiling)", *scores(ceiling), "", ""]]
    for name, card in cards.items():
        weather = (card.get("condition") or {}).get("accuracy")
        distance = (card.get("feature_distance") or {}).get("distance")
        row = [*scores(card["segmentation"], card["ratio"]["miou"]), figure(weather), figure(distance)]
        rows.append([f"{name} control", *row])
        rows.append([f"{name} control, other maps", *scores(card["shuffled"]), "", ""])
    return table(header, rows)


def scores(segmentation: Mapping[str, Any], ratio: float | None = None) -> list[str]:
    """The first figures of a row of the table."""
    low, high = segmentation["miou_interval"]
    interval = f"{figure(low)} to {figure(high)}"
    part = "" if ratio is None else f"{ratio:.0%}"
    return [figure(segmentation["miou"]), interval, part, figure(segmentation["pixel_accuracy"])]


def figure(value: float | None) -> str:
    """Three decimals, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def class_bars(cards: Mapping[str, Mapping[str, Any]]) -> Html:
    """Intersection over union of each class, beside the photos'."""
    space = LabelSpace.load(LABEL_SPACE)
    ceiling = next(iter(cards.values()))["ceiling"]
    rows = []
    for name, colour in zip(space.names, space.colours, strict=True):
        values = [ceiling["iou"].get(name)]
        values += [card["segmentation"]["iou"].get(name) for card in cards.values()]
        rows.append((name, "rgb({}, {}, {})".format(*colour), values))
    series = [PHOTOS, *((f"{name} control", CONTROLS[name]) for name in cards)]
    return tag("div", tag("h3", "Intersection over union of each class"), bars(rows, series))
