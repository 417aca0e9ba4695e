"""The order of training: sample number n of a run is the same on any machine, worker, rank and resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

BUDGET = 10  # different faults in the data that a loader process bears


class Frames(Protocol):
    """A data set whose samples may differ from one time to the next."""

    def __len__(self) -> int:
        """Number of frames."""
        ...

    def sample(self, index: int, rng: np.random.Generator) -> Mapping[str, object]:
        """A sample of one frame, as the generator has it."""
        ...


class Stream:
    """The samples of a run by number: each frame once in every pass, in an order that (seed, pass) gives.

    A frame that cannot be read is named and another one stands in for it; when there are more than `budget`
    different faults training stops.
    """

    def __init__(self, frames: Frames, seed: int, length: int, budget: int = BUDGET) -> None:
        """`length` is the number of samples that the run takes, over all of its passes and ranks."""
        self.frames, self.seed, self.length, self.budget = frames, seed, length, budget
        self.faults: set[str] = set()  # each loader process has its own

    def __len__(self) -> int:
        """Number of samples of the run."""
        return self.length

    def __getitem__(self, number: int) -> Mapping[str, object]:
        """Sample `number` of the run, with its `number`."""
        if not 0 <= number < self.length:
            raise IndexError(f"expected a sample number in 0..{self.length - 1}, found {number}")
        turn, place = divmod(number, len(self.frames))
        order = order_of(len(self.frames), self.seed, turn)
        for attempt in range(len(order) + self.budget + 1):
            index = int(order[(place + attempt) % len(order)])
            rng = np.random.default_rng([self.seed, 1, number, *([attempt] if attempt else [])])
            try:
                return {**self.frames.sample(index, rng), "number": number}
            except (ValueError, OSError) as error:
                self.note(error)
        raise ValueError("expected at least one frame that can be read, found none")

    def note(self, error: Exception) -> None:
        """Name a fault that is new; raise when there are too many."""
        if str(error) in self.faults:
            return
        self.faults.add(str(error))
        if len(self.faults) > self.budget:
            raise ValueError(
                f"expected at most {self.budget} faults in the data, found {len(self.faults)}; the last:"
                f" {error}"
            ) from error
        log.warning("skipped (%d of at most %d faults): %s", len(self.faults), self.budget, error)


@lru_cache(maxsize=2)  # two passes meet in a batch
def order_of(count: int, seed: int, turn: int) -> NDArray[np.int64]:
    """Indices of one pass over all frames."""
    return np.random.default_rng([seed, 0, turn]).permutation(count)
