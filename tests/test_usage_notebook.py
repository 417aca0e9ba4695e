"""The notebook: runs from top to bottom in a fresh kernel, and diffusers gives the image that we give."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NOTEBOOK = "usage/Usage.ipynb"


def outputs_of(notebook: Any) -> list[list[Any]]:
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def pictures_in(notebook: Any) -> list[np.ndarray]:
    found = [
        data for cell in outputs_of(notebook) for out in cell if "image/png" in (data := out.get("data", {}))
    ]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"])))) for data in found]


@pytest.mark.slow
def test_it_runs_top_to_bottom_and_diffusers_agrees(repo_root: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: requirements-dev.txt")
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(repo_root / NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(repo_root / "usage")}}
    client.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    colours, sampled, started, pair = pictures_in(notebook)
    assert colours.shape == (128, 256, 3)
    assert sampled.shape == started.shape == (260, 516, 3)
    assert abs(sampled.astype(int) - started).mean() > 1  # another start, another image
    ours, theirs = pair[:, :256].astype(int), pair[:, 260:].astype(int)
    assert abs(ours - theirs).max() <= 1
    assert ours.std() > 20
    said = "".join(out.get("text", "") for cell in outputs_of(notebook) for out in cell)
    assert "verified in diffusers" in said
    difference = re.search(r"largest difference ([\d.]+), of which", said)
    assert difference is not None
    assert float(difference[1]) <= 1 / 255


def test_it_is_stored_with_what_it_printed_and_without_a_machine(repo_root: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: requirements-dev.txt")
    notebook = nbformat.read(repo_root / NOTEBOOK, as_version=4)
    text = (repo_root / NOTEBOOK).read_text(encoding="utf-8")
    assert all(cell for cell in outputs_of(notebook)[1:])
    assert not any(
        out.output_type == "error" or out.get("name") == "stderr"
        for cell in outputs_of(notebook)
        for out in cell
    )
    assert not re.search(r"/(root|home|tmp|Users)/", text)
    assert len(text) < 500_000
