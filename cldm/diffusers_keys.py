"""Names of tensors in diffusers and transformers, to the published names and back.

A name is a module and a leaf. Which modules a network has follows from its levels, which are counted in the
names themselves; what stands inside of a module has the same name on both sides, or is in a table here.
Sources: the published key lists of both sides (names and shapes are facts of the formats).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from cldm.checkpoint import PART_PREFIXES
from cldm.tensor_files import CheckpointError

Pairs: TypeAlias = Iterable[tuple[str, str]]
"""Names of the same module: published, diffusers."""

RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
HINT = [("0", "conv_in"), *((str(2 * i + 2), f"blocks.{i}") for i in range(6)), ("14", "conv_out")]
VAE_ATTENTION = (
    *(("norm", "group_norm"), ("proj_out", "to_out.0")),
    *(("q", "to_q"), ("k", "to_k"), ("v", "to_v")),
)
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OPEN_CLIP_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
)
QKV = ("q_proj", "k_proj", "v_proj")
# In the published SD2.1 files beside the last block, run by nobody, without a place in a diffusers folder.
OPEN_CLIP_ONLY = ("text_projection", "logit_scale")
OPEN_CLIP, CLIP = "model.", "transformer.text_model."

_VAE_ATTENTION_NAME = re.compile(r"\.(mid_block\.attentions|mid\.attn_1)\b")


@dataclass(frozen=True)
class Levels:
    """The levels of a UNet's encoder, from the image-sized one down."""

    blocks: tuple[int, ...]  # residual blocks of each
    attention: frozenset[int]  # those with transformers


# -- UNet and control branch ------------------------------------------------------------------------------


def count_levels(keys: Iterable[str], where: str) -> Levels:
    """Levels of a UNet or a control branch, from its names on either side."""
    keys = list(keys)
    blocks, attention = _levels_there(keys)
    if not blocks:
        blocks, attention = _levels_here(keys)
    if not blocks or sorted(blocks) != list(range(len(blocks))):
        raise CheckpointError(
            f"{where} has blocks of levels {sorted(blocks)[:5]}, expected all of 0, 1, ... of a UNet"
        )
    return Levels(tuple(blocks[level] for level in range(len(blocks))), frozenset(attention))


def _levels_there(keys: list[str]) -> tuple[dict[int, int], set[int]]:
    found = [re.match(r"down_blocks\.(\d{1,3})\.(resnets|attentions)\.(\d{1,3})\.", key) for key in keys]
    places = {(int(match[1]), match[2], int(match[3])) for match in found if match}
    residual = [level for level, kind, _ in places if kind == "resnets"]
    attention = {level for level, kind, _ in places if kind == "attentions"}
    return {level: residual.count(level) for level in residual}, attention


def _levels_here(keys: list[str]) -> tuple[dict[int, int], set[int]]:
    found = [re.match(r"input_blocks\.(\d{1,3})\.(\d)\.(op|in_layers|norm)\b", key) for key in keys]
    places = sorted({(int(match[1]), match[3]) for match in found if match})
    blocks: dict[int, int] = {}
    attention, level = set(), 0
    for _, kind in places:
        if kind == "op":
            level += 1
        elif kind == "in_layers":
            blocks[level] = blocks.get(level, 0) + 1
        else:
            attention.add(level)
    return blocks, attention


def _below(ours: str, theirs: str, pairs: Pairs) -> Iterator[tuple[str, str]]:
    return ((f"{ours}.{here}", f"{theirs}.{there}") for here, there in pairs)


def _block(ours: str, theirs: str, i: int, *, attention: bool) -> Iterator[tuple[str, str]]:
    """Residual block number `i` of a level, and the transformer behind it."""
    yield from _below(f"{ours}.0", f"{theirs}.resnets.{i}", RESNET)
    if attention:
        yield f"{ours}.1", f"{theirs}.attentions.{i}"


def encoder_pairs(levels: Levels) -> Iterator[tuple[str, str]]:
    """What UNet and control branch share."""
    yield from (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"))
    yield "input_blocks.0.0", "conv_in"
    number = 1
    for level, blocks in enumerate(levels.blocks):
        theirs = f"down_blocks.{level}"
        for i in range(blocks):
            yield from _block(f"input_blocks.{number}", theirs, i, attention=level in levels.attention)
            number += 1
        if level < len(levels.blocks) - 1:
            yield f"input_blocks.{number}.0.op", f"{theirs}.downsamplers.0.conv"
            number += 1
    yield from _below("middle_block.0", "mid_block.resnets.0", RESNET)
    yield "middle_block.1", "mid_block.attentions.0"
    yield from _below("middle_block.2", "mid_block.resnets.1", RESNET)


def unet_pairs(levels: Levels) -> Iterator[tuple[str, str]]:
    """All of the UNet; diffusers counts the levels of its decoder from the bottom."""
    yield from encoder_pairs(levels)
    number = 0
    for step, level in enumerate(reversed(range(len(levels.blocks)))):
        attention = level in levels.attention
        for i in range(levels.blocks[level] + 1):
            yield from _block(f"output_blocks.{number}", f"up_blocks.{step}", i, attention=attention)
            number += 1
        if level:
            yield f"output_blocks.{number - 1}.{1 + attention}.conv", f"up_blocks.{step}.upsamplers.0.conv"
    yield from (("out.0", "conv_norm_out"), ("out.2", "conv_out"))


def control_pairs(levels: Levels) -> Iterator[tuple[str, str]]:
    """All of the control branch: one zero convolution for each input block, one for the middle."""
    yield from encoder_pairs(levels)
    yield from _below("input_hint_block", "controlnet_cond_embedding", HINT)
    for i in range(sum(levels.blocks) + len(levels.blocks)):
        yield f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}"
    yield "middle_block_out.0", "controlnet_mid_block"


# -- autoencoder ------------------------------------------------------------------------------------------


def vae_levels(keys: Iterable[str]) -> tuple[int, int]:
    """Levels of an autoencoder, and residual blocks of one in its decoder, from its names on either side."""
    stem = re.compile(
        r"(?:encoder|decoder)\.(?:down|up)(?:_blocks)?\.(\d{1,3})\.(?:resnets|block)\.(\d{1,3})\."
    )
    found = [match for match in map(stem.match, keys) if match]
    return len({match[1] for match in found}), len({match[2] for match in found})


def vae_pairs(keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """All of the autoencoder; published files count the decoder's levels from the image, diffusers not."""
    depth, blocks = vae_levels(keys)
    for half, (here, there) in {"encoder": ("down", "down"), "decoder": ("up", "up")}.items():
        for level in range(depth):
            mirrored = level if half == "encoder" else depth - 1 - level
            ours, theirs = f"{half}.{here}.{level}", f"{half}.{there}_blocks.{mirrored}"
            for i in range(blocks):
                yield f"{ours}.block.{i}.nin_shortcut", f"{theirs}.resnets.{i}.conv_shortcut"
                yield f"{ours}.block.{i}", f"{theirs}.resnets.{i}"
            yield f"{ours}.{here}sample.conv", f"{theirs}.{there}samplers.0.conv"
        yield from ((f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}") for i in (0, 1))
        yield from _below(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", VAE_ATTENTION)
        yield f"{half}.norm_out", f"{half}.conv_norm_out"
        yield from ((f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "conv_out"))
    yield from ((name, name) for name in ("quant_conv", "post_quant_conv"))


def _vae_from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Old names of the attention become the new ones; its linear layers are convolutions of one pixel."""
    found = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        stem, _, last = module.rpartition(".")
        if _VAE_ATTENTION_NAME.search(key) and last in OLD_VAE_ATTENTION:
            module = f"{stem}.{OLD_VAE_ATTENTION[last]}"
        is_linear = _VAE_ATTENTION_NAME.search(key) and value.ndim == 2
        found[f"{module}.{leaf}"] = value[..., None, None] if is_linear else value
    return found


def _vae_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: value.flatten(1) if _VAE_ATTENTION_NAME.search(key) and value.ndim == 4 else value
        for key, value in state.items()
    }


# -- text encoder -----------------------------------------------------------------------------------------


def open_clip_pairs(num_layers: int) -> Iterator[tuple[str, str]]:
    """SD2.1's text encoder but for its fused projections, below `model.` and below `text_model.`."""
    yield "positional_embedding", "embeddings.position_embedding.weight"
    yield from (("token_embedding", "embeddings.token_embedding"), ("ln_final", "final_layer_norm"))
    for i in range(num_layers):
        yield from _below(f"transformer.resblocks.{i}", f"encoder.layers.{i}", OPEN_CLIP_BLOCK)


def text_layers(keys: Iterable[str]) -> int:
    """Blocks of a text encoder, from its names on either side."""
    found = (re.search(r"(?:layers|resblocks)\.(\d{1,3})\.", key) for key in keys)
    return len({match[1] for match in found if match})


def text_to_published(state: Mapping[str, Tensor], *, open_clip: bool, where: str) -> dict[str, Tensor]:
    """Tensors of transformers' CLIPTextModel under the names of SD2.1 (`open_clip`) or SD1.5.

    transformers 5 leaves the level `text_model.` out; buffers of positions are left out here.
    """
    plain = {key.removeprefix("text_model."): value for key, value in state.items()}
    plain = {key: value for key, value in plain.items() if not key.endswith("position_ids")}
    if not open_clip:
        return {CLIP + key: value for key, value in plain.items()}
    single = {key: value for key, value in plain.items() if not _is_split(key)}
    renamed = rename(single, {there: here for here, there in open_clip_pairs(text_layers(plain))}, where)
    for i in range(text_layers(plain)):
        for leaf in ("weight", "bias"):
            names = [f"encoder.layers.{i}.self_attn.{name}.{leaf}" for name in QKV]
            if absent := [name for name in names if name not in plain]:
                raise CheckpointError(f"{where} lacks {absent[0]}; download or copy it again")
            renamed[f"transformer.resblocks.{i}.attn.in_proj_{leaf}"] = torch.cat([plain[n] for n in names])
    return {OPEN_CLIP + key: value for key, value in renamed.items()}


def text_to_diffusers(state: Mapping[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    """Tensors of a text encoder for transformers' CLIPTextModel of the first `num_blocks` blocks."""
    kept = {key: value for key, value in state.items() if not is_left_out(key, num_blocks)}
    clip = {
        "text_model." + key.removeprefix(CLIP): value for key, value in kept.items() if key.startswith(CLIP)
    }
    if clip:
        return {key: value for key, value in clip.items() if not key.endswith("position_ids")}
    plain = {key.removeprefix(OPEN_CLIP): value for key, value in kept.items()}
    single = {key: value for key, value in plain.items() if ".attn.in_proj_" not in key}
    renamed = rename(single, dict(open_clip_pairs(num_blocks)), "the text encoder")
    for key, value in plain.items():
        if key not in single:
            block, _, leaf = key.partition(".attn.in_proj_")
            stem = f"encoder.layers.{block.rpartition('.')[2]}.self_attn"
            renamed |= {f"{stem}.{name}.{leaf}": part for name, part in zip(QKV, value.chunk(3), strict=True)}
    return {"text_model." + key: value for key, value in renamed.items()}


def is_left_out(key: str, num_blocks: int) -> bool:
    """Whether a published tensor of a text encoder has no place in a CLIPTextModel of `num_blocks` blocks."""
    found = re.search(r"(?:layers|resblocks)\.(\d+)\.", key)
    late = found is not None and int(found[1]) >= num_blocks
    return late or key in {OPEN_CLIP + name for name in (*OPEN_CLIP_ONLY, "attn_mask")}


def open_clip_rest(state: Mapping[str, Tensor], where: str) -> dict[str, torch.Size]:
    """Names and shapes of what the published SD2.1 files hold beyond the blocks in `state`."""
    last = text_layers(state)
    stem = f"{OPEN_CLIP}transformer.resblocks."
    if f"{OPEN_CLIP}positional_embedding" not in state:
        raise CheckpointError(f"{where} lacks the position embedding; download or copy it again")
    block = {key: value.shape for key, value in state.items() if key.startswith(f"{stem}0.")}
    rest = {key.replace(f"{stem}0.", f"{stem}{last}.", 1): shape for key, shape in block.items()}
    width = state[f"{OPEN_CLIP}positional_embedding"].shape[1]
    sizes = (torch.Size((width, width)), torch.Size(()))
    return rest | {OPEN_CLIP + name: size for name, size in zip(OPEN_CLIP_ONLY, sizes, strict=True)}


def _is_split(key: str) -> bool:
    return re.search(rf"\.self_attn\.({'|'.join(QKV)})\.", key) is not None


# -- a part as a whole ------------------------------------------------------------------------------------

PAIRS: dict[str, Callable[[list[str], str], Pairs]] = {
    "unet": lambda keys, where: unet_pairs(count_levels(keys, where)),
    "control": lambda keys, where: control_pairs(count_levels(keys, where)),
    "vae": lambda keys, _: vae_pairs(keys),
}


def part_of_names(keys: Iterable[str]) -> str | None:
    """Which part of a model has these names in diffusers; None if they are no names of diffusers."""
    roots = {
        ".".join(key.split(".")[:2]) if key.startswith(("encoder.", "decoder.")) else key.split(".")[0]
        for key in keys
    }
    if "controlnet_cond_embedding" in roots:
        return "control"
    if {"down_blocks", "up_blocks", "conv_in"} <= roots:
        return "unet"
    return "vae" if {"encoder.down_blocks", "decoder.up_blocks"} <= roots else None


def to_published(part: str, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors of a diffusers UNet, ControlNet or autoencoder under the published names, prefix included.

    Raises
        CheckpointError  a tensor that the network has no module for
    """
    state = _vae_from_diffusers(state) if part == "vae" else state
    table = {there: here for here, there in PAIRS[part](list(state), where)}
    return {PART_PREFIXES[part] + key: value for key, value in rename(state, table, where).items()}


def to_diffusers(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part of a model, under published names, as diffusers names them."""
    prefix = PART_PREFIXES[part]
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    own = _vae_to_diffusers(own) if part == "vae" else own
    return rename(own, dict(PAIRS[part](list(own), f"the {part}")), f"the {part}")


def rename(state: Mapping[str, Tensor], table: Mapping[str, str], where: str) -> dict[str, Tensor]:
    """Give each tensor the new name of the innermost module in `table` that it lies in."""
    renamed = {}
    for key, value in state.items():
        head, tail = key, ""
        while head not in table:
            head, _, last = head.rpartition(".")
            tail = f".{last}{tail}"
            if not head:
                raise CheckpointError(f"{where} holds {key}, which no network of Stable Diffusion 1 or 2 has")
        renamed[table[head] + tail] = value
    return renamed
