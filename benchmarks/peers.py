"""Our model with random weights, and the same weights in the networks of diffusers and transformers.

The weights are shared, not copied: of two full-size models in one process only activations, gradients and
the state of the optimizer double.
"""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from common import ARCHITECTURES, say
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from omegaconf import OmegaConf
from oracles import randomize, to_diffusers_control, to_diffusers_unet, to_diffusers_vae
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cldm.model import create_model, load_model_config

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from cldm.cldm import ControlLDM


class Peer(NamedTuple):
    """The parts of a diffusers pipeline."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    controlnet: ControlNetModel

    @property
    def networks(self) -> list[nn.Module]:
        """The parts with weights."""
        return [self.vae, self.text_encoder, self.unet, self.controlnet]


def make_model(arch: str) -> tuple[ControlLDM, DictConfig]:
    """Our model with a random value in every weight, the zero ones too, and its model file."""
    config = load_model_config(ARCHITECTURES[arch])
    say(f"making {arch} with random weights")
    model = create_model(config)
    with torch.no_grad():
        for module in (model.model, model.control_model, model.first_stage_model):
            randomize(module)
    return model, config


def make_peer(model: ControlLDM, config: DictConfig) -> Peer:
    """The weights of `model` in the networks of diffusers and transformers."""
    params: dict[str, Any] = OmegaConf.to_container(config.model.params, resolve=True)
    unet_params = params["unet_config"]["params"]
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torch warns of each tensor that a network without memory is given
        unet = to_diffusers_unet(model.model.diffusion_model, unet_params)
        control = to_diffusers_control(model.control_model, params["control_stage_config"]["params"])
        vae = to_diffusers_vae(model.first_stage_model, params["first_stage_config"]["params"])
    share(unet, model.model.diffusion_model, "model.diffusion_model.", convert_ldm_unet_checkpoint)
    share(control, model.control_model, "control_model.", convert_controlnet_checkpoint)
    share(vae, model.first_stage_model, "first_stage_model.", convert_ldm_vae_checkpoint)
    vae.register_to_config(scaling_factor=model.scale_factor)
    text = make_text_encoder(model, params["cond_stage_config"].get("params") or {})
    for network in (unet, vae, text):
        network.requires_grad_(False).eval()
    return Peer(vae, text, make_tokenizer(), unet, control.train())


def share(theirs: nn.Module, ours: nn.Module, prefix: str, convert: Callable[..., dict[str, Tensor]]) -> None:
    """Give `theirs` the tensors of `ours`, renamed by diffusers itself."""
    state = {prefix + key: value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(convert(state, dict(theirs.config)), assign=True)


def make_text_encoder(model: ControlLDM, params: Mapping[str, Any]) -> CLIPTextModel:
    """The text encoder of transformers with the weights of ours."""
    width = params.get("width", 768)
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=params.get("num_layers", 12),
        num_attention_heads=params.get("num_heads", 12),
        hidden_act="quick_gelu",
        projection_dim=width,
    )
    theirs = CLIPTextModel(config).eval()
    weights = model.cond_stage_model.transformer["text_model"].state_dict()
    nested = any(key.startswith("text_model.") for key in theirs.state_dict())  # transformers 4
    renamed = {f"text_model.{key}" if nested else key: value for key, value in weights.items()}
    theirs.load_state_dict(renamed, assign=True)
    return theirs


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer from the merges that open-clip ships, in the order that CLIP numbers its tokens."""
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49408 - 2 * 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def encode_text(peer: Peer, texts: list[str]) -> Tensor:
    """(B, 77, D), as their pipeline does."""
    ids = peer.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return peer.text_encoder(ids.input_ids.to(peer.text_encoder.device))[0]


SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def train_schedule() -> DDPMScheduler:
    """The scheduler of their training example, with the noise schedule of Stable Diffusion."""
    return DDPMScheduler(**SCHEDULE)


def sample_schedule() -> DDIMScheduler:
    """Their DDIM as Stable Diffusion configures it."""
    return DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
