"""What all data sets of photos and label maps share: pairs by stem, checked ids, hints in an encoding.

A new data set says where its files are and which ids they hold.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from datasets.base import (
    CAPTIONS,
    Choose,
    FramedDataset,
    LabelSample,
    Sample,
    View,
    label_sample,
    resize_image,
    shown_labels,
    to_signed,
)
from datasets.files import read_image, read_labels
from datasets.framing import Window
from datasets.hint_encoding import HintEncoding, hint_encoding
from datasets.label_space import Ids, LabelSpace, RawIds, Rgb, Size, resize_labels
from datasets.prompts import Prompts, read_captions

log = logging.getLogger(__name__)

WINDOW_TRIES = 10  # for one that shows a rare class
SHAPE_TOLERANCE = 0.01  # of height / width, between a photo and its label map


@dataclass(frozen=True)
class Pair:
    """A photo and the label map of the same frame."""

    key: str
    image: Path
    labels: Path


class SegmentationDataset(FramedDataset):
    """Photos paired with label maps by stem, at one size.

    A concrete data set sets `label_space`, `layout` and `source`, and implements `find_photos`,
    `find_label_maps` and `splits`; it overrides `with_label_ids` where its files may hold train ids.
    """

    label_space: ClassVar[str]  # a name for LabelSpace.load
    layout: ClassVar[str]  # the files that belong to a split, for errors
    default_size: ClassVar[Size]
    size: Size
    space: LabelSpace

    def __init__(
        self,
        root: str | Path | None = None,
        split: str | None = None,
        size: Size | None = None,
        prompt: str | None = None,
        *,
        hint: str = "colours",
        captions: str | Path | None = None,
        **options: Any,
    ) -> None:
        """Find the pairs of `split`; none is an error, files without a partner are left out.

        hint      an encoding of `datasets.hint_encoding`
        captions  a file; by default captions.json of the root, if it is there
        options   as of `FramedDataset`
        """
        super().__init__(root, split, size, prompt, **options)
        self.space = LabelSpace.load(self.label_space)
        self.encoding = hint_encoding(self.space, hint)
        self.pairs = self._find_pairs()
        self.captions = self.root / CAPTIONS if captions is None else Path(captions)
        texts = read_captions(self.captions) if captions is not None or self.captions.is_file() else None
        self.set_prompts(texts, (pair.key for pair in self.pairs), f"{self.captions}, split {self.split}")

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def key_of(self, index: int) -> str:
        """Stem of a pair."""
        return self.pairs[index].key

    def files(self, index: int) -> tuple[Path, ...]:
        """Photo and label map."""
        return self.pairs[index].image, self.labels_of(self.pairs[index])

    def view(self, index: int, choose: Choose) -> tuple[Rgb, View]:
        """Photo and file ids of one pair in the window of `choose`."""
        pair = self.pairs[index]
        photo, ids = read_image(pair.image), self.read_file_ids(pair.labels, self.encoding)
        frame = (photo.shape[0], photo.shape[1])
        check_same_frame(frame, pair.image, ids.shape, pair.labels)
        window = choose(frame, ids)
        shown = resize_labels(window.cut(ids), self.size)
        return resize_image(window.cut(photo), self.size), View(pair.key, shown)

    def conditions(self, view: View, rng: np.random.Generator) -> LabelSample:
        """Hint, label and prompt."""
        assert view.ids is not None
        return shown_labels(view.ids, self.encoding, txt=self.prompt_or_none(view, rng), key=view.key)

    def window(
        self, frame: Size, ids: Ids | None, rng: np.random.Generator, shown: int | None, index: int
    ) -> Window:
        """The window that `rng` draws; around a pixel of train id `shown`, if given.

        Where the class is so small that the sample, which is smaller than its window, would miss it, another
        window is tried, a few times.
        """
        window, pair = self.framing.window(frame, rng), self.pairs[index]
        if shown is None:
            return window
        assert ids is not None
        held = self.space.to_train_ids(ids, where=pair.key) == shown
        places = np.argwhere(held)
        if not len(places):
            raise ValueError(
                f"{pair.labels}: expected train id {shown}, as the class statistics say, found none; the"
                " statistics are of other maps: remove their files from the data root"
            )
        for _ in range(WINDOW_TRIES):
            y, x = (int(place) for place in places[rng.integers(len(places))])
            pixel = (y * frame[0] // ids.shape[0], x * frame[1] // ids.shape[1])
            window = self.framing.moved(window, pixel, rng)
            if resize_labels(window.cut(held), self.size).any():
                break
        return window

    def labels_of(self, pair: Pair) -> Path:
        """The label file that is read for a pair: of label ids, where the encoding needs them."""
        return self.with_label_ids(pair.labels) if self.encoding.tells_void_apart else pair.labels

    def own_options(self) -> dict[str, Any]:
        """The encoding, and the captions where there are any."""
        captions = self.captions if self.prompts.captions is not None else None
        return {"hint": self.encoding.name, "captions": captions}

    @classmethod
    def folder_of(cls, split: str) -> str:
        """What a split is called on disk."""
        return split

    @classmethod
    def find_photos(cls, root: Path, split: str) -> dict[str, Path]:
        """Photo by stem, of this split only."""
        raise NotImplementedError

    @classmethod
    def find_label_maps(cls, root: Path, split: str) -> dict[str, Path]:
        """Label map by stem, of this split only."""
        raise NotImplementedError

    @classmethod
    def splits(cls, root: Path) -> list[str]:
        """Names of the splits that are on disk."""
        raise NotImplementedError

    @classmethod
    def holds_train_ids(cls, path: Path) -> bool:
        """Whether a label file holds train ids; by its name, as nothing in a file tells."""
        return False

    @classmethod
    def with_label_ids(cls, path: Path) -> Path:
        """The file of the same frame that holds label ids, if there is one; else the file itself."""
        return path

    @classmethod
    def read_raw_ids(cls, path: Path) -> RawIds:
        """What a label file holds, not checked."""
        return read_labels(path)

    @classmethod
    def read_file_ids(cls, path: Path, encoding: HintEncoding | None = None) -> Ids:
        """Checked file ids of one label file; of train ids those that stand for them, if that is enough."""
        if encoding is not None and encoding.tells_void_apart:
            path = cls.with_label_ids(path)
        space = LabelSpace.load(cls.label_space)
        if not cls.holds_train_ids(path):
            return space.check_file_ids(cls.read_raw_ids(path), where=str(path))
        if encoding is not None and encoding.tells_void_apart:
            raise ValueError(
                f"{path}: expected label ids, because the hint encoding {encoding.name!r} tells void classes"
                " apart, found train ids; add the file of label ids or choose another encoding."
            )
        return space.to_file_ids(cls.read_raw_ids(path), where=str(path))

    @classmethod
    def read_train_ids(cls, path: Path) -> Ids:
        """Checked train ids of one label file."""
        return LabelSpace.load(cls.label_space).to_train_ids(cls.read_file_ids(path), where=str(path))

    @classmethod
    def label_maps(cls, root: str | Path, split: str = "val") -> dict[str, Path]:
        """Label map by stem, with or without a photo: what to generate from."""
        found = cls.find_label_maps(Path(root), split)
        if not found:
            raise FileNotFoundError(cls._nothing_found(Path(root), split, "0 label maps"))
        return dict(sorted(found.items()))

    @classmethod
    def preview(
        cls, count: int, *, root: str | Path, split: str, size: Size, prompts: Prompts, hint: str = "colours"
    ) -> list[LabelSample | Sample]:
        """The first `count` label maps of a split as samples, whole, with their photo where there is one."""
        encoding = hint_encoding(LabelSpace.load(cls.label_space), hint)
        photos = cls.find_photos(Path(root), split)
        samples: list[LabelSample | Sample] = []
        for key, path in list(cls.label_maps(root, split).items())[:count]:
            labels = label_sample(cls.read_file_ids(path, encoding), size, encoding, txt="", key=key)
            labels["txt"] = prompts.of(key, labels["label"], encoding.space)
            photo = photos.get(key)
            samples.append(
                labels
                if photo is None
                else {"jpg": to_signed(resize_image(read_image(photo), size)), **labels}
            )
        return samples

    def _find_pairs(self) -> list[Pair]:
        photos = self.find_photos(self.root, self.split)
        maps = self.find_label_maps(self.root, self.split)
        pairs = [Pair(stem, photos[stem], maps[stem]) for stem in sorted(photos.keys() & maps.keys())]
        if not pairs:
            found = f"{len(photos)} photos and {len(maps)} label maps, of which 0 share a stem"
            raise FileNotFoundError(self._nothing_found(self.root, self.split, found))
        _warn_of_unpaired("photos have no label map", photos, maps)
        _warn_of_unpaired("label maps have no photo", maps, photos)
        return pairs

    @classmethod
    def _nothing_found(cls, root: Path, split: str, found: str) -> str:
        layout = cls.layout.format(split=cls.folder_of(split))
        present = ", ".join(cls.splits(root)) or "none"
        return (
            f"{root}: expected {layout}, found {found} (splits on disk: {present})."
            f" Set the data root to the folder that holds them; the data are at {cls.source}"
        )


def index_by_stem(paths: Iterable[Path], suffix: str = "") -> dict[str, Path]:
    """Files by their name without `suffix`, by default without whatever suffix they have.

    The same stem twice is an error, hidden files are skipped.
    """
    found: dict[str, Path] = {}
    for path in sorted(paths):
        stem = path.name.removesuffix(suffix or path.suffix)
        if path.name.startswith("."):  # macOS leaves "._name.png" beside "name.png"
            continue
        if stem in found:
            raise ValueError(
                f"expected one file for {stem}, found {found[stem]} and {path}; remove or rename one of them."
            )
        found[stem] = path
    return found


def files_by_stem(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """Files of a folder by stem, whatever the case of their suffix."""
    return index_by_stem(path for path in folder.glob("*") if path.suffix.lower() in suffixes)


def _warn_of_unpaired(what: str, files: Mapping[str, Path], others: Mapping[str, Path]) -> None:
    alone = sorted(files.keys() - others.keys())
    if alone:
        first = files[alone[0]]
        log.warning("%d of %d %s and are left out; the first is %s", len(alone), len(files), what, first)


def check_same_frame(frame: Size, photo: Path, shape: tuple[int, ...], other: Path) -> None:
    """Refuse a map or a control (H, W, ...) of another aspect ratio than its photo."""
    (h, w), (H, W) = frame, shape[:2]
    if abs(h * W / (w * H) - 1) > SHAPE_TOLERANCE:
        raise ValueError(
            f"{other}: expected a map in the shape of its photo ({h}x{w}, {photo}), found {H}x{W};"
            " one of the two was cropped or turned."
        )
