"""The rendered tree as a data set: Cityscapes' own loader, and a caption for each frame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from datasets.base import CAPTIONS, LabelSample, Sample
from datasets.cityscapes import CityscapesDataset
from datasets.label_space import Size
from datasets.streets.tree import CARD


class StreetsDataset(CityscapesDataset):
    """Street scenes as `tool_make_streets.py` writes them."""

    source = "python tool_make_streets.py"

    default_root = "data/streets"
    default_size = (128, 256)
    default_prompt = ""

    def __init__(
        self,
        root: str | Path | None = None,
        split: str | None = None,
        size: Size | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> None:
        """As `SegmentationDataset`; a `prompt` replaces the captions of all frames."""
        check_rendered_size(Path(root or self.default_root), size or self.default_size)
        super().__init__(root, split, size, prompt, **options)
        self.captions = {} if prompt else read_captions(self.root)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """One frame as a sample, with its caption."""
        sample = super().sample(index, rng)
        return {**sample, "txt": self.captions.get(sample["key"], self.prompt)}

    @classmethod
    def preview(
        cls,
        count: int,
        *,
        root: str | Path = "data/streets",
        split: str = "val",
        size: Size = (128, 256),
        prompt: str | None = None,
        hint: str = "colours",
    ) -> list[LabelSample | Sample]:
        """The first `count` frames of a split, with their captions."""
        samples = super().preview(count, root=root, split=split, size=size, prompt=prompt or "", hint=hint)
        captions = {} if prompt else read_captions(Path(root))
        for sample in samples:
            sample["txt"] = captions.get(sample["key"], sample["txt"])
        return samples


def check_rendered_size(root: Path, size: Size) -> None:
    """Refuse to enlarge frames: they can be rendered at any size."""
    if not (root / CARD).is_file():
        return
    rendered = json.loads((root / CARD).read_text(encoding="utf-8"))["size"]
    if size[0] > rendered[0] or size[1] > rendered[1]:
        raise ValueError(
            f"{root} was rendered at {rendered[0]}x{rendered[1]}, below the {size[0]}x{size[1]} asked for; "
            f"render another folder: python tool_make_streets.py --size {size[0]} {size[1]} --out DIR"
        )


def read_captions(root: Path) -> dict[str, str]:
    """Caption by stem."""
    path = root / CAPTIONS
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the captions of the frames, found no such file; the rendering is unfinished."
            f" Continue it with: python tool_make_streets.py --out {root}"
        )
    return json.loads(path.read_text(encoding="utf-8"))
