"""A checkpoint to a diffusers folder and back: time and peak memory, beside diffusers' own conversion.

    python benchmarks/convert.py                                      # the Streets miniature, made on the fly
    python benchmarks/convert.py --ckpt work_dir/sd15/model.safetensors --work work_dir
    python benchmarks/convert.py --make models/cldm_v21.yaml --work work_dir --only verified

Each run is a fresh process. Ours are tool_export.py without its verification, and with it (verified), and on
request the two tools that work on a control branch alone: to another base with the offset, to one-hot hints.
--make starts from random weights for a model file. Theirs is from_single_file of
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
ON_REQUEST = ("verified", "transfer", "hint")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--ckpt", type=Path, help="whole checkpoint with control; start_up.py --make writes one")
    add("--make", type=Path, metavar="YAML", help="start from random weights for a model file")
    add("--work", type=Path, default=Path(), help="folder to write into (default: here)")
    add("--size", type=int, nargs=2, help=argparse.SUPPRESS)  # as the other benchmarks take; no images here
    add("--only", choices=(*SIDES[:2], *ON_REQUEST), action="append", help="leave the other sides out")
    add("--write", nargs=2, type=Path, metavar=("YAML", "OUT"), help="be the process that writes weights")
    add("--theirs", nargs=3, type=Path, metavar=("CKPT", "CONFIGS", "OUT"), help="be the measured process")
    args = parser.parse_args(argv)
    if args.ckpt and not args.ckpt.is_file():
        parser.error(f"--ckpt {args.ckpt} does not exist; python benchmarks/start_up.py --make writes one")
    if args.ckpt and args.make:
        parser.error("--ckpt names a file, --make makes one; give one of them")
    if args.make and not args.make.is_file():
        parser.error(f"--make {args.make} does not exist")
    if not args.work.is_dir():
        parser.error(f"--work {args.work} is not a folder")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Convert there, back, and with diffusers, one after the other."""
    args = parse_args(argv)
    if args.write:
        write_model(*args.write)
        return
    if args.theirs:
        convert_with_diffusers(*args.theirs)
        return
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name).resolve()
        ckpt = args.ckpt.resolve() if args.ckpt else work / "model.safetensors"
        export = str(ROOT / "tool_export.py")
        if args.make:
            run_process(__file__, "--write", args.make.resolve(), ckpt)
        elif not args.ckpt:
            run_process(export, STREETS, ckpt, "--to", "original")
        folder, back, theirs = work / "ours", work / "back.safetensors", work / "theirs"
        bases = ["--from", ckpt, "--to", ckpt]
        commands: dict[str, list[Any]] = {
            "ours": [export, ckpt, folder, "--to", "diffusers", "--no-verify"],
            "back": [export, folder, back, "--to", "original"],
            "diffusers": [__file__, "--theirs", ckpt, folder, theirs],
            "verified": [export, ckpt, work / "verified", "--to", "diffusers"],
            "transfer": [ROOT / "tool_transfer_control.py", ckpt, work / "moved.safetensors", *bases],
            "hint": [
                *(ROOT / "tool_convert_hint.py", ckpt, work / "onehot.safetensors"),
                *("--palette", "cityscapes"),
            ],
        }
        record: dict[str, Any] = {"benchmark": "convert", "checkpoint_bytes": ckpt.stat().st_size}
        for side in args.only or SIDES:
            record[side] = run_process(*commands[side])
            record[side]["peak_rss_over_checkpoint"] = figures(
                record[side]["peak_rss_mib"] * 2**20 / record["checkpoint_bytes"]
            )
            say(f"{side}: {record[side]}")
    report({**record, "environment": environment()})


def write_model(config: Path, target: Path) -> None:
    """A model with a random value in every weight of the networks, the zero ones too."""
    open_project()
    from peers import randomize

    from cldm.model import create_model
    from cldm.tensor_writing import write_tensors

    model = create_model(config)
    for module in (model.model, model.control_model, model.first_stage_model):
        randomize(module)
    write_tensors(target, model.state_dict())


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
