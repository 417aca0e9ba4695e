"""Presets of memory: a step takes as many samples as before; what did not fit is answered with the next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tutorial_train
from cldm.presets import PRESETS, advice


def resolve(*words: str) -> tutorial_train.DictConfig:
    return tutorial_train.resolve(tutorial_train.parse_args(["--dataset", "cityscapes", *words]))


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if not preset.update_in_backward])
@pytest.mark.parametrize(("batch", "accumulate"), [(4, 1), (32, 2), (1, 1), (6, 1)])
def test_a_step_takes_as_many_samples(name: str, batch: int, accumulate: int, tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"train: {{batch_size: {batch}, accumulate: {accumulate}}}", encoding="utf-8")
    config = tutorial_train.resolve(tutorial_train.parse_args(["--config", str(recipe), "--preset", name]))
    taken, wanted = config.train.batch_size * config.train.accumulate, batch * accumulate
    assert wanted <= taken < wanted + config.train.batch_size
    assert config.train.batch_size <= PRESETS[name].batch_size
    assert config.train.frozen_precision == "bf16"
    assert config.train.activation_checkpointing == PRESETS[name].activation_checkpointing


def test_without_gradients_a_step_is_one_batch_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    train = resolve("--preset", "8gb", "--batch_size", "1").train
    assert (train.batch_size, train.accumulate, train.clip, train.update_in_backward) == (1, 1, None, True)
    caplog.clear()
    resolve("--preset", "8gb", "train.batch_size=1", "train.accumulate=1")
    (record,) = caplog.records
    batch, accumulate = resolve().train.batch_size, resolve().train.accumulate
    assert f"a step takes 1 of {batch * accumulate} samples, unclipped" in record.getMessage()


def test_what_is_given_by_hand_wins() -> None:
    config = resolve("--preset", "24gb", "--batch_size", "2", "train.activation_checkpointing=false")
    assert (config.train.batch_size, config.train.activation_checkpointing) == (2, False)
    assert config.train.frozen_precision == "bf16"


def test_an_unknown_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tutorial_train.main(["--dataset", "cityscapes", "--preset", "13gb"])
    assert "unknown preset '13gb': expected one of 8gb, 12gb, 16gb" in capsys.readouterr().err


def test_too_little_memory_is_answered_with_what_fits() -> None:
    config = resolve("--batch_size", "16")
    assert "--preset 40gb and data.cache=FOLDER" in advice(config)
    assert "--preset 16gb" in advice(config, free=16)
    assert advice(resolve("--preset", "24gb", "--batch_size", "8", "data.cache=x")).endswith(
        "try --preset 16gb"
    )
    assert "--preset 8gb" in advice(resolve("--preset", "12gb"))
    assert "smaller data.size" in advice(resolve("--preset", "8gb"))


def test_a_run_that_does_not_fit_ends_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError

    trainer = type("Trainer", (), {"fit": fit})()
    with pytest.raises(SystemExit) as exit_info:
        tutorial_train.fit(trainer, None, None, None, resolve("--batch_size", "16"))
    assert exit_info.value.code == 2
    assert "out of memory at train.batch_size=16; try --preset" in capsys.readouterr().err
