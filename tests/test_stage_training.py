"""What the trainings of all stages share, against closed forms."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from cldm.stage_training import StageTraining, noise_generator
from cldm.stages import BaseTrainConfig
from ldm.models.learning_rate import rate_factor


def build(**how: float) -> StageTraining:
    network = nn.ModuleDict({"token_embedding": nn.Embedding(5, 3), "layer": nn.Linear(3, 2, bias=False)})
    return StageTraining(network, OmegaConf.structured(BaseTrainConfig(**how)))


def test_the_learning_rate_rises_and_falls() -> None:
    how = {"warmup": 4, "steps": 104}
    rates = [rate_factor(step, schedule="cosine", **how) for step in (0, 1, 3, 4, 54, 104, 200)]
    assert rates == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.01 + 0.99 / 2, 0.01, 0.01])
    rates = [rate_factor(step, schedule="constant", **how) for step in (0, 1, 3, 4, 54, 104, 200)]
    assert rates == pytest.approx([0.25, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0])
    with pytest.raises(
        ValueError, match="unknown schedule 'linear': expected one of constant, cosine, one_cycle"
    ):
        rate_factor(0, schedule="linear", **how)


def test_one_cycle_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=50)
    for step in range(50):
        found = rate_factor(step, schedule="one_cycle", warmup=0, steps=50)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        if step < 49:
            cycle.step()


def test_noise_is_a_function_of_seed_and_step() -> None:
    draws = {
        (seed, step): torch.rand(3, generator=noise_generator(seed, step, torch.device("cpu"))).tolist()
        for seed in (0, 1)
        for step in (0, 1)
    }
    assert len({tuple(draw) for draw in draws.values()}) == 4
    again = torch.rand(3, generator=build(seed=1).noise_of({"step": 1}))
    assert again.tolist() == draws[1, 1]


def test_a_batch_sets_the_rate_of_its_step() -> None:
    training = build(lr=2.0, warmup=4, steps=104)
    optimizer = training.configure_optimizers()
    training.optimizers = lambda use_pl_optimizer: optimizer
    training.on_train_batch_start({"step": torch.tensor(1)}, 0)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]
    training.on_train_batch_start({"step": 54}, 7)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.01)


@pytest.mark.parametrize(("clip", "expected"), [(0.0, 50.0), (0.5, 0.5)])
def test_the_norm_of_the_gradient_is_clipped_unless_told_otherwise(clip: float, expected: float) -> None:
    training = build(clip=clip)
    parameters = list(training.trained.parameters())
    for p, norm in zip(parameters, (30.0, 40.0), strict=True):
        p.grad = torch.full_like(p, norm / p.numel() ** 0.5)
    training.on_before_optimizer_step(training.configure_optimizers())
    total = sum(float(p.grad.square().sum()) for p in parameters) ** 0.5
    assert total == pytest.approx(expected, rel=1e-5)


def test_weights_decay_and_the_vectors_of_words_do_not() -> None:
    training = build(lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in training.trained.named_parameters()}
    optimizer = training.configure_optimizers()
    for p in training.trained.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = dict(training.trained.named_parameters())
    torch.testing.assert_close(after["layer.weight"].detach(), before["layer.weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(after["token_embedding.weight"], before["token_embedding.weight"])
