"""How the training run of a checkpoint saw its data and sampled: sampling goes on in that way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cldm.config import (
    SampleConfig,
    check_run,
    check_sample,
    is_model_file,
    load_run_config,
    merge,
    parse_overrides,
)
from cldm.weights import recorded_yaml

SEEN_AS = ("size", "crop", "prompt", "words", "hint", "label_space")  # of data: how frames become conditions


class RecordedRun(NamedTuple):
    """What a checkpoint says of the run that made it; None where it says nothing."""

    size: tuple[int, int] | None
    prompt: str | None  # a sentence, perhaps with names to fill in for each frame
    sample: SampleConfig
    hint: str | None  # the encoding of label maps
    dataset: str | None
    label_space: str | None  # of triples
    words: dict[str, list[str]]  # of names in the prompt
    seed: int  # of the draws among them


def read_recorded_run(checkpoint: Path, given: Mapping[str, Any] | None = None) -> RecordedRun:
    """Size, prompt, hints and sampling of the training run; a checkpoint of others gets the defaults.

    given  sampling settings that hold instead of the recorded ones; None leaves one as it is

    Raises
        ValueError  settings that no sampler takes, or a record that cannot be read
    """
    run = recorded_yaml(checkpoint, "run_config") or OmegaConf.create()
    names = OmegaConf.structured(SampleConfig)
    try:
        recorded = {name: OmegaConf.select(run, f"sample.{name}") for name in names}
        chosen = {k: v for layer in (recorded, given or {}) for k, v in layer.items() if v is not None}
        sample = OmegaConf.to_object(OmegaConf.merge(names, chosen))
    except OmegaConfBaseException as error:
        raise ValueError(f"{checkpoint}: its run_config: {str(error.msg).splitlines()[0]}") from error
    check_sample(sample)
    size = OmegaConf.select(run, "data.size")
    prompt = OmegaConf.select(run, "data.prompt")
    words = OmegaConf.to_container(OmegaConf.select(run, "data.words") or OmegaConf.create())
    if not isinstance(words, dict) or not all(isinstance(some, list) for some in words.values()):
        raise ValueError(f"{checkpoint}: its run_config: expected data.words as lists by name")
    seed = int(OmegaConf.select(run, "train.seed") or 0)
    whole = None if size is None else (int(size[0]), int(size[1]))
    hint, dataset, label_space = (
        OmegaConf.select(run, f"data.{name}") for name in ("hint", "name", "label_space")
    )
    sentence = None if prompt is None else str(prompt)
    return RecordedRun(whole, sentence, sample, hint, dataset, label_space, words, seed)


def as_trained(config: DictConfig, checkpoint: Path) -> DictConfig:
    """The configuration of a run, with frames seen and images sampled as the checkpoint's own run did.

    What the checkpoint does not record stays as it is.
    """
    run = recorded_yaml(checkpoint, "run_config") or OmegaConf.create()
    taken = {"data": SEEN_AS, "train": ("seed",), "sample": tuple(vars(SampleConfig()))}
    layer = {
        section: {
            name: value for name in names if (value := OmegaConf.select(run, f"{section}.{name}")) is not None
        }
        for section, names in taken.items()
    }
    return merge(config, layer, f"{checkpoint}: its run_config")


def sampling_config(
    dataset: str,
    config: str | Path | None,
    checkpoint: Path,
    overrides: Sequence[str],
    flags: Mapping[str, Mapping[str, Any]],
) -> DictConfig:
    """How to sample for the maps of a data set: run file <- the checkpoint's record <- overrides <- flags.

    config  a model file, or a run file, which then stands for what the checkpoint recorded as well
    flags   values by section and name; None is not given

    Raises
        ValueError  keys or values that no run has
    """
    found = load_run_config(dataset, config, [])
    if config is None or is_model_file(config):
        found = as_trained(found, checkpoint)
    given = {part: {k: v for k, v in some.items() if v is not None} for part, some in flags.items()}
    for layer, where in [*parse_overrides(overrides), (given, "the flags")]:
        found = merge(found, layer, where)
    check_run(found)
    return found
