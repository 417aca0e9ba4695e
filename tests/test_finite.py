"""A loss that is not a number: the step is skipped, the samples are named, and too many of them end a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cldm.averaging import AverageWeights, WeightAverage
from cldm.finite import FiniteLoss
from ldm.models.optimizer import AdamWInBackward


class Line(pl.LightningModule):
    """Fits a slope; remembers it behind each optimizer step."""

    def __init__(self, kind: str = "fused") -> None:
        super().__init__()
        self.kind = kind
        self.slope = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.seen: list[float] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return ((self.slope * batch["x"] - batch["y"]) ** 2).mean()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.append(self.slope.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "in backward":
            return AdamWInBackward([self.slope], 0.1, weight_decay=0)
        return torch.optim.AdamW([self.slope], lr=0.1, weight_decay=0, fused=self.kind == "fused")


def rows(*bad: int, count: int = 12) -> list[dict[str, Any]]:
    return [
        {"x": torch.ones(1), "y": torch.full((1,), float("nan") if i in bad else 2.0), "key": f"frame {i}"}
        for i in range(count)
    ]


def fit(model: Line, data: list[dict[str, Any]], *callbacks: pl.Callback, **options: Any) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, callbacks=list(callbacks), **options,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=2))


@pytest.mark.parametrize("kind", ["fused", "in backward", "neither"])
def test_a_step_is_skipped_and_its_samples_named(caplog: pytest.LogCaptureFixture, kind: str) -> None:
    model, whole = Line(kind), Line(kind)
    with caplog.at_level("WARNING"):
        fit(model, rows(5), FiniteLoss(limit=3))
    fit(whole, rows(count=10))
    skipped = [
        step for step, (a, b) in enumerate(zip([0.0, *model.seen], model.seen, strict=False)) if a == b
    ]
    assert skipped == [2]
    assert model.seen[:2] + model.seen[3:] == whole.seen, "moments and counters know nothing of the step"
    (said,) = [record.getMessage() for record in caplog.records if record.name == "cldm.finite"]
    assert "skipped optimizer step 3 (1 of at most 3)" in said
    assert said.endswith("frame 4, frame 5")


def test_one_bad_batch_costs_the_whole_step_of_an_accumulation(caplog: pytest.LogCaptureFixture) -> None:
    model = Line()
    with caplog.at_level("WARNING"):
        fit(model, rows(0), FiniteLoss(limit=3), accumulate_grad_batches=2)
    assert model.seen[1] == 0
    assert model.seen[3] > 0
    assert "with the samples frame 0, frame 1" in caplog.text
    assert "frame 2" not in caplog.text


def test_too_many_end_the_run() -> None:
    with pytest.raises(FloatingPointError, match="at most 2 steps with a loss that is not finite, found 3"):
        fit(Line(), rows(0, 2, 4, count=40), FiniteLoss(limit=2, every=4))


def test_what_was_skipped_is_counted_over_a_resume() -> None:
    first, second = FiniteLoss(limit=3), FiniteLoss(limit=3)
    fit(Line(), rows(0, 7), first)
    second.load_state_dict(first.state_dict())
    assert second.skipped == 2


def test_an_average_is_of_what_is_trained_and_goes_on() -> None:
    model, averages = Line(), AverageWeights(0.6)
    fit(model, rows(), averages)
    expected = 0.0
    for step, slope in enumerate(model.seen, start=1):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * slope
    assert isinstance(averages.average, WeightAverage)
    assert averages.average.tensors.keys() == {"slope"}
    assert averages.average.tensors["slope"].item() == pytest.approx(expected, rel=1e-5)
    again = AverageWeights(0.6)
    again.load_state_dict(averages.state_dict())
    other = Line()
    fit(other, rows(count=2), again)
    decay = 2 / 11
    assert again.average is not None
    assert again.average.tensors["slope"].item() == pytest.approx(
        decay * expected + (1 - decay) * other.seen[0], rel=1e-5
    )


def test_saved_weights_are_those_of_the_average(tmp_path: Path) -> None:
    from cldm.saver import ControlCheckpoint
    from cldm.tensor_files import read_tensors

    model = Line()
    model.average = WeightAverage(model, 0.5)
    model.average.tensors["slope"].fill_(7)
    saver = ControlCheckpoint(1, None)
    saver.tensors = lambda model: {"slope": model.slope.detach()}
    saver.write(tmp_path / "x.safetensors", model, 1)
    assert read_tensors(tmp_path / "x.safetensors")["slope"].item() == 7
    assert model.slope.item() == 0
