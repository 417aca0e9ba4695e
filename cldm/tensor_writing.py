"""Write files of named tensors whole or not at all: safetensors, or a torch zip for .ckpt, .pth and .pt."""

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from cldm.tensor_files import CheckpointError, read_metadata, read_shapes, read_tensors
from cldm.whole_files import sync, whole_file

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_SUFFIXES = {".ckpt", ".pth", ".pt"}

_MARGIN = 1 << 20  # bytes on top of the tensors: zip directory, file system blocks


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write a file whole or not at all: temporary name, check by reading, sync, rename, open again.

    A safetensors file holds one tensor at a time in memory; a torch file copies tensors that share storage.

    dtypes  of those tensors that are written in another one than they have, each converted as it is written
    """
    target = Path(path).resolve()  # through a link, so that the link survives and the disk is the right one
    notes = dict(metadata or {})
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()} | dict(dtypes or {})
    _check_request(target, tensors, notes, dtypes)
    is_torch = target.suffix.lower() in TORCH_SUFFIXES
    write = _write_torch if is_torch else _write_safetensors
    try:
        with whole_file(target) as partial:
            with partial.open("xb") as file:
                write(file, tensors, notes, dtypes)
            _verify(partial, tensors, dtypes)
            contents = _contents(partial, is_torch)
        sync(target.parent)  # makes the rename itself durable
        _reopen(target, contents, is_torch)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error.strerror or error}") from error


def _check_request(
    target: Path, tensors: Mapping[str, Tensor], notes: dict[str, str], dtypes: Mapping[str, torch.dtype]
) -> None:
    """Refuse what cannot be written before a byte is."""
    if not target.parent.is_dir():
        raise CheckpointError(f"{target} cannot be written: {target.parent} is not a folder; create it first")
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; give the name of a file to write")
    if not tensors:
        raise CheckpointError(f"{target} was not written: there are no tensors to write")
    for name, value in notes.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise CheckpointError(f"metadata {name!r} is {type(value).__name__}; expected text for text")
    needed = _MARGIN
    for name in tensors:
        _check_tensor(name, tensors[name], dtypes[name])
        needed += tensors[name].numel() * dtypes[name].itemsize
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise CheckpointError(
            f"{target} needs {needed / 1e9:.3f} GB but {target.parent} has {free / 1e9:.3f} GB free; "
            "free some space or choose another folder"
        )


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(name, str) or name == "__metadata__":
        raise CheckpointError(f"{name!r} cannot name a tensor; expected text other than __metadata__")
    if dtype not in DTYPE_CODES or tensor.layout != torch.strided:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES)
        raise CheckpointError(f"{name} is {tensor.dtype}, {tensor.layout}; expected strided {known}")
    if tensor.is_meta:
        raise CheckpointError(f"{name} is on the meta device and has no data to write; fill it first")


def _write_safetensors(
    file: IO[bytes],
    tensors: Mapping[str, Tensor],
    notes: dict[str, str],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Lay the file out as the format says: header length, JSON padded with spaces to 8 bytes, raw data."""
    # Wide elements first, so that every tensor starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: -dtypes[name].itemsize)
    offsets, end = {}, 0
    for name in names:
        size = tensors[name].numel() * dtypes[name].itemsize
        offsets[name] = [end, end + size]
        end += size
    header: dict[str, Any] = {"__metadata__": notes} if notes else {}
    for name in tensors:
        dtype, shape = DTYPE_CODES[dtypes[name]], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets[name]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for name in names:
        file.write(_raw(tensors[name].to(dtypes[name])))


def _raw(tensor: Tensor) -> memoryview:
    """View the elements as bytes in row order, copied only if they lie elsewhere or otherwise."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_torch(
    file: IO[bytes],
    tensors: Mapping[str, Tensor],
    notes: dict[str, str],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Save tensors with storages of their own: torch would write a shared or larger storage whole."""
    seen: set[int] = set()
    state = {}
    for name in tensors:
        tensor = tensors[name].detach().cpu().to(dtypes[name])
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        state[name] = tensor
    torch.save({"state_dict": state} | ({"metadata": notes} if notes else {}), file)


def _verify(path: Path, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Open what was written and compare names, types and shapes, before it takes the place of anything."""
    found = {name: (value.dtype, value.shape) for name, value in read_tensors(path).items()}
    if found != {name: (dtypes[name], tensors[name].shape) for name in tensors}:
        raise CheckpointError(f"{path} does not hold what was written to it; check the disk")


def _contents(path: Path, is_torch: bool) -> object:
    """Return what a file says that it holds, without its tensors: safetensors header or zip directory."""
    if not is_torch:
        return read_shapes(path), read_metadata(path)
    with zipfile.ZipFile(path) as archive:
        return [
            (entry.filename, entry.header_offset, entry.file_size, entry.CRC) for entry in archive.infolist()
        ]


def _reopen(target: Path, contents: object, is_torch: bool) -> None:
    """Open the file under its final name; it must say that it holds what was verified before the rename."""
    found = "it lists other content"
    try:
        if _contents(target, is_torch) == contents:
            return
    except (CheckpointError, zipfile.BadZipFile) as error:
        found = str(error)
    raise CheckpointError(
        f"{target} is not the file that was verified before it got this name ({found}); "
        "check the disk and write it again"
    )
