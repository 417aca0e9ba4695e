"""Learning rates as functions of the optimizer step, so that a run can go on from the number alone."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine", "one_cycle")
COSINE_END = 0.01  # of the peak
# Smith and Topin 2018, arXiv:1708.07120, with the numbers of torch's OneCycleLR.
CYCLE_START, CYCLE_RISE, CYCLE_END = 1 / 25, 0.3, 1 / 25e4


def rate_factor(step: int, *, schedule: str, warmup: int, steps: int) -> float:
    """The part of the peak rate that optimizer step `step`, counted from 0, is done with.

    Linear up over `warmup` steps; then constant, or half a cosine down to a hundredth at `steps`. "one_cycle"
    rises from a 25th along a cosine over its first 30 %, or over `warmup` steps, and falls to nearly nothing.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    if schedule == "one_cycle":
        top = warmup or CYCLE_RISE * steps - 1
        if step <= top:
            return cosine(CYCLE_START, 1, step / top if top > 0 else 1)
        return cosine(1, CYCLE_END, min(1.0, (step - top) / max(1, steps - 1 - top)))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return cosine(1, COSINE_END, min(1.0, (step - warmup) / max(1, steps - warmup)))


def cosine(start: float, end: float, done: float) -> float:
    """From `start` to `end` along half a cosine, at the share `done` of the way."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
