"""Train a ControlNet: python tutorial_train.py --dataset NAME [key=value ...]

    python tutorial_train.py --dataset cityscapes
    python tutorial_train.py --dataset cityscapes data.root=/data/cityscapes train.lr=2e-6 --max_steps 20000
    python tutorial_train.py --dataset cityscapes --config models/cldm_v21.yaml \\
        --resume_path models/control_sd21_ini.safetensors
    python tutorial_train.py --dataset cityscapes --print_config

The run is configs/NAME.yaml with the flags and then the key=value lines over it; --config names another run
file, or another model file (told apart by content). Checkpoints, sample grids and TensorBoard events go to
DEFAULT_ROOT_DIR/lightning_logs/version_N.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cldm.cli import keep_freed_memory, refuse
from cldm.config import RANDOM, DataConfig, check_run, load_run_config, project_path
from cldm.presets import PRESETS, advice, preset_overrides
from datasets import DATASETS, create_dataset, find_entry, missing_paths, registered_name

log = logging.getLogger("tutorial_train")

# A flag of the predecessors, and the key that it sets.
FLAGS = {
    "batch_size": "train.batch_size",
    "default_root_dir": "train.default_root_dir",
    "dry_run": "train.dry_run",
    "gpus": "train.gpus",
    "logger_freq": "train.logger_freq",
    "max_steps": "train.max_steps",
    "resume": "train.resume",
    "resume_path": "model.checkpoint",
    "sd_locked": "train.sd_locked",
}

# Keys of `data` that are the run's own.
NOT_OF_DATASETS = (
    *("name", "val_split", "num_workers", "rare_classes", "rare_temperature", "rare_pixels"),
    *("check", "cache", "cache_crops", "cache_precision"),
)
OTHER_SUFFIX = {".safetensors": ".ckpt", ".ckpt": ".safetensors"}
OBTAIN_WEIGHTS = """\
  SD 1.5: v1-5-pruned.safetensors of huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5
  SD 2.1: v2-1_512-ema-pruned.safetensors of huggingface.co/stabilityai/stable-diffusion-2-1-base
  put it into models/ and add a control branch: python tool_add_control.py models/FILE {checkpoint}"""
WORKS_NOW = """\
What works now, without weights and data: a random miniature on rendered streets, to try the machinery:
  python tutorial_train.py --dataset streets --resume_path random --max_steps 20"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the flags; a flag that is not given leaves its key to the run file."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=layout, argument_default=argparse.SUPPRESS
    )
    parser.add_argument(
        "--dataset",
        default=None,
        help=f"one of {', '.join(DATASETS)}; by default the run file's, or cityscapes",
    )
    parser.add_argument("--config", default=None, help="run file or model file (YAML)")
    parser.add_argument("--batch_size", type=int, help="samples of a batch on one device")
    parser.add_argument("--default_root_dir", help="folder that the run writes into")
    parser.add_argument(
        "--gpus", type=int, nargs="+", help="GPU ids, the last flag before key=value is another; absent: all"
    )
    parser.add_argument("--logger_freq", type=int, help="optimizer steps between two sample grids")
    parser.add_argument("--max_steps", type=int, help="optimizer steps")
    parser.add_argument("--resume", help="a state (*.state.safetensors) to go on from bit by bit, or 'last'")
    parser.add_argument(
        "--resume_path", help="weights alone to start anew from, without optimizer and counters; or 'random'"
    )
    parser.add_argument(
        "--sd_locked", action=argparse.BooleanOptionalAction, help="keep the UNet's decoder frozen"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="one real step and its sample grid, then a report"
    )
    parser.add_argument(
        "--preset", default=None, help=f"batch and savings for a GPU's memory: {', '.join(PRESETS)}"
    )
    parser.add_argument("--print_config", action="store_true", default=False, help="print the run and exit")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="any key of the run, e.g. train.lr=2e-6"
    )
    return parser.parse_intermixed_args(argv)


def resolve(args: argparse.Namespace) -> DictConfig:
    """The configuration of the run: run file, then flags, then overrides."""
    given = vars(args)
    flags = [f"{key}={json.dumps(given[flag])}" for flag, key in FLAGS.items() if flag in given]
    if args.dataset is not None:
        args.dataset = registered_name(args.dataset)
        find_entry(args.dataset)
    overrides = [*flags, *given.get("overrides", [])]
    if args.preset is not None:
        plain = load_run_config(args.dataset, args.config, [])
        overrides = [*preset_overrides(args.preset, plain), *overrides]
    config = load_run_config(args.dataset, args.config, overrides)
    find_entry(config.data.name)
    config.model.checkpoint = str(find_weights(config.model.checkpoint))
    check_run(config)
    return config


def find_weights(name: str) -> Path:
    """The weights, under the name that was given or, said aloud, as the other of .safetensors and .ckpt."""
    path = Path(name)
    other = path.with_suffix(OTHER_SUFFIX.get(path.suffix, path.suffix)) if path.name else path
    if path.exists() or not other.exists():
        return path
    log.warning("%s is not there; using %s", path, other)
    return other


def find_missing(config: DictConfig) -> list[str]:
    """Everything that the run needs and that is not there, each with where it is obtained."""
    entry = find_entry(config.data.name)
    lacking = [] if entry.prepare else missing_paths(config.data.name, config.data.root)
    missing = [f"{path} is missing" for path in lacking]
    if missing:
        missing.append(f"  the data set is obtained from {entry.source}; its folder is data.root=DIR")
    if not project_path(config.model.config).exists():
        missing.append(f"{config.model.config} is missing: the model file (YAML), named by --config")
    if config.model.checkpoint != RANDOM and not Path(config.model.checkpoint).exists():
        missing.append(
            f"{config.model.checkpoint} is missing: the weights to start from, named by --resume_path"
        )
        missing.append(OBTAIN_WEIGHTS.format(checkpoint=config.model.checkpoint))
    for path in filter(None, (config.model.checkpoint, config.model.base)):
        if Path(path).is_dir():
            missing.append(
                f"{path} is a folder, but a base is recorded by the hash of its file; bring it in:"
            )
            missing.append(f"  python tool_export.py {shlex.quote(path)} OUT.safetensors --to original")
    return missing


def main(argv: Sequence[str] | None = None) -> None:
    """Configuration -> model -> data -> trainer -> fit."""
    args = parse_args(argv)
    try:
        config = resolve(args)
    except (ValueError, FileNotFoundError) as error:
        refuse(str(error))
    if args.print_config:
        print(OmegaConf.to_yaml(config))
        return
    if missing := find_missing(config):
        refuse("\n".join(["cannot start:", *missing, WORKS_NOW]))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    make_missing_data(config)
    train(config)


def make_missing_data(config: DictConfig) -> None:
    """Render a data set that is made and not downloaded, where it is not there yet."""
    entry = find_entry(config.data.name)
    if entry.prepare and missing_paths(config.data.name, config.data.root):
        try:
            entry.make(config.data.root, size=config.data.size and tuple(config.data.size))
        except (ValueError, OSError) as error:
            refuse(str(error))


def train(config: DictConfig) -> None:
    """Data -> model -> trainer -> fit."""
    import pytorch_lightning as pl

    from cldm.run_state import folder_of, state_to_resume
    from cldm.trainer import build_callbacks, build_loader, build_model, build_trainer, count_samples
    from datasets.stream import Stream

    keep_freed_memory()
    pl.seed_everything(config.train.seed, verbose=False)
    try:
        Path(config.train.default_root_dir).mkdir(parents=True, exist_ok=True)
        dataset = create_dataset(config.data.name, **dataset_options(config))
        if config.data.check:
            check_soundness(config, dataset)
        for name in ("size", "prompt"):  # recorded in checkpoints, so that sampling knows them
            if config.data[name] is None:
                config.data[name] = getattr(dataset, name, None)
        check_kept(config, dataset)
        model, saver = build_model(config)
        check_channels(config, dataset, model.control_model.hint_channels)
        frames = cached_frames(config, dataset, model) if config.data.cache else dataset
        stream = Stream(drawn_by_class(config, dataset, frames), config.train.seed, count_samples(config))
        loader = build_loader(config, stream)
        notes = saver.state_notes()
        state = state_to_resume(config, notes.get("base_fingerprint"))
        callbacks = build_callbacks(config, grid_samples(config, dataset), saver)
        trainer = build_trainer(config, callbacks, notes, folder_of(state, config))
    except (ValueError, OSError) as error:
        refuse(str(error))
    trained = sum(parameter.numel() for parameter in model.trainable_parameters())
    log.info("%d samples of %s, %d trained parameters", len(dataset), config.data.name, trained)
    batch, ranks = config.train.batch_size, trainer.world_size
    log.info(
        "an optimizer step takes %d samples: batch_size %d x accumulate %d x %d processes",
        batch * config.train.accumulate * ranks,
        batch,
        config.train.accumulate,
        ranks,
    )
    fit(trainer, model, loader, state, config)
    if saver.signal is not None:
        sys.exit(128 + saver.signal)
    if config.train.export_at_end:
        export(config, saver)


def fit(trainer: Any, model: Any, loader: Any, state: Path | None, config: DictConfig) -> None:
    """Train; too little memory is answered with settings that need less."""
    import torch

    try:
        trainer.fit(model, loader, ckpt_path=state, weights_only=True)
    except torch.OutOfMemoryError:
        free = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else None
        refuse(advice(config, free))


def export(config: DictConfig, saver: Any) -> None:
    """Write the control branch of the last checkpoint for others to read."""
    import torch

    from cldm.export import write_control

    target = config.train.export_at_end
    try:
        write_control(saver.last_weights, target, torch.float16)
    except (ValueError, OSError) as error:
        refuse(str(error))
    log.info("wrote %s, the control branch alone", target)


def dataset_options(config: DictConfig) -> dict[str, Any]:
    """Keywords of the data set; what the run leaves open is the data set's own."""
    given, own = vars(OmegaConf.to_object(config).data), vars(DataConfig())
    options = {name: given[name] for name in own if name not in NOT_OF_DATASETS and given[name] != own[name]}
    return options | ({"seed": config.train.seed} if options.get("words") else {})


def check_soundness(config: DictConfig, dataset: Any) -> None:
    """Look at a handful of frames; say what is odd, and refuse what would ruin the training."""
    from datasets.check import quick_check

    report = quick_check(dataset)
    if report.findings:
        log.warning("%s", report.findings_text())
    if not report.may_train:
        command = f"python tool_check_dataset.py --dataset {config.data.name} --root {dataset.root}"
        raise ValueError(
            f"{report.of('error')[0].message.rstrip('.')}. {report.verdict()}; all that is wrong: {command};"
            " data.check=false trains all the same"
        )


def check_channels(config: DictConfig, dataset: Any, expected: int) -> None:
    """Refuse hints of other channels than the model's, before the first step."""
    encoding = getattr(dataset, "encoding", None)
    found = 3 if encoding is None else encoding.channels
    if found != expected:
        raise ValueError(
            f"expected hints of {expected} channels, as {config.model.config} has, found {found} of"
            f" data.hint={config.data.hint}; choose another, or hint_channels: {found} in the model file"
        )


def drawn_by_class(config: DictConfig, dataset: Any, frames: Any) -> Any:
    """The frames themselves, which are taken in turn, or with rare classes a drawing of them by class."""
    if not config.data.rare_classes:
        return frames
    from datasets.rare_classes import draw_rare_classes

    data = config.data
    options = {"temperature": data.rare_temperature, "least_pixels": data.rare_pixels}
    return draw_rare_classes(dataset, frames=frames, **options)


def cached_frames(config: DictConfig, dataset: Any, model: Any) -> Any:
    """The data set with moments instead of photos, encoded now where they are missing; the stages leave."""
    from cldm.cache import locked, write_samples, write_texts
    from cldm.shelf import Shelf
    from cldm.weights import read_weights
    from datasets.cached import CachedDataset, ViewRows, collate_rows, identity_of_rows
    from datasets.framing import Views

    data, start = config.data, config.model.checkpoint
    views = Views(dataset.framing, data.cache_crops, config.train.seed)
    precision = {"dtype": data.cache_precision}
    loading = {"batch_size": config.train.batch_size, "num_workers": data.num_workers}
    with locked(data.cache):
        identity, rows = identity_of_rows(dataset, views, data.cache), ViewRows(dataset, views)
        write_samples(data.cache, rows, collate_rows, model, identity, **loading, **precision)
        frames = CachedDataset(dataset, views, data.cache)
        model.known_texts = write_texts(data.cache, frames.texts(), model.cond_stage_model, **precision)
    Shelf(model, None if start == RANDOM else lambda: read_weights(start, config.model.base))
    return frames


def check_kept(config: DictConfig, dataset: Any) -> None:
    """Refuse to keep latents by frame where a frame does not look the same every time."""
    framing = dataset.framing
    if config.train.keep_latents and config.data.cache:
        raise ValueError("expected one of data.cache and train.keep_latents, found both; the cache does both")
    if config.train.keep_latents and not framing.is_fixed:
        raise ValueError(
            "expected samples that stay the same with train.keep_latents=true, found"
            f" data.crop={framing.crop} and data.flip={framing.flip}; set keep_latents to false"
        )


def grid_samples(config: DictConfig, dataset: Any) -> Sequence[Any]:
    """What validation measures and the grid shows the first of: validation frames, else training ones."""
    count = max(config.train.grid_images, config.train.val_samples if config.train.val_freq else 0)
    if config.data.val_split is not None:
        try:
            return validation_samples(dataset, config.data.val_split, count)
        except FileNotFoundError as error:
            log.warning("%s Training frames stand in for it.", error)
    return [dataset[i] for i in range(min(count, len(dataset)))]


def validation_samples(dataset: Any, split: str, count: int) -> Sequence[Any]:
    """Frames spread over a split, or the first maps of one that has no photos."""
    try:
        return spread(dataset.still(split), count)
    except FileNotFoundError:
        if not hasattr(dataset, "preview"):
            raise
    options = {"root": dataset.root, "size": dataset.size, "hint": dataset.encoding.name}
    return dataset.preview(count, split=split, prompts=dataset.prompts, **options)


def spread(dataset: Any, count: int) -> list[Any]:
    """Samples from all over a data set, in an order in which also the first ones are."""
    from cldm.validation import golden

    return [dataset[i] for i in sorted(range(len(dataset)), key=golden)[:count]]


if __name__ == "__main__":
    main()
