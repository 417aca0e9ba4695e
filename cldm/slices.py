"""Long trainings in slices: the whole state in one file, and a callback that ends a slice when time is up."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from torch import Tensor, nn

from cldm.averaging import WeightAverage
from cldm.progress import duration
from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.tensor_writing import write_tensors

log = logging.getLogger(__name__)

STATE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW keeps of each parameter


@dataclass
class Progress:
    """How far a run has come, over all of its slices."""

    step: int = 0  # optimizer steps done
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    slices: int = 0


def read_progress(folder: str | Path, identity: str) -> Progress:
    """How far the run in a folder has come; zero without a state, refused if it is the state of another run.

    identity  the settings of the run as YAML
    """
    path = Path(folder) / STATE
    if not path.exists():
        return Progress()
    notes = read_metadata(path)
    if not {"progress", "identity"} <= set(notes):
        raise CheckpointError(f"{path} is no state of a training; choose another slice.folder")
    if difference := first_difference(yaml.safe_load(notes["identity"]), yaml.safe_load(identity)):
        raise ValueError(
            f"{path} is the state of a run with {difference}; continue with those settings, or choose another"
            " slice.folder"
        )
    return Progress(**json.loads(notes["progress"]))


def first_difference(theirs: Any, ours: Any, key: str = "") -> str | None:
    """The first setting in which two runs differ, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = [*theirs, *(name for name in ours if name not in theirs)]
        found = (first_difference(theirs.get(n), ours.get(n), f"{key}.{n}".lstrip(".")) for n in names)
        return next((difference for difference in found if difference), None)
    return None if theirs == ours else f"{key}={theirs}, not {ours}"


class TrainingSlice(pl.Callback):
    """Continues a run from its state, keeps the average of its weights, saves, and stops in time.

    A batch names its `step`. The state is written at the boundary of optimizer steps alone, so a run that is
    killed loses at most `save_minutes`.

    network   what is trained: its parameters are those of the optimizer
    identity  the settings of the run as YAML; another run cannot continue this one
    """

    def __init__(
        self,
        folder: str | Path,
        network: nn.Module,
        progress: Progress,
        identity: str,
        *,
        decay: float,
        minutes: float,
        save_minutes: float,
    ) -> None:
        self.path = Path(folder) / STATE
        self.network = network
        self.progress = progress
        self.identity = identity
        self.average = WeightAverage(network, decay)
        self.minutes, self.save_minutes = minutes, save_minutes
        self.counted: float | None = None  # until when time is in `progress`; None before training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the state where there is one, and start the clocks."""
        if self.progress.step:
            self.load_weights()
            self.load_moments(trainer.optimizers[0])
        self.progress.slices += 1
        self.started = self.saved = self.counted = time.monotonic()
        self.cpu = time.process_time()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average; save now and then; stop when the time of the slice is over."""
        self.progress.step = int(batch["step"]) + 1
        self.average.update(self.network, self.progress.step)
        now = time.monotonic()
        if now - self.saved > 60 * self.save_minutes:
            self.save(trainer.optimizers[0])
            self.saved = time.monotonic()
        if now - self.started > 60 * self.minutes:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what the slice reached."""
        self.save(trainer.optimizers[0])
        log.info("step %d, state in %s", self.progress.step, self.path)

    def count_time(self) -> None:
        """Add what passed since the last call, or since training began."""
        if self.counted is None:
            return
        wall, cpu = time.monotonic(), time.process_time()
        self.progress.wall_seconds += wall - self.counted
        self.progress.cpu_seconds += cpu - self.cpu
        self.counted, self.cpu = wall, cpu

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the state whole or not at all."""
        self.count_time()
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.network.named_parameters():
            tensors[f"weights.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self.average.tensors[name]
            tensors |= {f"{key}.{name}": optimizer.state[parameter][key] for key in MOMENTS}
        notes = {"progress": json.dumps(vars(self.progress)), "identity": self.identity}
        write_tensors(self.path, tensors, {**notes, "threads": str(torch.get_num_threads())})

    @torch.no_grad()
    def load_weights(self) -> None:
        """Take weights and average from the state file."""
        state = read_tensors(self.path)
        expected = {name: value.shape for name, value in self.network.named_parameters()}
        weights = group(state, "weights")
        if {name: value.shape for name, value in weights.items()} != expected:
            raise CheckpointError(
                f"{self.path} holds the weights of another network; choose another slice.folder"
            )
        self.average.load(group(state, "average"))
        for name, parameter in self.network.named_parameters():
            parameter.copy_(weights[name])
        log.info("continuing at step %d, %s so far", self.progress.step, duration(self.progress.wall_seconds))

    def load_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer's moments from the state file."""
        state = read_tensors(self.path)
        for name, parameter in self.network.named_parameters():
            optimizer.state[parameter] = {
                "step": state[f"step.{name}"].clone(),
                **{key: torch.empty_like(parameter).copy_(state[f"{key}.{name}"]) for key in MOMENTS[:2]},
            }
        threads = read_metadata(self.path).get("threads")
        if threads != str(torch.get_num_threads()):
            log.warning(
                "this run used %s threads before, now %d: it continues, but not bit by bit as it would have",
                threads,
                torch.get_num_threads(),
            )


def group(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of a state whose names begin with `prefix`, without it."""
    return {key.removeprefix(f"{prefix}."): v for key, v in state.items() if key.startswith(f"{prefix}.")}
