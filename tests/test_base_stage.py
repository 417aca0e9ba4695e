"""Training of the Streets base: latents encoded once, batches, what is trained, the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr
from omegaconf import OmegaConf
from torch import Tensor

import tool_add_control
import tool_train_streets_base as script
from cldm.base_stage import (
    BaseTraining,
    LatentBatches,
    Latents,
    encode_once,
    encode_photos,
    held_out_losses,
    take_first_stage,
)
from cldm.cldm import ControlLDM
from cldm.model import create_model
from cldm.stages import BaseTrainConfig
from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.tensor_writing import write_tensors
from datasets.streets import CONDITIONS
from datasets.streets.caption import WEATHER
from datasets.streets.photos import captions_by_condition
from datasets.streets.tree import Plan, make_tree
from ldm.models.diffusion.schedule import min_snr_weights


def photos(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 64, 128, 3), np.uint8)


def some_latents(count: int = 4, std: float = 0.0) -> Latents:
    mean = np.random.default_rng(0).standard_normal((2, count, 4, 2, 4)).astype(np.float16)
    return Latents(mean, np.full_like(mean, std), [f"caption {i}" for i in range(count)])


# -- latents and batches -------------------------------------------------------------------------------------


def test_photos_are_encoded_as_they_are_and_mirrored(tiny_model: ControlLDM) -> None:
    latents = encode_photos(tiny_model, photos(), ["a", "b", "c"])
    for side, pixels in enumerate((photos(), photos()[:, :, ::-1].copy())):
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            moments = tiny_model.first_stage_model.encode(x).parameters
        mean, logvar = moments.chunk(2, dim=1)
        spread = mean.std().item()
        np.testing.assert_allclose(latents.mean[side], mean.numpy(), rtol=0, atol=0.1 * spread)
        assert np.square(latents.mean[side] - mean.numpy()).mean() ** 0.5 < 0.03 * spread
        np.testing.assert_allclose(latents.std[side], (logvar / 2).exp().numpy(), rtol=0.1)


def test_photos_are_encoded_once(
    tmp_path: Path, tiny_model: ControlLDM, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latents.safetensors"
    first = encode_once(path, tiny_model, photos(), ["a", "b", "c"], "vae")
    monkeypatch.setattr("cldm.base_stage.encode_photos", lambda *_: pytest.fail("encoded again"))
    again = encode_once(path, tiny_model, photos(), ["a", "b", "c"], "vae")
    np.testing.assert_array_equal(first.mean, again.mean)
    np.testing.assert_array_equal(first.std, again.std)
    changed = photos()
    changed[0, 0, 0, 0] ^= 1
    for pixels, vae in ((changed, "vae"), (photos(), "another vae")):
        with pytest.raises(pytest.fail.Exception, match="encoded again"):
            encode_once(path, tiny_model, pixels, ["a", "b", "c"], vae)


def test_a_batch_of_latents_is_a_function_of_seed_and_step() -> None:
    make = lambda seed: LatentBatches(some_latents(std=0.5), 9, batch=3, drop=0.5, seed=seed)  # noqa: E731
    one, again, other = make(0), make(0), make(1)
    later = again[7]  # in any order
    for step in (7, 2):
        np.testing.assert_array_equal(one[step]["z"], again[step]["z"])
        assert one[step]["txt"] == again[step]["txt"]
    np.testing.assert_array_equal(later["z"], one[7]["z"])
    assert not np.array_equal(one[7]["z"], other[7]["z"])
    assert one[7]["z"].dtype == np.float32


def test_latents_keep_their_captions_and_some_captions_are_left_out() -> None:
    latents = some_latents()
    batches = LatentBatches(latents, 200, batch=8, drop=0.25, seed=0)
    dropped = mirrored = 0
    for step in range(200):
        for z, text in zip(batches[step]["z"], batches[step]["txt"], strict=True):
            found = np.argwhere((latents.mean == z.astype(np.float16)).all(axis=(2, 3, 4)))
            ((side, i),) = found
            mirrored += side
            dropped += text == ""
            assert text in ("", f"caption {i}")
    assert abs(dropped / 1600 - 0.25) < 0.05  # 4.6 standard deviations
    assert abs(mirrored / 1600 - 0.5) < 0.06


def test_drawn_latents_have_the_moments_of_the_posterior() -> None:
    latents = Latents(
        np.full((2, 1, 4, 8, 8), 2, np.float16), np.full((2, 1, 4, 8, 8), 0.5, np.float16), ["a"]
    )
    z = LatentBatches(latents, 1, batch=200, drop=0, seed=0)[0]["z"]
    assert z.mean() == pytest.approx(2, abs=0.01)
    assert z.std() == pytest.approx(0.5, abs=0.01)


# -- what is minimised, what is trained ----------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_min_snr_weights_are_those_of_the_paper(tiny_model: ControlLDM, parameterization: str) -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.arange(0, 1000, 37)
    snr = compute_snr(scheduler, t)
    least = torch.stack([snr, torch.full_like(snr, 5)]).min(dim=0).values
    expected = least / (snr if parameterization == "eps" else snr + 1)
    found = min_snr_weights(tiny_model.alphas_cumprod[t], 5.0, parameterization)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_weighted_loss_is_that_of_a_plain_loop_and_the_log_is_not_weighted(
    tiny_model: ControlLDM,
) -> None:
    g = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(3, 4, 8, 16, generator=g) for _ in range(2))
    t, cond = torch.tensor([5, 300, 900]), {"c_crossattn": [torch.randn(3, 77, 32, generator=g)]}
    tiny_model.min_snr_gamma = 5.0
    with torch.no_grad():
        loss, logs = tiny_model.p_losses(z, cond, t, noise)
        total = simple = 0.0
        for i in range(3):
            a = tiny_model.alphas_cumprod[t[i]].double()
            x = (a.sqrt() * z[i] + (1 - a).sqrt() * noise[i]).float()
            eps = tiny_model.apply_model(
                x[None], t[i : i + 1], {"c_crossattn": [cond["c_crossattn"][0][i, None]]}
            )
            error = ((eps[0] - noise[i]) ** 2).mean().item()
            total += min(5 * (1 - a) / a, 1) * error / 3
            simple += error / 3
    assert loss.item() == pytest.approx(float(total), rel=1e-4)
    assert logs["val/loss_simple"].item() == pytest.approx(simple, rel=1e-4)


def test_text_encoder_and_unet_are_trained_and_nothing_else(tiny_model: ControlLDM) -> None:
    module = BaseTraining(tiny_model, OmegaConf.structured(BaseTrainConfig(lr=1e-2, warmup=0, steps=4)))
    optimizer = module.configure_optimizers()
    module.optimizers = lambda use_pl_optimizer=True: optimizer
    module.log = lambda *_, **__: None
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    batch = {"z": torch.randn(2, 4, 8, 16), "txt": ["a tram", ""], "step": 0}
    module.training_step(batch, 0).backward()
    optimizer.step()
    after = tiny_model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name.split(".")[0] for name in changed} == {"model", "cond_stage_model"}
    words = next(name for name in before if "token_embedding" in name)
    rows = {
        row for row in range(len(before[words])) if not torch.equal(before[words][row], after[words][row])
    }
    assert rows == set(tiny_model.cond_stage_model.tokenize(["a tram", ""]).unique().tolist())


def test_held_out_losses_are_fixed_and_those_of_the_mean_latents(tiny_model: ControlLDM) -> None:
    latents = Latents(some_latents().mean.repeat(4, axis=3).repeat(4, axis=4), np.zeros(0), ["a"] * 4)
    first = held_out_losses(tiny_model, latents)
    torch.manual_seed(99)
    assert held_out_losses(tiny_model, latents) == first
    z = 0.18215 * torch.from_numpy(latents.mean[0]).float()
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    a = tiny_model.alphas_cumprod[500]
    context = tiny_model.get_learned_conditioning(["a"] * 4)
    with torch.no_grad():
        x = a.sqrt() * z + (1 - a).sqrt() * noise
        eps = tiny_model.apply_model(x, torch.full((4,), 500), {"c_crossattn": [context]})
    assert first[500] == pytest.approx(((eps - noise) ** 2).mean().item(), rel=1e-5)


# -- a run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overrides(
    tmp_path_factory: pytest.TempPathFactory, tiny_yaml: Path, tiny_model_once: ControlLDM
) -> list[str]:
    root = tmp_path_factory.mktemp("trees")
    make_tree(root / "camera", Plan("camera", size=(64, 128), train=5, val=5), workers=1)
    state = tiny_model_once.first_stage_model.state_dict()
    write_tensors(root / "vae.safetensors", {f"first_stage_model.{k}": v.half() for k, v in state.items()})
    return [
        *(f"data.camera_root={root / 'camera'}", "data.camera_frames=5", "data.game_frames=0"),
        *("data.val_frames=2", "data.size=[64,128]", f"data.first_stage={root / 'vae.safetensors'}"),
        *(f"model.config={tiny_yaml}", "train.batch_size=2", "train.steps=3", "train.warmup=1"),
        *("sample.steps=2", "slice.log_freq=100", "train.precision=32-true"),
    ]


def run(folder: Path, *arguments: str) -> dict[str, Tensor]:
    script.main([f"slice.folder={folder}", *arguments])
    return dict(read_tensors(folder / "state.safetensors"))


def test_a_base_in_slices_is_bit_by_bit_the_base_in_one(tmp_path: Path, overrides: list[str]) -> None:
    whole = run(tmp_path / "whole", *overrides)
    parts: dict[str, Tensor] = {}
    for _ in range(3):  # zero minutes are over behind the first step
        parts = run(tmp_path / "parts", "--minutes", "0", *overrides)
    assert parts.keys() == whole.keys()
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_base_learns_what_the_plain_one_learns(tmp_path: Path, overrides: list[str]) -> None:
    plain = run(tmp_path / "plain", *overrides)
    compiled = run(tmp_path / "compiled", "train.compile=true", *overrides)
    assert compiled.keys() == plain.keys()
    for key in (key for key in plain if key.startswith("weights.")):
        torch.testing.assert_close(compiled[key], plain[key], rtol=1e-3, atol=1e-4)


def test_the_file_of_a_run_takes_a_control_branch_and_samples(
    tmp_path: Path, overrides: list[str], tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "base.safetensors"
    run(tmp_path, "--minutes", "0", "--out", str(out), *overrides)
    assert "step 1 of 3" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert (tmp_path / "pictures" / "step=000001.png").is_file()
    notes = read_metadata(out)
    assert OmegaConf.create(notes["run_config"]).train.steps == 3
    assert json.loads(notes["figures"])["val_loss"] > 0
    tool_add_control.main([str(out), str(tmp_path / "ini.safetensors"), "--config", str(tiny_yaml)])
    model = create_model(tiny_yaml, tmp_path / "ini.safetensors")
    state = read_tensors(tmp_path / "state.safetensors")
    unet = dict(model.model.diffusion_model.named_parameters())
    for name, value in unet.items():
        torch.testing.assert_close(value, state[f"average.unet.{name}"], rtol=1e-3, atol=1e-6)


def test_another_autoencoder_is_another_run(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "--minutes", "0", *overrides)
    path = next(o for o in overrides if "first_stage" in o).partition("=")[2]
    state = {key: value + 1 for key, value in read_tensors(path).items()}
    write_tensors(tmp_path / "other.safetensors", state)
    with pytest.raises(SystemExit):
        run(tmp_path, *overrides, f"data.first_stage={tmp_path / 'other.safetensors'}")
    assert "is the state of a run with first_stage=" in capsys.readouterr().err


def test_captions_of_the_picture_name_all_conditions(overrides: list[str]) -> None:
    captions = captions_by_condition(overrides[0].partition("=")[2])
    assert [c for c in CONDITIONS if sum(WEATHER[c] in caption for caption in captions) == 1] == list(
        CONDITIONS
    )


def test_a_file_without_an_autoencoder_is_refused(tmp_path: Path, tiny_model: ControlLDM) -> None:
    with pytest.raises(FileNotFoundError, match=r"tool_train_streets_vae\.py"):
        take_first_stage(tiny_model, tmp_path / "none.safetensors")
    write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="holds no autoencoder of the model file"):
        take_first_stage(tiny_model, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.dropp=1", "did you mean train.drop"),
        ("train.drop=1", "train.drop below 1, found 1"),
        ("train.min_snr_gamma=-1", "train.min_snr_gamma of 0 or more, found -1"),
        ("data.size=[100,256]", "data.size=[HEIGHT,WIDTH] in multiples of 64, found [100, 256]"),
        ("sample.sampler=plms", "unknown sampler 'plms'"),
        ("data.first_stage=nowhere.safetensors", "expected the trained autoencoder at nowhere.safetensors"),
    ],
)
def test_a_wrong_setting_of_the_base_is_one_sentence(
    override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        script.main([override])
    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err
