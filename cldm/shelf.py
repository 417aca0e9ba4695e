"""First stage and text encoder, out of memory while training does not need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ldm.models.diffusion.ddpm import LatentDiffusion

STAGES = ("first_stage_model", "cond_stage_model")


class Shelved(nn.Module):
    """Stands where a stage was."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any) -> None:
        """Refuse to stand in for the stage."""
        raise RuntimeError(f"{self.name} is not in memory; use it inside of model.lend_stages()")


class Shelf:
    """Takes the frozen stages out of a model and lends them while they are needed.

    read  gives the tensors of the model's file; None if there is no file: the stages then wait in host memory
    """

    def __init__(self, model: LatentDiffusion, read: Callable[[], Mapping[str, Tensor]] | None) -> None:
        self.model, self.read = model, read
        self.stages = {name: getattr(model, name) for name in STAGES}
        self.borrowers = 0
        model.lend_stages = self.lend
        self.put_away()

    @contextmanager
    def lend(self) -> Iterator[None]:
        """The stages are in the model until the last borrower is done."""
        self.borrowers += 1
        try:
            if self.borrowers == 1:
                self.bring()
            yield
        finally:
            self.borrowers -= 1
            if not self.borrowers:
                self.put_away()

    def bring(self) -> None:
        """Fill the stages from the file and give them to the model."""
        tensors = self.read() if self.read else {}
        for name, stage in self.stages.items():
            if self.read:
                own = {
                    k.removeprefix(f"{name}."): v.float()
                    for k, v in tensors.items()
                    if k.startswith(f"{name}.")
                }
                stage.load_state_dict(own, assign=True)
            setattr(self.model, name, stage.to(self.model.device).requires_grad_(False).eval())

    def put_away(self) -> None:
        """Take the stages out of the model and free their memory."""
        for name, stage in self.stages.items():
            stage.to("meta" if self.read else "cpu")
            setattr(self.model, name, Shelved(name))
