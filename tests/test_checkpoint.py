import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from cldm.checkpoint import (
    SCHEDULE_KEYS,
    detect_architecture,
    ema_key,
    is_derived,
    match_keys,
    module_of,
    parts,
    to_model_keys,
)
from cldm.tensor_files import CheckpointError

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
# Counted from the published files: UNet, control branch, VAE, text encoder, schedule buffers with logvar.
COUNTS = {"sd15": (686, 340, 248, 197, 13), "sd21": (686, 340, 248, 294, 13)}


def published(name: str) -> dict[str, tuple[int, ...]]:
    rows = (line.split("\t") for line in (GOLDEN / f"keys_{name}.tsv").read_text().splitlines())
    return {key: tuple(int(size) for size in shape.strip("[]").split(",") if size) for key, shape in rows}


def only(shapes: dict, *prefixes: str) -> dict:
    return {key: shape for key, shape in shapes.items() if key.startswith(prefixes)}


@pytest.fixture(params=["sd15", "sd21"])
def base(request) -> str:
    return request.param


def streets() -> dict[str, tuple[int, ...]]:
    """SD1.5 shrunk: every width that follows from 320 channels or 768 features divided by 10 or 6."""
    small = {320: 32, 640: 64, 1280: 128, 2560: 256, 768: 128}
    return {key: tuple(small.get(size, size) for size in shape) for key, shape in published("sd15").items()}


def diffusers_text_keys() -> list[str]:
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12))
    return list(model.state_dict())


# ---- names


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.tsv")), ids=lambda path: path.name)
def test_the_golden_lists_are_the_published_ones(path):
    if not (REFERENCE / path.name).exists():
        pytest.skip(f"no {path.name} in {REFERENCE.name}/ beside the repository to compare with")
    assert path.read_bytes() == (REFERENCE / path.name).read_bytes()


def test_published_names_pass_unchanged(base):
    shapes = published(base)
    kept = to_model_keys(shapes)
    assert kept == {key: shape for key, shape in shapes.items() if not key.endswith(".position_ids")}
    assert list(kept) == [key for key in shapes if key in kept]
    assert len(shapes) == sum(COUNTS[base])


def test_the_schedule_is_the_keys_without_a_module(base):
    shapes = published(base)
    assert {key for key in shapes if "." not in key} == SCHEDULE_KEYS
    derived = {key for key in shapes if is_derived(key)}
    assert derived - SCHEDULE_KEYS == {key for key in shapes if "position_ids" in key}


@pytest.mark.parametrize("prefix", ["state_dict.", "module.", "_forward_module.", "state_dict.module."])
def test_wrappers_are_stripped(base, prefix):
    shapes = published(base)
    assert to_model_keys({prefix + key: shape for key, shape in shapes.items()}) == to_model_keys(shapes)


def test_compiled_modules_lose_their_mark(base):
    shapes = published(base)
    marked = {key.replace("model.", "model._orig_mod.", 1): shape for key, shape in shapes.items()}
    assert any("_orig_mod" in key for key in marked)
    assert to_model_keys(marked) == to_model_keys(shapes)


def test_a_control_file_may_leave_its_prefix_out(base):
    control = only(published(base), "control_model.")
    bare = {key.removeprefix("control_model."): shape for key, shape in control.items()}
    assert len(control) == 340
    assert to_model_keys(control) == to_model_keys(bare) == control
    assert detect_architecture(bare) == detect_architecture(control) == base
    assert parts(bare) == {"control"}


def test_a_bare_unet_is_not_taken_for_a_control_branch():
    unet = only(published("sd15"), "model.diffusion_model.")
    bare = {key.removeprefix("model.diffusion_model."): shape for key, shape in unet.items()}
    assert to_model_keys(bare) == bare
    with pytest.raises(CheckpointError, match="no UNet or control branch"):
        detect_architecture(bare)


def test_text_encoders_get_their_lost_level_back():
    """Names as the installed transformers writes them, below the prefix that checkpoints give the encoder."""
    stem = "cond_stage_model.transformer."
    found = to_model_keys({stem + name.removeprefix("text_model."): name for name in diffusers_text_keys()})
    expected = only(published("sd15"), stem)
    assert set(found) == {key for key in expected if not is_derived(key)}
    assert len(found) == 196


def test_stale_tensors_are_left_out_and_counted(caplog):
    stale = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": 1,
        "cond_stage_model.model.attn_mask": 2,
        "lvlb_weights": 3,
        "model_ema.decay": 4,
        "model_ema.num_updates": 5,
    }
    with caplog.at_level(logging.INFO, logger="cldm.checkpoint"):
        assert to_model_keys(stale | {"betas": 6, "foreign.thing": 7}) == {"betas": 6, "foreign.thing": 7}
    assert "1 attn_mask, 1 lvlb_weights, 2 model_ema, 1 position_ids" in caplog.text
    caplog.clear()
    to_model_keys({"betas": 1})
    assert caplog.text == ""


def test_two_spellings_of_one_tensor_are_refused():
    stem = "cond_stage_model.transformer."
    with pytest.raises(CheckpointError, match=r"two tensors are named .*text_model\.encoder\.a"):
        to_model_keys({stem + "encoder.a": 1, stem + "text_model.encoder.a": 2})


def ema_names() -> list[str]:
    lines = (GOLDEN / "keys_v1-5-pruned_only_in_base.tsv").read_text().splitlines()
    return [line.split("\t")[0] for line in lines]


def test_every_ema_copy_of_the_published_base_has_its_tensor():
    unet = only(published("sd15"), "model.diffusion_model.")
    names = ema_names()
    assert len(names) == 688
    assert {ema_key(key) for key in unet} == set(names) - {"model_ema.decay", "model_ema.num_updates"}
    assert len({ema_key(key) for key in unet}) == 686
    assert (
        ema_key("model.diffusion_model.time_embed.0.weight") == "model_ema.diffusion_modeltime_embed0weight"
    )


def test_ema_takes_the_place_of_the_weights_on_request():
    shapes = published("sd15")
    base = {key: "plain" for key in shapes if not key.startswith("control_model.")}
    state = base | dict.fromkeys(ema_names(), "copy")
    plain, copied = to_model_keys(state), to_model_keys(state, ema=True)
    assert set(plain) == set(copied)
    assert set(plain.values()) == {"plain"}
    assert {key for key, value in copied.items() if value == "copy"} == set(
        only(shapes, "model.diffusion_model.")
    )


def test_ema_with_a_copy_missing_is_refused():
    unet = dict.fromkeys(only(published("sd15"), "model.diffusion_model."), 0)
    state = unet | dict.fromkeys(ema_names(), 1)
    del state["model_ema.diffusion_modelout2bias"]
    with pytest.raises(CheckpointError, match=r"1 of 686 .*model_ema\.diffusion_modelout2bias"):
        to_model_keys(state, ema=True)
    with pytest.raises(CheckpointError, match="686 of 686 copies"):  # as in an "ema-pruned" file
        to_model_keys(unet | {"model_ema.decay": 1, "model_ema.num_updates": 1}, ema=True)
    with pytest.raises(CheckpointError, match="0 of 0 copies"):
        to_model_keys({"betas": 1}, ema=True)


# ---- architecture


def test_published_files_are_recognised(base):
    shapes = published(base)
    assert detect_architecture(shapes) == base
    assert parts(shapes) == {"unet", "control", "vae", "text"}
    without = {key: shape for key, shape in shapes.items() if not key.startswith("control_model.")}
    assert detect_architecture({f"state_dict.{key}": shape for key, shape in without.items()}) == base
    assert parts(without) == {"unet", "vae", "text"}
    assert detect_architecture(only(shapes, "model.diffusion_model.")) == base


def test_streets_is_recognised_by_its_width():
    shapes = streets()
    assert detect_architecture(shapes) == "streets"
    assert detect_architecture(only(shapes, "control_model.")) == "streets"


def with_inputs(count: int) -> dict:
    shapes = published("sd15")
    stem = "model.diffusion_model.input_blocks.0.0.weight"
    return shapes | {stem: (320, count, 3, 3)}


def with_context(size: int) -> dict:
    shapes = published("sd15")
    return {key: (shape[0], size) if "attn2.to_k" in key else shape for key, shape in shapes.items()}


def bare_vae() -> dict:
    vae = only(published("sd15"), "first_stage_model.")
    return {key.removeprefix("first_stage_model."): shape for key, shape in vae.items()}


REFUSED = {
    "an SDXL": lambda: published("sd15") | {"conditioner.embedders.0.transformer.x": (1,)},
    "an SDXL or unCLIP": lambda: published("sd21") | {"model.diffusion_model.label_emb.0.0.weight": (1, 1)},
    "an SDXL or": lambda: {"control_model.label_emb.0.0.weight": (1280, 2816)},
    "an inpainting checkpoint with 9": lambda: with_inputs(9),
    "an InstructPix2Pix checkpoint with 8": lambda: with_inputs(8),
    "a depth-conditioned checkpoint with 5": lambda: with_inputs(5),
    "an unknown checkpoint with 3 input": lambda: with_inputs(3),
    "a diffusers-format file": lambda: {"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)},
    "a diffusers-format file;": lambda: {"unet.up_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)},
    "a LoRA file": lambda: {"lora_unet_down_blocks_0_attentions_0.lora_up.weight": (320, 4)},
    "a LoRA file;": lambda: {"unet.down_blocks.0.attn1.to_k.lora.up.weight": (320, 4)},
    "a lone VAE": lambda: only(published("sd15"), "first_stage_model."),
    "a lone VAE;": bare_vae,
    "a lone text encoder": lambda: only(published("sd21"), "cond_stage_model."),
    "an optimizer state": lambda: {"state.0.exp_avg": (3,), "state.0.exp_avg_sq": (3,)},
    "a Flux or SD3": lambda: {"double_blocks.0.img_attn.qkv.weight": (3, 3)},
    "no UNet or control branch, but a, b": lambda: {"a": (1,), "b": (2,)},
    "no UNet or control branch, but nothing": dict,
    "unknown kind (model_channels 320, context_dim 2048)": lambda: with_context(2048),
    "2 context sizes [768, 1024]": lambda: (
        only(published("sd21"), "control_model.") | only(published("sd15"), "model.")
    ),
    "without cross-attention": lambda: {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    },
    "pairs sd21 with the text encoder of another base": lambda: (
        only(published("sd21"), "model.") | only(published("sd15"), "cond_stage_model.")
    ),
    "pairs sd15 with the text encoder of another base": lambda: (
        only(published("sd15"), "model.") | only(published("sd21"), "cond_stage_model.")
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_files_are_refused_by_their_name(what):
    with pytest.raises(CheckpointError) as caught:
        detect_architecture(REFUSED[what](), where="models/x.ckpt")
    sentence = str(caught.value)
    assert sentence.startswith("models/x.ckpt ")
    assert what in sentence
    assert "expected Stable Diffusion 1.5" in sentence
    assert "\n" not in sentence


# ---- report


def test_modules_are_counted_as_published(base):
    shapes = published(base)
    report = match_keys(shapes, shapes)
    assert report.ok
    assert report.sentence() == f"all {sum(COUNTS[base])} tensors found"
    names = "model.diffusion_model", "control_model", "first_stage_model", "cond_stage_model", "schedule"
    assert report.expected == dict(zip(names, COUNTS[base], strict=True))
    assert module_of("cond_stage_model.x") == "cond_stage_model"
    assert module_of("optimizer.x.y") == "optimizer"


def test_the_wrong_base_without_control_is_said_in_one_sentence():
    """The counts come from the two lists by plain loops, apart from the code under test."""
    wanted = published("sd15")
    found = only(published("sd21"), "model.diffusion_model.", "first_stage_model.")
    report = match_keys(wanted, found)
    assert not report.ok
    differ = [key for key in found if wanted[key] != found[key]]
    key = differ[0]
    sentence = report.sentence()
    assert "control_model: 340 of 340 tensors missing, first control_model." in sentence
    assert "cond_stage_model: 196 of 196 tensors missing" in sentence
    shapes = f"expected {wanted[key]} found {found[key]}"
    assert f"model.diffusion_model: {len(differ)} shapes differ, first {key} {shapes}" in sentence
    assert "first_stage_model" not in sentence
    assert [row[0] for row in report.mismatched["model.diffusion_model"]] == differ
    assert sum(map(len, report.missing.values())) == 340 + 196
    assert report.unexpected == {}
    assert "\n" not in sentence


def test_derived_tensors_may_be_absent_but_must_agree():
    expected = {"betas": (1000,), "control_model.a": (2,), "cond_stage_model.position_ids": (1, 77)}
    report = match_keys(expected, {"control_model.a": (2,), "logvar": (1000,)})
    assert report.ok
    assert report.recomputed == ["betas", "cond_stage_model.position_ids"]
    assert report.expected == {"control_model": 1}
    report = match_keys(expected, {"control_model.a": (2,), "betas": (50,)})
    assert not report.ok
    assert report.sentence() == "schedule: 1 shape differs, first betas expected (1000,) found (50,)"


def test_unexpected_tensors_are_named_by_module():
    report = match_keys(
        {"control_model.a": (2,)}, {"control_model.a": torch.Size([2]), "lm.x": (1,), "lm.y": (1,)}
    )
    assert not report.ok
    assert report.unexpected == {"lm": ["lm.x", "lm.y"]}
    assert report.sentence() == "lm: 2 unexpected, first lm.x"


def test_key_names_need_neither_the_networks_nor_lightning():
    code = "import sys, cldm.checkpoint; print(*sys.modules, sep='\\n')"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "cldm" in loaded
    assert not loaded & {"ldm", "datasets", "pytorch_lightning", "lightning", "transformers", "omegaconf"}
