"""Speed of the Streets renderer, and what share of the pixels each class has: one JSON line.

    python benchmarks/render_streets.py
    python benchmarks/render_streets.py --statistics --scenes 500

Counts image, labels and instances; not the encoding as PNG. With --statistics the class shares of as many
scenes come instead, beside those of Cityscapes' training set.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time

ROOT = Path(__file__).resolve().parent.parent


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=[128, 256])
    parser.add_argument("--scenes", type=int, default=100, help="for each process (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--statistics", action="store_true", help="class shares instead of speed")
    args = parser.parse_args(argv)
    if min(args.scenes, args.workers) < 1:
        parser.error("--scenes and --workers must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Print the JSON line."""
    args = parse_args(argv)
    sys.path[:0] = [str(ROOT)]
    record = shares(args) if args.statistics else speed(args)
    print(json.dumps(record))


def speed(args: argparse.Namespace) -> dict[str, object]:
    """Scenes a second, all domains and conditions in turn."""
    work = partial(render_some, count=args.scenes, size=tuple(args.size))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        results = list(pool.map(work, range(args.workers)))
    wall = max(wall for wall, _, _ in results)
    return {
        "benchmark": "render_streets",
        "size": args.size,
        "workers": args.workers,
        "scenes": args.workers * args.scenes,
        "scenes_per_s": round(args.workers * args.scenes / wall, 1),
        "scenes_per_cpu_s": round(args.workers * args.scenes / sum(cpu for _, cpu, _ in results), 1),
        "median_ms": round(1000 * statistics.median(t for _, _, times in results for t in times), 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "opencv-python-headless")},
    }


def render_some(worker: int, count: int, size: tuple[int, int]) -> tuple[float, float, list[float]]:
    """Wall and CPU seconds of one process, and the wall seconds of each scene."""
    sys.path[:0] = [str(ROOT)]
    import cv2

    from datasets.streets import CONDITIONS, DOMAINS
    from datasets.streets.render import render_frame

    cv2.setNumThreads(1)
    render_frame(0, size)
    times, cpu = [perf_counter()], process_time()
    for i in range(count):
        render_frame(worker * 10_000 + i, size, domain=DOMAINS[i % 2], condition=CONDITIONS[i % 5])
        times.append(perf_counter())
    laps = [after - before for before, after in pairwise(times)]
    return times[-1] - times[0], process_time() - cpu, laps


def shares(args: argparse.Namespace) -> dict[str, object]:
    """Share of the labelled pixels by class, ours and Cityscapes', and the share of void."""
    from datasets.check.plausible_ids import CITYSCAPES
    from datasets.label_space import LabelSpace
    from datasets.streets.tree import label_statistics

    space = LabelSpace.load("cityscapes")
    pixels = label_statistics(range(args.scenes), tuple(args.size))
    counts = [int(pixels[label]) for label in space.file_ids]
    rows = {
        name: {
            "ours": float(f"{count / sum(counts):.3g}"),
            "cityscapes": published,
            "ratio": round(count / sum(counts) / published, 2),
        }
        for name, count, published in zip(space.names, counts, CITYSCAPES, strict=True)
    }
    void = 1 - sum(counts) / int(pixels.sum())
    return {"scenes": args.scenes, "size": args.size, "void": round(void, 4), "classes": rows}


if __name__ == "__main__":
    main()
