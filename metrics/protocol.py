"""Protocols: small YAML files that hold all that decides a figure but the images and the weights."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cldm.config import project_path
from datasets.label_space import SPACES

FOLDER = "configs/protocols"
METRICS = ("fid", "kid", "segmentation", "diversity", "streets_features")
FILTERS = ("bicubic", "bilinear", "lanczos", "box")  # of Pillow, which averages over what a pixel covers
SEGMENTERS = ("judge", "transformers", "maps")
FEWEST = 2  # images that have a covariance, or an interval
LAYERS = ("64", "192", "768", "2048")  # of the Inception network, by the width of their features


@dataclass
class SegmenterConfig:
    """Who says what each pixel shows."""

    kind: str = MISSING  # one of SEGMENTERS
    weights: str | None = None  # a row of metrics.local_weights.WEIGHTS; maps need none


@dataclass
class Track:
    """What a protocol says of one data set."""

    label_space: str = MISSING  # one of SPACES
    size: list[int] = MISSING  # height and width at which everything is measured
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)


@dataclass
class Least:
    """Images below which a figure is left out; of real ones and of generated ones."""

    fid: int = 500
    kid: int = 100
    segmentation: int = 2
    diversity: int = 2  # maps
    streets_features: int = 100


@dataclass
class Protocol:
    """A protocol; two figures compare only if theirs are equal."""

    name: str = MISSING
    version: int = MISSING  # counted up with every change
    metrics: list[str] = MISSING  # some of METRICS
    resize: str = "bicubic"  # one of FILTERS, the same for real and generated images
    samples: int = 1  # of each map that count for all but the diversity: the first by seed; 0 takes all
    diversity_samples: int = 10  # of each map, at most; all pairs of them
    inception_layer: str = "2048"  # one of LAYERS; only the last one's distance is the FID of the literature
    kid_subsets: int = 100
    kid_subset_size: int = 1000  # fewer where there are fewer images, and the card says so
    resamples: int = 1000  # of the bootstrap
    least: Least = field(default_factory=Least)
    data: dict[str, Track] = MISSING  # by name of the data set


def load_protocol(name: str | Path) -> Protocol:
    """The protocol of `configs/protocols/NAME.yaml`, or of a file.

    Raises
        ValueError  an unknown name, a file that is none, a key or a value that is not known
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = project_path(FOLDER) / f"{name}.yaml"
        if not path.is_file():
            raise ValueError(unknown("protocol", str(name), names_of_protocols()))
    try:
        content = OmegaConf.create(yaml.safe_load(path.read_text(encoding="utf-8")))
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Protocol), content))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(getattr(error, "msg", None) or error).split())
        raise ValueError(
            f"{path}: expected a protocol such as {FOLDER}/native.yaml, found: {reason}"
        ) from error
    assert isinstance(found, Protocol)
    check_protocol(found, str(path))
    return found


def names_of_protocols() -> list[str]:
    """What ships."""
    return sorted(path.stem for path in project_path(FOLDER).glob("*.yaml"))


def track_of(protocol: Protocol, dataset: str) -> Track:
    """What a protocol says of a data set."""
    if dataset not in protocol.data:
        raise ValueError(
            f"protocol {protocol.name} says nothing of data set {dataset!r}, only of"
            f" {', '.join(protocol.data)}; name another --protocol or --dataset"
        )
    return protocol.data[dataset]


def with_few(protocol: Protocol) -> Protocol:
    """The same protocol without its least numbers of images; its cards compare with no others."""
    return Protocol(**{**vars(protocol), "least": Least(**dict.fromkeys(asdict(Least()), FEWEST))})


def frozen_part(protocol: Protocol, dataset: str) -> dict[str, Any]:
    """What goes into a card: the protocol as it is for one data set."""
    parts = asdict(protocol)
    return {**{k: v for k, v in parts.items() if k != "data"}, "dataset": dataset, **parts["data"][dataset]}


def check_protocol(protocol: Protocol, where: str) -> None:
    """Refuse values that no code knows."""
    choices: list[tuple[str, Sequence[str], Sequence[str]]] = [
        ("metrics", protocol.metrics, METRICS),
        ("resize", [protocol.resize], FILTERS),
        ("inception_layer", [protocol.inception_layer], LAYERS),
    ]
    for name, track in protocol.data.items():
        choices.append((f"data.{name}.label_space", [track.label_space], SPACES))
        choices.append((f"data.{name}.segmenter.kind", [track.segmenter.kind], SEGMENTERS))
        if len(track.size) != 2 or min(track.size) < 1:
            raise ValueError(f"{where}: data.{name}.size: expected height and width, found {track.size}")
    for key, values, known in choices:
        for value in values:
            if value not in known:
                raise ValueError(f"{where}: {key}: {unknown('value', value, known)}")
    counts = {"kid_subsets": 1, "kid_subset_size": 2, "resamples": 100, "samples": 0, "diversity_samples": 2}
    for key, least in counts.items():
        if getattr(protocol, key) < least:
            raise ValueError(f"{where}: {key}: expected {least} or more, found {getattr(protocol, key)}")


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    """A sentence that names the known ones, and the near one."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}: expected one of {', '.join(known)}{hint}"
