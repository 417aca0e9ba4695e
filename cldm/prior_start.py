"""The file of a prior, opened for a model and a data set that it fits, or is made to fit on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cldm.cldm import ControlledModel
from cldm.config import project_path
from cldm.prior_file import Prior, PriorCard, check_fits, read_whole
from cldm.prior_pass import encoder_fingerprint
from ldm.priors.resampling import resampled

UNMEASURED = ("normal", "x0")  # kinds that need no moments


def find_prior(folder: Path, dataset: str, size: Sequence[int], name: str | None = None) -> Path:
    """Where the prior of a data set at (H, W) is: where noise_prior.py writes it, else the one that ships.

    name  of the file without its suffix, if it is another than noise_prior.py's own
    """
    height, width = size
    measured = folder / dataset / f"{name or f'{dataset}_train_{height}x{width}'}.safetensors"
    shipped = project_path("models") / f"{dataset}_prior.safetensors"
    return shipped if name is None and shipped.is_file() and not measured.exists() else measured


def open_prior(path: Path, size: Sequence[int], classes: Sequence[str], *, resample: bool = False) -> Prior:
    """The prior in a file, for images (H, W) and classes by train id.

    resample  take one of another size, with its places mixed as `ldm.priors.resampling` says

    Raises
        CheckpointError  no prior, or a part of one
        ValueError       one of another size or of other classes, with both named
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a noise prior at {path}, found nothing; measure one: python noise_prior.py, or name it"
            " with --prior FILE"
        )
    card, moments = read_whole(path)
    check_fits(card, str(path), classes=classes)
    height, width = size
    if card.size == (height, width):
        return Prior(card, moments)
    if not resample:
        check_fits(card, f"{path} (--resample_prior takes it nevertheless)", size=size)
    _, h, w = moments.shape
    latent = (height * h // card.size[0], width * w // card.size[1])
    origin = {**card.origin, "resampled from": list(card.size)}
    return Prior(replace(card, size=(height, width), origin=origin), resampled(moments, latent))


def check_first_stage(card: PriorCard, where: str, model: ControlledModel) -> None:
    """Refuse a prior of latents that are not those of the model, with both named."""
    check_fits(card, where, scale_factor=model.scale_factor)
    check_fits(card, where, first_stage=encoder_fingerprint(model.first_stage_model))
