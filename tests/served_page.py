"""A page that is served, and visitors that speak to it as a browser does, or worse."""

from __future__ import annotations

import copy
import io
import json
import secrets
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
from PIL import Image

from cldm.cldm import ControlLDM
from cldm.config import SampleConfig
from cldm.generate import generate
from datasets.label_space import LabelSpace
from webui.condition import Example
from webui.folder import private_folder
from webui.painter import Painter
from webui.segmentation import segmentation
from webui.session import Session

# Of Cityscapes: label id, train id, colour of road, car, sky.
CLASSES = [(7, 0, (128, 64, 128)), (26, 13, (0, 0, 142)), (23, 10, (70, 130, 180))]
SCENE = np.repeat(np.repeat([[2, 2, 2, 2], [1, 0, 0, 1]], 32, axis=0), 32, axis=1)  # (64, 128)
LABEL_IDS, TRAIN_IDS, COLOURS = (np.array([row[i] for row in CLASSES], np.uint8)[SCENE] for i in range(3))
FAST = SampleConfig(steps=1, scale=3.0)
SETTINGS: dict[str, Any] = {
    **{"prompt": "a lane", "negative_prompt": "", "num": 1, "seed": 4, "steps": 1, "scale": 3.0},
    **{"strength": 1.0, "guess_mode": False, "sampler": "ddim", "eta": 0.0, "prior": "none", "start": 799},
}
REQUEST = {"file": None, "kind": "detect", "example": "", **SETTINGS, "height": 0, "width": 0}
ADDED = {"path": "", "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}  # what a file is on the wire


class Site(NamedTuple):
    """A page that is being served."""

    url: str
    folder: Path
    model: ControlLDM
    page: Any


class Answer(NamedTuple):
    """What became of an event."""

    success: bool
    output: dict[str, Any]

    @property
    def data(self) -> list[Any]:
        return self.output["data"]

    @property
    def reason(self) -> str:
        """What a visitor is told of a refusal; nothing where the server keeps it to itself."""
        return self.output.get("error") or ""


def in_hand(model: ControlLDM) -> Future[Any]:
    """A model that needs no reading any more."""
    future: Future[Any] = Future()
    future.set_result(model)
    return future


def make_painter(model: ControlLDM, folder: Path, maps: Path) -> Painter:
    """A page's inside with two examples and a segmenter that sees a road everywhere."""
    condition, examples = segmentation(LabelSpace.load("cityscapes")), []
    for name, ids in (("a", LABEL_IDS), ("b", LABEL_IDS[:, ::-1].copy())):
        Image.fromarray(ids).save(maps / f"{name}_labelIds.png")
        examples.append(
            Example(condition.read(maps / f"{name}_labelIds.png", "auto", None), f"caption of {name}")
        )
    session = Session(in_hand(copy.deepcopy(model)), folder, (64, 128), FAST)
    return Painter(condition, session, examples, lambda photo: np.zeros(photo.shape[:2], np.uint8))


@contextmanager
def open_site(painter: Painter) -> Iterator[Site]:
    """Serve the page of a painter."""
    from webui.page import build_page
    from webui.server import serving

    page, folder = build_page(painter), painter.session.folder
    with serving(page, folder) as url:
        yield Site(url.rstrip("/"), folder, painter.session.model, page)


@contextmanager
def tiny_site(model: ControlLDM, maps: Path) -> Iterator[Site]:
    """A page of a tiny model in a folder of its own."""
    with private_folder() as folder, open_site(make_painter(model, folder, maps)) as site:
        yield site


def drawn(model: ControlLDM, seeds: list[int], sample: SampleConfig = FAST, prompt: str = "a lane") -> Any:
    """The images (B, H, W, 3) of SCENE by a direct call."""
    hint = torch.from_numpy(COLOURS.copy()).permute(2, 0, 1)[None] / 255
    images = generate(model, hint, [prompt] * len(seeds), seeds, sample).numpy()
    assert images.std() > 5, "a grey image would agree with anything"
    return images


def encoded(picture: Any, form: str = "PNG", **options: Any) -> bytes:
    """A picture as a file holds it."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, form, **options)
    return file.getvalue()


@dataclass
class Visitor:
    """One who sends what it likes: every event of the page by its name, with any values."""

    url: str
    session: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        # No connection is kept: after an error the server closes it, and the next request would be lost.
        self.http = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
        config = self.http.get(f"{self.url}/config").json()
        self.kinds = {part["id"]: part["type"] for part in config["components"]}
        self.events = {event["api_name"]: event for event in config["dependencies"]}

    def upload(self, name: str, content: bytes) -> dict[str, Any]:
        """A file on the wire that was uploaded."""
        answer = self.http.post(f"{self.url}/gradio_api/upload", files={"files": (name, content)})
        answer.raise_for_status()
        return {**ADDED, "path": answer.json()[0], "orig_name": name}

    def join(self, event: str, data: Any, event_data: Any = None) -> httpx.Response:
        """An event as a browser sends it."""
        body = {"data": data, "fn_index": self.events[event]["id"], "session_hash": self.session}
        return self.http.post(
            f"{self.url}/gradio_api/queue/join",
            content=json.dumps({**body, "event_data": event_data}),  # httpx refuses NaN, and json does not
            headers={"content-type": "application/json"},
        )

    def ask(self, event: str, data: Any, event_data: Any = None) -> Answer:
        """What comes of an event in the end."""
        start = self.join(event, data, event_data)
        assert start.status_code == 200, start.text
        return self.listen(start.json()["event_id"])

    def listen(self, event_id: str) -> Answer:
        query = {"session_hash": self.session}
        with self.http.stream("GET", f"{self.url}/gradio_api/queue/data", params=query) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed" and message["event_id"] == event_id:
                    return Answer(message["success"], message["output"])
                if message.get("msg") == "unexpected_error":
                    return Answer(False, {"error": message["message"]})
        raise AssertionError("the server ended the conversation")

    def generate(self, **changes: Any) -> Answer:
        """The one function that is offered."""
        return self.ask("generate", list({**REQUEST, **changes}.values()))

    def show(self, file: dict[str, Any]) -> Any:
        """The pixels of a file that the server answered with."""
        answer = self.http.get(file["url"])
        answer.raise_for_status()
        with Image.open(io.BytesIO(answer.content)) as image:
            return np.asarray(image)


class Regular:
    """A visitor who asks for the same image again and again, and knows what it looks like."""

    def __init__(self, site: Site) -> None:
        self.visitor, self.expected = Visitor(site.url), drawn(site.model, [SETTINGS["seed"]])[0]

    def check(self) -> None:
        """Ask once more."""
        file = self.visitor.upload("mine_labelIds.png", encoded(LABEL_IDS))
        answer = self.visitor.generate(file=file)
        assert answer.success, answer
        assert (self.visitor.show(answer.data[0][0]) == self.expected).all()
