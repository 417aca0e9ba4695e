"""What a hostile visitor uploads: every event refuses it in a sentence, in bounded memory."""

from __future__ import annotations

import json
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed; pip install -r requirements.txt")
pytest.importorskip("httpx")

from served_page import LABEL_IDS, REQUEST, SETTINGS, Regular, Site, Visitor, encoded, tiny_site

from cldm.cldm import ControlLDM
from webui.orders import PRIORS
from webui.uploads import MAX_PIXELS

MEMORY = 256 << 20  # bytes that reading one file may take


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


def reasons(visitor: Visitor, name: str, content: bytes) -> dict[str, str]:
    """What each event that takes a file says of it; nothing if it takes it."""
    file = visitor.upload(name, content)
    said = {"generate": visitor.generate(file=file).reason}
    for event, rest in (("load", ["detect"]), ("read_photo", []), ("restore", [])):
        answer = visitor.ask(event, [file, *rest])
        assert answer.success, answer
        found = re.search(r'class="refusal" role="alert">(.*)</div>', str(answer.data))
        said[event] = found[1] if found else ""
    return said


# -- files ------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def inflating(mebibytes: int, start: bytes = b"") -> bytes:
    """Deflated zeros, or spaces after a start."""
    deflate = zlib.compressobj(9)
    fill = (b" " if start else b"\0") * (1 << 20)
    return b"".join(
        [deflate.compress(start), *(deflate.compress(fill) for _ in range(mebibytes)), deflate.flush()]
    )


def png(
    *chunks: bytes, after: bytes = b"", size: bytes = header(64, 64), pixels: bytes | None = None
) -> bytes:
    if pixels is None:
        pixels = zlib.compress(bytes(64 * (1 + 3 * 64)))
    parts = [size, *chunks, chunk(b"IDAT", pixels), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(*sizes: int, pixels: bytes) -> bytes:
    """A deflated grey TIFF that tells its width and height once for each of `sizes`."""
    one = {258: 8, 259: 8, 262: 1, 273: 8, 277: 1, 279: len(pixels)}
    tags = sorted(
        [*one.items(), *((tag, size) for tag in (256, 257, 278) for size in sizes)], key=lambda t: t[0]
    )
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack("<I", 8 + len(pixels))
    return b"II*\0" + start + pixels + struct.pack("<H", len(tags)) + rows + bytes(4)


def animated(form: str) -> bytes:
    frames = [Image.fromarray(np.full((64, 64, 3), value, np.uint8)) for value in (0, 128)]
    return encoded(np.zeros((64, 64, 3), np.uint8), form, save_all=True, append_images=frames)


PICTURES: dict[str, tuple[bytes, str]] = {
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', "found SVG"),
    "XML entities": (
        b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "/etc/passwd">]><svg>&a;</svg>',
        "SVG",
    ),
    "GIF": (encoded(np.zeros((64, 64), np.uint8), "GIF"), "found a GIF"),
    "PDF": (b"%PDF-1.7", "found a PDF"),
    "HTML": (b"<html><script>alert(1)</script>", "found none of these"),
    "nothing": (b"", "found none of these"),
    "animated PNG": (animated("PNG"), "found an animation"),
    "animated WebP": (animated("WEBP"), "found an animation"),
    "wide": (png(size=header(65535, 65535), pixels=inflating(50)), "found far more"),
    "too many pixels": (png(size=header(4097, 4097), pixels=inflating(50)), "found 4097x4097"),
    "cut PNG": (png()[:60], "expected a"),
    "cut JPEG": (encoded(LABEL_IDS, "JPEG")[:100], "found none of these"),
    "headers of two sizes": (png(header(64, 64), size=header(16000, 16000)), "expected"),
    "TIFF": (encoded(LABEL_IDS, "TIFF"), "found TIFF"),
    "TIFF of two sizes": (tiff(20000, 64, pixels=inflating(400)), "found TIFF"),
    "text after the pixels": (
        png(after=chunk(b"zTXt", b"scenecontrol\0\0" + inflating(400, b"{"))),
        "no settings",
    ),
    "zTXt": (png(chunk(b"zTXt", b"scenecontrol\0\0" + inflating(400, b"{"))), "expected a picture"),
    "iTXt": (png(chunk(b"iTXt", b"scenecontrol\0\1\0\0\0" + inflating(400, b"{"))), "expected a picture"),
    "profile": (png(chunk(b"iCCP", b"x\0\0" + inflating(400))), "expected a picture"),
    "many texts": (
        png(*(chunk(b"iTXt", b"%d\0\1\0\0\0" % i + zlib.compress(bytes(1 << 20)[:-9])) for i in range(100))),
        "expected a picture",
    ),
}
# Of these, what is a sound picture with hostile texts behind it is taken by all but `restore`.
ONLY_RESTORE = {"text after the pixels"}


def peak_since(reset: bool = False) -> int:
    """Most bytes that this process, which is the server's too, has had in memory since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("what", PICTURES)
def test_a_hostile_picture_is_refused_in_bounded_memory(site: Site, visitor: Visitor, what: str) -> None:
    content, expected = PICTURES[what]
    before = peak_since(reset=True)
    said = reasons(visitor, "x.png", content)
    assert peak_since() - before < MEMORY
    if what in ONLY_RESTORE:
        said = {"restore": said["restore"]}
    for event, sentence in said.items():
        assert re.search(expected, sentence), (event, sentence)
        assert str(site.folder) not in sentence
        assert sentence.startswith("x.png: expected"), "one sentence that names the file"


def test_the_largest_picture_that_is_taken_stays_in_bounded_memory(site: Site, visitor: Visitor) -> None:
    side = int(MAX_PIXELS**0.5)
    file = visitor.upload(
        "large.png", png(size=header(side, side), pixels=inflating((3 * side * side >> 20) + 1))
    )
    before = peak_since(reset=True) if sys.platform == "linux" else 0
    answer = visitor.ask("load", [file, "colours"])
    assert f"resized from {side}x{side}" in answer.data[2]
    assert before == 0 or peak_since() - before < 4 * MEMORY


# -- settings in a picture --------------------------------------------------------------------------------


def restored(visitor: Visitor, settings: str) -> tuple[str, list[Any]]:
    """The refusal and the values that `restore` finds in a picture with these settings."""
    text = chunk(b"iTXt", b"scenecontrol\0\0\0\0\0" + settings.encode())
    answer = visitor.ask("restore", [visitor.upload("x.png", png(text))])
    assert answer.success, (settings[:100], answer)
    told = str(answer.data[len(SETTINGS) + 2])
    return (told if "refusal" in told else ""), answer.data[: len(SETTINGS)]


def test_settings_of_another_type_or_size_are_refused_by_name(site: Site, visitor: Visitor) -> None:
    wrong: dict[str, list[Any]] = {name: [None, [1], {"a": {}}] for name in SETTINGS if name != "num"}
    for name, value in SETTINGS.items():
        if isinstance(value, bool):
            wrong[name] += [0, 1, "true"]
        elif isinstance(value, str):
            wrong[name] += [5, True, "x" * 1001, "\ud800"]
        elif name != "num":
            wrong[name] += ["1", True, -1, 10**30, 10**400, 1e308, float("nan"), float("inf")]
    for name, values in wrong.items():
        for value in values:
            said, _ = restored(visitor, json.dumps({"prior_type" if name == "prior" else name: value}))
            assert name.replace("_", " ") in said.replace("_", " "), (name, value, said)
            assert len(said) < 300


@pytest.mark.parametrize(
    "settings",
    [
        *("", "{", "[]", "5", "null", '"x"', "[" * 500_000, '{"map":' + "[" * 100_000 + "]" * 100_000 + "}"),
        *('{"seed": ' + "9" * 5000 + "}", '{"map": null}', '{"map": {"height": 1}}', '{"map": [1, 2]}'),
        '{"map": {"height": 1, "width": 1, "runs": "AB8="}}',
        '{"map": {"height": 99999999, "width": 99999999, "runs": ""}}',
        json.dumps({"map": {"height": 64, "width": 64, "runs": "A" * 900_000}}),
    ],
    ids=lambda settings: settings[:30],
)
def test_settings_that_are_none_are_refused(visitor: Visitor, settings: str) -> None:
    said, _ = restored(visitor, settings)
    assert re.search("expected", said)
    assert len(said) < 300


def test_names_in_a_picture_are_names_and_no_markup(site: Site, visitor: Visitor) -> None:
    one = {"height": 64, "width": 64, "runs": "/wD/AP8A" * 5 + "/wA="}
    for name in (
        "<script>alert(1)</script>",
        "../../../etc/passwd",
        "\0",
        "x" * 500_000,
        5,
        None,
        [],
        "\ud800",
    ):
        text = json.dumps({"hint": name, "map": one})
        chunks = chunk(b"iTXt", b"scenecontrol\0\0\0\0\0" + text.encode())
        answer = visitor.ask("restore", [visitor.upload("x.png", png(chunks))])
        told = answer.data[len(SETTINGS) + 2]
        assert re.fullmatch(r'<div class="told"><b>[\w.-]{1,60}</b></div>', told), (name, told)
        painted = visitor.ask("paint", [one, None, *list(REQUEST.values())[3:-2]])
        paths = [Path(file["path"]).resolve() for file in painted.data[4]["value"]]
        assert {path.parent.parent for path in paths} == {site.folder / "results"}


def test_sound_settings_are_restored(visitor: Visitor) -> None:
    own = {
        **{name: value for name, value in SETTINGS.items() if name != "num"},
        "prior": PRIORS[0],
        "steps": 7,
    }
    said, values = restored(visitor, json.dumps(own))
    assert said == ""
    assert dict(zip(SETTINGS, values, strict=True)) == {**own, "num": 1}
