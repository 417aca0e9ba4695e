"""Read a diffusers folder: a whole pipeline, or one network of it, under the published names."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from cldm.checkpoint import PART_PREFIXES, WHOLE, check_pair
from cldm.diffusers_config import Config, model_file_of, unet_params
from cldm.diffusers_keys import (
    count_levels,
    open_clip_rest,
    text_layers,
    text_to_published,
    to_published,
    vae_levels,
)
from cldm.tensor_files import CheckpointError, read_metadata, read_tensors

log = logging.getLogger(__name__)

FOLDERS = {"unet": "unet", "control": "controlnet", "vae": "vae", "text": "text_encoder"}
CLASSES = {
    "UNet2DConditionModel": "unet",
    "ControlNetModel": "control",
    "AutoencoderKL": "vae",
    "CLIPTextModel": "text",
}
LEFT_OVER = "not_in_diffusers.safetensors"  # beside the text encoder: what diffusers has no place for
SUPPORTED = "expected a pipeline of Stable Diffusion 1.5 or 2.1, or the folder of one of its networks"

_SINGLE = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([\w-]+))?\.(safetensors|bin)")
_INDEX = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)\.(safetensors|bin)\.index(?:\.([\w-]+))?\.json"
)
_MAX_JSON = 50_000_000
DAMAGE = (
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
)  # of wrong values


def read_folder(path: str | Path) -> dict[str, Tensor]:
    """All networks of a pipeline, or the one of a network's own folder, under the published names.

    The tensors stay mapped to their files.

    Raises
        CheckpointError  what is no such folder, lacks a file, or holds networks that do not belong together
    """
    places = find_parts(Path(path))
    state: dict[str, Tensor] = {}
    for part, place in places.items():
        state |= read_part(part, place)
    if {"unet", "control"} <= set(places):
        check_pair(state, state, str(places["control"]), str(places["unet"]))
    return state


def folder_model_file(path: str | Path) -> DictConfig | None:
    """The model file of a pipeline, from its configurations; None of the folder of one network.

    Raises
        CheckpointError  a configuration that is damaged, or of what is not supported
    """
    path = Path(path)
    places = find_parts(path)
    if not set(places) >= WHOLE:
        return None
    configs: dict[str, Config] = {part: read_json(place / "config.json") for part, place in places.items()}
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        configs["scheduler"] = read_json(scheduler)
    else:
        log.warning("%s has no scheduler/, so it is taken to predict noise (eps)", path)
    try:
        return model_file_of(configs, text_layers(read_weight_files(places["text"])), str(path))
    except CheckpointError:
        raise
    except (*DAMAGE, ValueError) as error:
        raise CheckpointError(
            f"{path}: a config.json in it lacks {error} or has it wrong; download or copy it again"
        ) from error


def find_parts(path: Path) -> dict[str, Path]:
    """The folder of each network in a diffusers folder, by part."""
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        names = config.get("architectures")
        name = config.get("_class_name") or (names[0] if isinstance(names, list) and names else None)
        if not isinstance(name, str) or name not in CLASSES:
            raise CheckpointError(f"{path} holds a {name}, which is not supported; {SUPPORTED}")
        return {CLASSES[name]: path}
    found = {part: path / name for part, name in FOLDERS.items() if (path / name / "config.json").is_file()}
    index = path / "model_index.json"
    if index.is_file():
        content = read_json(index)
        if "unet" not in found or "text_encoder_2" in content:
            raise CheckpointError(
                f"{path} is a {content.get('_class_name')}, which is not supported; {SUPPORTED}"
            )
        absent: tuple[Any, ...] = (None, [], [None, None])
        named = {part for part, name in FOLDERS.items() if content.get(name) not in absent}
        if lost := sorted(FOLDERS[part] for part in named - set(found)):
            raise CheckpointError(
                f"{path} names {lost[0]}/ in its model_index.json, but there is no {lost[0]}/config.json; "
                "download or copy the whole folder"
            )
    if not found:
        raise CheckpointError(
            f"{path} is a folder with neither model_index.json nor config.json in it; {SUPPORTED}"
        )
    return found


def read_part(part: str, place: Path) -> dict[str, Tensor]:
    """One network under the published names, its sizes held against its configuration."""
    config = read_json(place / "config.json")
    tensors = read_weight_files(place)
    if part == "text":
        is_open = config.get("hidden_act", "quick_gelu") == "gelu"
        state = text_to_published(tensors, open_clip=is_open, where=str(place))
        state |= read_left_over(place, state) if is_open else {}
        return {PART_PREFIXES["text"] + key: value for key, value in state.items()}
    state = to_published(part, tensors, str(place))
    try:
        sizes = vae_sizes if part == "vae" else unet_sizes
        expected, found = sizes(part, config, state, place)
    except DAMAGE as error:
        raise CheckpointError(f"{place}/config.json lacks {error} or has it wrong; copy it again") from error
    for name, value in found.items():
        if value != expected[name]:
            raise CheckpointError(
                f"{place}: config.json says {name} {expected[name]}, its weights have {value}; "
                "they are of two models, so take both files from one"
            )
    return state


Sizes = tuple[dict[str, Any], dict[str, Any]]  # as the config.json says, as the weights have it


def unet_sizes(part: str, config: Config, state: Mapping[str, Tensor], place: Path) -> Sizes:
    """What tells UNets and control branches apart."""
    prefix = PART_PREFIXES[part]
    levels = count_levels([key.removeprefix(prefix) for key in state], str(place))
    params = unet_params(config, str(place))
    blocks = params["num_res_blocks"]
    expected = {
        "levels": len(params["channel_mult"]),
        "layers_per_block": [blocks] * len(levels.blocks) if isinstance(blocks, int) else list(blocks),
        "levels with attention": sorted(params["attention_resolutions"]),
        "block_out_channels[0]": params["model_channels"],
    }
    found = {
        "levels": len(levels.blocks),
        "layers_per_block": list(levels.blocks),
        "levels with attention": sorted(2**level for level in levels.attention),
        "block_out_channels[0]": state[prefix + "time_embed.0.weight"].shape[1],
    }
    if part == "control":
        expected["conditioning_channels"] = config.get("conditioning_channels", 3)
        found["conditioning_channels"] = state[prefix + "input_hint_block.0.weight"].shape[1]
    return expected, found


def vae_sizes(part: str, config: Config, state: Mapping[str, Tensor], place: Path) -> Sizes:
    """What tells autoencoders apart."""
    prefix = PART_PREFIXES[part]
    levels, blocks = vae_levels([key.removeprefix(prefix) for key in state])
    expected = {"levels": len(config["block_out_channels"]), "layers_per_block": config["layers_per_block"]}
    return expected, {"levels": levels, "layers_per_block": blocks - 1}  # the decoder has one more


def read_left_over(place: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last block of SD2.1's text encoder and what else a folder has no place for: as we left it, or zero.

    SD2.1 runs none of it; the published files hold it all the same, and strict readers want it.
    """
    rest = open_clip_rest(state, str(place))
    path = place / LEFT_OVER
    if path.is_file():
        kept = read_tensors(path)
        if {key: value.shape for key, value in kept.items()} == rest:
            return kept
        log.warning("%s does not belong to the text encoder beside it and is left out", path)
    log.info("%s: %d tensors that SD2.1 does not use are not in it and become zero", place, len(rest))
    return {key: torch.zeros(shape) for key, shape in rest.items()}


def read_weight_files(place: Path) -> dict[str, Tensor]:
    """The tensors of one network, from one file or from shards.

    Full precision goes before fp16 and that before other variants, safetensors before .bin.
    """
    ranked = sorted((rank, path) for path in place.iterdir() if (rank := _rank(path.name)) is not None)
    if not ranked:
        raise CheckpointError(
            f"{place} has a config.json and no weights; expected diffusion_pytorch_model.safetensors or "
            "model.safetensors in it, so download or copy the whole folder"
        )
    path = ranked[0][1]
    if path.suffix != ".json":
        return read_tensors(path)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map of tensors to files; download or copy it again")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{path} names {name!r}, which lies elsewhere; expected files beside it")
        tensors |= read_tensors(place / name)
    if lost := [name for name in weight_map if name not in tensors]:
        raise CheckpointError(f"{path} promises {lost[0]}, which no shard holds; download or copy them again")
    return tensors


def _rank(name: str) -> tuple[int, int, str] | None:
    """Which of several files to read first; None for a file that holds no weights."""
    single, index = _SINGLE.fullmatch(name), _INDEX.fullmatch(name)
    if single:
        variant, kind = single[1], single[2]
    elif index:
        kind, variant = index[1], index[2]
    else:
        return None
    return {None: 0, "fp16": 1}.get(variant, 2), kind == "bin", name


def read_notes(path: str | Path) -> dict[str, str]:
    """What our export wrote into the metadata of the control branch or the UNet of a folder."""
    places = find_parts(Path(path))
    for part in ("control", "unet"):
        path = places.get(part, Path()) / "diffusion_pytorch_model.safetensors"
        if part in places and path.is_file():
            return {key: text for key, text in read_metadata(path).items() if key != "format"}
    return {}


def read_json(path: Path) -> dict[str, Any]:
    """A configuration; refused in a sentence if it is none."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download or copy the whole folder")
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError("it is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); download or copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected names and values")
    return content
