"""The rendered tree as a data set: Cityscapes' own loader, and a caption for each frame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets.base import CAPTIONS
from datasets.cityscapes import CityscapesDataset
from datasets.label_space import Size
from datasets.prompts import read_captions
from datasets.streets.tree import CARD


class StreetsDataset(CityscapesDataset):
    """Street scenes as `tool_make_streets.py` writes them."""

    source = "python tool_make_streets.py"

    default_root = "data/streets"
    default_size = (128, 256)
    default_prompt = "{caption}"

    def __init__(
        self,
        root: str | Path | None = None,
        split: str | None = None,
        size: Size | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> None:
        """As `SegmentationDataset`, of a tree that is rendered to its end and large enough."""
        root = Path(self.default_root if root is None else root)
        check_finished(root)
        check_rendered_size(root, size or self.default_size)
        super().__init__(root, split, size, prompt, **options)


def check_finished(root: Path) -> None:
    """Refuse a tree without captions: they are written last."""
    if not (root / CAPTIONS).is_file():
        raise FileNotFoundError(
            f"{root / CAPTIONS}: expected the captions of the frames, found no such file; the rendering is"
            f" unfinished. Continue it with: python tool_make_streets.py --out {root}"
        )


def captions_of_tree(root: Path) -> dict[str, str]:
    """Caption by stem of a tree that is rendered to its end."""
    check_finished(root)
    return read_captions(root / CAPTIONS)


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
