"""Weight files as an attacker or a bad disk makes them, each a function of its number."""

from __future__ import annotations

import builtins
import gzip
import io
import json
import os
import pickle
import random
import re
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

MIB = 1 << 20
BAIT = "was_here"
NAN, INF = float("nan"), float("inf")
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin", ".png", "")

Rng = random.Random


# -- files that are sound ---------------------------------------------------------------------------------


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "model.w": torch.randn(5, 7, generator=g),
        "model.half": torch.randn(11, generator=g).half(),
        "model.b": torch.arange(9),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }


def as_safetensors() -> bytes:
    return safetensors.torch.save(weights(), metadata={"step": "3", "base": "x"})


def as_torch(**options: Any) -> bytes:
    file = io.BytesIO()
    payload = {"epoch": 3, "state_dict": OrderedDict(weights()), "lr": [1e-4, {"a": (1, 2)}]}
    torch.save(payload, file, **options)
    return file.getvalue()


SOUND = {
    "safetensors": as_safetensors(),
    "zip": as_torch(),
    "legacy": as_torch(_use_new_zipfile_serialization=False),
    "zip, parameters": as_torch(pickle_protocol=2),
}


def sound(rng: Rng) -> bytes:
    return SOUND[rng.choice(sorted(SOUND))]


def untouched(rng: Rng, path: Path) -> None:
    path.write_bytes(sound(rng))


# -- bytes that went wrong --------------------------------------------------------------------------------


def truncated(rng: Rng, path: Path) -> None:
    content = sound(rng)
    path.write_bytes(content[: rng.randrange(len(content))])


def spot(rng: Rng, content: bytes) -> int:
    """A place in a file, often near its ends, where its structure is."""
    reach = min(len(content), rng.choice((24, 400, len(content))))
    at = rng.randrange(reach)
    return at if rng.random() < 0.6 else len(content) - 1 - at


def flipped(rng: Rng, path: Path) -> None:
    content = bytearray(sound(rng))
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        content[spot(rng, content)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def overwritten(rng: Rng, path: Path) -> None:
    content = bytearray(sound(rng))
    at, count = spot(rng, content), rng.choice((1, 4, 8, 60))
    filling = rng.choice(
        (b"\0" * count, b"\xff" * count, rng.randbytes(count), b"\x7f" + b"\xff" * (count - 1))
    )
    content[at : at + count] = filling
    path.write_bytes(content)


def shifted(rng: Rng, path: Path) -> None:
    content = bytearray(sound(rng))
    at, count = spot(rng, content), rng.choice((1, 3, 8, 100))
    content[at : at + rng.choice((0, count))] = rng.randbytes(rng.choice((0, count)))
    path.write_bytes(content)


def spliced(rng: Rng, path: Path) -> None:
    a, b = sound(rng), sound(rng)
    path.write_bytes(a[: spot(rng, a)] + b[spot(rng, b) :])


def prefixed(rng: Rng, path: Path) -> None:
    path.write_bytes(rng.choice((b"PK", b"PK\x03\x04", b"\x80\x02", SOUND["legacy"][:14], b"{")) + sound(rng))


def noise(rng: Rng, path: Path) -> None:
    path.write_bytes(rng.randbytes(rng.choice((1, 7, 8, 9, 16, 600, 5000))))


# -- headers of safetensors that lie ----------------------------------------------------------------------


def lying_number(rng: Rng) -> Any:
    powers = (1 << 31, 1 << 62, (1 << 63) - 1, 1 << 64, 10**30, -(1 << 63))
    return rng.choice((*powers, -1, 0, 1, 3, 4, 2.5, NAN, INF, -INF, True, None, "4", "\u0664", [], {}))


def lying_entry(rng: Rng) -> Any:
    """The header entry of eight bytes, with a lie in it."""
    entry: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    where = rng.randrange(9)
    if where < 3:
        entry["shape"] = [lying_number(rng) for _ in range(rng.choice((1, 2, 2, 70)))]
    elif where < 5:
        entry["data_offsets"][rng.randrange(2)] = lying_number(rng)
    elif where == 5:
        entry["data_offsets"] = rng.choice(
            ([0], [0, 8, 8], [8, 0], [4, 8], [0, 4], "08", {"0": 0}, [[0], [8]])
        )
    elif where == 6:
        types = [
            "F31",
            "F64",
            "I64",
            "BOOL",
            "F8_E4M3",
            "F4",
            "C64",
            "f32",
            "",
            7,
            None,
            "F16",
            "U32",
            "F8_E8M0",
        ]
        entry["dtype"] = rng.choice(types)
    elif where == 7:
        del entry[rng.choice(sorted(entry))]
    else:
        return rng.choice(([], "x", 3, None, {}, [[]], {**entry, "extra": {"a": 1}}, float("nan")))
    return entry


def strange_name(rng: Rng) -> str:
    names = [
        "",
        "__metadata__",
        "a\nb",
        "\x1b[2J",
        "x" * 30_000,
        "\ud800",
        "../../etc/passwd",
        "a\0b",
        "w",
        "état",
    ]
    return rng.choice(names)


def lying_header(rng: Rng, path: Path) -> None:
    entry: Any = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header: Any = {"w": lying_entry(rng)}
    kind = rng.randrange(8)
    if kind == 0:
        header = {strange_name(rng): entry}
    elif kind == 1:
        notes = rng.choice(
            ([], "x", 3, {"a": 1}, {"a": {"b": "c"}}, {"a\n": "\x1b[31m"}, {"model_config": None})
        )
        header = {"__metadata__": notes, "w": entry}
    elif kind == 2:
        header = {"w": entry, "v": {**entry, "data_offsets": rng.choice(([0, 8], [4, 12], [8, 16], [9, 17]))}}
    elif kind == 3:
        header = rng.choice(([], "w", 3, None, {}, [entry], {"a": {"w": entry}}))
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    if kind == 4:
        same = json.dumps(entry)
        raw = rng.choice(
            (
                f'{{"w":{same},"w":{same}}}',
                f'{{"w":{same},"w":{json.dumps(lying_entry(rng))}}}',
                f'{{"__metadata__":{{"a":"b","a":"c"}},"w":{same}}}',
                '{"w":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}',
            )
        ).encode()
    elif kind == 5:
        depth = rng.choice((10, 999, 5_000, 300_000))
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        raw = f'{{"w":{opening * depth}{1 if opening != "[" else ""}{closing * depth}}}'.encode()
    elif kind == 6:
        digits = rng.choice((400, 5_000, 200_000))
        raw = raw.replace(b"[2]", b"[" + b"9" * digits + b"]").replace(b'"F32"', b'"F32"' + b" " * digits)
    length = len(raw)
    if kind == 7:
        raw += b" " * (-len(raw) % 8)
        length = rng.choice(
            (0, 1, 2, 8, len(raw) - 1, len(raw) + 1, 1 << 26, 99_999_999, 1 << 31, (1 << 64) - 1)
        )
    path.write_bytes(struct.pack("<Q", length) + raw + b"\0" * rng.choice((8, 8, 8, 16, 0, 4)))


# -- pickles that call ------------------------------------------------------------------------------------


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def calls(bait: str) -> list[Call]:
    """Calls that leave a file behind when they are made."""
    write = f"open({bait!r}, 'w')"
    return [
        Call(os.system, f"touch {bait}"),
        Call(eval, write),
        Call(exec, write),
        Call(open, bait, "w"),
        Call(os.mkdir, bait),
        Call(builtins.__import__, "antigravity"),
        Call(os.mknod, bait),
        Call(Path(bait).touch),
        Call(getattr, Call(os.system, f"touch {bait}"), "real"),
    ]


def hidden(rng: Rng, call: Any) -> Any:
    """The call somewhere in what a checkpoint holds."""
    for _ in range(rng.choice((0, 1, 1, 3))):
        call = rng.choice(
            (
                {"state_dict": {**weights(), "x": call}},
                {"callbacks": call, "state_dict": weights()},
                [call, 1],
                {"hyper_parameters": {"a": [call]}, "module": weights()},
                (call, call),
                OrderedDict(weights(), evil=call),
            )
        )
    return call


def calling(rng: Rng, path: Path) -> None:
    payload = hidden(rng, rng.choice(calls(BAIT)))
    protocol = rng.randrange(6)
    form = rng.randrange(4)
    if form == 0:
        path.write_bytes(pickle.dumps(payload, protocol=protocol))
    elif form == 1:
        file = io.BytesIO()
        np.save(file, np.array([payload], dtype=object))
        path.write_bytes(file.getvalue())
    else:
        torch.save(payload, path, pickle_protocol=max(protocol, 1), _use_new_zipfile_serialization=form == 2)


# -- pickles that are put together by hand ----------------------------------------------------------------


def word(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw if len(raw) < 256 else b"J\xff\xff\xff\x7f"


def name(dotted: str) -> bytes:
    module, _, last = dotted.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def group(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call_of(dotted: str, *args: bytes) -> bytes:
    return name(dotted) + group(*args) + b"R"


def storage(count: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    return group(word("storage"), name(f"torch.{kind}"), word(key), word("cpu"), number(count)) + b"Q"


def tensor(offset: int, size: list[int], stride: list[int], count: int = 8, **options: str) -> bytes:
    shape, steps = (group(*map(number, values)) for values in (size, stride))
    hooks = call_of("collections.OrderedDict")
    return call_of(
        "torch._utils._rebuild_tensor_v2",
        storage(count, **options),
        number(offset),
        shape,
        steps,
        b"\x89",
        hooks,
    )


def tuple_bomb(depth: int, width: int) -> bytes:
    """A tuple of `width` times the same tuple of ..., `depth` deep: width ** depth leaves in a few bytes."""
    return b"K\x01" + (b"\x85" if width == 1 else b"q\x00h\x00\x86") * depth


def hand_made(rng: Rng) -> bytes:
    """An object for a pickle, by its operations; most ask for more than the file has."""
    big = rng.choice((10, 1 << 20, 1 << 28, 1 << 33, 1 << 40, 1 << 62, (1 << 63) - 1, -1, 1 << 70))
    return rng.choice(
        [
            lambda: tensor(0, [2, 4], [4, 1]),
            lambda: tensor(0, [big], [1]),
            lambda: tensor(big, [2], [1]),
            lambda: tensor(0, [2, 2], [big, 1]),
            lambda: tensor(0, [big, big], [0, 0]),
            lambda: tensor(0, [8], [1], count=big),
            lambda: tensor(0, [2] * 3000, [0] * 3000),
            lambda: tensor(
                0, [8], [1], kind=rng.choice(("DoubleStorage", "BoolStorage", "QInt8Storage", "Nope"))
            ),
            lambda: tensor(0, [8], [1], key=rng.choice(("1", "../data.pkl", "a\nb", "x" * 300))),
            lambda: call_of("builtins.bytearray", number(big)),
            lambda: call_of("torch.Tensor", number(big)),
            lambda: call_of("torch.Tensor", number(big), number(big)),
            lambda: call_of("torch.FloatTensor", number(big)),
            lambda: call_of("torch.storage.UntypedStorage", number(big)),
            lambda: call_of("torch.FloatStorage", number(big)),
            lambda: call_of("torch.Size", b"(" + number(big) + b"l"),
            lambda: call_of("torch.device", word(rng.choice(("cuda", "meta", "cpu:99", "\n")))),
            lambda: call_of(
                "torch._utils._rebuild_meta_tensor_no_storage",
                *(name("torch.float32"), group(number(8), number(8)), group(number(8), number(1)), b"\x89"),
            ),
            lambda: call_of(
                "torch._utils._rebuild_sparse_tensor", name("torch.sparse_coo"), group(number(big))
            ),
            lambda: call_of(
                "_codecs.encode", word("x" * 40), word(rng.choice(("latin1", "zlib", "rot13", "..a")))
            ),
            lambda: call_of("collections.Counter", word("abc" * 9)),
            lambda: name("pytorch_lightning.x.Evil") + b")\x81" + group(word("a")) + b"b",
            lambda: call_of("omegaconf.x.AttributeDict", group(number(big))),
            lambda: b"X" + struct.pack("<I", 0xFFFFFFFF) + b"abc",
            lambda: b"\x8d" + struct.pack("<Q", big % (1 << 64)) + b"abc",
            lambda: b"B" + struct.pack("<I", 0xFFFFFFF0) + b"abc",
            lambda: b"\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"abc",
            lambda: b"I" + b"9" * rng.choice((20, 5_000)) + b"\n",
            lambda: b"](" * rng.choice((10, 40_000)),
            lambda: b"]" * 10 + b"l" * 50,
            lambda: b"r\xff\xff\xff\x7f" + b"h\x05",
            lambda: tuple_bomb(rng.choice((3, 26, 40)), 2),
            lambda: tuple_bomb(rng.choice((30, 500, 500_000)), 1),
        ]
    )()


def strange_payload(rng: Rng) -> bytes:
    """A whole pickle around a hand-made object: as a weight, as a name, or by itself."""
    thing, fine = hand_made(rng), tensor(0, [8], [1])
    key = word(strange_name(rng))
    body = rng.choice(
        (
            b"}" + word("w") + thing + b"s",
            b"}" + word("w") + fine + b"s" + word("v") + thing + b"s",
            b"}" + thing + fine + b"s",  # as a name
            b"}" + thing + word("x") + b"s",
            b"}" + key + fine + b"s" + word("other") + thing + b"s",
            b"}" + key + word("x") + b"s",
            b"}" + word("state_dict") + b"}" + word("w") + fine + b"s" + b"s" + word("metadata") + b"}" + key
            + thing + b"ss",
            thing,
        )
    )  # fmt: skip
    return b"\x80\x02" + body + b"."


def torch_zip(entries: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(f"archive/{entry}", content)
    return file.getvalue()


def parts_of_zip(pickled: bytes) -> dict[str, bytes]:
    return {"data.pkl": pickled, "byteorder": b"little", "data/0": bytes(32), "version": b"3\n"}


def strange_pickle(rng: Rng, path: Path) -> None:
    pickled = strange_payload(rng)
    if rng.random() < 0.7:
        path.write_bytes(torch_zip(parts_of_zip(pickled)))
        return
    start = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    system = {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    count = rng.choice((8, 8, 1 << 20, 1 << 40))
    end = pickle.dumps(["0"], 2) + struct.pack("<q", count) + bytes(32)
    path.write_bytes(start + pickle.dumps(system, 2) + pickled + end)


# -- zip files that lie -----------------------------------------------------------------------------------


def bomb(rng: Rng, path: Path) -> None:
    """Little that says it is much: by compression, or by entries that lie over one another."""
    many = 1 << rng.choice((20, 24, 26))
    packed = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    fine = b"\x80\x02}" + word("w") + tensor(0, [8], [1]) + b"s."
    large = rng.choice(("data.pkl", "data/0", "version"))
    if rng.random() < 0.6:
        with zipfile.ZipFile(path, "w") as archive:
            for entry, content in parts_of_zip(fine).items():
                is_large = entry == large
                filling = fine[:-1] + b"0" * many if entry == "data.pkl" else bytes(many)
                archive.writestr(
                    f"archive/{entry}",
                    filling if is_large else content,
                    packed if is_large else zipfile.ZIP_STORED,
                )
        return
    count = rng.choice((40, 400))
    keys = [f"t{i}" for i in range(count)]
    items = b"".join(
        word(key) + tensor(0, [1 << 18], [1], count=1 << 18, key=str(i)) + b"s" for i, key in enumerate(keys)
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + items + b".")
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", bytes(MIB))
        record = archive.getinfo("archive/data/0")
        for i in range(1, count):  # the same bytes under other names
            twin = zipfile.ZipInfo(f"archive/data/{i}")
            for field in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(twin, field, getattr(record, field))
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    path.write_bytes(file.getvalue())


def lying_directory(rng: Rng, path: Path) -> None:
    """A torch zip with a field of its directory overwritten, or with entries that it should not have."""
    content = bytearray(SOUND["zip"])
    kind = rng.randrange(4)
    if kind == 0:
        start = rng.choice(
            [m.start() for m in re.finditer(rb"PK\x01\x02|PK\x05\x06|PK\x06\x06", bytes(content))]
        )
        at = start + rng.randrange(4, 46)
        value = rng.choice((0, 1, 0xFFFFFFFF, 0x7FFFFFFF, rng.getrandbits(32)))
        content[at : at + 4] = struct.pack("<I", value)
    elif kind == 1:
        entries = parts_of_zip(b"\x80\x02}" + word("w") + tensor(0, [8], [1]) + b"s.")
        entries[rng.choice(("byteorder", "version", "data/0"))] = rng.choice(
            (b"", b"big", b"\xff\xfe", b"9" * 99)
        )
        content[:] = torch_zip(entries)
    elif kind == 2:
        old = rng.choice((b"data.pkl", b"data/0", b"version", b"archive"))
        content[:] = content.replace(
            old, rng.choice((b"\xff" * len(old), b"\n" * len(old), b"../../" + old[6:]))
        )
        flag = re.search(rb"PK\x01\x02", bytes(content))
        if flag and rng.random() < 0.5:
            content[flag.start() + 9] |= 8  # names are UTF-8, it says
    else:
        content[:] = torch_zip(
            {strange_name(rng).encode("utf-8", "replace").decode(): bytes(9), "data.pkl": b"N."}
        )
    path.write_bytes(content)


# -- what is no file, or none of ours ---------------------------------------------------------------------


def no_file(rng: Rng, path: Path) -> None:
    kind = rng.randrange(9)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path.parent)
    elif kind == 3:
        path.symlink_to(path)  # a loop
    elif kind == 4:
        path.symlink_to("nowhere")
    elif kind == 5:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/proc/self/mem")))
    elif kind == 6:
        path.write_bytes(b"")
    elif kind == 7:
        (path.parent / "real").write_bytes(sound(rng))
        path.symlink_to("real")
    else:
        path.mkdir()
        (path / "model_index.json").write_text(rng.choice(("{", "{}", '{"a": NaN}')))


def of_others(rng: Rng, path: Path) -> None:
    file = io.BytesIO()
    kind = rng.randrange(6)
    if kind == 0:
        np.save(file, np.array([{"a": 1}], dtype=object))
    elif kind == 1:
        np.savez(file, a=np.zeros(3), b=np.array([{"a": 1}], dtype=object))
    elif kind == 2:
        file.write(gzip.compress(bytes(1 << 24)))
    elif kind == 3:
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("../../evil"))
    elif kind == 4:
        file.write(
            rng.choice((b"<html>", b"GGUF", b"\x89HDF\r\n", b"version https://git-lfs", b"{" * 5_000))
            + b"\0" * 9
        )
    else:
        pickle.dump({"state_dict": {"a": [1.0] * 100}}, file, protocol=rng.randrange(6))
    path.write_bytes(file.getvalue())


KINDS: tuple[tuple[Callable[[Rng, Path], None], int], ...] = (  # and how often
    (untouched, 6),
    (truncated, 8),
    (flipped, 14),
    (overwritten, 10),
    (shifted, 8),
    (spliced, 4),
    (prefixed, 3),
    (noise, 3),
    (lying_header, 14),
    (calling, 10),
    (strange_pickle, 16),
    (bomb, 4),
    (lying_directory, 8),
    (no_file, 4),
    (of_others, 4),
)


def make_file(seed: int, folder: Path) -> tuple[str, Path]:
    """Write file number `seed` into an empty folder; return its kind and its path."""
    rng = Rng(seed)
    (make,) = rng.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])
    path = folder / f"model{rng.choice(SUFFIXES)}"
    make(rng, path)
    return make.__name__, path
