"""Folders of real images, of generated images and of label maps, told apart and paired by the frame's key."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cldm.pictures import SETTINGS_KEY
from datasets import DATASETS
from datasets.cityscapes import PHOTO
from datasets.files import IMAGE_SUFFIXES, is_colour_map, read_image
from datasets.hints import READERS, find_hints, stem_of
from datasets.label_space import Ids, LabelSpace, Rgb, Size, resize_labels
from datasets.segmentation import SegmentationDataset
from metrics.samples import NAME, key_of

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
SHAPE_TOLERANCE = 0.01  # of height / width
LABEL_KINDS = ("auto", *READERS)


@dataclass(frozen=True)
class Picture:
    """What a file says of itself before its pixels are read."""

    path: Path
    size: Size
    mode: str  # Pillow's, RGB and the like
    format: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # of generate.py


@dataclass(frozen=True)
class Item:
    """One image to be measured."""

    key: str  # of its frame; samples of one map have the same
    picture: Picture
    labels: Path | None = None
    predicted: Path | None = None  # what a segmenter elsewhere made of it


@dataclass(frozen=True)
class Reader:
    """How pixels and ids of one protocol are read: at one size, with one filter."""

    space: LabelSpace
    size: Size
    resize: str
    read_ids: Callable[[Path], Ids]  # train ids of a file, at its own size

    def image(self, item: Item) -> Rgb:
        """(H, W, 3) at the protocol's size."""
        return resize_picture(read_image(item.picture.path), self.size, self.resize)

    def labels(self, path: Path) -> Ids:
        """(H, W) train ids at the protocol's size, each the nearest."""
        return resize_labels(self.read_ids(path), self.size)


def resize_picture(image: Rgb, size: Size, name: str) -> Rgb:
    """An image at (H, W) by a filter of FILTERS; one of that size stays as it is."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), FILTERS[name]), np.uint8)


def peek(path: Path) -> Picture:
    """Size, mode, format and settings of an image file."""
    try:
        with Image.open(path) as image:
            text = image.info.get(SETTINGS_KEY)
            found = json.loads(text) if isinstance(text, str) else {}
            settings = found if isinstance(found, dict) else {}
            return Picture(path, (image.height, image.width), image.mode, str(image.format), settings)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for a foreign and a cut file
        raise ValueError(f"{path}: expected an image, found a file that is none ({error}).") from error


def pictures_below(folder: Path) -> list[Path]:
    """Every image file of a folder and its subfolders, by name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of images, found none at {folder}")
    found = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
    return sorted(found)


def class_of(dataset: str) -> type[SegmentationDataset]:
    """The class of a data set with label maps."""
    known = [name for name, entry in DATASETS.items() if entry.label_space]
    if dataset not in known:
        raise ValueError(f"expected a data set with label maps ({', '.join(known)}), found {dataset!r}")
    found: Any = DATASETS[dataset].load()
    return found


def is_root(path: Path, dataset: str) -> bool:
    """Whether a folder is the root of a data set and not a folder of files."""
    return any((path / name).is_dir() for name in DATASETS[dataset].expected)


# -- real images and label maps ----------------------------------------------------------------------------


def find_real(path: Path, dataset: str, split: str) -> dict[str, Path]:
    """Real image by key, of the root of a data set or of a folder."""
    if is_root(path, dataset):
        found = class_of(dataset).find_photos(path, split)
    else:
        found = unique(pictures_below(path), lambda p: p.stem.removesuffix(Path(PHOTO).stem))
    if not found:
        raise FileNotFoundError(f"{path}: expected real images of split {split}, found none")
    return dict(sorted(found.items()))


def find_maps(path: Path, dataset: str, split: str) -> dict[str, Path]:
    """Label map by key, of the root of a data set or of a folder."""
    if is_root(path, dataset):
        return class_of(dataset).label_maps(path, split)
    return dict(sorted(unique(find_hints(path), stem_of).items()))


def unique(paths: Sequence[Path], key: Callable[[Path], str]) -> dict[str, Path]:
    """Path by key; two of one key are refused."""
    found: dict[str, Path] = {}
    for path in paths:
        if found.setdefault(key(path), path) != path:
            raise ValueError(
                f"{found[key(path)]} and {path} are both called {key(path)}; name a folder of one"
            )
    return found


def id_reader(dataset: str, kind: str = "auto") -> Callable[[Path], Ids]:
    """A function from a label file to train ids (H, W).

    kind  one of LABEL_KINDS; auto takes colours by content, ids as the data set has them
    """
    cls, space = class_of(dataset), LabelSpace.load(class_of(dataset).label_space)
    if kind != "auto":
        return lambda path: space.to_train_ids(READERS[kind](path, space), where=str(path))

    def read(path: Path) -> Ids:
        if is_colour_map(path):
            return space.from_colours(read_image(path), str(path))
        return cls.read_train_ids(path)

    return read


# -- generated images --------------------------------------------------------------------------------------


def find_fake(folder: Path, keys: Sequence[str]) -> list[Item]:
    """Generated images in the order of their keys and seeds.

    Of a folder of generate.py its samples, else every image; each belongs to the map that its settings name,
    or that it is called after. `keys` are those of the maps; without any every image is let pass.
    """
    paths = pictures_below(folder)
    samples = [path for path in paths if NAME.fullmatch(path.name)] or paths
    if len(samples) < 2:
        raise ValueError(f"{folder}: expected at least 2 generated images, found {len(samples)}")
    items = []
    for path in samples:
        picture = peek(path)
        items.append(Item(key_of(str(picture.settings.get("hint", path.name))), picture))
    known = set(keys)
    lost = [item for item in items if known and item.key not in known]
    if lost:
        raise ValueError(
            f"{lost[0].picture.path}: expected an image that is called after a label map such as"
            f" {keys[0]}, found {lost[0].key}, and {len(lost) - 1} more; name their maps with --labels"
        )
    return sorted(items, key=lambda item: (item.key, seed_of(item), str(item.picture.path)))


def seed_of(item: Item) -> int:
    """The seed of a sample; 0 if nothing tells."""
    digits = item.picture.path.stem.rpartition("_seed")[2]
    return int(item.picture.settings.get("seed", digits if digits.isdecimal() else 0))


def check_fake(items: Sequence[Item], size: Size) -> None:
    """Refuse generated images whose figures would mislead."""
    first = items[0].picture
    for picture in (item.picture for item in items):
        wrong = ""
        if picture.format != "PNG":
            wrong = f"expected a PNG, found {picture.format}, which has lost something; generate PNG files"
        elif picture.mode != "RGB":
            wrong = f"expected colours with 8 bits (RGB), found mode {picture.mode}; leave grey images out"
        elif picture.size != first.size:
            wrong = f"expected images of one size, found {said(picture.size)}, and {said(first.size)} before"
        if wrong:
            raise ValueError(f"{picture.path}: {wrong}")
    (height, width), (H, W) = first.size, size
    if height < H or width < W:
        raise ValueError(
            f"{first.path}: expected images of {said(size)} or more, found {said(first.size)}; enlarging them"
            " would measure the filter: choose another --protocol"
        )
    if abs(height / width - H / W) > SHAPE_TOLERANCE * H / W:
        raise ValueError(
            f"{first.path}: expected images of the shape of {said(size)}, found {said(first.size)}; squeezing"
            " them would change what is measured: choose another --protocol"
        )


def said(size: Size) -> str:
    """Height x width."""
    return f"{size[0]}x{size[1]}"


def first_samples(items: Sequence[Item], count: int) -> list[Item]:
    """The first `count` samples of each map; 0 takes all."""
    seen: dict[str, int] = {}
    kept = []
    for item in items:
        seen[item.key] = seen.get(item.key, 0) + 1
        if not count or seen[item.key] <= count:
            kept.append(item)
    return kept


# -- predicted maps ----------------------------------------------------------------------------------------


def with_predicted(items: Sequence[Item], folder: Path) -> list[Item]:
    """The same items, each with the map of its own name."""
    maps = unique(pictures_below(folder), lambda path: path.stem)
    names = [name_of(item) for item in items]
    if lost := [name for name in names if name not in maps]:
        raise ValueError(
            f"{folder}: expected a predicted map {lost[0]}.png, as the image is called, found none; it is one"
            f" of {len(lost)} that are missing"
        )
    return [
        Item(item.key, item.picture, item.labels, maps[name]) for item, name in zip(items, names, strict=True)
    ]


def name_of(item: Item) -> str:
    """What the predicted map of an image is called: as the image, or as its frame."""
    return item.picture.path.stem.removesuffix(Path(PHOTO).stem)


def read_predicted(path: Path, space: LabelSpace, size: Size) -> NDArray[np.uint8]:
    """Train ids (H, W) of a predicted map, each the nearest."""
    reader = partial(READERS["train_ids"], path, space)
    return resize_labels(space.to_train_ids(reader(), where=str(path)), size)
