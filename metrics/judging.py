"""The judge's figures, each as a dictionary for a card: on photos, on reconstructions, on samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from datasets.label_space import LabelSpace, Rgb
from datasets.streets import CONDITIONS
from metrics.frechet import FeatureMoments, frechet_distance
from metrics.judge import AT_ONCE, Judgement, StreetsJudge
from metrics.judge_data import LabelledFrames, condition_in
from metrics.samples import Samples
from metrics.segmentation import (
    RESAMPLES,
    Counts,
    Interval,
    bootstrap_interval,
    confusion_matrices,
    score,
    sum_by,
)

Card = dict[str, Any]

LABEL_SPACE = "cityscapes"
THIN = ("pole", "person", "traffic light", "traffic sign")  # what an autoencoder loses first


@dataclass(frozen=True)
class Judged:
    """What the judge says of images with true maps."""

    counts: Counts  # (N, K, K)
    judgement: Judgement


def judge_all(judge: StreetsJudge, images: Rgb, truth: NDArray[np.uint8], what: str) -> Judged:
    """Judge (N, H, W, 3) images against their maps (N, H, W), with a progress bar."""
    parts = []
    with tqdm(total=len(images), desc=what, unit="image") as bar:
        for i in range(0, len(images), AT_ONCE):
            parts.append(judge.judge(images[i : i + AT_ONCE]))
            bar.update(len(parts[-1].labels))
    judgement = Judgement(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return Judged(count(truth, judgement), judgement)


def count(truth: NDArray[np.uint8], judgement: Judgement) -> Counts:
    """Confusion matrices of a judgement."""
    return confusion_matrices(truth, judgement.labels, LabelSpace.load(LABEL_SPACE).num_classes)


def segmentation_card(counts: Counts) -> Card:
    """Scores of all images together, classes by name, with the interval of the mean."""
    names, found = LabelSpace.load(LABEL_SPACE).names, score(counts)
    return {
        "images": len(counts),
        "miou": found.miou,
        "miou_interval": list(asdict(interval_of(counts)).values()),
        "resamples": RESAMPLES,
        "pixel_accuracy": found.pixel_accuracy,
        "class_accuracy": found.class_accuracy,
        "iou": dict(zip(names, found.iou, strict=True)),
        "absent": [names[k] for k in found.absent],
    }


def interval_of(counts: Counts) -> Interval:
    """Interval of the mean IoU; of a single image there is none, so it spans everything."""
    return bootstrap_interval(counts) if len(counts) > 1 else Interval(0.0, 1.0)


def condition_card(named: NDArray[np.int64], recognised: NDArray[np.int64]) -> Card:
    """How often the judge sees the condition that is meant, in all and for each of them."""
    right = named == recognised
    return {
        "images": len(named),
        "accuracy": float(right.mean()),
        "by_condition": {
            name: float(right[named == i].mean()) for i, name in enumerate(CONDITIONS) if (named == i).any()
        },
    }


def ratios(ours: Card, ceiling: Card) -> Card:
    """Our scores as parts of the ceiling's, in all and by class; None where the ceiling is 0 or missing."""
    by_class = {
        name: None if not ceiling["iou"][name] else (ours["iou"][name] or 0.0) / ceiling["iou"][name]
        for name in ceiling["iou"]
    }
    return {"miou": ours["miou"] / ceiling["miou"] if ceiling["miou"] else None, "iou": by_class}


def real_card(judge: StreetsJudge, frames: LabelledFrames) -> Card:
    """The ceiling: the judge on photos."""
    judged = judge_all(judge, frames.images, frames.labels, "photos")
    return {
        "segmentation": segmentation_card(judged.counts),
        "condition": condition_card(frames.conditions, judged.judgement.conditions),
    }


def reconstruction_card(judge: StreetsJudge, frames: LabelledFrames, reconstructed: Rgb) -> Card:
    """The judge on photos that went through an autoencoder, beside the photos themselves."""
    originals = real_card(judge, frames)
    judged = judge_all(judge, reconstructed, frames.labels, "reconstructions")
    ours = segmentation_card(judged.counts)
    return {
        "originals": originals,
        "segmentation": ours,
        "ratio": ratios(ours, originals["segmentation"]),
        "condition": condition_card(frames.conditions, judged.judgement.conditions),
    }


def samples_card(judge: StreetsJudge, samples: Samples, real: LabelledFrames) -> Card:
    """The judge on samples: against their maps, against other maps, beside the photos of the same maps.

    Samples of one map are no independent images, so intervals are over maps.

    real  every frame of the split; the feature distance is to all of its photos
    """
    rows = rows_of(samples.keys, real.keys)
    maps = sorted(set(rows))
    photos = judge_all(judge, real.images, real.labels, "photos")
    ours = judge_all(judge, samples.images, real.labels[rows], "samples")
    others = count(real.labels[shuffled(rows, maps)], ours.judgement)
    matched, mismatched = (sum_by(counts, samples.keys) for counts in (ours.counts, others))
    right, wrong = segmentation_card(matched), segmentation_card(mismatched)
    ceiling = segmentation_card(photos.counts[maps])
    return {
        "samples": len(samples),
        "maps": len(maps),
        "ceiling": ceiling,
        "segmentation": right,
        "ratio": ratios(right, ceiling),
        "shuffled": wrong,
        "intervals_disjoint": interval_of(matched).is_apart_from(interval_of(mismatched)),
        "condition": prompt_card(samples.prompts, ours.judgement.conditions),
        "feature_distance": distance_card(ours.judgement.features, photos.judgement.features),
    }


def rows_of(keys: Sequence[str], known: Sequence[str]) -> list[int]:
    """Where in `known` each key is; one that is not there is refused."""
    places = {key: i for i, key in enumerate(known)}
    if lost := [key for key in keys if key not in places]:
        raise ValueError(
            f"expected samples of validation maps such as {known[0]}, found one of {lost[0]}; name the"
            " tree whose maps they were made from with --labels"
        )
    return [places[key] for key in keys]


def shuffled(rows: Sequence[int], maps: Sequence[int]) -> list[int]:
    """For each sample the map of another one: half way round, the same for all samples of a map."""
    if len(maps) < 2:
        raise ValueError(
            "expected samples of at least 2 maps, as they are held against each other's; found 1"
        )
    other = {row: maps[(i + len(maps) // 2) % len(maps)] for i, row in enumerate(maps)}
    return [other[row] for row in rows]


def prompt_card(prompts: Sequence[str], recognised: NDArray[np.int64]) -> Card | None:
    """Of the samples whose prompt names a condition, how many show it; None if no prompt does."""
    named = [condition_in(prompt) for prompt in prompts]
    kept = [i for i, condition in enumerate(named) if condition is not None]
    if not kept:
        return None
    return condition_card(np.array([named[i] for i in kept]), recognised[kept])


def distance_card(samples: NDArray[np.float32], photos: NDArray[np.float32]) -> Card:
    """Streets feature distance of samples from photos, and of one half of the photos from the other.

    The second says what the number is when there is no difference: with few images it is not zero.
    """
    half = [FeatureMoments.of(photos[start::2]) for start in (0, 1)]
    return {
        "name": "Streets feature distance",
        "distance": frechet_distance(FeatureMoments.of(samples), FeatureMoments.of(photos)),
        "between_halves_of_the_photos": frechet_distance(*half),
        "samples": len(samples),
        "photos": len(photos),
        "features": photos.shape[1],
    }
