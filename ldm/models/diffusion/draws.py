"""What is random about a training sample: a function of the run's seed and the number of the sample.

So a run that goes on after an interruption, or on more processes, trains on the same noise as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

POSTERIOR, NOISE, LEVEL, OFFSET = 2, 3, 4, 5  # the streams of a sample; 0 and 1 are those of datasets.stream


class Draws:
    """The draws of a batch. Without numbers they are those of the process.

    Noise of numbered samples is drawn on the CPU, so that it is the same for every device.

    numbers  of the samples in the run
    """

    def __init__(self, seed: int, numbers: Sequence[int] | None, device: torch.device) -> None:
        self.seed, self.numbers, self.device = seed, numbers, device

    def normal(self, stream: int, shape: torch.Size) -> Tensor:
        """Standard normal (B, ...) of a stream."""
        if self.numbers is None:
            return torch.randn(shape, device=self.device)
        rows = [torch.randn(shape[1:], generator=self.generator(stream, n)) for n in self.numbers]
        return torch.stack(rows).to(self.device, non_blocking=True)

    def levels(self, batch: int, total: int) -> Tensor:
        """(B,) noise levels, uniform over 0..total - 1."""
        if self.numbers is None:
            return torch.randint(total, (batch,), device=self.device)
        rows = [torch.randint(total, (), generator=self.generator(LEVEL, n)) for n in self.numbers]
        return torch.stack(rows).to(self.device, non_blocking=True)

    def generator(self, stream: int, number: int) -> torch.Generator:
        """The generator of one sample and stream."""
        state = np.random.SeedSequence([self.seed, stream, number]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> 1))
