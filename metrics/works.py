"""Which metrics of a protocol can be computed here, and with what; for each other one the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cldm.model import find_device
from metrics.blocks import Work
from metrics.features import FeatureWork, inception_work
from metrics.image_sets import Item
from metrics.judge import StreetsJudge
from metrics.local_weights import MissingWeights, find_weights
from metrics.protocol import FEWEST
from metrics.segmenters import (
    OneJudgement,
    SegmentationWork,
    TransformersSegmenter,
    from_images,
    from_maps,
    hash_of,
    kind_of,
)

if TYPE_CHECKING:
    from metrics.evaluation import Evaluation, Request


@dataclass
class Works:
    """What is computed in the passes."""

    metrics: list[str] = field(default_factory=list)
    features: list[Work] = field(default_factory=list)
    segmentation: list[SegmentationWork] = field(default_factory=list)
    diversity: list[Work] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # by metric: why
    measured_by: dict[str, Any] = field(default_factory=dict)  # by metric: networks with their hashes


class LeftOut(Exception):
    """Why a metric cannot be computed here."""


def build_works(found: Evaluation, request: Request) -> Works:
    """Load what each metric needs; a metric that lacks something is left out, with the reason."""
    builder = Builder(found, request)
    for metric in found.protocol.metrics:
        try:
            builder.build(metric)
        except (LeftOut, MissingWeights) as reason:
            builder.works.left_out[metric] = str(reason)
    if not builder.works.metrics:
        reasons = "; ".join(f"{name}: {why}" for name, why in builder.works.left_out.items())
        raise ValueError(f"no metric of protocol {found.protocol.name} can be computed: {reasons}")
    return builder.works


class Builder:
    """Builds works one by one; what two of them share is loaded once."""

    def __init__(self, found: Evaluation, request: Request) -> None:
        self.found, self.request, self.works = found, request, Works()
        self.device = find_device(request.device)
        self.space = found.reader.space
        self.seen = {"size": list(found.reader.size), "resize": found.protocol.resize}
        self.judgement: OneJudgement | None = None
        self.inception: FeatureWork | None = None

    def build(self, metric: str) -> None:
        """Add a metric.

        Raises
            LeftOut, MissingWeights  it cannot be computed here
        """
        self.check_counts(metric)
        builders: dict[str, Callable[[], dict[str, Any]]] = {
            "fid": self.build_inception,
            "kid": self.build_inception,
            "segmentation": self.build_segmentation,
            "diversity": self.build_diversity,
            "streets_features": self.build_judge_features,
        }
        self.works.measured_by[metric] = builders[metric]()
        self.works.metrics.append(metric)

    def check_counts(self, metric: str) -> None:
        """Enough images."""
        least = getattr(self.found.protocol.least, metric)
        if metric == "diversity":
            several = sum(count > 1 for count in Counter(item.key for item in self.found.samples).values())
            if several < least:
                raise LeftOut(
                    f"expected {least} maps with 2 samples or more, found {several}; generate.py --num 2"
                )
            return
        real = self.found.paired if metric == "segmentation" else self.found.real
        if min(len(real), len(self.found.fake)) < least:
            hint = "; --allow_few computes it nevertheless" if least > FEWEST else ""
            raise LeftOut(
                f"expected {least} real and {least} generated images or more, found {len(real)} and"
                f" {len(self.found.fake)}{hint}"
            )

    def build_inception(self) -> dict[str, Any]:
        """Features for FID and KID."""
        path = find_weights("inception", self.request.weights.get("inception"))
        if self.inception is None:
            layer = self.found.protocol.inception_layer
            self.inception = inception_work(path, layer, self.device, self.seen)
            self.works.features.append(self.inception)
        return {"file": path.name, **self.inception.identity}

    def build_diversity(self) -> dict[str, Any]:
        """LPIPS of pairs."""
        from metrics.diversity import DiversityWork

        path = find_weights("alexnet", self.request.weights.get("alexnet"))
        work = DiversityWork(path, self.device, self.found.protocol.diversity_samples, self.seen)
        self.works.diversity.append(work)
        return {"file": path.name, **work.identity}

    def build_judge_features(self) -> dict[str, Any]:
        """Features of the Streets judge."""
        path = find_weights("judge", self.judge_file())
        identity = {**self.seen, "judge": hash_of(path)}
        self.works.features.append(FeatureWork("judge_features", self.judge(path).features, identity))
        return identity

    def build_segmentation(self) -> dict[str, Any]:
        """The segmenter of the protocol, or another one that was named."""
        if lost := lacking_photo(self.found.fake, self.found.paired):
            raise LeftOut(f"no real image belongs to the map {lost}, so there is no ceiling; check --real")
        identity: dict[str, Any] = {
            **self.seen,
            "label_space": self.space.name,
            "labels_hold": self.request.labels_hold,
            "dataset": self.found.dataset,
        }
        given, config = self.request.weights.get("segmenter"), self.found.track.segmenter
        if self.found.predicted:
            segment = from_maps(self.space)
            what: dict[str, Any] = {"maps": "predicted elsewhere"}
        elif given is None and config.kind == "maps":
            raise LeftOut(
                f"protocol {self.found.protocol.name} takes maps that a segmenter elsewhere predicted: name"
                " them with --predicted and --predicted_real, or a segmenter with --segmenter"
            )
        else:
            path = given or find_weights(str(config.weights))
            kind, what = kind_of(path), hash_of(path)
            segmenter = (
                self.judge(path).labels
                if kind == "judge"
                else TransformersSegmenter(path, self.space, self.device)
            )
            segment = from_images(segmenter)
        identity = {**identity, "segmenter": what}
        self.works.segmentation.append(SegmentationWork(segment, self.space, identity))
        return identity

    def judge(self, path: Path) -> OneJudgement:
        """The judge, loaded once."""
        if self.judgement is None:
            self.judgement = OneJudgement(StreetsJudge.load(path, self.device))
        return self.judgement

    def judge_file(self) -> Path | None:
        """A judge that was named as the segmenter."""
        given = self.request.weights.get("segmenter")
        return given if given is not None and kind_of(given) == "judge" else None


def lacking_photo(fake: Sequence[Item], paired: Sequence[Item]) -> str | None:
    """A map that was sampled and has no real image."""
    known = {item.key for item in paired}
    return next((item.key for item in fake if item.key not in known), None)
