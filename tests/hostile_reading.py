"""Reading hostile files in a process of its own, which has little memory and little time for it.

    PYTHONPATH=. python tests/hostile_reading.py FIRST COUNT

The number of a file is printed before it is read, so that the last line names the one that ended the process.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from hostile_files import BAIT, MIB, make_file

from cldm.tensor_files import CheckpointError, read_metadata, read_shapes, read_tensors

SECONDS = 10  # of the processor that reading one file may take in every way
ADDRESS_SPACE = 2048 * MIB  # on top of what the process has when it begins
RESIDENT = 64 * MIB  # that may be added while reading one file
MOST_WORDS = 2500  # characters of a sentence
READERS = (read_tensors, read_shapes, read_metadata)
WATCHED = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "os.remove",
)


def faults_of(kind: str, path: Path) -> Iterator[str]:
    """Read a file in every way yield what went wrong, which is nothing."""
    size = path.stat().st_size if path.is_file() else 0
    found: dict[str, Any] = {}
    for read in READERS:
        Watch.seen.clear()
        resident, started = clear_peak(), time.process_time()
        try:
            found[read.__name__] = read(path)
        except (CheckpointError, OSError) as error:
            yield from faults_of_sentence(str(error), path, isinstance(error, CheckpointError))
        except BaseException as error:
            yield f"{read.__name__} raised {type(error).__name__}: {str(error)[:200]}"
        if (grown := peak() - resident) > RESIDENT + 4 * size:
            yield f"{read.__name__} took {grown / MIB:.0f} MiB for a file of {size / MIB:.3f}"
        if (seconds := time.process_time() - started) > SECONDS / 3:
            yield f"{read.__name__} took {seconds:.1f} s"
        if Watch.seen:
            yield f"{read.__name__} called {', '.join(Watch.seen)}"
    if Path(BAIT).exists():
        yield "code in the file was run"
    yield from faults_of_result(found, size)
    if kind == "untouched" and len(found) != len(READERS):
        yield "a sound file was not read"


def faults_of_sentence(sentence: str, path: Path, is_ours: bool) -> Iterator[str]:
    if is_ours and str(path) not in sentence:
        yield f"the sentence does not name the file: {sentence[:300]!r}"
    if not sentence.isprintable() or len(sentence) > MOST_WORDS:
        yield f"no plain sentence: {sentence[:300]!r}"


def faults_of_result(found: dict[str, Any], size: int) -> Iterator[str]:
    """What was read has to be there: tensors with numbers of their own, of the shapes that are told."""
    tensors, shapes = found.get("read_tensors"), found.get("read_shapes")
    if tensors is None or shapes is None:
        return
    if {key: tuple(value.shape) for key, value in tensors.items()} != shapes:
        yield "tensors and shapes differ"
    stored = {}
    for key, value in tensors.items():
        if type(value) is not torch.Tensor or value.layout != torch.strided or value.device.type != "cpu":
            yield f"{key[:40]!r} is a {type(value).__name__} without numbers"
            continue
        stored[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        bytes(
            value.untyped_storage()[:4096].tolist()
            if stored[value.untyped_storage().data_ptr()] < MIB
            else []
        )
    if sum(stored.values()) > size:
        yield f"{sum(stored.values())} bytes of numbers in a file of {size}"
    if any(type(n) is not int or n < 0 for shape in shapes.values() for n in shape):
        yield "a shape that is none"


class Watch:
    """What the interpreter says is being called; installed once, it cannot be taken away again."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def install(cls) -> None:
        sys.addaudithook(lambda event, args: cls.seen.append(event) if event in WATCHED else None)


def status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024


def clear_peak() -> int:
    """Forget the largest resident size so far; return the present one."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def say(line: str) -> None:
    """Print at once: the next file may end the process."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Read the files FIRST .. FIRST + COUNT - 1; exit with 1 if there was a fault."""
    first, count = map(int, sys.argv[1:])
    warnings.simplefilter("ignore")
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)  # ends the process also within C code
    Watch.install()
    tally, faults = Counter[str](), 0
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        limit = status("VmSize") + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for seed in range(first, first + count):
            folder = Path(scratch, str(seed))
            folder.mkdir()
            kind, path = make_file(seed, folder)
            tally[kind] += 1
            say(f"{seed} {kind}")
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(60)  # also where it waits and does not compute, whatever else the machine does
            for fault in faults_of(kind, path):
                faults += 1
                say(f"FAULT {seed} {kind}: {fault}")
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            if Path(BAIT).is_dir():
                Path(BAIT).rmdir()
            Path(BAIT).unlink(missing_ok=True)
    say(json.dumps({"files": count, "faults": faults, "kinds": tally}))
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
