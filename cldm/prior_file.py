"""Files of noise priors: what is in one, writing, reading, merging, and what a prior fits.

A safetensors file. C is the number of latent channels, h x w the size of the latent, K the number of classes.

    tensor                  shape      type     of
    places.count            h, w       int64    images at each place
    places.mean             h, w, C    float64  latents times the scale factor
    places.m2               h, w, C    float64  sum of squared deviations from the mean, the variance of the
                                                posteriors in it; (h, w, C, C) with --covariance
    classes.*               K, ...              every latent pixel of a class alike; counts are pixels
    classes_by_image.*      K, ...              every image that shows a class alike; counts are images
    joint.*                 K, h, w, ...        the images that show a class at a place

Variance is m2 / count. The metadata entry `prior` is a JSON object, the fields of `PriorCard` and `schema`.
A part of a prior (a shard, or what an interrupted run has done) has the same format; its `covered` says
which images of the selection are in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.tensor_writing import write_tensors
from ldm.priors.moments import LatentMoments

SCHEMA = 1
ENTRY = "prior"  # of the metadata
Range = tuple[int, int]  # first, last + 1
NOT_COMPARED = ("covered", "versions")


@dataclass(frozen=True)
class PriorCard:
    """What a prior was made of, and what it fits."""

    dataset: str
    split: str
    rows: dict[str, Any]  # digest of the files, and which windows of the frames: identity_of_rows
    selection: dict[str, Any]  # frames of the split, sample_size, seed, digest of the chosen ones
    total: int  # images (views of the chosen frames) of the whole prior
    first_stage: str  # digest of the autoencoder's encoder: encoder_fingerprint
    scale_factor: float
    size: tuple[int, int]  # (H, W) of the images
    label_space: str
    classes: tuple[str, ...]  # names, by train id
    precision: str = "32"  # of the posteriors; 16 for a cache in half precision
    covariance: bool = False  # of the channels
    covered: tuple[Range, ...] = ()  # ranges of 0..total - 1
    versions: dict[str, str] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)  # of moments that were not measured here

    @property
    def images(self) -> int:
        """Number of images that are in it."""
        return sum(stop - start for start, stop in self.covered)

    @property
    def is_whole(self) -> bool:
        """Whether all images of the selection are in it."""
        return self.covered == ((0, self.total),)


class Prior(NamedTuple):
    """What a file holds."""

    card: PriorCard
    moments: LatentMoments


def write_prior(path: str | Path, prior: Prior) -> None:
    """Write a prior, or a part of one, whole or not at all."""
    notes = {ENTRY: json.dumps({"schema": SCHEMA, **asdict(prior.card)})}
    tensors = {name: torch.from_numpy(array) for name, array in prior.moments.arrays().items()}
    write_tensors(path, tensors, notes)


def read_prior(path: str | Path) -> Prior:
    """The prior, or the part of one, in a file.

    Raises
        CheckpointError  no such file, or one whose content is no prior
    """
    card = read_card(path)
    # Copies: what is mapped cannot be written to, and the file may be replaced.
    arrays = {name: np.array(tensor.numpy()) for name, tensor in read_tensors(path).items()}
    try:
        moments = LatentMoments.from_arrays(arrays)
        check_consistent(card, moments)
    except ValueError as error:
        raise CheckpointError(f"{path} is a damaged prior: {error}") from error
    return Prior(card, moments)


def read_whole(path: str | Path) -> Prior:
    """The prior in a file; a part of one is refused."""
    prior = read_prior(path)
    if not prior.card.is_whole:
        raise CheckpointError(
            f"{path} is a part of a prior, {prior.card.images} of {prior.card.total} images; let it"
            " finish, or merge its shards: python noise_prior.py merge OUT FILE..."
        )
    return prior


def read_card(path: str | Path) -> PriorCard:
    """What the prior in a file was made of."""
    text = read_metadata(path).get(ENTRY)
    if text is None:
        raise CheckpointError(f"{path} is no noise prior; make one: python noise_prior.py --dataset NAME")
    try:
        found = json.loads(text)
        schema = found.pop("schema")
        if schema != SCHEMA:
            raise CheckpointError(f"{path}: expected a prior of schema {SCHEMA}, found {schema}")
        found |= {
            "size": tuple(map(int, found["size"])),
            "classes": tuple(map(str, found["classes"])),
            "covered": tuple((int(start), int(stop)) for start, stop in found["covered"]),
        }
        card = PriorCard(**found)
        for item in fields(card):
            check_type(item.name, getattr(card, item.name), str(item.type))
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is a damaged prior: its metadata: {error}") from error
    return card


def check_type(name: str, value: Any, declared: str) -> None:
    """Refuse a field of another type."""
    known: dict[str, Any] = {
        "str": str,
        "int": int,
        "float": (float, int),
        "bool": bool,
        "dict": dict,
        "tuple": tuple,
    }
    if not isinstance(value, known[declared.partition("[")[0]]):
        raise ValueError(f"expected {name} of type {declared}, found {value!r}")


def check_consistent(card: PriorCard, moments: LatentMoments) -> None:
    """Refuse a card that belongs to other moments."""
    _, height, width = moments.shape
    if len(card.size) != 2 or (card.size[0] % height, card.size[1] % width) != (0, 0):
        raise ValueError(f"expected a latent of images of {card.size}, found one of {height}x{width}")
    pairs = {
        "classes": (len(card.classes), moments.num_classes),
        "images": (card.images, moments.images),
        "covariance": (card.covariance, moments.has_covariance),
    }
    for name, (said, found) in pairs.items():
        if said != found:
            raise ValueError(f"expected {name} {said}, as the metadata say, found {found}")
    joined(card.covered)


def check_fits(
    card: PriorCard,
    where: str,
    *,
    first_stage: str | None = None,
    scale_factor: float | None = None,
    size: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Refuse a prior of other latents, another size or other classes; what is None is not looked at.

    first_stage  as `encoder_fingerprint` gives it
    size         (H, W) of the images
    classes      names, by train id

    Raises
        ValueError  names what differs, with both values
    """
    wanted: dict[str, Any] = {
        "first_stage": first_stage,
        "scale_factor": scale_factor,
        "size": size,
        "classes": classes,
    }
    for name, value in wanted.items():
        found = getattr(card, name)
        if value is not None and (tuple(value) if isinstance(found, tuple) else value) != found:
            raise ValueError(
                f"{where}: expected a prior of {name} {spelt(value)}, found one of {spelt(found)}"
                f" ({card.dataset}, {card.split}); choose another, or make one: python noise_prior.py"
            )


def spelt(value: Any) -> str:
    """A value for a sentence: sizes as HxW, many classes by their number and the first ones."""
    if isinstance(value, str | float):
        return str(value)
    parts = [str(part) for part in value]
    if not parts or not parts[0].isdigit():
        return f"{len(parts)} ({', '.join(parts[:3])}, ...)"
    return "x".join(parts)


# -- parts -------------------------------------------------------------------------------------------------


def merged(parts: Iterable[tuple[str | Path, Prior]]) -> Prior:
    """Parts of one prior together, in the order of the images in them; each with its name for errors.

    Raises
        ValueError  parts of different priors, or an image that is in two of them
    """
    ordered = sorted(parts, key=lambda part: part[1].card.covered)
    first, whole = ordered[0]
    for name, part in ordered[1:]:
        if difference := difference_of(whole.card, part.card):
            raise ValueError(f"expected parts of one prior, found {first} and {name} with {difference}")
        try:
            covered = joined([*whole.card.covered, *part.card.covered])
        except ValueError as error:
            raise ValueError(f"{name}: {error}, so it cannot be merged with {first}") from error
        whole = Prior(replace(whole.card, covered=covered), whole.moments.merge(part.moments))
    return whole


def difference_of(a: PriorCard, b: PriorCard) -> str | None:
    """The first thing in which the making of two priors differs, in words."""
    for item in fields(PriorCard):
        ours, theirs = getattr(a, item.name), getattr(b, item.name)
        if item.name in NOT_COMPARED or ours == theirs:
            continue
        if isinstance(ours, dict):
            key = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
            return f"{key} {ours.get(key)} and {theirs.get(key)}"
        return f"{item.name} {ours} and {theirs}"
    return None


def joined(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Ranges in order, neighbours as one.

    Raises
        ValueError  ranges that overlap, or are none
    """
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if not 0 <= start < stop:
            raise ValueError(f"expected a range of images, found {start}..{stop - 1}")
        if found and start < found[-1][1]:
            raise ValueError(f"image {start} is in two parts")
        if found and start == found[-1][1]:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def missing_of(target: Range, covered: Iterable[Range]) -> tuple[Range, ...]:
    """What of a range is not covered."""
    found, start = [], target[0]
    for first, stop in joined(covered):
        if start < min(first, target[1]):
            found.append((start, min(first, target[1])))
        start = max(start, stop)
    return tuple([*found, (start, target[1])] if start < target[1] else found)
