"""A checkpoint to a diffusers folder and back: time and peak memory, beside diffusers' own conversion.

    python benchmarks/convert.py                                      # the Streets miniature, made on the fly
    python benchmarks/convert.py --ckpt work_dir/sd15/model.safetensors --work work_dir

Each run is a fresh process. Ours are tool_export.py without its verification. Theirs is from_single_file of
pipeline and ControlNet, then save_pretrained; no hub is asked, because it is given the configurations that we
wrote. The way back has no peer: diffusers has none for a control branch. Peak memory is twofold: peak_rss_mib
counts the pages of mapped weight files, which the system can take back, peak_anonymous_mib does not. --work
needs room for three times the checkpoint, and is emptied again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ROOT, environment, figures, open_project, report, say, status_mib

STREETS = ROOT / "models/control_streets.safetensors"
SIDES = ("ours", "back", "diffusers")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--ckpt", type=Path, help="whole checkpoint with control; start_up.py --make writes one")
    add("--work", type=Path, default=Path(), help="folder to write into (default: here)")
    add("--size", type=int, nargs=2, help=argparse.SUPPRESS)  # as the other benchmarks take; no images here
    add("--only", choices=SIDES[:2], action="append", help="leave the other sides out")
    add("--theirs", nargs=3, type=Path, metavar=("CKPT", "CONFIGS", "OUT"), help="be the measured process")
    args = parser.parse_args(argv)
    if args.ckpt and not args.ckpt.is_file():
        parser.error(f"--ckpt {args.ckpt} does not exist; python benchmarks/start_up.py --make writes one")
    if not args.work.is_dir():
        parser.error(f"--work {args.work} is not a folder")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Convert there, back, and with diffusers, one after the other."""
    args = parse_args(argv)
    if args.theirs:
        convert_with_diffusers(*args.theirs)
        return
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name).resolve()
        ckpt = args.ckpt.resolve() if args.ckpt else work / "streets.safetensors"
        export = str(ROOT / "tool_export.py")
        if not args.ckpt:
            run_process(export, STREETS, ckpt, "--to", "original")
        folder, back, theirs = work / "ours", work / "back.safetensors", work / "theirs"
        commands: dict[str, list[Any]] = {
            "ours": [export, ckpt, folder, "--to", "diffusers", "--no-verify"],
            "back": [export, folder, back, "--to", "original"],
            "diffusers": [__file__, "--theirs", ckpt, folder, theirs],
        }
        record: dict[str, Any] = {"benchmark": "convert", "checkpoint_bytes": ckpt.stat().st_size}
        for side in args.only or SIDES:
            record[side] = run_process(*commands[side])
            record[side]["peak_rss_over_checkpoint"] = figures(
                record[side]["peak_rss_mib"] * 2**20 / record["checkpoint_bytes"]
            )
            say(f"{side}: {record[side]}")
    report({**record, "environment": environment()})


def run_process(*command: Any) -> dict[str, float]:
    """One measured process: seconds, and its peaks of memory as seen 50 times a second."""
    begin = time.monotonic()
    paths = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=sys.stderr, env={**os.environ, **paths}
    )
    peaks = {"VmHWM": 0.0, "RssAnon": 0.0}
    while process.poll() is None:
        for field in peaks:
            try:
                peaks[field] = max(peaks[field], status_mib(field, f"/proc/{process.pid}/status") or 0.0)
            except OSError:  # it ended in between
                break
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}; its error is above")
    seconds = figures(time.monotonic() - begin)
    return {"seconds": seconds, "peak_rss_mib": peaks["VmHWM"], "peak_anonymous_mib": peaks["RssAnon"]}


def convert_with_diffusers(ckpt: Path, configs: Path, target: Path) -> None:
    """The same conversion by diffusers itself; of `configs` it takes the JSON files alone."""
    open_project()
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    local = {"local_files_only": True}
    control = ControlNetModel.from_single_file(str(ckpt), config=str(configs / "controlnet"), **local)
    pipeline = StableDiffusionControlNetPipeline.from_single_file(
        str(ckpt), controlnet=control, config=str(configs), safety_checker=None, **local
    )
    pipeline.save_pretrained(target)


if __name__ == "__main__":
    main()
