"""Write a model as a diffusers folder: every network, tokenizer and scheduler, whole or not at all."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cldm.checkpoint import PART_PREFIXES, WHOLE, parts
from cldm.diffusers_config import folder_configs
from cldm.diffusers_folder import FOLDERS, LEFT_OVER
from cldm.diffusers_keys import OPEN_CLIP, is_left_out, text_to_diffusers, to_diffusers
from cldm.tensor_files import CheckpointError
from cldm.tensor_writing import write_tensors
from ldm.modules.encoders.tokenizer import CONTEXT_LENGTH, END_ID, START_ID, vocabulary
from ldm.util import instantiate_empty

WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_VERSION = "0.42.0"  # whose words these are
LIBRARY = {
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],  # for those who add a safety checker
    "safety_checker": [None, None],
    "image_encoder": [None, None],
}

# The images that CLIP was trained on: Radford et al. 2021.
FEATURE_EXTRACTOR = {
    "image_processor_type": "CLIPImageProcessor",
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), True),
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def write_folder(
    target: str | Path,
    config: DictConfig,
    state: Mapping[str, Tensor],
    notes: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a pipeline that diffusers loads; with a control branch in `state`, one of ControlNet.

    config  model file of the weights
    state   under published names: UNet, autoencoder and text encoder, perhaps control
    notes   metadata of the UNet's and the control branch's file
    dtype   of the tensors; by default what they have

    Raises
        CheckpointError  a model that diffusers has no words for, a target that exists, a full disk
    """
    target = Path(target).resolve()
    if target.exists():
        raise CheckpointError(f"{target} exists; choose another name or remove it first")
    params = OmegaConf.to_container(config.model.params, resolve=True)
    depth = check_params(params, state)
    configs = folder_configs(params, depth)
    present = parts(state)
    partial = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir(parents=True)
        for part in FOLDERS:
            if part in present:
                write_part(partial / FOLDERS[part], part, configs[part], state, depth, dict(notes), dtype)
        write_tokenizer(partial / "tokenizer", pad_id=configs["text"]["pad_token_id"])
        write_json(partial / "scheduler" / "scheduler_config.json", stamped(configs["scheduler"]))
        write_json(partial / "feature_extractor" / "preprocessor_config.json", FEATURE_EXTRACTOR)
        write_json(partial / "model_index.json", model_index("control" in present))
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_params(params: Mapping[str, Any], state: Mapping[str, Tensor]) -> int:
    """Refuse what diffusers would compute otherwise; return how many blocks the text encoder runs."""
    if lost := WHOLE - parts(state):
        raise CheckpointError(
            f"expected UNet, autoencoder and text encoder for a pipeline, {', '.join(sorted(lost))} missing; "
            "name the base with --base FILE"
        )
    schedule = params.get("beta_schedule", "linear")
    if schedule != "linear":
        raise CheckpointError(
            f"expected a linear beta_schedule, as SD has it, found {schedule!r} in the model file"
        )
    convolutions = PART_PREFIXES["control"] + "zero_convs."
    if params.get("only_mid_control") and any(
        bool(value.any()) for key, value in state.items() if key.startswith(convolutions)
    ):
        raise CheckpointError(
            "the model file has only_mid_control, which diffusers does not know, and the control branch has "
            "more than its middle; set it to false, or make the zero_convs zero"
        )
    encoder = instantiate_empty(params["cond_stage_config"])
    if not getattr(encoder, "normalize", True):
        raise CheckpointError(
            "the text encoder ends without its last norm (layer: hidden), which diffusers always runs; "
            "such a model stays in its own format: --to original"
        )
    return int(encoder.num_blocks)


def write_part(
    folder: Path,
    part: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    depth: int,
    notes: dict[str, str],
    dtype: torch.dtype | None,
) -> None:
    """One network: its configuration and its weights."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", stamped(config) if part != "text" else dict(config))
    is_text = part == "text"
    if is_text:
        prefix = PART_PREFIXES["text"]
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        tensors = text_to_diffusers(own, depth)
        rest = {
            key: value for key, value in own.items() if key.startswith(OPEN_CLIP) and is_left_out(key, depth)
        }
        if rest:
            write_tensors(folder / LEFT_OVER, rest, dtypes=converted(rest, dtype))
    else:
        tensors = to_diffusers(part, state)
    # transformers reads only files that say that they are torch's
    metadata = {"format": "pt"} | (notes if part in ("unet", "control") else {})
    name = "model.safetensors" if is_text else WEIGHTS
    write_tensors(folder / name, tensors, metadata, dtypes=converted(tensors, dtype))


def converted(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The type of each floating-point tensor, if all are to have one."""
    return (
        {} if dtype is None else {key: dtype for key, value in tensors.items() if value.is_floating_point()}
    )


def write_tokenizer(folder: Path, pad_id: int) -> None:
    """CLIP's vocabulary and merges, as open-clip ships them, in the files that transformers reads."""
    vocab, merges = vocabulary()
    words = {i: word for word, i in vocab.items()}
    special = {
        i: {"content": words[i], "special": True, "single_word": i not in (START_ID, END_ID)}
        | dict.fromkeys(("lstrip", "rstrip", "normalized"), False)
        for i in {START_ID, END_ID, pad_id}
    }
    names = {"bos_token": words[START_ID], "eos_token": words[END_ID], "unk_token": words[END_ID]}
    # SD2.1 pads with 0, which is the "!" inside of a word. As a single word only: otherwise every "!" of a
    # prompt would become padding, as it does in the published folders; here only one that stands alone does.
    names["pad_token"] = words[pad_id]
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", names)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT_LENGTH, "do_lower_case": True}
    settings |= {"add_prefix_space": False, "errors": "replace", "clean_up_tokenization_spaces": True}
    write_json(folder / "tokenizer_config.json", {**settings, **names, "added_tokens_decoder": special})


def model_index(with_control: bool) -> dict[str, Any]:
    """The table of contents of a pipeline."""
    name = "StableDiffusionControlNetPipeline" if with_control else "StableDiffusionPipeline"
    control = {"controlnet": ["diffusers", "ControlNetModel"]} if with_control else {}
    return stamped({"_class_name": name, **LIBRARY, **control, "requires_safety_checker": False})


def stamped(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the version of diffusers that its words are of."""
    return {**config, "_diffusers_version": DIFFUSERS_VERSION}


def write_json(path: Path, content: Mapping[Any, Any]) -> None:
    """Write a file of names and values, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
