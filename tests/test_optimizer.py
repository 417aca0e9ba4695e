"""AdamW inside backward: the steps of torch's, bit by bit, without gradients that stay."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cldm.cldm import ControlLDM
from cldm.finite import FiniteLoss
from ldm.models.optimizer import AdamWInBackward, pays_in_backward


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))


def loss_of(module: nn.Module, step: int) -> Tensor:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
    return module(x).square().mean()


def test_its_steps_are_those_of_torch_also_after_its_state_was_loaded() -> None:
    ours, theirs = network(), network()
    inside = AdamWInBackward(ours.parameters(), 0.01)
    plain = torch.optim.AdamW(theirs.parameters(), 0.01, fused=True)
    for step in range(6):
        if step == 3:
            inside.release()
            again = AdamWInBackward(ours.parameters(), 0.5)
            again.load_state_dict(inside.state_dict())
            inside = again
        for group in (*inside.param_groups, *plain.param_groups):
            group["lr"] = 0.01 / (1 + step)
        inside.step(lambda step=step: loss_of(ours, step).backward())
        plain.zero_grad()
        loss_of(theirs, step).backward()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in ours.parameters())
    found, expected = inside.state_dict(), plain.state_dict()
    assert found["state"].keys() == expected["state"].keys()
    for key, state in expected["state"].items():
        assert all(torch.equal(found["state"][key][name], value) for name, value in state.items())


def test_no_two_gradients_are_there_at_once() -> None:
    module = network()
    inside, most = AdamWInBackward(module.parameters(), 0.01), [0]

    def count(_: Any) -> None:
        most.append(sum(parameter.grad is not None for parameter in module.parameters()))

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    inside.step(lambda: loss_of(module, 0).backward())
    assert max(most) == 0


def test_it_ends_where_it_is_released() -> None:
    module = network()
    AdamWInBackward(module.parameters(), 0.01).release()
    before = [parameter.clone() for parameter in module.parameters()]
    loss_of(module, 0).backward()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    assert all(parameter.grad is not None for parameter in module.parameters())


def fit(model: ControlLDM, batch: dict[str, Any], in_backward: bool, **options: Any) -> ControlLDM:
    model.update_in_backward = in_backward
    model.learning_rate = 1e-3
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=3, logger=False, callbacks=[FiniteLoss(limit=5)], **options,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    torch.manual_seed(0)
    rows = [{k: v[i] for k, v in batch.items()} | {"number": i, "key": str(i)} for i in (0, 1)]
    trainer.fit(model, DataLoader(rows * 6, batch_size=2))
    return model


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_training_is_the_same_bit_by_bit(
    tiny_model: ControlLDM, tiny_batch: dict[str, Any], precision: str
) -> None:
    start = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    found = {}
    for in_backward in (True, False):
        tiny_model.load_state_dict(start)
        fit(tiny_model, tiny_batch, in_backward, precision=precision)
        found[in_backward] = [p.detach().clone() for p in tiny_model.trainable_parameters()]
        for parameter in tiny_model.trainable_parameters():
            assert (parameter.grad is None) is in_backward
            parameter.grad = None
    assert all(torch.equal(a, b) for a, b in zip(found[True], found[False], strict=True))
    assert not all(torch.equal(a, start[n]) for n, a in tiny_model.named_parameters() if a.requires_grad)


@pytest.mark.parametrize("options", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_it_is_left_alone_where_gradients_have_to_meet(
    tiny_model: ControlLDM, tiny_batch: dict[str, Any], options: dict[str, Any]
) -> None:
    fit(tiny_model, tiny_batch, True, **options)
    assert all(parameter.grad is not None for parameter in tiny_model.trainable_parameters())


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    module = network()
    inside = AdamWInBackward(module.parameters(), 0.01)
    before = [parameter.clone() for parameter in module.parameters()]
    inside.found_inf = torch.ones(())
    inside.step(lambda: (loss_of(module, 0) * float("nan")).backward())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), before, strict=True))
    inside.found_inf = torch.zeros(())
    inside.step(lambda: loss_of(module, 0).backward())
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert {int(state["step"]) for state in inside.state.values()} == {1}


@pytest.mark.parametrize(("device", "pays"), [("cpu", True), ("cuda", False)])
def test_it_is_the_default_for_large_models_on_a_cpu_alone(device: str, pays: bool) -> None:
    small, large = (nn.Linear(10_000, width, device="meta").parameters() for width in (10, 10_000))
    assert not pays_in_backward(small, torch.device(device))
    assert pays_in_backward(large, torch.device(device)) == pays
