"""What a hostile visitor sends, to every event of the page; after each the page answers a good request."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed; pip install -r requirements.txt")
pytest.importorskip("httpx")

import httpx
from served_page import (
    ADDED,
    COLOURS,
    FAST,
    LABEL_IDS,
    REQUEST,
    Answer,
    Regular,
    Site,
    Visitor,
    drawn,
    encoded,
    in_hand,
    open_site,
    tiny_site,
)

import webui.folder
from cldm.cldm import ControlLDM
from cldm.pictures import write_png
from webui.any_hint import ANY_HINT
from webui.folder import private_folder
from webui.gate import is_open
from webui.painter import Painter
from webui.server import MAX_VISITORS
from webui.session import Session
from webui.uploads import MAX_BYTES

NAN, INF = float("nan"), float("inf")
SECRET = "a prompt that nobody else may read"
ONE_PIXEL = {"height": 1, "width": 1, "runs": "AAA="}
# What an event needs that is to work; the others take nothing.
PROPER: dict[str, list[Any]] = {
    "pick": ["a lane"],
    "load": [None, "detect"],
    "load_1": [None, "detect"],
    "resize": [ONE_PIXEL, None, 64, 128],
    "read_photo": [None],
    "paint": [ONE_PIXEL, None, *list(REQUEST.values())[3:-2]],
    "view": [None, 0],
    "take_seed": [None],
    "restore": [None],
    "generate": list(REQUEST.values()),
}
CLICKED = {"index": 0, "value": None}
OPEN = {  # what gradio's routes offer and the gate lets through
    *("/", "/{page}", "/{page}/", "/config", "/config/", "/login", "/login/", "/logout", "/theme.css"),
    *("/assets/{path:path}", "/static/{path:path}", "/favicon.ico", "/manifest.json", "/robots.txt"),
    *(
        f"/gradio_api/{name}"
        for name in ("app_id", "app_id/", "info", "info/", "login_check", "login_check/")
    ),
    *(f"/gradio_api/{name}" for name in ("user", "user/", "reset", "reset/", "cancel", "theme.css")),
    *(f"/gradio_api/{name}" for name in ("upload", "upload_progress", "startup-events", "queue/status")),
    *(f"/gradio_api/{name}" for name in ("queue/data", "queue/join", "heartbeat/{session_hash}")),
    *(f"/gradio_api/call/{name}" for name in ("{api_name}", "{api_name}/", "{api_name}/{event_id}")),
    *(f"/gradio_api/call/v2/{name}" for name in ("{api_name}", "{api_name}/", "{api_name}/{event_id}")),
    *("/gradio_api/file={path_or_url:path}", "/gradio_api/file/{path:path}"),
}


@pytest.fixture(scope="module")
def site(model: ControlLDM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with tiny_site(model, tmp_path_factory.mktemp("maps")) as site:
        yield site


@pytest.fixture(scope="module")
def regular(site: Site) -> Regular:
    return Regular(site)


@pytest.fixture
def visitor(site: Site, regular: Regular) -> Iterator[Visitor]:
    """A visitor; when it has done its worst, the page still works."""
    yield Visitor(site.url)
    regular.check()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A map outside the page's folder that every event could read."""
    path = tmp_path / "secret_labelIds.png"
    write_png(path, LABEL_IDS, {"prompt": SECRET})
    return path


def is_discreet(site: Site, answer: Answer, most: int = 400) -> bool:
    """Whether a refusal says no more than a sentence, of at most so many characters."""
    said = answer.reason
    parts = (str(site.folder), str(Path(__file__).parents[1]), "Traceback", "Errno", "root:", SECRET)
    return not answer.success and len(said) < most and not any(part in said for part in parts)


# -- addresses --------------------------------------------------------------------------------------------


def test_every_address_of_the_server_is_known(site: Site, visitor: Visitor) -> None:
    every = set(paths_of(site.page.app))
    assert len(every) > 60
    filled = {path: re.sub(r"{(\w+)[^}]*}", fill, path) for path in every}
    assert {path for path in every if is_open(filled[path])} - OPEN == set()
    for path in sorted(filled[path] for path in every if not is_open(filled[path])):
        for method in ("GET", "POST"):
            content = {"json": {}} if method == "POST" else {}
            answer = visitor.http.request(method, site.url + path, **content)
            assert (answer.status_code, answer.text) == (404, "there is nothing here\n"), path


def paths_of(router: Any) -> Iterator[str]:
    for route in router.routes:
        if hasattr(route, "original_router"):
            yield from paths_of(route.original_router)
        else:
            yield route.path


def fill(match: re.Match[str]) -> str:
    return "generate" if match[1] == "api_name" else "x"


@pytest.mark.parametrize(
    "path",
    [
        *("/assets/..%2f..%2froutes.py", "/static/..%2f..%2froutes.py", "/assets/%2e%2e/%2e%2e/routes.py"),
        *("/assets//etc/passwd", "/static//etc/passwd", "/gradio_api/file//etc/passwd"),
        *("/gradio_api/file%3D/etc/passwd", "/gradio_api//file=/etc/passwd", "//gradio_api/proxy=http://x"),
        *("/gradio_api/./proxy=http://x", "/gradio_api/%70roxy=http://x", "/gradio_api/x/../proxy=http://x"),
        *("/gradio_api/file/http://127.0.0.1:1/", "/gradio_api/file=%20http://127.0.0.1:1/"),
    ],
)
def test_no_spelling_of_an_address_opens_what_is_closed(site: Site, path: str) -> None:
    with socket.create_connection(("127.0.0.1", httpx.URL(site.url).port), timeout=10) as line:
        line.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: line.recv(1 << 16), b""))
    assert answer.split(b" ", 2)[1] in (b"403", b"404")
    assert b"root:" not in answer
    assert b"import" not in answer


# -- files ------------------------------------------------------------------------------------------------


def test_no_input_of_no_event_reads_a_file_that_was_not_uploaded(
    site: Site, visitor: Visitor, secret: Path
) -> None:
    inside = next((site.folder / "examples").rglob("*.png"))
    outside = [
        str(secret),
        f"{site.folder}/../{secret.parent.name}/{secret.name}",
        "/etc/passwd",
        "README.md",
    ]
    others = ["..", "", "\0", "a" * 5000, str(site.folder), f"{inside}/..", f"{site.folder}/none.png"]
    assert {event for event, one in visitor.events.items() if one["inputs"]} == set(PROPER)
    for event, proper in PROPER.items():
        for i in range(len(proper)):
            kind = visitor.kinds[visitor.events[event]["inputs"][i]]
            takes_files = kind in ("file", "uploadbutton")
            for path in [*outside, *others] if takes_files else outside[:1]:
                data = [*proper[:i], {**ADDED, "path": path}, *proper[i + 1 :]]
                answer = visitor.ask(event, data, CLICKED)
                if kind == "state":  # the server has its own and does not look
                    assert SECRET not in str(answer.output)
                elif answer.success and event in ("load", "load_1", "read_photo", "restore"):
                    assert "refusal" in str(answer.data)  # told on the page
                    assert SECRET not in str(answer.output)
                else:
                    assert is_discreet(site, answer), (event, i, path, answer)


def test_no_address_is_fetched(site: Site, visitor: Visitor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        there = f"//127.0.0.1:{listening.getsockname()[1]}/x.png"
        for event, proper in PROPER.items():
            for start in ("http:", " HTTPS:", "file:", "ftp:"):
                file = {**ADDED, "path": start + there}
                for value in (file, [file], {"a": [{"b": file}]}, {**file, "url": file["path"]}):
                    answer = visitor.join(event, [value] * max(1, len(proper)))
                    assert answer.status_code == 403
                    assert "expected an uploaded file, found an address" in answer.text
        # Said as the `url` of a file that is none of ours, it leads nowhere either.
        file = {**ADDED, "path": "x.png", "url": f"http:{there}"}
        assert is_discreet(site, visitor.generate(file=file))
        with pytest.raises(TimeoutError):
            listening.accept()


def test_a_link_in_the_folder_leads_nowhere(site: Site, visitor: Visitor, secret: Path) -> None:
    link = site.folder / "link_labelIds.png"
    link.symlink_to(secret)
    try:
        assert SECRET not in visitor.http.get(f"{site.url}/gradio_api/file={link}").text
        for event in ("generate", "load", "restore"):
            data = [{**ADDED, "path": str(link)}, *PROPER[event][1:]]
            assert SECRET not in str(visitor.ask(event, data).output)
    finally:
        link.unlink()


@pytest.mark.parametrize(
    "name",
    ["../../x.png", "/etc/x.png", "a/b/x.png", "..\\..\\x.png", "\0.png", "x" * 3000, ".htaccess", "con"],
)
def test_an_upload_lands_in_a_folder_of_its_own_whatever_it_is_called(
    site: Site, visitor: Visitor, name: str
) -> None:
    path = Path(visitor.upload(name, b"content")["path"])
    assert path.resolve().parent.parent == site.folder
    assert path.read_bytes() == b"content"


def test_what_is_no_upload_of_moderate_size_is_refused(site: Site, visitor: Visitor) -> None:
    def post(**options: Any) -> int:
        return visitor.http.post(f"{site.url}/gradio_api/upload", **options).status_code

    assert post(files={"files": ("..", b"x")}) == 400
    assert post(files=[("files", (f"{i}.png", b"")) for i in range(1001)]) == 400
    assert post(data={"a": "b"}) == 400
    assert post(content=b"abc", headers={"content-type": "multipart/form-data"}) == 400
    assert post(files={"files": bytes(MAX_BYTES + 1)}) == 413
    assert post(files={"files": b"x"}, headers={"origin": "https://evil.example"}) == 403
    assert post(files={"files": b"x"}, headers={"origin": site.url}) == 200


def test_empty_files_do_not_fill_the_folder(
    site: Site, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webui.folder, "KEEP_FILES", 100)
    files = [("files", (f"{i}.png", b"")) for i in range(1000)]
    for _ in range(2):
        visitor.http.post(f"{site.url}/gradio_api/upload", files=files).raise_for_status()
    visitor.upload("one more.png", b"x")
    kept = [path for path in site.folder.rglob("*.png") if site.folder / "examples" not in path.parents]
    assert 0 < len(kept) <= 101


def test_a_page_without_an_editor_reads_no_other_files(model: ControlLDM, secret: Path) -> None:
    with private_folder() as folder:
        painter = Painter(ANY_HINT, Session(in_hand(model), folder, (64, 128), FAST))
        with open_site(painter) as site:
            visitor = Visitor(site.url)
            rest = list(REQUEST.values())[3:-2]
            file = visitor.upload("x.png", encoded(COLOURS))
            for path in (str(secret), "README.md", f"{folder}/../{secret.name}", str(folder), ""):
                other = {**ADDED, "path": path}
                for event, data in (
                    ("paint", [other, "picture", *rest]),
                    ("look", [other, "picture"]),
                    ("restore", [other]),
                    ("generate", [other, "picture", "", *rest, 0, 0]),
                ):
                    answer = visitor.ask(event, data)
                    is_told = event in ("look", "restore") and "refusal" in str(
                        answer.data if answer.success else ""
                    )
                    assert is_told or is_discreet(site, answer), (event, path)
                    assert SECRET not in str(answer.output)
            answer = visitor.ask("generate", [file, "picture", "", *rest, 0, 0])
            assert (visitor.show(answer.data[0][0]) == drawn(site.model, [4])[0]).all()


# -- values -----------------------------------------------------------------------------------------------

TEXTS = ("kind", "example", "prompt", "negative_prompt", "sampler", "prior")
NUMBERS = ("num", "seed", "steps", "scale", "strength", "eta", "start", "height", "width")
JUNK: list[Any] = [None, [], {}, [1], {"a": 1}, [["x"]]]
JUNK_NUMBERS = [*JUNK, "1", "x", True, -1, 10**400, 1e308, NAN, INF, -INF]


@pytest.mark.parametrize("name", list(REQUEST)[1:])
def test_a_value_of_another_type_or_size_is_refused_by_its_name(
    site: Site, visitor: Visitor, name: str
) -> None:
    known: dict[str, Any] = {"example": "a_labelIds.png", "height": 64, "width": 64}
    if name == "kind":
        known = {"file": visitor.upload("mine_labelIds.png", encoded(LABEL_IDS))}
    junk: list[Any] = [*JUNK, 5, True] if name in TEXTS else JUNK_NUMBERS
    if name == "guess_mode":
        junk = [*JUNK, 0, 1, "true", NAN]
    if name in ("num", "seed", "steps", "start", "height", "width"):
        junk = [*junk, 1.5]
    if name in TEXTS:
        junk = [*junk, "\ud800", "a" * 100_000]
    for value in junk:
        answer = visitor.generate(**{**known, name: value})
        assert is_discreet(site, answer), (value, answer)
        named = {"kind": "expected (kind|one of)"}
        named["height"] = named["width"] = "height|width"
        assert re.search(named.get(name, name.replace("_", ".")), answer.reason), (value, answer)


def test_what_is_no_file_is_refused(site: Site, visitor: Visitor) -> None:
    file = visitor.upload("mine_labelIds.png", encoded(LABEL_IDS))
    bare = {"path": file["path"]}
    for value in (5, "x", True, [], [[]], {}, {"path": 5}, bare, {**file, "meta": {}}, [file, file], [file]):
        for event in ("generate", "load", "read_photo", "restore"):
            answer = visitor.ask(event, [value, *PROPER[event][1:]])
            unread = event != "generate" and value in ([], [file], [file, file])
            assert unread or is_discreet(site, answer), (event, value, answer)


@pytest.mark.parametrize("event", sorted(PROPER))
def test_nonsense_in_every_input_of_an_event_ends_in_an_answer(
    site: Site, visitor: Visitor, event: str
) -> None:
    for value in (*JUNK, "x", -1, 10**400, NAN, True, "\ud800", ONE_PIXEL, "x" * 10_000):
        answer = visitor.ask(event, [value] * len(PROPER[event]), {"index": value, "value": value})
        # Gradio quotes a choice that it does not know.
        assert answer.success or is_discreet(site, answer, most=11_000), (event, value, answer.reason[:300])
        assert str(site.folder / "results") not in str(answer.output)
    for data in ([], [None] * 30):
        answer = visitor.ask(event, data, CLICKED)
        assert "results" not in str(answer.output)


def test_an_event_that_is_none_is_refused(site: Site, visitor: Visitor) -> None:
    def join(**body: Any) -> Any:
        return visitor.http.post(f"{site.url}/gradio_api/queue/join", json={"session_hash": "x", **body})

    for number in (-1, len(visitor.events), 99, 10**30, "x", None, 1.5, [], {}):
        answer = join(data=[], fn_index=number)
        assert answer.status_code in (400, 422, 500), number
        assert "Traceback" not in answer.text
    for data in (None, "x", {}, 5):
        assert join(data=data, fn_index=7).status_code == 422
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = visitor.http.post(
            f"{site.url}/gradio_api/queue/join",
            content=b'{"data":["p"],"fn_index":0,"session_hash":"q"}',
            headers={"content-type": kind},
        )
        assert answer.status_code == 422, "a form of another page is no request"


def test_hostile_maps_in_the_editor_are_refused(site: Site, visitor: Visitor) -> None:
    maps: list[Any] = [
        *(None, 5, "x", [], {}, {"height": 1}, {**ONE_PIXEL, "height": "1"}, {**ONE_PIXEL, "width": True}),
        *({**ONE_PIXEL, "height": 2**40}, {**ONE_PIXEL, "height": -1}, {**ONE_PIXEL, "width": 10**400}),
        *({**ONE_PIXEL, "runs": runs} for runs in ("", "AB8=", "A", "\0", 5, None, ["AAA="], "é")),
        {"height": 1 << 11, "width": 1 << 11, "runs": "AAA="},
        {"height": 1, "width": 1, "runs": "A" * (200 << 10)},
    ]
    for value in maps:
        for event in ("paint", "resize"):
            answer = visitor.ask(event, [value, *PROPER[event][1:]])
            assert is_discreet(site, answer), (value, answer)
            assert "label map" in answer.reason
    for value in (ONE_PIXEL, {"height": 64, "width": 65, "runs": "/wD/AP8A" * 5 + "/wD/AD8A"}):
        assert is_discreet(site, visitor.ask("paint", [value, *PROPER["paint"][1:]]))


# -- visitors ---------------------------------------------------------------------------------------------


def test_the_results_of_a_visitor_cannot_be_forged_nor_seen_by_another(
    site: Site, visitor: Visitor, secret: Path
) -> None:
    forged = [(1, str(secret), str(secret))]
    other = Visitor(site.url)
    for one in (visitor, other):
        for value in (forged, [{**ADDED, "path": str(site.folder)}], "x", [[1, str(secret), str(secret)]]):
            assert one.ask("view", [value, 0]).data == [[]]
            assert not one.ask("take_seed", [value], CLICKED).success
        labels = {"height": 64, "width": 64, "runs": "/wD/AP8A" * 5 + "/wA="}
        assert one is other or one.ask("paint", [labels, None, *PROPER["paint"][2:]]).success
    assert len(visitor.ask("view", [forged, 0]).data[0]) == 1
    assert visitor.ask("take_seed", [forged], CLICKED).data == [4]


def test_only_so_many_visitors_are_remembered(
    site: Site, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = site.page.state_holder
    assert holder.capacity == MAX_VISITORS
    monkeypatch.setattr(holder, "capacity", len(holder.session_data))
    for number in range(5):
        visitor.session = f"visitor {number}"
        assert visitor.ask("stop", []).success
    assert len(holder.session_data) == holder.capacity
    assert "visitor 4" in holder.session_data
