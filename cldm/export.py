"""What others read: the control branch by itself, all of a model in one file, a diffusers folder.

What others wrote comes in by the same way: `read_model` reads any file or diffusers folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cldm.add_control import CONTROL, add_control
from cldm.checkpoint import SCHEDULE_KEYS, WHOLE, check_pair, match_keys, parts, with_position_ids
from cldm.cldm import ControlledModel
from cldm.diffusers_writing import converted, write_folder
from cldm.digests import fingerprint
from cldm.model import (
    check_schedule,
    empty_model,
    known_model_config,
    load_weights,
    model_config_of,
    name_mismatch,
    shapes_of,
    with_hint_channels,
)
from cldm.tensor_files import CheckpointError
from cldm.tensor_writing import write_tensors
from cldm.weights import base_notes, base_of, find_base, notes_of, read_published

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KEPT_NOTES = ("model_config", "run_config", "step")


# -- a model of any origin --------------------------------------------------------------------------------


class Model(NamedTuple):
    """Weights under published names, and what is known of them."""

    state: dict[str, Tensor]
    config: DictConfig | None  # model file; None of a lone network that says nothing of itself
    notes: dict[str, str]  # metadata for what is written of it

    @property
    def is_whole(self) -> bool:
        """Whether it samples by itself, with control or without."""
        return parts(self.state) >= WHOLE


def read_model(
    source: str | Path,
    base: str | Path | None = None,
    config: DictConfig | None = None,
    *,
    ema: bool = False,
) -> Model:
    """A model from files or diffusers folders, its tensors checked against its model file.

    source  whole or in part; a part lies over `base`, or over the base that is recorded in it
    config  model file; by default the recorded one, that of the folder, or that of the architecture
    ema     take the EMA copies in `source` in the place of the UNet's weights

    Raises
        CheckpointError  files that cannot be read, do not belong together or lack something
    """
    state = read_published(source, ema=ema)
    if parts(state) >= WHOLE and base is not None:
        raise CheckpointError(f"{source} holds a whole model, so the base {base} has no place; leave it out")
    notes = notes_of(source)
    if not parts(state) >= WHOLE:
        base = find_base(source) if base is None and "base_sha256" in notes else base
        if base is not None:
            below = read_published(base)
            check_pair(state, below, str(source), str(base))
            state = {**below, **state}
    whole = parts(state) >= WHOLE
    if config is None:
        config = model_config_of(source, base) if whole else known_model_config(source)
    config = config and with_hint_channels(config, shapes_of(state))
    if whole and config is not None:
        state = complete(state, config, str(source))
    kept = {key: value for key, value in notes.items() if key in KEPT_NOTES}
    kept |= {"source": Path(source).name, "source_fingerprint": fingerprint(source)}
    return Model(state, config, kept | ({"model_config": OmegaConf.to_yaml(config)} if config else {}))


def complete(state: Mapping[str, Tensor], config: DictConfig, where: str) -> dict[str, Tensor]:
    """Hold a whole model against its model file, and add the schedule's buffers that published files have."""
    target = empty_model(config).state_dict()
    has_control = "control" in parts(state)
    expected = {key: value for key, value in target.items() if has_control or not key.startswith(CONTROL)}
    report = match_keys(shapes_of(expected), shapes_of(state))
    if not report.ok:
        kinds = name_mismatch(shapes_of(target), shapes_of(state), where)
        raise CheckpointError(f"{where} does not fit its model file{kinds}: {report.sentence()}")
    check_schedule(target["alphas_cumprod"], state, where)
    of_control = {"logvar"}  # published with control branches only
    schedule = {key: target[key] for key in SCHEDULE_KEYS if has_control or key not in of_control}
    return {**{key: value for key, value in state.items() if key not in SCHEDULE_KEYS}, **schedule}


def build(model: Model, dtype: torch.dtype | None, where: str) -> ControlledModel:
    """The networks of a whole model, its weights rounded as in a file; control is fresh if it has none."""
    if model.config is None:
        raise CheckpointError(f"{where} is no whole model; expected UNet, autoencoder and text encoder")
    changed = converted(model.state, dtype)
    state = {key: value.to(changed.get(key, value.dtype)) for key, value in model.state.items()}
    if "control" not in parts(state):
        state = add_control(model.config, state)[0]
    network = empty_model(model.config)
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    load_weights(network, state, where)
    return network.eval()


# -- writing ----------------------------------------------------------------------------------------------


def write_original(model: Model, target: str | Path, dtype: torch.dtype | None = None) -> int:
    """Write all of a model into one file under the published names; returns the number of tensors.

    dtype  of the networks' tensors; by default what they have
    """
    tensors = with_position_ids(model.state)
    dtypes = {key: kind for key, kind in converted(tensors, dtype).items() if key not in SCHEDULE_KEYS}
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    write_tensors(target, tensors, model.notes, dtypes=dtypes)
    return len(tensors)


def write_diffusers(
    model: Model, target: str | Path, source: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write a whole model as a diffusers folder; `source` is what sentences call it."""
    if model.config is None:
        inside = ", ".join(sorted(parts(model.state))) or "nothing"
        raise CheckpointError(
            f"{source} holds {inside} alone; a pipeline needs UNet, autoencoder and text encoder, so name "
            "the base with --base FILE"
        )
    write_folder(target, model.config, model.state, model.notes, dtype)


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
    state = read_published(checkpoint)
    if "control" not in parts(state):
        raise CheckpointError(f"{checkpoint} has no control branch to export")
    notes = notes_of(checkpoint)
    found = base_of(checkpoint, None if "base_sha256" in notes else base)[0]
    if "unet" in parts(state) and found != Path(checkpoint):
        raise CheckpointError(
            f"{checkpoint} carries a UNet decoder that was trained with its control branch, so the branch "
            "alone is of no use; write the whole model: --to original or --to diffusers"
        )
    if base is not None:
        check_same_base(read_published(found), read_published(base), found, base)
    tensors = {key: value.to(dtype) for key, value in state.items() if key.startswith(CONTROL)}
    kept = {key: value for key, value in notes.items() if key in KEPT_NOTES}
    return tensors, kept | base_notes(base or found, beside=Path(target).parent)


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
