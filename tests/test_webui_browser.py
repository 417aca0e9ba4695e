"""The page in a headless browser: real clicks on the script with the models that ship."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cldm.generate import generate
from cldm.model import load_model, model_config_of
from cldm.pictures import read_settings
from cldm.recorded_run import read_recorded_run
from datasets.label_space import LabelSpace
from datasets.streets import render_frame
from metrics.judge import StreetsJudge

ROOT = Path(__file__).parents[1]
SPACE = LabelSpace.load("cityscapes")
CAR = SPACE.names.index("car")
SIZE = (128, 256)
CAR_BOX = (slice(74, 104), slice(80, 136))  # on the road before the camera

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / "models/streets_base.safetensors").is_file(), reason="the Streets weights are not here"
    ),
]


@contextmanager
def served(*flags: str, folder: Path | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The page of a fresh process, and the process; `folder` takes its temporary files."""
    command = [sys.executable, "gradio_seg2image.py", *flags]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **({"TMPDIR": str(folder)} if folder else {})}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        found = re.match(r"open (http://127\.0\.0\.1:\d+)/", process.stdout.readline())
        assert found is not None, "the page did not start"
        try:
            yield found[1], process
        finally:  # also after a failure: Popen waits for the process
            process.send_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as (url, _):
        yield url


@pytest.fixture
def tab(url: str, browser: Any) -> Iterator[Any]:
    """A fresh page whose errors, and requests to other hosts, are collected."""
    tab = browser.new_page(viewport={"width": 1280, "height": 1000})
    tab.complaints = []
    tab.on("console", lambda m: tab.complaints.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: tab.complaints.append(str(e)))
    own = (url, "data:", "blob:")
    tab.on("request", lambda r: None if r.url.startswith(own) else tab.complaints.append(r.url))
    tab.goto(url)
    tab.locator("#note", has_text="The images appear here").wait_for(timeout=60_000)
    tab.locator("#editor canvas").first.wait_for()
    yield tab
    assert tab.complaints == []
    tab.close()


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """The map of a street without vehicles and people, as a file that one would bring."""
    labels = SPACE.to_train_ids(render_frame(1_000_001, SIZE).label_ids, "the frame").copy()
    labels[np.isin(labels, range(11, 19))] = 0
    assert (labels[CAR_BOX] == 0).all()
    path = tmp_path / "street_labelTrainIds.png"
    Image.fromarray(labels).save(path)
    return path


def set_number(tab: Any, name: str, value: int) -> None:
    """Type a number; once more where Gradio had drawn the field and did not listen to it yet."""
    field, slider = (tab.locator(f"#{name} input[type={kind}]") for kind in ("number", "range"))
    for _ in range(20):
        field.fill(str(value))
        field.press("Tab")
        if not slider.count() or slider.input_value() == str(value):
            return
        tab.wait_for_timeout(200)
    pytest.fail(f"{name} did not become {value}")


def open_settings(tab: Any) -> None:
    """Open the further settings, and give Gradio the time to draw them and to listen to them."""
    tab.get_by_role("button", name="More settings").click()
    tab.locator("#steps input[type=number]").wait_for()
    tab.wait_for_timeout(700)


def load_map(tab: Any, path: Path) -> None:
    tab.get_by_role("tab", name="Your own map").click()
    tab.set_input_files("#file input[type=file]", path)
    tab.locator("#told", has_text=path.name).wait_for()


def drag(tab: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag over the editor between two points (x, y) of the map."""
    box = tab.locator("#editor canvas").first.bounding_box()
    x, y = box["width"] / SIZE[1], box["height"] / SIZE[0]
    tab.mouse.move(box["x"] + start[0] * x, box["y"] + start[1] * y)
    tab.mouse.down()
    tab.mouse.move(box["x"] + end[0] * x, box["y"] + end[1] * y, steps=5)
    tab.mouse.up()


def files_of(tab: Any, folder: Path) -> list[Path]:
    """What the page offers to take away."""
    links = tab.locator("#files a[href]")
    paths = []
    for i in range(links.count()):
        with tab.expect_download() as download:
            links.nth(i).click()
        paths.append(folder / download.value.suggested_filename)
        download.value.save_as(paths[-1])
    return paths


def paint(tab: Any, folder: Path, num: int = 1) -> list[Path]:
    """Click, wait for all images, and take the files."""
    set_number(tab, "num", num)
    with tab.expect_response(re.compile(r"/results/\w+/.*_seed\d+\.png"), timeout=120_000):
        tab.click("#paint")
    tab.locator("#paint:not([disabled])").wait_for()
    tab.locator("#note", has_text=f"{num} image").wait_for()
    return files_of(tab, folder)


def test_a_car_that_is_painted_on_the_road_is_in_the_image_and_was_not_before(
    tab: Any, street: Path, tmp_path: Path
) -> None:
    judge = StreetsJudge.load(ROOT / "models/streets_judge.safetensors")
    load_map(tab, street)
    tab.locator("#prompt textarea").fill(
        "a photo of a shopping street on a clear day with buildings and trees"
    )
    cars, maps = [], []
    for round_ in range(2):
        image, label_map = paint(tab, tmp_path)
        seen = judge(np.array(Image.open(image).convert("RGB"))[None])[0]
        cars.append((seen[CAR_BOX] == CAR).mean())
        maps.append(np.asarray(Image.open(label_map)))
        settings = read_settings(image) or {}
        assert settings["seed"] == 0
        if round_ == 0:
            tab.locator("#editor").get_by_role("button", name="car", exact=True).click()
            tab.locator("#editor").get_by_role("button", name="Rectangle").click()
            drag(tab, (80.5, 74.5), (135.5, 103.5))
    before = SPACE.to_file_ids(np.asarray(Image.open(street)), "the street")
    after = before.copy()
    after[CAR_BOX] = 26
    assert (maps[0] == before).all()
    assert (maps[1] == after).all()
    assert cars[0] < 0.1, "with the same seed and without the car none is seen"
    assert cars[1] > 0.5


def test_an_image_brings_its_settings_and_its_map_back(tab: Any, street: Path, tmp_path: Path) -> None:
    load_map(tab, street)
    set_number(tab, "seed", 7)
    tab.locator("#prompt textarea").fill("a street at night")
    first, _ = paint(tab, tmp_path)
    (tmp_path / "again").mkdir()
    tab.reload()
    tab.locator("#editor canvas").first.wait_for()
    open_settings(tab)
    with tab.expect_file_chooser() as chooser:
        tab.click("#restore")
    chooser.value.set_files(first)
    tab.locator("#told", has_text="street").wait_for()
    assert tab.locator("#prompt textarea").input_value() == "a street at night"
    assert tab.locator("#seed input").input_value() == "7"
    second, _ = paint(tab, tmp_path / "again")
    images = [np.asarray(Image.open(path)) for path in (first, second)]
    assert (images[0] == images[1]).all()


def test_a_run_that_is_stopped_leaves_the_page_ready_for_the_next(tab: Any, tmp_path: Path) -> None:
    open_settings(tab)
    set_number(tab, "steps", 100)
    set_number(tab, "num", 1)
    tab.click("#paint")
    tab.locator("#live .previews img").first.wait_for(timeout=60_000)
    tab.click("#stop")
    tab.locator("#note", has_text="Stopped: 0 of 1").wait_for(timeout=10_000)
    tab.locator("#paint:not([disabled])").wait_for()
    set_number(tab, "steps", 2)
    assert len(paint(tab, tmp_path, num=2)) == 3


def test_who_waits_for_another_can_stop_and_who_leaves_makes_room(tab: Any, url: str, browser: Any) -> None:
    first = browser.new_page()
    first.goto(url)
    for page, num in ((first, 8), (tab, 1)):
        page.locator("#note", has_text="The images appear here").wait_for(timeout=60_000)
        open_settings(page)
        set_number(page, "num", num)
        set_number(page, "steps", 100)
    first.click("#paint")
    first.locator("#live .previews img").first.wait_for(timeout=60_000)
    tab.click("#paint")
    tab.locator("#live", has_text="waiting for its turn").wait_for(timeout=10_000)
    tab.click("#stop")
    tab.locator("#note", has_text="Stopped: 0 of 1").wait_for(timeout=10_000)
    assert first.locator("#stop").is_enabled(), "the other one paints on"
    set_number(tab, "steps", 2)
    tab.click("#paint")
    tab.locator("#live", has_text="waiting for its turn").wait_for(timeout=10_000)
    first.close()
    tab.locator("#note", has_text="1 image of").wait_for(timeout=60_000)


def test_what_cannot_be_read_is_said_and_the_map_stays(tab: Any, street: Path, tmp_path: Path) -> None:
    load_map(tab, street)
    (tmp_path / "drawing.png").write_text("<svg/>")
    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(tmp_path / "odd_labelIds.png")
    for name, said in (("drawing.png", "found SVG"), ("odd_labelIds.png", "found 99")):
        tab.click("#file [aria-label=Clear]")
        tab.wait_for_timeout(500)  # until Gradio has its drop area there again
        tab.set_input_files("#file input[type=file]", tmp_path / name)
        tab.locator("#told .refusal", has_text=f"{name}: expected").wait_for()
        assert said in tab.locator("#told").inner_text()
    open_settings(tab)
    set_number(tab, "steps", 2)
    _, label_map = paint(tab, tmp_path)
    expected = SPACE.to_file_ids(np.asarray(Image.open(street)), "the street")
    assert (np.asarray(Image.open(label_map)) == expected).all()


def test_examples_priors_and_views(tab: Any, tmp_path: Path) -> None:
    first = tab.locator("#told b").inner_text()
    tab.locator("#examples button").nth(2).click()
    tab.wait_for_function("name => document.querySelector('#told b').innerText !== name", arg=first)
    open_settings(tab)
    set_number(tab, "steps", 2)
    tab.locator("#prior input").click()
    tab.get_by_role("option", name="class", exact=True).click()
    image, *_ = paint(tab, tmp_path, num=2)
    settings = read_settings(image) or {}
    assert (settings["prior_type"], settings["start"]) == ("class", 799)
    assert tab.locator("#images .thumbnail-item img").count() == 2
    with tab.expect_response(re.compile(r"overlay.*\.png")):
        tab.get_by_label("Under the map").check()
    tab.locator("#images .thumbnail-item").nth(1).click()
    tab.wait_for_function("document.querySelector('#seed input').value === '1'")


def test_a_photo_is_read_by_the_segmenter(tab: Any, tmp_path: Path) -> None:
    frame = render_frame(1_000_003, SIZE)
    Image.fromarray(frame.image).save(tmp_path / "photo.png")
    tab.get_by_role("tab", name="A photo").click()
    tab.set_input_files("#photo input[type=file]", tmp_path / "photo.png")
    tab.locator("#told", has_text="what the segmenter sees").wait_for(timeout=60_000)
    open_settings(tab)
    set_number(tab, "steps", 2)
    _, label_map = paint(tab, tmp_path)
    ids = np.asarray(Image.open(label_map))
    scored = frame.label_ids != 0
    assert (ids == frame.label_ids)[scored].mean() > 0.8


def test_the_page_fits_a_telephone_and_is_reachable_by_keyboard(tab: Any) -> None:
    tab.set_viewport_size({"width": 400, "height": 800})
    tab.wait_for_timeout(500)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    for name in ("paint", "stop", "editor", "examples"):
        box = tab.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 400
    parts = ["editor", "examples", "prompt", "paint", "num", "seed", "reseed", "more"]
    holds = "names => names.filter(n => document.getElementById(n).contains(document.activeElement))"
    reached: set[str] = set()
    tab.locator("body").focus()
    for _ in range(120):
        tab.keyboard.press("Tab")
        reached |= set(tab.evaluate(holds, parts))
    assert reached == set(parts)


def test_a_picture_as_it_is_goes_to_any_control(browser: Any, street: Path, tmp_path: Path) -> None:
    checkpoint = ROOT / "models/control_streets.safetensors"
    model = load_model(model_config_of(checkpoint), checkpoint)
    colours = SPACE.paint(np.asarray(Image.open(street)))
    Image.fromarray(colours).save(tmp_path / "hint.png")
    hint = torch.from_numpy(colours).permute(2, 0, 1)[None] / 255
    sample = replace(read_recorded_run(checkpoint).sample, steps=2)
    expected = generate(model, hint, ["a street"] * 2, [0, 1], sample).numpy().astype(int)
    with served("--condition", "none", "--ckpt", str(checkpoint)) as (url, _):
        tab = browser.new_page()
        tab.goto(url)
        tab.locator("#note", has_text="The images appear here").wait_for(timeout=60_000)
        tab.set_input_files("#file input[type=file]", tmp_path / "hint.png")
        tab.locator("#told", has_text="a picture as it is").wait_for()
        tab.locator("#prompt textarea").fill("a street")
        open_settings(tab)
        set_number(tab, "steps", 2)
        paths = paint(tab, tmp_path, num=2)
        assert [path.name for path in paths] == ["hint_seed0.png", "hint_seed1.png"]
        assert (read_settings(paths[0]) or {})["steps"] == 2
        found = np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])
        assert np.abs(found - expected).max() <= 2
        tab.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_page_that_is_ended_while_it_paints_leaves_nothing(
    browser: Any, tmp_path: Path, number: signal.Signals
) -> None:
    with served(folder=tmp_path) as (url, process):
        tab = browser.new_page()
        tab.goto(url)
        open_settings(tab)
        set_number(tab, "steps", 100)
        set_number(tab, "num", 8)
        tab.click("#paint")
        tab.locator("#live .previews img").first.wait_for(timeout=60_000)
        assert list(tmp_path.glob("scenecontrol_*"))
        process.send_signal(number)
        assert process.wait(30) == 0
        assert list(tmp_path.glob("scenecontrol_*")) == []
        tab.close()
