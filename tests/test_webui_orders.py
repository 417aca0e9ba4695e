"""What becomes of an order: previews, stop, priors; the map and the settings that come back from an image."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from prior_samples import write_random_prior

import webui.session
from cldm.cldm import ControlLDM
from cldm.config import SampleConfig
from cldm.generate import Start, decode, generate
from cldm.pictures import read_settings
from datasets.label_space import SPACES, LabelSpace
from ldm.models.diffusion.schedule import ddim_timesteps, timesteps_from
from ldm.priors.prior import KINDS
from webui.any_hint import ANY_HINT
from webui.condition import Example, Hint
from webui.label_runs import encode_labels
from webui.orders import PRIORS, WHOLE_RUN, Order, order_from
from webui.painter import Done, Painter
from webui.segmentation import segmentation
from webui.session import PAUSE, Preview, Progress, Session
from webui.starts import Starts

CITYSCAPES = segmentation(LabelSpace.load("cityscapes"))
LABELS = np.repeat(np.repeat(np.array([[10, 10, 2, 2], [13, 0, 0, 255]], np.uint8), 32, axis=0), 32, axis=1)
FAST = SampleConfig(steps=3, scale=3.0)


def in_hand(model: ControlLDM) -> Future[Any]:
    """A model that needs no reading any more."""
    future: Future[Any] = Future()
    future.set_result(model)
    return future


@pytest.fixture
def hint() -> Hint:
    assert CITYSCAPES.from_labels is not None
    return CITYSCAPES.from_labels(LABELS, "street")


@pytest.fixture
def painter(model: ControlLDM, hint: Hint, tmp_path: Path) -> Painter:
    session = Session(in_hand(model), tmp_path, (64, 128), FAST, {"checkpoint": "tiny"})
    return Painter(CITYSCAPES, session, [Example(hint, "a street")])


def told(hint: Hint) -> torch.Tensor:
    return torch.from_numpy(hint.colours.astype(np.float32) / np.float32(255)).permute(2, 0, 1)[None]


# -- previews and stop ------------------------------------------------------------------------------------


def test_previews_are_the_decoded_predictions_of_their_steps(
    painter: Painter, hint: Hint, model: ControlLDM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webui.session, "PAUSE", 0)
    expected: list[Any] = []
    generate(
        model, told(hint), ["a"] * 2, [3, 4], FAST, callback=lambda _, z: expected.append(decode(model, z))
    )
    items = list(painter.paint(hint, Order("a", 2, 3, FAST)))
    steps = [item for item in items if isinstance(item, Progress)]
    assert [(item.done, item.total) for item in steps] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [item.pictures is None for item in steps] == [True, False, False, True]
    for item, images in zip(steps[1:3], expected, strict=False):
        assert (np.stack(item.pictures or []) == images.numpy()).all()
    assert isinstance(items[-1], Done)


def test_previews_take_a_part_of_the_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(webui.session.time, "monotonic", lambda: now[0])

    def slow(z: torch.Tensor) -> list[Any]:
        now[0] += 1.0
        return [z]

    preview, made = Preview(slow), []
    for _ in range(100):
        now[0] += 0.5  # a step
        made.append(preview(torch.zeros(1)) is not None)
    assert made[0]
    spent = sum(made) / (now[0] - 100.0)
    assert spent <= 1 / (1 + PAUSE) + 0.01
    assert spent > 0.15, "and they are not left out either"


def test_a_stop_ends_the_batch_after_its_step_and_keeps_what_is_made(
    painter: Painter, hint: Hint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webui.session, "PIXELS_AT_ONCE", 64 * 128)  # an image a batch
    order, seen = Order("a", 3, 7, FAST), []
    painted = painter.paint(hint, order, "me")
    for item in painted:
        seen.append(item)
        if isinstance(item, Progress) and item.done == 4:  # the first step of the second image
            assert not painter.stop("somebody else")
            assert painter.stop("me")
    assert isinstance(seen[-1], Done)
    assert [result.seed for result in seen[-1].results] == [7]
    assert seen[-1].note.startswith("Stopped: 1 of 3 images of 64x128, in ")
    assert max(item.done for item in seen[:-1]) <= 6, "a step or two may pass until it is heard"
    assert not painter.stop("me"), "nothing runs any more"
    assert isinstance(list(painter.paint(hint, order, "me"))[-1], Done), "and the next one can"


def test_whoever_goes_away_stops_what_was_painted_for_them(
    painter: Painter, hint: Hint, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops: list[threading.Event] = []

    def run(hint: Hint, order: Order, watch: Any, stop: threading.Event) -> list[Any]:
        stops.append(stop)
        watch(Progress(1, 3))
        assert stop.wait(5), "it was not told"
        return []

    monkeypatch.setattr(painter.session, "run", run)
    painted = painter.paint(hint, Order("a", sample=FAST), "me")
    next(painted), next(painted)
    painted.close()
    assert stops[0].is_set()
    assert painter.running == {}


def test_who_waits_for_others_can_stop_as_well(
    painter: Painter, hint: Hint, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter.expect("second")  # clicked, and in the queue
    assert painter.stop("second")
    _begun, last = list(painter.paint(hint, Order("a", 2, sample=FAST), "second"))
    assert isinstance(last, Done)
    assert last.results == []
    assert last.note.startswith("Stopped: 0 of 2 images")
    over = threading.Event()
    painter.session.worker.submit(over.wait, 20)  # another one computes
    waiting = painter.paint(hint, Order("a", sample=FAST), "third")
    next(waiting)
    assert painter.stop("third")
    last = next(waiting)
    over.set()
    assert isinstance(last, Done)
    assert last.note.startswith("Stopped: 0 of 1")


def test_a_model_that_never_comes_can_be_stopped_waiting_for(hint: Hint, tmp_path: Path) -> None:
    over, worker = threading.Event(), ThreadPoolExecutor(1)
    session = Session(worker.submit(over.wait, 20), tmp_path, sample=FAST, worker=worker)  # type: ignore[arg-type]
    painter = Painter(CITYSCAPES, session)
    waiting = painter.paint(hint, Order("a", sample=FAST), "me")
    next(waiting)
    assert painter.stop("me")
    assert isinstance(next(waiting), Done)
    assert not painter.close(0), "the model is still being read"
    over.set()


def test_closing_stops_what_is_painted(painter: Painter, hint: Hint) -> None:
    painting = painter.paint(hint, Order("a", sample=replace(FAST, steps=100)), "me")
    next(painting), next(painting)
    assert painter.close(20)
    done = [item for item in painting if isinstance(item, Done)]
    assert done[0].note.startswith("Stopped")


def test_a_failure_is_raised_where_the_visitor_is_answered(painter: Painter, hint: Hint) -> None:
    with pytest.raises(ValueError, match=r"expected steps in 1..100, found 0"):
        list(painter.paint(hint, Order("a", sample=replace(FAST, steps=0))))
    with pytest.raises(ValueError, match="this page was started without a noise prior; choose none"):
        list(painter.paint(hint, Order("a", sample=FAST, prior="class")))


def test_a_model_that_is_still_being_read_is_waited_for(
    model: ControlLDM, hint: Hint, tmp_path: Path
) -> None:
    go, worker = threading.Event(), ThreadPoolExecutor(1)
    session = Session(worker.submit(lambda: go.wait(20) and model), tmp_path, sample=FAST, worker=worker)
    painted = Painter(CITYSCAPES, session).paint(hint, Order("a", sample=FAST))
    assert next(painted) == Progress(0, 3)
    assert not session.loading.done()
    go.set()
    assert isinstance(list(painted)[-1], Done)
    failed = Session(worker.submit(lambda: 1 / 0), tmp_path, worker=worker)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        list(Painter(CITYSCAPES, failed).paint(hint, Order("a", sample=FAST)))


# -- priors -----------------------------------------------------------------------------------------------


def test_the_names_of_priors_are_those_that_need_no_photo() -> None:
    assert {*PRIORS} == {WHOLE_RUN, *KINDS} - {"x0"}


def test_a_prior_starts_the_run_where_its_formula_says(model: ControlLDM, hint: Hint, tmp_path: Path) -> None:
    moments = write_random_prior(tmp_path / "prior.safetensors", model)
    session = Session(in_hand(model), tmp_path, sample=FAST)
    session.starts = Starts(tmp_path / "prior.safetensors", LabelSpace.load("cityscapes"))
    order = Order("a", 2, 5, FAST, "spatial", 600)
    results = session.run(hint, order)
    mean, variance = (torch.from_numpy(part) for part in (moments.places.mean, moments.places.m2 / 50))
    timesteps = timesteps_from(600, ddim_timesteps(3))
    assert timesteps[0] == 600
    abar = float(model.alphas_cumprod.double()[600])
    noise = torch.stack(
        [torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    )
    spread = (abar * variance + 1 - abar).sqrt()
    latents = (abar**0.5 * mean + spread * noise.movedim(1, -1).double()).movedim(-1, 1).float()
    expected = generate(
        model, told(hint), ["a"] * 2, [5, 6], FAST, start=Start(latents.contiguous(), timesteps)
    )
    for result, image in zip(results, expected.numpy(), strict=True):
        found = np.asarray(Image.open(result.image)).astype(int)
        assert np.abs(found - image).max() <= 1
        settings = read_settings(result.image) or {}
        assert (settings["prior_type"], settings["start"]) == ("spatial", 600)
    plain = session.run(hint, Order("a", 1, 5, FAST))[0]
    assert (np.asarray(Image.open(plain.image)) != np.asarray(Image.open(results[0].image))).any()


# -- what comes back --------------------------------------------------------------------------------------


def test_an_image_brings_back_its_order_and_its_map(painter: Painter, hint: Hint) -> None:
    sample = replace(FAST, negative_prompt="fog", strength=0.5, sampler="dpm++2m", guess_mode=True)
    asked = Order("a street at night", 2, 11, sample)
    done = list(painter.paint(hint, asked))[-1]
    assert isinstance(done, Done)
    order, restored = painter.restore(str(done.results[1].image), Order(""))
    assert order == replace(asked, num=1, seed=12)
    assert restored is not None
    assert restored.labels is not None
    assert (restored.labels == LABELS).all()
    again = list(painter.paint(restored, order))[-1]
    assert isinstance(again, Done)
    first, second = (np.asarray(Image.open(path)) for path in (done.results[1].image, again.results[0].image))
    assert np.abs(first.astype(int) - second).max() <= 1, "alone as in a batch of two"


def test_the_map_is_there_as_label_ids(painter: Painter, hint: Hint) -> None:
    done = list(painter.paint(hint, Order("a", sample=FAST)))[-1]
    assert isinstance(done, Done)
    assert done.map_file is not None
    assert done.map_file.name == "street_labelIds.png"
    ids = np.asarray(Image.open(done.map_file))
    for train_id, label_id in ((10, 23), (2, 11), (13, 26), (0, 7), (255, 0)):
        assert (ids[train_id == LABELS] == label_id).all()
    back = CITYSCAPES.read(done.map_file, "auto", None)
    assert back.labels is not None
    assert (back.labels == LABELS).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": "many"}, "expected steps to be like 20, found 'many'"),
        ({"steps": True}, "expected steps to be like 20, found 'True'"),
        ({"steps": 10**9}, "expected steps in 1..100, found 1000000000"),
        ({"scale": None}, "expected scale to be like 9.0, found 'None'"),
        ({"prompt": ["a"]}, "expected prompt to be like ''"),
        ({"prompt": "a" * 2000}, "at most 1000 characters, found 2000"),
        ({"prior_type": "x0"}, "unknown prior 'x0'"),
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"prior_type": "class"}, "began from the noise prior class; start the page with --prior FILE"),
        ({"map": {"height": 1, "width": 1, "runs": "AAA="}, "label_space": "mars"}, "unknown label space"),
        ({"map": {"height": 1 << 40, "width": 1, "runs": ""}}, "the label map: expected"),
        ({"map": 5}, "the label map: expected"),
        ([1], "expected a PNG of this page or of generate.py, found no settings"),
        (None, "expected a PNG of this page or of generate.py, found no settings"),
    ],
    ids=str,
)
def test_settings_that_somebody_wrote_are_checked(
    painter: Painter, tmp_path: Path, settings: Any, said: str
) -> None:
    notes = PngImagePlugin.PngInfo()
    if settings is not None:
        notes.add_itxt("scenecontrol", json.dumps(settings))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "x.png", pnginfo=notes)
    with pytest.raises(ValueError, match=said):
        painter.restore(str(tmp_path / "x.png"), Order(""))


def test_settings_of_the_script_for_priors_are_understood() -> None:
    theirs = {"prior": {"images": 4000}, "prior_type": "class", "timesteps": [799, 751], "steps": 7}
    assert order_from(theirs, Order("")) == Order("", sample=SampleConfig(steps=7), prior="class", start=799)


def test_a_map_of_other_classes_comes_back_in_ours(painter: Painter, tmp_path: Path) -> None:
    ade20k = LabelSpace.load("ade20k")
    labels = np.full((64, 64), ade20k.names.index("sky"), np.uint8)
    labels[32:] = ade20k.names.index("road")
    settings = {"map": encode_labels(labels), "label_space": "ade20k"}
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("scenecontrol", json.dumps(settings))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "x.png", pnginfo=notes)
    _, restored = painter.restore(str(tmp_path / "x.png"), Order(""))
    assert restored is not None
    assert restored.labels is not None
    assert (restored.labels[::32, 0] == [10, 0]).all()


def test_settings_of_older_images_fill_in_what_they_know() -> None:
    default = Order("mine", 4, 9, replace(FAST, eta=0.5))
    order = order_from({"steps": 7, "scale": 2, "seed": 3, "hint": "x.png"}, default)
    assert order == Order("mine", 1, 3, replace(default.sample, steps=7, scale=2.0))


# -- other maps and pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SPACES if name != "cityscapes"])
def test_maps_in_the_colours_of_every_palette_are_known_and_said(tmp_path: Path, name: str) -> None:
    space = LabelSpace.load(name)
    road, car = space.names.index("road"), space.names.index("car")
    strange = space.names.index("bed")
    labels = np.repeat(np.repeat(np.array([[road, car], [strange, 255]], np.uint8), 64, 0), 64, 1)
    Image.fromarray(space.paint(labels)).save(tmp_path / "x.png")
    hint = CITYSCAPES.read(tmp_path / "x.png", "auto", None)
    assert hint.labels is not None
    assert (hint.labels[::64, ::64] == [[0, 13], [255, 255]]).all()
    assert hint.found == f"colours of {name}; 25% of it is void here, as cityscapes has no bed"


def test_a_photo_becomes_the_segmenters_map(painter: Painter, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (128, 256, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "x.png")
    seen: list[np.ndarray] = []

    def segment(image: np.ndarray) -> np.ndarray:
        seen.append(image)
        return LABELS

    with pytest.raises(ValueError, match="without a segmenter; load a map"):
        painter.from_photo(str(tmp_path / "x.png"), None)
    painter.segment = segment
    hint, under = painter.from_photo(str(tmp_path / "x.png"), None)
    assert hint.labels is LABELS or (hint.labels == LABELS).all()
    means = photo.reshape(64, 2, 128, 2, 3).mean(axis=(1, 3))
    assert np.abs(under - means).max() <= 0.5, "the mean of each 2x2 pixels"
    assert (seen[0] == under).all()
    (tmp_path / "x.svg").write_text("<svg/>")
    with pytest.raises(ValueError, match=r"^x.svg: expected a picture .*found SVG"):
        painter.from_photo(str(tmp_path / "x.svg"), None)


def test_a_picture_that_is_the_hint_is_taken_as_it_is(model: ControlLDM, tmp_path: Path) -> None:
    edges = np.random.default_rng(0).integers(0, 256, (64, 128), np.uint8)
    Image.fromarray(edges).save(tmp_path / "edges.png")
    painter = Painter(ANY_HINT, Session(in_hand(model), tmp_path, sample=FAST))
    hint = painter.find_hint(str(tmp_path / "edges.png"), "picture", "")
    assert (hint.colours == edges[..., None]).all()
    done = list(painter.paint(hint, Order("a", seed=3, sample=FAST)))[-1]
    assert isinstance(done, Done)
    assert done.map_file is None
    expected = generate(model, told(hint), ["a"], [3], FAST)[0].numpy()
    assert (np.asarray(Image.open(done.results[0].image)) == expected).all()
    with pytest.raises(ValueError, match="expected a file, found neither"):
        painter.find_hint(None, "picture", "")
    with pytest.raises(ValueError, match="expected one of picture, found 'colours'"):
        painter.find_hint(str(tmp_path / "edges.png"), "colours", "")


def test_the_map_of_an_example_can_have_another_size(painter: Painter, hint: Hint) -> None:
    found = painter.find_hint(None, "", "street", (128, 64))
    rows, columns = (np.arange(128) + 0.5) / 2, (np.arange(64) + 0.5) * 2
    assert found.labels is not None
    assert (found.labels == LABELS[rows.astype(int)[:, None], columns.astype(int)]).all()
    assert found.digest != hint.digest


def test_requests_take_turns_with_the_segmenter(painter: Painter, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((64, 128, 3), np.uint8)).save(tmp_path / "x.png")
    painter.segment = lambda photo: LABELS
    over = threading.Event()
    painter.session.worker.submit(over.wait, 20)
    worker = threading.Thread(target=painter.from_photo, args=(str(tmp_path / "x.png"), None))
    worker.start()
    time.sleep(0.1)
    assert worker.is_alive(), "the model computes for another"
    over.set()
    worker.join(5)
    assert not worker.is_alive()
