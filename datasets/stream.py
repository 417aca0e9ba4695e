"""The order of training: sample number n of a run is the same on any machine, worker, rank and resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from multiprocessing import Value
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

BUDGET = 10  # samples of a run that may be skipped because their files are damaged


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

    A frame whose files do not decode is named and another one stands in for it; after `budget` of them
    training stops.
    """

    def __init__(self, frames: Frames, seed: int, length: int, budget: int = BUDGET) -> None:
        """`length` is the number of samples that the run takes, over all of its passes and ranks."""
        self.frames, self.seed, self.length, self.budget = frames, seed, length, budget
        self.skipped = Value("i", 0)  # shared by the loader's processes

    def __len__(self) -> int:
        """Number of samples of the run."""
        return self.length

    def __getitem__(self, number: int) -> Mapping[str, object]:
        """Sample `number` of the run."""
        if not 0 <= number < self.length:
            raise IndexError(f"expected a sample number in 0..{self.length - 1}, found {number}")
        turn, place = divmod(number, len(self.frames))
        order = order_of(len(self.frames), self.seed, turn)
        for step in range(len(self.frames)):
            try:
                return self.frames.sample(
                    int(order[(place + step) % len(order)]), np.random.default_rng([self.seed, 1, number])
                )
            except (ValueError, OSError) as error:
                self.count(error)
        raise ValueError("expected at least one frame that can be read, found none")

    def count(self, error: Exception) -> None:
        """Name a skipped frame; raise when there are too many."""
        with self.skipped.get_lock():
            self.skipped.value += 1
            skipped = self.skipped.value
        if skipped > self.budget:
            raise ValueError(
                f"expected at most {self.budget} samples that cannot be read, found {skipped}; the last:"
                f" {error}"
            ) from error
        log.warning("skipped (%d of at most %d): %s", skipped, self.budget, error)


@lru_cache(maxsize=2)  # two passes meet in a batch
def order_of(count: int, seed: int, turn: int) -> NDArray[np.int64]:
    """Indices of one pass over all frames."""
    return np.random.default_rng([seed, 0, turn]).permutation(count)
