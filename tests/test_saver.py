"""What stays of a run on disk: the best weights, the last ones, and nothing that is not a number."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cldm.cldm import ControlLDM
from cldm.run_state import FOLDER, SUFFIX
from cldm.saver import ControlCheckpoint, step_of
from cldm.tensor_files import read_metadata, read_tensors


def visit(saver: ControlCheckpoint, model: Any, losses: dict[int, float]) -> Path:
    """Behind each optimizer step of `losses`, as a validation callback before it would have found them."""
    for step, loss in losses.items():
        model.validation_loss = step, loss
        saver.keep_best(SimpleNamespace(global_step=step, is_global_zero=True), model)
    return saver.folder / "checkpoints/best.safetensors"


@pytest.fixture
def saver(tmp_path: Path) -> ControlCheckpoint:
    saver = ControlCheckpoint(1, None)
    saver.folder = tmp_path
    return saver


def test_the_best_weights_are_those_of_the_lowest_loss(
    saver: ControlCheckpoint, tiny_model: ControlLDM
) -> None:
    nan = float("nan")
    path = visit(saver, tiny_model, {1: nan, 2: 0.5, 3: 0.7, 4: 0.3, 5: nan, 6: 0.4})
    assert read_metadata(path)["step"] == "4"
    assert read_metadata(path)["val_loss"] == "0.3"
    other = ControlCheckpoint(1, None)
    other.folder = saver.folder
    other.load_state_dict(saver.state_dict())
    visit(other, tiny_model, {7: 0.31})
    assert read_metadata(path)["step"] == "4"


def test_a_loss_of_another_step_is_not_that_of_these_weights(
    saver: ControlCheckpoint, tiny_model: ControlLDM
) -> None:
    tiny_model.validation_loss = 3, 0.1
    saver.keep_best(SimpleNamespace(global_step=4, is_global_zero=True), tiny_model)
    assert not (saver.folder / "checkpoints").exists()


@pytest.mark.parametrize("keep_last", [None, 1, 3])
def test_old_files_go_and_the_best_one_stays(tmp_path: Path, keep_last: int | None) -> None:
    saver = ControlCheckpoint(1, None, keep_last=keep_last)
    saver.folder = tmp_path
    for folder, suffix in (("checkpoints", ".safetensors"), (FOLDER, SUFFIX)):
        (tmp_path / folder).mkdir()
        for step in (9, 10, 100, 1_000_000, 99):
            (tmp_path / folder / f"step={step:06d}{suffix}").touch()
    (tmp_path / "checkpoints/best.safetensors").touch()
    saver.prune()
    kept = sorted(step_of(path) for path in (tmp_path / "checkpoints").glob("step=*"))
    assert kept == [9, 10, 99, 100, 1_000_000][-(keep_last or 5) :]
    assert (tmp_path / "checkpoints/best.safetensors").exists()
    assert sorted(step_of(path) for path in (tmp_path / FOLDER).iterdir()) == [100, 1_000_000]


@pytest.mark.parametrize(("precision", "dtype"), [("32", torch.float32), ("16", torch.float16)])
@pytest.mark.parametrize("full", [False, True])
def test_files_hold_what_was_trained_or_everything(
    tmp_path: Path, tiny_model: ControlLDM, precision: str, dtype: torch.dtype, full: bool
) -> None:
    base = tmp_path / "base.safetensors"
    base.write_bytes(b"x" * 100)
    saver = ControlCheckpoint(1, base, {"logvar"}, precision=precision, full=full)
    saver.folder = tmp_path
    path = tmp_path / "checkpoints/step=000001.safetensors"
    saver.write(path, tiny_model, 1)
    found = read_tensors(path)
    assert found["control_model.zero_convs.0.0.weight"].dtype == dtype
    assert found["control_model.zero_convs.0.0.weight"].equal(
        tiny_model.control_model.zero_convs[0][0].weight.to(dtype)
    )
    frozen = [name for name in found if name.startswith("first_stage_model.")]
    assert bool(frozen) == full
    assert ("base_fingerprint" in read_metadata(path)) != full
    if full:
        assert found["alphas_cumprod"].dtype == torch.float32


def test_weights_of_a_locked_sd15_run_are_an_eighth_of_the_original_checkpoint() -> None:
    from cldm.model import PRECISIONS, create_model

    with torch.device("meta"):
        model = create_model("models/cldm_v15.yaml")
    count = sum(parameter.numel() for parameter in model.control_model.parameters())
    size = count * torch.empty((), dtype=PRECISIONS["16"]).element_size()
    assert size / 5.71e9 < 0.25  # control_sd15_seg.pth, as published
