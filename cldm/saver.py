"""Checkpoints of a run: what was trained and no more, in a file that `generate.py` reads."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from cldm.checkpoint import with_position_ids
from cldm.cldm import ControlLDM
from cldm.tensor_writing import write_tensors
from cldm.weights import base_notes

log = logging.getLogger(__name__)


class ControlCheckpoint(pl.Callback):
    """Writes <log_dir>/checkpoints/step=NNNNNN.safetensors every `every` steps, at the end and on errors.

    The file holds the control branch, and the UNet's decoder if that was trained; it names its base by path
    and hash. Without a base (random weights) it holds everything.

    base     file that holds the frozen tensors
    carried  names of tensors that differ from the base although this run does not train them
    notes    further metadata of the file
    """

    def __init__(
        self,
        every: int,
        base: Path | None,
        carried: Collection[str] = (),
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self.every = every
        self.base = base
        self.carried = frozenset(carried)
        self.notes = dict(notes or {})
        self.last_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fix the folder: asking Lightning for it is a collective, so every rank does it here."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save when a multiple of `every` optimizer steps is reached."""
        if trainer.global_step % self.every == 0:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the result."""
        self.save(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save what was reached, whatever ends the run."""
        self.save(trainer, pl_module)

    @rank_zero_only
    def save(self, trainer: pl.Trainer, model: ControlLDM) -> None:
        """Write one file, once for each optimizer step, and say how to use it."""
        step = trainer.global_step
        if step == self.last_step:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step={step:06d}.safetensors"
        notes = {**self.notes, "step": str(step)}
        if self.base is not None:
            notes |= base_notes(self.base, beside=self.folder)
        write_tensors(path, self.tensors(model), notes)
        self.last_step = step
        command = f"python generate.py --ckpt {shlex.quote(str(path))} --hint MAPS --out OUT"
        log.info("wrote %s; sample from it: %s", path, command)

    def tensors(self, model: ControlLDM) -> dict[str, Tensor]:
        """What belongs into the file."""
        state = model.state_dict()
        if self.base is None:
            return with_position_ids(state)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        kept = trained | self.carried
        return {name: value for name, value in state.items() if name in kept}
