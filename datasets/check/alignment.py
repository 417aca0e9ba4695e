"""Whether a photo and a label map show the same scene: a photo changes where its map has boundaries.

Both are seen on a small grid as steps to the right and down: of the map whether the id changes, of the photo
the rank of its colour step. What frames of a split have in common is subtracted from both, so that the scores
(correlations) of photos with foreign maps scatter around zero, however alike the scenes are laid out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from datasets.label_space import RawIds, Rgb, resize_labels

GRID = (96, 192)
LEAST_EDGES = 200  # of a map on the grid; below that a score says little
LEAST_REFERENCES = 3  # frames
# Calibrated on 500 rendered street scenes, where own maps score 0.16 and more and foreign ones 0.12 and less;
# on a few real photos own ones score 0.11 to 0.27 and foreign ones 0.03 and less.
BETTER = 0.06  # by how much another map has to fit better than the own one
ABOVE_STRANGERS = 0.03  # and than any map that has nothing to do with the photo
SUSPECTS_KEPT = 500
_STRANGERS = 3

Steps = NDArray[np.uint8]  # (2, *GRID): to the right and down
Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Outline:
    """What alignment needs of one frame, in 74 kB; few frames are kept at a time."""

    photo: Steps  # ranks 0..255
    labels: Steps  # 0 or 1


@dataclass(frozen=True)
class Fit:
    """How well a photo fits its own map, and others."""

    own: float
    mirrored: float  # its own map, mirrored
    strangers: tuple[float, ...]  # maps of other frames, the best few, best first

    @property
    def is_clear(self) -> bool:
        """Whether its own map fits so much better than all others that nothing needs a second look."""
        return self.own > max(self.strangers[0], self.mirrored) + ABOVE_STRANGERS

    @property
    def is_poor(self) -> bool:
        """Whether several maps of other frames fit better than its own."""
        return self.own < self.strangers[-1]

    def is_beaten_by(self, score: float) -> bool:
        """Whether another map fits so much better than its own that it must be the right one.

        That one may itself be the best of the strangers, so it is held against the next.
        """
        return score > self.own + BETTER and score > self.strangers[1] + ABOVE_STRANGERS


def outline(photo: Rgb, ids: RawIds) -> Outline | None:
    """The outline of a frame of any size; None where the map has hardly any boundaries."""
    small = resize_labels(ids, GRID)
    labels = np.zeros((2, *GRID), np.uint8)
    labels[0, :, :-1] = small[:, 1:] != small[:, :-1]
    labels[1, :-1] = small[1:] != small[:-1]
    if labels.sum() < LEAST_EDGES:
        return None
    shrunk = np.asarray(cv2.resize(photo, GRID[::-1], interpolation=cv2.INTER_AREA))
    steps = np.zeros((2, *GRID), np.uint8)
    steps[0, :, :-1] = cv2.absdiff(shrunk[:, 1:], shrunk[:, :-1]).max(axis=2)
    steps[1, :-1] = cv2.absdiff(shrunk[1:], shrunk[:-1]).max(axis=2)
    return Outline(_ranks(steps), labels)


class References:
    """Frames of a split that others are compared with; their mirror images serve as well."""

    def __init__(self, outlines: Sequence[Outline]) -> None:
        """Of `LEAST_REFERENCES` outlines or more."""
        outlines = list({item.labels.tobytes(): item for item in outlines}.values())
        labels = np.stack([item.labels for item in outlines]).astype(np.float32)
        self.mean_labels = _flat(np.concatenate([labels, _mirror(labels)]).mean(axis=0))
        photos = np.stack([_squares(item.photo) for item in outlines])
        self.mean_photo = _flat(photos.mean(axis=0))
        self.known = [item.labels.tobytes() for item in outlines]
        vectors = [self.of_labels(part) for item in outlines for part in (item.labels, _mirror(item.labels))]
        self.vectors = np.stack(vectors)

    def fit(self, frame: Outline) -> Fit | None:
        """Scores of a photo with its own map and with those of the references that are not the same map.

        None where almost all references have that same map.
        """
        photo, own = self.of_photo(frame.photo), frame.labels.tobytes()
        scores = (self.vectors @ photo).reshape(-1, 2)
        strangers = np.sort(scores[[known != own for known in self.known]].ravel())[::-1]
        if len(strangers) < _STRANGERS:
            return None
        mirrored = float(self.of_labels(_mirror(frame.labels)) @ photo)
        best = tuple(float(score) for score in strangers[:_STRANGERS])
        return Fit(float(self.of_labels(frame.labels) @ photo), mirrored, best)

    def of_photo(self, steps: Steps) -> Vector:
        """A photo as a vector of length 1."""
        return _unit(_flat(_squares(steps)) - self.mean_photo)

    def of_labels(self, steps: NDArray) -> Vector:
        """A map as a vector of length 1."""
        return _unit(_flat(steps.astype(np.float32)) - self.mean_labels)


def find_partners(references: References, suspects: Sequence[tuple[Outline, Fit]]) -> dict[int, int]:
    """For each suspect whose right map belongs to another suspect: the number of that one."""
    if len(suspects) < 2:
        return {}
    photos = np.stack([references.of_photo(frame.photo) for frame, _ in suspects])
    maps = np.stack([references.of_labels(frame.labels) for frame, _ in suspects])
    scores = photos @ maps.T
    np.fill_diagonal(scores, -1)
    best = scores.argmax(axis=1)
    return {
        i: int(j)
        for i, (j, (_, fit)) in enumerate(zip(best, suspects, strict=True))
        if fit.is_beaten_by(scores[i, j])
    }


def _ranks(steps: Steps) -> Steps:
    """Each step's share of smaller and equal ones, in 255ths, so that fog and glare make no difference."""
    below = np.cumsum(np.bincount(steps.ravel(), minlength=256))
    return (below * 255 // below[-1]).astype(np.uint8)[steps]


def _squares(ranks: Steps) -> Vector:
    """Squared ranks in 0..1: the strongest steps count most."""
    return (ranks.astype(np.float32) / np.float32(255)) ** 2


def _mirror(steps: NDArray) -> NDArray:
    """Steps of the mirrored picture; those to the right lie one place further left."""
    mirrored = steps[..., ::-1].copy()
    mirrored[..., 0, :, :] = np.roll(mirrored[..., 0, :, :], -1, axis=-1)
    return mirrored


def _flat(steps: NDArray) -> Vector:
    return np.asarray(steps, np.float32).ravel()


def _unit(vector: Vector) -> Vector:
    centred = vector - vector.mean()
    return centred / max(float(np.linalg.norm(centred)), 1e-9)
