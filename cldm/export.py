"""What others read of a training: the control branch by itself, in the precision of published files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cldm.checkpoint import SCHEDULE_KEYS, parts, to_model_keys
from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.tensor_writing import write_tensors
from cldm.weights import base_notes, base_of

CONTROL = "control_model."
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KEPT_NOTES = ("model_config", "run_config", "step")


def write_control(
    checkpoint: str | Path, target: str | Path, dtype: torch.dtype, base: str | Path | None = None
) -> tuple[int, str]:
    """Write the control branch of a checkpoint as `export_control` has it.

    Returns the number of tensors, and the base that is recorded.
    """
    tensors, notes = export_control(checkpoint, target, dtype, base)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    write_tensors(target, tensors, notes)
    return len(tensors), notes["base"]


def export_control(
    checkpoint: str | Path, target: str | Path, dtype: torch.dtype, base: str | Path | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The control branch of a checkpoint, and metadata by which its base is found from `target`.

    base  recorded in place of the base of the training, which it has to equal in everything that is not
          control; by default that one

    Raises
        CheckpointError  a file without control, one with a trained decoder, or another base
    """
    state = to_model_keys(read_tensors(checkpoint))
    found = base_of(checkpoint)[0]
    if "unet" in parts(state) and found != Path(checkpoint):
        raise CheckpointError(
            f"{checkpoint} carries a UNet decoder that was trained with its control branch, so the branch "
            "alone is of no use; keep the file as it is"
        )
    if base is not None:
        check_same_base(to_model_keys(read_tensors(found)), to_model_keys(read_tensors(base)), found, base)
    tensors = {key: value.to(dtype) for key, value in state.items() if key.startswith(CONTROL)}
    if not tensors:
        raise CheckpointError(f"{checkpoint} has no control branch to export")
    notes = {key: value for key, value in read_metadata(checkpoint).items() if key in KEPT_NOTES}
    return tensors, notes | base_notes(base or found, beside=Path(target).parent)


def check_same_base(
    trained_on: Mapping[str, Tensor], base: Mapping[str, Tensor], theirs: str | Path, ours: str | Path
) -> None:
    """Refuse a base that differs from the one of the training in a tensor that is not control."""
    kept = {key: value for key, value in trained_on.items() if not key.startswith(CONTROL)}
    for key in [*kept, *base]:
        if key in SCHEDULE_KEYS:
            continue
        if key not in kept or key not in base or not torch.equal(kept[key].float(), base[key].float()):
            raise CheckpointError(
                f"{ours} is not what the control branch was trained on, {theirs}: they differ in {key}"
            )
