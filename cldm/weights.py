"""Weights that lie in two files: what was trained, and the base that it lies over."""

from __future__ import annotations

import os
import shlex
from functools import lru_cache
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from cldm.checkpoint import WHOLE, check_pair, parts, to_model_keys
from cldm.config import project_path
from cldm.diffusers_folder import read_folder, read_notes
from cldm.diffusers_keys import part_of_names, to_published
from cldm.digests import fingerprint, sha256_of
from cldm.tensor_files import CheckpointError, read_metadata, read_tensors

ALL_PARTS = WHOLE | {"control"}
MOST_NESTED = 50  # levels of a configuration; those of model files are seven


def read_published(path: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The tensors of a weight file or of a diffusers folder under the published names.

    ema  take the EMA copies of the UNet, which must be there, in the place of its weights
    """
    if Path(path).is_dir():
        if ema:
            raise CheckpointError(f"{path} is a diffusers folder, which holds no EMA copies; leave --ema out")
        return read_folder(path)
    state = read_tensors(path)
    if (part := part_of_names(state)) is not None:  # one network out of a diffusers folder
        state = to_published(part, state, str(path))
    return to_model_keys(state, ema=ema)


def read_weights(
    checkpoint: str | Path, base: str | Path | None = None, *, ema: bool = False
) -> dict[str, Tensor]:
    """All tensors of a model under the published names, from files or diffusers folders.

    A file that holds only what was trained (`control_model.*`, and the UNet's decoder of an unlocked run)
    lies over its base: `base` if given, else the file that `find_base` finds.
    """
    state = read_published(checkpoint, ema=ema)
    if parts(state) >= ALL_PARTS:
        if base is not None:
            raise CheckpointError(
                f"{checkpoint} holds a whole model, so the base {base} has no place; leave it out"
            )
        return state
    if "control" not in parts(state):
        raise CheckpointError(
            f"{checkpoint} has no control branch; make one: python tool_add_control.py {checkpoint} OUT"
        )
    path = find_base(checkpoint) if base is None else Path(base)
    below = read_published(path)
    check_pair(state, below, str(checkpoint), str(path))
    return {**below, **state}


def base_of(checkpoint: str | Path, base: str | Path | None = None) -> tuple[Path, frozenset[str]]:
    """The file that holds the frozen tensors of a checkpoint, and the names that differ from it.

    Raises
        CheckpointError  a diffusers folder, which has no hash to be found by
    """
    refuse_folder(checkpoint)
    if base is not None:
        refuse_folder(base)
    state = read_published(checkpoint)
    if parts(state) >= ALL_PARTS:
        return Path(checkpoint), frozenset()
    return (find_base(checkpoint) if base is None else Path(base)), frozenset(state)


def refuse_folder(path: str | Path) -> None:
    """Refuse a diffusers folder where the hash of a file is recorded, and say how it becomes a file."""
    if Path(path).is_dir():
        raise CheckpointError(
            f"{path} is a folder, but a base is recorded by the hash of its file; bring it in first: "
            f"python tool_export.py {shlex.quote(str(path))} {Path(path).name}.safetensors --to original"
        )


def notes_of(path: str | Path) -> dict[str, str]:
    """The text notes of a weight file, or those that our export left in a diffusers folder."""
    return read_notes(path) if Path(path).is_dir() else read_metadata(path)


def base_notes(base: str | Path, beside: str | Path) -> dict[str, str]:
    """Metadata by which `find_base` finds `base` again from a file in the folder `beside`."""
    refuse_folder(base)
    path = Path(base).resolve()
    return {
        "base": os.path.relpath(path, Path(beside).resolve()),
        "base_fingerprint": fingerprint(path),
        "base_sha256": cached_sha256(path, path.stat().st_mtime_ns),
    }


@lru_cache(maxsize=8)
def cached_sha256(path: Path, modified: int) -> str:
    """SHA-256 of a file that is as it was at `modified`; a base is hashed once in a run."""
    return sha256_of(path)


def find_base(checkpoint: str | Path) -> Path:
    """The base of a file that holds only what was trained: at its recorded path, else by hash in models/."""
    notes = notes_of(checkpoint)
    if not {"base", "base_fingerprint", "base_sha256"} <= set(notes):
        raise CheckpointError(
            f"{checkpoint} holds a control branch and no record of its base; name the base with --base FILE"
        )
    recorded = Path(checkpoint).resolve().parent / notes["base"]
    if recorded.is_file() and fingerprint(recorded) == notes["base_fingerprint"]:
        return recorded
    for candidate in sorted(path for path in project_path("models").glob("*") if path.is_file()):
        same = fingerprint(candidate) == notes["base_fingerprint"]
        if same and sha256_of(candidate) == notes["base_sha256"]:
            return candidate
    raise CheckpointError(
        f"{checkpoint} was trained on {notes['base']} (sha256 {notes['base_sha256'][:12]}...), found neither "
        "there nor in models/; name it with --base FILE"
    )


def recorded_yaml(checkpoint: str | Path, name: str) -> DictConfig | None:
    """A configuration in the metadata of a file; None without one.

    The file may come from anywhere, so nothing is looked up in it: interpolation reads the environment.
    """
    text = notes_of(checkpoint).get(name)
    if text is None:
        return None
    try:
        check_plain_yaml(text)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date or a number that is none is a ValueError
        raise CheckpointError(
            f"{checkpoint}: its {name} is no plain YAML; name the model file with --config"
        ) from error
    if not isinstance(content, dict) or "${" in text:
        raise CheckpointError(f"{checkpoint}: its {name} is no plain configuration; expected keys and values")
    try:
        return OmegaConf.create(content)
    except OmegaConfBaseException as error:
        raise CheckpointError(
            f"{checkpoint}: its {name} is no plain configuration: {str(error.msg).splitlines()[0]}"
        ) from error


def check_plain_yaml(text: str) -> None:
    """Refuse what grows when it is read: references, a few of which stand for any amount; deep nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it holds references")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_NESTED:
            raise ValueError(f"it is nested more than {MOST_NESTED} deep")
