"""What the server answers at all: the few addresses that the page uses, from the right host, in small pieces.

Gradio serves more than a page needs: it fetches files from addresses that a visitor names, keeps states on
disk, and takes bodies of any length. This stands before it and passes on what the page itself asks for.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

API = "/gradio_api/"
# First word of an address below API; all others (proxy, deep_link, stream, component_server, ...) are closed.
OPEN_API = {
    *("app_id", "cancel", "file", "heartbeat", "info", "login_check", "queue", "reset"),
    *("startup-events", "theme.css", "upload", "upload_progress", "user"),
}
OFFERED = re.compile(r"call/(v2/)?generate(/\w+)?/?")  # what may be called by its name
CLOSED = ("/monitoring", "/svelte", "/pwa_icon", "/openapi.json")
SAFE_METHODS = ("GET", "HEAD")  # have no body
MAX_MESSAGE = 1 << 18  # bytes of a request that is no upload
HEADERS = {
    # The page needs inline scripts and styles, and gr.HTML compiles its template and its script, which is no
    # weaker than inline scripts are; nothing comes from elsewhere, and no other page frames it.
    "content-security-policy": (
        "default-src 'self' 'unsafe-inline' data: blob:; "
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}


class Gate:
    """ASGI middleware that refuses in a sentence what the page does not need.

    hosts       names under which the server may be called, against pages that rebind theirs to this machine;
                None takes any
    max_upload  bytes of an upload
    make_room   called before each upload
    """

    def __init__(
        self, app: App, *, hosts: Sequence[str] | None, max_upload: int, make_room: Callable[[], None]
    ) -> None:
        self.app = app
        self.hosts = hosts
        self.max_upload = max_upload
        self.make_room = make_room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        status, reason = self._judge(scope)
        if not reason and is_upload(scope["path"]):
            await asyncio.to_thread(self.make_room)
        elif not reason and scope["method"] not in SAFE_METHODS:
            body = await read_all(receive)
            receive = replay(body, receive)
            if any(is_address(path) for path in paths_in(body)):
                status, reason = 403, "expected an uploaded file, found an address; upload the file itself"
        if reason:
            await answer(send, status, reason)
        else:
            await self.app(scope, receive, with_headers(send))

    def _judge(self, scope: Scope) -> tuple[int, str]:
        """Status and reason of a refusal, from address and headers alone; an empty reason is none."""
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        host = re.sub(r":\d+$", "", headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            return 403, f"expected a call to {' or '.join(self.hosts)}, found {host[:100]!r}"
        # A page from elsewhere may send a form here without asking first, though it reads no answer.
        origin = headers.get("origin", "").partition("//")[2]
        if self.hosts is not None and "origin" in headers and origin != headers["host"]:
            return 403, f"expected a call from this page, found one from {headers['origin'][:100]!r}"
        if not is_open(scope["path"]):
            return 404, "there is nothing here"
        if scope["method"] in SAFE_METHODS:
            return 200, ""
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return 411, "expected a request that says its length"
        most = self.max_upload if is_upload(scope["path"]) else MAX_MESSAGE
        if int(length) > most:
            return 413, f"expected at most {most} bytes, found {length}"
        return 200, ""


def is_open(path: str) -> bool:
    """Whether the page needs an address."""
    if not path.startswith(API):
        return not path.startswith(CLOSED)
    word, equals, rest = path.removeprefix(API).partition("=")
    if equals:
        return word == "file" and not is_address(rest)
    if word.startswith("call/"):
        return OFFERED.fullmatch(word) is not None
    return word.partition("/")[0] in OPEN_API


def is_upload(path: str) -> bool:
    """Whether an address takes files."""
    return path.rstrip("/") == f"{API}upload"


def is_address(path: object) -> bool:
    """Whether a path leads to another host, so that opening it would make the server fetch it."""
    return isinstance(path, str) and re.match(r"\s*[A-Za-z][A-Za-z0-9+.-]+:", path) is not None


def paths_in(body: bytes) -> Iterator[object]:
    """Every `path` in a JSON message, at any depth; of another message none."""
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):
        return
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value:
                yield value["path"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


async def read_all(receive: Receive) -> bytes:
    """The body of a request; its length was checked, and the server holds senders to what they said."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands a body out again, and then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def with_headers(send: Send) -> Send:
    """A `send` that adds HEADERS."""
    added = [(key.encode(), value.encode()) for key, value in HEADERS.items()]

    async def send_more(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *added]
        await send(message)

    return send_more


async def answer(send: Send, status: int, text: str) -> None:
    """A short answer in plain text."""
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await with_headers(send)({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
