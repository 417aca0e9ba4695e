"""The page as a server: what the API gives, what it refuses, what it keeps to itself; and a browser on it."""

from __future__ import annotations

import copy
import json
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from cldm.cldm import ControlLDM
from cldm.config import SampleConfig
from cldm.generate import generate
from webui.condition import Example
from webui.folder import private_folder
from webui.painter import Painter
from webui.segmentation import SEGMENTATION, read_label_map
from webui.session import Session
from webui.uploads import MAX_BYTES

gr = pytest.importorskip("gradio", reason="gradio is not installed; pip install -r requirements.txt")
httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")

# Of Cityscapes: label id and colour of road, car, sky.
CLASSES = [(7, (128, 64, 128)), (26, (0, 0, 142)), (23, (70, 130, 180))]
SCENE = np.repeat(np.repeat([[2, 2, 2, 2], [1, 0, 0, 1]], 32, axis=0), 32, axis=1)
LABEL_IDS, COLOURS = (np.array([row[i] for row in CLASSES], np.uint8)[SCENE] for i in range(2))
FAST = SampleConfig(steps=1, scale=3.0)
SETTINGS: dict[str, Any] = {"prompt": "a lane", "negative_prompt": "", "num": 1, "seed": 4, "steps": 1}
SETTINGS |= {"scale": 3.0, "strength": 1.0, "sampler": "ddim", "kind": "detect", "example": ""}


class Site(NamedTuple):
    """A page that is being served."""

    url: str
    folder: Path
    model: ControlLDM
    page: Any


@pytest.fixture(scope="module")
def painter(tiny_model_once: ControlLDM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Painter]:
    """A page's inside with two examples, in a folder of its own."""
    model = copy.deepcopy(tiny_model_once)
    for name, parameter in model.control_model.input_hint_block.named_parameters():
        parameter.data.mul_(2.5 if name.endswith("weight") else 0)
    with private_folder() as folder:
        examples = []
        for name, ids in (("a", LABEL_IDS), ("b", LABEL_IDS[:, ::-1].copy())):
            path = tmp_path_factory.mktemp("maps") / f"{name}_labelIds.png"
            Image.fromarray(ids).save(path)
            examples.append(Example(read_label_map(path, "auto", None), f"caption of {name}"))
        yield Painter(SEGMENTATION, Session(model, folder, (64, 128), FAST), examples)


@pytest.fixture(scope="module")
def site(painter: Painter) -> Iterator[Site]:
    from webui.page import build_page
    from webui.server import serving

    page, folder = build_page(painter), painter.session.folder
    with serving(page, folder) as url:
        yield Site(url.rstrip("/"), folder, painter.session.model, page)


@pytest.fixture
def client(site: Site, tmp_path: Path) -> Any:
    return gradio_client.Client(site.url, verbose=False, download_files=str(tmp_path / "got"))


@pytest.fixture
def ids_file(tmp_path: Path) -> Any:
    Image.fromarray(LABEL_IDS).save(tmp_path / "mine_labelIds.png")
    return gradio_client.handle_file(str(tmp_path / "mine_labelIds.png"))


# -- the API ----------------------------------------------------------------------------------------------


def test_a_bad_request_is_refused_and_the_next_good_one_answered(
    site: Site, client: Any, ids_file: Any, tmp_path: Path
) -> None:
    hint = torch.from_numpy(COLOURS.copy()).permute(2, 0, 1)[None] / 255
    expected = generate(site.model, hint, ["a lane"], [4], FAST)[0].numpy()
    assert expected.std() > 20, "a grey image would agree with anything"

    def ask(file: Any, **changes: Any) -> list[Any]:
        images, note = client.predict(file=file, **{**SETTINGS, **changes}, api_name="/generate")
        assert "PNG" in note
        return images

    first = ask(ids_file)
    assert [image["caption"] for image in first] == ["seed 4", "seed 4, under the map"]
    assert (np.asarray(Image.open(first[0]["image"])) == expected).all()
    assert json.loads(Image.open(first[0]["image"]).text["scenecontrol"])["hint"] == "mine_labelIds.png"

    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(tmp_path / "bad_labelIds.png")
    bad = gradio_client.handle_file(str(tmp_path / "bad_labelIds.png"))
    for file, said in (
        (bad, r"^bad_labelIds.png: expected cityscapes label ids .*found 99"),
        (None, "expected a file or the name of an example"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=said) as caught:
            ask(file)
        assert str(site.folder) not in str(caught.value)

    again = ask(None, example="a_labelIds.png")
    assert (np.asarray(Image.open(again[0]["image"])) == expected).all()


def test_one_function_is_offered_under_plain_names(client: Any) -> None:
    offered = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(offered) == ["/generate"]
    assert {p["parameter_name"] for p in offered["/generate"]["parameters"]} == {*SETTINGS, "file"}


# -- who may call, and what is open -----------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of this machine")
def test_other_addresses_of_this_machine_do_not_answer(site: Site) -> None:
    port = urlsplit(site.url).port
    with socket.create_connection(("127.0.0.1", port), timeout=2):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=2)


def test_a_port_that_is_taken_is_named(site: Site, painter: Painter) -> None:
    from webui.page import build_page
    from webui.server import serving

    port = urlsplit(site.url).port
    with (
        pytest.raises(OSError, match=f"port {port} is taken; name another with --port"),
        serving(build_page(painter), site.folder, port=port),
    ):
        pytest.fail("two servers on one port")


def test_others_are_let_in_with_a_password_only(painter: Painter) -> None:
    from webui.page import build_page
    from webui.server import serving

    page, folder = build_page(painter), painter.session.folder
    for word in ("listen", "share"):
        with pytest.raises(ValueError, match="name and a password"), serving(page, folder, **{word: True}):
            pytest.fail("it is served")
    with serving(page, folder, auth=("me", "secret")) as url:
        assert httpx.get(f"{url}config").status_code == 401
        inside = sorted(folder.rglob("*.png"))[0]
        assert httpx.get(f"{url}gradio_api/file={inside}").status_code == 401
        assert httpx.post(f"{url}gradio_api/upload", files={"files": b"x"}).status_code == 401
        assert httpx.post(f"{url}login", data={"username": "me", "password": "wrong"}).status_code == 400
        with httpx.Client(base_url=url) as browser:
            assert browser.post("login", data={"username": "me", "password": "secret"}).status_code == 200
            assert browser.get("config").status_code == 200
            assert browser.get(f"gradio_api/file={inside}").status_code == 200


def test_files_outside_the_folder_are_not_served(site: Site, tmp_path: Path) -> None:
    inside = sorted((site.folder / "examples").rglob("*.png"))[0]
    assert httpx.get(f"{site.url}/gradio_api/file={inside}").content == inside.read_bytes()
    beside = site.folder.with_name(f"{site.folder.name}_too.png")
    (tmp_path / "secret.png").write_bytes(inside.read_bytes())
    shutil.copy(inside, beside)
    try:
        outside = ["/etc/passwd", str(Path("README.md").resolve()), "README.md", str(beside), ".gradio/x"]
        outside += [
            str(tmp_path / "secret.png"),
            f"{site.folder}/../{beside.name}",
            f"{site.folder}/%2e%2e/x",
        ]
        for path in (*outside, str(site.folder), "webui/page.py", "\\etc\\passwd", "file:///etc/passwd"):
            answer = httpx.get(f"{site.url}/gradio_api/file={path}")
            assert answer.status_code in (403, 404), path
    finally:
        beside.unlink()


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "README.md", "https://example.org/x.png", "file:///etc/passwd"]
)
def test_a_request_cannot_name_a_file_of_the_server_or_of_another(site: Site, path: str) -> None:
    file = {"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
    start = httpx.post(f"{site.url}/gradio_api/call/v2/generate", json={"file": file, **SETTINGS})
    if ":" in path:
        assert start.status_code == 403
        assert "expected an uploaded file" in start.text
        return
    answer = httpx.get(f"{site.url}/gradio_api/call/generate/{start.json()['event_id']}").text
    assert "event: error" in answer
    assert "root:" not in answer


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/config", {"headers": {"host": "evil.example"}}, 403),
        ("GET", "/config", {"headers": {"host": "localhost:1234"}}, 200),
        ("POST", "/gradio_api/upload", {"files": {"files": bytes(MAX_BYTES + 1)}}, 413),
        ("POST", "/gradio_api/upload", {"files": {"files": bytes(MAX_BYTES + (1 << 20))}}, 413),
        ("POST", "/gradio_api/upload", {"content": iter([b"x"])}, 411),
        ("POST", "/gradio_api/queue/join", {"content": b"[" * (1 << 19)}, 413),
        ("POST", "/gradio_api/queue/join", {"content": b"[" * (1 << 17)}, 422),
        ("GET", "/gradio_api/file=http://127.0.0.1:1/", {}, 404),
        ("GET", "/gradio_api/proxy=https://x.hf.space/", {}, 404),
        ("GET", "/gradio_api/deep_link?session_hash=x", {}, 404),
        ("POST", "/gradio_api/component_server", {"json": {}}, 404),
        ("GET", "/monitoring", {}, 404),
    ],
)
def test_what_the_page_does_not_need_is_refused(
    site: Site, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    assert httpx.request(method, site.url + path, **options).status_code == status
    assert httpx.get(f"{site.url}/config").status_code == 200


def test_the_page_asks_no_other_host(site: Site) -> None:
    page = httpx.get(site.url)
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "http" not in page.headers["content-security-policy"]
    entries = re.findall(r'(?:src|href)="\./(assets/[^"]+\.css)"', page.text)
    texts = [page.text, *(httpx.get(f"{site.url}/{name}").text for name in ("theme.css", *entries))]
    loads = r"(?:\bsrc\s*=\s*|<link[^>]*href\s*=\s*|url\(\s*|@import\s+)[\"']?\s*((?:https?:)?//[^\"')\s>]+)"
    assert len(texts) >= 3
    found = {address for text in texts for address in re.findall(loads, text)}
    assert {address for address in found if not address.startswith(f"{site.url}/")} == set()
    config = httpx.get(f"{site.url}/config").json()
    assert config["analytics_enabled"] is False


def test_the_examples_and_the_map_of_the_first_are_on_the_page(site: Site) -> None:
    parts = {
        p["props"].get("elem_id"): p["props"] for p in httpx.get(f"{site.url}/config").json()["components"]
    }
    assert parts["prompt"]["value"] == "caption of a"
    shown = np.asarray(Image.open(parts["told"]["value"]["path"]))
    assert (shown == COLOURS).all()
    assert len(parts["examples"]["value"]) == 2
    assert "rgb(128, 64, 128)" in parts["legend"]["value"]
    assert parts["scale"]["value"] == 3.0


# -- a browser --------------------------------------------------------------------------------------------


@pytest.fixture
def tab(site: Site) -> Iterator[Any]:
    """A page of a headless browser that may call this server alone."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="the Python package playwright is not installed"
    )
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on the PATH; on Debian: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.complaints, tab.expect = [], sync_api.expect
        tab.on("console", lambda m: tab.complaints.append(m.text) if m.type == "error" else None)
        own = (site.url, "data:", "blob:")
        tab.on("request", lambda r: None if r.url.startswith(own) else tab.complaints.append(r.url))
        tab.goto(site.url)
        tab.wait_for_selector("#examples img")
        yield tab
        browser.close()


@pytest.mark.slow
def test_a_visitor_picks_paints_loads_and_is_refused(site: Site, tab: Any, tmp_path: Path) -> None:
    tab.click("#examples button >> nth=1")
    tab.expect(tab.locator("#prompt textarea")).to_have_value("caption of b")
    tab.click("#paint")
    tab.locator("#note", has_text="2 images of 64x128").wait_for()
    assert tab.locator("#images .thumbnail-item img").count() == 4
    tab.get_by_role("tab", name="Your own").click()
    Image.fromarray(LABEL_IDS).save(tmp_path / "mine_labelIds.png")
    (tmp_path / "bad.png").write_text("<svg/>")
    tab.set_input_files("#file input[type=file]", tmp_path / "mine_labelIds.png")
    tab.locator("#legend", has_text="sky").wait_for()
    with tab.expect_response(re.compile("mine_labelIds_seed0.png")) as loaded:
        tab.click("#paint")
    hint = torch.from_numpy(COLOURS.copy()).permute(2, 0, 1)[None] / 255
    expected = generate(site.model, hint, ["caption of b"] * 2, [0, 1], FAST)[0].numpy()
    (tmp_path / "got.png").write_bytes(loaded.value.body())
    assert (np.asarray(Image.open(tmp_path / "got.png")) == expected).all()
    tab.click("#file [aria-label=Clear]")
    tab.locator("#legend", has_text="Pick an example").wait_for()
    tab.set_input_files("#file input[type=file]", tmp_path / "bad.png")
    tab.locator("#legend .refusal", has_text="bad.png: expected a picture").wait_for()
    tab.click("#paint")
    tab.locator(".toast-body", has_text="found SVG").wait_for()
    assert tab.complaints == []


@pytest.mark.slow
def test_the_page_fits_a_telephone(tab: Any) -> None:
    tab.set_viewport_size({"width": 400, "height": 800})
    tab.wait_for_timeout(500)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    box = tab.locator("#paint").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 400
    assert tab.complaints == []
