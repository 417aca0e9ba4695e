"""What a visitor may ask for, and in which bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from cldm.config import MEASURED_PRIORS, SampleConfig, check_sample

LIMITS: Mapping[str, tuple[float, float]] = {
    "num": (1, 8),
    "seed": (0, 2**32 - 1),  # a browser counts exactly up to 2**53
    "steps": (1, 100),
    "scale": (1, 20),
    "strength": (0, 2),
    "eta": (0, 1),
    "start": (1, 999),
}
MAX_PROMPT = 1000  # characters
EXACT = 2**53  # whole numbers below it are floats, too
WHOLE_RUN = "none"  # the prior of those who want none
PRIORS = (WHOLE_RUN, "normal", *MEASURED_PRIORS)


@dataclass(frozen=True)
class Order:
    """What a visitor asks for."""

    prompt: str
    num: int = 1
    seed: int = 0  # of the first image; the next count up
    sample: SampleConfig = field(default_factory=SampleConfig)
    prior: str = WHOLE_RUN
    start: int = 999  # first timestep of a run that a prior starts

    def check(self) -> None:
        """Refuse numbers outside LIMITS and texts that are too long, each in a sentence."""
        for name, (least, most) in LIMITS.items():
            value = getattr(self if hasattr(self, name) else self.sample, name)
            if not least <= value <= most:  # NaN is not in any range
                raise ValueError(f"expected {name} in {least}..{most}, found {value}")
        for name, text in (("prompt", self.prompt), ("negative prompt", self.sample.negative_prompt)):
            if len(text) > MAX_PROMPT:
                raise ValueError(f"expected a {name} of at most {MAX_PROMPT} characters, found {len(text)}")
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # JSON can say it, UTF-8 cannot
                raise ValueError(f"expected a {name} of whole characters, found half of one")
        if self.prior not in PRIORS:
            raise ValueError(f"unknown prior {self.prior[:50]!r}; choose one of {', '.join(PRIORS)}")
        check_sample(self.sample)

    def settings(self, seed: int) -> dict[str, Any]:
        """What an image of the order carries."""
        prior = {} if self.prior == WHOLE_RUN else {"prior_type": self.prior, "start": self.start}
        return {**asdict(self.sample), **prior, "prompt": self.prompt, "seed": seed}


def order_from(settings: Mapping[str, Any], default: Order) -> Order:
    """The order that an image's settings tell of, one image of it; what they do not say is as in `default`.

    The settings come in a file that anyone may have written.

    Raises
        ValueError  one sentence: a value of another type, or out of bounds
    """
    # As noise_prior_inference.py has it, which lists all timesteps.
    renamed = {"prior": settings.get("prior_type", WHOLE_RUN)}
    if isinstance(steps := settings.get("timesteps"), list) and steps:
        renamed["start"] = steps[0]
    settings = {**settings, **renamed}
    own = [f.name for f in fields(Order) if f.name not in ("sample", "num")]
    sample = {
        f.name: typed(settings[f.name], f.name, getattr(default.sample, f.name))
        for f in fields(SampleConfig)
        if f.name in settings
    }
    known = {name: typed(settings[name], name, getattr(default, name)) for name in own if name in settings}
    order = replace(default, num=1, sample=replace(default.sample, **sample))
    order = replace(order, **known)
    order.check()
    return order


def typed(value: Any, name: str, like: Any) -> Any:
    """A value of the type of `like`; a whole number may stand for a real one."""
    if isinstance(like, float) and type(value) is int and abs(value) < EXACT:
        value = float(value)
    most = EXACT if isinstance(value, int) else math.inf
    if type(value) is not type(like) or (isinstance(value, (int, float)) and not abs(value) < most):
        raise ValueError(f"expected {name} to be like {like!r}, found {str(value)[:50]!r}")
    return value
