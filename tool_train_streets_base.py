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

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cldm.cli import keep_freed_memory
from cldm.stage_script import closing_line, notes_of, parse_stage_args, read_stage, run_stage
from cldm.stages import BaseStage, check_base_stage, identity_of
from datasets.streets.photos import captions_by_condition, make_missing_trees, read_photos, trees_of

log = logging.getLogger("tool_train_streets_base")


def main(argv: Sequence[str] | None = None) -> None:
    """Settings -> photos -> latents -> a slice of training -> file and report."""
    args = parse_stage_args(argv, __doc__, "configs/streets_base.yaml", "base.safetensors")
    config = read_stage(args, BaseStage, check_base_stage)
    if args.print_config:
        print(OmegaConf.to_yaml(config))
        return
    run_stage(args, config, train)


def train(config: DictConfig, out: Path) -> None:
    """One slice."""
    report(run_slice(config, out), out)


def run_slice(config: DictConfig, out: Path) -> dict[str, Any]:
    """Train for the minutes of the slice, write the file, return the last figures."""
    import pytorch_lightning as pl

    from cldm.base_stage import BaseTraining, take_first_stage, write_base
    from cldm.digests import sha256_of
    from cldm.model import create_model, load_model_config
    from cldm.slices import TrainingSlice, read_progress
    from cldm.stage_trainer import train_slice
    from datasets.streets import RENDERER_VERSION, renderer_hash

    train, section = config.train, config.slice
    keep_freed_memory()
    pl.seed_everything(train.seed, verbose=False)
    model_file = load_model_config(config.model.config)
    model = create_model(model_file)
    take_first_stage(model, config.data.first_stage)
    digest = sha256_of(config.data.first_stage)
    identity = f"{identity_of(config)}first_stage: {digest}\n"
    Path(section.folder).mkdir(parents=True, exist_ok=True)
    progress = read_progress(section.folder, identity)
    make_missing_trees(config.data)
    model.min_snr_gamma = train.min_snr_gamma
    module = BaseTraining(model, train)
    times = {"minutes": section.minutes, "save_minutes": section.save_minutes}
    running = TrainingSlice(section.folder, module.trained, progress, identity, decay=train.average, **times)
    figures = figures_of(config, model, running)
    log.info("%d parameters", sum(p.numel() for p in module.trained.parameters()))
    train_slice(module, lambda: batches_of(config, model, digest), train, running, figures)
    stamp = f"{RENDERER_VERSION} {renderer_hash()}"
    notes = notes_of(config, figures.last, model_config=OmegaConf.to_yaml(model_file), renderer=stamp)
    write_base(out, model, running, notes)
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


def report(last: dict[str, Any], out: Path) -> None:
    """Say what the slice reached."""
    print(f"step {last['step']} of {last['steps']}, {last['cpu_hours']:.2f} CPU-hours, in {out}")
    print(f"loss on held-out photos {last['val_loss']:.4f}")
    print(closing_line(last))


if __name__ == "__main__":
    main()
