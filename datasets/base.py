"""What every data set hands out, and how a frame of any size becomes a sample of one.

Samples are numpy arrays and strings: torch's DataLoader and its default collate take them as they
are, so nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NotRequired, Self, TypedDict

import cv2
import numpy as np
from numpy.typing import NDArray

from datasets.framing import Framing, Window
from datasets.hint_encoding import HintEncoding
from datasets.label_space import Ids, LabelSpace, Rgb, Size, resize_labels
from datasets.prompts import CLASSES, Prompts

CAPTIONS = "captions.json"  # of a tree, by stem
SIZE_STEP = 64  # 8x of the VAE times 8x of the UNet


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
    """A hint that is no label map, perhaps with one."""

    hint: NDArray[np.float32]  # (H, W, 3) in [0, 1]
    txt: str
    key: str
    label: NotRequired[NDArray[np.int64]]  # (H, W) train ids, 255 = void


class View(NamedTuple):
    """What a sample shows beside its photo, before it becomes floats."""

    key: str
    ids: Ids | None  # (H, W) checked file ids
    control: Rgb | None = None  # (H, W, 3), where the hint is no label map


# The window of a frame (H, W) with a map of file ids (h, w), which may have another resolution, or without.
Choose = Callable[[Size, Ids | None], Window]


class FramedDataset:
    """Frames that become samples of one size, each with a prompt.

    A concrete data set finds its frames, sets `space`, calls `set_prompts` with the captions, and implements
    `__len__`, `key_of`, `files`, `view` and `conditions`.
    """

    source: ClassVar[str]  # where the data set is obtained
    default_root: ClassVar[str]
    default_split: ClassVar[str] = "train"
    default_size: ClassVar[Size | None]  # None: each frame's own
    default_prompt: ClassVar[str]
    prompts: Prompts
    space: LabelSpace | None  # of the ids, where there are any

    def __init__(
        self,
        root: str | Path | None = None,
        split: str | None = None,
        size: Size | None = None,
        prompt: str | None = None,
        *,
        crop: str = "none",
        zoom: tuple[float, float] = (1.0, 1.0),
        flip: float = 0.0,
        words: Mapping[str, Sequence[str]] | None = None,
        drop_prompt: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Check the options; no file is looked at.

        size              (H, W) of a sample
        prompt            a sentence of `datasets.prompts`, with its words and the seed that draws among them
        crop, zoom, flip  as in `datasets.framing.Framing`
        drop_prompt       share of samples that get none
        """
        self.root = Path(self.default_root if root is None else root)
        self.split = self.default_split if split is None else split
        size = self.default_size if size is None else size
        self.size = None if size is None else check_size(size)
        self.prompt = self.default_prompt if prompt is None else prompt
        self.framing = Framing(self.size, crop, (zoom[0], zoom[1]), flip)
        self.words, self.seed = dict(words or {}), seed
        if not 0 <= drop_prompt <= 1:
            raise ValueError(f"expected a share of prompts that are dropped in 0..1, found {drop_prompt}")
        self.drop_prompt = drop_prompt

    def __getitem__(self, index: int) -> Any:
        """One frame as a sample; a random window is the same every time, see `sample` for others."""
        return self.sample(index, np.random.default_rng(index))

    def __len__(self) -> int:
        """Number of frames."""
        raise NotImplementedError

    def sample(self, index: int, rng: np.random.Generator, shown: int | None = None) -> Any:
        """One frame as a sample, its window drawn by `rng`; around a pixel of train id `shown`, if given."""
        photo, view = self.view(index, lambda frame, ids: self.window(frame, ids, rng, shown, index))
        return {"jpg": to_signed(photo), **self.conditions(view, rng)}

    def window(
        self, frame: Size, ids: Ids | None, rng: np.random.Generator, shown: int | None, index: int
    ) -> Window:
        """The window that `rng` draws."""
        return self.framing.window(frame, rng)

    def key_of(self, index: int) -> str:
        """Name of a frame."""
        raise NotImplementedError

    def files(self, index: int) -> tuple[Path, ...]:
        """Files that a frame is made of."""
        raise NotImplementedError

    def view(self, index: int, choose: Choose) -> tuple[Rgb, View]:
        """Photo (H, W, 3) of one frame, and what else its sample shows, in the window of `choose`."""
        raise NotImplementedError

    def conditions(self, view: View, rng: np.random.Generator) -> Any:
        """A sample without its photo; `rng` draws whether it has a prompt."""
        raise NotImplementedError

    def still(self, split: str) -> Self:
        """Another split as this one is seen, but nothing drawn: centres instead of random windows."""
        crop = "none" if self.framing.crop == "none" else "centre"
        options = {"crop": crop, "words": self.words, "seed": self.seed, **self.own_options()}
        return type(self)(self.root, split, self.size, self.prompt, **options)

    def own_options(self) -> dict[str, Any]:
        """Options that a data set has beside those of all."""
        return {}

    def set_prompts(self, captions: Mapping[str, str] | None, keys: Iterable[str], where: str) -> None:
        """Check the sentence against the frames; `where` names the captions."""
        self.prompts = Prompts(self.prompt, words=self.words, captions=captions, seed=self.seed)
        self.prompts.check_keys(keys, where)

    def prompt_of(self, view: View) -> str:
        """The prompt of what a sample shows."""
        if CLASSES not in self.prompts.names:
            return self.prompts.of(view.key)
        assert self.space is not None
        assert view.ids is not None
        return self.prompts.of(view.key, self.space.to_train_ids(view.ids, where=view.key), self.space)

    def prompt_or_none(self, view: View, rng: np.random.Generator) -> str:
        """The prompt of a sample, or none, as `rng` has it."""
        return "" if rng.random() < self.drop_prompt else self.prompt_of(view)


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
    return shown_labels(resize_labels(file_ids, check_size(size)), encoding, txt=txt, key=key)


def shown_labels(ids: Ids, encoding: HintEncoding, *, txt: str, key: str) -> LabelSample:
    """Hint and label of checked file ids at the size of the sample."""
    label = encoding.space.to_train_ids(ids, where=key).astype(np.int64)
    return {"hint": encoding.encode(ids), "txt": txt, "label": label, "key": key}
