"""Other hint channels for a control branch: its first convolution over a linear map from new hints to old."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cldm.add_control import CONTROL
from cldm.model import model_config_of, shapes_of, with_hint_channels
from cldm.origin import origin_notes
from cldm.tensor_files import CheckpointError
from cldm.weights import notes_of, read_published, recorded_yaml

FIRST = f"{CONTROL}input_hint_block.0.weight"
BASE_NOTES = ("base_fingerprint", "base_sha256", "step")


class Converted(NamedTuple):
    """A file to write, and the model file that fits it."""

    tensors: dict[str, Tensor]  # by published name
    notes: dict[str, str]
    config: DictConfig


def read_branch(checkpoint: str | Path) -> dict[str, Tensor]:
    """The tensors of a file that has a control branch, whatever else it holds."""
    state = read_published(checkpoint)
    if FIRST not in state or state[FIRST].ndim != 4:
        raise CheckpointError(
            f"{checkpoint} has no control branch (no {FIRST}); name a control file, or add a branch with "
            "tool_add_control.py"
        )
    return state


def compose(weight: Tensor, colours: Tensor) -> Tensor:
    """The convolution that makes of new hints what `weight` makes of `new hints @ colours`.

    W'[m, n] = sum over c of W[m, c] colours[n, c]. Equal up to the border too: what pads a hint is zero on
    both sides.

    weight   (M, C, kh, kw), taught hints of C channels
    colours  (N, C), what the old hint shows where channel n of the new one is 1 and the others are 0
    returns  (M, N, kh, kw) float64
    """
    if weight.ndim != 4 or colours.ndim != 2 or weight.shape[1] != colours.shape[1]:
        raise ValueError(
            f"expected colours (N, C) for a convolution (M, C, kh, kw), found {tuple(colours.shape)} for "
            f"{tuple(weight.shape)}"
        )
    return torch.einsum("mcij,nc->mnij", weight.double(), colours.double())


def convert_hint(
    checkpoint: str | Path,
    target: str | Path,
    colours: Tensor,
    *,
    seen_as: Mapping[str, str | None],
    rule: str,
) -> Converted:
    """A control file that takes hints of N channels, to be written to `target`; see `compose` for `colours`.

    The first convolution is in float32, whatever the others are in: rounded further it would no longer give
    the same output. All else is as it was, a base or a decoder in the file included.

    seen_as  of data: what the record of the run is to say of hints from now on
    rule     what was done, in words

    Raises
        CheckpointError  a file without a control branch
        ValueError       colours of other channels than it takes
    """
    state = read_branch(checkpoint)
    found = state[FIRST].shape[1]
    if colours.shape[1] != found:
        raise ValueError(
            f"expected a branch for hints of {colours.shape[1]} channels, as the encoding has, found one for "
            f"{found} in {checkpoint}; name the encoding that it was trained with by --from"
        )
    tensors = {**state, FIRST: compose(state[FIRST], colours).float()}
    config = with_hint_channels(model_config_of(checkpoint), shapes_of(tensors))
    run = recorded_yaml(checkpoint, "run_config") or OmegaConf.create()
    for name, value in seen_as.items():
        OmegaConf.update(run, f"data.{name}", value, force_add=True)
    notes = {
        **moved_record(checkpoint, target),
        "model_config": OmegaConf.to_yaml(config),
        "run_config": OmegaConf.to_yaml(run),
        **origin_notes(rule, {"control": checkpoint}),
    }
    return Converted(tensors, notes, config)


def moved_record(checkpoint: str | Path, target: str | Path) -> dict[str, str]:
    """The step and the base that a file records, the base's path seen from another folder."""
    notes = notes_of(checkpoint)
    kept = {name: notes[name] for name in BASE_NOTES if name in notes}
    if "base" not in notes:
        return kept
    base = Path(checkpoint).resolve().parent / notes["base"]
    return {**kept, "base": os.path.relpath(base, Path(target).resolve().parent)}
