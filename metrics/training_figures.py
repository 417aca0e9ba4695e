"""A training in curves, from the lines that `cldm.validation` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metrics.charts import Line, line_chart
from metrics.page import Html, tag


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file with a JSON object in each line; a last line that is being written is left out.

    Raises
        ValueError  a line that is no JSON
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a JSON object in each line, found {error}") from error


def verdict(validation: Sequence[Mapping[str, Any]]) -> list[Html]:
    """The line that the training printed when its model began to follow the maps, or that it did not."""
    news = next((line["news"] for line in validation if line.get("news")), None)
    if news:
        return [tag("p", "Printed during the training: ", tag("strong", news), class_="news")]
    if validation:
        words = f"Adherence was not yet clearly above 0 in these {validation[-1]['step']} steps."
        return [tag("p", words, class_="news")]
    return []


def curves(training: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]]) -> Html:
    """Loss and adherence over optimizer steps."""
    losses = [
        Line("training", points_of(training, "loss_simple"), 0),
        Line("validation, right maps", points_of(validation, "loss_simple"), 1),
        Line("validation, maps of other scenes", points_of(validation, "loss_shuffled_hint"), 2),
    ]
    percent = [(step, 100 * value) for step, value in points_of(validation, "adherence")]
    errors = [100 * line["adherence_error"] for line in validation]
    since = validation[-1]["follows_since"] if validation else None
    mark = None if since is None else (float(since), f"follows its maps since step {since}")
    adherence = [Line("adherence, with its standard error", percent, 1, errors)]
    charts = [
        tag("div", tag("h3", "Loss"), line_chart(losses, x_name="optimizer step", y_name="loss")),
        tag(
            "div",
            tag("h3", "Adherence"),
            line_chart(adherence, x_name="optimizer step", y_name="percent", mark=mark),
        ),
    ]
    return tag("div", *charts, class_="charts")


def points_of(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """Step and value of each record."""
    return [(float(line["step"]), float(line[name])) for line in lines]
