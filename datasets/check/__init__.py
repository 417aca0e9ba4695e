"""Is a data set sound? Every frame is read to its end, in parallel; counts and findings are kept of it.

    report = check_dataset("cityscapes", "data/cityscapes")
    report = quick_check(dataset)  # seconds, before a training

A bad file never ends a check: it becomes a finding that names it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from datasets import DATASETS, find_entry, options_of
from datasets.check.findings import Frame, Report
from datasets.check.frame_faults import Examiner, looks_odd
from datasets.check.listing import Listing, Source
from datasets.check.split_faults import SplitTally, find_leaks
from datasets.prompts import names_in
from datasets.segmentation import SegmentationDataset
from datasets.triples import TriplesDataset

REFERENCES = 24  # frames of a split that the pairs are compared with
HANDFUL = 8  # frames that a quick check reads of the first split; half as many of each other one
HEADERS = 4000  # frames whose files a quick check opens
ODD_READ = 16  # of those, frames that look odd and are read, too
IN_FLIGHT = 4  # frames for each worker; more would only take memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def check_dataset(
    name: str,
    root: str | Path | None = None,
    *,
    splits: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    quick: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> Report:
    """Check a data set by its name in the registry.

    splits    by default all on disk; an empty one is an error if it was named, or is trained on
    options   of the data set: size, hint, prompt, captions, label_space, ...
    quick     headers of all files and a handful of frames, instead of every frame
    workers   threads; 0 takes one for each core. Decoders run outside the interpreter's lock
    progress  whether to show a bar

    Raises
        ValueError  an unknown data set or option, or a label space or hint encoding that does not exist
    """
    source = open_source(name, root, options or {})
    names = source.splits() if splits is None else list(splits)
    required = names if splits is not None else names[:1]
    listings = [source.list_split(split, required=split in required) for split in names]
    return _check(source, listings, quick=quick, workers=workers, progress=progress)


def open_source(name: str, root: str | Path | None, options: Mapping[str, Any]) -> Source:
    """What is known of a data set without looking at its files; the errors are those of `check_dataset`."""
    entry = find_entry(name)
    cls = entry.load()
    known = options_of(cls)
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"data set {name} has no option {unknown[0]!r}; it takes {', '.join(known)}")
    if not isinstance(cls, type) or not issubclass(cls, SegmentationDataset | TriplesDataset):
        raise ValueError(f"expected a data set of photos with maps or controls, found {name}")
    given = {key: value for key, value in options.items() if key not in ("root", "split")}
    source = Source(name, cls, Path(entry.default_root if root is None else root), given)
    names_in(source.sentence)
    assert source.encoding is None or source.space is not None  # both are looked up, and refuse wrong names
    return source


def options_among(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the `data` settings of a run those that are options of the data set, without root and split."""
    known = set(options_of(find_entry(name).load())) - {"root", "split"}
    return {key: value for key, value in settings.items() if key in known and value is not None}


def quick_check(dataset: Any) -> Report:
    """The quick part for a data set that is open already; of one without files there is nothing to report."""
    if not isinstance(dataset, SegmentationDataset | TriplesDataset):
        return Report(type(dataset).__name__, Path(), quick=True)
    cls = type(dataset)
    names = [name for name, entry in DATASETS.items() if entry.class_name == cls.__name__]
    options = {
        "size": dataset.size,
        "prompt": dataset.prompt,
        "words": dataset.words,
        **dataset.own_options(),
    }
    source = Source(names[0] if names else cls.__name__, cls, dataset.root, options)
    own = source.folder_of(dataset.split)
    splits = [dataset.split, *(split for split in source.splits() if source.folder_of(split) != own)]
    listings = [source.list_split(split, required=split == dataset.split, opened=True) for split in splits]
    return _check(source, listings, quick=True, workers=0, progress=False)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items, evenly from all over a sequence."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _check(
    source: Source, listings: Sequence[Listing], *, quick: bool, workers: int, progress: bool
) -> Report:
    examiner, workers = Examiner(source), workers or _cores()
    plans = [
        _handful(listing.frames, HANDFUL // 2 if n else HANDFUL) if quick else listing.frames
        for n, listing in enumerate(listings)
    ]
    tallies: list[SplitTally] = []
    total = sum(map(len, plans))
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=total, unit="frame", desc=f"checking {source.name}", disable=not progress) as bar,
    ):
        for listing, frames in zip(listings, plans, strict=True):
            samples = pool.map(examiner.examine, spread(frames, REFERENCES))
            outlines = [record.outline for record in samples if record.outline is not None]
            tally = SplitTally(listing, examiner, outlines)
            for record, fit in _in_order(pool, tally.examine, frames, IN_FLIGHT * workers):
                tally.add(record, fit)
                bar.update()
            tally.finish()
            tallies.append(tally)
    findings = [item for tally in tallies for item in tally.findings] + find_leaks(tallies)
    statistics = {"splits": {tally.listing.split: tally.statistics() for tally in tallies}}
    frames_of = {listing.split: listing.frames for listing in listings}
    return Report(source.name, source.root, quick, findings, statistics, frames_of)


def _handful(frames: Sequence[Frame], count: int) -> list[Frame]:
    """What a quick check reads: frames from all over, and some of those whose headers look odd."""
    odd: list[Frame] = []
    for frame in spread(frames, HEADERS):
        if len(odd) < ODD_READ and looks_odd(frame):
            odd.append(frame)
    return list(dict.fromkeys([*spread(frames, count), *odd]))


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """Results in the order of the items, with at most `ahead` of them waiting."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
        waiting.append(pool.submit(work, item))
    while waiting:
        yield waiting.popleft().result()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
