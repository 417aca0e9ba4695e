"""Validation during training: its figures against plain loops, and that training does not notice it."""

from __future__ import annotations

import json
import logging
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from oracles import randomize
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tool_add_control
import tutorial_train
from cldm import trainer as parts
from cldm.cldm import ControlLDM
from cldm.tensor_writing import write_tensors
from cldm.validation import LossCurve, Validation, golden, summary
from datasets.streets.tree import Plan, make_tree
from ldm.models.diffusion.schedule import NoiseSchedule, at, make_betas

T = 1000


def samples_of(count: int, size: tuple[int, int] = (64, 128), seed: int = 5) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "jpg": rng.random((*size, 3), np.float32) * 2 - 1,
            "hint": rng.random((1, 1, 3), np.float32) * np.ones((*size, 1), np.float32),  # plain colours
            "txt": f"house {i}",
        }
        for i in range(count)
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_of(callbacks: list[pl.Callback], folder: Path, **more: Any) -> pl.Trainer:
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(default_root_dir=folder, callbacks=callbacks, devices=1, **{**options, **more})


def measured(model: ControlLDM, samples: list[dict[str, Any]], folder: Path, **more: Any) -> dict[str, Any]:
    """Return the measurement of a model that was not trained."""
    validation, trainer = Validation(1, samples, **more), run_of([], folder)
    validation.setup(trainer, model, "fit")
    validation.on_train_start(trainer, model)
    (line,) = lines(folder / "validation.jsonl")
    return line


# -- the figures ------------------------------------------------------------------------------------------


def loop(model: ControlLDM, samples: list[dict[str, Any]], seed: int, shift: int) -> np.ndarray:
    """Return (4, N) losses with the hints of the sample `shift` further, one p_losses for each."""
    found = np.zeros((4, len(samples)))
    for i, sample in enumerate(samples):
        generator = torch.Generator().manual_seed(seed + i)
        image = torch.from_numpy(sample["jpg"]).permute(2, 0, 1)[None]
        hint = torch.from_numpy(samples[(i + shift) % len(samples)]["hint"]).permute(2, 0, 1)[None]
        z = model.first_stage_model.encode(image).mean * model.scale_factor
        cond = {"c_concat": [hint], "c_crossattn": [model.get_learned_conditioning([sample["txt"]])]}
        noise = torch.randn(4, *z.shape[1:], generator=generator)
        for band in range(4):
            t = math.floor(T * (band + math.fmod(i * (math.sqrt(5) - 1) / 2, 1)) / 4)
            loss, _ = model.p_losses(z, cond, torch.tensor([t]), noise[band][None])
            found[band, i] = loss.item()
    return found


@pytest.mark.parametrize(("parameterization", "count", "batch_size"), [("eps", 3, 2), ("v", 2, 7)])
def test_a_measurement_is_what_a_loop_over_samples_and_levels_gives(
    tiny_model: ControlLDM, tmp_path: Path, parameterization: str, count: int, batch_size: int
) -> None:
    tiny_model.parameterization = parameterization
    randomize(tiny_model.control_model.input_hint_block, gain=2)  # or hints hardly matter
    samples = samples_of(count)
    line = measured(tiny_model, samples, tmp_path, batch_size=batch_size, seed=3)
    with torch.no_grad():
        right, shuffled = (loop(tiny_model, samples, 3, shift) for shift in (0, count // 2))
    assert line["loss_simple"] == pytest.approx(right.mean(), rel=1e-5)
    assert line["loss_shuffled_hint"] == pytest.approx(shuffled.mean(), rel=1e-5)
    assert line["adherence"] == pytest.approx(1 - right.mean() / shuffled.mean(), abs=1e-5)
    error = (shuffled - right).mean(0).std(ddof=1) / count**0.5 / shuffled.mean()
    assert line["adherence_error"] == pytest.approx(error, rel=1e-3)
    assert abs(right - shuffled).mean() > 1e-3, "the hints matter, so that a wrong one would be seen"
    for band, values in enumerate(line["bands"]):
        assert (values["first"], values["last"]) == (250 * band, 250 * band + 249)
        assert values["loss_simple"] == pytest.approx(right[band].mean(), rel=1e-5)
        assert values["loss_shuffled_hint"] == pytest.approx(shuffled[band].mean(), rel=1e-5)


def test_a_control_branch_of_zeros_has_an_adherence_of_exactly_0(
    tiny_model: ControlLDM, tmp_path: Path
) -> None:
    for conv in (*tiny_model.control_model.zero_convs, tiny_model.control_model.middle_block_out):
        for parameter in conv.parameters():
            nn.init.zeros_(parameter)
    line = measured(tiny_model, samples_of(9), tmp_path, batch_size=4)
    assert line["loss_simple"] == line["loss_shuffled_hint"] > 0
    assert (line["adherence"], line["adherence_error"], line["is_clear"]) == (0, 0, False)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_however_many_samples_fill_their_range_evenly(count: int) -> None:
    points = np.sort([golden(i) for i in range(count)])
    gaps = np.diff([*points, points[0] + 1])
    assert points.min() >= 0
    assert points.max() < 1
    # Three-distance theorem: gaps of golden multiples stand to each other as powers of the golden ratio.
    assert gaps.max() / gaps.min() <= 2.6181


# -- when hints are followed ------------------------------------------------------------------------------


def decisions(*clear: bool) -> list[str | None]:
    validation = Validation(1, samples_of(2))
    return [
        validation.decide(10 * i, {"is_clear": is_clear, "adherence": 0.25})
        for i, is_clear in enumerate(clear)
    ]


def test_the_line_comes_with_the_second_clear_measurement_in_a_row_and_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="cldm.validation"):
        said = decisions(False, True, False, True, True, True, False, True, True)
    assert [i for i, line in enumerate(said) if line] == [4]
    assert caplog.messages == [said[4]]
    assert "since step 30: " in caplog.messages[0]
    assert "25.0% lower" in caplog.messages[0]


@pytest.mark.parametrize(
    ("gain", "spread", "count", "is_clear"),
    [
        (0.05, 0.05, 64, True),  # 5 % at 0.6 % standard error
        (0.05, 0.20, 64, False),  # at 2.5 %
        (0.005, 0.001, 64, False),  # beyond doubt, and nothing that could be seen
        (-0.05, 0.01, 64, False),  # the wrong hint is the better one
        (0.05, 0.001, 7, False),
        (0.05, 0.001, 8, True),
    ],
)
def test_clear_is_both_large_and_beyond_chance(
    gain: float, spread: float, count: int, is_clear: bool
) -> None:
    # Samples differ far more from each other than a hint changes any of them: only pairs show it.
    hard = torch.linspace(0.2, 1.8, count, dtype=torch.float64)
    steps = torch.linspace(-1, 1, count, dtype=torch.float64)
    difference = gain + spread * steps / steps.std()
    shuffled = hard.expand(4, -1)
    found = summary(shuffled - difference, shuffled)
    assert found["is_clear"] is is_clear
    assert found["adherence"] == pytest.approx(gain)
    assert found["adherence_error"] == pytest.approx(spread / count**0.5)


class Painter(NoiseSchedule, pl.LightningModule):
    """The smallest model with hints: of v = sqrt(abar) eps - sqrt(1 - abar) x_0 it predicts the second part.

    Its latent is the image, and its guess of the image is weight * (hint - 1/2).
    """

    parameterization = "v"
    lend_stages = staticmethod(nullcontext)
    average, is_compiled = None, False

    def __init__(self) -> None:
        super().__init__()
        self.register_schedule(make_betas("linear", 0.00085, 0.0120, T))
        self.weight = nn.Parameter(torch.zeros(()))

    def encode_first_stage(self, image: Tensor) -> Any:
        return SimpleNamespace(mode=lambda: image)

    def get_first_stage_encoding(self, posterior: Tensor) -> Tensor:
        return posterior

    def get_learned_conditioning(self, texts: list[str]) -> Tensor:
        return torch.zeros(len(texts), 77, 1)

    def apply_model(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        return -at(self.sqrt_one_minus_alphas_cumprod, t, x) * self.weight * (cond["c_concat"][0] - 0.5)

    def training_step(self, batch: dict[str, Any], i: int) -> Tensor:
        x, hint = (batch[name].permute(0, 3, 1, 2) for name in ("jpg", "hint"))
        t, noise = torch.randint(T, (len(x),)), torch.randn_like(x)
        prediction = self.apply_model(self.q_sample(x, t, noise), t, {"c_concat": [hint]})
        return (prediction - self.get_v(x, noise, t)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_it_fires_when_hints_tell_something_and_is_silent_when_they_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_shuffled: bool
) -> None:
    pl.seed_everything(0, verbose=False)
    samples = samples_of(272, (8, 8))
    for sample in samples:
        sample["hint"] = sample["jpg"] / 2 + 0.5
    held_out, seen = samples[:16], samples[16:]
    if is_shuffled:
        hints = [sample["hint"] for sample in seen]
        seen = [{**sample, "hint": hints[i - 1]} for i, sample in enumerate(seen)]
    trainer = run_of([Validation(2, held_out)], tmp_path, max_steps=12)
    with caplog.at_level(logging.INFO, logger="cldm.validation"):
        trainer.fit(Painter(), DataLoader(seen, batch_size=16, shuffle=True))
    found = lines(tmp_path / "validation.jsonl")
    assert [line["step"] for line in found] == [0, 2, 4, 6, 8, 10, 12]
    assert found[0]["adherence"] == 0
    said = [record for record in caplog.records if record.name == "cldm.validation"]
    assert len(said) == (0 if is_shuffled else 1)
    assert (found[-1]["follows_since"] is None) is is_shuffled
    assert (found[-1]["adherence"] > 0.3) is not is_shuffled


# -- beside a training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cityscapes with four frames to train on and five to validate on, 64x128."""
    root, rng = tmp_path_factory.mktemp("cityscapes"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 5)):
        for i in range(count):
            for folder, kind, high in (
                ("leftImg8bit", "leftImg8bit", 256),
                ("gtFine", "gtFine_labelIds", 34),
            ):
                shape = (64, 128, 3) if folder == "leftImg8bit" else (64, 128)
                path = root / folder / split / "ulm" / f"ulm_{i:06d}_000019_{kind}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, high, shape, np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def words(
    tmp_path_factory: pytest.TempPathFactory, tree: Path, tiny_model_once: ControlLDM, tiny_yaml: Path
) -> list[str]:
    """Return the command line of a run of four steps."""
    start = tmp_path_factory.mktemp("start") / "start.safetensors"
    write_tensors(start, tiny_model_once.state_dict())
    return [
        *("--config", str(tiny_yaml), "--resume_path", str(start), f"data.root={tree}", "data.size=[64,128]"),
        *("data.prompt=a", "data.num_workers=0", "data.check=false", "train.grid_images=0", "sample.steps=1"),
        *("--batch_size", "2", "--max_steps", "4", "train.lr=1e-3"),
    ]


def train(folder: Path, words: list[str], *more: str) -> Path:
    tutorial_train.main([*words, *more, "--default_root_dir", str(folder)])
    return folder / "lightning_logs/version_0"


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    return train(tmp_path_factory.mktemp("on"), words, "train.val_freq=3", "train.val_samples=4")


def test_training_is_bit_by_bit_what_it_is_without(validated: Path, words: list[str], tmp_path: Path) -> None:
    without = train(tmp_path, words, "train.val_freq=0")
    assert not (without / "validation.jsonl").exists()
    ours, theirs = (load_file(run / "checkpoints/step=000004.safetensors") for run in (validated, without))
    assert len(ours) > 100
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_it_measures_at_0_at_multiples_and_at_the_end_and_tells_the_logger(validated: Path) -> None:
    found = lines(validated / "validation.jsonl")
    assert [line["step"] for line in found] == [0, 3, 4]
    assert [line["samples"] for line in found] == [4, 4, 4]
    assert len({line["loss_simple"] for line in found}) == 3, "the model changes and nothing else"
    events = EventAccumulator(str(validated)).Reload()
    for name in ("loss_simple", "loss_shuffled_hint", "adherence"):
        logged = [(event.step, event.value) for event in events.Scalars(f"val/{name}")]
        assert logged == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in found]


def test_samples_come_from_all_over_the_validation_split_and_the_grid_shows_the_first(
    tree: Path, words: list[str]
) -> None:
    config = tutorial_train.resolve(tutorial_train.parse_args([*words, "train.val_samples=3"]))
    dataset = tutorial_train.create_dataset("cityscapes", **tutorial_train.dataset_options(config))
    five = sorted((tree / "leftImg8bit/val/ulm").iterdir())
    expected = [np.asarray(Image.open(five[i])) / 127.5 - 1 for i in (0, 2, 4)]  # 0, .236 and .472 of golden
    found = tutorial_train.grid_samples(config, dataset)
    assert [np.abs(sample["jpg"] - photo).max() < 1e-6 for sample, photo in zip(found, expected, strict=True)]
    config.train.grid_images, config.train.val_freq = 2, 0
    assert len(tutorial_train.grid_samples(config, dataset)) == 2


@pytest.mark.parametrize(
    ("every", "photos", "said"),
    [
        (0, 4, None),
        (5, 4, "no validation in 4 steps: train.val_freq is 5"),
        (1, 1, "2 or more frames with photos for it, found 1"),
    ],
)
def test_a_run_without_validation_says_why(
    words: list[str], caplog: pytest.LogCaptureFixture, every: int, photos: int, said: str | None
) -> None:
    config = tutorial_train.resolve(tutorial_train.parse_args([*words, f"train.val_freq={every}"]))
    samples = [{"hint": 0, "txt": "a"}] * 3 + [{"jpg": 0, "hint": 0, "txt": "a"}] * photos
    with caplog.at_level(logging.INFO, logger="cldm.trainer"):
        assert parts.build_validation(config, samples) == []
    assert [said in message for message in caplog.messages] == ([True] if said else [])


@pytest.mark.parametrize(("override", "limit"), [("train.val_freq=-1", "0"), ("train.val_samples=1", "2")])
def test_numbers_that_make_no_sense_are_refused(words: list[str], override: str, limit: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=f"{key} of {limit} or more"):
        tutorial_train.resolve(tutorial_train.parse_args([*words, override]))
    with pytest.raises(ValueError, match="2 or more samples"):
        Validation(1, samples_of(1))
    with pytest.raises(ValueError, match="1 or more optimizer steps"):
        Validation(0, samples_of(2))


def test_the_mode_of_training_comes_back_whatever_happens(
    tiny_model: ControlLDM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation, trainer = Validation(1, samples_of(2)), run_of([], tmp_path)
    validation.setup(trainer, tiny_model, "fit")
    modes: list[tuple[bool, bool]] = []

    def failing(model: ControlLDM) -> None:
        modes.append((model.training, torch.is_grad_enabled()))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(validation, "losses", failing)
    tiny_model.train()
    with pytest.raises(RuntimeError, match="out of memory"):
        validation.on_train_start(trainer, tiny_model)
    assert modes == [(False, False)]
    assert (tiny_model.training, tiny_model.first_stage_model.training) == (True, False)


# -- the training loss ------------------------------------------------------------------------------------


class Counting(pl.LightningModule):
    """Logs 1, 2, 3, ... batch after batch; what it trains by is another matter, as with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Tensor, i: int) -> Tensor:
        self.log("train/loss_simple", i + 1.0)
        return self.weight * 0 + 1000.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("accumulate", "means"), [(1, [1.5, 3.5]), (3, [3.5, 9.5])])
def test_the_curve_is_the_undivided_loss_of_all_batches_in_between(
    tmp_path: Path, accumulate: int, means: list[float]
) -> None:
    trainer = run_of([LossCurve(every=2)], tmp_path, max_steps=5, accumulate_grad_batches=accumulate)
    trainer.fit(Counting(), DataLoader(torch.zeros(20, 1)))
    found = lines(tmp_path / "training.jsonl")
    assert found == [{"step": 2, "loss_simple": means[0]}, {"step": 4, "loss_simple": means[1]}]


@pytest.mark.soak
@pytest.mark.parametrize("is_shuffled", [False, True])
def test_the_signal_fires_on_streets_and_not_where_maps_belong_to_other_photos(
    tmp_path: Path, is_shuffled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    make_tree(tmp_path / "streets", Plan("camera", size=(128, 256), train=200, val=32), workers=1)
    if is_shuffled:
        maps = sorted((tmp_path / "streets/gtFine/train").rglob("*_labelIds.png"))
        contents = [path.read_bytes() for path in maps]
        for path, content in zip(maps, contents[1:] + contents[:1], strict=True):
            path.write_bytes(content)
    start = tmp_path / "start.safetensors"
    tool_add_control.main(["models/streets_base.safetensors", str(start)])
    words = ["--dataset", "streets", "--resume_path", str(start), f"data.root={tmp_path / 'streets'}"]
    words += ["train.keep_latents=false", f"data.cache={tmp_path / 'cache'}", "data.num_workers=0"]
    words += ["--max_steps", "300", "train.val_freq=50", "train.grid_images=0", "train.val_samples=32"]
    if is_shuffled:
        with pytest.raises(SystemExit):
            tutorial_train.main([*words, "--default_root_dir", str(tmp_path)])
        words.append("data.check=false")
    with caplog.at_level("INFO"):
        folder = train(tmp_path, words)
    said = [record for record in caplog.records if "the model follows its hints" in record.getMessage()]
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert len(said) == (0 if is_shuffled else 1), [line["adherence"] for line in lines]
