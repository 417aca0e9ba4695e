"""Rare class sampling against the formula, by chi-square, and DAFormer's three files."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_runs import write_frame

from datasets.cityscapes import CityscapesDataset
from datasets.rare_classes import (
    ClassStatistics,
    RareClassFrames,
    class_chances,
    draw_rare_classes,
    measure_classes,
)
from datasets.stream import Stream

KEYS = [f"ulm_00000{i}_000019" for i in range(4)]
ROAD, POLE, CAR, TRAIN = 7, 17, 26, 31
AREAS = [{POLE: 100, CAR: 1000}, {CAR: 2000}, {TRAIN: 400}, {POLE: 600, TRAIN: 30}]  # the rest is road


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four frames whose classes have known areas, each a run of pixels somewhere."""
    rng = np.random.default_rng(0)
    for key, areas in zip(KEYS, AREAS, strict=True):
        ids = np.full(64 * 128, ROAD, np.uint8)
        start = 0
        for file_id, area in areas.items():
            start += int(rng.integers(50, 500))
            ids[start : start + area] = file_id
            start += area
        write_frame(tmp_path, "train", key, np.zeros((64, 128, 3), np.uint8), ids.reshape(64, 128))
    return tmp_path


def build(tree: Path, **options: object) -> CityscapesDataset:
    return CityscapesDataset(tree, size=(64, 64), **options)


def test_statistics_are_the_areas_of_the_maps_in_the_files_of_daformer(tree: Path) -> None:
    statistics = measure_classes(build(tree))
    statistics.write(tree)
    train_ids = {ROAD: "0", POLE: "5", CAR: "13", TRAIN: "16"}
    by_frame = json.loads((tree / "sample_class_stats.json").read_text())
    by_path = json.loads((tree / "sample_class_stats_dict.json").read_text())
    by_class = json.loads((tree / "samples_with_class.json").read_text())
    for row, areas in zip(by_frame, AREAS, strict=True):
        expected = {train_ids[k]: area for k, area in areas.items()} | {"0": 64 * 128 - sum(areas.values())}
        assert {k: v for k, v in row.items() if k != "file"} == expected == by_path[row["file"]]
    assert by_class["16"] == [[by_frame[2]["file"], 400], [by_frame[3]["file"], 30]]
    assert set(by_class) == set(train_ids.values())
    again = ClassStatistics.read(tree, 19)
    assert again.files == statistics.files
    np.testing.assert_array_equal(again.counts, statistics.counts)


def test_chances_are_the_softmax_of_the_paper() -> None:
    shares, temperature = np.array([0.9, 0.07, 0.02, 0.01]), 0.05
    scores = [math.exp((1 - share) / temperature) for share in shares]
    found = class_chances(shares, np.full(4, True), temperature)
    np.testing.assert_allclose(found, np.array(scores) / sum(scores))
    present = np.array([True, False, True, True])
    kept = [score * here for score, here in zip(scores, present, strict=True)]
    np.testing.assert_allclose(class_chances(shares, present, temperature), np.array(kept) / sum(kept))
    assert np.isfinite(class_chances(shares, present, 1e-4)).all()


def test_classes_and_frames_come_as_often_as_the_formula_says(tree: Path) -> None:
    dataset = build(tree)
    frames = RareClassFrames(dataset, measure_classes(dataset), temperature=0.2, least_pixels=50)
    total = 4 * 64 * 128
    shares = {k: sum(areas.get(k, 0) for areas in AREAS) / total for k in (POLE, CAR, TRAIN)}
    shares[ROAD] = 1 - sum(shares.values())
    weights = {k: math.exp((1 - share) / 0.2) for k, share in shares.items()}
    holders = {ROAD: [0, 1, 2, 3], POLE: [0, 3], CAR: [0, 1], TRAIN: [2]}  # 30 pixels are too few
    chance = dict.fromkeys(KEYS, 0.0)
    for k, numbers in holders.items():
        for i in numbers:
            chance[KEYS[i]] += weights[k] / sum(weights.values()) / len(numbers)
    stream, draws = Stream(frames, seed=0, length=3000), 1500
    counts = Counter(stream[n]["key"] for n in range(draws))
    chi_square = sum((counts[key] - draws * p) ** 2 / (draws * p) for key, p in chance.items())
    assert chi_square < 16.3  # the 0.1 % point for 3 degrees of freedom


def test_a_window_shows_the_class_that_was_drawn(tree: Path) -> None:
    dataset = build(tree, crop="random", zoom=(1.5, 1.5), flip=0.5)
    frames = RareClassFrames(dataset, measure_classes(dataset), temperature=0.0001, least_pixels=300)
    places = set()
    for n in range(40):  # so low a temperature that the rarest class alone is drawn
        sample = Stream(frames, seed=1, length=40)[n]
        assert sample["key"] == KEYS[2]
        shown = np.argwhere(sample["label"] == 16)
        assert len(shown)
        places.add((len(shown), *shown.min(axis=0).tolist()))
    assert len(places) > 10, "not always at the same place"
    stream, again = (Stream(frames, seed=1, length=40) for _ in range(2))
    np.testing.assert_array_equal(stream[7]["label"], again[7]["label"])


def test_a_thin_class_survives_the_resizing_of_its_window(tmp_path: Path) -> None:
    ids = np.full((512, 512), ROAD, np.uint8)
    ids[:, 300] = POLE  # every fourth column of a window is seen
    for kind, suffix, array in (
        ("leftImg8bit", "", np.zeros((512, 512, 3), np.uint8)),
        ("gtFine", "_labelIds", ids),
    ):
        path = tmp_path / kind / "train" / "ulm" / f"{KEYS[0]}_{kind}{suffix}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(array).save(path)
    dataset = build(tmp_path, crop="random", zoom=(2.0, 2.0))
    shown = [5 in dataset.sample(0, np.random.default_rng(n), shown=5)["label"] for n in range(60)]
    assert np.mean(shown) > 0.8


def test_statistics_are_counted_once_and_kept_beside_the_data(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = draw_rare_classes(build(tree), least_pixels=50)
    monkeypatch.setattr("datasets.rare_classes.measure_classes", None)
    second = draw_rare_classes(build(tree), least_pixels=50)
    np.testing.assert_array_equal(first.chances, second.chances)


def test_a_damaged_frame_does_not_stop_a_run(tree: Path) -> None:
    dataset = build(tree)
    frames = RareClassFrames(dataset, measure_classes(dataset), temperature=0.2, least_pixels=50)
    (tree / f"leftImg8bit/train/ulm/{KEYS[2]}_leftImg8bit.png").write_bytes(b"")
    stream = Stream(frames, seed=0, length=60)
    assert {stream[n]["key"] for n in range(60)} == {KEYS[0], KEYS[1], KEYS[3]}


def test_a_window_at_the_centre_stays_there(tree: Path) -> None:
    dataset = build(tree, crop="centre")
    frames = RareClassFrames(dataset, measure_classes(dataset), temperature=0.0001, least_pixels=300)
    assert len({frames.sample(0, np.random.default_rng(n))["label"].tobytes() for n in range(20)}) == 1


def test_maps_that_changed_are_named(tree: Path) -> None:
    dataset = build(tree)
    frames = RareClassFrames(dataset, measure_classes(dataset), temperature=0.0001, least_pixels=300)
    Image.new("L", (128, 64), ROAD).save(dataset.pairs[2].labels)
    with pytest.raises(ValueError, match=f"{KEYS[2]}.*expected train id 16, as the class statistics say"):
        frames.sample(0, np.random.default_rng(0))


def test_what_does_not_fit_is_said_in_a_sentence(tree: Path) -> None:
    statistics = measure_classes(build(tree))
    with pytest.raises(ValueError, match="expected frames with more than 100000 pixels"):
        RareClassFrames(build(tree), statistics, least_pixels=100_000)
    fewer = ClassStatistics(statistics.files[:3], statistics.counts[:3])
    with pytest.raises(ValueError, match=f"expected statistics of all 4 frames, found none of {KEYS[3]}"):
        RareClassFrames(build(tree), fewer)
    (tree / "sample_class_stats_dict.json").write_text(json.dumps({"a.png": {"25": 3}}))
    with pytest.raises(ValueError, match=r"expected pixels by train id \(0\.\.18\) by label file"):
        draw_rare_classes(build(tree))
    with pytest.raises(ValueError, match="expected a data set with label maps for rare classes, found list"):
        draw_rare_classes([])
