"""The one folder that a page reads and writes: made at the start, kept small, removed at the end."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

KEPT = "examples"  # the subfolder that lives as long as the page
KEEP_SECONDS = 3600
KEEP_BYTES = 1 << 30
KEEP_FILES = 1 << 14  # empty ones take their room, too

ONE_AT_A_TIME = threading.Lock()


@contextmanager
def private_folder() -> Iterator[Path]:
    """A temporary folder for all that a page reads and writes, readable for this user alone.

    Gradio takes its folders, and whether it reports home, from the environment, which is put back at the end.
    """
    with tempfile.TemporaryDirectory(prefix="scenecontrol_", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        wanted = {
            "GRADIO_TEMP_DIR": str(folder),
            "GRADIO_EXAMPLES_CACHE": str(folder / "cache"),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_RUN_HISTORY": "False",
            "GRADIO_ALLOWED_PATHS": "",  # what a user allows other pages to read
        }
        before = {key: os.environ.get(key) for key in wanted}
        os.environ.update(wanted)
        try:
            yield folder
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})


def tidy(folder: Path) -> None:
    """Remove uploads and results that are old, and of the rest the oldest while they are too many."""
    with ONE_AT_A_TIME:
        _tidy(folder)


def _tidy(folder: Path) -> None:
    # Unlike rglob, walk takes it when a folder goes away meanwhile.
    files = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    files = [path for path in files if folder / KEPT not in path.parents]
    left = KEEP_BYTES
    latest_first = sorted((*stats(path), path) for path in files)[::-1]
    for number, (changed, size, path) in enumerate(latest_first):
        left -= size
        if left < 0 or number >= KEEP_FILES or time.time() - changed > KEEP_SECONDS:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                path.parent.rmdir()


def stats(path: Path) -> tuple[float, int]:
    """Time of the last change, and size; of a file that went away in between, nothing."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0.0, 0
    return found.st_mtime, found.st_size
