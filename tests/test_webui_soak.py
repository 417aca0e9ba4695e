"""Twenty clients at once, some of whom send nonsense, at the script with the models that ship."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("gradio", reason="gradio is not installed; pip install -r requirements.txt")
pytest.importorskip("httpx")

from served_page import ADDED, LABEL_IDS, SETTINGS, Answer, Visitor, drawn, encoded

from cldm.config import SampleConfig, project_path
from cldm.model import load_model, model_config_of, place
from webui.uploads import MAX_BYTES

ROOT = Path(__file__).parents[1]
CONTROL, BASE = (project_path(f"models/{name}.safetensors") for name in ("control_streets", "streets_base"))
CLIENTS = 20
SIZE = {"height": 64, "width": 128}
WARM_UP = 3 * CLIENTS  # requests until every buffer has its size and every visitor a session
FLAT = 32 << 20  # bytes that the server may grow by after that
FILES = 64 << 10  # bytes of files that a request may leave: an image and a map, and what was uploaded once

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
    pytest.mark.skipif(not (CONTROL.is_file() and BASE.is_file()), reason="the Streets weights are not here"),
]


class Server(NamedTuple):
    """The script in a process of its own."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def memory(self) -> int:
        """Bytes of its pages."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) << 10


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    command, log = [sys.executable, "gradio_seg2image.py", "--device", "cpu"], tmp_path / "log.txt"
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        found = re.match(r"open (http://127\.0\.0\.1:\d+)/", process.stdout.readline())
        assert found is not None, log.read_text()
        yield Server(found[1], process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    assert list(tmp_path.glob("scenecontrol_*")) == [], "the folder is removed at the end"


# -- requests ---------------------------------------------------------------------------------------------


def good(visitor: Visitor, number: int) -> Answer:
    file = visitor.upload("mine_labelIds.png", encoded(LABEL_IDS))
    return visitor.generate(file=file, **SIZE, steps=4, seed=number)


def with_file(name: str, content: bytes) -> Callable[[Visitor], Answer]:
    return lambda visitor: visitor.generate(file=visitor.upload(name, content), **SIZE)


def with_values(**changes: Any) -> Callable[[Visitor], Answer]:
    def ask(visitor: Visitor) -> Answer:
        return visitor.generate(file=visitor.upload("mine_labelIds.png", encoded(LABEL_IDS)), **changes)

    return ask


def too_large(visitor: Visitor) -> Answer:
    form = {"files": ("x.png", bytes(MAX_BYTES + (1 << 20)))}
    answer = visitor.http.post(f"{visitor.url}/gradio_api/upload", files=form)
    assert answer.status_code == 413
    return Answer(False, {"error": answer.text})


def from_elsewhere(visitor: Visitor) -> Answer:
    answer = visitor.join("generate", [{**ADDED, "path": "http://127.0.0.1:1/x.png"}])
    assert answer.status_code == 403
    return Answer(False, {"error": answer.text})


BAD: list[tuple[Callable[[Visitor], Answer], str]] = [
    (
        with_file("bad_labelIds.png", encoded(np.full((64, 64), 99, np.uint8))),
        "cityscapes label ids.*found 99",
    ),
    (with_file("x.png", b"<svg/>"), "found SVG"),
    (with_file("x.png", encoded(LABEL_IDS)[:-60]), "expected a label map that decodes"),
    (lambda visitor: visitor.generate(example="nothing"), "expected a file or the name of an example"),
    (with_values(steps=101), r"expected steps in 1\.\.100"),
    (with_values(num=True), "expected num to be like 1"),
    (with_values(prompt="a" * 5000), "at most 1000 characters"),
    (with_values(height=65, width=64), "multiples of 64"),
    (too_large, "expected at most [0-9]+ bytes"),
    (from_elsewhere, "expected an uploaded file, found an address"),
]


class Outcome(NamedTuple):
    """What a client met."""

    number: int
    answer: Answer
    image: Any  # pixels; None of a refusal


def meet(url: str, count: int) -> list[Outcome]:
    """Let all clients take requests until none is left; every tenth is bad."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(count):
        waiting.put(number)
    outcomes: list[Outcome] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            visitor = Visitor(url)
            while True:
                number = waiting.get_nowait()
                bad = number % 10 == 9
                answer = BAD[number // 10 % len(BAD)][0](visitor) if bad else good(visitor, number)
                image = visitor.show(answer.data[0][0]) if answer.success else None
                outcomes.append(Outcome(number, answer, image))
        except queue.Empty:
            pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    return sorted(outcomes)


@pytest.mark.parametrize(
    "count", [pytest.param(20, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.soak)]
)
def test_many_clients_are_served_and_the_server_stays_as_it_is(
    server: Server, count: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    meet(server.url, WARM_UP)
    before, begin = server.memory(), time.monotonic()
    outcomes = meet(server.url, count)
    seconds, after = time.monotonic() - begin, server.memory()
    record_property("requests per second", round(count / seconds, 2))
    record_property("MiB before and after", [before >> 20, after >> 20])

    assert [outcome.number for outcome in outcomes] == list(range(count))
    model = place(load_model(model_config_of(CONTROL, BASE), CONTROL, BASE), "cpu", "auto")
    sample = SampleConfig(
        **{name: SETTINGS[name] for name in ("scale", "strength", "sampler", "eta")}, steps=4
    )
    for number, answer, image in outcomes:
        if number % 10 == 9:
            assert not answer.success
            assert re.search(BAD[number // 10 % len(BAD)][1], answer.reason), answer.reason
            assert not re.search(rf"Traceback|{tmp_path}|\n.*\n", answer.reason)
        else:
            assert answer.success, answer.reason
            assert answer.data[0][0]["orig_name"] == f"mine_seed{number}.png"
            assert image.shape == (64, 128, 3)
        if number % 10 == 0:
            with torch.inference_mode():
                assert (image == drawn(model, [number], sample)[0]).all()
    images = [outcome.image.tobytes() for outcome in outcomes if outcome.image is not None]
    assert len(set(images)) == len(images), "other seeds, other images"

    left = [path.stat().st_size for path in tmp_path.glob("scenecontrol_*/**/*") if path.is_file()]
    assert sum(left) < (WARM_UP + count) * FILES + (1 << 20), "the folder grows with images alone"
    assert after - before < FLAT
    assert good(Visitor(server.url), 0).success
    assert "Traceback" not in server.log.read_text()
