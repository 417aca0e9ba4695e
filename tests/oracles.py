"""The same networks in diffusers, filled by diffusers' own conversion of our state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor, nn


def randomize(module: nn.Module, seed: int = 0, gain: float = 0.7) -> nn.Module:
    """Give every parameter, the zero ones too, a value that keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 1
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = 1 + 0.1 * noise if is_norm else noise * (gain / fan_in**0.5 if fan_in > 1 else 0.1)
    return module


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value, in float64."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def unet_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a published YAML file in the words of diffusers."""
    widths = [params["model_channels"] * mult for mult in params["channel_mult"]]
    head = params.get("num_head_channels")
    levels = len(widths)
    return {
        "in_channels": params["in_channels"],
        "block_out_channels": widths,
        "layers_per_block": params["num_res_blocks"],
        "cross_attention_dim": params["context_dim"],
        # diffusers' name for the number of heads, for historic reasons
        "attention_head_dim": [w // head for w in widths] if head else params["num_heads"],
        "use_linear_projection": params.get("use_linear_in_transformer", False),
        "norm_num_groups": params.get("norm_groups", 32),
        "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
    }


def to_diffusers_unet(ours: nn.Module, params: Mapping[str, Any]) -> UNet2DConditionModel:
    """diffusers' UNet with the weights of ours."""
    config = unet_config(params)
    levels = len(config["block_out_channels"])
    config["up_block_types"] = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1)
    theirs = UNet2DConditionModel(**config)
    state = {f"model.diffusion_model.{k}": v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(state, dict(theirs.config)))
    return theirs.eval()


def to_diffusers_control(ours: nn.Module, params: Mapping[str, Any]) -> ControlNetModel:
    """diffusers' ControlNet with the weights of ours."""
    theirs = ControlNetModel(
        **unet_config(params),
        conditioning_channels=params["hint_channels"],
        conditioning_embedding_out_channels=(16, 32, 96, 256),
    )
    state = {f"control_model.{k}": v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(convert_controlnet_checkpoint(state, dict(theirs.config)))
    return theirs.eval()


def to_diffusers_vae(ours: nn.Module, params: Mapping[str, Any]) -> AutoencoderKL:
    """diffusers' autoencoder with the weights of ours."""
    dd = params["ddconfig"]
    levels = len(dd["ch_mult"])
    theirs = AutoencoderKL(
        block_out_channels=[dd["ch"] * mult for mult in dd["ch_mult"]],
        layers_per_block=dd["num_res_blocks"],
        latent_channels=dd["z_channels"],
        norm_num_groups=dd.get("norm_groups", 32),
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    state = {f"first_stage_model.{k}": v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(convert_ldm_vae_checkpoint(state, dict(theirs.config)))
    return theirs.eval()
