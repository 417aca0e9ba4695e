"""Leak check: no image may be judged whose map the model was trained on.

What a checkpoint records of its run tells the training split; maps are the same by key or by content.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cldm.config import project_path
from cldm.digests import fingerprint
from cldm.weights import recorded_yaml
from datasets import DATASETS
from metrics.image_sets import Item, class_of

SEARCHED = ("models", "work_dir", "output")  # for the checkpoint that samples name


@dataclass(frozen=True)
class Training:
    """What a checkpoint was trained on, as it records it."""

    dataset: str
    root: str | None
    split: str
    val_split: str


def find_checkpoint(items: Sequence[Item], given: Path | None) -> Path | None:
    """The checkpoint that made the samples: `given`, or a file of the recorded name and content.

    Raises
        ValueError  `given` is another one
    """
    settings = items[0].picture.settings
    name, content = settings.get("checkpoint"), settings.get("checkpoint_fingerprint")
    if given is not None:
        if content is not None and fingerprint(given) != content:
            raise ValueError(f"{items[0].picture.path} was made by another checkpoint than {given}: {name}")
        return given
    own = Path(str(name or "")).name
    if not own or not content:
        return None
    for folder in SEARCHED:
        for path in sorted(project_path(folder).rglob(escape(own))):
            if path.is_file() and fingerprint(path) == content:
                return path
    return None


def training_of(checkpoint: Path) -> Training | None:
    """The data of the run that made a checkpoint; None if it records none."""
    run = recorded_yaml(checkpoint, "run_config")
    if run is None or not OmegaConf.select(run, "data.name"):
        return None
    name, root, split, val = (
        OmegaConf.select(run, f"data.{k}") for k in ("name", "root", "split", "val_split")
    )
    default = DATASETS[name].default_root if name in DATASETS else None
    return Training(str(name), root or default, split or "train", val or "val")


def leak_card(
    items: Sequence[Item], checkpoint: Path | None, labels_root: Path, *, is_allowed: bool
) -> dict[str, Any]:
    """What was looked at, and what was found.

    labels_root  of the maps: its training split is taken where the recorded one is not on this machine

    Raises
        ValueError  a map was trained on, and that is not allowed
    """
    if checkpoint is None:
        return unknown("the checkpoint was not found; name it with --ckpt")
    training = training_of(checkpoint)
    if training is None:
        return unknown(f"{checkpoint.name} records no training run")
    if training.dataset not in DATASETS or not DATASETS[training.dataset].label_space:
        return unknown(f"{checkpoint.name} was trained on {training.dataset}, which has no label maps")
    roots = [Path(root) for root in (training.root, labels_root) if root is not None]
    for root in roots:
        maps = class_of(training.dataset).find_label_maps(root, training.split) if root.is_dir() else {}
        if maps:
            return compare(items, maps, f"{training.dataset}, split {training.split}", is_allowed)
    return unknown(
        f"the maps of {training.dataset}, split {training.split}, are neither in {training.root} nor in"
        f" {labels_root}"
    )


def compare(items: Sequence[Item], maps: dict[str, Path], where: str, is_allowed: bool) -> dict[str, Any]:
    """Hold the maps of samples against those of a training split."""
    contents = fingerprints(maps.values())
    leaked = sorted(
        {
            item.key
            for item in items
            if item.key in maps or item.picture.settings.get("hint_fingerprint") in contents
        }
    )
    if leaked and not is_allowed:
        raise ValueError(
            f"{len(leaked)} of the maps were trained on ({where}), such as {leaked[0]}: figures of them say"
            " nothing of new maps; generate from another split, or --allow_leak"
        )
    return {"status": "leaked" if leaked else "clean", "against": where, "maps": len(maps), "leaked": leaked}


def fingerprints(paths: Iterable[Path]) -> set[str]:
    """Of all files."""
    return {fingerprint(path) for path in paths}


def unknown(why: str) -> dict[str, Any]:
    """The card of a check that could not be made."""
    return {"status": "not checked", "why": why}
