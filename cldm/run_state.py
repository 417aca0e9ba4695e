"""The whole state of a run on disk, to go on bit by bit: Lightning's checkpoint without its pickle.

Tensors stand in a safetensors file under their place in it, as `optimizer_states.0.state.3.exp_avg`,
everything else as JSON in its metadata. Reading one executes nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cldm.slices import first_difference
from cldm.tensor_files import CheckpointError, read_metadata, read_shapes, read_tensors
from cldm.tensor_writing import write_tensors
from cldm.weights import recorded_yaml

log = logging.getLogger(__name__)

FOLDER, SUFFIX = "state", ".state.safetensors"
LAST = "last"
# Settings that may differ between the parts of a run, because no weight depends on them.
FREE = (
    *("data.root", "data.cache", "data.num_workers", "model.attn_backend", "model.base", "model.checkpoint"),
    *("train.default_root_dir", "train.gpus", "train.resume", "train.dry_run", "train.max_steps"),
    *(
        "train.logger_freq",
        "train.grid_images",
        "train.val_freq",
        "train.val_samples",
        "train.checkpoint_freq",
    ),
    *("train.keep_last", "train.keep_latents", "train.activation_checkpointing"),
    *("train.update_in_backward", "sample"),
)


class StateFiles(CheckpointIO):
    """Writes and reads Lightning's checkpoints as safetensors files, whole or not at all.

    notes  further metadata of each file
    """

    def __init__(self, notes: Mapping[str, str] | None = None) -> None:
        self.notes = dict(notes or {})

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write one checkpoint."""
        tensors: dict[str, Tensor] = {}
        tree = pack(checkpoint, (), tensors)
        write_tensors(path, tensors, {**self.notes, "state": json.dumps(tree)})

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one checkpoint; the tensors are mapped from the file."""
        notes = read_metadata(path)
        if "state" not in notes:
            raise CheckpointError(f"{path}: expected the state of a run (*{SUFFIX}), found none in it")
        found = unpack(json.loads(notes["state"]), read_tensors(path))
        assert isinstance(found, dict)
        return found

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete one checkpoint."""
        Path(path).unlink(missing_ok=True)


def pack(value: Any, place: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """A nested value as JSON; its tensors go into `tensors` under their place."""
    match value:
        case Tensor():
            name = ".".join(place)
            tensors[name] = value.detach()
            return {"tensor": name}
        case Mapping():
            return {"dict": [[key, pack(item, (*place, str(key)), tensors)] for key, item in value.items()]}
        case list() | tuple():
            items = [pack(item, (*place, str(i)), tensors) for i, item in enumerate(value)]
            return {type(value).__name__: items}
        case None | bool() | int() | float() | str():
            return {"value": value}
    raise CheckpointError(f"{'.'.join(place)} is {type(value).__name__}; expected tensors, numbers and text")


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    match tree:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": pairs}:
            return {key: unpack(item, tensors) for key, item in pairs}
        case {"list": items}:
            return [unpack(item, tensors) for item in items]
        case {"tuple": items}:
            return tuple(unpack(item, tensors) for item in items)
        case {"value": value}:
            return value
    raise CheckpointError(f"expected the state of a run, found {str(tree)[:60]}")


def state_to_resume(config: DictConfig, base: str | None) -> Path | None:
    """The state that `train.resume` names, if it is of a run with these settings; None without that.

    base  fingerprint of the file that holds the frozen weights; None if they are random

    Raises
        FileNotFoundError  none is there
        CheckpointError    it is that of another run
    """
    if config.train.resume is None:
        return None
    state = find_state(config.train.resume, config.train.default_root_dir)
    check_same_run(state, config, base)
    log.info("going on from %s", state)
    return state


def folder_of(state: Path | None, config: DictConfig) -> str | None:
    """The version folder of a state, in which its run goes on; None for a state from elsewhere."""
    runs = Path(config.train.default_root_dir).resolve() / "lightning_logs"
    if state is None or state.resolve().parents[2] != runs:
        return None
    return state.parents[1].name


def find_state(name: str, root: str | Path) -> Path:
    """The state file that `--resume` names; "last" is the newest below `root` that can be read.

    Raises
        FileNotFoundError  none is there
    """
    if name != LAST:
        if not Path(name).is_file():
            raise FileNotFoundError(f"expected the state of a run at {name}, found nothing")
        return Path(name)
    files = sorted(Path(root).glob(f"lightning_logs/version_*/{FOLDER}/*{SUFFIX}"), key=age, reverse=True)
    for path in files:
        try:
            read_shapes(path)
            if "state" in read_metadata(path):
                return path
        except CheckpointError as error:
            log.warning("skipped: %s", error)
    raise FileNotFoundError(
        f"expected the state of a run (*{SUFFIX}) below {root}, found {len(files)}, none of which can be read"
    )


def age(path: Path) -> tuple[int, str]:
    """Order of state files by time."""
    return path.stat().st_mtime_ns, path.name


def check_same_run(path: Path, config: DictConfig, base: str | None) -> None:
    """Refuse to go on with settings that would have made other weights, and name the first of them.

    base  fingerprint of the file that holds the frozen weights; None if they are random
    """
    notes = read_metadata(path)
    if notes.get("base_fingerprint") != base:
        raise CheckpointError(
            f"{path} is the state of a run on other frozen weights than those of {config.model.checkpoint}"
        )
    recorded = recorded_yaml(path, "run_config")
    if recorded is None:
        raise CheckpointError(f"{path}: expected the settings of its run in it, found none")
    free = FREE if config.train.schedule == "constant" else [key for key in FREE if key != "train.max_steps"]
    theirs, ours = (OmegaConf.to_container(run, resolve=False) for run in (recorded, config))
    for settings in (theirs, ours):
        for key in free:
            section, _, name = key.rpartition(".")
            parent = settings.get(section, {}) if section else settings
            parent.pop(name, None)
    difference = first_difference(theirs, ours)
    if difference:
        raise CheckpointError(
            f"{path} is the state of a run with {difference}; go on with that setting, or start anew from its"
            " weights with --resume_path"
        )
