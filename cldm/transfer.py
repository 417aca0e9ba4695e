"""A control branch on another base: moved by what tells the bases apart, or taken as it is.

The offset rule is Zhang's (github.com/lllyasviel/ControlNet/discussions/12): new control = new base + (old
control - old base). The style swap is DGInStyle's (Jia et al. 2024, arXiv:2312.03048): a branch that was
taught over one UNet steers another one as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cldm.add_control import CONTROL, UNET, add_control
from cldm.checkpoint import SCHEDULE_KEYS, detect_architecture, parts
from cldm.hint_channels import read_branch
from cldm.model import known_model_config, model_config_of, shapes_of, with_choices, with_hint_channels
from cldm.origin import origin_notes
from cldm.tensor_files import CheckpointError
from cldm.weights import ALL_PARTS, base_notes, find_base, notes_of, read_published

DECODER = (f"{UNET}output_blocks.", f"{UNET}out.")
OWN = tuple(CONTROL + part for part in ("input_hint_block.", "zero_convs.", "middle_block_out."))
KEPT_NOTES = ("run_config", "step")

State = Mapping[str, Tensor]


class Drift(NamedTuple):
    """Distances over the tensors that were moved, in parts of the old base's norm."""

    of_control: float  # |old control - old base|: what training did
    of_base: float  # |new base - old base|


@dataclass(frozen=True)
class Transfer:
    """A file to write, and what is in it."""

    tensors: dict[str, Tensor]  # by published name
    notes: dict[str, str]
    moved: int  # tensors that the offset rule changed
    copied: int  # tensors of the control file as they were
    has_decoder: bool  # a trained decoder went along
    drift: Drift | None  # of the offset rule


def transfer_control(
    control: str | Path,
    target: str | Path,
    new: str | Path,
    old: str | Path | None = None,
    *,
    swap: bool = False,
    whole: bool = False,
    dtype: torch.dtype | None = None,
) -> Transfer:
    """The control branch of `control` for the base `new`, to be written to `target`.

    control  a whole model, or a control branch with or without the decoder that was trained with it
    old      the base that it was trained on; by default the recorded one
    swap     take the branch as it is instead of moving it
    whole    the whole model instead of what `new` does not hold
    dtype    of floating point tensors; by default each keeps the control's, of the base the base's

    Raises
        CheckpointError  files that do not belong together, each time with their names
    """
    state, base = read_branch(control), read_published(new)
    check_architectures({control: state, new: base})
    before = find_old(control, state, old, is_needed=not swap or "unet" in parts(state))
    trained = {key: value for key, value in state.items() if key.startswith(CONTROL)}
    on: State = {}
    if before is not None:
        on = read_published(before)
        check_architectures({before: on, new: base})
        trained |= trained_decoder(state, on, control, before)
    has_decoder = any(key.startswith(UNET) for key in trained)
    if swap and has_decoder:
        raise CheckpointError(
            f"{control} carries a decoder that was trained with its branch, and it would hide that of {new}; "
            "leave --swap out, then the decoder is moved as well"
        )
    pairs = counterparts(trained, base, control, new)
    drift = None if swap else measure(trained, pairs, on, base)
    moved = move(trained, {} if swap else pairs, on, base, dtype)
    config = with_hint_channels(model_config_of(control), shapes_of(state))
    config = agreed_prediction(config, control, new)
    tensors = complete(config, base, moved, control, new)
    notes = {key: value for key, value in notes_of(control).items() if key in KEPT_NOTES}
    files = {"control": control, **({} if swap or before is None else {"from": before}), "to": new}
    notes |= {"model_config": OmegaConf.to_yaml(config), **origin_notes("swap" if swap else "offset", files)}
    if whole:
        tensors = {key: in_type(key, value, dtype) for key, value in tensors.items()}
    else:
        tensors, notes = moved, notes | base_notes(new, beside=Path(target).parent)
    count = 0 if swap else len(pairs)
    return Transfer(tensors, notes, count, len(moved) - count, has_decoder, drift)


def check_architectures(files: Mapping[str | Path, State]) -> None:
    """Refuse files of two architectures, naming both."""
    kinds = {path: detect_architecture(shapes_of(state), str(path)) for path, state in files.items()}
    if len(set(kinds.values())) > 1:
        (first, theirs), (second, ours) = kinds.items()
        raise CheckpointError(
            f"{first} is {theirs} and {second} is {ours}; a control branch fits a base of its own kind, so "
            "name another file"
        )


def find_old(control: str | Path, state: State, given: str | Path | None, *, is_needed: bool) -> Path | None:
    """The base that a control branch was trained on, given or recorded; None where none is needed."""
    if given is not None:
        return Path(given)
    if not is_needed:
        return None
    if parts(state) >= ALL_PARTS:
        raise CheckpointError(
            f"{control} is a whole model, whose decoder may have been trained with its branch; name the base "
            "that it was trained on with --from FILE"
        )
    recorded = notes_of(control).get("base")
    if recorded is None:
        raise CheckpointError(
            f"{control} has no record of the base that it was trained on; name it with --from FILE"
        )
    try:
        return find_base(control)
    except CheckpointError as error:
        raise CheckpointError(
            f"{control} was trained on {recorded}, found neither there nor by its hash in models/; name it "
            "with --from FILE"
        ) from error


def trained_decoder(
    state: State, old: State, control: str | Path, trained_on: str | Path
) -> dict[str, Tensor]:
    """The UNet's decoder, if it is not that of the base; the encoder has to be, as it is never trained."""
    unet = [key for key in state if key.startswith(UNET)]
    if lost := [key for key in unet if key not in old or old[key].shape != state[key].shape]:
        raise CheckpointError(
            f"{trained_on} is not what {control} was trained on: it has no {lost[0]} like its"
        )
    for key in unet:
        if not key.startswith(DECODER) and not same_numbers(state[key], old[key]):
            raise CheckpointError(
                f"{control} was not trained on {trained_on}: the frozen {key} differs; name the base that it "
                "was trained on with --from FILE"
            )
    decoder = {key: state[key] for key in unet if key.startswith(DECODER)}
    is_trained = any(not same_numbers(value, old[key]) for key, value in decoder.items())
    return decoder if is_trained else {}


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for the rounding to the coarser of their types."""
    if a.dtype == b.dtype:
        return torch.equal(a, b)
    if not (a.is_floating_point() and b.is_floating_point()):
        return torch.equal(a.double(), b.double())
    coarse = max((torch.finfo(x.dtype) for x in (a, b)), key=lambda info: info.eps)
    return torch.allclose(a.double(), b.double(), rtol=coarse.eps, atol=coarse.tiny * coarse.eps)


def counterparts(trained: State, base: State, control: str | Path, new: str | Path) -> dict[str, str]:
    """For each tensor that began as a copy of the UNet's, its name there; one of another shape is refused."""
    if not any(key.startswith(UNET) for key in base):
        raise CheckpointError(f"{new} has no UNet; expected a whole Stable Diffusion to transfer to")
    pairs = {key: UNET + key.removeprefix(CONTROL) for key in trained if not key.startswith(OWN)}
    pairs = {key: key if key.startswith(UNET) else name for key, name in pairs.items()}
    for key, name in pairs.items():
        if name not in base or base[name].shape != trained[key].shape:
            found = tuple(base[name].shape) if name in base else "nothing"
            raise CheckpointError(
                f"{control} does not fit {new}: {key} is {tuple(trained[key].shape)}, {name} is {found}; "
                "name a base of the same sizes"
            )
    return pairs


def move(
    trained: State, pairs: Mapping[str, str], old: State, new: State, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The offset rule on the tensors that have a counterpart in the base; the others as they are."""
    return {
        key: in_type(key, offset(value, old[pairs[key]], new[pairs[key]]), dtype or value.dtype)
        if key in pairs
        else in_type(key, value, dtype)
        for key, value in trained.items()
    }


def offset(control: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Return control + (new - old) in float64, of one shape.

    Where new is old it is `control`, and where control is old it is `new`, exactly.
    """
    control, old, new = (tensor.double() for tensor in (control, old, new))
    return torch.where(control == old, new, control + (new - old))


def in_type(key: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another type, which has to hold its numbers; schedules and integers stay as they are."""
    if key in SCHEDULE_KEYS or not value.is_floating_point():
        return value
    cast = value if dtype is None else value.to(dtype)
    if not cast.isfinite().all():
        raise CheckpointError(
            f"{key} is not finite in {str(cast.dtype).removeprefix('torch.')}; look for NaN in the files, or "
            "write it with --dtype fp32"
        )
    return cast


def measure(trained: State, pairs: Mapping[str, str], old: State, new: State) -> Drift:
    """How far training went from the old base, and how far the new one is from it."""
    sums = torch.zeros(3, dtype=torch.float64)
    for value, before, after in triples(trained, pairs, old, new):
        sums += torch.stack(
            [(value - before).pow(2).sum(), (after - before).pow(2).sum(), before.pow(2).sum()]
        )
    of_control, of_base, whole = sums.sqrt().tolist()
    return Drift(of_control / whole, of_base / whole) if whole else Drift(0.0, 0.0)


def triples(
    trained: State, pairs: Mapping[str, str], old: State, new: State
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Trained tensor, old and new base in float64, one after another."""
    for key, name in pairs.items():
        yield trained[key].double(), old[name].double(), new[name].double()


def agreed_prediction(config: DictConfig, control: str | Path, new: str | Path) -> DictConfig:
    """The control's model file, with what the base is known to predict if the control does not say.

    Raises
        CheckpointError  a base that predicts something else than the control was trained with
    """
    ours, theirs = (prediction_of(known_model_config(path)) for path in (control, new))
    if ours and theirs and theirs != ours:
        raise CheckpointError(
            f"{control} was trained to predict {ours} and {new} predicts {theirs}; name a base that predicts "
            f"{ours}"
        )
    return with_choices(config, parameterization=theirs) if theirs and not ours else config


def prediction_of(config: DictConfig | None) -> str | None:
    """What a model file says that its network predicts."""
    return (
        None if config is None else OmegaConf.select(config, "model.params.parameterization", default="eps")
    )


def complete(
    config: DictConfig, base: State, moved: State, control: str | Path, new: str | Path
) -> dict[str, Tensor]:
    """The whole model, held strictly against its model file."""
    decoder = {key: value for key, value in moved.items() if not key.startswith(CONTROL)}
    try:
        return add_control(config, {**base, **decoder}, moved)[0]
    except CheckpointError as error:
        raise CheckpointError(f"{control} over {new}: {error}") from error
