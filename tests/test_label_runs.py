"""How a label map travels between the browser and Python, and what is refused on the way."""

from __future__ import annotations

import base64
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datasets.label_space import LabelSpace, resize_labels

gr = pytest.importorskip("gradio", reason="gradio is not installed; pip install -r requirements.txt")

from webui.label_editor import MAX_TEXT, LabelEditor  # noqa: E402 - after the skip
from webui.label_runs import MAX_PIXELS, decode_labels, encode_labels  # noqa: E402 - after the skip

SPACE = LabelSpace.load("cityscapes")
VOID = SPACE.void


def noise(height: int, width: int) -> np.ndarray:
    """Every class and void, a pixel each."""
    ids = np.append(np.arange(19), VOID).astype(np.uint8)
    return ids[np.random.default_rng(0).integers(0, 20, (height, width))]


def slow_runs(ids: Sequence[int]) -> bytes:
    """The wire format as its docstring says it, a pixel at a time."""
    out: list[list[int]] = []
    for k in ids:
        if out and out[-1][1] == k and out[-1][0] < 255:
            out[-1][0] += 1
        else:
            out.append([0, k])
    return bytes(byte for pair in out for byte in pair)


@pytest.mark.parametrize(
    "labels",
    [
        np.array([[3]], np.uint8),
        np.array([[VOID]], np.uint8),
        np.full((1, 256), 4, np.uint8),
        np.full((257, 1), 4, np.uint8),
        np.full((64, 64), 7, np.uint8),
        np.append(np.arange(19), VOID).astype(np.uint8)[None],
        noise(64, 128),
        np.kron(noise(16, 32), np.ones((4, 4), np.uint8))[:, ::-1],
    ],
    ids=lambda labels: "x".join(map(str, labels.shape)),
)
def test_a_map_travels_as_its_runs(labels: np.ndarray) -> None:
    payload = encode_labels(labels)
    assert (payload["height"], payload["width"]) == labels.shape
    assert base64.b64decode(payload["runs"]) == slow_runs(labels.ravel().tolist())
    back = decode_labels(payload, SPACE)
    assert back.dtype == np.uint8
    assert (back == labels).all()


def test_real_maps_fit_a_message(real_data: Path) -> None:
    files = sorted((real_data / "cityscapes" / "gtFine").rglob("*_labelIds.png"))
    assert files
    for path in files:
        ids = SPACE.to_train_ids(np.asarray(Image.open(path)), path.name)
        for labels in (resize_labels(ids, (512, 1024)), ids):
            payload = encode_labels(labels)
            assert (decode_labels(payload, SPACE) == labels).all()
            assert len(payload["runs"]) < (40 << 10 if labels.size <= 1 << 19 else 80 << 10)


def test_noise_that_no_message_could_bring_back_is_refused() -> None:
    labels = noise(512, 1024)
    assert (decode_labels(encode_labels(labels), SPACE) == labels).all(), "an image may carry it"
    editor = LabelEditor(SPACE, noise(8, 8))
    with pytest.raises(gr.Error, match=rf"at most {MAX_TEXT * 3 // 8} runs .* found \d+; .*smaller"):
        editor.postprocess(labels)


GOOD = {"height": 2, "width": 3, "runs": base64.b64encode(bytes([5, 1])).decode()}
LONG = base64.b64encode(bytes([255, 1]) * 3000).decode()


def runs(*numbers: int) -> dict[str, str]:
    return {"runs": base64.b64encode(bytes(numbers)).decode()}


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (None, "an object with height, width and runs, found a value of type NoneType"),
        ("<b>", "found a value of type str"),
        ({}, "an object with height, width and runs, found one without"),
        ({"height": 2, "width": 3}, "found one without"),
        ({**GOOD, "height": True}, "as height, found a value of type bool"),
        ({**GOOD, "width": float("nan")}, "as width, found a value of type float"),
        ({**GOOD, "width": "3"}, "as width, found a value of type str"),
        ({**GOOD, "width": 0}, "as width, found one below 1"),
        ({**GOOD, "width": -(10**5000)}, "as width, found one below 1"),
        ({**GOOD, "height": 10**5000}, "as height, found a larger one"),
        ({**GOOD, "height": MAX_PIXELS, "width": MAX_PIXELS}, f"at most {MAX_PIXELS} pixels, found"),
        ({**GOOD, "height": 3}, "runs of 3x3 pixels together, found 6 pixels"),
        ({**GOOD, "runs": [5]}, "text for at most 6 runs, found a value of type list"),
        ({**GOOD, "runs": LONG}, "text for at most 6 runs, found 8000 characters"),
        ({**GOOD, "runs": ""}, "runs of 2x3 pixels together, found 0 pixels"),
        ({**GOOD, "runs": "BQ=="}, "pairs of bytes as runs, found 1 bytes"),
        ({**GOOD, "runs": "B Q E="}, "base64 as runs, found other text"),
        ({**GOOD, "runs": "B\u00e9E="}, "base64 as runs, found other text"),
        ({**GOOD, **runs(255, 1)}, "found 256 pixels"),
        ({**GOOD, **runs(4, 1, 0, 19)}, "ids from 0 to 18 or 255, found 19"),
        ({**GOOD, **runs(4, 254, 0, 1)}, "ids from 0 to 18 or 255, found 254"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hostile_payload_is_refused_in_a_sentence(payload: Any, said: str) -> None:
    tracemalloc.start()
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=r"^the label map: expected ") as caught:
        decode_labels(payload, SPACE)
    took, peak = time.perf_counter() - begun, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said in str(caught.value)
    assert str(caught.value).endswith("reload the page and try again.")
    assert len(str(caught.value)) < 200
    assert took < 0.5
    assert peak < 1 << 20


def test_the_bound_on_pixels_is_the_callers() -> None:
    assert decode_labels(GOOD, SPACE, 6).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert decode_labels({**GOOD, "photo": "x", "more": [1]}, SPACE).shape == (2, 3)
    with pytest.raises(ValueError, match="at most 5 pixels, found 2x3"):
        decode_labels(GOOD, SPACE, 5)
