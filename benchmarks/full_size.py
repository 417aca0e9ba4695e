"""Full-size Stable Diffusion 1.5 with random weights, through the scripts as a user runs them.

    python benchmarks/full_size.py --work DIR

Makes a random base (in a process of its own: it holds all of it), then runs tool_add_control.py, one training
step at 256x256 and a 4-step sample at 256x256, each in its own process, and prints one JSON line: seconds and
peak memory of each, sizes of the files. Needs 12 GB of disk in DIR, which is emptied again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
GIB = 1024**3


def run(*command: str | Path) -> dict[str, float]:
    """Run a script of the project; seconds, and the peak of its resident memory in GiB."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=sys.stderr, env=environment
    )
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed")
    return {"seconds": round(time.monotonic() - start, 1), "peak_gib": round(usage.ru_maxrss * 1024 / GIB, 2)}


def make_base(path: Path) -> None:
    """A random Stable Diffusion 1.5 without control, under the published names."""
    import torch

    from cldm.model import create_model
    from cldm.tensor_writing import write_tensors

    torch.manual_seed(0)
    state = create_model(ROOT / "models/cldm_v15.yaml").state_dict()
    write_tensors(
        path, {k: v for k, v in state.items() if not k.startswith("control_model.") and k != "logvar"}
    )


def make_frames(root: Path) -> Path:
    """Two random frames in the Cityscapes layout; returns the folder of a label map."""
    rng = np.random.default_rng(0)
    photos, labels = root / "leftImg8bit/train/city", root / "gtFine/train/city"
    for folder in (photos, labels):
        folder.mkdir(parents=True)
    for i in range(2):
        stem = f"city_{i:06d}_000019"
        noise = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        ids = np.repeat(np.repeat(rng.integers(0, 34, (8, 8), dtype=np.uint8), 32, 0), 32, 1)
        Image.fromarray(noise).save(photos / f"{stem}_leftImg8bit.png")
        Image.fromarray(ids).save(labels / f"{stem}_gtFine_labelIds.png")
    return labels


def main() -> None:
    """Make, add control, train one step, sample; print one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(), help="folder on a disk with 12 GB free")
    parser.add_argument("--steps", type=int, default=1, help="training steps (default: %(default)s)")
    parser.add_argument("--make_base", type=Path, help="only write the random base to this file")
    args = parser.parse_args()
    if args.make_base:
        make_base(args.make_base)
        return
    result: dict[str, object] = {"benchmark": "full_size", "arch": "sd15", "size": [256, 256], "batch": 1}
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        base, ini, data = work / "base.safetensors", work / "ini.safetensors", work / "data"
        labels = make_frames(data)
        run(__file__, "--make_base", base)
        result["base_gib"] = round(base.stat().st_size / GIB, 2)
        result["add_control"] = run("tool_add_control.py", base, ini)
        result["control_checkpoint_gib"] = round(ini.stat().st_size / GIB, 2)
        base.unlink()
        train = ["tutorial_train.py", "--dataset", "cityscapes", "--resume_path", ini, "--batch_size", "1"]
        train += ["--max_steps", str(args.steps), "--default_root_dir", work / "run", f"data.root={data}"]
        train += ["data.size=[256,256]", "data.num_workers=0", "sample.steps=1", "train.grid_images=1"]
        result["train"] = {"steps": args.steps, **run(*train)}
        saved = next((work / "run").rglob("step=*.safetensors"))
        result["trained_checkpoint_gib"] = round(saved.stat().st_size / GIB, 2)
        hint = next(labels.iterdir())
        sample = ["generate.py", "--ckpt", saved, "--hint", hint, "--out", work / "out", "--steps", "4"]
        result["sample_4_steps"] = run(*sample, "--size", "256", "256")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
