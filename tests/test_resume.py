"""A run that was stopped or killed goes on bit by bit as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from small_runs import write_block_frames

import tutorial_train
from cldm import trainer as parts
from cldm.cldm import ControlLDM
from cldm.run_state import FOLDER, SUFFIX, StateFiles, find_state, pack, unpack
from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.tensor_writing import write_tensors

STEPS = 7
IDS = np.array([7, 26, 23, 0], np.uint8)  # road, car, sky, void


@pytest.fixture(scope="module")
def words(
    tmp_path_factory: pytest.TempPathFactory, tiny_yaml: Path, tiny_model_once: ControlLDM
) -> list[str]:
    """The command line of a run on five small frames, with accumulation and all that is random."""
    root = tmp_path_factory.mktemp("cityscapes")
    write_block_frames(root, train=5, val=2)
    start = root / "start.safetensors"
    write_tensors(start, tiny_model_once.state_dict())
    content = {
        "model": {"config": str(tiny_yaml), "checkpoint": str(start)},
        "data": {"root": str(root), "size": [64, 64], "num_workers": 0, "crop": "random", "flip": 0.5}
        | {"drop_prompt": 0.3, "prompt": "a street with {classes}", "rare_classes": True, "rare_pixels": 10},
        "train": {"batch_size": 2, "accumulate": 2, "lr": 1.0e-3, "max_steps": STEPS, "logger_freq": 3}
        | {"val_freq": 2, "val_samples": 2, "checkpoint_freq": 3, "checkpoint_precision": "32"},
        "sample": {"steps": 1, "scale": 2.0},
    }
    path = root / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return ["--config", str(path)]


class Planted(RuntimeError):
    """What goes wrong in a test."""


class Interrupt(pl.callbacks.Callback):
    """Does something in the middle of an optimizer step: batch `batch`, counted from 0."""

    def __init__(self, batch: int, action: Any) -> None:
        self.batch, self.action = batch, action

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            self.action()


def run(folder: Path, words: list[str], *more: str, interrupt: Interrupt | None = None) -> int:
    """Run the script; return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        if interrupt is not None:
            build = parts.build_callbacks
            patch.setattr(parts, "build_callbacks", lambda *args: [interrupt, *build(*args)])
        try:
            tutorial_train.main([*words, *more, "--default_root_dir", str(folder)])
        except SystemExit as stop:
            return int(stop.code or 0)
        except Planted:
            return 1
    return 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, words) == 0
    return folder


def assert_same(found: Path, expected: Path) -> None:
    """Weights, optimizer, curves and grids of two runs are bit by bit the same."""
    found, expected = (path / "lightning_logs/version_0" for path in (found, expected))
    for name in (f"checkpoints/step={STEPS:06d}.safetensors", f"{FOLDER}/step={STEPS:06d}{SUFFIX}"):
        ours, theirs = (read_tensors(path / name) for path in (found, expected))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    for name in ("training.jsonl", "validation.jsonl"):
        assert timeless(found / name) == timeless(expected / name)
    for grid in (expected / "image_log").iterdir():
        assert (found / "image_log" / grid.name).read_bytes() == grid.read_bytes()


def timeless(path: Path) -> list[dict[str, Any]]:
    rows = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    )
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize(
    "name",
    [
        "SIGTERM",
        pytest.param("SIGINT", marks=pytest.mark.slow),
        pytest.param("SIGUSR1", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_step_and_the_run_goes_on_from_there(
    tmp_path: Path, words: list[str], whole: Path, name: str
) -> None:
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    stop = Interrupt(2 * 4, lambda: os.kill(os.getpid(), number))  # in the first half of step 5
    assert run(tmp_path, words, interrupt=stop) == 128 + number
    assert signal.getsignal(number) == handler or name == "SIGTERM"  # that one is Lightning's own affair
    states = sorted(path.name for path in (tmp_path / "lightning_logs/version_0" / FOLDER).iterdir())
    assert states == [f"step={step:06d}{SUFFIX}" for step in (3, 5)]
    assert run(tmp_path, words, "--resume", "last") == 0
    assert not (tmp_path / "lightning_logs/version_1").exists()
    assert_same(tmp_path, whole)


@pytest.mark.slow
def test_average_schedule_and_cache_go_on_as_well(tmp_path: Path, words: list[str]) -> None:
    more = ["train.ema=0.9", "train.schedule=cosine", "train.warmup=3", "train.offset_noise=0.1"]
    more += ["train.min_snr_gamma=5", f"data.cache={tmp_path / 'cache'}", "data.cache_crops=3"]
    assert run(tmp_path / "whole", words, *more) == 0
    stop = Interrupt(2 * 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(tmp_path / "parts", words, *more, interrupt=stop) == 128 + signal.SIGTERM
    assert run(tmp_path / "parts", words, *more, "--resume", "last") == 0
    assert_same(tmp_path / "parts", tmp_path / "whole")
    log = tmp_path / "parts/lightning_logs/version_0"
    weights = read_tensors(log / f"checkpoints/step={STEPS:06d}.safetensors")
    state = read_tensors(log / FOLDER / f"step={STEPS:06d}{SUFFIX}")
    name = "control_model.zero_convs.0.0.weight"
    assert not torch.equal(weights[name], state[f"state_dict.{name}"])
    assert torch.equal(weights[name], state[f"callbacks.AverageWeights.{name}"])


def test_an_error_in_the_middle_of_a_step_loses_that_step_alone(
    tmp_path: Path, words: list[str], whole: Path
) -> None:
    def fail() -> None:
        raise Planted

    assert run(tmp_path, words, interrupt=Interrupt(2 * 4 + 1, fail)) == 1
    state = find_state("last", tmp_path)
    assert state.name == f"step=000004{SUFFIX}"
    assert run(tmp_path, words, "--resume", str(state), "data.num_workers=2") == 0
    assert_same(tmp_path, whole)


def test_a_damaged_state_is_passed_over(
    tmp_path: Path, words: list[str], whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop = Interrupt(2 * 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(tmp_path, words, interrupt=stop)
    last = find_state("last", tmp_path)
    last.write_bytes(last.read_bytes()[:-100])
    with caplog.at_level("WARNING"):
        assert find_state("last", tmp_path).name == f"step=000003{SUFFIX}"
    assert last.name in caplog.text
    assert run(tmp_path, words, "--resume", "last") == 0
    assert_same(tmp_path, whole)
    for path in last.parent.iterdir():
        path.write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"expected the state of a run.*found 2, none of which can be read"
    ):
        find_state("last", tmp_path)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["train.lr=2e-3"], "train.lr=0.001, not 0.002"),
        (["data.flip=0.25"], "data.flip=0.5, not 0.25"),
        (
            ["--resume", "nowhere.state.safetensors"],
            "expected the state of a run at nowhere.state.safetensors",
        ),
        (["--no-sd_locked"], "train.sd_locked=True, not False"),
    ],
)
def test_another_run_is_not_gone_on_with(
    whole: Path, words: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(whole, words, "--resume", "last", *more) == 2
    assert said in capsys.readouterr().err


def test_other_frozen_weights_are_refused(
    whole: Path, words: list[str], tmp_path: Path, tiny_model: ControlLDM, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        next(tiny_model.first_stage_model.parameters()).add_(1)
    write_tensors(tmp_path / "other.safetensors", tiny_model.state_dict())
    other = ["--resume_path", str(tmp_path / "other.safetensors")]
    assert run(whole, words, "--resume", "last", *other) == 2
    assert "is the state of a run on other frozen weights" in capsys.readouterr().err


def test_what_a_checkpoint_is_made_of_comes_back() -> None:
    value = {
        "a": [torch.arange(3), (1, None, "x"), {2: 0.1, "n": float("nan")}],
        "b": {"c": True, "d": {}, "e": []},
    }
    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(pack(value, (), tensors)))
    assert list(tensors) == ["a.0"]
    found = unpack(tree, tensors)
    assert torch.equal(found["a"][0], value["a"][0])
    assert found["a"][1] == (1, None, "x")
    assert list(found["a"][2]) == [2, "n"]
    assert found["a"][2]["n"] != found["a"][2]["n"]
    assert found["b"] == value["b"]
    with pytest.raises(CheckpointError, match=r"callbacks.0 is PosixPath; expected tensors"):
        pack({"callbacks": [Path()]}, (), {})


def test_a_file_of_weights_is_no_state(whole: Path, tmp_path: Path) -> None:
    weights = whole / f"lightning_logs/version_0/checkpoints/step={STEPS:06d}.safetensors"
    with pytest.raises(
        CheckpointError, match=r"expected the state of a run \(\*.state.safetensors\), found none"
    ):
        StateFiles().load_checkpoint(weights)
    assert "run_config" in read_metadata(weights)
