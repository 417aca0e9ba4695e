"""What a run leaves on disk: weights to use, and a state to go on from.

checkpoints/step=NNNNNN.safetensors     what was trained and no more; `generate.py` reads it
checkpoints/best.safetensors            the same, from the lowest loss on the validation samples
state/step=NNNNNN.state.safetensors     that with optimizer and counters, for --resume
"""

from __future__ import annotations

import logging
import math
import shlex
import signal
import threading
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from cldm.checkpoint import SCHEDULE_KEYS, with_position_ids
from cldm.control_ldm import ControlLDM
from cldm.digests import fingerprint
from cldm.model import PRECISIONS
from cldm.run_state import FOLDER, SUFFIX
from cldm.tensor_files import CheckpointError
from cldm.tensor_writing import write_tensors
from cldm.weights import base_notes

log = logging.getLogger(__name__)

BEST = "best.safetensors"
KEPT_STATES = 2  # the last one, and one to fall back on
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class ControlCheckpoint(pl.Callback):
    """Saves every `every` optimizer steps, at the end, on errors and on signals.

    Weights are the control branch, and the UNet's decoder if that was trained; the file names its base by
    path and hash. Without a base (random weights) it holds everything. A signal lets the optimizer step be
    finished, then the run is saved and stops; a second one ends it at once.

    base       file that holds the frozen tensors
    carried    names of tensors that differ from the base although this run does not train them
    notes      further metadata of the files
    precision  of the weights, "32" or "16"
    keep_last  weight files that are kept beside the best one; None keeps all
    """

    def __init__(
        self,
        every: int,
        base: Path | None,
        carried: Collection[str] = (),
        notes: Mapping[str, str] | None = None,
        *,
        precision: str = "32",
        keep_last: int | None = None,
        full: bool = False,
    ) -> None:
        self.every = every
        self.base = base
        self.carried = frozenset(carried)
        self.notes = dict(notes or {})
        self.dtype = PRECISIONS[precision]
        self.keep_last = keep_last
        self.full = full
        self.last_step = self.seen_step = 0
        self.batches = 0  # behind the last optimizer step
        self.best_loss = math.inf
        self.last_weights: Path | None = None
        self.signal: int | None = None
        self.handlers: dict[int, Any] = {}  # that were there before
        self.hosts: Any = None  # group of the processes in which no GPU is waited for

    # -- when to save ------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fix the folder: asking Lightning for it is a collective, so every rank does it here."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)
        if trainer.world_size > 1:
            self.hosts = torch.distributed.new_group(backend="gloo")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals; Lightning has taken SIGTERM before, and would stop in the middle of a step.

        What a run that was killed had not finished writing is removed.
        """
        if trainer.is_global_zero:
            for partial in self.folder.glob("*/.*.partial"):
                partial.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
            self.handlers = {number: signal.signal(number, self.receive) for number in numbers}

    def receive(self, number: int, frame: Any) -> None:
        """Remember the first signal; the second has the effect that it had before."""
        if self.signal is not None:
            signal.signal(number, self.handlers[number])
            signal.raise_signal(number)
        self.signal = number

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save behind an optimizer step when it is time, or when the run is to stop."""
        step = trainer.global_step
        if step == self.seen_step:
            return  # within an optimizer step
        self.seen_step = step
        self.batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self.keep_best(trainer, pl_module)
        stop = self.signal is not None
        if self.hosts is not None:
            told = torch.tensor(int(stop))
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, self.hosts)
            stop = bool(told)
        if stop:
            trainer.should_stop = True
        if stop or step % self.every == 0:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the result."""
        self.save(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save what was reached, whatever ends the run; other ranks may not be there any more to help."""
        if trainer.world_size == 1:
            self.save(trainer, pl_module)
        else:
            self.write_weights(pl_module, trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    # -- what is saved -----------------------------------------------------------------------------------

    def save(self, trainer: pl.Trainer, model: ControlLDM) -> None:
        """Write weights and state, once for each optimizer step, then remove old ones."""
        step = trainer.global_step
        if step == self.last_step:
            return
        self.last_step = step
        (self.folder / FOLDER).mkdir(parents=True, exist_ok=True)
        self.write_weights(model, step)
        state = self.folder / FOLDER / f"step={step:06d}{SUFFIX}"
        trainer.save_checkpoint(state, weights_only=False)  # unset, it is talked about
        self.prune()

    @rank_zero_only
    def write_weights(self, model: ControlLDM, step: int) -> None:
        """Write the weights of a step and say how to use them."""
        path = self.last_weights = self.folder / "checkpoints" / f"step={step:06d}.safetensors"
        self.write(path, model, step)
        command = f"python generate.py --ckpt {shlex.quote(str(path))} --hint MAPS --out OUT"
        log.info("wrote %s; sample from it: %s", path, command)

    def write(self, path: Path, model: ControlLDM, step: int, **more: str) -> None:
        """Write the weights into a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        notes = {**self.notes, "step": str(step), **more}
        if self.base is not None and not self.full:
            notes |= base_notes(self.base, beside=path.parent)
        with model.average.applied(model) if model.average else nullcontext():
            write_tensors(path, self.tensors(model), notes)

    def state_notes(self) -> dict[str, str]:
        """Metadata of the states: settings, and the base that the frozen weights come from."""
        if self.base is None:
            return self.notes
        return {**self.notes, "base_fingerprint": fingerprint(self.base)}

    @rank_zero_only
    def prune(self) -> None:
        """Remove all but the last files of each kind."""
        for folder, suffix, kept in ((FOLDER, SUFFIX, KEPT_STATES), ("checkpoints", "", self.keep_last)):
            files = sorted((self.folder / folder).glob(f"step=*{suffix or '.safetensors'}"), key=step_of)
            for path in files[:-kept] if kept else []:
                path.unlink()

    @rank_zero_only
    def keep_best(self, trainer: pl.Trainer, model: ControlLDM) -> None:
        """Write the weights of the lowest loss on the validation samples; a NaN is never the lowest."""
        step, found = trainer.global_step, model.validation_loss
        if found is None or found[0] != step or not found[1] < self.best_loss:
            return
        self.best_loss = found[1]
        self.write(self.folder / "checkpoints" / BEST, model, step, val_loss=f"{found[1]:.6g}")

    def tensors(self, model: ControlLDM) -> dict[str, Tensor]:
        """What belongs into a file of weights."""
        state = model.state_dict()
        if self.base is None or self.full:
            kept = with_position_ids(state)
        else:
            names = self.trained(model) | self.carried
            kept = {name: value for name, value in state.items() if name in names}
        return {
            name: value.to(self.dtype) if value.is_floating_point() and name not in SCHEDULE_KEYS else value
            for name, value in kept.items()
        }

    def trained(self, model: ControlLDM) -> set[str]:
        """Names of what is trained."""
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    # -- the state ---------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave the frozen weights out, and set the counters of batches to the last optimizer step.

        They may be in the middle of the next one when the run ends in an exception.
        """
        names = self.trained(pl_module) | self.carried
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}
        done = {"ready": self.batches, "started": self.batches, "processed": self.batches}
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counter in ("total", "current"):
            progress[counter] |= {**done, "completed": self.batches - 1}  # as while the last batch ends
        checkpoint["ranks"] = trainer.world_size
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [{"batches": self.batches}]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse the state of a run that trains something else."""
        expected, found = self.trained(pl_module) | self.carried, set(checkpoint["state_dict"])
        if expected != found:
            name = sorted(expected ^ found)[0]
            raise CheckpointError(
                f"expected the state of a run that trains {len(expected)} tensors, found {len(found)}; {name}"
                f" is {'missing' if name in expected else 'not trained now'}"
            )
        if checkpoint["ranks"] != trainer.world_size:
            raise CheckpointError(
                f"expected the state of a run on {trainer.world_size} processes, found one on"
                f" {checkpoint['ranks']}; a step would take another number of samples"
            )
        self.last_step = self.seen_step = checkpoint["global_step"]

    def state_dict(self) -> dict[str, Any]:
        """The best loss."""
        return {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The best loss."""
        self.best_loss = state_dict["best_loss"]


def step_of(path: Path) -> int:
    """Optimizer step of a file."""
    digits = path.name.removeprefix("step=").partition(".")[0]
    return int(digits) if digits.isdigit() else -1
