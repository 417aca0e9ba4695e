"""Folders that we write: loaded and sampled in diffusers, read again, whole or not there at all."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from omegaconf import OmegaConf
from oracles import randomize
from transformers import CLIPImageProcessor, CLIPTokenizer

import cldm.export
import tool_export as script
from cldm.checkpoint import ema_key
from cldm.cldm import ControlLDM
from cldm.config import SampleConfig
from cldm.generate import draw_noise, generate
from cldm.model import create_model
from cldm.tensor_files import read_metadata, read_tensors
from cldm.tensor_writing import write_tensors
from cldm.weights import base_notes, read_published
from ldm.modules.encoders.tokenizer import chunk_tokens

KINDS = {"sd15": ("sd1", "eps"), "sd21": ("sd2", "eps"), "sd21-v": ("sd2", "v")}
UNET, CONTROL = "model.diffusion_model.", "control_model."
QUIET = ["--to", "diffusers", "--no-verify"]


class Made:
    """Models of ours, each once, in a whole checkpoint."""

    def __init__(self, folder: Path, yamls: dict[str, Path]) -> None:
        self.folder_of_all, self.yamls, self.models = folder, yamls, {}

    def __call__(self, kind: str) -> tuple[Path, ControlLDM]:
        path = self.folder_of_all / f"{kind}.safetensors"
        if kind not in self.models:
            style, prediction = KINDS[kind]
            config = OmegaConf.load(self.yamls[style])
            config.model.params.parameterization = prediction
            self.models[kind] = randomize(create_model(config), seed=5).eval()
            write_tensors(path, self.models[kind].state_dict(), {"model_config": OmegaConf.to_yaml(config)})
        return path, self.models[kind]

    def folder(self, kind: str) -> Path:
        """The same as a diffusers folder that our script wrote."""
        path = self.folder_of_all / kind
        if not path.exists():
            script.main([str(self(kind)[0]), str(path), *QUIET])
        return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_yamls: dict[str, Path]) -> Made:
    return Made(tmp_path_factory.mktemp("ours"), tiny_yamls)


@pytest.fixture
def source(made: Made) -> Path:
    return made("sd15")[0]


def load(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_diffusers_from_the_folder_is_our_sample(made: Made, kind: str) -> None:
    model, theirs = made(kind)[1], load(made.folder(kind))
    assert type(theirs) is StableDiffusionControlNetPipeline
    hint = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(1))
    settings = SampleConfig(steps=3, scale=4.0, negative_prompt="fog")
    ours = generate(model, hint, ["a road, at night"], [7], settings)
    found = theirs(
        "a road, at night",
        hint,
        negative_prompt="fog",
        latents=draw_noise([7], 1, (4, 8, 16))[0],
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="np",
    ).images
    assert ours.float().std() > 10
    assert abs(ours.numpy() / 255 - found).max() <= 1 / 255


@pytest.mark.parametrize("kind", KINDS)
def test_ours_to_diffusers_and_back_is_ours_bit_by_bit(made: Made, tmp_path: Path, kind: str) -> None:
    source = made(kind)[0]
    script.main([str(made.folder(kind)), str(tmp_path / "back.safetensors"), "--to", "original"])
    before, after = read_tensors(source), read_tensors(tmp_path / "back.safetensors")
    added = {key for key in after if key.endswith("position_ids")}
    assert after.keys() - added == before.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value), key
    config = OmegaConf.create(read_metadata(tmp_path / "back.safetensors")["model_config"])
    assert config.model.params.parameterization == KINDS[kind][1]


def test_the_folder_holds_what_a_pipeline_needs_and_safetensors_alone(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    script.main([str(source), str(target), *QUIET])
    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    weights = {f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "vae", "controlnet")}
    configs = {f"{name}/config.json" for name in ("unet", "vae", "controlnet", "text_encoder")}
    words = {f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json")}
    rest = {"tokenizer/special_tokens_map.json", "scheduler/scheduler_config.json", "model_index.json"}
    rest |= {"feature_extractor/preprocessor_config.json"}
    assert files == weights | configs | words | rest | {"text_encoder/model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing of the making is left


def test_verification_prints_what_it_compared(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main([str(source), str(tmp_path / "out"), "--to", "diffusers", "--dtype", "fp16"])
    said = capsys.readouterr().out
    for what in ("text", "autoencoder", "UNet and control", "sample of 4 steps"):
        assert f"{what}: largest difference " in said
    assert said.endswith("verified in diffusers\n")
    unet = read_tensors(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in unet.values()} == {torch.float16}


def test_a_folder_that_computes_something_else_is_kept_and_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = cldm.export.write_folder

    def write_another(target: Path, config: Any, state: dict, notes: dict, dtype: Any) -> None:
        key = UNET + "out.2.bias"
        write(target, config, {**state, key: state[key] + 0.1}, notes, dtype)

    monkeypatch.setattr(cldm.export, "write_folder", write_another)
    with pytest.raises(SystemExit) as stop:
        script.main([str(source), str(tmp_path / "out"), "--to", "diffusers"])
    said = capsys.readouterr()
    assert stop.value.code == 1
    assert f"{tmp_path / 'out'} does not compute what the source computes (UNet and control" in said.err
    assert "verified" not in said.out
    assert (tmp_path / "out/model_index.json").exists()


def test_without_diffusers_it_is_said_that_nothing_was_verified(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    script.main([str(source), str(tmp_path / "out"), "--to", "diffusers"])
    assert "not verified: diffusers is not installed" in capsys.readouterr().out


def test_a_write_that_fails_leaves_no_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cldm.diffusers_writing.model_index", full)  # the last of its files
    with pytest.raises(SystemExit) as stop:
        script.main([str(source), str(tmp_path / "out"), *QUIET])
    assert stop.value.code == 2
    assert f"{tmp_path / 'out'} could not be written: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# -- text -------------------------------------------------------------------------------------------------

TEXTS = [
    "",
    "a photo of a dog!",
    "caf\u00e9 \u4e2d\u6587, it's 12:30 -- (50% wet) #2 & more",
    "word " * 60,
    "A  B\n C?!x",
]


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_the_tokenizer_gives_our_ids_and_survives_being_saved(made: Made, tmp_path: Path, kind: str) -> None:
    pad = made(kind)[1].cond_stage_model.pad_id
    theirs = CLIPTokenizer.from_pretrained(made.folder(kind) / "tokenizer", local_files_only=True)
    theirs.save_pretrained(tmp_path / "again")
    for tokenizer in (theirs, CLIPTokenizer.from_pretrained(tmp_path / "again")):
        assert tokenizer.pad_token_id == pad
        for text in TEXTS:
            found = tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
            assert found == chunk_tokens([text], pad)[0, 0].tolist(), text


# -- what is in a checkpoint ------------------------------------------------------------------------------


@pytest.fixture
def unlocked(made: Made, tmp_path: Path) -> Path:
    """A training with a free decoder: control and decoder over a base."""
    base, model = made("sd15")
    trained = (CONTROL, UNET + "output_blocks.", UNET + "out.")
    state = {key: value + 0.01 for key, value in model.state_dict().items() if key.startswith(trained)}
    path = tmp_path / "run.safetensors"
    write_tensors(path, state, {**read_metadata(base), "step": "9", **base_notes(base, beside=tmp_path)})
    return path


def test_a_trained_decoder_goes_along(unlocked: Path, source: Path, tmp_path: Path) -> None:
    script.main([str(unlocked), str(tmp_path / "out"), *QUIET])
    script.main([str(unlocked), str(tmp_path / "one.ckpt"), "--to", "original"])
    trained, base = read_tensors(unlocked), read_tensors(source)
    assert any(key.startswith(UNET + "output_blocks.") for key in trained)
    for found in (read_published(tmp_path / "out"), read_tensors(tmp_path / "one.ckpt")):
        for key, value in found.items():
            expected = trained.get(key, base.get(key))
            assert expected is None or torch.equal(value, expected), key
        assert set(trained) <= set(found)
    notes = read_metadata(tmp_path / "one.ckpt")
    assert (notes["step"], notes["source"]) == ("9", "run.safetensors")


def test_the_branch_alone_of_such_a_run_is_refused(
    unlocked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main([str(unlocked), str(tmp_path / "c.safetensors"), "--to", "control"])
    said = capsys.readouterr().err
    assert "carries a UNet decoder that was trained with its control branch" in said
    assert "--to original or --to diffusers" in said


def test_ema_copies_take_the_place_of_the_weights(
    made: Made, tmp_path: Path, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {
        k: v for k, v in made("sd15")[1].state_dict().items() if not k.startswith(CONTROL) and k != "logvar"
    }
    unet = {key: value for key, value in state.items() if key.startswith(UNET)}
    path = tmp_path / "sd.ckpt"
    write_tensors(path, state | {ema_key(key): value + 0.01 for key, value in unet.items()})
    target = tmp_path / "out"
    script.main([str(path), str(target), "--to", "diffusers", "--config", str(tiny_yaml), "--ema"])
    assert "verified in diffusers" in capsys.readouterr().out
    found = read_published(target)
    assert all(torch.equal(found[key], value + 0.01) for key, value in unet.items())
    assert type(load(target)) is StableDiffusionPipeline  # there was no control branch
    assert not (target / "controlnet").exists()


def test_hints_of_other_channels_are_written_as_such(made: Made, tmp_path: Path) -> None:
    config = OmegaConf.load(made.yamls["sd1"])
    config.model.params.control_stage_config.params.hint_channels = 7
    model = randomize(create_model(config), seed=3)
    path = tmp_path / "seven.safetensors"
    write_tensors(path, model.state_dict(), {"model_config": OmegaConf.to_yaml(config)})
    script.main([str(path), str(tmp_path / "out"), *QUIET])
    written = json.loads((tmp_path / "out/controlnet/config.json").read_text())
    assert written["conditioning_channels"] == 7
    theirs = ControlNetModel.from_pretrained(tmp_path / "out/controlnet", local_files_only=True)
    assert torch.equal(
        theirs.controlnet_cond_embedding.conv_in.weight, model.control_model.input_hint_block[0].weight
    )


def only_mid(config: Any) -> None:
    config.model.params.only_mid_control = True


def hidden_layer(config: Any) -> None:
    config.model.params.cond_stage_config.params |= {"layer": "hidden", "layer_idx": 1}


REFUSED = {"only_mid_control, which diffusers does not know": only_mid, "without its last norm": hidden_layer}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_model_that_diffusers_has_no_words_for_is_refused(
    source: Path, tmp_path: Path, made: Made, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = OmegaConf.load(made.yamls["sd1"])
    REFUSED[sentence](config)
    OmegaConf.save(config, tmp_path / "model.yaml")
    with pytest.raises(SystemExit) as stop:
        script.main([str(source), str(tmp_path / "out"), *QUIET, "--config", str(tmp_path / "model.yaml")])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("control alone", "holds control alone; a pipeline needs"),
        ("a base too many", "holds a whole model, so the base"),
        ("no copies", "684 of 684 copies are missing"),
        ("another model file", "does not fit its model file"),
    ],
)
def test_what_makes_no_pipeline_is_said_in_a_sentence(
    made: Made, source: Path, tmp_path: Path, case: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, options = (
        source,
        {
            "a base too many": ["--base", str(source)],
            "no copies": ["--ema"],
            "another model file": ["--config", str(made.yamls["sd2"])],
        }.get(case, []),
    )
    if case == "control alone":
        command = tmp_path / "alone.pth"
        state = {key: value for key, value in read_tensors(source).items() if key.startswith(CONTROL)}
        torch.save(state, command)
    with pytest.raises(SystemExit) as stop:
        script.main([str(command), str(tmp_path / "out"), *QUIET, *options])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert sentence in message
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_feature_extractor_is_that_of_clip(made: Made) -> None:
    found = CLIPImageProcessor.from_pretrained(made.folder("sd15") / "feature_extractor")
    assert found.to_dict() == CLIPImageProcessor().to_dict()
