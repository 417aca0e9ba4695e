"""From a model file and weights to a model: building, strict loading, placing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cldm.checkpoint import PART_PREFIXES, SCHEDULE_KEYS, detect_architecture, match_keys
from cldm.cldm import ControlledModel
from cldm.config import project_path, read_yaml
from cldm.diffusers_folder import folder_model_file
from cldm.tensor_files import CheckpointError
from cldm.weights import read_published, read_weights, recorded_yaml
from ldm.util import instantiate_empty, instantiate_from_config

if TYPE_CHECKING:
    from cldm.control_ldm import ControlLDM

log = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]
TO_SAMPLE = {"cldm.cldm.ControlLDM": "cldm.cldm.ControlledModel"}  # what a training module trains
PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}

MODEL_FILES = {
    "sd15": "models/cldm_v15.yaml",
    "sd21": "models/cldm_v21.yaml",
    "streets": "models/cldm_streets.yaml",
}


def create_model(
    config: str | Path | DictConfig,
    checkpoint: str | Path | None = None,
    base: str | Path | None = None,
) -> ControlLDM:
    """Build the training module of a model YAML file.

    config      path of the file, or its content
    checkpoint  weights to fill it with; without, the weights are random. The model is then built without
                memory and takes its tensors from the mapped file, so start-up holds one copy and initialises
                nothing that it overwrites.
    base        the file that `checkpoint` was trained on, if it holds only what was trained (`read_weights`)
    """
    if not isinstance(config, DictConfig):
        config = load_model_config(config)
    if checkpoint is None:
        return instantiate_from_config(model_params(config))
    model = instantiate_empty(model_params(config))
    load_weights(model, read_weights(checkpoint, base), where=str(checkpoint))
    return model


def load_model(config: DictConfig, checkpoint: str | Path, base: str | Path | None = None) -> ControlledModel:
    """The model of a checkpoint to sample with; as `create_model`, but without Lightning, sooner there."""
    model = empty_model(config)
    load_weights(model, read_weights(checkpoint, base), where=str(checkpoint))
    return model.eval()


def empty_model(config: DictConfig) -> ControlledModel:
    """Names and shapes of a model to sample with, without memory."""
    params = model_params(config)
    params["target"] = TO_SAMPLE.get(params["target"], params["target"])
    return instantiate_empty(params)


def model_params(config: DictConfig) -> dict[str, Any]:
    """`target` and `params` of a model file."""
    return OmegaConf.to_container(config.model, resolve=True)


def place(model: ControlledModel, device: str = "auto", precision: str = "auto") -> ControlledModel:
    """Move a model to where it samples, its networks in a precision; the autoencoder stays in float32.

    device     auto is the GPU if there is one
    precision  one of PRECISIONS, or auto: see `fast_precision`
    """
    target = find_device(device)
    dtype = PRECISIONS[fast_precision(target) if precision == "auto" else precision]
    for network in (model.model, model.control_model, model.cond_stage_model):
        network.to(dtype)  # before the move: a GPU need not hold them in float32
    return model.to(target).eval()


def find_device(name: str) -> torch.device:
    """The device of a name, auto being the first GPU or else the CPU; one that is not there is refused."""
    count = torch.cuda.device_count()
    try:
        device = torch.device(("cuda" if count else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"expected a device such as cpu, cuda or cuda:1, found {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"expected one of {count} GPUs, found {name!r}; tool_doctor.py says what torch sees")
    return device


def fast_precision(device: torch.device) -> str:
    """What is fast and safe: bf16 on GPUs that compute in it, fp16 on other GPUs, float32 on a CPU."""
    if device.type != "cuda":
        return "32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "16"


def load_model_config(path: str | Path) -> DictConfig:
    """Read a model YAML file; refuse another kind of file in a sentence."""
    path = project_path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a model YAML file such as {MODEL_FILES['sd15']}, found nothing at {path}"
        )
    return check_model_config(read_yaml(path), str(path))


def check_model_config(config: DictConfig, where: str) -> DictConfig:
    """Refuse what is no model file."""
    if not isinstance(config.get("model"), DictConfig) or not {"target", "params"} <= set(config.model):
        raise ValueError(f"{where} is no model file: expected 'model' with 'target' and 'params' in it")
    return config


def with_choices(
    config: DictConfig,
    *,
    parameterization: str | None = None,
    only_mid_control: bool | None = None,
    attn_backend: str | None = None,
    use_checkpoint: bool | None = None,
) -> DictConfig:
    """A model file with the choices that are no matter of its weights; None leaves one as it is."""
    params = {"parameterization": parameterization, "only_mid_control": only_mid_control}
    for network in ("unet_config", "control_stage_config"):
        params[f"{network}.params.attn_backend"] = attn_backend
        params[f"{network}.params.use_checkpoint"] = use_checkpoint
    changed = config.copy()
    for name, value in params.items():
        if value is not None:
            OmegaConf.update(changed, f"model.params.{name}", value)
    return changed


def model_config_of(checkpoint: str | Path, base: str | Path | None = None) -> DictConfig:
    """The model file that a checkpoint belongs to.

    It is the one recorded in the checkpoint or made from its diffusers folder, else that of the base, else
    that of the architecture; of the last two with as many hint channels as the control branch has.
    """
    known = known_model_config(checkpoint)
    if known is not None:
        return known
    shapes = shapes_of(read_published(checkpoint))
    config = None if base is None else known_model_config(base)
    if config is None:
        below = {} if base is None else shapes_of(read_published(base))
        config = load_model_config(MODEL_FILES[detect_architecture({**below, **shapes}, str(checkpoint))])
    return with_hint_channels(config, shapes)


def known_model_config(checkpoint: str | Path) -> DictConfig | None:
    """The model file that a checkpoint itself tells: a pipeline by its configurations, a file by a record."""
    if Path(checkpoint).is_dir():
        return folder_model_file(checkpoint)
    recorded = recorded_yaml(checkpoint, "model_config")
    return recorded and check_model_config(recorded, f"the model_config in {checkpoint}")


def with_hint_channels(config: DictConfig, shapes: Shapes) -> DictConfig:
    """A model file for hints of as many channels as the control branch in `shapes` takes, if there is one."""
    first = shapes.get(PART_PREFIXES["control"] + "input_hint_block.0.weight")
    name = "model.params.control_stage_config.params.hint_channels"
    if first is None or len(first) != 4 or first[1] == OmegaConf.select(config, name, default=3):
        return config
    changed = config.copy()
    OmegaConf.update(changed, name, first[1])
    return changed


def load_state_dict(path: str | Path, location: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file or a diffusers folder under the published names, on the device `location`."""
    return {key: tensor.to(location) for key, tensor in read_published(path).items()}


def load_weights(model: ControlledModel, state: Mapping[str, Tensor], where: str) -> None:
    """Give `model` the tensors of `state`, in float32, strictly: every one needed, none too many.

    Frozen parameters stay mapped to their file when they are float32 there.

    Raises
        CheckpointError  names what is missing, unexpected or of another shape, module by module
    """
    report = match_keys(shapes_of(model.state_dict()), shapes_of(state))
    if not report.ok:
        kinds = name_mismatch(shapes_of(model.state_dict()), shapes_of(state), where)
        raise CheckpointError(f"{where} does not fit the model{kinds}: {report.sentence()}")
    check_schedule(model.alphas_cumprod, state, where)
    schedule = {key: value for key, value in model.state_dict().items() if key in SCHEDULE_KEYS}
    weights = {key: value.float() for key, value in state.items() if key not in SCHEDULE_KEYS}
    model.load_state_dict({**weights, **schedule}, assign=True)


def name_mismatch(expected: Shapes, found: Shapes, where: str) -> str:
    """Say what a file is and what the model is, if they are of two architectures."""
    try:
        theirs, ours = detect_architecture(found, where), detect_architecture(expected, "the model file")
    except CheckpointError as error:
        return f" ({error})"
    if theirs == ours:
        return ""
    return f" (it is {theirs}, the model is {ours}; {MODEL_FILES[theirs]} is the model file of {theirs})"


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


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    """Shape of every tensor by name."""
    return {key: tuple(value.shape) for key, value in state.items()}
