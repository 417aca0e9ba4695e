"""Read the statistics that SCP-Diff publishes: numpy files with a Python pickle inside. Nothing is executed.

    PREFIX_spatial_mean_std.npy        {mean, std}, (C, h, w)
    PREFIX_categorical_mean_std.npy    {id: {mean, std}}, (C,)
    PREFIX_spatial_class_mean_std.npy  {mean, std, count}, (256, C, h, w), the count (256, 1, h, w)

The pickle may hold plain Python values and arrays of numbers. The names that numpy writes for those become
stand-ins of ours, which keep what they are given; any other name is refused before anything is built.
"""

from __future__ import annotations

import ast
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cldm.prior_file import Prior, PriorCard, check_consistent
from cldm.prior_pass import FirstStage, encoder_fingerprint, versions
from cldm.tensor_files import CheckpointError
from ldm.priors.moments import VOID, LatentMoments, Moments

MAGIC = b"\x93NUMPY"
NUMBERS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
FILES = ("spatial_mean_std", "categorical_mean_std", "spatial_class_mean_std")
SHOWN = 5  # ids in a sentence


# -- the reader --------------------------------------------------------------------------------------------


class StoredType:
    """Stands in for numpy.dtype: a type of numbers, or "O" for an array of values."""

    def __init__(self, code: str, *flags: object) -> None:
        self.code, self.order = str(code), "|"

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.order = str(state[1])

    def numbers(self) -> np.dtype:
        """The type of numbers; any other is refused."""
        if self.code not in NUMBERS or self.order not in "<>|=":
            raise pickle.UnpicklingError(f"it holds an array of type {self.order}{self.code}")
        return np.dtype(self.order.replace("|", "=") + self.code)


class StoredArray:
    """Stands in for numpy.ndarray: takes the state that numpy stores."""

    def __init__(self, *start: object) -> None:
        self.state: Sequence[Any] = ()

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.state = state

    def value(self) -> Any:
        """The numbers, or the one value of an array of shape ()."""
        _, shape, kind, fortran, content = self.state
        if not isinstance(kind, StoredType):
            raise pickle.UnpicklingError("it holds an array without a type")
        if kind.code == "O8" or kind.code == "O":
            if tuple(shape) != () or not isinstance(content, list):
                raise pickle.UnpicklingError(f"it holds an array of objects of shape {tuple(shape)}")
            return plain(content[0])
        raw = content.encode("latin1") if isinstance(content, str) else bytes(content)
        return np.frombuffer(raw, kind.numbers()).reshape(shape, order="F" if fortran else "C")


def stored_number(kind: Any, content: Any) -> Any:
    """Stands in for numpy's scalars."""
    raw = content.encode("latin1") if isinstance(content, str) else bytes(content)
    return np.frombuffer(raw, kind.numbers())[0].item()


def latin1(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, by which protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): StoredArray,
    ("numpy", "dtype"): StoredType,
    ("_codecs", "encode"): latin1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): StoredArray for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): stored_number for core in ("core", "_core")},
}


class RestrictedUnpickler(pickle.Unpickler):
    """Knows the stand-ins and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in; any other name is refused."""
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which may run code")
        return STAND_INS[module, name]


def plain(value: Any) -> Any:
    """Arrays in the place of stand-ins, all through dicts and lists."""
    if isinstance(value, StoredArray):
        return value.value()
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_object_array(path: str | Path) -> Any:
    """The value in a .npy file that numpy would only read with allow_pickle.

    Raises
        CheckpointError  no such file, or one that holds anything but plain values and arrays of numbers
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"expected published statistics at {path}, found nothing")
    try:
        with path.open("rb") as file:
            check_header(file)
            return plain(RestrictedUnpickler(file).load())
    except Exception as error:  # whatever a damaged pickle makes the unpickler stumble over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{path} was not read: {reason}; expected statistics as SCP-Diff writes them"
        ) from error


def check_header(file: IO[bytes]) -> None:
    """Read the header of a .npy file up to its data, which must be one object."""
    head = file.read(8)
    if head[:6] != MAGIC or len(head) < 8:
        raise ValueError("it is no .npy file")
    length = int.from_bytes(file.read(2 if head[6] == 1 else 4), "little")
    described = ast.literal_eval(file.read(min(length, 1 << 16)).decode("latin1").strip())
    if described.get("descr") != "|O" or described.get("shape") != ():
        raise ValueError(f"its header says {described}, not one object")


# -- what it means -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """The moments of published statistics, and what is to be said about them."""

    moments: LatentMoments
    phantoms: dict[str, list[int]]  # ids that no label map of the data set can hold, by file
    guessed: list[str]  # what the files do not say

    def sentences(self) -> list[str]:
        """What a user should know."""
        found = []
        for name, ids in self.phantoms.items():
            shown = ", ".join(map(str, ids[:SHOWN])) + (", ..." if len(ids) > SHOWN else "")
            found.append(
                f"{name}: contaminated by {len(ids)} phantom classes ({shown}): label maps were resized with"
                " interpolation, so real classes hold pixels of others as well; measure them anew"
            )
        return [*found, *self.guessed]


def read_published(prefix: str | Path, ids: Sequence[int], images: int) -> Published:
    """Moments of PREFIX_*.npy, in float64.

    ids     under which the files hold train ids 0..K-1
    images  that the spatial moments are of: no file says it

    Raises
        CheckpointError  a file that is missing, or that holds something else
    """
    spatial, by_class, joint = (read_object_array(f"{prefix}_{name}.npy") for name in FILES)
    try:
        places = spatial_moments(spatial, images)
        cells = joint_moments(joint, ids)
        if cells.mean.shape[1:] != places.mean.shape:
            raise ValueError(f"latents of {places.mean.shape[:2]} and {cells.mean.shape[1:3]}")
        classes = class_moments(by_class, ids, cells)
        moments = LatentMoments(places, classes[0], classes[1], cells)
        moments.check_arrays()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{prefix}_*.npy hold no statistics of SCP-Diff: {type(error).__name__} {error}"
        ) from error
    known = {*ids, VOID}
    seen = np.asarray(joint["count"]).reshape(len(joint["count"]), -1).any(axis=1)
    phantoms = {
        FILES[1]: sorted(int(key) for key in by_class if int(key) not in known),
        FILES[2]: [int(key) for key in np.flatnonzero(seen) if int(key) not in known],
    }
    guessed = [
        f"the spatial moments are taken to be of {images} images, which no file says",
        "the class moments are by image, taken to be of as many images as show the class where it is most"
        " frequent; their pixels are not known, so both weightings are the same",
    ]
    return Published(moments, {name: found for name, found in phantoms.items() if found}, guessed)


def of_deviation(count: NDArray, mean: Any, std: Any) -> Moments:
    """Moments of a count (*groups,), and mean and standard deviation (*groups, C); NaN counts as 0."""
    count = np.asarray(count).round().astype(np.int64)
    seen = (count > 0)[..., None]
    mean, variance = (
        np.where(seen, np.nan_to_num(np.float64(part)), 0) for part in (mean, np.square(np.float64(std)))
    )
    return Moments(count, mean, variance * count[..., None])


def spatial_moments(found: dict[str, NDArray], images: int) -> Moments:
    """Of {mean, std}, (C, h, w)."""
    mean, std = (np.moveaxis(found[name], 0, -1) for name in ("mean", "std"))
    return of_deviation(np.full(mean.shape[:2], images), mean, std)


def joint_moments(found: dict[str, NDArray], ids: Sequence[int]) -> Moments:
    """Of {mean, std, count} with 256 classes."""
    mean, std = (np.moveaxis(found[name][list(ids)], 1, -1) for name in ("mean", "std"))
    return of_deviation(found["count"][list(ids), 0], mean, std)


def class_moments(found: dict[Any, Any], ids: Sequence[int], joint: Moments) -> tuple[Moments, Moments]:
    """Of {id: {mean, std}}: by pixels and by images, which differ in their counts alone."""
    channels = joint.mean.shape[-1]
    nothing = {"mean": np.zeros(channels), "std": np.zeros(channels)}
    known = {int(key): value for key, value in found.items()}
    mean, std = (np.stack([known.get(k, nothing)[name] for k in ids]) for name in ("mean", "std"))
    there = np.array([k in known for k in ids])
    flat = joint.count.reshape(len(joint.count), -1)
    pixels, images = (np.where(there, np.maximum(1, n), 0) for n in (flat.sum(axis=1), flat.max(axis=1)))
    return of_deviation(pixels, mean, std), of_deviation(images, mean, std)


def published_prior(found: Published, first_stage: FirstStage, name: str, **made_of: Any) -> Prior:
    """Published statistics with a card, as if they were of an autoencoder, which they do not say.

    name     of the statistics
    made_of  dataset, split, label_space and classes of the card
    """
    down, moments = first_stage.autoencoder.downsampling, found.moments
    card = PriorCard(
        **made_of,
        rows={},
        selection={},
        total=moments.images,
        first_stage=encoder_fingerprint(first_stage.autoencoder),
        scale_factor=first_stage.scale_factor,
        size=(moments.shape[1] * down, moments.shape[2] * down),
        covered=((0, moments.images),),
        versions=versions(),
        origin={"published": name, "phantom classes": found.phantoms},
    )
    check_consistent(card, moments)
    return Prior(card, moments)
