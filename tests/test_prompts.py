"""Prompts: sentences filled in by seed and key, against plain loops and chi-square."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.cityscapes import CityscapesDataset
from datasets.label_space import LabelSpace
from datasets.prompts import Prompts, classes_shown, read_captions

SPACE = LabelSpace.load("cityscapes")
MAP = np.array([[13, 13, 13, 0], [0, 255, 255, 255]], np.uint8)  # three of car, two of road
WEATHER = ["snowy", "rainy", "sunny", "foggy"]


def test_a_plain_sentence_stays_as_it_is() -> None:
    assert Prompts("City road scenes.").of("a", MAP, SPACE) == "City road scenes."
    assert Prompts("{{x}} and {classes}").of("a", MAP, SPACE) == "{x} and car, road"
    assert Prompts("{{x}}").of("a", MAP, SPACE) == "{x}"


def test_classes_come_by_area_and_void_is_none() -> None:
    assert classes_shown(MAP, SPACE) == ["car", "road"]
    rng = np.random.default_rng(0)
    ids = rng.choice([*range(19), 255], (40, 50)).astype(np.int64)
    areas = {SPACE.names[k]: int((ids == k).sum()) for k in range(19)}
    assert classes_shown(ids, SPACE) == sorted(areas, key=lambda name: -areas[name])
    assert classes_shown(np.full((2, 2), 255), SPACE) == []


def test_words_are_drawn_by_seed_and_key_alone() -> None:
    words = {"weather": WEATHER, "time": ["dawn", "noon"]}
    sentence = "A street with {classes}, in {weather} weather at {time}."
    first, again = (Prompts(sentence, words=words, seed=1) for _ in range(2))
    other = Prompts(sentence, words=words, seed=2)
    keys = [f"frame_{i}" for i in range(2000)]
    texts = [first.of(key, MAP, SPACE) for key in keys]
    assert texts == [again.of(key, MAP, SPACE) for key in keys]
    assert texts != [other.of(key, MAP, SPACE) for key in keys]
    assert all(text.startswith("A street with car, road, in ") for text in texts)
    pairs = Counter(tuple(text.split(" in ")[1].split(" weather at ")) for text in texts)
    assert len(pairs) == 8
    assert (
        sum((n - 250) ** 2 / 250 for n in pairs.values()) < 24.3
    )  # the 0.1 % point for 7 degrees of freedom


@pytest.mark.parametrize(
    ("sentence", "options", "said"),
    [
        ("in {wether}", {"words": {"weather": WEATHER}}, r"found \{wether\}; did you mean \{weather\}"),
        ("in {", {}, "expected names in braces"),
        ("{0}", {}, "expected plain names in braces"),
        ("{classes:>5}", {}, "expected plain names in braces"),
        ("{caption}", {}, "expected a caption file"),
        ("{weather}", {"words": {"weather": []}}, "expected words for {weather}, found none"),
    ],
)
def test_a_wrong_sentence_is_refused_before_anything_is_read(
    sentence: str, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Prompts(sentence, **options)


def test_captions_are_read_as_an_object_or_as_lines(tmp_path: Path) -> None:
    texts = {"a": "a tram", "b": "an alley"}
    (tmp_path / "object.json").write_text(json.dumps(texts))
    (tmp_path / "lines.jsonl").write_text(
        "".join(json.dumps({"key": k, "text": v}) + "\n" for k, v in texts.items())
    )
    assert read_captions(tmp_path / "object.json") == read_captions(tmp_path / "lines.jsonl") == texts
    (tmp_path / "one.jsonl").write_text('{"key": "a", "text": "a tram"}')
    assert read_captions(tmp_path / "one.jsonl") == {"a": "a tram"}
    for content, said in (
        ('{"a": 1}', "expected captions by key"),
        ('{"key": "a"}\n{}', r"bad:1: expected a JSON object"),
    ):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(ValueError, match=said):
            read_captions(tmp_path / "bad")


# -- in a data set -------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three frames: a road on the left half, a car on the right."""
    ids = np.where(np.arange(128) < 70, 7, 26).astype(np.uint8) + np.zeros((64, 1), np.uint8)
    for i in range(3):
        for kind, suffix, array in (
            ("leftImg8bit", "", np.zeros((64, 128, 3), np.uint8)),
            ("gtFine", "_labelIds", ids),
        ):
            path = tmp_path / kind / "train" / "ulm" / f"ulm_00000{i}_000019_{kind}{suffix}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    return tmp_path


def test_classes_are_those_of_the_window(tree: Path) -> None:
    dataset = CityscapesDataset(tree, size=(64, 64), prompt="{classes}", crop="random")
    texts = {dataset.sample(0, np.random.default_rng(seed))["txt"] for seed in range(40)}
    assert texts == {"road", "road, car", "car, road"}


def test_prompts_are_dropped_as_often_as_asked_and_never_in_a_still_split(tree: Path) -> None:
    dataset = CityscapesDataset(tree, size=(64, 64), drop_prompt=0.3)
    texts = [dataset.sample(0, np.random.default_rng(seed))["txt"] for seed in range(1000)]
    assert set(texts) == {"", "City road scenes."}
    assert abs(texts.count("") / 1000 - 0.3) < 0.05
    still = dataset.still("train")
    assert {still.sample(0, np.random.default_rng(seed))["txt"] for seed in range(30)} == {
        "City road scenes."
    }
    with pytest.raises(ValueError, match=r"expected a share of prompts that are dropped in 0\.\.1, found 2"):
        CityscapesDataset(tree, size=(64, 64), drop_prompt=2)


def test_a_frame_without_a_caption_is_named_at_the_start(tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.json"
    keys = [f"ulm_00000{i}_000019" for i in range(3)]
    file.write_text(json.dumps(dict.fromkeys(keys, "a tram")))
    dataset = CityscapesDataset(tree, size=(64, 64), prompt="{caption}, at noon", captions=file)
    assert dataset[1]["txt"] == "a tram, at noon"
    file.write_text(json.dumps({keys[0]: "a tram", keys[1]: " "}))
    with pytest.raises(
        ValueError,
        match=rf"texts.json, split train: expected a caption for {keys[1]}, found none \(2 in all\)",
    ):
        CityscapesDataset(tree, size=(64, 64), prompt="{caption}", captions=file)
