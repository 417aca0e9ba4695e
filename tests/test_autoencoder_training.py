"""Training of the Streets autoencoder: loss terms, crops, state, the unit of the latents, the file."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from oracles import randomize
from torch import Tensor

import tool_train_streets_vae as script
from cldm.averaging import WeightAverage
from cldm.first_stage import build_training, latent_moments, reconstruct, spread, write_first_stage
from cldm.model import create_model, load_model_config
from cldm.slices import Progress, first_difference, read_progress
from cldm.stage_training import noise_generator
from cldm.stages import VAEStage, check_vae_stage, identity_of, load_stage
from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.tensor_writing import write_tensors
from datasets.streets.crops import Crops
from datasets.streets.photos import Frames, join_frames, read_frames
from datasets.streets.tree import Plan, make_tree
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.autoencoder_training import (
    LossWeights,
    edge_weights,
    feature_distance,
    frame_psnr,
    image_gradient,
    laplacian_pyramid,
    loss_terms,
    principal_code,
    standardise_latents,
)
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from metrics.judge import JudgeArch, JudgeNetwork, write_judge

RUN = Path("configs/streets_vae.yaml")


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny_autoencoder(seed: int = 0) -> AutoencoderKL:
    sizes = {"ch": 8, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "norm_groups": 4}
    return randomize(AutoencoderKL(4, sizes), seed)


def noise_frames(count: int, height: int = 64, width: int = 128) -> Frames:
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    return Frames(pixels, [f"caption {i}" for i in range(count)], [f"key {i}" for i in range(count)])


# -- the terms of the loss ---------------------------------------------------------------------------------


def test_the_gradient_is_the_length_of_forward_differences() -> None:
    x = images(2, 3, 5, 7)
    a = x.double().numpy()
    dx, dy = np.zeros_like(a), np.zeros_like(a)
    dx[..., :-1], dy[:, :, :-1] = np.diff(a, axis=3), np.diff(a, axis=2)
    expected = np.sqrt(dx**2 + dy**2).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(image_gradient(x).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_pyramid_has_the_bands_of_block_means_and_adds_up_to_the_image() -> None:
    x = images(2, 3, 16, 24)
    bands = [band.double().numpy() for band in laplacian_pyramid(x, 2)]
    a, blocks = x.double().numpy(), np.ones((2, 2))
    half = a.reshape(2, 3, 8, 2, 12, 2).mean(axis=(3, 5))
    quarter = half.reshape(2, 3, 4, 2, 6, 2).mean(axis=(3, 5))
    for band, expected in zip(
        bands, (a - np.kron(half, blocks), half - np.kron(quarter, blocks), quarter), strict=True
    ):
        np.testing.assert_allclose(band, expected, atol=1e-6)
    total = bands[0] + np.kron(bands[1] + np.kron(bands[2], blocks), blocks)
    np.testing.assert_allclose(total, a, atol=1e-6)


def test_edges_count_more_and_the_mean_weight_is_one() -> None:
    x = torch.zeros(1, 3, 32, 32)
    x[..., 16] = 1  # a pole of one pixel
    weights = edge_weights(x, strength=2.0)
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert weights[..., 16].min() > 3 * weights[..., :8].max()
    flat = torch.zeros(1, 3, 8, 8)
    torch.testing.assert_close(edge_weights(flat, 2.0), torch.ones(1, 1, 8, 8))
    torch.testing.assert_close(edge_weights(images(2, 3, 8, 8), 0.0), torch.ones(2, 1, 8, 8))


def strengths(x: Tensor) -> list[np.ndarray]:
    """Root mean square over windows of 4x4 at every second place, of the three bands of details."""
    found, a = [], x.double().numpy()
    for _ in range(3):
        n = a.shape[-1] // 2
        coarse = a.reshape(2, 3, n, 2, n, 2).mean(axis=(3, 5))
        square = (a - np.kron(coarse, np.ones((2, 2)))) ** 2
        places = range(0, 2 * n - 3, 2)
        means = [[square[:, :, i : i + 4, j : j + 4].mean(axis=(2, 3)) for j in places] for i in places]
        found.append(np.sqrt(np.array(means) + 0.01**2))
        a = coarse
    return found


def test_terms_are_their_closed_forms() -> None:
    x, found = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1)
    parameters = images(2, 8, 2, 2, seed=2)
    weights = LossWeights(edge=0, energy=1)
    terms = loss_terms(x, found, DiagonalGaussianDistribution(parameters), weights)
    difference = (found - x).double().numpy()
    mean, logvar = np.split(parameters.double().numpy(), 2, axis=1)
    bands = [difference.reshape(2, 3, n, 16 // n, n, 16 // n).mean(axis=(3, 5)) for n in (16, 8, 4, 2)]
    details = [a - np.kron(b, np.ones((2, 2))) for a, b in pairwise(bands)]
    expected = {
        "pixel": np.abs(difference).mean(),
        "square": (difference**2).mean(),
        "pyramid": sum(np.abs(band).mean() for band in [*details, bands[-1]]),
        "energy": sum(np.abs(a - b).mean() for a, b in zip(strengths(x), strengths(found), strict=True)),
        "kl": 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum() / difference.size,
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_the_linear_code_is_that_of_a_singular_value_decomposition() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    frames[..., 1] = frames[..., 0] // 2  # correlated, so that some directions are larger than others
    weight, bias = principal_code(frames, channels=2, block=4)
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 127.5 - 1
    codes = torch.nn.functional.conv2d(x, weight.double(), bias.double(), stride=4).numpy()
    blocks = [
        x[n, :, i : i + 4, j : j + 4].numpy().ravel()
        for n in range(3)
        for i in range(0, 16, 4)
        for j in range(0, 16, 4)
    ]
    centred = np.stack(blocks) - np.mean(blocks, axis=0)
    u, _, _ = np.linalg.svd(centred, full_matrices=False)
    expected = u[:, :2] * np.sqrt(len(blocks) - 1)
    found = codes.transpose(0, 2, 3, 1).reshape(-1, 2)
    np.testing.assert_allclose(found * np.sign((found * expected).sum(axis=0)), expected, atol=1e-4)


def test_the_pull_to_the_linear_code_is_a_squared_distance_that_fades() -> None:
    frames, x = noise_frames(2).images, images(2, 3, 32, 32)
    config = load_stage(VAEStage, RUN, ["train.guide_steps=4"])
    module = build_training(config, tiny_model_file(), frames)
    weight, bias = module.guide
    blocks = x.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, C, h, w, 8, 8)
    code = torch.einsum("bchwij,dcij->bdhw", blocks, weight) + bias[:, None, None]
    latent = images(2, 4, 4, 4, seed=1)
    expected = ((latent - code) ** 2).mean().item()
    assert module.distance_to_guide(x, latent).item() == pytest.approx(expected, rel=1e-4)
    added = []
    for step in range(6):
        losses = []
        for guided in (True, False):
            module.guide_steps = 4 if guided else 0
            module.log = lambda *args, **more: None
            losses.append(module.training_step({"jpg": x.permute(0, 2, 3, 1), "step": step}, 0).item())
        added.append(losses[0] - losses[1])
    assert added == pytest.approx(
        [added[0] * part for part in (1, 0.75, 0.5, 0.25, 0, 0)], rel=1e-3, abs=1e-6
    )
    assert added[0] > 0.1


def test_the_distance_of_features_is_that_of_unit_vectors() -> None:
    pairs = [(images(2, 5, 3, 4, seed=i), images(2, 5, 3, 4, seed=10 + i)) for i in range(2)]
    expected = 0.0
    for a, b in pairs:
        u, v = (m.double().numpy().transpose(0, 2, 3, 1).reshape(-1, 5) for m in (a, b))
        u, v = (m / (np.linalg.norm(m, axis=1, keepdims=True) + 1e-3) for m in (u, v))
        expected += np.mean([np.dot(p - q, p - q) for p, q in zip(u, v, strict=True)])
    found, wanted = zip(*pairs, strict=True)
    assert feature_distance(found, wanted).item() == pytest.approx(expected, rel=1e-5)


def test_features_count_from_their_first_step_on() -> None:
    frames, x = noise_frames(2).images, images(2, 3, 32, 32)
    options = ["train.guide_steps=0", "loss.features=3", "train.features_from=2", "data.features=judge"]

    def quarters(image: Tensor) -> list[Tensor]:
        return [torch.nn.functional.avg_pool2d(image, 4)]

    module = build_training(load_stage(VAEStage, RUN, options), tiny_model_file(), frames, quarters)
    module.log = lambda *args, **more: None
    losses = {}
    for features in (quarters, None):
        module.features = features
        losses[features] = [
            module.training_step({"jpg": x.permute(0, 2, 3, 1), "step": step}, 0).item() for step in (1, 2)
        ]
    assert losses[quarters][0] == losses[None][0]
    latent = module.autoencoder.encode(x).sample(noise_generator(0, 2, x.device))
    found = module.autoencoder.decode(latent)
    expected = losses[None][1] + 3 * feature_distance(quarters(found), quarters(x)).item()
    assert losses[quarters][1] == pytest.approx(expected, rel=1e-4)


def test_psnr_of_all_pixels_and_of_the_strongest_edges() -> None:
    x = torch.zeros(1, 3, 10, 10)
    x[..., 5] = 0.5  # columns 4 and 5 have a gradient: a fifth of the pixels
    found = x.clone()
    found[..., 4:6] += 0.1
    every, edges = frame_psnr(x, found, edge_share=0.2)
    assert every.item() == pytest.approx(10 * math.log10(4 / (0.2 * 0.01)), abs=1e-4)
    assert edges.item() == pytest.approx(10 * math.log10(4 / 0.01), abs=1e-4)


# -- crops -------------------------------------------------------------------------------------------------


def make_crops(steps: int = 10, seed: int = 5, **options: Any) -> Crops:
    settings = {"batch": 4, "crop": (32, 32), "last_crop": (64, 64), "last_share": 0.3, **options}
    return Crops(noise_frames(6), steps, seed=seed, **settings)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    first, second = make_crops(), make_crops()
    for step in (7, 3, 0):  # in any order, whatever was drawn before
        a, b = first[step], second[step]
        assert np.array_equal(a["jpg"], b["jpg"])
        assert a["txt"] == b["txt"]
        assert a["step"] == step
    assert not np.array_equal(first[0]["jpg"], first[1]["jpg"])
    assert not np.array_equal(first[0]["jpg"], make_crops(seed=6)[0]["jpg"])


def test_crops_are_cut_from_the_frame_of_their_caption() -> None:
    crops = make_crops()
    batch = crops[2]
    assert batch["jpg"].dtype == np.float32
    mirrored = 0
    for crop, caption in zip(batch["jpg"], batch["txt"], strict=True):
        pixels = np.round((crop + 1) * 127.5).astype(np.uint8)
        image = crops.frames.images[int(caption.split()[1])]
        windows = np.lib.stride_tricks.sliding_window_view(image, (32, 32, 3))[:, :, 0]
        plain, flipped = ((windows == p).all(axis=(2, 3, 4)).any() for p in (pixels, pixels[:, ::-1]))
        assert plain or flipped
        mirrored += flipped
    assert 0 <= mirrored <= 4


def test_the_last_steps_take_larger_crops_of_as_many_pixels() -> None:
    shapes = [make_crops()[step]["jpg"].shape for step in (0, 6, 7, 9)]
    assert shapes == [(4, 32, 32, 3)] * 2 + [(1, 64, 64, 3)] * 2


def test_frames_are_photos_in_turns_of_the_conditions(tmp_path: Path) -> None:
    make_tree(tmp_path, Plan(conditions=("clear", "night"), size=(64, 64), train=4, val=1), workers=1)
    frames = read_frames(tmp_path, "train", (64, 64), 2)
    assert frames.keys == ["camera-clear_000000_000000", "camera-night_000000_000001"]
    assert frames.images.shape == (2, 64, 64, 3)
    assert "night" in frames.captions[1]
    assert frames.images[0].mean() > frames.images[1].mean()
    assert len(join_frames([frames, read_frames(tmp_path, "val", (64, 64), 1)])) == 3
    with pytest.raises(FileNotFoundError, match=r"expected 5 photos of train, found 4; render more"):
        read_frames(tmp_path, "train", (64, 64), 5)


# -- the average and the unit of the latents -----------------------------------------------------------------


def test_the_average_is_exponential_with_a_short_memory_at_first() -> None:
    line = torch.nn.Linear(1, 1, bias=False)
    line.weight.data.fill_(0.0)
    average, expected = WeightAverage(line, decay=0.5), 0.0
    for step in range(1, 30):
        line.weight.data.fill_(float(step))
        average.update(line, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average.tensors["weight"].item() == pytest.approx(expected, rel=1e-5)
    with average.applied(line):
        assert line.weight.item() == pytest.approx(expected, rel=1e-5)
        assert not line.training
    assert line.weight.item() == 29
    assert line.training


def test_standardised_latents_have_unit_variance_after_the_scale_factor_and_decode_as_before() -> None:
    network, frames = tiny_autoencoder().eval(), noise_frames(3).images
    x = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        before = network.encode(x)
        shown = network.decode(before.mean)
        mean, std, _ = latent_moments([before])
        standardise_latents(network, mean.float(), std.float(), 0.18215)
        after = network.encode(x)
        torch.testing.assert_close(network.decode(after.mean), shown, rtol=1e-4, atol=1e-4)
    drawn = 0.18215 * (after.mean + after.std * torch.randn(64, *after.mean.shape)).double().numpy()
    assert drawn.mean(axis=(0, 1, 3, 4)) == pytest.approx(np.zeros(4), abs=0.02)
    assert drawn.std(axis=(0, 1, 3, 4)) == pytest.approx(np.ones(4), abs=0.02)
    ratio = (after.std / before.std).mean(dim=(0, 2, 3))
    np.testing.assert_allclose(ratio.numpy(), 1 / (0.18215 * std.numpy()), rtol=1e-4)


def test_a_perfect_autoencoder_has_the_figures_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    network, frames = tiny_autoencoder().eval(), noise_frames(2).images
    x = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    monkeypatch.setattr(network, "decode", lambda z: x)
    pictures, figures = reconstruct(network, frames)
    assert np.array_equal(pictures, frames)
    assert figures["psnr"] > 90


def test_rows_are_spread_over_the_frames() -> None:
    assert spread(9, 3) == [0, 4, 8]
    assert spread(2, 5) == [0, 1]
    assert spread(5, 0) == []


# -- a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("trees")
    for domain in ("camera", "game"):
        make_tree(root / domain, Plan(domain, size=(64, 128), train=4, val=1), workers=1)
    return [
        *(f"data.{domain}_root={root / domain}" for domain in ("camera", "game")),
        *("data.camera_frames=4", "data.game_frames=2", "data.val_frames=1", "data.size=[64,128]"),
    ]


@pytest.fixture
def overrides(trees: list[str], tiny_yaml: Path) -> list[str]:
    settings = "batch_size=2 crop=[32,32] last_crop=[64,64] last_share=0.4 warmup=2 steps=5 precision=32-true"
    return [
        *trees,
        f"model.config={tiny_yaml}",
        "loss.features=0",
        *(f"train.{setting}" for setting in settings.split()),
    ]


def run(folder: Path, *arguments: str) -> dict[str, Tensor]:
    script.main([f"slice.folder={folder}", "slice.log_freq=100", *arguments])
    return dict(read_tensors(folder / "state.safetensors"))


def test_a_run_in_slices_is_bit_by_bit_the_run_in_one(tmp_path: Path, overrides: list[str]) -> None:
    whole = run(tmp_path / "whole", *overrides)
    parts = {}
    for i in range(1, 6):  # zero minutes are over behind the first step
        parts = run(tmp_path / "parts", "--minutes", "0", *overrides)
        notes = read_metadata(tmp_path / "parts" / "state.safetensors")
        assert json.loads(notes["progress"])["step"] == i
    assert parts.keys() == whole.keys()
    assert {key.partition(".")[0] for key in whole} == {"weights", "average", "exp_avg", "exp_avg_sq", "step"}
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []
    written = [read_tensors(tmp_path / name / "first_stage.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(value, written[1][key]) for key, value in written[0].items())


def test_a_run_is_that_of_its_network_of_features(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "judge.safetensors"
    options = [*overrides, "loss.features=1", "train.features_from=1", f"data.features={path}"]
    with pytest.raises(SystemExit):
        run(tmp_path / "run", *options)
    assert "train it first: python tool_train_streets_judge.py" in capsys.readouterr().err
    torch.manual_seed(0)
    write_judge(path, JudgeNetwork(JudgeArch()), {})
    without = run(tmp_path / "without", *overrides)
    run(tmp_path / "run", "--minutes", "0", *options)
    write_judge(path, JudgeNetwork(JudgeArch()), {})
    with pytest.raises(SystemExit):
        run(tmp_path / "run", *options)
    assert "is the state of a run with features=" in capsys.readouterr().err
    found = run(tmp_path / "whole", *options)
    assert not all(torch.equal(without[key], found[key]) for key in without)


def test_a_slice_leaves_a_log_a_picture_and_a_file_that_says_what_made_it(
    tmp_path: Path, overrides: list[str], tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "vae.safetensors"
    run(tmp_path, "--minutes", "0", "--out", str(out), *overrides)
    said = capsys.readouterr().out
    assert "step 1 of 5" in said
    assert "the same command continues" in said
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[1]["loss"] > 0
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "step=000000.png",
        "step=000001.png",
    ]
    notes = read_metadata(out)
    assert json.loads(notes["figures"])["step"] == 1
    assert json.loads(notes["latents"])["scale_factor"] == 0.18215
    assert OmegaConf.create(notes["run_config"]).train.steps == 5
    model = create_model(tiny_yaml)
    state = {key.removeprefix("first_stage_model."): value for key, value in read_tensors(out).items()}
    assert {value.dtype for value in state.values()} == {torch.float16}
    model.first_stage_model.load_state_dict(state, strict=True)


def test_a_finished_run_writes_its_file_again(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*overrides, "train.steps=1"]
    run(tmp_path, *overrides)
    first = {key: value.clone() for key, value in read_tensors(tmp_path / "first_stage.safetensors").items()}
    (tmp_path / "first_stage.safetensors").unlink()
    run(tmp_path, *overrides)
    second = read_tensors(tmp_path / "first_stage.safetensors")
    assert "the run is complete" in capsys.readouterr().out
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_file_of_the_run_fits_the_streets_model_strictly(tmp_path: Path) -> None:
    config = load_stage(VAEStage, RUN, [])
    model_file = load_model_config(config.model.config)
    network = build_training(config, model_file, noise_frames(1).images).autoencoder
    path = tmp_path / "vae.safetensors"
    average = WeightAverage(network, 0.9)
    write_first_stage(path, network, average, noise_frames(1).images, 0.18215, {"a": "b"})
    model = create_model(model_file)
    state = {key: value.float() for key, value in read_tensors(path).items()}
    own = {key for key in model.state_dict() if key.startswith("first_stage_model.")}
    assert state.keys() == own
    model.load_state_dict(model.state_dict() | state, strict=True)


def test_the_posterior_starts_narrow_where_that_is_asked_for() -> None:
    x = images(2, 3, 32, 32)
    std = {}
    for start in (0.0, -6.0):
        torch.manual_seed(0)
        config = load_stage(VAEStage, RUN, [f"train.start_logvar={start}"])
        with torch.no_grad():
            module = build_training(config, tiny_model_file(), noise_frames(1).images)
            std[start] = module.autoencoder.encode(x).std
    torch.testing.assert_close(std[-6.0], std[0.0] * math.exp(-3))


@pytest.mark.slow
def test_one_crop_is_learned() -> None:
    from cldm.slices import TrainingSlice
    from cldm.stage_trainer import build_stage_trainer, steps_from

    torch.manual_seed(0)
    y, x = np.mgrid[:32, :32]
    pixels = np.stack([(x // 8 % 2) * 200, y * 7, np.where(x == 13, 255, 40)], axis=-1).astype(np.uint8)
    crops = Crops(
        Frames(pixels[None], [""], [""]),
        600,
        seed=0,
        batch=2,
        crop=(32, 32),
        last_crop=(32, 32),
        last_share=0,
    )
    config = load_stage(
        VAEStage, RUN, ["train.lr=1e-3", "train.steps=600", "train.warmup=20", "train.guide_steps=100"]
    )
    module = build_training(config, tiny_model_file(), pixels[None])
    running = TrainingSlice("", module.autoencoder, Progress(), "", decay=0.9, minutes=9, save_minutes=9)
    running.save = lambda optimizer: None
    before = reconstruct(module.autoencoder.eval(), pixels[None])[1]["psnr"]
    module.train()
    build_stage_trainer(600, "32-true", [running]).fit(module, steps_from(crops, 0))
    with running.average.applied(module.autoencoder):
        after = reconstruct(module.autoencoder, pixels[None])[1]["psnr"]
    assert before < 15
    assert after > 24


def tiny_model_file() -> DictConfig:
    model_file = load_model_config("models/cldm_streets.yaml")
    model_file.model.params.first_stage_config.params.ddconfig.update({"ch": 16, "ch_mult": [1, 2, 2, 2]})
    return model_file


# -- what is wrong is said in a sentence ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lrr=1", "did you mean train.lr"),
        ("train.lr=0", "train.lr above 0, found 0"),
        ("train.steps=0", "train.steps of 1 or more, found 0"),
        ("train.crop=[60,64]", "train.crop=[HEIGHT,WIDTH] in multiples of 16, found [60, 64]"),
        ("train.last_crop=[256,256]", "train.last_crop within [128, 256], found [256, 256]"),
        ("train.average=1.0", "train.average below 1"),
        ("train.precision=64", "train.precision to be one of 32-true, bf16-mixed, found '64'"),
        ("data.features=null", "expected data.features=FILE"),
        ("loss.kl=-1", "loss.kl of 0 or more, found -1"),
        ("loss.pyramid_levels=4", "in multiples of 16"),
        ("loss.energy=1", "in multiples of 16"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["train.crop=[72,64]", "loss.energy=0"] if said == "in multiples of 16" else []
    with pytest.raises(SystemExit) as exit_info:
        script.main([*extra, override])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "Traceback" not in error


def test_no_photos_at_all_are_refused() -> None:
    config = load_stage(VAEStage, RUN, ["data.camera_frames=0", "data.game_frames=0"])
    with pytest.raises(ValueError, match="expected photos to train on"):
        check_vae_stage(config)


def test_a_state_of_another_run_is_not_continued(tmp_path: Path) -> None:
    ours = identity_of(load_stage(VAEStage, RUN, []))
    theirs = identity_of(load_stage(VAEStage, RUN, ["train.lr=5e-4", "slice.minutes=3"]))
    progress = '{"step": 3, "cpu_seconds": 1.0, "wall_seconds": 1.0, "slices": 1}'
    path = tmp_path / "state.safetensors"
    assert read_progress(tmp_path, ours) == Progress()
    write_tensors(path, {"a": torch.zeros(1)}, {"progress": progress, "identity": theirs})
    assert read_progress(tmp_path, theirs).step == 3
    with pytest.raises(ValueError, match=r"a run with train.lr=0.0005, not 0.001"):
        read_progress(tmp_path, ours)
    write_tensors(path, {"a": torch.zeros(1)}, {"x": "y"})
    with pytest.raises(CheckpointError, match="no state of a training"):
        read_progress(tmp_path, ours)


def test_what_changes_no_weight_may_differ_between_slices() -> None:
    free = ["slice.minutes=1", "slice.folder=x", "data.camera_root=y", "data.val_frames=3"]
    assert identity_of(load_stage(VAEStage, RUN, free)) == identity_of(load_stage(VAEStage, RUN, []))
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == "a.c=None, not 2"
