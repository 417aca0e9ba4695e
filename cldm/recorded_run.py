"""How the training run of a checkpoint saw its data and sampled: sampling goes on in that way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cldm.config import SampleConfig, check_sample
from cldm.weights import recorded_yaml


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
