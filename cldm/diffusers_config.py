"""Model files to the configurations of a diffusers folder, and back.

The words are those of diffusers' `config.json` and of the published YAML files. What our networks cannot be
set to is refused by name, so that no option of a folder is lost silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cldm.config import project_path, read_yaml
from cldm.tensor_files import CheckpointError

Config = Mapping[str, Any]

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
# The model file that is adapted, by the activation of the text encoder: OpenAI's CLIP or LAION's.
TEMPLATES = {"quick_gelu": "models/cldm_v15.yaml", "gelu": "models/cldm_v21.yaml"}
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")

# What has to stand in a config.json, if it stands there at all, for our networks to compute the same.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet": {
        "act_fn": ("silu",),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "norm_eps": (1e-5,),
        "mid_block_scale_factor": (1,),
        "downsample_padding": (1,),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "controlnet_conditioning_channel_order": ("rgb",),
        "conditioning_embedding_out_channels": ([16, 32, 96, 256],),
        **dict.fromkeys(("class_embed_type", "addition_embed_type", "encoder_hid_dim"), (None,)),
        **dict.fromkeys(("num_class_embeds", "time_cond_proj_dim", "cross_attention_norm"), (None,)),
        **dict.fromkeys(("only_cross_attention", "dual_cross_attention"), (False,)),
    },
    "vae": {
        "act_fn": ("silu",),
        "shift_factor": (None,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "mid_block_add_attention": (True,),
    },
    "text": {"layer_norm_eps": (1e-5,), "max_position_embeddings": (77,)},
    "scheduler": {
        "beta_schedule": ("scaled_linear",),  # linear in sqrt(beta): what the original calls linear
        "trained_betas": (None,),
        "rescale_betas_zero_snr": (False,),
        "prediction_type": tuple(PREDICTIONS.values()),
    },
}
FIXED["control"] = FIXED["unet"]


# -- a folder to a model file -----------------------------------------------------------------------------


def model_file_of(configs: Mapping[str, Config], num_text_layers: int, where: str) -> DictConfig:
    """The model file of a pipeline, from the `config.json` of its parts.

    configs          of unet, vae and text; of control and scheduler where there are such
    num_text_layers  blocks that the text encoder holds

    Raises
        CheckpointError  an option that our networks do not have
    """
    for part, config in configs.items():
        check_fixed(part, config, where)
    activation = configs["text"].get("hidden_act", "quick_gelu")
    if activation not in TEMPLATES:
        raise CheckpointError(
            f"{where}: its text encoder has hidden_act {activation!r}; expected one of {', '.join(TEMPLATES)}"
        )
    model_file = read_yaml(project_path(TEMPLATES[activation]))
    params = model_file.model.params
    control = configs.get("control", configs["unet"])
    scheduler = configs.get("scheduler", {})
    words = {name: ours for ours, name in PREDICTIONS.items()}
    changed = {
        "parameterization": words[scheduler.get("prediction_type", "epsilon")],
        "timesteps": int(scheduler.get("num_train_timesteps", 1000)),
        "linear_start": float(scheduler.get("beta_start", params.linear_start)),
        "linear_end": float(scheduler.get("beta_end", params.linear_end)),
        "scale_factor": float(configs["vae"].get("scaling_factor", params.scale_factor)),
        "unet_config.params": {**unet_params(configs["unet"], where), "out_channels": 4},
        "control_stage_config.params": {
            **unet_params(control, where),
            "hint_channels": control.get("conditioning_channels", 3),
            "global_average_pooling": control.get("global_pool_conditions", False),
        },
        "first_stage_config.params": vae_params(configs["vae"]),
        "cond_stage_config.params": text_params(configs["text"], num_text_layers, activation),
    }
    for name, value in changed.items():
        OmegaConf.update(params, name, value, merge=False)
    return model_file


def check_fixed(part: str, config: Config, where: str) -> None:
    """Refuse an option that changes what is computed and that we do not have."""
    for name, allowed in FIXED.get(part, {}).items():
        found = config.get(name, allowed[0])
        if (list(found) if isinstance(found, tuple) else found) not in allowed:
            expected = " or ".join(repr(value) for value in allowed)
            raise CheckpointError(
                f"{where}: the {part} has {name}={found!r}, expected {expected}; "
                "it is no Stable Diffusion 1.5 or 2.1, or one with an addition that is not supported"
            )


def unet_params(config: Config, where: str) -> dict[str, Any]:
    """Sizes of a UNet or a control branch in the words of a model file."""
    widths = list(config["block_out_channels"])
    kinds = list(config["down_block_types"])
    if set(kinds) - set(DOWN) or any(width % widths[0] for width in widths):
        raise CheckpointError(
            f"{where}: expected blocks of {' and '.join(DOWN)} that widen, found {kinds}, {widths}"
        )
    params = {
        "in_channels": config["in_channels"],
        "model_channels": widths[0],
        "attention_resolutions": [2**i for i, kind in reversed(list(enumerate(kinds))) if kind == DOWN[1]],
        "num_res_blocks": config["layers_per_block"],
        "channel_mult": [width // widths[0] for width in widths],
        **head_params(config.get("num_attention_heads") or config["attention_head_dim"], widths, where),
        "context_dim": config["cross_attention_dim"],
        "use_linear_in_transformer": config.get("use_linear_projection", False),
        "transformer_depth": config.get("transformer_layers_per_block", 1),
        "norm_groups": config.get("norm_num_groups", 32),
    }
    for name in ("context_dim", "transformer_depth", "norm_groups"):
        if not isinstance(params[name], int):
            raise CheckpointError(f"{where}: expected one number for {name}, found {params[name]!r}")
    return params


def head_params(heads: int | Sequence[int], widths: Sequence[int], where: str) -> dict[str, int]:
    """The number of heads or the width of one; diffusers' `attention_head_dim` is the number of heads."""
    if isinstance(heads, int):
        return {"num_heads": heads}
    sizes = {width // count for width, count in zip(widths, heads, strict=False) if count}
    if len(heads) != len(widths) or len(sizes) != 1:
        raise CheckpointError(
            f"{where}: expected heads of one width, found {list(heads)} for channels {list(widths)}"
        )
    return {"num_head_channels": sizes.pop()}


def vae_params(config: Config) -> dict[str, Any]:
    """Sizes of an autoencoder in the words of a model file."""
    widths = list(config["block_out_channels"])
    return {
        "embed_dim": config["latent_channels"],
        "ddconfig": {
            "double_z": True,
            "z_channels": config["latent_channels"],
            "in_channels": config.get("in_channels", 3),
            "out_ch": config.get("out_channels", 3),
            "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": config["layers_per_block"],
            "attn_resolutions": [],
            "norm_groups": config.get("norm_num_groups", 32),
        },
    }


def text_params(config: Config, num_layers: int, activation: str) -> dict[str, Any]:
    """Sizes of a text encoder; of OpenCLIP's a folder holds all blocks but the last, which is not run."""
    sizes = {"width": config["hidden_size"], "num_heads": config["num_attention_heads"]}
    if activation == "quick_gelu":
        return {**sizes, "num_layers": num_layers}
    return {**sizes, "num_layers": num_layers + 1, "layer": "penultimate"}


# -- a model file to a folder -----------------------------------------------------------------------------


def folder_configs(params: Config, num_text_blocks: int) -> dict[str, dict[str, Any]]:
    """The `config.json` of every part, and that of the scheduler.

    params           `model.params` of a model file
    num_text_blocks  blocks that the text encoder runs
    """
    unet = params["unet_config"]["params"]
    control = params["control_stage_config"]["params"]
    is_v = params.get("parameterization", "eps") == "v"
    vae = vae_config(params["first_stage_config"]["params"], params.get("scale_factor", 0.18215))
    return {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            **unet_config(unet),
            "out_channels": unet.get("out_channels", 4),
            "up_block_types": [UP[is_deep] for is_deep in reversed(_has_attention(unet))],
            "sample_size": 96 if is_v else 64,  # the default size of a pipeline, that of the published models
            "upcast_attention": is_v,  # SD2.1's scores overflow fp16, as its published configuration has it
        },
        "control": {
            "_class_name": "ControlNetModel",
            **unet_config(control),
            "conditioning_channels": control.get("hint_channels", 3),
            "conditioning_embedding_out_channels": [16, 32, 96, 256],
            "global_pool_conditions": control.get("global_average_pooling", False),
        },
        "vae": vae,
        "text": text_config(params["cond_stage_config"], num_text_blocks),
        "scheduler": scheduler_config(params),
    }


def unet_config(params: Config) -> dict[str, Any]:
    """Sizes of a UNet or a control branch in the words of diffusers."""
    widths = [params["model_channels"] * mult for mult in params["channel_mult"]]
    size = params.get("num_head_channels", -1)
    return {
        "in_channels": params.get("in_channels", 4),
        "block_out_channels": widths,
        "down_block_types": [DOWN[is_deep] for is_deep in _has_attention(params)],
        "layers_per_block": params["num_res_blocks"],
        "attention_head_dim": params["num_heads"] if size == -1 else [width // size for width in widths],
        "cross_attention_dim": params["context_dim"],
        "use_linear_projection": params.get("use_linear_in_transformer", False),
        "transformer_layers_per_block": params.get("transformer_depth", 1),
        "norm_num_groups": params.get("norm_groups", 32),
    }


def _has_attention(params: Config) -> list[bool]:
    return [2**level in params["attention_resolutions"] for level in range(len(params["channel_mult"]))]


def vae_config(params: Config, scale_factor: float) -> dict[str, Any]:
    """Sizes of an autoencoder in the words of diffusers, which has one number for both latents."""
    arch = params["ddconfig"]
    if arch["z_channels"] != params["embed_dim"]:
        raise CheckpointError(
            f"expected an autoencoder with embed_dim and z_channels alike, as diffusers has it, "
            f"found {params['embed_dim']} and {arch['z_channels']}"
        )
    levels = len(arch["ch_mult"])
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": arch.get("in_channels", 3),
        "out_channels": arch.get("out_ch", 3),
        "latent_channels": arch["z_channels"],
        "block_out_channels": [arch["ch"] * mult for mult in arch["ch_mult"]],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": arch["num_res_blocks"],
        "norm_num_groups": arch.get("norm_groups", 32),
        "sample_size": 512,
        "scaling_factor": scale_factor,
    }


def text_config(stage: Config, num_blocks: int) -> dict[str, Any]:
    """Sizes of a text encoder in the words of transformers; SD1.5's is the default, SD2.1's has its own."""
    is_open = stage["target"].endswith("FrozenOpenCLIPEmbedder")
    sizes = {"width": 1024, "num_heads": 16} if is_open else {"width": 768, "num_heads": 12}
    sizes |= {name: value for name, value in (stage.get("params") or {}).items() if name in sizes}
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "gelu" if is_open else "quick_gelu",
        "hidden_size": sizes["width"],
        "intermediate_size": 4 * sizes["width"],
        "num_attention_heads": sizes["num_heads"],
        "num_hidden_layers": num_blocks,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "layer_norm_eps": 1e-5,
        "projection_dim": sizes["width"],
        **{"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0 if is_open else 49407},
    }


def scheduler_config(params: Config) -> dict[str, Any]:
    """DDIM as Stable Diffusion configures it; what `generate.py` samples with by default."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": params.get("linear_start", 0.00085),
        "beta_end": params.get("linear_end", 0.012),
        "num_train_timesteps": params.get("timesteps", 1000),
        "prediction_type": PREDICTIONS[params.get("parameterization", "eps")],
        "clip_sample": False,
        "set_alpha_to_one": False,  # sampling ends at the first level, not at none
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
