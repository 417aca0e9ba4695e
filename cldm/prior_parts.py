"""Parts of a prior that is being made: who goes on with which, several processes, and the prior in the end.

What is done is on disk as parts in the format of the prior, so an interrupted run goes on. Each process
writes to a part of its own, and no image is ever in two of them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, count, pairwise
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from cldm.interrupts import not_inherited
from cldm.prior_file import (
    PriorCard,
    Range,
    difference_of,
    joined,
    merged,
    missing_of,
    read_card,
    read_prior,
    write_prior,
)
from cldm.prior_pass import FirstStage, Report, Work

PATIENCE = 1.0  # seconds between two looks at whether the processes live


def find_parts(target: Path) -> list[Path]:
    """Parts of the prior that is to be at `target`."""
    found = target.parent.glob(f"{target.stem}.part-*{target.suffix}")
    return sorted(path for path in found if path.stem.rpartition("-")[2].isdigit())


def check_same(path: Path, card: PriorCard) -> None:
    """Refuse a file that is there and was made otherwise than `card` says."""
    if difference := difference_of(read_card(path), card):
        raise ValueError(
            f"{path} is there with other settings ({difference}); choose another --save_name, or remove it"
        )


def share_out(target: Path, images: Range, work: Work, processes: int) -> list[Work]:
    """What is left to do of a range of images, for at most so many processes; [] if nothing is.

    work  all but its path and its ranges. A part that is there is continued by one of the processes.

    Raises
        ValueError  a part of another prior
    """
    there = find_parts(target)
    for path in there:
        check_same(path, work.card)
    left = missing_of(images, (one for path in there for one in read_card(path).covered))
    names = (target.with_name(f"{target.stem}.part-{number}{target.suffix}") for number in count())
    paths = chain(there, (path for path in names if path not in there))
    pieces = [piece for piece in split(left, processes) if piece]
    return [replace(work, path=path, ranges=piece) for piece, path in zip(pieces, paths, strict=False)]


def split(ranges: Sequence[Range], pieces: int) -> list[tuple[Range, ...]]:
    """Ranges in so many pieces of about the same number of images, in order."""
    total = sum(stop - start for start, stop in ranges)
    found = []
    for low, high in pairwise(total * i // pieces for i in range(pieces + 1)):
        piece, before = [], 0
        for start, stop in ranges:
            first, last = max(start, start + low - before), min(stop, start + high - before)
            piece += [(first, last)] if first < last else []
            before += stop - start
        found.append(tuple(piece))
    return found


def finish(target: Path, images: Range) -> PriorCard:
    """Make the prior, or the shard, of its parts, which are then removed; the card of what was written."""
    paths = find_parts(target)
    prior = merged([(path, read_prior(path)) for path in paths])
    assert prior.card.covered == joined([images]), "all processes ended well, so all images are there"
    write_prior(target, prior)
    for path in paths:
        path.unlink()
    return prior.card


def run_all(works: Sequence[Work], first_stage: FirstStage, report: Report) -> None:
    """Do all of the work, in this process if it is for one, else in processes of their own.

    Raises
        ValueError         what a process met, or that it was killed; the others are stopped
        KeyboardInterrupt  a signal to stop; each process writes what it reached
    """
    if len(works) == 1:
        works[0].run(first_stage, report)
        return
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
    messages: Any = context.Queue()
    threads = max(1, torch.get_num_threads() // len(works))
    processes = [
        context.Process(target=run_one, args=(placed(work, number), threads, messages))
        for number, work in enumerate(works)
    ]
    try:
        with not_inherited():
            for process in processes:
                process.start()
        follow(processes, messages, report)
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def placed(work: Work, number: int) -> Work:
    """The work on one of the GPUs, in turn, if no device was asked for."""
    gpus = torch.cuda.device_count()
    if work.weights.device != "auto" or gpus < 2:
        return work
    return replace(work, weights=replace(work.weights, device=f"cuda:{number % gpus}"))


def run_one(work: Work, threads: int, messages: Any) -> None:
    """What a process does: sends numbers of images, at the end None, or instead what went wrong."""
    torch.set_num_threads(threads)
    try:
        work.run(work.weights.load(), messages.put)
        messages.put(None)
    except (ValueError, OSError) as error:
        messages.put(str(error))
    except KeyboardInterrupt:
        pass  # another process was stopped or failed, and that is said there


def follow(processes: Iterable[Any], messages: Any, report: Report) -> None:
    """Report until all have ended."""
    processes = list(processes)
    running = len(processes)
    while running:
        try:
            message = messages.get(timeout=PATIENCE)
        except Empty:
            if killed := [p.exitcode for p in processes if p.exitcode]:
                raise ValueError(
                    f"a process ended with status {killed[0]}, perhaps for want of memory; the same command"
                    " goes on where it was"
                ) from None
            continue
        if isinstance(message, str):
            raise ValueError(message)
        running -= message is None
        report(message or 0)
