"""From the configuration of a run to the parts of its training: model, batches, callbacks, trainer."""

from __future__ import annotations

import logging
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader, Dataset, Sampler

from cldm.averaging import AverageWeights
from cldm.config import RANDOM
from cldm.control_ldm import ControlLDM
from cldm.fast_path import compile_networks, round_frozen
from cldm.finite import FiniteLoss
from cldm.logger import ImageLogger, Samples
from cldm.model import create_model, fast_precision, find_device, load_model_config, with_choices
from cldm.progress import StepProgressBar, duration
from cldm.run_state import StateFiles
from cldm.saver import ControlCheckpoint
from cldm.validation import LossCurve, Validation
from cldm.weights import base_of
from ldm.models.diffusion.memory import PosteriorMemory
from ldm.models.learning_rate import rate_factor
from ldm.models.optimizer import pays_in_backward

log = logging.getLogger(__name__)

LIGHTNING_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def build_model(config: DictConfig) -> tuple[ControlLDM, ControlCheckpoint]:
    """The model with its weights, and the callback that saves what is trained of it."""
    recorded = with_choices(
        load_model_config(config.model.config),
        parameterization=config.model.parameterization,
        only_mid_control=config.train.only_mid_control,
    )
    machine = {"attn_backend": config.model.attn_backend}  # its matter, and so not recorded
    used = with_choices(recorded, **machine, use_checkpoint=config.train.activation_checkpointing or None)
    start, base, carried = config.model.checkpoint, None, frozenset[str]()
    if start == RANDOM:
        model = create_model(used)
    else:
        model = create_model(used, start, config.model.base)
        base, carried = base_of(start, config.model.base)
    model.learning_rate = config.train.lr
    train = config.train
    model.noise_seed = train.seed
    model.min_snr_gamma, model.offset_noise = train.min_snr_gamma, train.offset_noise
    how = {"schedule": train.schedule, "warmup": train.warmup, "steps": train.max_steps}
    is_plain = train.schedule == "constant" and not train.warmup
    model.rate_schedule = None if is_plain else partial(rate_factor, **how)
    model.sd_locked = config.train.sd_locked
    pays = pays_in_backward(model.trainable_parameters(), find_device("auto"))
    model.update_in_backward = pays if train.update_in_backward is None else train.update_in_backward
    model.memory = PosteriorMemory() if config.train.keep_latents else None
    if train.frozen_precision is not None:
        round_frozen(model)
    if train.compile:
        compile_networks(model, find_device("auto"))
    model.strict_loading = False  # the state of a run lacks what is frozen; ControlCheckpoint checks the rest
    notes = {"model_config": OmegaConf.to_yaml(recorded), "run_config": OmegaConf.to_yaml(config)}
    options = {"precision": train.checkpoint_precision, "keep_last": train.keep_last, "full": train.save_full}
    return model, ControlCheckpoint(train.checkpoint_freq, base, carried, notes, **options)


def count_samples(config: DictConfig) -> int:
    """Samples that the run takes, on all of its devices."""
    train, device = config.train, find_device("auto")
    devices = 1 if device.type == "cpu" else len(train.gpus or ()) or torch.cuda.device_count()
    steps = 1 if train.dry_run else train.max_steps
    return steps * train.accumulate * train.batch_size * devices * train.nodes


class RankShare(Sampler[int]):
    """The sample numbers of a rank, dealt out in turn among the ranks that there are when it begins.

    start  samples of all ranks that are done already
    """

    def __init__(self, total: int, start: int = 0) -> None:
        self.total, self.start = total, start

    def __iter__(self) -> Iterator[int]:
        """The numbers of this rank."""
        rank, ranks = ranks_now()
        return iter(range(self.start + rank, self.total, ranks))

    def __len__(self) -> int:
        """How many there are."""
        return self.total // ranks_now()[1]


def ranks_now() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class RunLoader(DataLoader):
    """Batches of the samples of a run; Lightning has it begin where a resumed run stopped.

    Its length stays that of the whole run, as Lightning counts from the beginning.
    """

    def state_dict(self) -> dict[str, int]:
        """Nothing: `ControlCheckpoint` knows better how many batches are behind the last optimizer step."""
        return {"batches": 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin behind as many batches of each rank."""
        assert isinstance(self.sampler, RankShare)
        assert self.batch_size is not None
        self.sampler.start = state["batches"] * self.batch_size * ranks_now()[1]


def build_loader(config: DictConfig, stream: Dataset) -> DataLoader:
    """Batches of the samples of a run, in their order."""
    return RunLoader(
        stream,
        sampler=RankShare(len(stream)),
        batch_size=config.train.batch_size,
        num_workers=config.data.num_workers,
        pin_memory=find_device("auto").type == "cuda",
    )


def build_callbacks(config: DictConfig, samples: Samples, saver: ControlCheckpoint) -> list[pl.Callback]:
    """Sample grids, curves, progress and checkpoints; a dry run writes no checkpoint and reports instead.

    samples  what grids show and validation measures
    """
    settings = OmegaConf.to_object(config.sample)
    images = ImageLogger(
        config.train.logger_freq, config.train.grid_images, samples=samples, settings=settings
    )
    if config.train.dry_run:
        return [images, DryRunReport(config.train.max_steps, saver)]
    average = [AverageWeights(config.train.ema)] if config.train.ema else []
    first = [*average, FiniteLoss(config.train.bad_steps), images, LossCurve()]
    return [*first, *build_validation(config, samples), StepProgressBar(), saver]


def build_validation(config: DictConfig, samples: Samples) -> list[pl.Callback]:
    """Validation on the samples that have a photo; without a run or samples for it none, which is said."""
    every, steps = config.train.val_freq, config.train.max_steps
    if every == 0:
        return []
    measured = [sample for sample in samples if "jpg" in sample][: config.train.val_samples]
    if steps < every:
        log.info("no validation in %d steps: train.val_freq is %d, choose a lower one", steps, every)
    elif len(measured) < 2:
        log.warning("no validation: expected 2 or more frames with photos for it, found %d", len(measured))
    else:
        return [Validation(every, measured, batch_size=config.train.batch_size)]
    return []


def build_trainer(
    config: DictConfig, callbacks: Sequence[pl.Callback], notes: Mapping[str, str], version: str | None = None
) -> pl.Trainer:
    """Lightning's loop over optimizer steps.

    notes    metadata of the states that it saves
    version  folder of logs to go on with
    """
    quiet_lightning()
    gpus = list(config.train.gpus or ())
    device = find_device("auto")
    if device.type == "cpu":
        log.warning("no GPU found: training on the CPU")
    elif gpus:
        device = min((find_device(f"cuda:{gpu}") for gpu in gpus), key=torch.cuda.get_device_capability)
    rounded = config.train.frozen_precision  # autocast then computes in it, on a CPU, too
    fast = LIGHTNING_PRECISIONS[rounded or fast_precision(device)]
    return pl.Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1 if device.type == "cpu" else gpus or "auto",
        precision=fast if config.train.precision == "auto" else config.train.precision,
        max_steps=1 if config.train.dry_run else config.train.max_steps,
        accumulate_grad_batches=config.train.accumulate,
        gradient_clip_val=config.train.clip,
        callbacks=list(callbacks),
        use_distributed_sampler=False,  # Lightning's would shuffle the samples of all passes
        num_nodes=config.train.nodes,
        logger=build_logger(config, version),
        plugins=[StateFiles(notes)],
        default_root_dir=config.train.default_root_dir,
        log_every_n_steps=10,
        enable_checkpointing=False,  # ControlCheckpoint writes them
        enable_progress_bar=not config.train.dry_run,  # Lightning's own would count epochs
        enable_model_summary=False,
    )


def build_logger(config: DictConfig, version: str | None) -> Logger:
    """Where curves and pictures go beside the run's own files.

    Raises
        ValueError  Weights & Biases is asked for and not installed
    """
    root = config.train.default_root_dir
    if config.train.logger == "csv":
        return CSVLogger(root, version=version)
    if config.train.logger == "tensorboard":
        return TensorBoardLogger(root, version=version)
    folder = TensorBoardLogger(root, version=version).log_dir  # as the run's own files lie beside it
    try:
        return WandbLogger(project="scenecontrol", save_dir=folder)
    except ModuleNotFoundError as error:
        raise ValueError(
            "expected the package wandb for train.logger=wandb, found none; install it: pip install wandb"
        ) from error


def quiet_lightning() -> None:
    """Leave out what Lightning says of every run here: that frozen modules are in eval mode, and its tips."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (r"Found \d+ module\(s\) in eval mode", "The number of training batches", "`isinstance"):
        warnings.filterwarnings("ignore", message=message)


class DryRunReport(pl.Callback):
    """Says after one optimizer step what the whole run would take: time, memory, disk."""

    def __init__(self, max_steps: int, saver: ControlCheckpoint) -> None:
        self.max_steps = max_steps
        self.saver = saver

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock at the first batch of the step, behind the sample grid."""
        self.start = getattr(self, "start", time.monotonic())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Report when the step is done."""
        if trainer.global_step < 1:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = time.monotonic() - self.start
        checkpoint = sum(tensor.nbytes for tensor in self.saver.tensors(pl_module).values())
        log.info(
            "dry run: the first step took %.1f s (%d steps at that speed: %s), peak memory %.1f GiB, "
            "a checkpoint takes %.2f GiB",
            seconds,
            self.max_steps,
            duration(seconds * self.max_steps),
            peak_memory(pl_module.device) / 2**30,
            checkpoint / 2**30,
        )


def peak_memory(device: torch.device) -> int:
    """Bytes held at most: by torch on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
