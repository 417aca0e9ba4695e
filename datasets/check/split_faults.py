"""What the frames of a split show together: swapped pairs, shifted ids, lost void, leaks, statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets.check.alignment import (
    LEAST_REFERENCES,
    SUSPECTS_KEPT,
    Fit,
    Outline,
    References,
    find_partners,
)
from datasets.check.findings import Finding, Frame, finding
from datasets.check.frame_faults import Examiner, Record
from datasets.check.listing import Listing
from datasets.check.plausible_ids import IdCounts, better_reading, readings
from datasets.label_space import LabelSpace, Size

ALIKE = 0.9  # share of the frames that have one size, before the others are told
LEAST_COMPARED = 5  # pairs, before most of them say something about all
LEAST_FRAMES = 20  # of a split, before it is strange that none of them shows void, or has another size


class SplitTally:
    """Takes the records of a split one by one and keeps counts; what it keeps of a frame is a few bytes."""

    def __init__(self, listing: Listing, examiner: Examiner, references: Sequence[Outline]) -> None:
        """References are outlines of frames from all over the split."""
        self.listing, self.examiner = listing, examiner
        self.references = References(references) if len(references) >= LEAST_REFERENCES else None
        self.findings: list[Finding] = list(listing.findings)
        self.hashes: dict[bytes, Frame] = {}
        self.counts = {False: IdCounts.none(), True: IdCounts.none()}  # of maps of label ids, of train ids
        self.first_map: dict[bool, Path] = {}
        self.photo_sizes: list[tuple[Frame, Size]] = []
        self.map_sizes: Counter[Size] = Counter()
        self.suspects: list[tuple[Frame, Outline, Fit]] = []
        self.examined = self.compared = self.void = self.pixels = 0

    def examine(self, frame: Frame) -> tuple[Record, Fit | None]:
        """Read a frame and compare its photo with its map; in a worker, as nothing here is changed."""
        record = self.examiner.examine(frame)
        if self.references is None or record.outline is None:
            return record, None
        fit = self.references.fit(record.outline)
        if fit is None or fit.is_clear:
            record.outline = None
        return record, fit

    def add(self, record: Record, fit: Fit | None) -> None:
        """Count a frame."""
        self.examined += 1
        self.findings += record.findings
        if record.photo_size is not None:
            self.photo_sizes.append((record.frame, record.photo_size))
        if record.photo_hash is not None:
            self._find_twin(record.photo_hash, record.frame)
        if record.label_size is not None:
            self.map_sizes[record.label_size] += 1
        self._count_ids(record)
        self.compared += fit is not None
        if fit is not None and record.outline is not None and len(self.suspects) < SUSPECTS_KEPT:
            self.suspects.append((record.frame, record.outline, fit))

    def finish(self) -> None:
        """Judge what only the whole split shows."""
        self._judge_suspects()
        self._judge_sizes()
        if self.examiner.space is not None:
            for train_ids, counts in self.counts.items():
                self._judge_ids(self.examiner.space, counts, train_ids=train_ids)

    def statistics(self) -> dict[str, Any]:
        """Sizes, shares and prompts, ready for JSON."""
        prompts = [frame.prompt for frame in self.listing.frames if frame.prompt is not None]
        sizes = Counter(size for _, size in self.photo_sizes)
        return {
            "frames": len(self.listing.frames),
            "examined": self.examined,
            "photo_sizes": {f"{h}x{w}": n for (h, w), n in sizes.most_common()},
            "map_sizes": {f"{h}x{w}": n for (h, w), n in self.map_sizes.most_common()},
            "pairs_compared": self.compared,
            "void_share": self.void / self.pixels if self.pixels else None,
            "class_shares": self._class_shares(),
            "prompts": _count_prompts(prompts),
        }

    def _class_shares(self) -> dict[str, float]:
        """Share of the labelled pixels, by name of the class."""
        space = self.examiner.space
        if space is None or not self.pixels:
            return {}
        pixels = np.zeros(space.num_classes)
        for train_ids, counts in self.counts.items():
            file_ids = np.arange(space.num_classes) if train_ids else np.array(space.file_ids) % 256
            pixels += counts.all_pixels[file_ids]
        return dict(zip(space.names, (pixels / max(1.0, pixels.sum())).tolist(), strict=True))

    def _count_ids(self, record: Record) -> None:
        labels, path = record.labels, record.frame.labels
        if labels is None or path is None or labels.pixels is None:
            return
        assert labels.on_grid is not None
        assert labels.heights is not None
        train_ids = self.examiner.holds_train_ids(path)
        self.first_map.setdefault(train_ids, path)
        self.counts[train_ids].add(labels.on_grid, labels.heights, labels.pixels)
        self.void += labels.void
        self.pixels += int(labels.pixels.sum())

    def _find_twin(self, photo_hash: bytes, frame: Frame) -> None:
        twin = self.hashes.setdefault(photo_hash, frame)
        if twin is not frame:
            message = (
                f"{frame.photo}: expected each photo once, found the same pixels in {twin.photo}; remove one"
            )
            self._note("duplicate-photo", message, frame.photo, frame)

    def _judge_suspects(self) -> None:
        """Tell suspects whose map another photo has, or that fit mirrored, or worse than several others."""
        if self.references is None:
            return
        frames_and_fits = [(frame, fit) for frame, _, fit in self.suspects]
        partners = find_partners(self.references, [(frame, fit) for _, frame, fit in self.suspects])
        for i, (frame, _, fit) in enumerate(self.suspects):
            assert frame.labels is not None
            if i in partners:
                other = self.suspects[partners[i]][0]
                message = (
                    f"{frame.labels}: expected the map of {frame.photo.name}, found that the map of"
                    f" {other.key} fits this photo and its own does not; give {frame.key} the map"
                    f" {other.labels}"
                )
                self._note("swapped-pair", message, frame.labels, frame)
            elif fit.is_beaten_by(fit.mirrored):
                message = f"{frame.labels}: expected the map of {frame.photo.name}, found its mirror image"
                self._note("mirrored-pair", f"{message}; mirror it", frame.labels, frame)
            elif fit.is_poor:
                message = (
                    f"{frame.labels}: expected boundaries where {frame.photo.name} has them,"
                    " found that maps of other frames fit as well; look at the frame, and replace its map if"
                    " it is of another scene"
                )
                self._note("misaligned-pair", message, frame.labels, frame)

        astray = [frame for frame, fit in frames_and_fits if fit.is_poor]
        if self.compared >= LEAST_COMPARED and 2 * len(astray) > self.compared:
            labels = astray[0].labels
            assert labels is not None
            message = (
                f"{labels} and {len(astray) - 1} more of {self.compared} maps: expected maps that fit their"
                " photos, found that maps of other frames fit as well; the pairs of the split are mixed up:"
                " pair the files again"
            )
            self._note("mixed-pairs", message, labels)

    def _judge_sizes(self) -> None:
        sizes = Counter(size for _, size in self.photo_sizes)
        if len(self.photo_sizes) < LEAST_FRAMES or len(sizes) < 2:
            return
        (common, times), *_ = sizes.most_common(1)
        if times < ALIKE * len(self.photo_sizes):
            return
        for frame, (h, w) in self.photo_sizes:
            if (h, w) != common:
                usual = f"{common[0]}x{common[1]}"
                message = (
                    f"{frame.photo}: expected {usual}, as {times} photos of {frame.split} have, found {h}x{w}"
                )
                self._note("odd-size", f"{message}; check that it belongs here", frame.photo, frame)

    def _judge_ids(self, space: LabelSpace, counts: IdCounts, *, train_ids: bool) -> None:
        if not counts.frames:
            return
        first, kind = self.first_map[train_ids], "train ids" if train_ids else "label ids"
        split = self.listing.split
        if better := better_reading(space, counts, train_ids=train_ids):
            reading, gain = better
            example = _example(space, counts, readings(space, train_ids=train_ids)[reading])
            message = (
                f"{first} and {counts.frames - 1} other maps of {split}: expected {space.name} {kind}, found"
                f" that classes lie where they usually do if the values are read as {reading}"
                f" ({gain:.1f} nats a pixel more plausible; {example}); make the maps again with the ids of"
                f" {space.name}"
            )
            self._note("shifted-ids", message, first)
        if counts.frames >= LEAST_FRAMES and not self.void:
            message = (
                f"{first} and {counts.frames - 1} other maps of {split}: expected some void pixels, found"
                " none in any; if unlabelled places were filled with a class, that class is learned wrong"
            )
            self._note("void-lost", message, first)

    def _note(self, code: str, message: str, file: Path, frame: Frame | None = None) -> None:
        key = None if frame is None else frame.key
        self.findings.append(finding(code, message, file, split=self.listing.split, key=key))


def _count_prompts(prompts: Sequence[str]) -> dict[str, int] | None:
    """Of frames with prompts of their own."""
    if not prompts:
        return None
    return {"different": len(set(prompts)), "empty": sum(not prompt.strip() for prompt in prompts)}


def find_leaks(tallies: Sequence[SplitTally]) -> list[Finding]:
    """Photos that are in two splits, by their pixels where they were read, else by stem and bytes."""
    findings: list[Finding] = []
    for n, later in enumerate(tallies):
        for earlier in tallies[:n]:
            told: set[Path] = set()
            for photo_hash in later.hashes.keys() & earlier.hashes.keys():
                frame = later.hashes[photo_hash]
                told.add(frame.photo)
                findings.append(_leak(frame, earlier.hashes[photo_hash]))
            by_key = {frame.key: frame for frame in earlier.listing.frames}
            shared = [
                frame for frame in later.listing.frames if frame.key in by_key and frame.photo not in told
            ]
            for frame in shared:
                findings.append(_same_stem(frame, by_key[frame.key]))
    return sorted(findings, key=lambda item: str(item.file))


def _same_stem(frame: Frame, other: Frame) -> Finding:
    if have_same_bytes(frame.photo, other.photo):
        return _leak(frame, other)
    message = (
        f"{frame.photo}: expected stems that are unique, found {other.photo} in split {other.split};"
        " the pictures differ, so only names are mixed up"
    )
    return finding("same-stem", message, frame.photo, split=frame.split, key=frame.key)


def _leak(frame: Frame, other: Frame) -> Finding:
    message = (
        f"{frame.photo}: expected photos of split {frame.split} in no other, found the same picture in split"
        f" {other.split}: {other.photo}; remove one, or what is measured on {frame.split} is worthless"
    )
    return finding("leaked-frame", message, frame.photo, split=frame.split, key=frame.key)


def have_same_bytes(a: Path, b: Path) -> bool:
    """Whether two files are the same, or hold the same; a file that cannot be read is like no other."""
    try:
        return a == b or (a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes())
    except OSError:
        return False


def _example(space: LabelSpace, counts: IdCounts, file_ids: np.ndarray) -> str:
    """What the most frequent value means under a reading."""
    names = {file_id % 256: name for file_id, name in zip(space.row_ids, space.row_names, strict=True)}
    value = int(counts.pixels.argmax())
    share = counts.pixels[value] / counts.pixels.sum()
    return f"value {value}, in {share:.0%} of the pixels, is then {names.get(int(file_ids[value]), 'void')}"
