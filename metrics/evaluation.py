"""Evaluate generated images under a protocol: what is measured, in which passes, and the card of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets import DATASETS
from datasets.label_space import LabelSpace
from metrics.blocks import WHOLE, Digests, Shard, Work, rows_of, run_pass
from metrics.evaluation_card import (
    data_card,
    environment,
    fake_card,
    generation_card,
    renderer_near,
)
from metrics.features import kernel_distance, moments_of
from metrics.frechet import frechet_distance
from metrics.image_sets import (
    Item,
    Reader,
    check_fake,
    class_of,
    find_fake,
    find_maps,
    find_real,
    first_samples,
    id_reader,
    is_root,
    peek,
    with_predicted,
)
from metrics.leaks import find_checkpoint, leak_card, training_of
from metrics.protocol import Protocol, Track, frozen_part, load_protocol, track_of, with_few
from metrics.segmentation import Margins, bootstrap_interval
from metrics.segmentation_card import beside_ceiling
from metrics.works import Works, build_works

Card = dict[str, Any]

FRECHET = {"fid": "inception", "streets_features": "judge_features"}  # by metric: whose features


@dataclass(frozen=True)
class Request:
    """What was asked for; None is found out."""

    fake: Path
    real: Path | None = None
    labels: Path | None = None
    labels_hold: str = "auto"
    dataset: str | None = None
    split: str | None = None
    protocol: str | None = None
    checkpoint: Path | None = None
    predicted: Path | None = None
    predicted_real: Path | None = None
    weights: dict[str, Path] = field(
        default_factory=dict
    )  # other places, by flag: inception, alexnet, segmenter
    cache: Path = Path("cache/evaluation")
    device: str = "auto"
    shard: Shard = WHOLE
    allow_leak: bool = False
    allow_few: bool = False


@dataclass
class Evaluation:
    """Everything that is known before a pixel is looked at; refuses what would mislead."""

    protocol: Protocol
    track: Track
    dataset: str
    real_root: Path
    labels_root: Path
    fake: list[Item]  # that count for all but the diversity
    samples: list[Item]  # all of them
    real: list[Item]
    paired: list[Item]  # real images of the maps that were sampled, with these maps
    reader: Reader
    leaks: Card
    predicted: bool  # whether maps of a segmenter elsewhere were handed in


@dataclass(frozen=True)
class Findings:
    """The card, and what the page shows beside it."""

    card: Card
    evaluation: Evaluation
    works: Works
    margins: Margins | None  # (N, 3, K) of `evaluation.fake`
    confusion: NDArray[np.int64] | None  # (K, K) of all of them


def prepare(request: Request) -> Evaluation:
    """Find and check images and maps.

    Raises
        ValueError, FileNotFoundError  in one sentence what is wrong with them
    """
    first = find_fake(request.fake, [])
    checkpoint = find_checkpoint(first, request.checkpoint)
    dataset, real_root, labels_root, split = where(request, first, checkpoint)
    name = request.protocol or ("streets" if dataset == "streets" else "native")
    protocol = load_protocol(name)
    protocol = with_few(protocol) if request.allow_few else protocol
    track = track_of(protocol, dataset)
    size = (track.size[0], track.size[1])
    check_fake(first, size)
    maps = find_maps(labels_root, dataset, split)
    photos = find_real(real_root, dataset, split)
    samples = [Item(item.key, item.picture, maps[item.key]) for item in find_fake(request.fake, list(maps))]
    fake = first_samples(samples, protocol.samples)
    real = [Item(key, peek(path)) for key, path in photos.items()]
    shown = dict.fromkeys(item.key for item in fake)
    paired = [Item(item.key, item.picture, maps[item.key]) for item in real if item.key in shown]
    if request.predicted:
        fake = with_predicted(fake, request.predicted)
    if request.predicted_real:
        paired = with_predicted(paired, request.predicted_real)
    root = root_near(labels_root, dataset)
    space = LabelSpace.load(track.label_space)
    reader = Reader(space, size, protocol.resize, id_reader(dataset, request.labels_hold))
    return Evaluation(
        protocol=protocol,
        track=track,
        dataset=dataset,
        real_root=real_root,
        labels_root=labels_root,
        fake=fake,
        samples=samples,
        real=real,
        paired=paired,
        reader=reader,
        leaks=leak_card(fake, checkpoint, root, is_allowed=request.allow_leak),
        predicted=bool(request.predicted and request.predicted_real),
    )


def where(request: Request, items: Sequence[Item], checkpoint: Path | None) -> tuple[str, Path, Path, str]:
    """Data set, root of real images, root of maps, split: as asked for, else as in the training run."""
    run = training_of(checkpoint) if checkpoint else None
    given = request.real or request.labels
    dataset = request.dataset or (run.dataset if run else None) or guess(items, given)
    if dataset is None:
        raise ValueError(
            f"{request.fake}: nothing tells which data set the images belong to; name it with --dataset"
        )
    class_of(dataset)
    root = given
    if root is None:
        candidates = [Path(p) for p in (run.root if run else None, DATASETS[dataset].default_root) if p]
        root = next((path for path in candidates if path.is_dir()), None)
    if root is None:
        raise ValueError(
            f"{request.fake}: the data that the images belong to are not at {candidates[0]}; name them with"
            " --real and --labels"
        )
    both = root_near(root, dataset)
    if not (request.real and request.labels) and not is_root(both, dataset):
        raise ValueError(f"{root} is no root of {dataset}, so name both --real and --labels")
    real, labels = request.real or both, request.labels or both
    return dataset, real, labels, request.split or (run.val_split if run else "val")


def guess(items: Sequence[Item], root: Path | None) -> str | None:
    """The data set by a tree's own card, or by the palette of the maps."""
    if root is not None and renderer_near(root):
        return "streets"
    palette = items[0].picture.settings.get("palette")
    return palette if palette in DATASETS else None


def root_near(path: Path, dataset: str) -> Path:
    """The root of the data set that a folder belongs to; the folder itself if there is none."""
    resolved = path.resolve()
    return next((p for p in [resolved, *list(resolved.parents)[:3]] if is_root(p, dataset)), path)


def evaluate(request: Request) -> Findings | None:
    """Measure, or compute one shard of several, which gives no figure yet."""
    started = time.monotonic()
    found = prepare(request)
    works = build_works(found, request)
    digests = Digests()

    def measure(items: Sequence[Item], some: Sequence[Work], what: str) -> dict[str, list[Path]]:
        if not some or not items:
            return {}
        options: dict[str, Any] = {"cache": request.cache, "digests": digests, "shard": request.shard}
        return run_pass(items, some, found.reader, what=what, **options)

    real = measure(found.real, works.features, "real images")
    ceiling = measure(found.paired, works.segmentation, "ceiling")
    fake = measure(found.fake, [*works.features, *works.segmentation], "generated images")
    pairs = measure(found.samples, works.diversity, "pairs of samples")
    if request.shard.count > 1:
        return None
    metrics: Card = {}
    for metric, work in FRECHET.items():
        if metric in works.metrics:
            metrics[metric] = frechet_card(real[work], fake[work])
    if "kid" in works.metrics:
        metrics["kid"] = kid_card(found.protocol, real["inception"], fake["inception"])
    if "diversity" in works.metrics:
        metrics["diversity"] = diversity_card(pairs["diversity"], found.protocol)
    margins = confusion = None
    if works.segmentation:
        margins = np.concatenate(list(rows_of(fake["segmentation"], "margins")))
        confusion = np.sum([m[0] for m in rows_of(fake["segmentation"], "confusion")], axis=0)
        metrics["segmentation"] = segmenter_card(found, margins, ceiling["segmentation"])
    card = make_card(found, works, digests, metrics, time.monotonic() - started)
    return Findings(card, found, works, margins, confusion)


def frechet_card(real: Sequence[Path], fake: Sequence[Path]) -> Card:
    """Frechet distance of the features of two sets."""
    a, b = (moments_of(rows_of(places, "features")) for places in (real, fake))
    return {
        "distance": frechet_distance(a, b),
        "real": a.count,
        "generated": b.count,
        "features": len(a.mean),
    }


def kid_card(protocol: Protocol, real: Sequence[Path], fake: Sequence[Path]) -> Card:
    """Kernel distance."""
    parts = (rows_of(places, "features") for places in (real, fake))
    return kernel_distance(*parts, subsets=protocol.kid_subsets, subset_size=protocol.kid_subset_size)


def diversity_card(places: Sequence[Path], protocol: Protocol) -> Card:
    """Mean over maps of the mean distance of their pairs."""
    distances = np.concatenate(list(rows_of(places, "distances")))
    rows = np.stack([distances, np.ones_like(distances)], axis=1)
    found = bootstrap_interval(rows, mean_of_rows, resamples=protocol.resamples)
    return {"lpips": float(distances.mean()), "interval": [found.low, found.high], "maps": len(distances)}


def mean_of_rows(sums: NDArray[np.number]) -> NDArray[np.float64]:
    """(R, 2) sums and counts -> (R,)."""
    return np.asarray(sums[:, 0] / sums[:, 1], np.float64)


def segmenter_card(found: Evaluation, margins: Margins, ceiling: Sequence[Path]) -> Card:
    """Ours beside the ceiling."""
    photos = np.concatenate(list(rows_of(ceiling, "margins")))
    height, width = found.reader.size
    ours, theirs = ([item.key for item in items] for items in (found.fake, found.paired))
    options = {"pixels": height * width, "resamples": found.protocol.resamples}
    return beside_ceiling((margins, ours), (photos, theirs), found.reader.space.names, **options)


def make_card(found: Evaluation, works: Works, digests: Digests, metrics: Card, seconds: float) -> Card:
    """Everything that determines the figures, and the figures."""
    return {
        "protocol": frozen_part(found.protocol, found.dataset),
        "metrics": metrics,
        "left_out": works.left_out,
        "measured_by": works.measured_by,
        "real": data_card(found.real, digests, "images"),
        "ceiling_images": data_card(found.paired, digests, "images"),
        "maps": data_card(found.fake, digests, "labels"),
        "generated": fake_card(found.fake, found.samples, digests),
        "generation": generation_card(found.samples),
        "leaks": found.leaks,
        "renderer": renderer_near(found.labels_root),
        "versions": environment(),
        "seconds": round(seconds, 1),
    }
