"""Read files of named tensors; nothing found in a file is ever executed.

What a file is follows from its content, never from its name: safetensors, a torch zip file, or a torch file
from before the zip format.
"""

import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cldm.pickle_scan import MOST_DEPTH, Scan, scan_pickle
from cldm.safetensors_header import NOTES, data_bytes, parse_header

log = logging.getLogger(__name__)

Shape = tuple[int, ...]

EXPECTED = "expected a safetensors file or a torch checkpoint of tensors"

_MAX_SENTENCE = 2000
_MAX_HEADER = 100_000_000  # the limit of the safetensors format itself
_LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # opens a pre-zip torch file

# Text that a download leaves behind instead of the weights, then containers of other programs.
_LOOKS = (
    (rb"(?s).{257}ustar", "is a tar archive"),
    (rb"(?i)\s*(<!doctype|<html|<\?xml)", "is a web page, as a failed download leaves behind"),
    (rb"version https://git-lfs", "is a git-lfs pointer, not the weights: run `git lfs pull`"),
    (rb"\s*\{", "is JSON text"),
    (rb"\x1f\x8b", "is a gzip archive"),
    (rb"7z\xbc\xaf", "is a 7z archive"),
    (rb"Rar!", "is a rar archive"),
    (rb"GGUF", "is a GGUF model"),
    (rb"\x89HDF", "is an HDF5 file"),
    (rb"\x93NUMPY", "is a numpy array"),
)

# Globals that Lightning checkpoints mention beside their weights. They become empty stand-ins, never imports.
_INERT_PACKAGES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.")
_INERT_NAMES = re.compile(
    r"numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|ndarray|dtype|float64|float32|int64)"
    r"|builtins\.(dict|list|tuple|int|float|str|bool)"
    r"|collections\.defaultdict|typing\.Any|argparse\.Namespace|pathlib(\._local)?\.\w*Path"
)


class CheckpointError(ValueError):
    """A weight file that cannot be used, said in one sentence."""

    def __init__(self, sentence: str) -> None:
        # Names in it come from the file: they may be a page long, or made of what steers a terminal.
        plain = "".join(c if c.isprintable() else "?" for c in sentence)
        half = _MAX_SENTENCE // 2
        super().__init__(plain if len(plain) <= 2 * half else f"{plain[:half]} ... {plain[-half:]}")


class _Inert:
    """Stands in for a foreign object: takes any state and keeps none."""

    def __init__(self, *state: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _InertDict:
    """Stands in for a dict subclass; a plain dict is the only mapping that the unpickler may fill."""

    def __new__(cls, *state: object) -> dict[object, object]:  # type: ignore[misc]
        """Return a plain dict whatever the subclass was built from."""
        return {}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU and memory-mapped where the format allows it.

    A `state_dict`, `model` or `module` that wraps them is opened; whatever is not a tensor is left out.
    """
    path = Path(path)
    kind = _kind(path)
    if kind != "safetensors":
        return _tensors_of(_load_torch(path, kind), path)
    names = [name for name in _read_header(path) if name != NOTES]
    try:
        with safe_open(path, "pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}
    except Exception as error:  # the reader raises many kinds; all mean the same to the user
        raise CheckpointError(f"{path} is damaged safetensors ({_first_line(error)}); {EXPECTED}") from error


def read_shapes(path: str | Path) -> dict[str, Shape]:
    """Return the shape of every tensor by name without touching their data (pre-zip torch files excepted)."""
    path = Path(path)
    if _kind(path) != "safetensors":
        return {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}
    header = _read_header(path)
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != NOTES}


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the text notes that stand beside the tensors; {} if there are none."""
    path = Path(path)
    kind = _kind(path)
    if kind == "safetensors":
        notes = _read_header(path).get(NOTES)
    else:
        payload = _load_torch(path, kind)
        notes = payload.get("metadata") if isinstance(payload, dict) else None
    pairs = notes.items() if isinstance(notes, dict) else ()
    return {key: text for key, text in pairs if isinstance(key, str) and isinstance(text, str)}


def _kind(path: Path) -> str:
    """Tell the format of a file from its first bytes; refuse with a sentence what is not a weight file."""
    _check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} could not be opened: {error.strerror}; {EXPECTED}") from error
    if head.startswith(b"PK"):
        return "torch_zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER:
        return "safetensors"
    if _LEGACY_MAGIC in head[:20]:
        return "torch_legacy"
    raise CheckpointError(f"{path} {_looks_like(path, head)}; {EXPECTED}")


def _check_regular(path: Path) -> None:
    """Refuse what has no content to look at."""
    if path.is_dir():
        is_diffusers = (path / "model_index.json").exists() or (path / "config.json").exists()
        what = "a diffusers folder, not one file" if is_diffusers else "a folder"
        raise CheckpointError(f"{path} is {what}; {EXPECTED}")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; {EXPECTED}")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file; {EXPECTED}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty, as an interrupted download leaves behind; {EXPECTED}")


def _looks_like(path: Path, head: bytes) -> str:
    """Say what a file without tensors appears to be."""
    for pattern, what in _LOOKS:
        if re.match(pattern, head):
            return what
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        with path.open("rb") as file:
            foreign = _foreign(scan_pickle(file).names)
        return "is a plain Python pickle" + (f" that asks to run {foreign[0]}" if foreign else "")
    return f"is of an unknown format (it starts with {head[:16]!r})"


def _read_header(path: Path) -> dict[str, Any]:
    """Parse the JSON header of a safetensors file and hold it against the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if 8 + length <= size else b""
    if len(raw) < length:
        raise CheckpointError(
            f"{path} is a truncated safetensors file: {size} bytes, its header alone needs {8 + length}; "
            "download or copy it again"
        )
    try:
        header = parse_header(raw)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is a safetensors file with a damaged header ({error}); {EXPECTED}"
        ) from error
    end = 8 + length + data_bytes(header)
    if size != end:
        state = "truncated" if size < end else "damaged"
        raise CheckpointError(
            f"{path} is a {state} safetensors file: {size} bytes, its header promises {end}; "
            "download or copy it again"
        )
    return header


def _load_torch(path: Path, kind: str) -> object:
    """Unpickle a torch file with torch's restricted unpickler, foreign names replaced by empty stand-ins."""
    scan = _scan_zip(path) if kind == "torch_zip" else _scan_legacy(path)
    if scan.is_knotted:
        raise CheckpointError(
            f"{path} is a torch file of tuples within tuples, over {MOST_DEPTH} deep or the same ones again "
            f"and again, as no weights are; {EXPECTED}"
        )
    names = sorted({name for name in scan.names if _is_inert(name)})
    inert: list[Any] = [(_InertDict if name.lower().endswith("dict") else _Inert, name) for name in names]
    # torch takes the name .safetensors for the format; an open file has no name, but is not mapped either.
    is_mapped = kind == "torch_zip" and not path.name.endswith(".safetensors")
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(inert):
            source = path if is_mapped else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=is_mapped)
    except Exception as error:
        raise CheckpointError(f"{path} {_why_refused(scan.names, error)}") from error


def _why_refused(names: list[str], error: Exception) -> str:
    """Name the global that torch would not load; without one the file is damaged."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    foreign = _foreign(names)
    if found:
        culprit = found[1] if "." in found[1] else f"builtins.{found[1]}"
    elif "operand" in str(error) and foreign:
        culprit = foreign[0]
    else:
        return f"is a damaged or unusual torch file ({_first_line(error)}); {EXPECTED}, saved with torch.save"
    return f"is a torch file that asks for {culprit}, which may run code, and was not read; {EXPECTED}"


def _scan_zip(path: Path) -> Scan:
    """Look through the pickle of a torch zip, after checking that it is one."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_zip(path, entries)
            record = next(entry for entry in entries if _is_pickle(entry))
            with archive.open(record) as file:
                return scan_pickle(file)
    except CheckpointError:
        raise
    except Exception as error:  # names that are no text, fields that are no numbers: many kinds, one meaning
        raise CheckpointError(f"{path} is a truncated or damaged zip; download or copy it again") from error


def _is_pickle(entry: zipfile.ZipInfo) -> bool:
    return re.fullmatch(r"[^/]+/data\.pkl", entry.filename) is not None


def _check_zip(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Refuse zip files that torch did not write as plain tensors."""
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names) or sum(map(_is_pickle, entries)) > 1:
        # torch would load another one than the one that is looked through here.
        raise CheckpointError(f"{path} is a zip file with two entries of one name; save it with torch.save")
    if not any(_is_pickle(entry) for entry in entries):
        first = f"it holds {entries[0].filename}" if entries else "it is empty"
        raise CheckpointError(f"{path} is a zip file but not a torch file ({first}); {EXPECTED}")
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(f"{path} is a TorchScript program, not weights; {EXPECTED}")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        # Memory-mapping would read the compressed bytes as if they were the numbers.
        raise CheckpointError(f"{path} is a torch file that was compressed again; save it with torch.save")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(
            f"{path} is a zip file whose entries lie over one another; save it with torch.save"
        )


def _scan_legacy(path: Path) -> Scan:
    """Look through a pre-zip torch file: magic, protocol, system, the object, the keys of its storages."""
    scan = Scan([], False)
    with path.open("rb") as file:
        for _ in range(5):
            scan += scan_pickle(file)
    return scan


def _is_inert(name: str) -> bool:
    return name.startswith(_INERT_PACKAGES) or _INERT_NAMES.fullmatch(name) is not None


def _foreign(names: list[str]) -> list[str]:
    usual = re.compile(r"torch\.(_utils\.|storage\.|\w*Storage$)|_codecs\.encode$|collections\.OrderedDict$")
    return [name for name in names if not usual.match(name) and not _is_inert(name)]


def _first_line(error: Exception) -> str:
    # torch wraps the reason in advice to load the file unsafely, which is not passed on.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return (text.splitlines() or [type(error).__name__])[0][:120].rstrip(". ")


def _tensors_of(payload: object, path: Path) -> dict[str, Tensor]:
    """Open the wrappers around a state dict and keep its tensors."""
    for _ in range(3):  # bounded, because a pickle can hold itself
        payload = _unwrapped(payload)
    if not isinstance(payload, dict):
        raise CheckpointError(f"{path} holds a {type(payload).__name__}, not tensors by name; {EXPECTED}")
    named = ((name, value) for name, value in payload.items() if isinstance(name, str))
    found = {name: value for name, value in named if isinstance(value, Tensor)}
    tensors = {name: _plain(name, value, path) for name, value in found.items()}
    stored = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()
    }
    if sum(stored.values()) > path.stat().st_size:
        raise CheckpointError(f"{path} makes up tensors that its bytes do not hold; {EXPECTED}")
    if not tensors:
        shown = [name if isinstance(name, str) else type(name).__name__ for name in list(payload)[:4]]
        names = ", ".join(name[:60] for name in shown)
        what = "an optimizer state" if "param_groups" in payload else f"no tensors, only {names or 'nothing'}"
        raise CheckpointError(f"{path} holds {what}; {EXPECTED}")
    if len(tensors) < len(payload):
        log.debug("%s: left out %d entries that are not tensors", path, len(payload) - len(tensors))
    return tensors


def _plain(name: str, value: Tensor, path: Path) -> Tensor:
    """A tensor without its history; one that is more or less than its numbers is refused."""
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        what = "quantized" if value.is_quantized else f"{value.layout} on {value.device}"
        raise CheckpointError(f"{path}: {name[:60]} is {what.removeprefix('torch.')}; expected plain numbers")
    return value.detach()


def _unwrapped(payload: object) -> object:
    if isinstance(payload, dict):
        for name in ("state_dict", "model", "module"):
            if isinstance(payload.get(name), dict):
                return payload[name]
    return payload
