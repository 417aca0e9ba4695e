"""`generate()` against a plain loop in float64, and generate.py on files as users have them."""

from __future__ import annotations

import copy
import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

import cldm.generate
import generate as script
from cldm.cldm import ControlLDM
from cldm.config import SAMPLER_NAMES, SampleConfig
from cldm.generate import SAMPLERS, generate
from cldm.tensor_files import read_metadata
from cldm.tensor_writing import write_tensors
from cldm.weights import base_notes
from datasets.prompts import Prompts

PROMPTS, SEEDS = ["a road in the rain", "a house"], [11, 5]
FAST = SampleConfig(steps=3, scale=4.0, negative_prompt="blurred")


@pytest.fixture
def hint() -> Tensor:
    blocks = torch.rand(2, 3, 2, 4, generator=torch.Generator().manual_seed(2))
    return blocks.repeat_interleave(32, dim=2).repeat_interleave(32, dim=3)


@pytest.fixture
def own_model(model: ControlLDM) -> ControlLDM:
    """A copy to change."""
    return copy.deepcopy(model)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two uint8 images, in grey levels."""
    assert a.shape == b.shape
    return (a.int() - b.int()).abs().max().item()


# -- the loop, written out --------------------------------------------------------------------------------


@torch.no_grad()
def plain_loop(model: ControlLDM, hint: Tensor | None, settings: SampleConfig) -> Tensor:
    """DDIM as its paper has it, in float64, two calls a step, nothing computed ahead."""
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]

    def draw() -> np.ndarray:
        return torch.stack([torch.randn(4, 8, 16, generator=g) for g in generators]).double().numpy()

    def predict(x: np.ndarray, t: int, texts: list[str], controlled: bool) -> np.ndarray:
        cond = {"c_crossattn": [model.get_learned_conditioning(texts)], "c_concat": None}
        if controlled:
            fade = [0.825 ** (12 - i) if settings.guess_mode else 1 for i in range(13)]
            cond |= {"c_concat": [hint], "control_scales": [settings.strength * f for f in fade]}
        out = model.apply_model(torch.from_numpy(x).float(), torch.full((2,), t), cond).double().numpy()
        return abar[t] ** 0.5 * out + (1 - abar[t]) ** 0.5 * x if model.parameterization == "v" else out

    x = draw()
    times = [1 + i * 1000 // settings.steps for i in range(settings.steps)][::-1]
    for t, after in zip(times, [*(abar[t] for t in times[1:]), abar[0]], strict=True):
        eps = predict(x, t, PROMPTS, hint is not None)
        if settings.scale != 1:
            negative = [settings.negative_prompt] * 2
            other = predict(x, t, negative, hint is not None and not settings.guess_mode)
            eps = (1 - settings.scale) * other + settings.scale * eps
        variance = settings.eta**2 * (1 - after) / (1 - abar[t]) * (1 - abar[t] / after)
        x_0 = (x - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5
        x = after**0.5 * x_0 + (1 - after - variance) ** 0.5 * eps
        x = x + variance**0.5 * draw() if settings.eta else x
    image = model.decode_first_stage(torch.from_numpy(x).float()).double()
    return ((image.permute(0, 2, 3, 1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"scale": 1.0},
        {"eta": 0.7},
        {"guess_mode": True, "strength": 0.8},
        {"strength": 1.5, "scale": 1.0, "guess_mode": True},
        {"steps": 7, "negative_prompt": ""},
    ],
    ids=str,
)
def test_images_are_those_of_the_plain_loop(model: ControlLDM, hint: Tensor, change: dict[str, Any]) -> None:
    settings = replace(FAST, **change)
    images = generate(model, hint, PROMPTS, SEEDS, settings)
    assert (images.dtype, images.shape) == (torch.uint8, (2, 64, 128, 3))
    assert images.float().std() > 20, "a grey image would agree with anything"
    assert difference(images, plain_loop(model, hint, settings)) <= 1


def test_the_schema_names_the_samplers_that_there_are() -> None:
    assert list(SAMPLERS) == list(SAMPLER_NAMES)


def test_images_of_a_v_model_and_without_a_hint_are_those_of_the_plain_loop(
    own_model: ControlLDM, hint: Tensor
) -> None:
    plain = generate(own_model, None, PROMPTS, SEEDS, FAST, size=(64, 128))
    assert difference(plain, plain_loop(own_model, None, FAST)) <= 1
    own_model.parameterization = "v"
    of_v = generate(own_model, hint, PROMPTS, SEEDS, FAST)
    assert difference(of_v, plain_loop(own_model, hint, FAST)) <= 1
    assert difference(of_v, plain) > 20


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("dpm++2m", 0.0)])
def test_a_batch_equals_its_images_one_at_a_time(
    model: ControlLDM, hint: Tensor, sampler: str, eta: float
) -> None:
    settings = replace(FAST, sampler=sampler, eta=eta)
    together = generate(model, hint, PROMPTS, SEEDS, settings)
    for i in range(2):
        alone = generate(model, hint[i : i + 1], PROMPTS[i : i + 1], SEEDS[i : i + 1], settings)
        assert difference(alone, together[i : i + 1]) <= 1
    swapped = generate(model, hint.flip(0), PROMPTS[::-1], SEEDS[::-1], settings)
    assert difference(swapped.flip(0), together) <= 1
    assert difference(together[:1], together[1:]) > 20


def test_each_of_hint_prompt_seed_and_sampler_makes_a_difference(model: ControlLDM, hint: Tensor) -> None:
    def one(hint: Tensor, prompt: str, seed: int, **change: Any) -> Tensor:
        return generate(model, hint, [prompt], [seed], replace(FAST, **change))

    base = one(hint[:1], PROMPTS[0], 1)
    others = [one(hint[1:], PROMPTS[0], 1), one(hint[:1], PROMPTS[1], 1), one(hint[:1], PROMPTS[0], 2)]
    others += [one(hint[:1], PROMPTS[0], 1, **change) for change in ({"eta": 1.0}, {"sampler": "dpm++2m"})]
    others += [
        one(hint[:1], PROMPTS[0], 1, **change) for change in ({"scale": 9.0}, {"negative_prompt": "x"})
    ]
    assert [difference(base, other) > 1 for other in others] == [True] * 7


def test_one_hint_serves_every_image(model: ControlLDM, hint: Tensor) -> None:
    of_one = generate(model, hint[:1], PROMPTS, SEEDS, FAST)
    of_two = generate(model, hint[:1].repeat(2, 1, 1, 1), PROMPTS, SEEDS, FAST)
    assert difference(of_one, of_two) <= 1


def test_strength_0_is_no_control(model: ControlLDM, hint: Tensor) -> None:
    without = generate(model, None, PROMPTS, SEEDS, FAST, size=(64, 128))
    assert torch.equal(generate(model, hint, PROMPTS, SEEDS, replace(FAST, strength=0.0)), without)
    assert difference(generate(model, hint, PROMPTS, SEEDS, FAST), without) > 1


def test_the_seeds_are_the_only_randomness(model: ControlLDM, hint: Tensor) -> None:
    settings = replace(FAST, eta=1.0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = generate(model, hint, PROMPTS, SEEDS, settings)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is not ours to move"
    torch.manual_seed(2)
    assert torch.equal(generate(model, hint, PROMPTS, SEEDS, settings), first)


# -- how much is computed ---------------------------------------------------------------------------------


def batches_through(modules: dict[str, nn.Module]) -> dict[str, list[int]]:
    """Batch size of every coming call of the modules, by name."""
    seen: dict[str, list[int]] = {name: [] for name in modules}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, list | tuple) else output
            seen[name].append(len(first if isinstance(first, Tensor) else first[0]))

        return hook

    for name, module in modules.items():
        module.register_forward_hook(record(name))
    return seen


@pytest.mark.parametrize(
    ("change", "unet", "control", "hints", "texts"),
    [
        ({}, 4, 4, 2, 4),
        ({"scale": 1.0}, 2, 2, 2, 2),
        ({"guess_mode": True}, 4, 2, 2, 4),
        ({"sampler": "dpm++2m"}, 4, 4, 2, 4),
    ],
    ids=str,
)
def test_a_step_is_one_call_and_what_is_constant_is_computed_once(
    own_model: ControlLDM,
    hint: Tensor,
    change: dict[str, Any],
    unet: int,
    control: int,
    hints: int,
    texts: int,
) -> None:
    texts_seen: list[int] = []
    encode = own_model.get_learned_conditioning
    own_model.get_learned_conditioning = lambda t: texts_seen.append(len(t)) or encode(t)
    seen = batches_through(
        {
            "unet": own_model.model.diffusion_model,
            "control": own_model.control_model,
            "hint": own_model.control_model.input_hint_block,
        }
    )
    steps: list[int] = []
    settings = replace(FAST, steps=5, **change)
    generate(own_model, hint, PROMPTS, SEEDS, settings, callback=lambda step, x_0: steps.append(step))
    assert seen == {"unet": [unet] * 5, "control": [control] * 5, "hint": [hints]}
    assert texts_seen == [texts]
    assert steps == [0, 1, 2, 3, 4]


def test_the_callback_gets_the_predicted_latent(model: ControlLDM, hint: Tensor) -> None:
    got: list[Tensor] = []
    settings = replace(FAST, steps=2)
    generate(model, hint, PROMPTS, SEEDS, settings, callback=lambda step, x_0: got.append(x_0.clone()))
    assert [tuple(x_0.shape) for x_0 in got] == [(2, 4, 8, 16)] * 2
    # DDIM ends at x = sqrt(abar_0) x_0 + sqrt(1 - abar_0) eps with abar_0 = 0.999: x_0 is nearly the result.
    nearly = cldm.generate.decode(model, got[-1])
    final = generate(model, hint, PROMPTS, SEEDS, settings)
    assert (nearly.float() - final.float()).abs().mean() < 5


def test_decoding_in_parts_changes_nothing(
    model: ControlLDM, hint: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(model, hint, PROMPTS, SEEDS, FAST)
    monkeypatch.setattr(cldm.generate, "DECODED_AT_ONCE", 1)
    assert difference(generate(model, hint, PROMPTS, SEEDS, FAST), whole) <= 1


# -- what does not fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size", "change", "said"),
    [
        ((1, 3, 60, 64), None, {}, r"multiples of 64, found 60x64"),
        ((1, 3, 64, 64), (64, 128), {}, r"hint of 64x128, found 64x64"),
        (None, None, {}, r"multiples of 64"),
        ((1, 3, 64, 64), None, {"sampler": "euler"}, r"'euler'.*ddim.*dpm\+\+2m"),
        ((1, 3, 64, 64), None, {"steps": 0}, r"steps.*1\.\.1000.*0"),
        ((1, 3, 64, 64), None, {"steps": 1001}, r"1001"),
        ((1, 4, 64, 64), None, {}, r"3 channels.*found 4"),
    ],
)
def test_what_does_not_fit_is_said(
    model: ControlLDM, shape: tuple[int, ...] | None, size: Any, change: dict[str, Any], said: str
) -> None:
    hint = None if shape is None else torch.zeros(shape)
    with pytest.raises(ValueError, match=said):
        generate(model, hint, ["a"], [0], replace(FAST, **change), size=size)


@pytest.mark.parametrize(
    "part", ["first_stage_model.decoder.conv_out.bias", "control_model.zero_convs.0.0.weight"]
)
def test_an_image_that_is_not_finite_is_refused(own_model: ControlLDM, hint: Tensor, part: str) -> None:
    own_model.get_parameter(part).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        generate(own_model, hint, PROMPTS, SEEDS, FAST)


# == the script ===========================================================================================

# Of Cityscapes: label id, train id, colour of road, car, sky, and of what is void.
CLASSES = [(7, 0, (128, 64, 128)), (26, 13, (0, 0, 142)), (23, 10, (70, 130, 180)), (4, 255, (0, 0, 0))]
SCENE = np.repeat(
    np.repeat([[2, 2, 2, 2], [1, 0, 3, 0]], 32, axis=0), 32, axis=1
)  # (64, 128) rows of CLASSES
LABEL_IDS, TRAIN_IDS, COLOURS = (np.array([row[i] for row in CLASSES], np.uint8)[SCENE] for i in range(3))
SHORT = ["--steps", "2", "--scale", "3", "--prompt", "a street"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, model: ControlLDM, tiny_yaml: Path) -> Path:
    """A whole checkpoint of the tiny model, with its model file recorded."""
    path = tmp_path_factory.mktemp("weights") / "whole.safetensors"
    config = OmegaConf.to_yaml(OmegaConf.load(tiny_yaml))
    write_tensors(path, model.state_dict(), {"model_config": config})
    return path


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """The same scene as label ids, as train ids with a palette, and painted, in a folder with a subfolder."""
    folder = tmp_path / "maps"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(LABEL_IDS).save(folder / "a_gtFine_labelIds.png")
    palette = Image.fromarray(TRAIN_IDS)
    palette.putpalette([7, 8, 9] * 256)
    palette.save(folder / "b_labelTrainIds.png")
    Image.fromarray(COLOURS).save(folder / "sub/c.png")
    return folder


def run(weights: Path, hint: Path, out: Path, *words: str) -> dict[str, np.ndarray]:
    """Run the script; return the pictures of the folder it wrote, by name."""
    script.main(["--ckpt", str(weights), "--hint", str(hint), "--out", str(out), *SHORT, *words])
    return pictures(out)


def pictures(out: Path) -> dict[str, np.ndarray]:
    """Pixels of every PNG in a folder, read by Pillow."""
    return {str(path.relative_to(out)): np.asarray(Image.open(path)) for path in out.rglob("*.png")}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one sentence with which the script stops."""
    with pytest.raises(SystemExit) as exit_info:
        script.main([*words, *SHORT])
    assert exit_info.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"\S+\.py: ", last)  # argparse and `refuse` both open with the name of the program
    return last


def test_a_folder_of_maps_of_every_kind(weights: Path, maps: Path, tmp_path: Path, model) -> None:
    found = run(weights, maps, tmp_path / "out", "--seed", "3", "--num", "2", "--batch_size", "4")
    stems = ["a_gtFine_labelIds", "b_labelTrainIds", "sub/c"]
    names = [f"{stem}_seed{seed}.png" for stem in stems for seed in (3, 4)]
    assert set(found) == {*names, "contact_sheet_001.png"}
    hint = torch.from_numpy(COLOURS.copy()).permute(2, 0, 1)[None] / 255
    settings = SampleConfig(steps=2, scale=3.0)
    expected = generate(model, hint, ["a street"] * 2, [3, 4], settings).int().numpy()
    for name in names:
        assert np.abs(found[name] - expected[int(name[-5]) - 3]).max() <= 1
    page = found["contact_sheet_001.png"]
    rows = [
        np.split(page[y : y + 64], [128 + 132 * i + gap for i in range(4) for gap in (0, 4)], axis=1)
        for y in (0, 68, 136)
    ]
    assert page.shape == (3 * 64 + 2 * 4, 5 * 128 + 4 * 4, 3)
    assert (page[64:68] == 255).all()
    for stem, cells in zip(stems, rows, strict=True):
        assert (cells[0] == COLOURS).all()
        assert all((gap == 255).all() for gap in cells[1::2])
        for seed, image, mixed in zip((3, 4), cells[2::4], cells[4::4], strict=True):
            assert (image == found[f"{stem}_seed{seed}.png"]).all()
            assert np.abs(mixed - (image.astype(float) + COLOURS) / 2).max() <= 0.5


def test_a_single_file_a_picture_as_it_is_and_a_size(weights: Path, maps: Path, tmp_path: Path) -> None:
    painted = run(weights, maps / "sub/c.png", tmp_path / "map")
    as_it_is = run(weights, maps / "sub/c.png", tmp_path / "picture", "--hint_type", "image")
    assert set(painted) == {"c_seed0.png", "contact_sheet_001.png"}
    assert all((painted[name] == as_it_is[name]).all() for name in painted)
    wide = run(weights, maps / "sub/c.png", tmp_path / "wide", "--size", "64", "192")
    assert wide["c_seed0.png"].shape == (64, 192, 3)
    expected = COLOURS[:, ((np.arange(192) + 0.5) * 128 / 192).astype(int)]
    assert (wide["contact_sheet_001.png"][:, :192] == expected).all(), "the nearest pixel, no new colour"


def test_hints_of_several_sizes(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    for name, width in (("a", 128), ("b", 64), ("c", 128)):
        Image.fromarray(COLOURS[:, :width].copy()).save(tmp_path / f"maps/{name}.png")
    found = run(weights, tmp_path / "maps", tmp_path / "out")
    assert [found[f"{name}_seed0.png"].shape for name in "abc"] == [(64, 128, 3), (64, 64, 3), (64, 128, 3)]
    assert np.abs(found["a_seed0.png"].astype(int) - found["c_seed0.png"]).max() <= 1
    page = found["contact_sheet_001.png"]
    assert (page[68 : 68 + 64, :64] == COLOURS[:, :64]).all()
    assert (page[68 : 68 + 64, 64:132] == 255).all()
    assert (page[68 : 68 + 64, 132 : 132 + 64] == found["b_seed0.png"]).all()


def test_an_image_carries_what_made_it(weights: Path, maps: Path, tmp_path: Path) -> None:
    words = ["--negative_prompt", "fog", "--eta", "0.5", "--strength", "0.75", "--guess_mode", "--seed", "9"]
    run(weights, maps / "sub/c.png", tmp_path / "out", *words)
    with Image.open(tmp_path / "out/c_seed9.png") as image:
        found = json.loads(image.text["scenecontrol"])
    expected = {
        "prompt": "a street",
        "negative_prompt": "fog",
        "steps": 2,
        "scale": 3.0,
        "eta": 0.5,
        "seed": 9,
    }
    expected |= {"strength": 0.75, "guess_mode": True, "sampler": "ddim", "checkpoint": "whole.safetensors"}
    assert {**found, **expected} == found
    assert found["hint"] == "c.png"


def test_a_half_done_folder_is_completed(
    weights: Path, maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = run(weights, maps, out)
    (out / "a_gtFine_labelIds_seed0.png").unlink()
    damaged = out / "b_labelTrainIds_seed0.png"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    kept = (out / "sub/c_seed0.png").stat().st_mtime_ns
    again = run(weights, maps, out)
    assert set(again) == set(first)
    assert all((again[name] == first[name]).all() for name in first)
    assert (out / "sub/c_seed0.png").stat().st_mtime_ns == kept
    monkeypatch.setattr(script, "model_of", lambda args: pytest.fail("nothing is to be done"))
    run(weights, maps, out)
    assert (out / "sub/c_seed0.png").stat().st_mtime_ns == kept


def test_images_of_other_settings_are_not_lost(
    weights: Path, maps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, hint = tmp_path / "out", maps / "sub/c.png"
    first = run(weights, hint, out)
    words = ["--ckpt", str(weights), "--hint", str(hint), "--out", str(out)]
    said = refused(capsys, *words, "--negative_prompt", "fog")
    assert "negative_prompt" in said
    assert "--overwrite" in said
    assert (pictures(out)["c_seed0.png"] == first["c_seed0.png"]).all()
    assert (
        run(weights, hint, out, "--negative_prompt", "fog", "--overwrite")["c_seed0.png"]
        != first["c_seed0.png"]
    ).any()
    Image.fromarray(COLOURS).save(out / "c_seed1.png")
    assert "c_seed1.png" in refused(capsys, *words, "--seed", "1"), "a picture of somebody else"


def test_a_hint_that_was_edited_is_noticed(
    weights: Path, maps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, hint = tmp_path / "out", maps / "sub/c.png"
    run(weights, hint, out)
    Image.fromarray(COLOURS[:, ::-1].copy()).save(hint)
    assert "hint" in refused(capsys, "--ckpt", str(weights), "--hint", str(hint), "--out", str(out))


# -- checkpoints ------------------------------------------------------------------------------------------


def write_control_only(folder: Path, model: ControlLDM, base: Path, **notes: str) -> Path:
    """A control branch in a folder of its own, with the record of its base."""
    folder.mkdir(parents=True, exist_ok=True)
    control = {key: value for key, value in model.state_dict().items() if key.startswith("control_model.")}
    path = folder / "control.safetensors"
    write_tensors(path, control, {**base_notes(base, beside=folder), **notes})
    return path


def test_a_control_branch_finds_its_base(
    weights: Path,
    maps: Path,
    tmp_path: Path,
    own_model: ControlLDM,
    tiny_yaml: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hint, words = maps / "sub/c.png", ["--config", str(tiny_yaml)]
    reference = run(weights, hint, tmp_path / "out/0")["c_seed0.png"]
    for parameter in own_model.control_model.parameters():  # the base has a branch too, but another one
        parameter.data.mul_(1.5)
    (tmp_path / "here/models").mkdir(parents=True)
    base = Path(shutil.copy(weights, tmp_path / "here/models/base.safetensors"))
    write_control_only(tmp_path / "here/run/checkpoints", own_model, base)
    (tmp_path / "here").rename(tmp_path / "there")  # the pair moves together
    control = tmp_path / "there/run/checkpoints/control.safetensors"
    by_path = run(control, hint, tmp_path / "out/1", *words)["c_seed0.png"]
    assert (by_path != reference).any()
    moved = (tmp_path / "there/models/base.safetensors").rename(tmp_path / "elsewhere.safetensors")
    monkeypatch.chdir(tmp_path)
    asked = ["--ckpt", str(control), "--hint", str(hint), "--out", str(tmp_path / "out/2"), *words]
    assert "--base" in refused(capsys, *asked)
    given = run(control, hint, tmp_path / "out/3", *words, "--base", str(moved))["c_seed0.png"]
    (tmp_path / "models").mkdir()
    moved.rename(tmp_path / "models/renamed.safetensors")
    by_hash = run(control, hint, tmp_path / "out/4", *words)["c_seed0.png"]
    assert (given == by_path).all()
    assert (by_hash == by_path).all()


def test_an_original_checkpoint_needs_no_record(
    weights: Path, maps: Path, tmp_path: Path, model: ControlLDM, tiny_yaml: Path
) -> None:
    payload = {"state_dict": model.state_dict(), "global_step": 3, "epoch": 1}
    torch.save(payload, tmp_path / "original.ckpt")
    ours = run(weights, maps / "sub/c.png", tmp_path / "0")["c_seed0.png"]
    words = ["--config", str(tiny_yaml)]
    theirs = run(tmp_path / "original.ckpt", maps / "sub/c.png", tmp_path / "1", *words)["c_seed0.png"]
    assert (ours == theirs).all()


def test_prompt_and_size_are_those_of_the_training_run(
    maps: Path, tmp_path: Path, model: ControlLDM, tiny_yaml: Path
) -> None:
    notes = {
        "model_config": OmegaConf.to_yaml(OmegaConf.load(tiny_yaml)),
        "run_config": "data: {prompt: 'a lane: wet', size: [128, 64]}",
    }
    write_tensors(tmp_path / "run.safetensors", model.state_dict(), notes)
    words = ["--ckpt", str(tmp_path / "run.safetensors"), "--hint", str(maps / "sub/c.png"), "--steps", "1"]
    script.main([*words, "--out", str(tmp_path / "0")])
    script.main([*words, "--out", str(tmp_path / "1"), "--prompt", "other", "--size", "64", "64"])
    for folder, shape, prompt in (("0", (128, 64, 3), "a lane: wet"), ("1", (64, 64, 3), "other")):
        with Image.open(tmp_path / folder / "c_seed0.png") as image:
            assert np.asarray(image).shape == shape
            assert json.loads(image.text["scenecontrol"])["prompt"] == prompt


def test_prompts_are_filled_in_as_in_the_training_run(
    maps: Path, tmp_path: Path, model: ControlLDM, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = "{caption} with {classes} in {weather}"
    run_config = {"data": {"prompt": sentence, "words": {"weather": ["rain", "snow"]}}, "train": {"seed": 3}}
    notes = {
        "model_config": OmegaConf.to_yaml(OmegaConf.load(tiny_yaml)),
        "run_config": json.dumps(run_config),
    }
    write_tensors(tmp_path / "run.safetensors", model.state_dict(), notes)
    hint = tmp_path / "tree/ulm_000000_000019_gtFine_labelTrainIds.png"
    hint.parent.mkdir()
    ids = np.full((64, 64), 255, np.uint8)
    ids[:40], ids[60:] = 0, 13
    Image.fromarray(ids).save(hint)
    (hint.parent / "captions.json").write_text('{"ulm_000000_000019": "Ulm"}')
    words = ["--ckpt", str(tmp_path / "run.safetensors"), "--hint", str(hint), "--steps", "1"]
    script.main([*words, "--out", str(tmp_path / "0")])
    with Image.open(tmp_path / "0" / f"{hint.stem}_seed0.png") as image:
        prompt = json.loads(image.text["scenecontrol"])["prompt"]
    dataset_words = Prompts("{weather}", words=run_config["data"]["words"], seed=3)
    assert prompt == f"Ulm with road, car in {dataset_words.of('ulm_000000_000019')}"
    for more, said in (
        (["--prompt", "a {city}"], "expected names among caption, classes, weather, found {city}"),
        (["--hint_type", "image"], "expected a label map, found a hint of type image"),
    ):
        with pytest.raises(SystemExit):
            script.main([*words, "--out", str(tmp_path / "1"), *more])
        assert said in capsys.readouterr().err
    notes["run_config"] = "data: {prompt: ''}"
    write_tensors(tmp_path / "old.safetensors", model.state_dict(), notes)
    script.main(["--ckpt", str(tmp_path / "old.safetensors"), *words[2:], "--out", str(tmp_path / "2")])
    with Image.open(tmp_path / "2" / f"{hint.stem}_seed0.png") as image:
        assert json.loads(image.text["scenecontrol"])["prompt"] == "Ulm"


def test_hints_look_as_in_the_training_run(
    maps: Path, tmp_path: Path, model: ControlLDM, tiny_yaml: Path
) -> None:
    config = OmegaConf.to_yaml(OmegaConf.load(tiny_yaml))
    notes = {"model_config": config, "run_config": "data: {hint: label_colours, size: [64, 64]}"}
    write_tensors(tmp_path / "run.safetensors", model.state_dict(), notes)
    words = ["--ckpt", str(tmp_path / "run.safetensors"), *SHORT]
    ids = np.where(LABEL_IDS[0, 0] == LABEL_IDS, 9, LABEL_IDS)  # parking, which is void
    Image.fromarray(ids.astype(np.uint8)).save(maps / "a_gtFine_labelIds.png")
    hint = str(maps / "a_gtFine_labelIds.png")
    script.main([*words, "--hint", hint, "--out", str(tmp_path / "0")])
    script.main([*words, "--hint", hint, "--out", str(tmp_path / "1"), "--encoding", "colours"])
    with Image.open(tmp_path / "0/a_gtFine_labelIds_seed0.png") as image:
        assert json.loads(image.text["scenecontrol"])["encoding"] == "label_colours"
    sheets = [np.asarray(Image.open(tmp_path / n / "contact_sheet_001.png"))[:64, :64] for n in "01"]
    table = {}
    with Path("datasets/palettes/cityscapes.tsv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            table[int(row["id"])] = [int(row[channel]) for channel in "RGB"]
    centre = [(2 * np.arange(64) + 1) * n // 128 for n in ids.shape]
    expected = np.array([[table[int(ids[y, x])] for x in centre[1]] for y in centre[0]])
    np.testing.assert_array_equal(sheets[0], expected)
    assert not np.array_equal(sheets[0], sheets[1]), "void classes have colours there"


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ckpt", "hint", "words", "said"),
    [
        ("gone.ckpt", "good", [], "gone.ckpt does not exist"),
        ("whole", "gone", [], "gone does not exist"),
        ("whole", "empty", [], "no picture"),
        ("whole", "wrong_labelIds.png", [], "99"),
        ("whole", "unclear.png", [], "--hint_type"),
        ("whole", "unclear.png", ["--hint_type", "colours"], "unclear.png"),
        ("whole", "twins", [], "rename"),
        ("whole", "good", ["--num", "0"], "--num must lie in 1.."),
        ("whole", "good", ["--palette", "cityscape"], "did you mean 'cityscapes'"),
        ("whole", "good", ["--sampler", "euler"], "dpm++2m"),
        ("whole", "good", ["--encoding", "one_hot"], "did you mean 'onehot'"),
        (
            "whole",
            "good",
            ["--encoding", "onehot"],
            "expected a hint of 3 channels, as the model has, found 20",
        ),
        ("whole", "good", ["--size", "60", "64"], "multiples of 64"),
        ("whole", "good", ["--config", "empty.yaml"], "empty.yaml"),
        ("picture", "good", [], "expected a safetensors file"),
        ("no_control", "good", [], "tool_add_control.py"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ckpt: str,
    hint: str,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    maps = {"good": COLOURS, "unclear": TRAIN_IDS, "wrong_labelIds": np.full((64, 64), 99, np.uint8)}
    maps |= {"twins/a": COLOURS}
    for name, array in maps.items():
        Path(name).parent.mkdir(exist_ok=True)
        Image.fromarray(array).save(f"{name}.png")
    Image.fromarray(COLOURS).save("twins/a.bmp")
    Path("empty").mkdir()
    Path("empty.yaml").touch()
    hint = "good.png" if hint == "good" else hint
    state = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
    if ckpt == "no_control":
        write_tensors(Path("no_control"), state, read_metadata(weights))
    path = {"whole": str(weights), "picture": "good.png"}.get(ckpt, ckpt)
    assert said in refused(capsys, "--ckpt", path, "--hint", hint, "--out", "out", *words)
    assert not list(Path().glob("out/**/*.png"))


def test_images_are_not_written_among_the_hints(
    weights: Path, maps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (maps, maps / "out"):
        said = refused(capsys, "--ckpt", str(weights), "--hint", str(maps), "--out", str(out))
        assert "folder of the hints" in said
    run(weights, maps / "sub/c.png", maps / "sub")  # beside a single hint they do no harm
    assert (maps / "sub/c_seed0.png").exists()


# -- real samples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["cityscapes/gtFine/val", "gta/labels"])
def test_real_maps_are_sampled(real_data: Path, weights: Path, tmp_path: Path, folder: str) -> None:
    frames = [path for path in (real_data / folder).rglob("*.png") if "instance" not in path.name]
    found = run(weights, real_data / folder, tmp_path, "--size", "64", "128", "--steps", "1")
    assert {name for name in found if "sheet" not in name} == {
        str(path.relative_to(real_data / folder).with_suffix("")) + "_seed0.png" for path in frames
    }
    assert found["contact_sheet_001.png"].shape[0] == 68 * min(len(frames), 16) - 4
