"""Tiny networks of diffusers and transformers, random in every weight, and the folders that they write.

Nothing here is made by our code: names, shapes and configurations are those of the two libraries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from oracles import randomize
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = {"sd15": 32, "sd21": 48}  # of the text, which tells the two apart, as in the published ones
SIZES: dict[str, dict[str, Any]] = {
    "sd15": {"attention_head_dim": 4, "norm_num_groups": 8},
    "sd21": {"attention_head_dim": [2, 4, 4, 4], "norm_num_groups": 8, "use_linear_projection": True},
}
SCHEDULE = {
    **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    **{"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
}


def make_unet(style: str) -> UNet2DConditionModel:
    """Four levels, the last without attention, as Stable Diffusion."""
    return _random(UNet2DConditionModel(**_sizes(style)), 1)


def make_control(style: str, channels: int = 3) -> ControlNetModel:
    """A control branch whose zero convolutions are not zero."""
    sizes = {**_sizes(style), "conditioning_channels": channels}
    return _random(ControlNetModel(**sizes), 2)


def _sizes(style: str) -> dict[str, Any]:
    return {"block_out_channels": (16, 32, 32, 32), "cross_attention_dim": WIDTH[style], **SIZES[style]}


def make_vae() -> AutoencoderKL:
    """8x down to 4 channels; the scale is that of Stable Diffusion."""
    levels = 4
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    return _random(vae, 3)


def make_text(style: str) -> CLIPTextModel:
    """Two blocks of OpenAI's CLIP, or those of OpenCLIP without its last."""
    config = CLIPTextConfig(
        hidden_size=WIDTH[style],
        intermediate_size=4 * WIDTH[style],
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu" if style == "sd21" else "quick_gelu",
        projection_dim=WIDTH[style],
    )
    return _random(CLIPTextModel(config), 4)


def make_tokenizer(style: str) -> CLIPTokenizer:
    """The real vocabulary; SD2.1 pads with 0, which is "!"."""
    from open_clip.tokenizer import SimpleTokenizer

    known = SimpleTokenizer()
    words = [*list(known.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    pad = {"pad_token": "!"} if style == "sd21" else {}
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=list(known.bpe_ranks), model_max_length=77, **pad)


def make_pipeline(style: str, prediction: str = "epsilon", *, control: bool = True, channels: int = 3) -> Any:
    """A whole pipeline, ready to sample or to be saved."""
    parts = {
        "vae": make_vae(),
        "text_encoder": make_text(style),
        "tokenizer": make_tokenizer(style),
        "unet": make_unet(style),
        "scheduler": DDIMScheduler(**SCHEDULE, prediction_type=prediction),
        **{"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    }
    if not control:
        return StableDiffusionPipeline(**parts)
    return StableDiffusionControlNetPipeline(**parts, controlnet=make_control(style, channels))


def write_pipeline(folder: Path, style: str, prediction: str = "epsilon", **options: Any) -> Any:
    """Save a pipeline as diffusers does, and return it."""
    pipeline = make_pipeline(style, prediction, **options)
    pipeline.save_pretrained(folder)
    return pipeline


def _random(module: torch.nn.Module, seed: int) -> Any:
    return randomize(module, seed).eval()
