"""What the evaluation refuses, each in one sentence: leaks, images and maps that would mislead."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_samples import SIZE, SmallEvaluation, write_samples
from PIL import Image

import evaluate as script
from cldm.pictures import write_png
from datasets.files import read_image


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallEvaluation:
    return SmallEvaluation(tmp_path_factory.mktemp("refusals"), engines=False)


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """Return the one sentence that a refusal says."""
    with pytest.raises(SystemExit) as left:
        script.main(words)
    assert left.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Traceback" not in said
    return said


def test_maps_that_were_trained_on_are_refused_unless_asked(
    small: SmallEvaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = write_samples(tmp_path / "gen", small.tree, checkpoint=small.checkpoint, split="train")
    words = ("--split", "train")
    said = refused(capsys, small.words(tmp_path / "out", *words, fake=fake))
    assert "3 of the maps were trained on (streets, split train), such as camera-clear" in said
    card = small.card(tmp_path / "out", *words, "--allow_leak", fake=fake)
    assert card["leaks"]["status"] == "leaked"
    assert len(card["leaks"]["leaked"]) == 3


def test_a_trained_map_under_another_name_is_found_by_its_content(
    small: SmallEvaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small.tree, tmp_path / "tree")
    folder = tmp_path / "tree/gtFine"
    trained = sorted((folder / "train").rglob("*_labelIds.png"))[0]
    shutil.copy(trained, sorted((folder / "val").rglob("*_labelIds.png"))[0])
    fake = write_samples(tmp_path / "gen", tmp_path / "tree", checkpoint=small.checkpoint)
    said = refused(capsys, small.words(tmp_path / "out", "--real", tmp_path / "tree", fake=fake))
    assert "1 of the maps were trained on" in said


def grey(path: Path, _: SmallEvaluation) -> None:
    Image.open(path).convert("L").save(path)


def other_size(path: Path, _: SmallEvaluation) -> None:
    write_png(path, np.zeros((128, 256, 3), np.uint8))


def cut(path: Path, _: SmallEvaluation) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_an_image(path: Path, _: SmallEvaluation) -> None:
    path.write_text("a page that says 404")


def a_jpeg(path: Path, _: SmallEvaluation) -> None:
    image = Image.open(path).convert("RGB")
    image.save(path, format="JPEG")


def alone(path: Path, _: SmallEvaluation) -> None:
    for other in path.parent.parent.rglob("*.png"):
        if other != path:
            other.unlink()


def another_map(path: Path, _: SmallEvaluation) -> None:
    image = read_image(path)
    path.unlink()
    write_png(path.with_name("aachen_000001_000019_seed0.png"), image)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (grey, "expected colours with 8 bits (RGB), found mode L"),
        (other_size, "expected images of one size, found 128x256"),
        (cut, "expected an image, found"),
        (not_an_image, "expected an image, found a file that is none"),
        (a_jpeg, "expected a PNG, found JPEG"),
        (alone, "expected at least 2 generated images, found 1"),
        (another_map, "is called after a label map such as camera-clear_000001_000000, found aachen_000001"),
    ],
)
def test_bad_images_get_one_sentence(
    small: SmallEvaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Any, words: str
) -> None:
    fake = tmp_path / "gen"
    shutil.copytree(small.fake, fake)
    victim = sorted(fake.rglob("*_seed0.png"))[2]
    harm(victim, small)
    assert words in refused(capsys, small.words(tmp_path / "out", fake=fake))


def test_labels_of_another_protocol_and_small_images_get_one_sentence(
    small: SmallEvaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small.tree, tmp_path / "tree")
    for path in (tmp_path / "tree/gtFine/val").rglob("*_labelIds.png"):
        Image.fromarray(np.full(SIZE, 120, np.uint8)).save(path)
    said = refused(capsys, small.words(tmp_path / "out", "--labels", tmp_path / "tree", "--real", small.tree))
    assert "expected cityscapes label ids" in said
    assert "found 120" in said
    folder = small.tree / "gtFine/val/camera-clear"
    shutil.copytree(folder, tmp_path / "maps")
    said = refused(capsys, small.words(tmp_path / "out", "--labels", tmp_path / "maps"))
    assert "is no root of streets, so name both --real and --labels" in said
    said = refused(capsys, small.words(tmp_path / "out", "--protocol", "streets"))
    assert "expected images of 128x256 or more, found 64x128" in said
    said = refused(capsys, small.words(tmp_path / "out", "--protocol", "nativ"))
    assert (
        "unknown protocol 'nativ': expected one of classic, native, streets; did you mean 'native'?" in said
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "a.json"], "compare takes two cards or more"),
        ([], "expected one folder of generated images, found 0"),
        (["nowhere"], "nowhere does not exist"),
        ([".", "--shard", "3/2"], "--shard must be I/N"),
        ([".", "--predicted", "."], "--predicted and --predicted_real belong together"),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        script.parse_args(words)
    assert left.value.code == 2
    assert said in capsys.readouterr().err
