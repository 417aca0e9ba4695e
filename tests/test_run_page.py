"""The page of a training: every record is a point, every grid is linked, foreign folders are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from house import run_script
from PIL import Image

from metrics.charts import nice_ticks
from metrics.run_page import MOST_GRIDS, run_page

STEPS = [0, 50, 100, 150]


def band(first: int, right: float, other: float) -> dict[str, float]:
    return {"first": first, "last": first + 499, "loss_simple": right, "loss_shuffled_hint": other}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A log folder of four validations, seven losses and many grids."""
    folder = tmp_path / "version_3"
    (folder / "image_log").mkdir(parents=True)
    validation = [
        {
            "step": step,
            "loss_simple": 0.2 - step / 1e4,
            "loss_shuffled_hint": 0.2,
            "adherence": step / 2e3,
            "adherence_error": 0.001,
            "news": "the model follows its hints since step 50" if step == 100 else None,
            "follows_since": 50 if step >= 100 else None,
            "bands": [band(0, 0.3, 0.31), band(500, 0.1, 0.12)],
        }
        for step in STEPS
    ]
    training = [{"step": step, "loss_simple": 0.2} for step in range(10, 80, 10)]
    for name, lines in (("validation", validation), ("training", training)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text + '{"step": 160, "lo')  # a line that is being written
    for step in range(0, 2000, 100):
        Image.new("RGB", (8, 8)).save(folder / "image_log" / f"step={step:06d}.png")
    return folder


def test_every_record_is_a_point(run: Path) -> None:
    page = run_page(run, run)
    lines = [points.split() for points in re.findall(r'<polyline points="([^"]*)"', page)]
    # Loss: training, right, other. Adherence. Two bands: right, other.
    assert [len(points) for points in lines] == [7, 4, 4, 4, *[4] * 4]
    assert "the model follows its hints since step 50" in page
    assert "Timesteps 500 to 999" in page
    assert "150 optimizer steps" in page


def test_grids_are_linked_from_where_the_page_lies(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "pages"
    for beside in (run, elsewhere):
        sources = re.findall(r'<img src="([^"]+)"', run_page(run, beside))
        assert len(sources) == MOST_GRIDS
        assert all((beside / source).resolve().is_file() for source in sources if beside.is_dir())
        assert (sources[0].endswith("step=000000.png"), sources[-1].endswith("step=001900.png")) == (
            True,
            True,
        )
    assert sources[0] == "../version_3/image_log/step=000000.png"


def test_the_script_writes_beside_the_run_and_refuses_what_is_none(run: Path, tmp_path: Path) -> None:
    assert run_script("tool_show_run.py", str(run)).returncode == 0
    assert (run / "index.html").read_text().startswith("<!DOCTYPE html>")
    (tmp_path / "empty").mkdir()
    (run / "training.jsonl").write_text("no JSON\n")
    refusals = {
        "empty": "expected the log folder of a training",
        "nowhere": "is no folder",
        "version_3": "JSON",
    }
    for name, sentence in refusals.items():
        result = run_script("tool_show_run.py", str(tmp_path / name))
        assert (result.returncode, sentence in result.stderr, "Traceback" in result.stderr) == (
            2,
            True,
            False,
        )


def test_ticks_of_ticks_are_themselves() -> None:
    # In float64 (0.28 - 0.18) / 0.02 is a little more than 5.
    ticks = nice_ticks(0.19, 0.277)
    assert ticks == pytest.approx([0.18, 0.2, 0.22, 0.24, 0.26, 0.28])
    assert nice_ticks(ticks[0], ticks[-1]) == pytest.approx(ticks)
