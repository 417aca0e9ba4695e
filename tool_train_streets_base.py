"""Train the Streets base: python tool_train_streets_base.py [--minutes M] [key=value ...]

    python tool_train_streets_base.py
    python tool_train_streets_base.py --minutes 45 --out models/streets_base.safetensors
    python tool_train_streets_base.py train.steps=200 slice.folder=output/try
    python tool_train_streets_base.py --print_config

The second stage of the Streets base learns from captioned photos alone, without label maps, in the latents of
the autoencoder that tool_train_streets_vae.py wrote (data.first_stage=FILE). Training goes in slices: after M
minutes the state is in slice.folder, and the same command continues from there. Each slice ends with OUT:
autoencoder, text encoder and UNet in fp16 under the published names, averaged weights; the settings are
configs/streets_base.yaml with the key=value lines over it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cldm.cli import keep_freed_memory, refuse
from cldm.stages import BaseStage, check_base_stage, identity_of, load_stage
from datasets.streets.photos import captions_by_condition, make_missing_trees, read_photos, trees_of

log = logging.getLogger("tool_train_streets_base")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--config", default="configs/streets_base.yaml", help="run file (default: %(default)s)")
    add("--minutes", type=float, default=None, help="of training in this slice (default: slice.minutes)")
    add("--out", type=Path, default=None, help="file to write (default: base.safetensors in slice.folder)")
    add("--print_config", action="store_true", help="print the settings and exit")
    add("overrides", nargs="*", metavar="key=value", help="any setting, e.g. train.lr=5e-4")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Settings -> photos -> latents -> a slice of training -> file and report."""
    args = parse_args(argv)
    flags = [] if args.minutes is None else [f"slice.minutes={args.minutes}"]
    try:
        config = load_stage(BaseStage, args.config, [*flags, *args.overrides])
        check_base_stage(config)
        if args.print_config:
            print(OmegaConf.to_yaml(config))
            return
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        out = args.out or Path(config.slice.folder) / "base.safetensors"
        report(run_slice(config, out), out)
    except (ValueError, FileNotFoundError) as error:
        refuse(str(error))


def run_slice(config: DictConfig, out: Path) -> dict[str, Any]:
    """Train for the minutes of the slice, write the file, return the last figures."""
    import pytorch_lightning as pl

    from cldm.base_stage import BaseTraining, load_first_stage, write_base
    from cldm.digests import sha256_of
    from cldm.model import create_model, load_model_config
    from cldm.slices import TrainingSlice, read_progress
    from cldm.stage_trainer import build_stage_trainer, steps_from

    train, section = config.train, config.slice
    keep_freed_memory()
    pl.seed_everything(train.seed, verbose=False)
    model_file = load_model_config(config.model.config)
    model = create_model(model_file)
    load_first_stage(model, config.data.first_stage)
    digest = sha256_of(config.data.first_stage)
    identity = f"{identity_of(config)}first_stage: {digest}\n"
    Path(section.folder).mkdir(parents=True, exist_ok=True)
    progress = read_progress(section.folder, identity)
    make_missing_trees(config.data)
    model.min_snr_gamma = train.min_snr_gamma
    names = ("lr", "warmup", "steps", "seed", "weight_decay", "clip")
    module = BaseTraining(model, **{name: train[name] for name in names})
    times = {"minutes": section.minutes, "save_minutes": section.save_minutes}
    running = TrainingSlice(section.folder, module.trained, progress, identity, decay=train.average, **times)
    figures = figures_of(config, model, running)
    if progress.step < train.steps:
        batches = batches_of(config, model, digest)
        log.info("%d parameters", sum(p.numel() for p in module.trained.parameters()))
        trainer = build_stage_trainer(train.steps - progress.step, train.precision, [running, figures])
        trainer.fit(module, steps_from(batches, progress.step))
    else:  # all steps are done: write the file again
        running.load_weights()
        figures.measure({})
    write_base(out, model, running, notes_of(config, model_file, figures.last))
    return {**figures.last, "steps": train.steps}


def batches_of(config: DictConfig, model: Any, digest: str) -> Any:
    """The batches of the whole run; the photos are encoded in its first slice."""
    from cldm.base_stage import LatentBatches, encode_once

    photos, train = read_photos(config.data, "train"), config.train
    path = Path(config.slice.folder) / "latents.safetensors"
    latents = encode_once(path, model, photos.images, photos.captions, digest)
    options = {"batch": train.batch_size, "drop": train.drop, "seed": train.seed}
    return LatentBatches(latents, train.steps, **options)


def figures_of(config: DictConfig, model: Any, running: Any) -> Any:
    """The callback that measures on validation photos and samples some of their captions."""
    from cldm.base_stage import BaseFigures, encode_photos

    held_out, section = read_photos(config.data, "val"), config.slice
    return BaseFigures(
        model,
        encode_photos(model, held_out.images, held_out.captions),
        [captions_by_condition(root)[: section.pictures] for _, root, _ in trees_of(config.data)],
        tuple(config.data.size),
        running,
        section.folder,
        freq=section.log_freq,
        settings=OmegaConf.to_object(config.sample),
    )


def notes_of(config: DictConfig, model_file: DictConfig, figures: dict[str, Any]) -> dict[str, str]:
    """What made the file, for its metadata."""
    from datasets.streets import RENDERER_VERSION, renderer_hash

    return {
        "run_config": OmegaConf.to_yaml(config),
        "model_config": OmegaConf.to_yaml(model_file),
        "figures": json.dumps(figures),
        "renderer": f"{RENDERER_VERSION} {renderer_hash()}",
    }


def report(last: dict[str, Any], out: Path) -> None:
    """Say what the slice reached."""
    print(f"step {last['step']} of {last['steps']}, {last['cpu_hours']:.2f} CPU-hours, in {out}")
    print(f"loss on held-out photos {last['val_loss']:.4f}")
    print("the run is complete" if last["step"] == last["steps"] else "the same command continues")


if __name__ == "__main__":
    main()
