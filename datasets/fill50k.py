"""Fill50k, the published exercise of control training: fill a circle outline with named colours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from datasets.base import ControlSample, check_size, resize_image, to_signed
from datasets.files import read_image
from datasets.label_space import Size

FIELDS = ("source", "target", "prompt")


class Fill50kDataset:
    """The folder with `prompt.json`, one JSON object a line: source (hint), target (image), prompt.

    `size` None keeps each file's own size, which is 512x512 in the published files.
    """

    source = "https://huggingface.co/lllyasviel/ControlNet/tree/main/training"

    def __init__(self, root: str | Path = "training/fill50k", size: Size | None = None) -> None:
        """Read the list of items; their files are read one by one, when asked for."""
        self.root = Path(root)
        self.size = None if size is None else check_size(size)
        self.items = self._read_index(self.root / "prompt.json")

    def __len__(self) -> int:
        """Number of items."""
        return len(self.items)

    def __getitem__(self, index: int) -> ControlSample:
        """One image with its hint and prompt."""
        item = self.items[index]
        target, hint = (read_image(self.root / item[field]) for field in ("target", "source"))
        size = self.size or check_size(target.shape[:2])
        return {
            "jpg": to_signed(resize_image(target, size)),
            "hint": resize_image(hint, size).astype(np.float32) / np.float32(255),
            "txt": item["prompt"],
            "key": Path(item["target"]).stem,
        }

    def sample(self, index: int, rng: np.random.Generator) -> ControlSample:
        """The same: nothing here is drawn."""
        return self[index]

    def _read_index(self, path: Path) -> list[dict[str, str]]:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: expected one JSON object a line with {', '.join(FIELDS)}, found no such file."
                f" Unpack fill50k.zip from {self.source} so that prompt.json, source/ and target/ are in"
                f" {self.root}."
            )
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        items = [_parse(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
        if not items:
            raise ValueError(f"{path}: expected one JSON object a line, found none. Unpack it again.")
        return items


def _parse(line: str, where: str) -> dict[str, str]:
    try:
        item = json.loads(line)
    except json.JSONDecodeError:
        item = None
    if not isinstance(item, dict) or not all(isinstance(item.get(field), str) for field in FIELDS):
        raise ValueError(
            f"{where}: expected a JSON object with the texts {', '.join(FIELDS)}, found {line[:80]!r}."
            " Correct or remove the line."
        )
    return item
