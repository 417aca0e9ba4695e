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
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from cldm.cli import keep_freed_memory, refuse
from cldm.config import RANDOM, check_run, load_run_config
from datasets import DATASETS, create_dataset, find_entry, missing_paths

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader

    from cldm.cldm import ControlLDM

log = logging.getLogger("tutorial_train")

# A flag of the predecessors, and the key that it sets.
FLAGS = {
    "batch_size": "train.batch_size",
    "default_root_dir": "train.default_root_dir",
    "gpus": "train.gpus",
    "logger_freq": "train.logger_freq",
    "max_steps": "train.max_steps",
    "resume_path": "model.checkpoint",
    "sd_locked": "train.sd_locked",
}

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
    parser.add_argument("--gpus", type=int, nargs="+", help="GPU ids; absent means automatic")
    parser.add_argument("--logger_freq", type=int, help="optimizer steps between two sample grids")
    parser.add_argument("--max_steps", type=int, help="optimizer steps")
    parser.add_argument("--resume_path", help="weights to start from (no optimizer state); 'random' for none")
    parser.add_argument(
        "--sd_locked", action=argparse.BooleanOptionalAction, help="keep the UNet's decoder frozen"
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
        find_entry(args.dataset)
    config = load_run_config(args.dataset, args.config, [*flags, *given.get("overrides", [])])
    find_entry(config.data.name)
    config.model.checkpoint = str(find_weights(config.model.checkpoint))
    check_run(config)
    return config


def find_weights(name: str) -> Path:
    """The weights, under the name that was given or as the other of .safetensors and .ckpt."""
    path = Path(name)
    other = path.with_suffix(".ckpt" if path.suffix == ".safetensors" else ".safetensors")
    return other if name != RANDOM and not path.exists() and other.exists() else path


def find_missing(config: DictConfig) -> list[str]:
    """Everything that the run needs and that is not there, each with where it is obtained."""
    entry = find_entry(config.data.name)
    lacking = [] if entry.prepare else missing_paths(config.data.name, config.data.root)
    missing = [f"{path} is missing" for path in lacking]
    if missing:
        missing.append(f"  the data set is obtained from {entry.source}; its folder is data.root=DIR")
    if not Path(config.model.config).exists():
        missing.append(f"{config.model.config} is missing: the model file (YAML), named by --config")
    if config.model.checkpoint != RANDOM and not Path(config.model.checkpoint).exists():
        missing.append(
            f"{config.model.checkpoint} is missing: the weights to start from, named by --resume_path"
        )
        missing.append(OBTAIN_WEIGHTS.format(checkpoint=config.model.checkpoint))
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
        except ValueError as error:
            refuse(str(error))


def quiet_lightning() -> None:
    """Leave out what Lightning says of every run here: that frozen modules are in eval mode, and its tips."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (r"Found \d+ module\(s\) in eval mode", "The number of training batches", "`isinstance"):
        warnings.filterwarnings("ignore", message=message)


def train(config: DictConfig) -> None:
    """Run one training; its parts are the functions below."""
    import pytorch_lightning as pl

    keep_freed_memory()
    quiet_lightning()
    pl.seed_everything(config.train.seed, verbose=False)
    try:
        dataset = create_dataset(config.data.name, **dataset_options(config))
        for name in ("size", "prompt"):  # recorded in checkpoints, so that sampling knows them
            if config.data[name] is None:
                config.data[name] = getattr(dataset, name, None)
        model, saver = build_model(config)
        count = min(config.train.grid_images, len(dataset))
        grid = grid_samples(config, dataset) or [dataset[i] for i in range(count)]
        loader = build_loader(config, dataset)
        trainer = build_trainer(config, [saver, *build_callbacks(config, grid)])
    except (ValueError, FileNotFoundError) as error:
        refuse(str(error))
    log.info("%d samples of %s, %d trained parameters", len(dataset), dataset.root, count_trained(model))
    trainer.fit(model, loader)


def build_model(config: DictConfig) -> tuple[ControlLDM, pl.Callback]:
    """The model with its weights, and the callback that saves what is trained of it."""
    from cldm.model import create_model, load_model_config, with_choices
    from cldm.saver import ControlCheckpoint
    from cldm.weights import base_of

    recorded = with_choices(
        load_model_config(config.model.config),
        parameterization=config.model.parameterization,
        only_mid_control=config.train.only_mid_control,
    )
    model_config = with_choices(recorded, attn_backend=config.model.attn_backend)  # a matter of the machine
    base, carried = None, set()
    if config.model.checkpoint == RANDOM:
        model = create_model(model_config)
    else:
        model = create_model(model_config, config.model.checkpoint, config.model.base)
        base, carried = base_of(config.model.checkpoint, config.model.base)
    model.learning_rate = config.train.lr
    model.sd_locked = config.train.sd_locked
    notes = {"model_config": OmegaConf.to_yaml(recorded), "run_config": OmegaConf.to_yaml(config)}
    return model, ControlCheckpoint(config.train.checkpoint_freq, base, carried, notes)


def dataset_options(config: DictConfig) -> dict[str, Any]:
    """Keywords of the data set; what the run leaves open is the data set's own."""
    options = {name: config.data[name] for name in ("root", "split", "size", "prompt")}
    return {
        name: OmegaConf.to_object(value) if name == "size" else value
        for name, value in options.items()
        if value is not None
    }


def grid_samples(config: DictConfig, dataset: Any) -> Sequence[Any]:
    """Validation maps for the sample grid; none when the run or the data set has no validation split."""
    split, count = config.data.val_split, config.train.grid_images
    if split is None or not hasattr(dataset, "preview"):
        return []
    try:
        return dataset.preview(
            count, root=dataset.root, split=split, size=dataset.size, prompt=dataset.prompt
        )
    except FileNotFoundError as error:
        log.warning("%s The sample grid shows training maps instead.", error)
        return []


def build_loader(config: DictConfig, dataset: Any) -> DataLoader:
    """Shuffled batches; a data set smaller than a batch is one batch."""
    from torch.utils.data import DataLoader

    from cldm.model import find_device

    return DataLoader(
        dataset,
        batch_size=config.train.batch_size,
        shuffle=True,
        drop_last=len(dataset) >= config.train.batch_size,
        num_workers=config.data.num_workers,
        persistent_workers=config.data.num_workers > 0,
        pin_memory=find_device("auto").type == "cuda",
    )


def build_callbacks(config: DictConfig, grid: Sequence[Any]) -> list[pl.Callback]:
    """Sample grids and progress."""
    from cldm.logger import ImageLogger
    from cldm.progress import StepProgressBar

    settings = OmegaConf.to_object(config.sample)
    images = ImageLogger(config.train.logger_freq, config.train.grid_images, samples=grid, settings=settings)
    return [images, StepProgressBar()]


def build_trainer(config: DictConfig, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Lightning's loop over optimizer steps."""
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.loggers import TensorBoardLogger

    from cldm.model import fast_precision, find_device

    gpus = list(config.train.gpus or ())
    device = find_device("auto")
    if device.type == "cpu":
        log.warning("no GPU found: training on the CPU")
    elif gpus:
        device = min((find_device(f"cuda:{gpu}") for gpu in gpus), key=torch.cuda.get_device_capability)
    fast = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[fast_precision(device)]
    return pl.Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1 if device.type == "cpu" else gpus or "auto",
        precision=fast if config.train.precision == "auto" else config.train.precision,
        max_steps=config.train.max_steps,
        accumulate_grad_batches=config.train.accumulate,
        gradient_clip_val=config.train.clip,
        callbacks=callbacks,
        logger=TensorBoardLogger(config.train.default_root_dir),
        default_root_dir=config.train.default_root_dir,
        log_every_n_steps=10,
        enable_checkpointing=False,  # ControlCheckpoint writes them
        enable_model_summary=False,
    )


def count_trained(model: ControlLDM) -> int:
    """Parameters in the optimizer."""
    return sum(parameter.numel() for parameter in model.trainable_parameters())


if __name__ == "__main__":
    main()
