"""The page as a server: what the API gives, whom it answers, and what it keeps to itself."""

from __future__ import annotations

import base64
import json
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed; pip install -r requirements.txt")
pytest.importorskip("httpx")
pytest.importorskip("gradio_client")

import gradio_client
import httpx
from served_page import (
    ADDED,
    COLOURS,
    LABEL_IDS,
    REQUEST,
    TRAIN_IDS,
    Site,
    Visitor,
    drawn,
    make_painter,
    open_site,
)

from cldm.cldm import ControlLDM
from webui.folder import private_folder
from webui.painter import Painter
from webui.uploads import MAX_BYTES


@pytest.fixture(scope="module")
def painter(model: ControlLDM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Painter]:
    with private_folder() as folder:
        yield make_painter(model, folder, tmp_path_factory.mktemp("maps"))


@pytest.fixture(scope="module")
def site(painter: Painter) -> Iterator[Site]:
    with open_site(painter) as site:
        yield site


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
    expected = drawn(site.model, [4])[0]

    def ask(file: Any, **changes: Any) -> list[Path]:
        files, note = client.predict(**{**REQUEST, "file": file, **changes}, api_name="/generate")
        assert "PNG" in note
        return [Path(name) for name in files]

    image, ids = ask(ids_file)
    assert [path.name for path in (image, ids)] == ["mine_seed4.png", "mine_labelIds.png"]
    assert (np.asarray(Image.open(image)) == expected).all()
    assert (np.asarray(Image.open(ids)) == LABEL_IDS).all()
    settings = json.loads(Image.open(image).text["scenecontrol"])
    assert [settings[name] for name in ("hint", "seed", "steps")] == ["mine_labelIds.png", 4, 1]

    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(tmp_path / "bad_labelIds.png")
    bad = gradio_client.handle_file(str(tmp_path / "bad_labelIds.png"))
    for file, said in (
        (bad, r"^bad_labelIds.png: expected cityscapes label ids .*found 99"),
        (None, r"expected a file or the name of an example \(a_labelIds.png, b_labelIds.png\)"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=said) as caught:
            ask(file)
        assert str(site.folder) not in str(caught.value)

    again = ask(None, example="a_labelIds.png")[0]
    assert (np.asarray(Image.open(again)) == expected).all()


def test_a_size_that_is_asked_for_is_that_of_images_and_map(client: Any, ids_file: Any) -> None:
    request = {**REQUEST, "file": ids_file, "height": 128, "width": 64}
    image, ids = client.predict(**request, api_name="/generate")[0]
    assert [Image.open(path).size for path in (image, ids)] == [(64, 128)] * 2
    with pytest.raises(gradio_client.exceptions.AppError, match=r"multiples of 64.*found 65x64"):
        client.predict(**{**request, "height": 65}, api_name="/generate")


def test_the_page_paints_what_is_in_its_editor_and_shows_it_under_the_map(site: Site) -> None:
    visitor = Visitor(site.url)
    runs = b"".join(bytes([31, k]) for k in TRAIN_IDS[:, ::32].ravel().tolist())
    editor = {"height": 64, "width": 128, "runs": base64.b64encode(runs).decode()}
    answer = visitor.ask("paint", [editor, None, *list(REQUEST.values())[3:-2]])
    _, _, images, _, files, note = answer.data
    expected = drawn(site.model, [4])[0]
    assert (visitor.show(images["value"][0]["image"]) == expected).all()
    assert (visitor.show(files["value"][0]) == expected).all()
    assert (visitor.show(files["value"][1]) == LABEL_IDS).all()
    assert "1 image of 64x128" in note
    mixed = visitor.show(visitor.ask("view", [None, 1]).data[0][0]["image"]).astype(float)
    assert np.abs(mixed - (expected.astype(float) + COLOURS) / 2).max() <= 0.5
    assert visitor.ask("take_seed", [None], {"index": 0, "value": None}).data == [4]


def test_one_function_is_offered_under_plain_names(client: Any) -> None:
    offered = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(offered) == ["/generate"]
    assert [p["parameter_name"] for p in offered["/generate"]["parameters"]] == list(REQUEST)


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
    body = {**REQUEST, "file": {**ADDED, "path": path}}
    start = httpx.post(f"{site.url}/gradio_api/call/v2/generate", json=body)
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
        ("POST", "/gradio_api/upload", {"files": {"files": b"x"}, "headers": {"origin": "null"}}, 403),
        ("POST", "/gradio_api/cancel", {"json": {}, "headers": {"origin": "http://evil.example"}}, 403),
        ("POST", "/gradio_api/upload", {"files": {"files": bytes(MAX_BYTES + 1)}}, 413),
        ("POST", "/gradio_api/upload", {"files": {"files": bytes(MAX_BYTES + (1 << 20))}}, 413),
        ("POST", "/gradio_api/upload", {"content": iter([b"x"])}, 411),
        ("POST", "/gradio_api/queue/join", {"content": b"[" * (1 << 19)}, 413),
        ("POST", "/gradio_api/queue/join", {"content": b"[" * (1 << 17)}, 422),
        ("GET", "/gradio_api/file=http://127.0.0.1:1/", {}, 404),
        ("GET", "/gradio_api/proxy=https://x.hf.space/", {}, 404),
        ("GET", "/gradio_api/deep_link?session_hash=x", {}, 404),
        ("POST", "/gradio_api/component_server", {"json": {}}, 404),
        ("POST", "/gradio_api/call/paint", {"json": {"data": []}}, 404),
        ("POST", "/gradio_api/call/v2/restore", {"json": {}}, 404),
        ("GET", "/monitoring", {}, 404),
        ("GET", "/openapi.json", {}, 404),
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
    shown = [np.asarray(Image.open(part["image"]["path"])) for part in parts["examples"]["value"]]
    assert len(shown) == 2
    assert (shown[0] == COLOURS).all()
    assert "a_labelIds.png" in parts["told"]["value"]
    assert [parts["editor"]["value"][side] for side in ("height", "width")] == [64, 128]
    assert parts["scale"]["value"] == 3.0
