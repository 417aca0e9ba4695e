"""The names inside weight files: foreign spellings to published names, what a file is, what fits a model.

Everything here works on names and shapes alone, so it runs on a header without loading a weight.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cldm.tensor_files import CheckpointError, Shape

log = logging.getLogger(__name__)

Value = TypeVar("Value")

POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
SCHEDULE_KEYS = frozenset(
    {
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "logvar",
    }
)
PART_PREFIXES = {
    "unet": "model.diffusion_model.",
    "control": "control_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.",
}
WHOLE = frozenset({"unet", "vae", "text"})  # what samples by itself
SUPPORTED = "expected Stable Diffusion 1.5, 2.1 or Streets weights under their original names"

_STALE_BUFFERS = {"position_ids", "attn_mask", "lvlb_weights"}
_WRAPPERS = re.compile(r"^(state_dict\.|module\.|_forward_module\.)+|_orig_mod\.")  # DDP, Lightning, compile
_LOST_TEXT_LEVEL = re.compile(r"^(cond_stage_model\.transformer\.)(embeddings|encoder|final_layer_norm)\.")
_BARE_CONTROL = {"input_hint_block", "zero_convs", "input_blocks"}  # together, only a control branch has them
_CONTROL_ROOTS = _BARE_CONTROL | {"time_embed", "middle_block", "middle_block_out", "label_emb"}
_LONE_VAE_ROOTS = {"encoder", "decoder", "quant_conv", "post_quant_conv", "loss"}

# Looked for in every name, in this order.
_REFUSED = (
    (r"lora_|\.lora\.", "a LoRA file; merge it into its base checkpoint first"),
    (
        r"(^|\.)(down_blocks|up_blocks)\.",
        "a diffusers-format file; name the folder that holds it with its config.json, which is read as it is "
        "or made one file by python tool_export.py FOLDER OUT.safetensors --to original",
    ),
    (r"^conditioner\.embedders\.|(^|\.)label_emb\.", "an SDXL or unCLIP checkpoint, which is not supported"),
    (r"(^|\.)(double_blocks|joint_blocks)\.", "a Flux or SD3 checkpoint, which is not supported"),
    (r"param_groups|optimizer_states|exp_avg", "an optimizer state without a model"),
)
_OTHER_INPUTS = {
    5: "a depth-conditioned checkpoint",
    7: "an upscaler checkpoint",
    8: "an InstructPix2Pix checkpoint",
    9: "an inpainting checkpoint",
}
_BASES = {(320, 768): "sd15", (320, 1024): "sd21"}  # (model_channels, context_dim)
_TEXT_PREFIXES = {
    "sd15": "cond_stage_model.transformer.",
    "sd21": "cond_stage_model.model.",
    "streets": "cond_stage_model.transformer.",
}


def with_position_ids(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the positions 0..76 that published SD1.5 files hold: older programs load strictly and want them."""
    has_clip = POSITION_IDS.replace("position_ids", "position_embedding.weight") in state
    return {**state, POSITION_IDS: torch.arange(77)[None]} if has_clip else dict(state)


def is_derived(key: str) -> bool:
    """Tell whether a tensor is computed from the configuration, so that a file need not hold it."""
    return key in SCHEDULE_KEYS or key.rpartition(".")[2] in _STALE_BUFFERS


def to_model_keys(state: Mapping[str, Value], *, ema: bool = False) -> dict[str, Value]:
    """Rename foreign spellings to the published names; drop stale buffers and EMA copies, logging counts.

    With `ema` the UNet's EMA copies take the place of its weights; every one of them must be there.
    """
    renamed = _renamed(state)
    dropped = Counter(_stale_group(key) for key in renamed)
    kept = {key: value for key, value in renamed.items() if not _stale_group(key)}
    del dropped[""]
    if set(dropped) - {"position_ids"}:  # those are in every SD1.5 file and nobody's loss
        groups = ", ".join(f"{count} {group}" for group, count in sorted(dropped.items()))
        log.info("left out of the weights: %s", groups)
    return _with_ema(kept, renamed) if ema else kept


def ema_key(key: str) -> str:
    """Return the name under which the EMA copy of a UNet tensor is stored.

    `model.diffusion_model.out.0.bias` is copied to `model_ema.diffusion_modelout0bias`.
    """
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def parts(shapes: Mapping[str, object]) -> set[str]:
    """Name the parts inside: any of unet, control, vae and text."""
    keys = _renamed(shapes)
    return {part for part, prefix in PART_PREFIXES.items() if any(key.startswith(prefix) for key in keys)}


def detect_architecture(shapes: Mapping[str, Shape], where: str = "this file") -> str:
    """Return "sd15", "sd21" or "streets" from names and shapes; refuse anything else by its name.

    Needs the UNet or the control branch, whose width and context size tell the bases apart.
    """
    shapes = _renamed(shapes)
    refuse_foreign(shapes, where)
    stem = _stem(shapes, where)
    contexts = _context_dims(shapes)
    channels, inputs = stem[:2]
    if inputs != 4:
        what = _OTHER_INPUTS.get(inputs, "an unknown checkpoint")
        raise CheckpointError(f"{where} is {what} with {inputs} input channels instead of 4; {SUPPORTED}")
    if len(contexts) != 1:
        found = f"of {len(contexts)} context sizes {contexts}" if contexts else "without cross-attention"
        raise CheckpointError(f"{where} holds blocks {found}; {SUPPORTED}")
    name = "streets" if channels < 320 else _BASES.get((channels, contexts[0]))
    if name is None:
        size = f"model_channels {channels}, context_dim {contexts[0]}"
        raise CheckpointError(f"{where} is of an unknown kind ({size}); {SUPPORTED}")
    _check_text_encoder(shapes, name, where)
    return name


@dataclass(frozen=True)
class LoadReport:
    """What a file lacks, has too much or in another shape, by module; lists keep the order of the model."""

    expected: dict[str, int]  # tensors that the model needs
    missing: dict[str, list[str]]
    unexpected: dict[str, list[str]]
    mismatched: dict[str, list[tuple[str, Shape, Shape]]]  # name, expected, found
    recomputed: list[str]  # derived tensors that the file leaves to the model

    @property
    def ok(self) -> bool:
        """Whether every tensor of one side is on the other with the same shape, derived ones aside."""
        return not (self.missing or self.unexpected or self.mismatched)

    def sentence(self) -> str:
        """Say the outcome in one sentence, module by module, with the first name of each kind."""
        if self.ok:
            return f"all {sum(self.expected.values())} tensors found"
        modules = dict.fromkeys([*self.missing, *self.mismatched, *self.unexpected])
        return "; ".join(f"{module}: {', '.join(self._clauses(module))}" for module in modules)

    def _clauses(self, module: str) -> list[str]:
        clauses = []
        if keys := self.missing.get(module):
            clauses.append(f"{len(keys)} of {self.expected[module]} tensors missing, first {keys[0]}")
        if rows := self.mismatched.get(module):
            key, expected, found = rows[0]
            count = "1 shape differs" if len(rows) == 1 else f"{len(rows)} shapes differ"
            clauses.append(f"{count}, first {key} expected {expected} found {found}")
        if keys := self.unexpected.get(module):
            clauses.append(f"{len(keys)} unexpected, first {keys[0]}")
        return clauses


def match_keys(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> LoadReport:
    """Hold the names and shapes of a file against those of a model, both under published names.

    A derived tensor may be absent from either side; where both have it, the shapes must agree.
    """
    missing = [key for key in expected if key not in found]
    pairs = [(key, tuple(expected[key]), tuple(found[key])) for key in expected if key in found]
    return LoadReport(
        expected=dict(Counter(module_of(key) for key in expected if key in found or not is_derived(key))),
        missing=_by_module((key, key) for key in missing if not is_derived(key)),
        unexpected=_by_module((key, key) for key in found if key not in expected and not is_derived(key)),
        mismatched=_by_module((pair[0], pair) for pair in pairs if pair[1] != pair[2]),
        recomputed=[key for key in missing if is_derived(key)],
    )


def module_of(key: str) -> str:
    """Return the top module that a tensor belongs to; the schedule's buffers count as one."""
    if key in SCHEDULE_KEYS:
        return "schedule"
    known = [prefix[:-1] for prefix in PART_PREFIXES.values() if key.startswith(prefix)]
    return known[0] if known else key.partition(".")[0]


def _renamed(state: Mapping[str, Value]) -> dict[str, Value]:
    """Give every name its published spelling; two names that become one are refused."""
    plain = {key: _WRAPPERS.sub("", key) for key in state}
    is_bare = {key.partition(".")[0] for key in plain.values()} >= _BARE_CONTROL
    renamed: dict[str, Value] = {}
    for key, name in plain.items():
        new = _LOST_TEXT_LEVEL.sub(r"\1text_model.\2.", name)
        if is_bare and name.partition(".")[0] in _CONTROL_ROOTS:
            new = PART_PREFIXES["control"] + name
        if new in renamed:
            raise CheckpointError(f"two tensors are named {new}, one of them as {key}; expected one")
        renamed[new] = state[key]
    return renamed


def _stale_group(key: str) -> str:
    """Name the group of a tensor that no model takes; "" for one that is kept."""
    if key.startswith("model_ema."):
        return "model_ema"
    last = key.rpartition(".")[2]
    return last if last in _STALE_BUFFERS else ""


def _with_ema(kept: dict[str, Value], renamed: Mapping[str, Value]) -> dict[str, Value]:
    copies = {key: ema_key(key) for key in kept if key.startswith("model.")}
    absent = [copy for copy in copies.values() if copy not in renamed]
    if absent or not copies:
        detail = f", the first is {absent[0]}" if absent else ""
        raise CheckpointError(
            f"EMA weights were asked for but {len(absent)} of {len(copies)} copies are missing{detail}; "
            "load the plain weights instead"
        )
    return {key: renamed[copies[key]] if key in copies else value for key, value in kept.items()}


def refuse_foreign(shapes: Mapping[str, Shape], where: str) -> None:
    """Refuse by its name what is no Stable Diffusion 1 or 2 with a UNet or a control branch."""
    for pattern, what in _REFUSED:
        if any(re.search(pattern, key) for key in shapes):
            raise CheckpointError(f"{where} is {what}; {SUPPORTED}")
    roots = {key.partition(".")[0] for key in shapes}
    inside = parts(shapes)
    if inside == {"vae"} or ("decoder" in roots and roots <= _LONE_VAE_ROOTS):
        raise CheckpointError(f"{where} is a lone VAE; {SUPPORTED}")
    if inside == {"text"}:
        raise CheckpointError(f"{where} is a lone text encoder; {SUPPORTED}")


def check_pair(control: Mapping[str, Tensor], base: Mapping[str, Tensor], ours: str, theirs: str) -> None:
    """Refuse a control branch over a base that it was not made for; both by tensors under published names.

    ours, theirs  how the control branch and the base are named in the sentence
    """
    kinds = _describe(control, "control"), _describe(base, "unet")
    if None not in kinds and kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{ours} is a control branch for {kinds[0]}, but {theirs} is {kinds[1]}; "
            "a control branch needs the base that it was trained on, or a fine-tune of that"
        )


def _describe(state: Mapping[str, Tensor], part: str) -> str | None:
    """Name the architecture of a UNet or control branch; None if it is not there."""
    prefix = PART_PREFIXES[part]
    stem = getattr(state.get(prefix + "input_blocks.0.0.weight"), "shape", None)
    shapes = {key: value.shape for key, value in state.items() if key.startswith(prefix + "middle_block.1.")}
    context = next((shape for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None)
    if stem is None or context is None:
        return None
    is_linear = len(shapes[prefix + "middle_block.1.proj_in.weight"]) == 2
    published = {("sd15", False): "Stable Diffusion 1.5", ("sd21", True): "Stable Diffusion 2.1"}
    name = published.get((_BASES.get((stem[0], context[1]), ""), is_linear))
    projections = "linear" if is_linear else "1x1"
    return name or f"{stem[0]} channels, text of width {context[1]} and {projections} projections"


def _stem(shapes: Mapping[str, Shape], where: str) -> Shape:
    """Return the shape of the first convolution: (model_channels, in_channels, 3, 3)."""
    for part in ("unet", "control"):
        shape = shapes.get(PART_PREFIXES[part] + "input_blocks.0.0.weight", ())
        if len(shape) == 4:
            return shape
    first = ", ".join(list(shapes)[:3]) or "nothing"
    raise CheckpointError(f"{where} has no UNet or control branch, but {first}; {SUPPORTED}")


def _context_dims(shapes: Mapping[str, Shape]) -> list[int]:
    """Return the sizes of the text features that the cross-attentions take; one in a sound file."""
    prefixes = (PART_PREFIXES["unet"], PART_PREFIXES["control"])
    keys = [key for key in shapes if key.startswith(prefixes) and key.endswith("attn2.to_k.weight")]
    return sorted({shapes[key][1] for key in keys if len(shapes[key]) == 2})


def _check_text_encoder(shapes: Mapping[str, Shape], name: str, where: str) -> None:
    keys = [key for key in shapes if key.startswith(PART_PREFIXES["text"])]
    if keys and not any(key.startswith(_TEXT_PREFIXES[name]) for key in keys):
        raise CheckpointError(f"{where} pairs {name} with the text encoder of another base; {SUPPORTED}")


def _by_module(rows: Iterable[tuple[str, Value]]) -> dict[str, list[Value]]:
    groups: dict[str, list[Value]] = {}
    for key, value in rows:
        groups.setdefault(module_of(key), []).append(value)
    return groups
