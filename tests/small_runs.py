"""What several tests train on: frames in the layout of Cityscapes, and a run on rendered ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from cldm.cldm import ControlLDM
from cldm.tensor_writing import write_tensors
from datasets.streets.tree import Plan, make_tree

IDS = np.array([7, 26, 23, 0], np.uint8)  # road, car, sky, void


def write_frame(root: Path, split: str, key: str, photo: NDArray[np.uint8], ids: NDArray[np.uint8]) -> None:
    """One photo (H, W, 3) and its map (H, W) of label ids."""
    for folder, kind, array in (("leftImg8bit", "", photo), ("gtFine", "_labelIds", ids)):
        path = root / folder / split / "ulm" / f"{key}_{folder}{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def write_block_frames(root: Path, **counts: int) -> None:
    """Frames of 64x128 for each split, whose maps are blocks of four classes that the photos show."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for i in range(count):
            blocks = rng.integers(0, len(IDS), (4, 8)).repeat(16, axis=0).repeat(16, axis=1)
            photo = (60 * blocks[..., None] + rng.integers(0, 40, (64, 128, 3))).astype(np.uint8)
            write_frame(root, split, f"ulm_{i:06d}_000019", photo, IDS[blocks])


def write_streets_run(folder: Path, model_file: Path, model: ControlLDM, **train: Any) -> Path:
    """Five rendered frames, weights to start from, and the run file that is returned; it has no grids."""
    make_tree(folder / "streets", Plan("camera", size=(64, 128), train=5, val=2), workers=1)
    write_tensors(folder / "start.safetensors", model.state_dict())
    content = {
        "model": {"config": str(model_file), "checkpoint": str(folder / "start.safetensors")},
        "data": {"name": "streets", "root": str(folder / "streets"), "size": [64, 128], "num_workers": 0}
        | {"flip": 0.5, "drop_prompt": 0.3, "check": False},
        "train": {"batch_size": 2, "accumulate": 2, "lr": 1.0e-3, "grid_images": 0, "val_freq": 0}
        | {"checkpoint_precision": "32", **train},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path
