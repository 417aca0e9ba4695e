"""Settings for a GPU of a given memory. They change what a step costs, not what it computes.

The memory that each is named after is an estimate for SD1.5 at 512x512 with `data.cache`, from the sizes of
what is held; none has been measured on a GPU yet. Held whatever the batch: the control branch with gradients
and moments in float32, 5.8 GB; its rounded copy for autocast, 0.7 GB; the frozen UNet in bf16, 1.7 GB. Each
sample adds about 3.5 GB of activations, or 0.8 GB where they are computed again. Where weights are updated
in backward, the gradients, 1.4 GB, are never there together; a step is then one batch.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from omegaconf import DictConfig

log = logging.getLogger(__name__)


class Preset(NamedTuple):
    """What fits."""

    gigabytes: int
    batch_size: int  # at most, on one device
    activation_checkpointing: bool
    update_in_backward: bool = False


PRESETS = {
    "8gb": Preset(8, 1, activation_checkpointing=True, update_in_backward=True),
    "12gb": Preset(12, 1, activation_checkpointing=True),
    "16gb": Preset(16, 4, activation_checkpointing=True),
    "24gb": Preset(24, 8, activation_checkpointing=True),
    "40gb": Preset(40, 16, activation_checkpointing=True),
    "80gb": Preset(80, 16, activation_checkpointing=False),
}


def preset_overrides(name: str, config: DictConfig) -> list[str]:
    """`key=value` lines of a preset for a run; an optimizer step takes as many samples, or a few more.

    Where gradients are not kept a step takes one batch, and is not clipped; what that changes is logged.

    Raises
        ValueError  an unknown preset
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    preset, train = PRESETS[name], config.train
    samples = train.batch_size * train.accumulate
    batch = min(preset.batch_size, samples)
    accumulate = -(-samples // batch)
    lines = []
    if preset.update_in_backward:
        if accumulate > 1 or train.clip:
            log.warning(
                "preset %s keeps no gradients: a step takes %d of %d samples, unclipped; lower train.lr",
                *(name, batch, samples),
            )
        accumulate, lines = 1, ["train.clip=null", "train.update_in_backward=true"]
    return [
        *lines,
        f"train.batch_size={batch}",
        f"train.accumulate={accumulate}",
        "train.frozen_precision=bf16",
        f"train.activation_checkpointing={str(preset.activation_checkpointing).lower()}",
    ]


def cost(how: Any) -> tuple[int, bool, bool]:
    """Order of memory: the batch, then whether activations are kept, then whether gradients are."""
    return how.batch_size, not how.activation_checkpointing, not how.update_in_backward


def advice(config: DictConfig, free: float | None = None) -> str:
    """What to try when the memory of a GPU is not enough.

    free  gigabytes of the GPU; None where they are not known
    """
    smaller = [
        name
        for name, preset in PRESETS.items()
        if cost(preset) < cost(config.train) and (free is None or preset.gigabytes <= free + 1)
    ]
    cache = "" if config.data.cache else " and data.cache=FOLDER"
    if not smaller:
        return f"out of memory at train.batch_size={config.train.batch_size}; try a smaller data.size{cache}"
    return f"out of memory at train.batch_size={config.train.batch_size}; try --preset {smaller[-1]}{cache}"
