"""From the start of a process to the end of its first sampling step: ours and diffusers in turn.

    python benchmarks/start_up.py                                     # the Streets miniature, made on the fly
    python benchmarks/start_up.py --make work_dir/sd15 --arch sd15    # 5.7 GB twice, random weights
    python benchmarks/start_up.py --ckpt work_dir/sd15/model.safetensors --diffusers work_dir/sd15/diffusers

Each run is a fresh process that imports, loads the weights, encodes the prompts and makes the first of 20
guided steps under control. Both sides read the same weights, ours from one safetensors file, theirs from the
folder that a pipeline is loaded from. Times count from the moment the process is asked for, so imports are in
them. Peak memory is twofold: peak_rss_mib counts the pages of mapped weight files, which the system can take
back, peak_anonymous_mib does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    ARCHITECTURES,
    PROMPT,
    environment,
    figures,
    memory_mib,
    open_project,
    ratio,
    report,
    say,
    status_mib,
)

if TYPE_CHECKING:
    from torch import Tensor

SIDES = ("ours", "diffusers")


class FirstStepDone(Exception):
    """Ends a run of ours after its first step."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--ckpt", type=Path, help="whole checkpoint, for ours")
    add("--diffusers", type=Path, help="folder of a StableDiffusionControlNetPipeline with the same weights")
    add("--make", type=Path, metavar="DIR", help="write both with random weights to DIR, then measure")
    add("--arch", choices=ARCHITECTURES, default="streets", help="what --make makes (default: %(default)s)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), default=[256, 256], help="of the image")
    add("--repeat", type=int, default=3, help="counted processes of each side (default: %(default)s)")
    add("--side", choices=SIDES, help="be one of the measured processes")
    args = parser.parse_args(argv)
    if (args.ckpt is None) != (args.diffusers is None):
        parser.error("--ckpt and --diffusers belong together; --make writes both")
    for path in filter(None, (args.ckpt, args.diffusers)):
        if not path.exists():
            parser.error(f"{path} does not exist; --make writes both inputs")
    if args.repeat < 1:
        parser.error(f"--repeat must be 1 or more, found {args.repeat}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Be a measured process, or make the inputs where they are not given and start such processes in turn."""
    args = parse_args(argv)
    if args.side:
        report(start(args))
        return
    if args.ckpt:
        report(measure(args, args.ckpt.resolve(), args.diffusers.resolve()))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.make or Path(scratch)).resolve()
        report(measure(args, *make_inputs(folder, args.arch)))


# -- the inputs -------------------------------------------------------------------------------------------


def make_inputs(folder: Path, arch: str) -> tuple[Path, Path]:
    """One model with random weights, as our checkpoint and as a diffusers pipeline; another process."""
    paths = folder / "model.safetensors", folder / "diffusers"
    if not (paths[0].exists() and paths[1].exists()):
        code = f"import start_up; start_up.write_inputs({str(folder)!r}, {arch!r})"
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, stdout=sys.stderr)
    return paths


def write_inputs(folder: str, arch: str) -> None:
    """Write both inputs of the measured processes."""
    open_project()
    from diffusers import StableDiffusionControlNetPipeline
    from peers import make_model, make_peer, sample_schedule

    from cldm.tensor_writing import write_tensors

    model, config = make_model(arch)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_tensors(Path(folder) / "model.safetensors", model.state_dict())
    pipeline = StableDiffusionControlNetPipeline(
        **make_peer(model, config)._asdict(),
        scheduler=sample_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(Path(folder) / "diffusers")


# -- a measured process -----------------------------------------------------------------------------------


def start(args: argparse.Namespace) -> dict[str, Any]:
    """Load and make the first step with one side; the moments when each stage ended, and the memory."""
    if args.side == "ours":
        open_project()
    moments = (start_ours if args.side == "ours" else start_diffusers)(args)
    return {"moments": moments, **memory_mib()}


def start_ours(args: argparse.Namespace) -> dict[str, float]:
    """As generate.py does it."""
    import torch

    from cldm.cli import keep_freed_memory
    from cldm.config import SampleConfig
    from cldm.generate import generate
    from cldm.model import load_model, model_config_of

    keep_freed_memory()
    moments = {"import": time.monotonic()}
    model = load_model(model_config_of(args.ckpt), args.ckpt)
    moments["load"] = time.monotonic()

    def stop(_step: int, _x_0: Tensor) -> None:
        raise FirstStepDone

    try:
        generate(model, torch.rand(1, 3, *args.size), [PROMPT], [0], SampleConfig(steps=20), callback=stop)
    except FirstStepDone:
        moments["step"] = time.monotonic()
    return moments


def start_diffusers(args: argparse.Namespace) -> dict[str, float]:
    """As the documentation of the pipeline does it."""
    import torch
    from diffusers import StableDiffusionControlNetPipeline

    moments = {"import": time.monotonic()}
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(args.diffusers, local_files_only=True)
    moments["load"] = time.monotonic()

    def stop(pipe: Any, _step: int, _t: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        moments.setdefault("step", time.monotonic())
        pipe._interrupt = True
        return tensors

    pipeline(
        PROMPT,
        torch.rand(1, 3, *args.size),
        num_inference_steps=20,
        guidance_scale=9.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=stop,
    )
    return moments


# -- the measurement --------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, ckpt: Path, folder: Path) -> dict[str, Any]:
    """Start processes of both sides in turn, one of each before counting so that the files are in memory."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for i in range(-1, args.repeat):
        for side in SIDES[:: 1 if i % 2 else -1]:
            run = run_process(side, args, ckpt, folder)
            say(f"{side} {'warm-up' if i < 0 else i}: {run['total_s']:.2f} s, {run['peak_rss_mib']} MiB")
            runs[side] += [run] if i >= 0 else []
    seconds = {side: [run["total_s"] for run in runs[side]] for side in SIDES}
    memory = {side: [run["peak_rss_mib"] for run in runs[side]] for side in SIDES}
    own = {side: [run["peak_anonymous_mib"] for run in runs[side]] for side in SIDES}
    return {
        "benchmark": "start_up",
        "size": args.size,
        "checkpoint_bytes": ckpt.stat().st_size,
        **{side: median_of(runs[side]) for side in SIDES},
        "ratio": ratio(seconds["diffusers"], seconds["ours"]),
        "ratio_peak_rss": ratio(memory["diffusers"], memory["ours"])["median"],
        "ratio_peak_anonymous": ratio(own["diffusers"], own["ours"])["median"],
        "environment": environment(),
    }


def median_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median of each figure over runs, and the least total."""
    medians = {name: figures(statistics.median(run[name] for run in runs)) for name in runs[0]}
    return medians | {"min_total_s": figures(min(run["total_s"] for run in runs))}


def run_process(side: str, args: argparse.Namespace, ckpt: Path, folder: Path) -> dict[str, Any]:
    """One measured process: seconds of its stages and its memory."""
    inputs = ["--ckpt", str(ckpt), "--diffusers", str(folder), "--size", *map(str, args.size)]
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, __file__, "--side", side, *inputs], stdout=subprocess.PIPE, text=True
    )
    peak = watch(process, lambda: status_mib("RssAnon", f"/proc/{process.pid}/status"))
    output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise RuntimeError(f"the process of {side} ended with {process.returncode}; its error is above")
    result = json.loads(output)
    ends = [begin, *result["moments"].values()]
    stages = {f"{name}_s": b - a for name, a, b in zip(result["moments"], ends, ends[1:], strict=False)}
    memory = {name: result[name] for name in ("peak_rss_mib", "anonymous_mib")}
    return {"total_s": ends[-1] - begin, **stages, **memory, "peak_anonymous_mib": peak}


def watch(process: subprocess.Popen[str], read: Callable[[], float | None]) -> float:
    """Largest value that `read` returns while a process runs; it prints too little to block on its pipe."""
    peak = 0.0
    while process.poll() is None:
        try:
            peak = max(peak, read() or 0.0)
        except OSError:  # it ended in between
            break
        time.sleep(0.02)
    process.wait()
    return peak


if __name__ == "__main__":
    main()
