"""Train the Streets autoencoder: python tool_train_streets_vae.py [--minutes M] [key=value ...]

    python tool_train_streets_vae.py
    python tool_train_streets_vae.py --minutes 45 slice.folder=/big/disk/vae
    python tool_train_streets_vae.py train.steps=200 train.last_share=0 slice.folder=output/try
    python tool_train_streets_vae.py --print_config

The first stage of the Streets base learns from rendered photos alone, without label maps; what is missing of
them is rendered first. Training goes in slices: after M minutes the state is in slice.folder, and the same
command continues from there. Each slice ends with OUT, the averaged weights so far in fp16 under the names
first_stage_model.*; the settings are configs/streets_vae.yaml with the key=value lines over it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cldm.cli import keep_freed_memory
from cldm.stage_script import closing_line, notes_of, parse_stage_args, read_stage, run_stage
from cldm.stages import VAEStage, check_vae_stage, identity_of

log = logging.getLogger("tool_train_streets_vae")

MOMENT_FRAMES = 500  # of the training photos; enough for the moments of the latents


def main(argv: Sequence[str] | None = None) -> None:
    """Settings -> photos -> a slice of training -> file and report."""
    args = parse_stage_args(argv, __doc__, "configs/streets_vae.yaml", "first_stage.safetensors")
    config = read_stage(args, VAEStage, check_vae_stage)
    if args.print_config:
        print(OmegaConf.to_yaml(config))
        return
    run_stage(args, config, train)


def train(config: DictConfig, out: Path) -> None:
    """One slice."""
    from cldm.slices import read_progress
    from datasets.streets.photos import make_missing_trees, read_photos

    folder, identity = Path(config.slice.folder), identity_of(config) + digest_of_features(config)
    folder.mkdir(parents=True, exist_ok=True)
    progress = read_progress(folder, identity)
    make_missing_trees(config.data)
    photos, held_out = read_photos(config.data, "train"), read_photos(config.data, "val")
    report(run_slice(config, progress, identity, photos, held_out.images, out), out)


def digest_of_features(config: DictConfig) -> str:
    """A line of the run's identity for the network of loss.features, where it counts."""
    from cldm.digests import sha256_of

    if not config.loss.features:
        return ""
    if not Path(config.data.features).is_file():
        raise FileNotFoundError(
            f"expected the network of loss.features at {config.data.features}, found nothing; train it first:"
            " python tool_train_streets_judge.py --config configs/streets_features.yaml"
        )
    return f"features: {sha256_of(config.data.features)}\n"


def features_of(config: DictConfig) -> Any:
    """The feature maps that loss.features compares, of a judge that stays as it is."""
    from metrics.judge import StreetsJudge

    if not config.loss.features:
        return None
    return StreetsJudge.load(config.data.features).network.requires_grad_(False).feature_maps


def run_slice(
    config: DictConfig, progress: Any, identity: str, photos: Any, held_out: Any, out: Path
) -> dict[str, Any]:
    """Train for the minutes of the slice, write the file, return the last figures."""
    import pytorch_lightning as pl

    from cldm.first_stage import Reconstructions, build_training, spread, write_first_stage
    from cldm.model import load_model_config
    from cldm.slices import TrainingSlice
    from cldm.stage_trainer import train_slice
    from datasets.streets import RENDERER_VERSION, renderer_hash

    keep_freed_memory()
    train, section = config.train, config.slice
    pl.seed_everything(train.seed, verbose=False)
    model_file = load_model_config(config.model.config)
    module = build_training(config, model_file, photos.images, features_of(config))
    times = {"minutes": section.minutes, "save_minutes": section.save_minutes}
    running = TrainingSlice(
        section.folder, module.autoencoder, progress, identity, decay=train.average, **times
    )
    figures = Reconstructions(
        held_out, running, section.folder, freq=section.log_freq, pictures=section.pictures
    )
    log.info("%d photos, %d parameters", len(photos), sum(p.numel() for p in module.parameters()))
    train_slice(module, lambda: cut_crops(config, photos), train, running, figures)
    some = photos.images[spread(len(photos), MOMENT_FRAMES)]
    scale_factor = model_file.model.params.scale_factor
    stamp = f"{RENDERER_VERSION} {renderer_hash()}"
    notes = notes_of(config, figures.last, model_config=OmegaConf.to_yaml(model_file), renderer=stamp)
    moments = write_first_stage(out, module.autoencoder, running.average, some, scale_factor, notes)
    return {**figures.last, "steps": train.steps, **moments}


def cut_crops(config: DictConfig, photos: Any) -> Any:
    """The batches of the whole run."""
    from datasets.streets.crops import Crops

    train = config.train
    sizes = {"crop": tuple(train.crop), "last_crop": tuple(train.last_crop)}
    return Crops(
        photos, train.steps, seed=train.seed, batch=train.batch_size, last_share=train.last_share, **sizes
    )


def report(last: dict[str, Any], out: Path) -> None:
    """Say what the slice reached."""
    std = ", ".join(f"{value:.3f}" for value in last["raw_std"])
    print(f"step {last['step']} of {last['steps']}, {last['cpu_hours']:.2f} CPU-hours")
    print(f"PSNR {last['psnr']:.2f} dB, {last['edge_psnr']:.2f} dB at edges")
    print(
        f"latents: standard deviations {std}; in {out} they are 1 after scale_factor {last['scale_factor']}"
    )
    print(closing_line(last))


if __name__ == "__main__":
    main()
