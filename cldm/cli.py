"""What the scripts share: how they refuse, and how they hold memory."""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


INTERRUPTED = 130  # exit status, as a shell has it for Ctrl-C


def refuse(message: str, status: int = 2) -> NoReturn:
    """Say in one sentence why nothing more is done; exit with 2 as a wrong argument does."""
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {message}\n")
    sys.exit(status)


def parse_shard(parser: argparse.ArgumentParser, text: str) -> tuple[int, int]:
    """I and N of a --shard I/N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = (int(part) for part in found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        parser.error(f"--shard must be I/N with 1 <= I <= N, such as 1/4, found {text}")
    return number, count


def check_least(parser: argparse.ArgumentParser, args: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Refuse a flag below its least value; one that was not given is None."""
    for name, limit in least.items():
        value = getattr(args, name)
        if value is not None and value < limit:
            parser.error(f"--{name} must be {limit} or more, found {value}")


def check_there(parser: argparse.ArgumentParser, *paths: Path | None) -> None:
    """Refuse files and folders that are not there; one that was not given is None."""
    for path in filter(None, paths):
        if not path.exists():
            parser.error(f"{path} does not exist")


def check_new(parser: argparse.ArgumentParser, *targets: Path, makes_folder: bool = False) -> None:
    """Refuse to write over something, or into a folder that is not there, unless the script makes it."""
    for path in targets:
        if path.exists():
            parser.error(f"{path} exists; choose another name or remove it first")
    folder = targets[0].parent
    if not (makes_folder or folder.is_dir()):
        parser.error(f"the folder {folder} does not exist; create it first")


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free instead of handing it back and faulting it in again at every step.

    On a CPU that was a fifth of an SD1.5 sampling step. Elsewhere than on Linux it does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Older glibc takes 32 MiB at most. A trim threshold alone would freeze the other one at its small start.
    if mallopt and any(mallopt(M_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25)):
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
