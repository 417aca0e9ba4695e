"""What stands behind the web page: visitors' files, orders, the folder, the script. Without gradio."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
import zlib
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from house import run_script
from omegaconf import OmegaConf
from PIL import Image

import cldm.generate
import gradio_seg2image as script
import webui.session
from cldm.cldm import ControlLDM
from cldm.config import SampleConfig
from cldm.generate import generate
from cldm.recorded_run import read_recorded_run
from cldm.tensor_writing import write_tensors
from datasets.label_space import LabelSpace
from datasets.streets import render_frame
from webui.condition import EXAMPLES, Hint, Models
from webui.examples import load_examples
from webui.folder import KEEP_BYTES, KEEP_SECONDS, KEPT, private_folder, tidy
from webui.gate import is_address, is_open, paths_in
from webui.look import show_refusal
from webui.orders import MAX_PROMPT, Order
from webui.painter import Painter
from webui.segmentation import segmentation
from webui.session import Progress, Session, open_session, safe_stem, split
from webui.uploads import MAX_BYTES, fitting_size

# Of Cityscapes: label id, train id, colour of road, car, sky, and of what is void.
CLASSES = [(7, 0, (128, 64, 128)), (26, 13, (0, 0, 142)), (23, 10, (70, 130, 180)), (4, 255, (0, 0, 0))]
SCENE = np.repeat(
    np.repeat([[2, 2, 2, 2], [1, 0, 0, 3]], 32, axis=0), 32, axis=1
)  # (64, 128) rows of CLASSES
LABEL_IDS, TRAIN_IDS, COLOURS = (np.array([row[i] for row in CLASSES], np.uint8)[SCENE] for i in range(3))
FAST = SampleConfig(steps=2, scale=3.0)
CITYSCAPES = segmentation(LabelSpace.load("cityscapes"))
HINT = Hint("a scene_labelIds.png", COLOURS, "0123", "", TRAIN_IDS)


def in_hand(model: ControlLDM) -> Future[Any]:
    """A model that needs no reading any more."""
    future: Future[Any] = Future()
    future.set_result(model)
    return future


@pytest.fixture
def session(model: ControlLDM, tmp_path: Path) -> Session:
    return Session(in_hand(model), tmp_path, marks={"checkpoint": "tiny"})


# -- orders -----------------------------------------------------------------------------------------------


def test_images_are_those_of_a_direct_call(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webui.session, "PIXELS_AT_ONCE", 2 * 64 * 128)
    sample = replace(FAST, negative_prompt="fog", strength=1.5, sampler="dpm++2m")
    told: list[Progress] = []
    results = session.run(HINT, Order("a lane", 3, 5, sample), told.append)
    tensor = torch.from_numpy(COLOURS.astype(np.float32) / np.float32(255)).permute(2, 0, 1)[None]
    batches = [generate(session.model, tensor, ["a lane"] * len(s), s, sample) for s in ([5, 6], [7])]
    expected = torch.cat(batches).numpy()
    assert expected.std() > 20, "a grey image would agree with anything"
    assert [result.seed for result in results] == [5, 6, 7]
    assert [progress[:2] for progress in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for result, image in zip(results, expected, strict=True):
        assert (np.asarray(Image.open(result.image)) == image).all()
        mixed = np.asarray(Image.open(result.mixed)).astype(float)
        assert np.abs(mixed - (image.astype(float) + COLOURS) / 2).max() <= 0.5


def test_an_image_carries_what_made_it(session: Session) -> None:
    (result,) = session.run(HINT, Order("a lane", seed=9, sample=FAST))
    assert result.image.name == "a_scene_seed9.png"
    found = json.loads(Image.open(result.image).text["scenecontrol"])
    expected = {"prompt": "a lane", "seed": 9, "steps": 2, "scale": 3.0, "strength": 1.0, "sampler": "ddim"}
    expected |= {"checkpoint": "tiny", "hint": HINT.name, "hint_fingerprint": "0123", "size": [64, 128]}
    assert {**found, **expected} == found


def test_one_request_computes_at_a_time(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = [], []

    def slow(model: Any, hint: Any, prompts: list[str], *rest: Any, **options: Any) -> torch.Tensor:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return torch.zeros(len(prompts), 64, 128, 3, dtype=torch.uint8)

    monkeypatch.setattr(cldm.generate, "generate", slow)
    painter = Painter(CITYSCAPES, session)
    visitors = [
        threading.Thread(target=lambda i=i: list(painter.paint(HINT, Order("a"), f"{i}"))) for i in range(4)
    ]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert most == [1, 1, 1, 1]


def test_a_failure_leaves_the_turn_to_the_next(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cldm.generate, "generate", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.run(HINT, Order("a", sample=FAST))
    assert len(session.run(HINT, Order("a", sample=FAST))) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num": 9}, "num in 1..8, found 9"),
        ({"num": 0}, "num in 1..8"),
        ({"seed": -1}, "seed in 0..4294967295"),
        ({"prompt": "a" * (MAX_PROMPT + 1)}, "1000 characters, found 1001"),
        ({"steps": 101}, "steps in 1..100"),
        ({"scale": float("nan")}, "scale in 1..20, found nan"),
        ({"strength": float("inf")}, "strength in 0..2"),
        ({"negative_prompt": "a" * (MAX_PROMPT + 1)}, "negative prompt"),
        ({"sampler": "euler"}, r"'euler'; choose one of ddim, dpm\+\+2m"),
        ({"eta": 2.0}, "eta in 0..1"),
    ],
    ids=str,
)
def test_orders_are_bounded(session: Session, change: dict[str, Any], said: str) -> None:
    of_order = {name: value for name, value in change.items() if name in ("num", "seed", "prompt")}
    of_sample = {name: value for name, value in change.items() if name not in of_order}
    order = replace(Order("a", sample=replace(FAST, **of_sample)), **of_order)
    with pytest.raises(ValueError, match=said):
        session.run(HINT, order)
    assert not (session.folder / "results").exists()


def test_a_map_without_a_size_is_bounded(session: Session) -> None:
    hint = HINT._replace(colours=np.zeros((1024, 2048, 3), np.uint8))
    with pytest.raises(ValueError, match=r"found 1024x2048.*--size"):
        session.run(hint, Order("a"))


def test_every_seed_is_in_one_batch() -> None:
    assert split(3, 5, 2) == [[3, 4], [5, 6], [7]]
    assert split(0, 1, 4) == [[0]]


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a b.png", "a_b"), ("../../x.png", "x"), ("..", "image"), ("\u00e4" * 300, "_"), ("y" * 300, "y" * 60)],
)
def test_names_are_such_as_every_file_system_takes(name: str, stem: str) -> None:
    assert safe_stem(name) == stem


def test_a_session_takes_size_and_settings_from_the_run(
    model: ControlLDM, tiny_yaml: Path, tmp_path: Path
) -> None:
    notes = {"model_config": OmegaConf.to_yaml(OmegaConf.load(tiny_yaml))}
    run = "data: {size: [64, 192]}\nsample: {scale: 2.5, sampler: dpm++2m}"
    write_tensors(tmp_path / "run.safetensors", model.state_dict(), {**notes, "run_config": run})
    some = {"x": torch.zeros(1)}
    write_tensors(tmp_path / "plain.safetensors", some, notes)
    write_tensors(tmp_path / "bad.safetensors", some, {"run_config": "sample: {steps: many}"})
    path = tmp_path / "run.safetensors"
    recorded = open_session(tmp_path, path, read_recorded_run(path), device="cpu")
    images = recorded.run(HINT, Order("a lane", seed=4, sample=FAST))
    same = Session(in_hand(model), tmp_path).run(HINT, Order("a lane", seed=4, sample=FAST))
    assert (np.asarray(Image.open(images[0].image)) == np.asarray(Image.open(same[0].image))).all()
    assert (recorded.size, recorded.sample) == ((64, 192), SampleConfig(scale=2.5, sampler="dpm++2m"))
    assert recorded.marks["checkpoint"] == "run.safetensors"
    plain = read_recorded_run(tmp_path / "plain.safetensors")
    assert plain == (None, None, SampleConfig(), None, None, None, {}, 0)
    with pytest.raises(ValueError, match=r"bad.safetensors: its run_config"):
        read_recorded_run(tmp_path / "bad.safetensors")


# -- files that visitors bring ----------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and ends after 10 bytes of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels


def write_upload(path: Path, what: str) -> Path:
    """Write a file of a kind that a page must refuse; its name says nothing true."""
    frames = [Image.fromarray(COLOURS), Image.fromarray(COLOURS[:, ::-1].copy())]
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    if what.startswith("animated"):
        frames[0].save(path, format=what.split()[1], save_all=True, append_images=frames[1:], lossless=True)
    elif what == "odd":
        Image.fromarray(np.full((64, 128, 3), (1, 2, 3), np.uint8)).save(path, format="PNG")
    elif what == "photo":
        Image.fromarray(noise).save(path, format="JPEG")
    elif what.startswith("ids"):
        Image.fromarray(np.full((64, 64), int(what.split()[1]), np.uint8)).save(path, format="PNG")
    elif what == "still GIF":
        frames[0].save(path, format="GIF")
    elif what == "cut":
        frames[0].save(path, format="PNG")
        path.write_bytes(path.read_bytes()[:200])
    elif what == "huge file":
        with path.open("wb") as file:
            file.truncate(MAX_BYTES + 1)
    else:
        path.write_bytes(
            {
                "bomb": png_header(60000, 60000),
                "large": png_header(5000, 5000),
                "svg": b'\xef\xbb\xbf <svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
                "xml": b'<?xml version="1.0"?>\n<!-- --><svg/>',
                "text": b"a,b\n1,2\n",
                "empty": b"",
            }[what]
        )
    return path


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("photo", "auto", r"expected a label map, found \d+ colours and more; is it a photo\?"),
        ("odd", "auto", r"expected the colours of cityscapes, found 8192 pixels .*No other palette knows"),
        ("photo", "label_ids", r"lossless label map .*found JPEG"),
        ("bomb", "auto", r"at most 16 million pixels, found far more"),
        ("large", "auto", r"at most 16 million pixels, found 5000x5000"),
        ("svg", "auto", r"expected a picture \(PNG.*found SVG"),
        ("xml", "auto", r"found SVG"),
        ("text", "auto", r"found none of these"),
        ("empty", "auto", r"found none of these"),
        ("cut", "colours", r"expected .* image"),
        ("still GIF", "auto", r"found a GIF"),
        ("animated GIF", "auto", r"found a GIF"),
        ("animated PNG", "auto", r"expected a single picture, found an animation"),
        ("animated WEBP", "auto", r"expected a single picture, found an animation"),
        ("animated TIFF", "auto", r"found TIFF"),
        ("huge file", "auto", r"at most 16 MB"),
        ("ids 99", "label_ids", r"expected cityscapes label ids .*found 99 in 4096 pixels"),
        ("ids 33", "train_ids", r"expected cityscapes train ids 0..18, 255, found 33"),
        ("ids 7", "colours", r"expected the colours"),
    ],
)
def test_what_is_no_map_is_refused_in_a_sentence(tmp_path: Path, what: str, kind: str, said: str) -> None:
    path = write_upload(tmp_path / "upload.png", what)
    with pytest.raises(ValueError, match=said) as caught:
        CITYSCAPES.read(path, kind, (64, 128))
    message = str(caught.value)
    assert message.startswith("upload.png: ")
    assert str(tmp_path) not in message, "where the server keeps its files is nobody's business"
    assert "\n" not in message


def test_ids_without_a_telling_name_are_told_apart_by_those_that_one_kind_has(tmp_path: Path) -> None:
    for pixels, found in ((LABEL_IDS, "label ids"), (TRAIN_IDS, "train ids")):
        Image.fromarray(pixels).save(tmp_path / "x.png")
        hint = CITYSCAPES.read(tmp_path / "x.png", "auto", None)
        assert hint.found == f"{found} of cityscapes"
        assert hint.labels is not None
        assert (hint.labels == TRAIN_IDS).all()


@pytest.mark.parametrize(
    ("size", "fitting"),
    [
        ((100, 200), (128, 256)),
        ((64, 64), (64, 64)),
        ((480, 640), (512, 704)),
        ((1024, 2048), (704, 1408)),
        ((1052, 1914), (768, 1344)),
        ((1, 10**6), (64, 16384)),
        ((10**6, 3), (16384, 64)),
    ],
)
def test_a_map_without_a_size_is_brought_near_its_own(
    tmp_path: Path, size: tuple[int, int], fitting: tuple[int, int]
) -> None:
    assert fitting_size(size) == fitting
    assert fitting[0] * fitting[1] <= 1 << 20
    if size == (100, 200):
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "x.png")
        hint = CITYSCAPES.read(tmp_path / "x.png", "train_ids", None)
        assert hint.colours.shape[:2] == fitting
        assert hint.found == "train ids of cityscapes, resized from 100x200"


@pytest.mark.parametrize(
    ("name", "pixels", "kind"),
    [
        ("x_labelIds.png", LABEL_IDS, "auto"),
        ("x.png", LABEL_IDS, "label_ids"),
        ("x_labelTrainIds.bmp", TRAIN_IDS, "auto"),
        ("x.bmp", TRAIN_IDS, "train_ids"),
        ("x.webp", COLOURS, "auto"),
        ("x.png", np.dstack([COLOURS, np.full((64, 128), 255, np.uint8)]), "auto"),
    ],
)
def test_maps_of_every_kind_become_the_same_hint(
    tmp_path: Path, name: str, pixels: np.ndarray, kind: str
) -> None:
    Image.fromarray(pixels).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    hint = CITYSCAPES.read(tmp_path / name, kind, None)
    assert (hint.colours == COLOURS).all()
    assert hint.labels is not None
    assert (hint.labels == TRAIN_IDS).all()
    assert hint.name == name
    word = "colours" if pixels.ndim == 3 else "train ids" if pixels is TRAIN_IDS else "label ids"
    assert hint.found == f"{word} of cityscapes"
    half = CITYSCAPES.read(tmp_path / name, kind, (64, 64))
    assert (half.colours == COLOURS[:, 1::2]).all(), "the nearest pixel, no new colour"


# -- examples ---------------------------------------------------------------------------------------------


def test_a_fresh_clone_has_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = load_examples(CITYSCAPES, None, tmp_path / "work", (64, 128))
    assert len(examples) == EXAMPLES
    assert ["night" in example.prompt for example in examples].count(True) == 1
    frame = render_frame(1_000_000, (64, 128), condition="clear")
    assert examples[0].prompt == frame.caption
    colours = {7: (128, 64, 128), 8: (244, 35, 232), 11: (70, 70, 70), 26: (0, 0, 142)}
    for label, colour in colours.items():
        painted = (examples[0].hint.colours == colour).all(axis=2)
        assert painted.any()
        assert (painted == (frame.label_ids == label)).all()


def test_a_rendered_data_set_gives_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    maps = tmp_path / "data/streets/gtFine/val/x"
    maps.mkdir(parents=True)
    (tmp_path / "data/streets/leftImg8bit").mkdir()
    (tmp_path / "data/streets/captions.json").write_text('{"x_1": "a road"}')
    Image.fromarray(LABEL_IDS).save(maps / "x_1_gtFine_labelIds.png")
    (example,) = load_examples(CITYSCAPES, None, tmp_path / "work", None)
    assert (example.hint.name, example.prompt) == ("x_1_gtFine_labelIds.png", "a road")
    assert (example.hint.colours == COLOURS).all()
    assert not (tmp_path / "work").exists()


def test_a_page_of_other_classes_starts_with_an_empty_map(tmp_path: Path) -> None:
    ade20k = LabelSpace.load("ade20k")
    (example,) = load_examples(segmentation(ade20k), None, tmp_path / "work", (64, 192))
    assert example.hint.labels is not None
    assert (example.hint.labels == np.full((64, 192), 255)).all()
    assert example.hint.space == "ade20k"


def test_examples_of_a_folder_are_spread_over_it(tmp_path: Path) -> None:
    for i in range(20):
        Image.fromarray(np.roll(COLOURS, i, axis=1)).save(tmp_path / f"{i:02d}.png")
    names = [x.hint.name for x in load_examples(CITYSCAPES, tmp_path, tmp_path, None)]
    assert names == ["00.png", "03.png", "06.png", "10.png", "13.png", "16.png"]
    (tmp_path / "few").mkdir()
    Image.fromarray(COLOURS).save(tmp_path / "few/a.png")
    assert len(load_examples(CITYSCAPES, tmp_path / "few", tmp_path, None)) == 1


def test_a_prompt_of_the_visitor_is_kept(session: Session, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    painter = Painter(CITYSCAPES, session, load_examples(CITYSCAPES, None, tmp_path / "w", (64, 128)))
    first, second = painter.examples[:2]
    assert painter.prompt_for(second.hint.name, first.prompt) == second.prompt
    assert painter.prompt_for(second.hint.name, " ") == second.prompt
    assert painter.prompt_for(second.hint.name, "mine") == "mine"
    assert painter.find_hint(None, "", second.hint.name) == second.hint
    with pytest.raises(ValueError, match="expected a file or the name of an example"):
        painter.find_hint(None, "", "gone")


# -- the folder -------------------------------------------------------------------------------------------


def test_the_folder_goes_and_the_environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/")
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    before = dict(os.environ)
    with private_folder() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        assert os.environ["GRADIO_ALLOWED_PATHS"] == ""
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "file").touch()
    assert not folder.exists()
    assert dict(os.environ) == before


def test_many_may_tidy_at_once(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}/x.png").write_bytes(b"x")
        os.utime(tmp_path / f"{i}/x.png", (0, 0))
    faults: list[BaseException] = []

    def work() -> None:
        try:
            tidy(tmp_path)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert not list(tmp_path.rglob("*"))


def test_what_is_old_or_too_much_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    ages = {"old/a": KEEP_SECONDS + 60, f"{KEPT}/b": KEEP_SECONDS + 60, "c": 300, "d": 200, "e": 100}
    for name, age in ages.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10))
        os.utime(path, (now - age, now - age))
    tidy(tmp_path)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"b", "c", "d", "e"}
    assert not (tmp_path / "old").exists()
    monkeypatch.setattr("webui.folder.KEEP_BYTES", 25)
    tidy(tmp_path)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"b", "d", "e"}
    assert KEEP_BYTES > 8 * 2 * MAX_BYTES, "one request must not push itself out"


# -- the gate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "is_needed"),
    [
        ("/", True),
        ("/config", True),
        ("/login", True),
        ("/assets/index.js", True),
        ("/gradio_api/queue/join", True),
        ("/gradio_api/call/generate", True),
        ("/gradio_api/file=/tmp/a.png", True),
        ("/gradio_api/file=http://127.0.0.1:1/", False),
        ("/gradio_api/file=HTTPS://example.org/", False),
        ("/gradio_api/proxy=https://x.hf.space/", False),
        ("/gradio_api/deep_link", False),
        ("/gradio_api/component_server", False),
        ("/gradio_api/process_recording", False),
        ("/gradio_api/stream/x", False),
        ("/gradio_api/vibe-edit", False),
        ("/gradio_api/run-history/buckets", False),
        ("/gradio_api/custom_component/a/client/component/x.js", False),
        ("/monitoring/summary", False),
    ],
)
def test_only_what_the_page_needs_is_open(path: str, is_needed: bool) -> None:
    assert is_open(path) is is_needed


def test_addresses_are_found_wherever_they_stand_in_a_message() -> None:
    body = json.dumps({"data": [{"path": "\u0068ttp://x/", "b": [{"path": "/tmp/a.png"}]}, "path", 3]})
    assert sorted(map(str, paths_in(body.encode()))) == ["/tmp/a.png", "http://x/"]
    assert [is_address(p) for p in ("http://x", " ftp://x", "C:\\a.png", "/a:b", "a/b", None)] == [
        *(True, True),
        *(False, False, False, False),
    ]
    assert list(paths_in(b"no json")) == []
    assert list(paths_in(b"[" * 100_000)) == []


def test_a_sentence_cannot_become_markup() -> None:
    assert "<img" not in show_refusal("<img src=x onerror=alert(1)>.png: no map")


# -- the script -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--listen"], "give --auth USER:PASSWORD"),
        (["--share"], "give --auth USER:PASSWORD"),
        (["--auth", "me"], "--auth must be USER:PASSWORD"),
        (["--auth", "me:"], "--auth must be USER:PASSWORD"),
        (["--port", "70000"], "--port must lie in 1..65535"),
        (["--size", "60", "64"], "multiples of 64"),
        (["--size", "4096", "4096"], "at most 1048576 pixels"),
        (["--ckpt", "gone.ckpt"], "gone.ckpt does not exist"),
        (["--examples", "gone"], "gone does not exist"),
        (["--examples", __file__], "is no folder"),
        (
            [],
            "expected the weights of Streets, found no models/gone.safetensors; get them as models/README.md",
        ),
    ],
    ids=str,
)
def test_wrong_flags_are_refused_in_a_sentence(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = replace(CITYSCAPES, models=Models("models/gone.safetensors", "models/README.md"))
    monkeypatch.setattr(script, "CONDITIONS", {**script.CONDITIONS, "segmentation": lambda space: gone})
    with pytest.raises(SystemExit) as exit_info:
        script.main(words)
    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_flags_are_refused_before_gradio_and_torch_are_imported() -> None:
    result = run_script("-X", "importtime", "gradio_seg2image.py", "--listen")
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 2
    assert "argparse" in imported
    assert not {"gradio", "torch", "fastapi"} & imported
