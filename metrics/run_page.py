"""A training as a page: what it printed, its curves, its losses by noise level, its grids."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metrics.charts import Line, line_chart
from metrics.page import Html, gallery, missing, page, picture, tag
from metrics.training_figures import curves, read_lines, verdict

GRIDS = "image_log"
MOST_GRIDS = 12


def run_page(run: Path, beside: Path) -> str:
    """The page of a log folder; pictures are linked from the folder `beside`, where the page will lie.

    Raises
        FileNotFoundError  a folder without the lines that a training writes
        ValueError         one with other lines
    """
    training, validation = (read_lines(run / f"{name}.jsonl") for name in ("training", "validation"))
    if not training and not validation:
        raise FileNotFoundError(
            f"expected the log folder of a training, with training.jsonl or validation.jsonl, found none in"
            f" {run}; name one such as work_dir/lightning_logs/version_0"
        )
    try:
        return told(run, beside, training, validation)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{run}: expected lines as tutorial_train.py writes them, found others ({error!r}); name the log"
            " folder of a training"
        ) from error


def told(
    run: Path,
    beside: Path,
    training: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
) -> str:
    """The page of these records."""
    sections = [("curves", "Curves", [*verdict(validation), curves(training, validation)])]
    if validation:
        sections.append(("levels", "By noise level", levels(validation)))
    sections.append(("grids", "Grids", grids(run, beside)))
    steps = max(line["step"] for line in [*training, *validation])
    lead = f"{steps} optimizer steps. Adherence is 1 - loss with the right hint / loss with another sample's."
    return page(f"Training {run.resolve().name}", [tag("p", lead)], sections)


def levels(validation: Sequence[Mapping[str, Any]]) -> list[Html]:
    """A chart for each band of timesteps: the loss with the right hint, and with another's."""
    charts = []
    for band, first in enumerate(validation[0]["bands"]):
        lines = [
            Line(name, [(line["step"], line["bands"][band][key]) for line in validation], colour)
            for name, key, colour in (
                ("right hint", "loss_simple", 1),
                ("another's hint", "loss_shuffled_hint", 2),
            )
        ]
        title = tag("h3", f"Timesteps {first['first']} to {first['last']}")
        charts.append(tag("div", title, line_chart(lines, x_name="optimizer step", y_name="loss")))
    return [tag("div", *charts, class_="charts")]


def grids(run: Path, beside: Path) -> list[Html]:
    """The grids from the first to the last, evenly chosen where there are many."""
    found = sorted((run / GRIDS).glob("*.png"))
    if not found:
        return [missing("grids", "python tutorial_train.py --dataset streets --logger_freq 500")]
    if len(found) > MOST_GRIDS:
        found = [found[round(i * (len(found) - 1) / (MOST_GRIDS - 1))] for i in range(MOST_GRIDS)]
    shown = [picture(Path(os.path.relpath(path, beside)).as_posix(), path.stem, path.stem) for path in found]
    return [tag("p", "The same maps, prompts and seeds at every grid."), gallery(shown, 2, wraps=True)]
