"""Noise and noise levels of a training sample depend on seed and number alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cldm.cldm import ControlLDM
from datasets.stream import Stream
from ldm.models.diffusion.draws import LEVEL, NOISE, POSTERIOR, Draws

CPU = torch.device("cpu")
SHAPE = (4, 8, 16)


def test_draws_do_not_depend_on_the_batch() -> None:
    together, apart = Draws(3, [5, 0, 9], CPU), [Draws(3, [n], CPU) for n in (5, 0, 9)]
    for stream in (POSTERIOR, NOISE):
        found = together.normal(stream, torch.Size((3, *SHAPE)))
        expected = torch.cat([draws.normal(stream, torch.Size((1, *SHAPE))) for draws in apart])
        assert torch.equal(found, expected)
    assert together.levels(3, 1000).tolist() == [draws.levels(1, 1000).item() for draws in apart]


def test_streams_numbers_and_seeds_are_independent() -> None:
    shape = torch.Size((1, *SHAPE))
    rows = [
        Draws(seed, [number], CPU).normal(stream, shape).flatten().numpy()
        for seed in (0, 1)
        for number in (0, 1, 2**40)
        for stream in (POSTERIOR, NOISE, LEVEL)
    ]
    correlations = np.corrcoef(np.stack(rows)) - np.eye(len(rows))
    assert np.abs(correlations).max() < 5 / np.prod(SHAPE) ** 0.5


def test_levels_are_uniform_and_noise_is_normal() -> None:
    draws = Draws(0, list(range(20_000)), CPU)
    counts = torch.bincount(draws.levels(20_000, 10), minlength=10)
    chi_square = ((counts - 2000) ** 2 / 2000).sum().item()
    assert chi_square < 27.9  # the 0.1 % point for 9 degrees of freedom
    noise = draws.normal(NOISE, torch.Size((20_000, 2)))
    assert noise.mean().item() == pytest.approx(0, abs=4 / 40_000**0.5)
    assert noise.var().item() == pytest.approx(1, abs=4 * (2 / 40_000) ** 0.5)


def test_a_training_step_is_that_of_its_samples(tiny_model: ControlLDM, tiny_batch: dict[str, Any]) -> None:
    tiny_model.log_dict = lambda *args, **options: None
    both = {**tiny_batch, "number": torch.tensor([7, 8])}
    loss = tiny_model.training_step(both, 0)
    torch.rand(3)  # the generator of the process plays no part
    assert torch.equal(tiny_model.training_step(both, 0), loss)
    single = [
        tiny_model.training_step({name: value[i : i + 1] for name, value in both.items()}, 0) for i in (0, 1)
    ]
    torch.testing.assert_close(sum(single) / 2, loss, rtol=1e-5, atol=1e-6)
    tiny_model.noise_seed = 1
    assert not torch.equal(tiny_model.training_step(both, 0), loss)


def test_a_stream_numbers_its_samples() -> None:
    class Frames:
        def __len__(self) -> int:
            return 3

        def sample(self, index: int, rng: np.random.Generator) -> dict[str, object]:
            return {"key": index}

    stream = Stream(Frames(), seed=0, length=7)
    assert [stream[n]["number"] for n in range(7)] == list(range(7))
