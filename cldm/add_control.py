"""The state of a controlled model from a Stable Diffusion without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from cldm.checkpoint import SCHEDULE_KEYS, match_keys, with_position_ids
from cldm.cldm import build_hint_block
from cldm.model import check_schedule, empty_model, model_params, shapes_of
from cldm.tensor_files import CheckpointError

CONTROL, UNET = "control_model.", "model.diffusion_model."


def add_control(
    config: DictConfig, base: Mapping[str, Tensor], control: Mapping[str, Tensor] | None = None, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of a controlled model from a Stable Diffusion without one (Zhang et al. 2023, section 3.1).

    config   model file of the result
    base     tensors of the base; those of its UNet's encoder are copied into the control branch
    control  tensors of a published control file; its branch is taken instead of the copy, and nothing else
    seed     of the hint block, which nothing is copied into
    returns  state by published name, and where each tensor came from: a name in the base, "CONTROL", or "NEW"
    """
    target = empty_model(config).state_dict()
    check_schedule(target["alphas_cumprod"], base, "the base")
    found = {key: (value, key) for key, value in base.items()}
    if control is None:
        encoder = ((CONTROL + key.removeprefix(UNET), key) for key in base if key.startswith(UNET))
        found |= {key: (base[source], source) for key, source in encoder}
        fresh = new_tensors(target, model_params(config)["params"]["control_stage_config"]["params"], seed)
        found |= {key: (value, "NEW") for key, value in fresh.items()}
    else:
        found |= {key: (value, "CONTROL") for key, value in control.items() if key.startswith(CONTROL)}
    found |= {key: (target[key], key if key in base else "NEW") for key in SCHEDULE_KEYS}
    state = {key: found[key][0] for key in target if key in found}
    sources = {key: found[key][1] for key in state}
    leftover = {
        key: value for source in (base, control or {}) for key, value in source.items() if key not in target
    }
    report = match_keys(shapes_of(target), shapes_of({**leftover, **state}))
    if not report.ok:
        raise CheckpointError(f"the files do not make the model of the model file: {report.sentence()}")
    state = with_position_ids(state)
    return state, {key: sources.get(key, key) for key in state}


def new_tensors(
    target: Mapping[str, Tensor], control_params: Mapping[str, Any], seed: int
) -> dict[str, Tensor]:
    """What a fresh control branch has and no encoder holds: a random hint block, zero convolutions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hint = build_hint_block(control_params.get("hint_channels", 3), control_params["model_channels"])
    fresh = {f"{CONTROL}input_hint_block.{key}": value for key, value in hint.state_dict().items()}
    zeros = (f"{CONTROL}zero_convs.", f"{CONTROL}middle_block_out.")
    return fresh | {key: torch.zeros(value.shape) for key, value in target.items() if key.startswith(zeros)}
