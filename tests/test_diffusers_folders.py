"""Folders that diffusers wrote, read by us: what they compute, which files count, what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers_models import WIDTH, make_control, make_text, make_unet, make_vae, write_pipeline
from oracles import relative_error
from transformers import CLIPTextConfig, CLIPTextModel

import generate as generate_script
import tool_add_control
import tool_export
import tutorial_train
from cldm.config import load_run_config
from cldm.diffusers_folder import read_folder
from cldm.diffusers_keys import (
    open_clip_rest,
    text_to_diffusers,
    text_to_published,
    to_diffusers,
    to_published,
)
from cldm.digests import fingerprint
from cldm.model import create_model, model_config_of
from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.weights import base_of, read_published, read_weights

ROOT = Path(__file__).parents[1]
KINDS = {"sd15": ("sd15", "epsilon"), "sd21": ("sd21", "epsilon"), "sd21-v": ("sd21", "v_prediction")}
UNET, CONTROL, WEIGHTS = "model.diffusion_model.", "control_model.", "diffusion_pytorch_model.safetensors"


class Written:
    """Pipelines that diffusers wrote, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pipelines = folder, {}

    def __call__(self, kind: str) -> tuple[Path, Any]:
        path = self.folder / kind
        if kind not in self.pipelines:
            self.pipelines[kind] = write_pipeline(path, *KINDS[kind])
        return path, self.pipelines[kind]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("diffusers"))


@pytest.fixture
def copied(written: Written, tmp_path: Path):
    """A copy of a folder, to be changed."""

    def copy(kind: str = "sd15") -> Path:
        return Path(shutil.copytree(written(kind)[0], tmp_path / kind, copy_function=os.link))

    return copy


def rewrite(path: Path, content: Any) -> None:
    """Another content under this name; the linked original stays."""
    path.unlink(missing_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        safetensors.torch.save_file(content, path)


def change(path: Path, **values: Any) -> None:
    rewrite(path, json.loads(path.read_text()) | values)


# -- names, against the published lists -------------------------------------------------------------------


def published(version: str, prefix: str) -> dict[str, str]:
    lines = (ROOT / f"tests/golden/keys_sd{version}.tsv").read_text().splitlines()
    pairs = dict(line.split("\t") for line in lines)
    stale = ("position_ids", "attn_mask")
    return {k: shape for k, shape in pairs.items() if k.startswith(prefix) and not k.endswith(stale)}


def full_size(version: str) -> dict[str, torch.nn.Module]:
    """The published networks in diffusers, without memory."""
    sizes: dict[str, Any] = {"cross_attention_dim": 768}
    if version == "21":
        sizes = {
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "attention_head_dim": [5, 10, 20, 20],
        }
    ends = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(**sizes),
            "control": ControlNetModel(**sizes),
            "vae": AutoencoderKL(**widths, **ends),
        }


@pytest.mark.parametrize("version", ["15", "21"])
def test_the_names_of_diffusers_are_those_of_the_published_files_and_back(version: str) -> None:
    prefixes = {"unet": UNET, "control": CONTROL, "vae": "first_stage_model."}
    for part, network in full_size(version).items():
        theirs = network.state_dict()
        ours = to_published(part, theirs, "here")
        assert {key: str(list(value.shape)) for key, value in ours.items()} == published(
            version, prefixes[part]
        )
        back = to_diffusers(part, ours)
        assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("version", ["15", "21"])
def test_the_text_encoder_of_transformers_has_a_published_name_for_each_tensor(version: str) -> None:
    sizes = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    if version == "21":
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
    with torch.device("meta"):
        theirs = CLIPTextModel(CLIPTextConfig(**sizes)).state_dict()
        ours = text_to_published(theirs, open_clip=version == "21", where="here")
    found = {f"cond_stage_model.{key}": str(list(value.shape)) for key, value in ours.items()}
    if version == "21":  # the 24th block and two more are in the published files and nowhere in diffusers
        rest = open_clip_rest(ours, "here")
        assert len(rest) == 14
        found |= {f"cond_stage_model.{key}": str(list(shape)) for key, shape in rest.items()}
    assert found == published(version, "cond_stage_model.")
    back = text_to_diffusers(ours, sizes["num_hidden_layers"])
    assert {key.removeprefix("text_model."): value.shape for key, value in back.items()} == {
        key.removeprefix("text_model."): value.shape for key, value in theirs.items()
    }


# -- what a folder computes -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_computes_what_it_computes_in_diffusers(written: Written, kind: str) -> None:
    folder, theirs = written(kind)
    config = model_config_of(folder)
    ours = create_model(config, folder).eval()
    assert ours.parameterization == ("v" if kind == "sd21-v" else "eps")
    assert ours.scale_factor == theirs.vae.config.scaling_factor
    scheduler = theirs.scheduler.alphas_cumprod
    assert relative_error(ours.alphas_cumprod, scheduler) <= 1e-5
    g = torch.Generator().manual_seed(0)
    x, hint, t = (
        torch.randn(2, 4, 8, 16, generator=g),
        torch.rand(2, 3, 64, 128, generator=g),
        torch.tensor([5, 905]),
    )
    text = torch.randn(2, 77, WIDTH[KINDS[kind][0]], generator=g)
    down, mid = theirs.controlnet(x, t, text, controlnet_cond=hint, return_dict=False)
    for a, b in zip(ours.control_model(x, hint, t, text), [*down, mid], strict=True):
        assert relative_error(a, b) <= 1e-5
    eps = theirs.unet(
        x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid
    ).sample
    assert relative_error(ours.apply_model(x, t, {"c_concat": [hint], "c_crossattn": [text]}), eps) <= 1e-5
    prompt = "a street, in rain"
    features = theirs.encode_prompt(prompt, "cpu", 1, False)[0]
    assert relative_error(ours.get_learned_conditioning([prompt]), features) <= 1e-5
    image = torch.rand(1, 3, 64, 64, generator=g) * 2 - 1
    expected = theirs.vae.encode(image).latent_dist
    assert relative_error(ours.encode_first_stage(image).mean, expected.mean) <= 1e-5
    assert relative_error(ours.first_stage_model.decode(x), theirs.vae.decode(x).sample) <= 1e-5


def test_one_network_out_of_a_pipeline_is_that_part_alone(written: Written) -> None:
    folder, theirs = written("sd15")
    unet, control = read_published(folder / "unet"), read_published(folder / "controlnet")
    assert {key.startswith(UNET) for key in unet} == {True}
    assert len(unet) == len(theirs.unet.state_dict())
    assert {key.startswith(CONTROL) for key in control} == {True}
    single = read_published(folder / "controlnet" / WEIGHTS)  # its file by itself, without a config.json
    assert single.keys() == control.keys()
    assert all(torch.equal(single[key], value) for key, value in control.items())


@torch.no_grad()
def test_a_control_folder_lies_over_a_base_and_brings_its_channels(written: Written, tmp_path: Path) -> None:
    control = make_control("sd15", channels=20)
    control.save_pretrained(tmp_path / "onehot")
    base = tmp_path / "base.safetensors"
    tool_export.main([str(written("sd15")[0]), str(base), "--to", "original"])
    state = {key: value for key, value in read_tensors(base).items() if not key.startswith(CONTROL)}
    plain = tmp_path / "plain.safetensors"
    safetensors.torch.save_file(state, plain, metadata=read_metadata(base))
    for below in (plain, folder_without_control(written, tmp_path)):
        config = model_config_of(tmp_path / "onehot", below)
        model = create_model(config, tmp_path / "onehot", below).eval()
        assert model.control_model.hint_channels == 20
        x, hint = torch.randn(1, 4, 8, 8), torch.rand(1, 20, 64, 64)
        text, t = torch.randn(1, 77, 32), torch.tensor([3])
        down, mid = control(x, t, text, controlnet_cond=hint, return_dict=False)
        for a, b in zip(model.control_model(x, hint, t, text), [*down, mid], strict=True):
            assert relative_error(a, b) <= 1e-5


def folder_without_control(written: Written, tmp_path: Path) -> Path:
    path = Path(shutil.copytree(written("sd15")[0], tmp_path / "no_control", copy_function=os.link))
    shutil.rmtree(path / "controlnet")
    index = json.loads((path / "model_index.json").read_text())
    del index["controlnet"]
    rewrite(path / "model_index.json", index)
    return path


# -- which files count ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "fp16"},
        {"max_shard_size": "300KB"},
        {"variant": "fp16", "max_shard_size": "300KB"},
        {"safe_serialization": False},
        {"safe_serialization": False, "variant": "fp16", "max_shard_size": "300KB"},
    ],
    ids=str,
)
def test_shards_and_variants_are_read(tmp_path: Path, options: dict[str, Any]) -> None:
    unet = make_unet("sd21").half()
    unet.save_pretrained(tmp_path, **options)
    assert ("max_shard_size" in options) == (len(list(tmp_path.glob("*of*"))) > 1)
    expected = to_published("unet", unet.state_dict(), "here")
    found = read_folder(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_full_precision_goes_before_its_variants(tmp_path: Path) -> None:
    vae = make_vae()
    for variant in ("fp16", "non_ema", None):
        vae.save_pretrained(tmp_path, variant=variant)
        vae.half()
    vae = make_vae()
    vae.save_pretrained(tmp_path)
    assert {value.dtype for value in read_folder(tmp_path).values()} == {torch.float32}


def test_the_old_names_of_the_autoencoder_are_understood(tmp_path: Path) -> None:
    """As diffusers wrote them until 0.17, and the published SD1.5 folder still has them."""
    vae = make_vae()
    vae.save_pretrained(tmp_path)
    expected = read_folder(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in vae.state_dict().items():
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        state[key] = value
    assert sum("proj_attn" in key for key in state) == 4
    rewrite(tmp_path / WEIGHTS, state)
    AutoencoderKL.from_pretrained(tmp_path)  # they are names that diffusers takes, too
    found = read_folder(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("style", ["sd15", "sd21"])
def test_the_lost_level_of_transformers_may_be_there(tmp_path: Path, style: str) -> None:
    make_text(style).save_pretrained(tmp_path)
    expected = read_folder(tmp_path)
    plain = safetensors.torch.load_file(tmp_path / "model.safetensors")
    plain = {"text_model." + key.removeprefix("text_model."): value for key, value in plain.items()}
    rewrite(
        tmp_path / "model.safetensors", plain | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    )
    found = read_folder(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# -- the scripts take folders -----------------------------------------------------------------------------


@torch.no_grad()
def test_control_is_added_to_a_folder_and_what_it_predicts_is_kept(
    written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, theirs = written("sd21-v")
    folder = Path(shutil.copytree(source, tmp_path / "v", copy_function=os.link))
    shutil.rmtree(folder / "controlnet")
    change(folder / "model_index.json", controlnet=[None, None])
    target = tmp_path / "ini.safetensors"
    tool_add_control.main([str(folder), str(target)])
    assert "predicts v; hints of 3 channels" in capsys.readouterr().out
    model = create_model(model_config_of(target), target).eval()
    assert model.parameterization == "v"
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([40]), torch.randn(1, 77, WIDTH["sd21"])
    ours = model.apply_model(x, t, {"c_concat": [torch.rand(1, 3, 64, 64)], "c_crossattn": [text]})
    assert relative_error(ours, theirs.unet(x, t, text).sample) <= 1e-5


def test_a_control_folder_takes_the_place_of_the_copy(written: Written, tmp_path: Path) -> None:
    make_control("sd15", channels=5).save_pretrained(tmp_path / "five")
    target = tmp_path / "out.safetensors"
    base = folder_without_control(written, tmp_path)
    tool_add_control.main([str(base), str(target), "--control", str(tmp_path / "five")])
    found, expected = read_tensors(target), read_folder(tmp_path / "five")
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert create_model(model_config_of(target), target).control_model.hint_channels == 5


def test_images_are_sampled_straight_from_a_folder(written: Written, tmp_path: Path) -> None:
    from PIL import Image

    folder = written("sd15")[0]
    Image.new("RGB", (64, 64), (128, 64, 128)).save(tmp_path / "road.png")
    common = ["--hint", str(tmp_path / "road.png"), "--hint_type", "image", "--steps", "1", "--device", "cpu"]
    generate_script.main(["--ckpt", str(folder), "--out", str(tmp_path / "a"), *common])
    parts = ["--ckpt", str(folder / "controlnet"), "--base", str(folder_without_control(written, tmp_path))]
    generate_script.main([*parts, "--out", str(tmp_path / "b"), *common])
    first, second = (Image.open(tmp_path / name / "road_seed0.png").tobytes() for name in "ab")
    assert first == second


def test_a_run_on_a_folder_is_told_to_bring_it_in_first(written: Written, tmp_path: Path) -> None:
    folder = written("sd15")[0]
    with pytest.raises(
        CheckpointError, match=r"python tool_export\.py \S+sd15 sd15\.safetensors --to original"
    ):
        base_of(folder)
    with pytest.raises(CheckpointError, match="bring it in first"):
        base_of(folder / "controlnet", folder)
    config = load_run_config("streets", None, [f"model.checkpoint={folder}"])
    said = "\n".join(tutorial_train.find_missing(config))  # before data are rendered or read
    assert f"{folder} is a folder" in said
    assert f"python tool_export.py {folder} OUT.safetensors --to original" in said


def test_a_folder_has_a_fingerprint_of_its_contents(copied) -> None:
    folder = copied()
    before = fingerprint(folder)
    assert before == fingerprint(folder)
    change(folder / "scheduler/scheduler_config.json", beta_end=0.013)
    assert fingerprint(folder) != before


# -- what is refused --------------------------------------------------------------------------------------


def swap_control(folder: Path) -> None:
    shutil.rmtree(folder / "controlnet")
    make_control("sd21").save_pretrained(folder / "controlnet")


def make_sdxl(folder: Path) -> None:
    change(folder / "unet/config.json", addition_embed_type="text_time")


def lose_shard(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    make_unet("sd15").save_pretrained(folder / "unet", max_shard_size="200KB")
    next((folder / "unet").glob("*-00002-of*")).unlink()


def leave_folder(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).unlink()
    rewrite(folder / f"unet/{WEIGHTS}.index.json", {"weight_map": {"conv_in.weight": "../vae/" + WEIGHTS}})


def add_tensor(folder: Path) -> None:
    path = folder / "unet" / WEIGHTS
    rewrite(path, safetensors.torch.load_file(path) | {"class_embedding.weight": torch.ones(2)})


WRONG = {
    r"controlnet is a control branch for 16 channels, text of width 48 and linear projections, but \S+unet "
    r"is 16 channels, text of width 32 and 1x1 projections": swap_control,
    "the unet has addition_embed_type='text_time', expected None": make_sdxl,
    "config.json says conditioning_channels 4, its weights have 3": lambda folder: change(
        folder / "controlnet/config.json", conditioning_channels=4
    ),
    r"config.json says layers_per_block \[3, 3, 3, 3\], its weights have \[2, 2, 2, 2\]": lambda folder: (
        change(folder / "unet/config.json", layers_per_block=3)
    ),
    "the scheduler has beta_schedule='linear', expected 'scaled_linear'": lambda folder: change(
        folder / "scheduler/scheduler_config.json", beta_schedule="linear"
    ),
    "prediction_type='sample', expected 'epsilon' or 'v_prediction'": lambda folder: change(
        folder / "scheduler/scheduler_config.json", prediction_type="sample"
    ),
    "names vae/ in its model_index.json, but there is no vae/config.json": lambda folder: shutil.rmtree(
        folder / "vae"
    ),
    "is a FluxPipeline, which is not supported": lambda folder: (
        shutil.rmtree(folder / "unet"),
        rewrite(folder / "model_index.json", {"_class_name": "FluxPipeline"}),
    ),
    "neither model_index.json nor config.json": lambda folder: (
        shutil.rmtree(folder),
        (folder / "photos").mkdir(parents=True),
    ),
    r"00002-of-\d+.safetensors does not exist": lose_shard,
    "which lies elsewhere": leave_folder,
    "holds class_embedding.weight, which no network": add_tensor,
    r"has a config.json and no weights": lambda folder: (folder / "vae" / WEIGHTS).unlink(),
    "config.json is no JSON": lambda folder: (
        (folder / "vae/config.json").unlink(),
        (folder / "vae/config.json").write_text("{"),
    ),
    "lacks 'block_out_channels'": lambda folder: rewrite(
        folder / "vae/config.json", {"_class_name": "AutoencoderKL", "latent_channels": 4}
    ),
    "vae: config.json says layers_per_block 100000000, its weights have 2": lambda folder: change(
        folder / "vae/config.json", layers_per_block=10**8
    ),
    "lacks .* or has it wrong": lambda folder: change(folder / "unet/config.json", block_out_channels=[]),
    "has it wrong; download": lambda folder: change(
        folder / "scheduler/scheduler_config.json", beta_end=["high"]
    ),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_a_wrong_folder_is_refused_in_a_sentence(
    copied, tmp_path: Path, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, target = copied(), tmp_path / "out.safetensors"
    WRONG[sentence](folder)
    with pytest.raises(SystemExit) as stop:
        tool_export.main([str(folder), str(target), "--to", "original"])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.search(sentence, message), message
    assert message.startswith(f"{Path(sys.argv[0]).name}: ")
    assert len(message.strip().splitlines()) == 1
    assert not target.exists()


def test_a_control_over_the_wrong_base_is_refused_by_both_names(written: Written) -> None:
    control, base = written("sd21")[0] / "controlnet", written("sd15")[0]
    with pytest.raises(CheckpointError) as caught:
        read_weights(control, base)
    assert f"{control} is a control branch for" in str(caught.value)
    assert f"but {base} is" in str(caught.value)


def test_weights_that_would_run_code_are_not_run(copied, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "sprung"),)

    folder = copied()
    (folder / "unet" / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Trap()}, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="mkdir"):
        read_folder(folder)
    assert not (tmp_path / "sprung").exists()


# -- SCP-Diff's releases ----------------------------------------------------------------------------------


def memory_mib(name: str) -> float:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux alone")
def test_of_a_lightning_checkpoint_with_its_optimizer_only_the_model_is_read(tmp_path: Path) -> None:
    """As SCP-Diff released them: AdamW's moments are more than half of the 13.7 GB."""
    path = tmp_path / "epoch=3-step=100.ckpt"
    model = {f"{CONTROL}zero_convs.{i}.0.weight": torch.ones(64, 64, 1, 1) for i in range(4)}
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": torch.ones(20_000_000)} for i in range(2)}  # 160 MB
    content = {
        **{"epoch": 3, "global_step": 100, "pytorch-lightning_version": "1.9.5", "state_dict": model},
        **{"optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-5, "params": [0, 1]}]}]},
        **{"callbacks": {}, "lr_schedulers": [], "loops": {}},
    }
    torch.save(content, path)
    assert path.stat().st_size > 160e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_mib("VmRSS")
    state = read_published(path)
    assert sum(float(value.sum()) for value in state.values()) == 4 * 64 * 64
    assert len(state) == 4
    assert memory_mib("VmHWM") - before < 60, "half of one moment would be 40 MiB: none was touched"
