"""Train the Streets judge: python tool_train_streets_judge.py [--minutes M] [key=value ...]

    python tool_train_streets_judge.py
    python tool_train_streets_judge.py --minutes 45 slice.folder=/big/disk/judge
    python tool_train_streets_judge.py train.steps=200 slice.folder=output/try
    python tool_train_streets_judge.py --print_config

The judge says what each pixel of a street scene is and what weather it shows; every figure of the lab is its
word. It learns from rendered photos of the domain camera with their label maps; what is missing of them is
rendered first. Training goes in slices: after M minutes the state is in slice.folder, and the same command
continues from there. Each slice ends with OUT, the averaged weights so far in fp16; the settings are
configs/streets_judge.yaml with the key=value lines over it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cldm.cli import keep_freed_memory
from cldm.stage_script import closing_line, notes_of, parse_stage_args, read_stage, run_stage
from cldm.stages import identity_of
from datasets import find_entry, missing_paths
from metrics.judge_stage import JudgeStage, check_judge_stage

log = logging.getLogger("tool_train_streets_judge")


def main(argv: Sequence[str] | None = None) -> None:
    """Settings -> frames -> a slice of training -> file and report."""
    args = parse_stage_args(argv, __doc__, "configs/streets_judge.yaml", "judge.safetensors")
    config = read_stage(args, JudgeStage, check_judge_stage)
    if args.print_config:
        print(OmegaConf.to_yaml(config))
        return
    run_stage(args, config, train)


def make_missing_frames(config: DictConfig) -> None:
    """Render the tree if it is not there yet."""
    from datasets.streets.tree import Plan

    data = config.data
    if missing_paths("streets", data.camera_root):
        plan = Plan("camera", size=tuple(data.size), train=data.camera_frames, val=data.val_frames)
        find_entry("streets").make(data.camera_root, plan=plan)


def train(config: DictConfig, out: Path) -> None:
    """One slice."""
    from cldm.slices import read_progress
    from metrics.judge_data import read_labelled

    folder, identity = Path(config.slice.folder), identity_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    progress = read_progress(folder, identity)
    make_missing_frames(config)
    data, size = config.data, tuple(config.data.size)
    frames = read_labelled(data.camera_root, "train", size, data.camera_frames)
    held_out = read_labelled(data.camera_root, "val", size, data.val_frames)
    report(run_slice(config, progress, identity, frames, held_out, out), out)


def run_slice(
    config: DictConfig, progress: Any, identity: str, frames: Any, held_out: Any, out: Path
) -> dict[str, Any]:
    """Train for the minutes of the slice, write the file, return the last figures."""
    import pytorch_lightning as pl

    from cldm.slices import TrainingSlice
    from cldm.stage_trainer import train_slice
    from datasets.streets import RENDERER_VERSION, renderer_hash
    from metrics.judge_training import JudgeFigures, build_judge_training, write_average

    keep_freed_memory()
    train, section = config.train, config.slice
    pl.seed_everything(train.seed, verbose=False)
    module = build_judge_training(config, frames.labels)
    times = {"minutes": section.minutes, "save_minutes": section.save_minutes}
    running = TrainingSlice(section.folder, module.network, progress, identity, decay=train.average, **times)
    figures = JudgeFigures(
        held_out, running, section.folder, freq=section.log_freq, pictures=section.pictures
    )
    log.info("%d frames, %d parameters", len(frames), sum(p.numel() for p in module.parameters()))
    train_slice(module, lambda: cut_crops(config, frames), train, running, figures)
    stamp = f"{RENDERER_VERSION} {renderer_hash()}"
    notes = notes_of(config, {**figures.last, **asdict(figures.scores)}, renderer=stamp)
    write_average(out, module.network, running.average, notes)
    return {**figures.last, "steps": train.steps, "scores": figures.scores}


def cut_crops(config: DictConfig, frames: Any) -> Any:
    """The batches of the whole run."""
    from metrics.judge_data import Augmentation, LabelledCrops

    train = config.train
    return LabelledCrops(
        frames,
        train.steps,
        seed=train.seed,
        batch=train.batch_size,
        crop=tuple(train.crop),
        rare_power=train.rare_power,
        rare_share=train.rare_share,
        augmentation=Augmentation(**config.augment),
    )


def report(last: dict[str, Any], out: Path) -> None:
    """Say what the slice reached."""
    print(f"step {last['step']} of {last['steps']}, {last['cpu_hours']:.2f} CPU-hours")
    print(
        f"mIoU {last['miou']:.4f}, pixel accuracy {last['pixel_accuracy']:.4f}, condition accuracy"
        f" {last['condition_accuracy']:.4f}; judge in {out}"
    )
    print(closing_line(last))


if __name__ == "__main__":
    main()
