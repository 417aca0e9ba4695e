"""Rows of target, control and prompt, from lists and folders; circles in the layout of fill50k."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageColor

import tutorial_dataset
from datasets import create_dataset
from datasets.fill50k import COLOURS, LIST, Fill50kDataset, make_fill50k
from datasets.triples import TriplesDataset


def picture(number: int, side: int = 64) -> np.ndarray:
    """Every pixel has its own colour, but for the number of its picture."""
    y, x = np.mgrid[:side, :side]
    return np.stack([y, x, np.full_like(x, number)], axis=2).astype(np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    """Write an image with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three rows in folders, one of them for validation, with label maps of Cityscapes."""
    for split, number in (("train", 1), ("train", 2), ("val", 3)):
        save(tmp_path / split / f"target/{number}.png", picture(number))
        save(tmp_path / split / f"control/{number}.png", picture(number)[::-1])
        save(tmp_path / split / f"label/{number}.png", np.full((64, 64), 7, np.uint8))
        (tmp_path / split / "prompt").mkdir(exist_ok=True)
        (tmp_path / split / f"prompt/{number}.txt").write_text(f"picture {number}\n")
    return tmp_path


def check_second(dataset: TriplesDataset) -> None:
    """The second row is that of picture 2."""
    assert len(dataset) == 2
    sample = dataset[1]
    assert (sample["txt"], sample["key"]) == ("picture 2", "2")
    np.testing.assert_allclose(sample["jpg"], picture(2) / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(sample["hint"], picture(2)[::-1] / 255, atol=1e-6)


def test_folders_pair_by_stem(folders: Path) -> None:
    check_second(TriplesDataset(folders))
    assert TriplesDataset(folders, "val")[0]["txt"] == "picture 3"
    check_second(TriplesDataset(folders / "train"))
    assert TriplesDataset(folders).still("val")[0]["key"] == "3"


@pytest.mark.parametrize(
    "columns", [("target", "control", "prompt"), ("image", "conditioning_image", "text")]
)
@pytest.mark.parametrize("name", ["train.jsonl", "train/metadata.jsonl", "metadata.jsonl"])
def test_lists_have_the_columns_of_the_field(folders: Path, columns: tuple[str, ...], name: str) -> None:
    path = folders / name
    parent = "" if path.parent.name == "train" else "train/"
    rows = [(f"{parent}target/{n}.png", f"{parent}control/{n}.png", f"picture {n}") for n in (1, 2)]
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    check_second(TriplesDataset(folders))


def test_labels_come_along_and_name_their_classes(folders: Path) -> None:
    dataset = create_dataset(
        "triples", root=folders, label_space="cityscapes", prompt="{caption} of {classes}"
    )
    sample = dataset[0]
    assert sample["txt"] == "picture 1 of road"
    assert (sample["label"].dtype, np.unique(sample["label"]).tolist()) == (np.int64, [0])
    assert "label" not in TriplesDataset(folders)[0]
    with pytest.raises(ValueError, match=r"expected a label_space for \{classes\}"):
        TriplesDataset(folders, prompt="{classes}")
    (folders / "train/label/1.png").unlink()
    with pytest.raises(ValueError, match=r"expected a label map for each of 2 rows.*found 1"):
        TriplesDataset(folders, label_space="cityscapes")


def test_target_control_and_label_are_cut_as_one(folders: Path) -> None:
    ids = np.where(np.arange(64)[:, None] < 32, 7, 8).astype(np.uint8).repeat(64, axis=1)
    save(folders / "train/label/1.png", ids)
    save(folders / "train/control/1.png", picture(1))
    options = {"crop": "random", "zoom": (2.0, 2.0), "flip": 0.5, "label_space": "cityscapes"}
    dataset = TriplesDataset(folders, size=(64, 64), **options)
    for seed in range(20):
        sample = dataset.sample(0, np.random.default_rng(seed))
        rows, columns = np.round(sample["hint"] * 255)[..., :2].transpose(2, 0, 1)
        np.testing.assert_array_equal(sample["label"], np.where(rows < 32, 0, 1))
        found = np.round((sample["jpg"] + 1) * 127.5)
        assert np.abs(found[..., 0] - rows).max() <= 1, "enlarged linearly, the control to the nearest"
        assert np.abs(found[..., 1] - columns).max() <= 1


def test_what_is_missing_is_named(folders: Path, tmp_path: Path) -> None:
    (folders / "train/prompt/2.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train/prompt: expected a file for each target.* none for 2"
    ):
        TriplesDataset(folders)
    with pytest.raises(
        FileNotFoundError, match=r"rows of split 'test' in test\.jsonl, .*or in folders target"
    ):
        TriplesDataset(folders, "test")
    (folders / "train.jsonl").write_text('{"target": "a.png"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl:1: expected a JSON object with the texts"):
        TriplesDataset(folders)
    (folders / "train.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="expected one JSON object a line, found none"):
        TriplesDataset(folders)


def test_equal_stems_in_two_folders_have_two_keys(tmp_path: Path) -> None:
    rows = []
    for folder in ("day", "night"):
        save(tmp_path / folder / "1.png", picture(1))
        rows.append({"target": f"{folder}/1.png", "control": f"{folder}/1.png", "prompt": folder})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = TriplesDataset(tmp_path)
    assert [dataset[i]["txt"] for i in range(2)] == ["day", "night"]
    rows.append({**rows[0], "prompt": "noon"})  # another text of the same target
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = TriplesDataset(tmp_path)
    assert [dataset[i]["txt"] for i in range(3)] == ["day", "night", "noon"]
    assert len({dataset[i]["key"] for i in range(3)}) == 3


def test_a_control_that_was_turned_is_refused(folders: Path) -> None:
    save(folders / "train/target/1.png", np.zeros((64, 128, 3), np.uint8))
    with pytest.raises(
        ValueError, match=r"control/1\.png: expected a map in the shape of its photo \(64x128"
    ):
        TriplesDataset(folders, size=(64, 64))[0]


# -- circles -------------------------------------------------------------------------------------------------


def test_the_colours_are_those_of_css() -> None:
    names = {name.strip().replace(" ", "") for name in COLOURS}
    css = {name for name in ImageColor.colormap if "grey" not in name}
    assert names == css - {"cyan", "magenta", "rebeccapurple"}, "each colour under one name"
    assert len({ImageColor.getrgb(name) for name in names}) == len(names)


def test_a_circle_is_filled_where_its_outline_runs(tmp_path: Path) -> None:
    make_fill50k(tmp_path, 12, side=128)
    rows = [json.loads(line) for line in (tmp_path / LIST).read_text().splitlines()]
    assert rows[3] == {"source": "source/3.png", "target": "target/3.png", "prompt": rows[3]["prompt"]}
    for row in rows:
        ink, ground = row["prompt"].removesuffix(" background").split(" circle with ")
        outline, filled = (np.asarray(Image.open(tmp_path / row[name])) for name in ("source", "target"))
        rgb = [np.array(ImageColor.getrgb(name.replace(" ", ""))[:3]) for name in (ink, ground)]
        inside, outside = ((filled == colour).all(axis=2) for colour in rgb)
        assert (inside | outside).mean() > 0.97, "all but the smoothed rim"
        contours, _ = cv2.findContours((outline[..., 0] > 127).astype(np.uint8), cv2.RETR_EXTERNAL, 2)
        (x, y), radius = cv2.minEnclosingCircle(max(contours, key=len))
        distance = np.hypot(*(np.mgrid[:128, :128] - np.array([y, x])[:, None, None]))
        np.testing.assert_array_equal(inside[distance < radius - 2], True)
        np.testing.assert_array_equal(outside[distance > radius + 2], True)


def test_circles_are_a_function_of_seed_and_number(tmp_path: Path) -> None:
    for name, count, seed in (("a", 6, 0), ("b", 3, 0), ("c", 3, 1)):
        make_fill50k(tmp_path / name, count, side=64, seed=seed)
    a, b, c = (Fill50kDataset(tmp_path / name) for name in "abc")
    assert (
        [a[i]["txt"] for i in range(3)] == [b[i]["txt"] for i in range(3)] != [c[i]["txt"] for i in range(3)]
    )
    np.testing.assert_array_equal(a[1]["jpg"], b[1]["jpg"])
    with pytest.raises(FileExistsError, match="is there already"):
        make_fill50k(tmp_path / "a", 6, side=64)


def test_the_tutorial_script_makes_circles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tutorial_dataset.main(["--make", "2", "--root", str(tmp_path / "circles")])
    assert "2 items; item 0 is 0: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tutorial_dataset.main(["--make", "0", "--root", str(tmp_path / "none")])
    assert "expected --make of 1 or more, found 0" in capsys.readouterr().err
