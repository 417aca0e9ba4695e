"""What the benchmarks share: arguments, alternating timing, the facts of the machine, one line of JSON.

Timings of a shared machine drift by factors within minutes, so both sides run in turn within one run, and
what is quoted are ratios of neighbours, beside medians and minima.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = {"sd15": "models/cldm_v15.yaml", "streets": "models/cldm_streets.yaml"}
PROMPT = "a road with cars between rows of houses in the rain"
PACKAGES = ("torch", "diffusers", "transformers", "pytorch-lightning")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def open_project() -> None:
    """Make our packages importable, and tests/oracles.py, which needs diffusers from requirements-dev.txt."""
    sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", ".", "tests")]
    os.chdir(ROOT)  # model files are named relative to it
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # all weights are made here


def make_parser(description: str | None, *, steps: int) -> argparse.ArgumentParser:
    """Arguments of a side-by-side run; the defaults end within a minute on two CPU cores."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=layout)
    add = parser.add_argument
    add("--arch", choices=ARCHITECTURES, default="streets", help="sizes (default: %(default)s)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), default=[64, 128], help="of the images, in pixels")
    add("--batch", type=int, default=8, help="images at a time (default: %(default)s)")
    add("--steps", type=int, default=steps, help="counted steps of each side (default: %(default)s)")
    add("--warmup", type=int, default=1, help="steps before that (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--precision", choices=("32", "bf16"), default="32")
    return parser


def check_size(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Refuse what the networks cannot run."""
    if any(side < 64 or side % 64 for side in args.size):
        parser.error(f"--size must be multiples of 64, found {args.size[0]} {args.size[1]}")
    if min(args.steps, args.batch) < 1 or args.warmup < 0:
        parser.error("--steps and --batch must be 1 or more, --warmup 0 or more")
    return args


# -- timing -----------------------------------------------------------------------------------------------


def now(device: str = "cpu") -> float:
    """Seconds of a clock, read when the work given to `device` is done."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return perf_counter()


def alternate(
    sides: Mapping[str, Callable[[int], Any]], rounds: int, *, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds that each side took in each round; who comes first changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(-warmup, rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            start = now(device)
            sides[name](i)
            took = now(device) - start
            say(f"{name} {'warm-up' if i < 0 else i}: {took:.3f} s")
            seconds[name] += [took] if i >= 0 else []
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and minimum, to four figures."""
    return {"median_s": figures(statistics.median(seconds)), "min_s": figures(min(seconds))}


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Their time over ours, above 1 where ours is faster: median over rounds, and that of the minima."""
    rounds = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {"median": figures(statistics.median(rounds)), "of_minima": figures(min(theirs) / min(ours))}


def figures(value: float, digits: int = 4) -> float:
    """Round to significant digits."""
    return float(f"{value:.{digits}g}")


# -- memory -----------------------------------------------------------------------------------------------


def status_mib(field: str, file: str = "/proc/self/status") -> float | None:
    """A field of a file of /proc in MiB; None where the system has no such file.

    VmHWM is the peak of resident memory of this process. `ru_maxrss` may be that of its parent, because it
    lives on through exec.
    """
    path = Path(file)
    if not path.exists():
        return None
    lines = [line.split() for line in path.read_text().splitlines()]
    return round(sum(int(line[1]) for line in lines if line[0] == f"{field}:") / 1024, 1)


def forget_peak() -> None:
    """Begin the peak of resident memory anew (VmHWM, see proc(5)), where the system can."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def memory_mib() -> dict[str, float | None]:
    """Peak of this process, and what it holds now: in all, and without the pages of mapped files."""
    return {
        "peak_rss_mib": status_mib("VmHWM"),
        "rss_mib": status_mib("VmRSS"),
        "anonymous_mib": status_mib("RssAnon"),
    }


# -- report -----------------------------------------------------------------------------------------------


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on beside the code."""
    import torch

    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cpu_features": [name for name in CPU_FEATURES if name in flags],
        "threads": torch.get_num_threads(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
    }


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that a figure depends on."""
    names = ("arch", "size", "batch", "steps", "device", "precision")
    return {name: getattr(args, name) for name in names}


def say(line: str) -> None:
    """Progress, beside the result."""
    print(line, file=sys.stderr, flush=True)


def report(record: Mapping[str, Any]) -> None:
    """The result: one line of JSON."""
    print(json.dumps(record), flush=True)
