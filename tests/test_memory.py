"""Images are encoded once where that is asked for, and nothing else changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cldm.cldm import ControlLDM
from ldm.models.diffusion.memory import PosteriorMemory
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


def test_each_image_is_encoded_once_and_its_posterior_returned() -> None:
    seen: list[int] = []

    def encode(images: Tensor) -> DiagonalGaussianDistribution:
        seen.extend(images[:, 0, 0, 0].int().tolist())
        return DiagonalGaussianDistribution(images.mean(dim=(2, 3), keepdim=True).repeat(1, 2, 1, 1))

    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 4, 8, 8)
    memory = PosteriorMemory()
    for batch in ([0, 1, 1], [2, 1, 0], [3, 3, 4], [4, 0, 2]):
        posterior = memory.recall([f"image {i}" for i in batch], images[batch], encode)
        assert posterior.mean[:, 0, 0, 0].tolist() == batch
        assert posterior.logvar[:, 0, 0, 0].tolist() == batch
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_a_training_batch_is_the_same_from_memory(tiny_model: ControlLDM, tiny_batch: dict[str, Any]) -> None:
    batch = {**tiny_batch, "key": ["a", "b"]}
    draws = []
    for memory in (None, PosteriorMemory()):
        tiny_model.memory = memory
        tiny_model.train()
        for _ in range(2):
            torch.manual_seed(0)
            draws.append(tiny_model.get_input(batch, "jpg")[0])
    for z in draws[1:]:
        torch.testing.assert_close(z, draws[0], rtol=1e-5, atol=1e-6)
    tiny_model.first_stage_model.encode = None  # from here on nothing can be encoded
    torch.manual_seed(0)
    torch.testing.assert_close(tiny_model.get_input(batch, "jpg")[0], draws[-1], rtol=0, atol=0)
