"""What a check knows of a data set before it reads a picture: its splits, their frames, prompts and gaps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.base import CAPTIONS
from datasets.check.findings import Finding, Frame, finding
from datasets.hint_encoding import HintEncoding, hint_encoding
from datasets.label_space import LabelSpace
from datasets.prompts import CAPTION, names_in, read_captions
from datasets.segmentation import SegmentationDataset
from datasets.triples import TriplesDataset


@dataclass(frozen=True)
class Listing:
    """The frames of a split, and what is wrong with the list of them."""

    split: str
    frames: list[Frame]
    findings: list[Finding]


@dataclass(frozen=True)
class Source:
    """A data set that may or may not open: its class, folder and options."""

    name: str
    cls: type[SegmentationDataset] | type[TriplesDataset]
    root: Path
    options: Mapping[str, Any]  # of the class, without root and split

    @property
    def space(self) -> LabelSpace | None:
        """The label space of its maps; None without maps."""
        if issubclass(self.cls, SegmentationDataset):
            return LabelSpace.load(self.cls.label_space)
        name = self.options.get("label_space")
        return None if name is None else LabelSpace.load(name)

    @property
    def encoding(self) -> HintEncoding | None:
        """What the maps become for the control branch; None for rows with a control image."""
        if not issubclass(self.cls, SegmentationDataset) or self.space is None:
            return None
        return hint_encoding(self.space, self.options.get("hint") or "colours")

    @property
    def sentence(self) -> str:
        """The prompt of all frames, with its {names}."""
        return self.options.get("prompt") or self.cls.default_prompt

    def splits(self) -> list[str]:
        """The splits on disk, the one that is trained on first, whether it is there or not."""
        own = self.cls.default_split
        if issubclass(self.cls, SegmentationDataset):
            found = self.cls.splits(self.root)
            names = {self.folder_of(name): name for name in ("train", "val", "test")}
            return list(dict.fromkeys([own, *(names.get(name, name) for name in found)]))
        lists = {path.stem for path in self.root.glob("*.jsonl") if path.name not in self.cls.lists}
        folders = {
            folder.name
            for folder in self.root.glob("*/")
            if (folder / "target").is_dir() or any((folder / name).is_file() for name in self.cls.lists)
        }
        return [own, *sorted((lists | folders) - {own})]

    def folder_of(self, split: str) -> str:
        """What a split is called on disk."""
        return self.cls.folder_of(split) if issubclass(self.cls, SegmentationDataset) else split

    def list_split(self, split: str, *, required: bool, opened: bool = False) -> Listing:
        """Frames and findings of a split; nothing is raised.

        required  an empty split is an error, not a warning: it was asked for, or is trained on
        opened    the data set is open, so there is no need to try
        """
        lister = _list_pairs if issubclass(self.cls, SegmentationDataset) else _list_rows
        try:
            listing = lister(self, split, required)
        except FileNotFoundError as error:
            listing = Listing(split, [], [_empty(self, split, required, str(error))])
        except (ValueError, OSError) as error:
            code = "duplicate-stem" if str(error).startswith("expected one file for") else "cannot-open"
            listing = Listing(
                split, [], [finding(code, f"split {split}: {error}", _file_in(error), split=split)]
            )
        faulty = any(item.severity == "error" for item in listing.findings)
        if listing.frames and not faulty and not opened:
            listing.findings.extend(self._open(split))
        return listing

    def _open(self, split: str) -> Iterable[Finding]:
        """What the data set itself has to say; it is asked last, as it stops at the first fault."""
        try:
            self.cls(root=self.root, split=split, **self.options)
        except (ValueError, OSError) as error:
            yield finding("cannot-open", f"split {split}: {error}", self.root, split=split)


def _list_pairs(source: Source, split: str, required: bool) -> Listing:
    cls, encoding = source.cls, source.encoding
    assert issubclass(cls, SegmentationDataset)
    assert encoding is not None
    photos = cls.find_photos(source.root, split)
    try:
        maps = cls.find_label_maps(source.root, split)
    except (FileNotFoundError, ValueError) as error:
        if "withholds" not in str(error):
            raise
        return Listing(split, [], [finding("withheld-labels", str(error), source.root, split=split)])
    findings = _gaps(photos, maps, split)
    keys = sorted(photos.keys() & maps.keys())
    if not keys:
        layout = cls.layout.format(split=cls.folder_of(split))
        message = (
            f"{source.root}: expected pairs of split {split!r} in {layout}, found {len(photos)} photos and"
            f" {len(maps)} label maps, of which 0 share a stem; correct the root or fill the split"
        )
        findings.insert(0, _empty(source, split, required, message))
    where, captions = _captions(source)
    read = cls.with_label_ids if encoding.tells_void_apart else Path
    frames = [
        Frame(
            split,
            key,
            photos[key],
            read(maps[key]),
            prompt=None if captions is None else captions.get(key, ""),
        )
        for key in keys
    ]
    findings += [
        finding(
            "missing-prompt",
            f"{frame.photo}: expected a caption for {frame.key} in {where}, found"
            f" {'an empty one' if frame.key in (captions or {}) else 'none'}; write one, or choose a prompt"
            " without {caption}",
            frame.photo,
            split=split,
            key=frame.key,
        )
        for frame in frames
        if frame.prompt is not None and not frame.prompt.strip()
    ]
    return Listing(split, frames, findings)


def _gaps(photos: Mapping[str, Path], maps: Mapping[str, Path], split: str) -> list[Finding]:
    """Files without a partner."""
    sides = (("photo-without-map", photos, maps, "label map"), ("map-without-photo", maps, photos, "photo"))
    return [
        finding(
            code,
            f"{files[key]}: expected a {lacking} of the same stem, found none; the file is left out",
            files[key],
            split=split,
            key=key,
        )
        for code, files, others, lacking in sides
        for key in sorted(files.keys() - others.keys())
    ]


def _captions(source: Source) -> tuple[Path, Mapping[str, str] | None]:
    """The captions, where the sentence asks for them; a file that cannot be read is told by opening."""
    given = source.options.get("captions")
    path = source.root / CAPTIONS if given is None else Path(given)
    try:
        return path, read_captions(path) if CAPTION in names_in(source.sentence) else None
    except (ValueError, OSError):
        return path, None


def _list_rows(source: Source, split: str, required: bool) -> Listing:
    dataset = source.cls(root=source.root, split=split, **source.options)
    assert isinstance(dataset, TriplesDataset)
    findings, frames = [], []
    for key, row in zip(dataset.keys, dataset.rows, strict=True):
        labels = row.label if dataset.space is not None else None
        frame = Frame(split, key, row.target, labels, row.control, row.prompt)
        lost = [path for path in frame.files if not path.is_file()]
        findings += [
            finding(
                "missing-file",
                f"{path}: expected a file, as the row of {key} names it, found none; correct the row",
                path,
                split=split,
                key=key,
            )
            for path in lost
        ]
        if not lost:
            frames.append(frame)
        if CAPTION in dataset.prompts.names and not row.prompt.strip():
            message = f"{row.target}: expected a prompt in its row, found an empty one; write one"
            place = {"severity": "warning", "split": split, "key": key}  # it trains as an unprompted sample
            findings.append(finding("missing-prompt", message, row.target, **place))
    if not frames:
        message = f"{source.root}: expected rows of split {split!r} whose files are there, found none"
        findings.insert(0, _empty(source, split, required, message))
    return Listing(split, frames, findings)


def _empty(source: Source, split: str, required: bool, message: str) -> Finding:
    severity = "error" if required else "warning"
    return finding("empty-split", message, source.root, severity=severity, split=split)


def _file_in(error: Exception) -> Path | None:
    """The file that an error of two files of one stem names first."""
    words = str(error).split(" found ")[-1].split(" and ")
    return Path(words[0]) if len(words) > 1 else None
