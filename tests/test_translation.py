"""Label maps of one data set in the classes of another."""

from __future__ import annotations

import numpy as np
import pytest

from datasets.label_space import SPACES, LabelSpace
from datasets.translation import SAME, translate

CITYSCAPES, ADE20K, COCO = (LabelSpace.load(name) for name in ("cityscapes", "ade20k", "cocostuff"))


def named(space: LabelSpace, *names: str) -> np.ndarray:
    return np.array([[space.names.index(name) for name in names]], np.uint8)


@pytest.mark.parametrize("name", SPACES)
def test_a_space_in_itself_is_as_it_was(name: str) -> None:
    space = LabelSpace.load(name)
    labels = np.array([[*range(space.num_classes), 255]], np.uint8)
    assert (translate(labels, space, LabelSpace.load(name)).labels == labels).all()


def test_classes_go_by_name_and_by_names_that_mean_the_same() -> None:
    theirs = named(ADE20K, "road", "sidewalk", "tree", "minibike", "house", "van", "sky", "grass", "car")
    ours = ("road", "sidewalk", "vegetation", "motorcycle", "building", "truck", "sky", "terrain", "car")
    found = translate(theirs, ADE20K, CITYSCAPES)
    assert (found.labels == named(CITYSCAPES, *ours)).all()
    assert (found.lost, found.lost_names) == (0.0, ())
    theirs = named(COCO, "pavement", "sky-other", "clouds", "wall-brick", "person")
    ours = ("sidewalk", "sky", "sky", "wall", "person")
    assert (translate(theirs, COCO, CITYSCAPES).labels == named(CITYSCAPES, *ours)).all()


def test_what_has_no_counterpart_is_void_and_counted_and_void_stays_void() -> None:
    theirs = np.concatenate([named(ADE20K, "bed", "bed", "bed", "bathtub", "road", "road"), [[255, 255]]], 1)
    found = translate(theirs.astype(np.uint8), ADE20K, CITYSCAPES)
    assert (found.labels == [[255, 255, 255, 255, 0, 0, 255, 255]]).all()
    assert (found.lost, found.lost_names) == (0.5, ("bed", "bathtub"))


def test_every_group_has_a_member_in_two_spaces_and_a_class_of_cityscapes_for_its_name() -> None:
    names = [set(LabelSpace.load(name).names) for name in SPACES]
    for key, group in SAME.items():
        assert key in CITYSCAPES.names
        assert sum(bool(known & {key, *group}) for known in names) >= 2
        for name in group:
            assert any(name in known for known in names), f"no data set knows {name}"
