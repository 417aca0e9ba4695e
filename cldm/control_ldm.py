"""The training module of the project, which model files know as `cldm.cldm.ControlLDM`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cldm.cldm import ControlledModel
from ldm.models.diffusion.ddpm import Batch, LatentDiffusion
from ldm.models.diffusion.latent import Cond, channels_first


class ControlLDM(ControlledModel, LatentDiffusion):
    """A controlled model as Lightning trains it; in a batch, hints have the key `control_key`."""

    def __init__(self, *, control_key: str = "hint", **controlled_model: Any) -> None:
        super().__init__(**controlled_model)
        self.control_key = control_key

    def get_input(self, batch: Batch, k: str, bs: int | None = None) -> tuple[Tensor, Cond]:
        """Latent and condition; the hint (B, H, W, C) in [0, 1] has the key `control_key`."""
        z, cond = super().get_input(batch, k, bs)
        hint = channels_first(batch[self.control_key][:bs], self.device)
        return z, {**cond, "c_concat": [hint]}
