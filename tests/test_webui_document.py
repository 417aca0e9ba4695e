"""docs/webui.md against a served page: its client, its commands, its table, its refusals."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed; pip install -r requirements.txt")
pytest.importorskip("httpx")

from served_page import FAST, LABEL_IDS, Site, Visitor, drawn, encoded, tiny_site

from cldm.cldm import ControlLDM
from webui.folder import KEEP_BYTES, KEEP_SECONDS
from webui.gate import SAFE_METHODS
from webui.orders import LIMITS, MAX_PROMPT, PRIORS
from webui.segmentation import KINDS
from webui.server import MAX_VISITORS, MAX_WAITING
from webui.uploads import FORMATS, MAX_BYTES, MAX_IMAGE_PIXELS, MAX_PIXELS

TEXT = (Path(__file__).parents[1] / "docs/webui.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:7860/"


def block(language: str, mark: str) -> str:
    """The fenced block of a language that has a mark in it."""
    (found,) = [
        text
        for text in re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
        if mark in text
    ]
    return found


@pytest.fixture(scope="module")
def site(model: ControlLDM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with tiny_site(model, tmp_path_factory.mktemp("maps")) as site:
        yield site


@pytest.fixture
def described(site: Site) -> dict[str, dict[str, Any]]:
    """The parameters as the server describes them, by name."""
    info = Visitor(site.url).http.get(f"{site.url}/gradio_api/info").json()
    return {one["parameter_name"]: one for one in info["named_endpoints"]["/generate"]["parameters"]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the examples run, with the map that they name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "frankfurt_labelIds.png").write_bytes(encoded(LABEL_IDS))
    return tmp_path


def test_the_client_saves_the_images_of_a_direct_call(site: Site, folder: Path) -> None:
    code = block("python", "gradio_client")
    assert ADDRESS in code
    exec(compile(code.replace(ADDRESS, site.url), "docs/webui.md", "exec"), {})
    sample = replace(FAST, steps=12, sampler="dpm++2m", scale=4.0)
    expected = drawn(site.model, [7, 8], sample, "a street in the rain")
    for seed, image in zip((7, 8), expected, strict=True):
        assert (np.asarray(Image.open(folder / f"out/frankfurt_seed{seed}.png")) == image).all()
    assert (np.asarray(Image.open(folder / "out/frankfurt_labelIds.png")) == LABEL_IDS).all()
    settings = json.loads(Image.open(folder / "out/frankfurt_seed7.png").text["scenecontrol"])
    assert [settings[name] for name in ("seed", "steps", "prompt")] == [7, 12, "a street in the rain"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_end_with_files(site: Site) -> None:
    code = block("bash", "curl")
    assert ADDRESS in code
    command = ["bash", "-ec", code.replace(ADDRESS, f"{site.url}/")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "event: complete" in answer
    files, note = json.loads(re.findall(r"^event: complete\ndata: (.*)$", answer, re.MULTILINE)[0])
    assert "1 image of 64x128" in note
    sample = replace(FAST, steps=12)
    assert (Visitor(site.url).show(files[0]) == drawn(site.model, [0], sample, "caption of a")[0]).all()


# -- the table --------------------------------------------------------------------------------------------


def rows() -> dict[str, tuple[str, str]]:
    """Range and default of each parameter."""
    table = TEXT[TEXT.index("| parameter |") : TEXT.index('"The model\'s"')]
    found: dict[str, tuple[str, str]] = {}
    for line in table.splitlines()[2:]:
        if line.startswith("|"):
            names, span, default, _ = (cell.strip() for cell in line.strip("|").split("|"))
            found |= dict.fromkeys(re.findall(r"`(\w+)`", names), (span, default))
    return found


def test_the_table_has_the_parameters_with_their_bounds_and_defaults(described: dict[str, Any]) -> None:
    table = rows()
    assert list(table) == list(described)
    for name, (least, most) in LIMITS.items():
        assert table[name][0] == f"{least} to {most}"
    assert all(f"`{kind}`" in table["kind"][0] for kind in KINDS)
    assert set(re.findall(r"`(\S+)`", table["prior"][0])) <= set(PRIORS)
    assert table["prompt"][0] == table["negative_prompt"][0] == f"up to {MAX_PROMPT} characters"
    assert str(MAX_IMAGE_PIXELS) in table["width"][0]
    for name, (_, default) in table.items():
        assert described[name]["parameter_has_default"] == (default != "required")
        if found := re.match(r"`?(\d+|False|detect|none)\b", default):
            assert str(described[name]["parameter_default"]).removesuffix(".0") == found[1]


def test_the_numbers_of_the_document_are_those_of_the_code() -> None:
    for said in (
        *(f"{MAX_WAITING} may wait", f"of {MAX_VISITORS} visitors", f"{MAX_BYTES >> 20} MB"),
        f"{MAX_PIXELS >> 20} million pixels",
    ):
        assert said in TEXT, said
    assert (KEEP_SECONDS, KEEP_BYTES) == (3600, 1 << 30)
    assert "at most 1 GiB and nothing for longer than an hour" in " ".join(TEXT.split())
    assert {one.lower() for one in FORMATS} == {"png", "bmp", "webp", "jpeg"}
    assert set(SAFE_METHODS) == {"GET", "HEAD"}


def test_refusals_read_as_in_the_document(site: Site) -> None:
    visitor = Visitor(site.url)
    bad = encoded(np.full((64, 64), 99, np.uint8))
    answers = [
        visitor.generate(file=visitor.upload("frankfurt_labelIds.png", bad)),
        visitor.generate(example="a_labelIds.png", steps=101),
        visitor.generate(file=visitor.upload("a.png", b"<svg/>")),
    ]
    said = re.findall(r"^    (\S.*)$", TEXT[TEXT.index("**Refusals**") :], re.MULTILINE)[:3]
    for answer, sentence in zip(answers, said, strict=True):
        pattern = re.escape(sentence).replace(re.escape("..."), ".*")
        assert re.match(pattern, answer.reason), (answer.reason, sentence)
