"""From a model file and weights to a model: building, strict loading, adding a control branch."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cldm.checkpoint import (
    SCHEDULE_KEYS,
    detect_architecture,
    match_keys,
    parts,
    to_model_keys,
    with_position_ids,
)
from cldm.cldm import ControlLDM, build_hint_block
from cldm.tensor_files import CheckpointError, read_metadata, read_shapes, read_tensors, sha256_of
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}

CONTROL, UNET = "control_model.", "model.diffusion_model."
MODEL_FILES = {
    "sd15": "models/cldm_v15.yaml",
    "sd21": "models/cldm_v21.yaml",
    "streets": "models/cldm_streets.yaml",
}


def create_model(
    config: str | Path | DictConfig, checkpoint: str | Path | None = None, base: str | Path | None = None
) -> ControlLDM:
    """Build the model of a model YAML file.

    config      path of the file, or its content
    checkpoint  weights to fill it with; without, the weights are random. The model is then built without
                memory and takes its tensors from the mapped file, so start-up holds one copy and initialises
                nothing that it overwrites.
    base        the file that `checkpoint` was trained on, if it holds only what was trained (`read_weights`)
    """
    if not isinstance(config, DictConfig):
        config = load_model_config(config)
    params = OmegaConf.to_container(config.model, resolve=True)
    if checkpoint is None:
        return instantiate_from_config(params)
    with torch.device("meta"):
        model = instantiate_from_config(params)
    load_weights(model, read_weights(checkpoint, base), where=str(checkpoint))
    return model.to("cpu")  # moves nothing: Lightning would keep saying that the module is on meta


def place(model: ControlLDM, device: str = "auto", precision: str = "auto") -> ControlLDM:
    """Move a model to where it samples, its networks in a precision; the autoencoder stays in float32.

    device     auto is the GPU if there is one
    precision  one of PRECISIONS; auto is bf16 or else fp16 on a GPU, float32 on a CPU
    """
    has_gpu = torch.cuda.is_available()
    device = ("cuda" if has_gpu else "cpu") if device == "auto" else device
    if device.startswith("cuda") and not has_gpu:
        raise ValueError(f"expected a GPU for device {device!r}, found none; use cpu, or see tool_doctor.py")
    half = "bf16" if has_gpu and torch.cuda.is_bf16_supported() else "16"
    precision = (half if device.startswith("cuda") else "32") if precision == "auto" else precision
    model.to(device)
    for network in (model.model, model.control_model, model.cond_stage_model):
        network.to(PRECISIONS[precision])
    return model.eval()


def load_model_config(path: str | Path, *, parameterization: str | None = None) -> DictConfig:
    """Read a model YAML file; `parameterization` is what its network predicts, if the file is wrong in it."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"expected a model YAML file such as {MODEL_FILES['sd15']}, found nothing at {path}"
        )
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig) or "model" not in config or "target" not in config.model:
        raise ValueError(f"{path} is no model file: expected 'model' with 'target' and 'params' in it")
    return with_choices(config, parameterization=parameterization)


def with_choices(
    config: DictConfig, *, parameterization: str | None = None, attn_backend: str | None = None
) -> DictConfig:
    """A model file that predicts `parameterization` and attends by `attn_backend`; None changes nothing."""
    changes: list[str] = []
    if parameterization is not None:
        changes.append(f"model.params.parameterization={parameterization}")
    if attn_backend is not None:
        networks = ("unet_config", "control_stage_config")
        changes += [f"model.params.{network}.params.attn_backend={attn_backend}" for network in networks]
    return cast(DictConfig, OmegaConf.merge(config, OmegaConf.from_dotlist(changes)))


def model_config_of(checkpoint: str | Path) -> DictConfig:
    """The model file that a checkpoint belongs to: recorded in it, or known by its architecture."""
    recorded = read_metadata(checkpoint).get("model_config")
    if recorded:
        return OmegaConf.create(recorded)
    return load_model_config(MODEL_FILES[detect_architecture(read_shapes(checkpoint), str(checkpoint))])


def load_state_dict(path: str | Path, location: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a weight file under the published names, on the device `location`."""
    return {key: tensor.to(location) for key, tensor in to_model_keys(read_tensors(path)).items()}


def load_weights(model: ControlLDM, state: Mapping[str, Tensor], where: str) -> None:
    """Give `model` the tensors of `state`, in float32, strictly: every one needed, none too many.

    Frozen parameters stay mapped to their file when they are float32 there.

    Raises
        CheckpointError  names what is missing, unexpected or of another shape, module by module
    """
    report = match_keys(shapes_of(model.state_dict()), shapes_of(state))
    if not report.ok:
        raise CheckpointError(
            f"{where} does not fit the model: {report.sentence()}; pass the model file it belongs to"
        )
    check_schedule(model.alphas_cumprod, state, where)
    schedule = {key: value for key, value in model.state_dict().items() if key in SCHEDULE_KEYS}
    weights = {key: value.float() for key, value in state.items() if key not in SCHEDULE_KEYS}
    model.load_state_dict({**weights, **schedule}, assign=True)


def check_schedule(ours: Tensor, state: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that were trained on another noise schedule than the model file says."""
    theirs = state.get("alphas_cumprod")
    if theirs is None:
        return
    if theirs.shape != ours.shape or not torch.allclose(ours.cpu(), theirs.float(), rtol=1e-3, atol=1e-6):
        raise CheckpointError(
            f"{where} holds a noise schedule that ends at alphas_cumprod {theirs[-1]:.6f}, the model file "
            f"one that ends at {ours[-1]:.6f}; set timesteps, linear_start and linear_end as the weights need"
        )


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name."""
    return {key: tuple(value.shape) for key, value in state.items()}


# -- weights that lie in two files ------------------------------------------------------------------------


def read_weights(checkpoint: str | Path, base: str | Path | None = None) -> dict[str, Tensor]:
    """All tensors of a model under the published names.

    A file that holds only what was trained (`control_model.*`, and the UNet's decoder of an unlocked run)
    lies over its base: `base` if given, else the file that `find_base` finds.
    """
    state = to_model_keys(read_tensors(checkpoint))
    if parts(state) >= {"unet", "control", "vae", "text"} and base is None:
        return state
    if not any(key.startswith(CONTROL) for key in state):
        raise CheckpointError(
            f"{checkpoint} has no control branch; make one: python tool_add_control.py {checkpoint} OUT"
        )
    path = find_base(checkpoint) if base is None else Path(base)
    return {**to_model_keys(read_tensors(path)), **state}


def base_of(checkpoint: str | Path, base: str | Path | None = None) -> tuple[Path, set[str]]:
    """The file that holds the frozen tensors of a checkpoint, and the names that differ from it."""
    shapes = to_model_keys(read_shapes(checkpoint))
    if parts(shapes) >= {"unet", "control", "vae", "text"}:
        return Path(checkpoint), set()
    return (find_base(checkpoint) if base is None else Path(base)), set(shapes)


def base_notes(base: str | Path, beside: str | Path) -> dict[str, str]:
    """Metadata by which `find_base` finds `base` again from a file in the folder `beside`."""
    base = Path(base)
    relative = os.path.relpath(base.resolve(), Path(beside).resolve())
    return {"base": relative, "base_bytes": str(base.stat().st_size), "base_sha256": sha256_of(base)}


def find_base(checkpoint: str | Path) -> Path:
    """The base of a file that holds only what was trained: at its recorded path, else by hash in models/."""
    notes = read_metadata(checkpoint)
    if "base" not in notes:
        raise CheckpointError(
            f"{checkpoint} holds a control branch and no record of its base; name the base with --base FILE"
        )
    size = int(notes["base_bytes"])
    recorded = Path(checkpoint).parent / notes["base"]
    if recorded.is_file() and recorded.stat().st_size == size:
        return recorded
    for candidate in sorted(Path("models").glob("*")):
        if (
            candidate.is_file()
            and candidate.stat().st_size == size
            and sha256_of(candidate) == notes["base_sha256"]
        ):
            return candidate
    raise CheckpointError(
        f"{checkpoint} was trained on {notes['base']} ({size} bytes, sha256 {notes['base_sha256'][:12]}...), "
        "found neither there nor in models/; name it with --base FILE"
    )


# -- adding a control branch ------------------------------------------------------------------------------


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
    params = OmegaConf.to_container(config.model, resolve=True)
    with torch.device("meta"):
        target = instantiate_from_config(params).state_dict()
    check_schedule(target["alphas_cumprod"], base, "the base")
    found = {key: (value, key) for key, value in base.items()}
    if control is None:
        encoder = ((CONTROL + key.removeprefix(UNET), key) for key in base if key.startswith(UNET))
        found |= {key: (base[source], source) for key, source in encoder}
        fresh = new_tensors(target, params["params"]["control_stage_config"]["params"], seed)
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
