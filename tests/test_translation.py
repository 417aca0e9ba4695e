"""Label maps of one data set in the classes of another."""

from __future__ import annotations

import numpy as np
import pytest

from datasets.label_space import SPACES, LabelSpace, read_table
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


def test_the_nearest_name_counts_where_there_are_several() -> None:
    ours = named(CITYSCAPES, "sky", "vegetation", "terrain", "wall", "building", "sidewalk", "motorcycle")
    theirs = ("sky-other", "tree", "grass", "wall-other", "building-other", "pavement", "motorcycle")
    assert (translate(ours, CITYSCAPES, COCO).labels == named(COCO, *theirs)).all()
    panoptic = LabelSpace.load("coco_panoptic133")
    theirs = tuple(f"{x}-merged" for x in ("sky-other", "tree", "grass", "wall-other", "building-other"))
    expected = named(panoptic, *theirs, "pavement-merged", "motorcycle")
    assert (translate(ours, CITYSCAPES, panoptic).labels == expected).all()


def test_cityscapes_in_ade20k_is_as_its_published_table_has_it() -> None:
    rows = read_table("cityscapes_to_ade20k")
    labels = np.array([[int(row["trainId"]) for row in rows]], np.uint8)
    expected = [int(row["ade_trainId"]) for row in rows]
    assert translate(labels, CITYSCAPES, ADE20K).labels.tolist() == [expected]


def test_every_name_is_known_somewhere() -> None:
    names = [set(LabelSpace.load(name).names) for name in SPACES]
    for key, group in SAME.items():
        assert key in CITYSCAPES.names
        for name in group:
            assert any(name in known for known in names), f"no data set knows {name}"
