"""The noise priors that a page offers: starts for the map that is painted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from datasets.label_space import LabelSpace, Size
from webui.condition import Hint
from webui.orders import Order

if TYPE_CHECKING:
    from cldm.cldm import ControlledModel
    from cldm.generate import Start
    from cldm.prior_file import Prior

KEPT = 4  # sizes


class Starts:
    """Draws from a prior's file, for maps of a label space at any size.

    path  of a file that noise_prior.py wrote
    """

    def __init__(self, path: Path, space: LabelSpace) -> None:
        self.path, self.space = path, space
        self.checked: ControlledModel | None = None
        self.at = lru_cache(maxsize=KEPT)(self._open)

    def _open(self, size: Size) -> Prior:
        from cldm.prior_start import open_prior

        return open_prior(self.path, size, self.space.names, resample=True)

    def draw(self, model: ControlledModel, hint: Hint, order: Order, seeds: Sequence[int]) -> Start:
        """Latents for each seed at the first timestep of the order, and the timesteps from there on.

        Raises
            ValueError  a hint without labels, or a prior of another model; one sentence
        """
        import torch

        from cldm.generate import Start
        from cldm.prior_sampling import make_prior, timesteps_of
        from cldm.prior_start import check_first_stage

        if hint.labels is None:
            raise ValueError(f"{hint.name}: a noise prior expects a label map, found a picture; choose none")
        size = (hint.labels.shape[0], hint.labels.shape[1])
        card, moments = self.at(size)
        if self.checked is not model:
            check_first_stage(card, str(self.path), model)
            self.checked = model
        prior = make_prior(model, moments, size, self.space.num_classes, kind=order.prior)
        timesteps = timesteps_of(order.sample, order.start, None, model.num_timesteps)
        labels = torch.from_numpy(hint.labels)[None].expand(len(seeds), -1, -1)
        abar = float(model.alphas_cumprod.double()[timesteps[0]])
        return Start(prior.draw(labels, abar, seeds), timesteps)
