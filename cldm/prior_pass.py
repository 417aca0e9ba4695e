"""The pass over a data set that a noise prior is made of: each image is encoded once, all moments at once."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from cldm.cache import SAMPLES, check_identity, digest_of, encoder_digest
from cldm.checkpoint import PART_PREFIXES, parts
from cldm.generate import to_uint8
from cldm.interrupts import held_back
from cldm.model import find_device
from cldm.prior_file import Prior, PriorCard, Range, joined, read_prior, write_prior
from cldm.tensor_files import CheckpointError, read_metadata, read_shapes
from cldm.weights import find_base, read_published
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.latent import channels_first
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.priors.moments import LatentMoments
from ldm.util import instantiate_empty

SAVE_SECONDS = 60.0
Report = Callable[[int], object]  # called with the number of images that were added


class FirstStage(NamedTuple):
    """An autoencoder, and what its latents are multiplied by."""

    autoencoder: AutoencoderKL
    scale_factor: float


class Rows(Protocol):
    """Photos, or moments of them, with label maps at the size of the latent."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        """`label` (h, w), and `jpg` (H, W, 3) in [-1, 1] or `moments` (2C, h, w), not scaled."""
        ...


@dataclass(frozen=True)
class Weights:
    """Where an autoencoder comes from, and where it computes; travels to other processes."""

    config: DictConfig  # model file
    checkpoint: Path
    base: Path | None
    device: str

    def load(self) -> FirstStage:
        """The autoencoder alone, in evaluation mode."""
        return load_first_stage(self.config, self.checkpoint, self.base, self.device)


@dataclass(frozen=True)
class Work:
    """What one process does: the moments of some ranges of the images, into a part."""

    path: Path
    card: PriorCard
    ranges: tuple[Range, ...]
    rows: Rows
    order: NDArray[np.int64]  # row of each image of the selection
    collate: Callable[[list[Any]], Mapping[str, Any]]
    weights: Weights
    shape: tuple[int, int, int]  # of a latent
    batch_size: int = 4
    num_workers: int = 0

    def run(self, first_stage: FirstStage, report: Report) -> None:
        """Go on with the part, or begin it, to the end; it is written now and then, between two batches.

        Raises
            ValueError         a frame that cannot be read, or latents that are not finite
            KeyboardInterrupt  a signal to stop; what was reached is written
        """
        with held_back() as asked:
            self.add_batches(first_stage, report, asked)
        if asked():
            raise KeyboardInterrupt

    def add_batches(self, first_stage: FirstStage, report: Report, asked: Callable[[], bool]) -> None:
        """Add batch after batch until all are there, or until `asked` to stop."""
        card, moments = self.start()
        written = time.monotonic()
        batches = [some for one in self.ranges for some in batches_of(one, self.batch_size)]
        loader = DataLoader(
            self.rows,
            batch_sampler=[self.order[start:stop].tolist() for start, stop in batches],
            num_workers=self.num_workers,
            collate_fn=self.collate,
            pin_memory=device_of(first_stage.autoencoder).type == "cuda",
        )
        try:
            for done, batch in zip(batches, loader, strict=True):
                mean, variance = posteriors(first_stage, batch, self.batch_size)
                moments.update(mean, variance, batch["label"])
                card = replace(card, covered=joined([*card.covered, done]))
                report(done[1] - done[0])
                if asked():
                    break
                if time.monotonic() - written > SAVE_SECONDS:
                    write_prior(self.path, Prior(card, moments))
                    written = time.monotonic()
        except RuntimeError:
            if not asked():  # else Ctrl-C has ended the loader's processes as well
                raise
        if card.covered:
            write_prior(self.path, Prior(card, moments))

    def start(self) -> Prior:
        """The part as it is on disk, or an empty one."""
        if self.path.exists():
            return read_prior(self.path)
        empty = LatentMoments.empty(self.shape, len(self.card.classes), covariance=self.card.covariance)
        return Prior(replace(self.card, covered=()), empty)


def batches_of(images: Range, size: int) -> Iterator[Range]:
    """A range in pieces of at most `size`."""
    for start in range(*images, size):
        yield start, min(start + size, images[1])


@torch.no_grad()
def posteriors(first_stage: FirstStage, batch: Mapping[str, Any], batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, C, h, w) float64 of the latents of a batch, scaled, on the CPU.

    What a network makes of an image depends on the number of images beside it, in the last bits; so a smaller
    batch is filled up to `batch_size`, and the prior does not depend on shards and processes.
    """
    autoencoder, scale = first_stage
    if "moments" in batch:
        parameters = torch.as_tensor(batch["moments"])
    else:
        images, count = channels_first(batch["jpg"], device_of(autoencoder)), len(batch["jpg"])
        images = torch.cat([images, images[-1:].expand(batch_size - count, -1, -1, -1)])
        parameters = autoencoder.encode(images).parameters[:count]
    found = DiagonalGaussianDistribution(parameters.cpu().double())
    return found.mean * scale, found.var * scale**2


def decoder(first_stage: FirstStage) -> Callable[[NDArray[np.float32]], NDArray[np.uint8]]:
    """A function from scaled latents (B, C, h, w) to images (B, H, W, 3), one at a time."""
    autoencoder, scale = first_stage

    @torch.no_grad()
    def decode(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        parts = torch.from_numpy(np.array(latents)).to(device_of(autoencoder)).split(1)
        return torch.cat([to_uint8(autoencoder.decode(part / scale)) for part in parts]).numpy()

    return decode


def device_of(autoencoder: AutoencoderKL) -> torch.device:
    """Where an autoencoder computes."""
    return autoencoder.quant_conv.weight.device


# -- the autoencoder ---------------------------------------------------------------------------------------


def load_first_stage(
    config: DictConfig, checkpoint: str | Path, base: str | Path | None = None, device: str = "auto"
) -> FirstStage:
    """The autoencoder of a model, from a file that holds one, or from the base of one that does not.

    Raises
        CheckpointError  no autoencoder, or that of another model file
    """
    state = read_published(checkpoint)
    if "vae" not in parts(state):
        checkpoint = find_base(checkpoint) if base is None else base
        state = read_published(checkpoint)
    prefix = PART_PREFIXES["vae"]
    named = ((key, value) for key, value in state.items() if key.startswith(prefix))
    weights = {key.removeprefix(prefix): value.float() for key, value in named}
    params = OmegaConf.to_container(config.model.params, resolve=True)
    autoencoder = instantiate_empty(params["first_stage_config"])
    try:
        autoencoder.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{checkpoint} does not hold the autoencoder of the model file ({reason}); name its model file"
            " with --config"
        ) from error
    autoencoder = autoencoder.requires_grad_(False).eval().to(find_device(device))
    return FirstStage(autoencoder, float(params.get("scale_factor", 0.18215)))


def encoder_fingerprint(autoencoder: AutoencoderKL) -> str:
    """Digest of what makes latents: encoder and the convolution after it, rounded to half precision.

    Rounded, because weights are handed on in float32 and in float16, and the latents are the same to 1e-3.
    """
    return digest_of(*(copy.deepcopy(part).half() for part in (autoencoder.encoder, autoencoder.quant_conv)))


def open_cache(folder: str | Path, rows: Mapping[str, Any], first_stage: FirstStage, count: int) -> str:
    """The precision of the moments in a cache, once it is known to be whole and of these rows and weights.

    rows   of `datasets.cached.identity_of_rows`
    count  of the rows

    Raises
        CheckpointError  a cache of something else, or one that is not finished
    """
    shards = sorted((Path(folder) / SAMPLES).glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"expected a cache in {folder}, found no shards; leave it out to encode")
    identity = json.loads(read_metadata(shards[0]).get("identity", "null"))
    precision = identity.get("dtype") if isinstance(identity, dict) else None
    made_of = {"first_stage": encoder_digest(first_stage.autoencoder), "dtype": precision, "rows": count}
    for path in shards:
        check_identity(path, {**rows, **made_of})
    found = sum(read_shapes(path)["moments"][0] for path in shards)
    if found != count:
        raise CheckpointError(
            f"{folder}: expected a cache of {count} views, found {found}; the training that fills it goes on"
            " where it was, or leave the cache out to encode"
        )
    return str(precision)


def card_of(
    source: Any, frames: NDArray[np.int64], first_stage: FirstStage, *, seed: int, **known: Any
) -> PriorCard:
    """The card of a prior of some frames of a data set with label maps.

    seed   by which the frames were drawn, if not all of them are taken
    known  further fields
    """
    drawn = len(frames) < len(source)
    chosen = hashlib.blake2b(frames.tobytes(), digest_size=16).hexdigest()
    return PriorCard(
        split=source.split,
        selection={"frames": len(source), "sample_size": len(frames), "seed": seed if drawn else None}
        | ({"chosen": chosen} if drawn else {}),
        first_stage=encoder_fingerprint(first_stage.autoencoder),
        scale_factor=first_stage.scale_factor,
        size=tuple(source.size),
        label_space=source.space.name,
        classes=tuple(source.space.names),
        versions=versions(),
        **known,
    )


def versions() -> dict[str, str]:
    """What computed."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "torch")}}
