"""What determines a figure, so that it can be found again: hashes, counts, renderer, versions."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cldm.digests import sha256_of
from cldm.tensor_files import read_metadata
from datasets.files import write_text
from datasets.streets.tree import CARD
from metrics.judge_data import LabelledFrames

PACKAGES = ("numpy", "torch", "torchmetrics", "transformers")


def renderer_of(root: str | Path) -> dict[str, Any]:
    """Renderer, its hash and the rendered size of a Streets tree."""
    path = Path(root) / CARD
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a Streets tree, found no {path}; render one: python tool_make_streets.py --out {root}"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def digest_of(frames: LabelledFrames) -> str:
    """SHA-256 of the pixels of photos and maps, and of their keys."""
    digest = hashlib.sha256("\n".join(frames.keys).encode())
    for array in (frames.images, frames.labels):
        digest.update(f"{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def data_card(root: str | Path, split: str, frames: LabelledFrames) -> dict[str, Any]:
    """What the frames are."""
    cities = Counter(key.partition("_")[0] for key in frames.keys)
    return {
        **renderer_of(root),
        "split": split,
        "frames": len(frames),
        "cities": dict(sorted(cities.items())),
        "evaluated_at": list(frames.labels.shape[1:]),
        "sha256": digest_of(frames),
    }


def file_card(path: str | Path) -> dict[str, Any]:
    """What a weight file is; of a judge also the renderer that it was trained on."""
    notes = read_metadata(path)
    kept = {"renderer": notes["renderer"]} if "renderer" in notes else {}
    return {"file": Path(path).name, "sha256": sha256_of(path), **kept}


def versions() -> dict[str, str]:
    """What computed."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def write_card(path: str | Path, card: dict[str, Any]) -> None:
    """Write a card as JSON, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(card, indent=1) + "\n")
