"""Weights that lie in two files: what was trained, and the base that it lies over."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cldm.checkpoint import parts, to_model_keys
from cldm.config import project_path
from cldm.digests import fingerprint, sha256_of
from cldm.tensor_files import CheckpointError, read_metadata, read_shapes, read_tensors

ALL_PARTS = {"unet", "control", "vae", "text"}


def read_weights(checkpoint: str | Path, base: str | Path | None = None) -> dict[str, Tensor]:
    """All tensors of a model under the published names.

    A file that holds only what was trained (`control_model.*`, and the UNet's decoder of an unlocked run)
    lies over its base: `base` if given, else the file that `find_base` finds.
    """
    state = to_model_keys(read_tensors(checkpoint))
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
    return {**to_model_keys(read_tensors(path)), **state}


def base_of(checkpoint: str | Path, base: str | Path | None = None) -> tuple[Path, frozenset[str]]:
    """The file that holds the frozen tensors of a checkpoint, and the names that differ from it."""
    shapes = to_model_keys(read_shapes(checkpoint))
    if parts(shapes) >= ALL_PARTS:
        return Path(checkpoint), frozenset()
    return (find_base(checkpoint) if base is None else Path(base)), frozenset(shapes)


def base_notes(base: str | Path, beside: str | Path) -> dict[str, str]:
    """Metadata by which `find_base` finds `base` again from a file in the folder `beside`."""
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
    notes = read_metadata(checkpoint)
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
    text = read_metadata(checkpoint).get(name)
    if text is None:
        return None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CheckpointError(
            f"{checkpoint}: its {name} is no YAML; name the model file with --config"
        ) from error
    if not isinstance(content, dict) or "${" in text:
        raise CheckpointError(f"{checkpoint}: its {name} is no plain configuration; expected keys and values")
    return OmegaConf.create(content)
