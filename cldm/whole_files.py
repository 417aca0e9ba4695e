"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write under: synced and renamed to it when the block ends, removed if it fails.

    The name is hidden and never that of another writer.
    """
    partial = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        if not partial.is_symlink():
            sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the system write out a file or a folder; folders cannot be opened on Windows."""
    if os.name == "nt" and path.is_dir():
        return
    # Windows syncs only what is open for writing; elsewhere a folder opens for reading alone.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
