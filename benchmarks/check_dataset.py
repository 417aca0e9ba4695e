"""Time and memory of checking a data set of N frames, and of half as many: one JSON line.

    python benchmarks/check_dataset.py
    python benchmarks/check_dataset.py --frames 3475

Writes a tree in the layout of Cityscapes into a temporary folder, checks it and half of it, each in a process
of its own, and removes it. Frames are a few rendered scenes, enlarged; each has other pixels in a corner, so
that no two are the same. 3475 frames are as many as Cityscapes has, and take 4 GB for the time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCENES = 24
CHECK = """
import json, sys
from time import perf_counter
from datasets.check import check_dataset
start = perf_counter()
options = {"size": json.loads(sys.argv[4])}
report = check_dataset("cityscapes", sys.argv[1], options=options, quick=sys.argv[2] == "quick",
                       workers=int(sys.argv[3]), progress=False)
seconds = perf_counter() - start
lines = [line.split() for line in open("/proc/self/status")]
peak = sum(int(line[1]) for line in lines if line[0] == "VmHWM:") / 1024
print(json.dumps({"seconds": round(seconds, 2), "peak_rss_mib": round(peak, 1),
                  "findings": len(report.findings), "may_train": report.may_train}))
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=[512, 1024])
    parser.add_argument("--frames", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="threads (default: one for each core)")
    parser.add_argument("--folder", type=Path, default=None, help="where the tree is written for the time")
    args = parser.parse_args(argv)
    if args.frames < 2 * SCENES or args.workers < 0 or any(side < 64 or side % 64 for side in args.size):
        parser.error(f"--frames must be {2 * SCENES} or more, --workers 0 or more, --size multiples of 64")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Print the JSON line."""
    args = parse_args(argv)
    sys.path[:0] = [str(ROOT)]
    record: dict[str, Any] = {
        "benchmark": "check_dataset",
        "size": args.size,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "workers": args.workers,
    }
    for frames in (args.frames // 2, args.frames):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            start = perf_counter()
            size = write_tree(Path(folder), frames, tuple(args.size))
            print(f"{frames} frames written in {perf_counter() - start:.0f} s", file=sys.stderr)
            record[f"frames_{frames}"] = {
                "tree_mib": round(size / 2**20, 1),
                **{part: check(folder, part, args.workers, args.size) for part in ("quick", "full")},
            }
    names = ("numpy", "opencv-python-headless", "pillow")
    record |= {"python": platform.python_version(), **{name: version(name) for name in names}}
    print(json.dumps(record))


def write_tree(root: Path, frames: int, size: tuple[int, int]) -> int:
    """Write photos and maps, one in seven for validation; return the bytes of all files."""
    import cv2
    import numpy as np

    from datasets.label_space import resize_labels
    from datasets.streets.render import render_frame

    scenes = [render_frame(seed, (128, 256)) for seed in range(SCENES)]
    large = [
        (
            cv2.resize(scene.image, size[::-1], interpolation=cv2.INTER_LINEAR),
            resize_labels(scene.label_ids, size),
        )
        for scene in scenes
    ]
    maps = [cv2.imencode(".png", labels)[1].tobytes() for _, labels in large]
    # Noise as of a camera: without it the files are a tenth as large, and decode too fast.
    noise = np.random.default_rng(0).normal(0, 3, (*size, 3))
    large = [((photo + noise).round().clip(0, 255).astype(np.uint8), labels) for photo, labels in large]
    written = 0
    for n in range(frames):
        photo = large[n % SCENES][0].copy()
        photo[:16, :16] = np.random.default_rng(n).integers(0, 256, (16, 16, 3))
        content = cv2.imencode(".png", photo[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
        split, stem = "val" if n % 7 == 6 else "train", f"city_{n:06d}_000000"
        for folder, ending, file in (
            ("leftImg8bit", "leftImg8bit", content),
            ("gtFine", "gtFine_labelIds", maps[n % SCENES]),
        ):
            path = root / folder / split / "city" / f"{stem}_{ending}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file)
            written += len(file)
    return written


def check(folder: str, part: str, workers: int, size: Sequence[int]) -> dict[str, Any]:
    """Seconds, peak memory and outcome of a check in a fresh process."""
    words = [sys.executable, "-c", CHECK, folder, part, str(workers), json.dumps(list(size))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    print(f"{part}: {result.stdout.strip()}", file=sys.stderr)
    return json.loads(result.stdout)


if __name__ == "__main__":
    main()
