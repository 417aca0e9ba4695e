"""A hint from any file that a user has: label ids, train ids, a painted label map, or a picture as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datasets.base import CAPTIONS, check_size
from datasets.files import IMAGE_SUFFIXES, is_colour_map, read_image, read_labels
from datasets.hint_encoding import HintEncoding
from datasets.label_space import Ids, LabelSpace, Size, resize_labels
from datasets.prompts import CLASSES, Prompts, names_in, read_captions

LABEL_MAPS = ("labelIds", "labelTrainIds", "color")
FRAME_MAPS = {  # by hint type: which of a frame's maps is taken
    "auto": LABEL_MAPS,
    "label_ids": LABEL_MAPS,
    "train_ids": ("labelTrainIds", "labelIds", "color"),
    "colours": ("color", "labelIds", "labelTrainIds"),
    "image": ("color", "labelIds", "labelTrainIds"),
}
INSTANCE_MAPS = ("instanceIds", "instanceTrainIds")

READERS: dict[str, Callable[[Path, LabelSpace], Ids]] = {
    "label_ids": lambda path, space: space.check_file_ids(read_labels(path), str(path)),
    "train_ids": lambda path, space: space.to_file_ids(read_labels(path), str(path)),
    "colours": lambda path, space: space.to_file_ids(
        space.from_colours(read_image(path), str(path)), str(path)
    ),
}
HINT_TYPES = ("auto", *READERS, "image")


def find_hints(path: Path, kind: str = "auto") -> list[Path]:
    """The file itself, or the maps of a folder and its subfolders by name, one for each frame."""
    if path.is_file():
        return [path]
    pictures = [
        p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
    ]
    if not pictures:
        raise FileNotFoundError(f"{path}: expected a hint or a folder of hints, found no picture there")
    return one_a_frame(pictures, FRAME_MAPS[kind])


def one_a_frame(paths: list[Path], preferred: tuple[str, ...]) -> list[Path]:
    """Of the maps that a Cityscapes tree has of a frame the first of `preferred`, and no instance maps."""
    frames: dict[Path, list[Path]] = {}
    for path in paths:
        frame, _, kind = path.stem.rpartition("_")
        if kind not in INSTANCE_MAPS:
            frames.setdefault(path.with_name(frame) if kind in preferred else path, []).append(path)
    return sorted(min(maps, key=lambda p: rank(p, preferred)) for maps in frames.values())


def rank(path: Path, preferred: tuple[str, ...]) -> int:
    """Position of a map's kind in `preferred`."""
    kind = path.stem.rpartition("_")[2]
    return preferred.index(kind) if kind in preferred else 0


def find_caption(path: Path) -> str | None:
    """The caption of a map's frame, where a data set above it has them in `captions.json` by stem."""
    for folder in list(path.resolve().parents)[:4]:
        if (folder / CAPTIONS).is_file():
            return captions_of(folder / CAPTIONS).get(stem_of(path))
    return None


@lru_cache(maxsize=4)
def captions_of(path: Path) -> dict[str, str]:
    """Caption by stem; of a file that holds something else none."""
    try:
        return read_captions(path)
    except ValueError:
        return {}


def detect_hint_type(path: Path) -> str:
    """Colours by content; ids by name, as nothing in a file tells label ids from train ids."""
    if is_colour_map(path):
        return "colours"
    for ending, kind in (("labelTrainIds", "train_ids"), ("labelIds", "label_ids")):
        if path.stem.endswith(ending):
            return kind
    raise ValueError(
        f"{path}: label ids and train ids cannot be told apart here; expected a name that ends in _labelIds "
        "or _labelTrainIds, or --hint_type label_ids or train_ids"
    )


def read_hint(path: Path, kind: str, encoding: HintEncoding, size: Size | None) -> NDArray[np.float32]:
    """One hint (H, W, C) float32 in [0, 1], at `size` or else at its own.

    kind      one of HINT_TYPES; "image" takes the picture itself, resized to the nearest pixel like every map
    encoding  how it is painted; its label space is that of the file's ids or colours
    """
    kind = detect_hint_type(path) if kind == "auto" else kind
    if kind not in HINT_TYPES:
        raise ValueError(f"unknown hint type {kind!r}; choose one of {', '.join(HINT_TYPES)}")
    if kind == "image":
        image = read_image(path)
        return resize_labels(image, check_size(size or image.shape[:2])).astype(np.float32) / np.float32(255)
    if kind != "label_ids" and encoding.tells_void_apart:
        raise ValueError(
            f"{path}: expected label ids, because the hint encoding {encoding.name!r} tells void classes"
            f" apart, found {kind.replace('_', ' ')}"
        )
    return encoding.encode(read_ids(path, kind, encoding.space, size))


def read_ids(path: Path, kind: str, space: LabelSpace, size: Size | None) -> Ids:
    """File ids (H, W) of a hint that is a label map, at `size` or else at its own."""
    kind = detect_hint_type(path) if kind == "auto" else kind
    if kind not in READERS:
        raise ValueError(f"{path}: expected a label map, found a hint of type {kind}")
    ids = READERS[kind](path, space)
    return resize_labels(ids, check_size(size or ids.shape))


def prompt_of(
    path: Path,
    sentence: str,
    *,
    kind: str,
    space: LabelSpace,
    size: Size | None,
    words: Mapping[str, Sequence[str]],
    seed: int,
) -> str:
    """A sentence of `datasets.prompts` for one hint, filled in as for the frame that it belongs to."""
    stem, train_ids = stem_of(path), None
    if CLASSES in names_in(sentence):
        train_ids = space.to_train_ids(read_ids(path, kind, space, size), where=str(path))
    captions = {stem: find_caption(path) or ""}
    return Prompts(sentence, words=words, captions=captions, seed=seed).of(stem, train_ids, space)


def stem_of(path: Path) -> str:
    """Key of the frame that a map belongs to."""
    return path.stem.partition("_gtFine")[0]
