"""What every data set hands out, and the steps that all segmentation data sets share.

Samples are numpy arrays and strings: torch's DataLoader and its default collate take them as they
are, so nothing here needs torch. A new data set says where its files are and which ids they hold.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self, TypedDict

import cv2
import numpy as np
from numpy.typing import NDArray

from datasets.files import read_image, read_labels
from datasets.framing import Framing
from datasets.hint_encoding import HintEncoding, hint_encoding
from datasets.label_space import Ids, LabelSpace, RawIds, Rgb, Size, resize_labels
from datasets.prompts import Prompts, read_captions

log = logging.getLogger(__name__)

CAPTIONS = "captions.json"  # of a tree, by stem
SIZE_STEP = 64  # 8x of the VAE times 8x of the UNet
SHAPE_TOLERANCE = 0.01  # of height / width, between a photo and its label map


class LabelSample(TypedDict):
    """A label map without a photo: enough to generate from."""

    hint: NDArray[np.float32]  # (H, W, C) in [0, 1]
    txt: str
    label: NDArray[np.int64]  # (H, W) train ids, 255 = void
    key: str


class Sample(LabelSample):
    """A photo with its label map: enough to train on."""

    jpg: NDArray[np.float32]  # (H, W, 3) in [-1, 1]


class ControlSample(TypedDict):
    """A photo with a hint that is no label map."""

    jpg: NDArray[np.float32]  # (H, W, 3) in [-1, 1]
    hint: NDArray[np.float32]  # (H, W, 3) in [0, 1]
    txt: str
    key: str


@dataclass(frozen=True)
class Pair:
    """A photo and the label map of the same frame."""

    key: str
    image: Path
    labels: Path


class SegmentationDataset:
    """Photos paired with label maps by stem, at one size.

    A concrete data set sets `label_space`, `layout` and `source`, and implements `find_photos`,
    `find_label_maps` and `splits`; it overrides `with_label_ids` where its files may hold train ids.
    """

    label_space: ClassVar[str]  # a name for LabelSpace.load
    layout: ClassVar[str]  # the files that belong to a split, for errors
    source: ClassVar[str]  # where the data set is obtained
    default_root: ClassVar[str]
    default_split: ClassVar[str] = "train"
    default_size: ClassVar[Size]
    default_prompt: ClassVar[str]

    def __init__(
        self,
        root: str | Path | None = None,
        split: str | None = None,
        size: Size | None = None,
        prompt: str | None = None,
        *,
        hint: str = "colours",
        crop: str = "none",
        zoom: tuple[float, float] = (1.0, 1.0),
        flip: float = 0.0,
        words: Mapping[str, Sequence[str]] | None = None,
        captions: str | Path | None = None,
        drop_prompt: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Find the pairs of `split`; none is an error, files without a partner are left out.

        size              (H, W) of a sample
        prompt            a sentence of `datasets.prompts`, with its words and the seed that draws among them
        hint              an encoding of `datasets.hint_encoding`
        crop, zoom, flip  as in `datasets.framing.Framing`
        captions          a file; by default captions.json of the root, if it is there
        drop_prompt       share of samples that get none
        """
        self.root = Path(self.default_root if root is None else root)
        self.split = self.default_split if split is None else split
        self.size = check_size(self.default_size if size is None else size)
        self.prompt = self.default_prompt if prompt is None else prompt
        self.framing = Framing(self.size, crop, (zoom[0], zoom[1]), flip)
        self.space = LabelSpace.load(self.label_space)
        self.encoding = hint_encoding(self.space, hint)
        self.pairs = self._find_pairs()
        self.captions = self.root / CAPTIONS if captions is None else Path(captions)
        texts = read_captions(self.captions) if captions is not None or self.captions.is_file() else None
        self.prompts = Prompts(self.prompt, words=words, captions=texts, seed=seed)
        self.prompts.check_keys((pair.key for pair in self.pairs), str(self.captions))
        self.drop_prompt = check_share(drop_prompt, "of prompts that are dropped")

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """One pair as a sample; a random window is the same every time, see `sample` for others."""
        return self.sample(index, np.random.default_rng(index))

    def sample(self, index: int, rng: np.random.Generator, shown: int | None = None) -> Sample:
        """One pair as a sample, its window drawn by `rng`; around a pixel of train id `shown`, if given."""
        pair = self.pairs[index]
        image, ids = read_image(pair.image), self.read_file_ids(pair.labels, self.encoding)
        _check_same_frame(image, ids, pair)
        frame = (image.shape[0], image.shape[1])
        window = self.framing.window(frame, rng)
        if shown is not None:
            places = np.argwhere(self.space.to_train_ids(ids, where=pair.key) == shown)
            y, x = (int(place) for place in places[rng.integers(len(places))])
            pixel = (y * frame[0] // ids.shape[0], x * frame[1] // ids.shape[1])
            window = self.framing.moved(window, pixel, rng)
        labels = label_sample(window.cut(ids), self.size, self.encoding, txt="", key=pair.key)
        if rng.random() >= self.drop_prompt:
            labels["txt"] = self.prompts.of(pair.key, labels["label"], self.space)
        return {"jpg": to_signed(resize_image(window.cut(image), self.size)), **labels}

    def still(self, split: str) -> Self:
        """Another split as this one is seen, but nothing drawn: centres instead of random windows."""
        return type(self)(
            self.root,
            split,
            self.size,
            self.prompt,
            hint=self.encoding.name,
            crop="none" if self.framing.crop == "none" else "centre",
            words=self.prompts.words,
            captions=self.captions if self.prompts.captions is not None else None,
            seed=self.prompts.seed,
        )

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


def check_share(share: float, what: str) -> float:
    """The share itself, if it is one."""
    if not 0 <= share <= 1:
        raise ValueError(f"expected a share {what} in 0..1, found {share}")
    return share


def check_size(size: Size) -> Size:
    """The size itself, if both sides are positive multiples of 64."""
    height, width = (int(side) for side in size)
    valid = tuple(max(1, (side + SIZE_STEP // 2) // SIZE_STEP) * SIZE_STEP for side in (height, width))
    if (height, width) != valid:
        raise ValueError(
            f"size {height}x{width}: height and width must be multiples of {SIZE_STEP};"
            f" the nearest valid size is {valid[0]}x{valid[1]} (height x width)."
        )
    return height, width


def resize_image(image: Rgb, size: Size) -> Rgb:
    """An image at (H, W), without aliasing: sides that shrink are averaged, sides that grow interpolated."""
    height, width = size
    inner = (min(image.shape[0], height), min(image.shape[1], width))
    if image.shape[:2] != inner:
        image = np.asarray(cv2.resize(image, inner[::-1], interpolation=cv2.INTER_AREA), np.uint8)
    if inner != (height, width):
        image = np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
    return image


def to_signed(image: Rgb) -> NDArray[np.float32]:
    """0..255 to [-1, 1], the range of the VAE."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def label_sample(file_ids: Ids, size: Size, encoding: HintEncoding, *, txt: str, key: str) -> LabelSample:
    """Hint and label at (H, W) from checked file ids of any size."""
    ids = resize_labels(file_ids, check_size(size))
    label = encoding.space.to_train_ids(ids, where=key).astype(np.int64)
    return {"hint": encoding.encode(ids), "txt": txt, "label": label, "key": key}


def index_by_stem(paths: Iterable[Path], suffix: str) -> dict[str, Path]:
    """Files by their name without `suffix`; the same stem twice is an error, hidden files are skipped."""
    found: dict[str, Path] = {}
    for path in sorted(paths):
        stem = path.name.removesuffix(suffix)
        if path.name.startswith("."):  # macOS leaves "._name.png" beside "name.png"
            continue
        if stem in found:
            raise ValueError(
                f"expected one file for {stem}, found {found[stem]} and {path}; remove or rename one of them."
            )
        found[stem] = path
    return found


def _warn_of_unpaired(what: str, files: Mapping[str, Path], others: Mapping[str, Path]) -> None:
    alone = sorted(files.keys() - others.keys())
    if alone:
        first = files[alone[0]]
        log.warning("%d of %d %s and are left out; the first is %s", len(alone), len(files), what, first)


def _check_same_frame(image: Rgb, ids: Ids, pair: Pair) -> None:
    (h, w), (H, W) = image.shape[:2], ids.shape
    if abs(h * W / (w * H) - 1) > SHAPE_TOLERANCE:
        raise ValueError(
            f"{pair.labels}: expected a map in the shape of its photo ({h}x{w}, {pair.image}), found {H}x{W};"
            " one of the two was cropped or turned."
        )
