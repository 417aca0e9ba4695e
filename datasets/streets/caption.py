"""The sentence that goes with a frame: what kind of picture, where, in what weather, and what is seen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

KINDS = {"camera": "a photo of", "game": "a game picture of"}
WEATHER = {
    "clear": "on a clear day",
    "rain": "in the rain",
    "fog": "in the fog",
    "snow": "in the snow",
    "night": "at night",
}
WORDS = {  # by label id; road, sidewalk and sky go without saying
    11: "buildings",
    12: "a wall",
    13: "a fence",
    19: "traffic lights",
    20: "traffic signs",
    21: "trees",
    22: "grass",
    24: "people",
    25: "riders",
    26: "cars",
    27: "a truck",
    28: "a bus",
    31: "a tram",
    32: "motorcycles",
    33: "bicycles",
}
LEAST = 0.004  # share of the image from which a class is named
LEAST_STUFF = 0.03  # of what is not a thing
STUFF = (11, 21, 22)
MOST = 5  # classes that are named


def main_classes(label_ids: NDArray[np.uint8]) -> list[int]:
    """Label ids of the classes that a caption names, the largest first."""
    share = np.bincount(label_ids.ravel(), minlength=256) / label_ids.size
    named = [i for i in WORDS if share[i] >= (LEAST_STUFF if i in STUFF else LEAST)]
    return sorted(named, key=lambda i: -share[i])[:MOST]


def compose_caption(place: str, domain: str, condition: str, label_ids: NDArray[np.uint8]) -> str:
    """Such as: a photo of a city street in the rain with buildings, cars and people."""
    words = [WORDS[i] for i in main_classes(label_ids)]
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    sentence = f"{KINDS[domain]} {place} {WEATHER[condition]}"
    return f"{sentence} with {listed}" if listed else sentence
