"""The judge's figures on photos, reconstructions and samples, and the script that prints them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from oracles import randomize
from torchmetrics.classification import MulticlassJaccardIndex

import tool_judge_streets as script
from cldm.model import create_model
from cldm.pictures import write_png
from cldm.tensor_writing import write_tensors
from datasets.streets.tree import Plan, make_tree
from metrics.judge import JudgeArch, Judgement, JudgeNetwork, StreetsJudge, write_judge
from metrics.judge_data import LabelledFrames, read_labelled
from metrics.judging import condition_card, ratios, samples_card, shuffled
from metrics.samples import Samples, key_of, read_samples

TINY = JudgeArch(
    hidden=(32, 32), depths=(0, 1), reductions=(4, 2), widenings=(1, 1), decoder=8, refinements=0, features=4
)


class Oracle:
    """A judge that reads its answer off the image: label from red, condition from green, mean colours."""

    def judge(self, images: NDArray[np.uint8]) -> Judgement:
        features = images.reshape(len(images), -1, 3).mean(axis=1).astype(np.float32)
        return Judgement(images[..., 0], images[:, 0, 0, 1].astype(np.int64), features)


def speaking_frames(count: int = 6) -> LabelledFrames:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 19, (count, 4, 6)).astype(np.uint8)
    conditions = np.arange(count) % 5
    images = np.stack([labels, labels, labels], axis=-1)
    images[..., 1] = conditions[:, None, None]
    labels = np.where(rng.random(labels.shape) < 0.1, np.uint8(255), labels)
    return LabelledFrames(images, labels, conditions, [f"camera-x_{i}" for i in range(count)])


def samples_of(real: LabelledFrames, rows: list[int], prompts: list[str] | None = None) -> Samples:
    return Samples(real.images[rows].copy(), [real.keys[i] for i in rows], prompts or [""] * len(rows))


# -- figures -------------------------------------------------------------------------------------------------


def test_samples_like_the_photos_reach_the_ceiling_and_others_maps_do_not() -> None:
    real = speaking_frames()
    prompts = ["a street on a clear day", "in the rain", "in the fog", "a street", "at night", "at night"]
    card = samples_card(Oracle(), samples_of(real, list(range(6)), prompts), real)
    assert (card["samples"], card["maps"]) == (6, 6)
    assert card["segmentation"]["miou"] == card["ceiling"]["miou"] == card["ratio"]["miou"] == 1
    assert card["segmentation"]["miou_interval"] == [1, 1]
    assert card["shuffled"]["miou"] < 0.3
    assert card["intervals_disjoint"] is True
    # prompt 3 names none; frame 5 is clear again and not a night
    assert card["condition"]["accuracy"] == pytest.approx(4 / 5)
    assert card["condition"]["by_condition"] == {"clear": 1, "rain": 1, "fog": 1, "night": 0.5}
    assert card["feature_distance"]["distance"] == pytest.approx(0, abs=1e-6)
    assert card["feature_distance"]["between_halves_of_the_photos"] > 0.1


def test_the_ceiling_is_that_of_the_maps_that_were_sampled_and_images_are_maps() -> None:
    real = speaking_frames()
    real.images[4:, ..., 0] = 18 - real.images[4:, ..., 0]  # the photos of the last two are misread
    some = samples_of(real, [2, 0, 2, 1])
    some.images[0, ..., 0] = 18 - some.images[0, ..., 0]
    card = samples_card(Oracle(), some, real)
    assert (card["samples"], card["maps"], card["ceiling"]["images"], card["segmentation"]["images"]) == (
        4,
        3,
        3,
        3,
    )
    assert card["ceiling"]["miou"] == 1
    assert card["condition"] is None
    truth, found = real.labels[[2, 0, 2, 1]].astype(int), some.images[..., 0].astype(int)
    jaccard = MulticlassJaccardIndex(19, ignore_index=255, average="none")(
        torch.from_numpy(found), torch.from_numpy(truth)
    ).numpy()
    present = np.unique(truth[truth != 255])
    assert card["segmentation"]["miou"] == pytest.approx(jaccard[present].mean())


def test_shuffling_gives_every_map_another_one_the_same_for_all_of_its_samples() -> None:
    for n in (2, 3, 8):
        maps = list(range(10, 10 + n))
        rows = [*maps, *maps[::-1]]
        others = shuffled(rows, maps)
        assert all(a != b for a, b in zip(rows, others, strict=True))
        assert sorted(others[:n]) == maps
        assert others[:n] == others[n:][::-1]
    with pytest.raises(ValueError, match="at least 2 maps"):
        shuffled([1, 1], [1])


def test_ratios_are_of_what_the_ceiling_has() -> None:
    ours = {"miou": 0.3, "iou": {"a": 0.2, "b": None, "c": 0.1, "d": 0.5}}
    ceiling = {"miou": 0.6, "iou": {"a": 0.8, "b": 0.4, "c": 0.0, "d": None}}
    assert ratios(ours, ceiling) == {"miou": 0.5, "iou": {"a": 0.25, "b": 0.0, "c": None, "d": None}}


def test_condition_accuracy_is_a_share() -> None:
    card = condition_card(np.array([0, 0, 4, 4, 4]), np.array([0, 1, 4, 4, 2]))
    assert card == {
        "images": 5,
        "accuracy": 0.6,
        "by_condition": {"clear": 0.5, "night": pytest.approx(2 / 3)},
    }


# -- the folder of samples -----------------------------------------------------------------------------------


def test_the_frame_of_a_hint_is_what_stands_before_its_kind() -> None:
    frame = "camera-fog_000001_000002"
    names = (
        f"{frame}_gtFine_labelIds.png",
        f"{frame}_gtFine_color_seed12.png",
        f"{frame}_seed0.png",
        f"{frame}.png",
    )
    assert {key_of(name) for name in names} == {frame}


def test_samples_are_read_with_their_settings_and_sheets_are_not(tmp_path: Path) -> None:
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    (tmp_path / "a").mkdir()
    write_png(
        tmp_path / "a" / "x_seed0.png", picture, {"hint": "f_gtFine_labelIds.png", "prompt": "in the fog"}
    )
    write_png(tmp_path / "f_gtFine_color_seed3.png", picture[::-1])
    write_png(tmp_path / "contact_sheet_001.png", picture)
    write_png(tmp_path / ".hidden_seed0.png", picture)
    found = read_samples(tmp_path)
    assert found.keys == ["f", "f"]
    assert found.prompts == ["in the fog", ""]
    assert np.array_equal(found.images, [picture, picture[::-1]])
    write_png(tmp_path / "z_seed0.png", picture[:2])
    with pytest.raises(ValueError, match=r"images of one size, found 4x6 in .* and 2x6 in .*z_seed0"):
        read_samples(tmp_path)


# -- the script ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    make_tree(root, Plan(size=(64, 128), train=1, val=5), workers=1)
    return root


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    write_judge(path, randomize(JudgeNetwork(TINY)), {"renderer": "0.9 old"})
    return path


def ask(tmp_path: Path, judge_file: Path, *arguments: Any) -> dict[str, Any]:
    out = tmp_path / "cards" / "card.json"
    script.main([*map(str, arguments), "--judge", str(judge_file), "--out", str(out)])
    return json.loads(out.read_text())


def test_photos_are_judged_and_the_card_says_of_what(
    tmp_path: Path, tree: Path, judge_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = ask(tmp_path, judge_file, "--real", tree, "--count", 4)
    frames = read_labelled(tree, "val", (64, 128), 4)
    predicted = StreetsJudge.load(judge_file)(frames.images)
    seen = frames.labels != 255
    right = (predicted == frames.labels)[seen].mean()
    assert card["segmentation"]["pixel_accuracy"] == pytest.approx(right)
    assert card["segmentation"]["images"] == card["data"]["frames"] == 4
    assert card["data"]["cities"] == {f"camera-{name}": 1 for name in ("clear", "fog", "rain", "snow")}
    assert card["judge"]["sha256"] == hashlib.sha256(judge_file.read_bytes()).hexdigest()
    assert card["data"]["renderer_hash"] == json.loads((tree / "streets.json").read_text())["renderer_hash"]
    assert str(tree) not in json.dumps(card)
    said = capsys.readouterr().out
    assert f"mIoU {card['segmentation']['miou']:.4f}" in said
    assert "the judge was trained on another renderer: 0.9 old" in said
    assert all(name in said for name in ("traffic light", "motorcycle", "condition recognised in"))


def test_samples_are_judged_against_the_maps_they_were_made_from(
    tmp_path: Path, tree: Path, judge_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = read_labelled(tree, "val", (64, 128))
    for i, seed in ((0, 0), (0, 1), (3, 0), (4, 0)):
        notes = {"hint": f"{frames.keys[i]}_gtFine_labelIds.png", "prompt": "a street at night"}
        write_png(tmp_path / f"{frames.keys[i]}_gtFine_labelIds_seed{seed}.png", frames.images[i], notes)
    card = ask(tmp_path, judge_file, "--images", tmp_path, "--labels", tree)
    assert (card["samples"], card["maps"]) == (4, 3)
    photos = StreetsJudge.load(judge_file).judge(frames.images)
    assert card["condition"]["accuracy"] == np.mean(photos.conditions[[0, 0, 3, 4]] == 4)
    assert card["feature_distance"]["name"] == "Streets feature distance"
    assert "4 samples of 3 maps" in capsys.readouterr().out


def test_reconstructions_are_judged_beside_their_photos(
    tmp_path: Path, tree: Path, judge_file: Path, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create_model(tiny_yaml)
    state = {k: v.half() for k, v in model.state_dict().items() if k.startswith("first_stage_model.")}
    weights = tmp_path / "vae.safetensors"
    write_tensors(weights, state, {"model_config": tiny_yaml.read_text()})
    card = ask(tmp_path, judge_file, "--first_stage", weights, "--labels", tree)
    first = card["originals"]["segmentation"]
    assert card["ratio"]["miou"] == pytest.approx(card["segmentation"]["miou"] / first["miou"])
    assert card["first_stage"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert card["psnr"] > 0
    assert "of thin things: pole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--real", "nowhere"], "nowhere does not exist"),
        (["--real", "TREE", "--images", "TREE"], "not allowed with argument"),
        (["--labels", "TREE"], "one of the arguments --real --first_stage --images is required"),
        (["--real", "TREE", "--count", "1"], "--count must be 2 or more, found 1"),
        (["--real", "TREE", "--count", "50"], "expected 50 photos of val, found 5"),
        (["--real", "EMPTY"], "expected a Streets tree, found no"),
        (["--images", "EMPTY", "--labels", "TREE"], "expected images <hint>_seed<N>.png, found none"),
        (["--images", "ALIEN", "--labels", "TREE"], "found one of alien; name the tree"),
        (["--first_stage", "JUDGE", "--labels", "TREE"], "holds no autoencoder"),
        (["--real", "TREE", "--device", "cuda:9"], "GPU"),
    ],
)
def test_a_wrong_question_is_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, tree: Path, judge_file: Path, capsys: Any
) -> None:
    places = {"TREE": tree, "EMPTY": tmp_path / "empty", "ALIEN": tmp_path / "alien", "JUDGE": judge_file}
    for name in ("empty", "alien"):
        (tmp_path / name).mkdir()
    write_png(tmp_path / "alien" / "alien_seed0.png", np.zeros((64, 128, 3), np.uint8))
    with pytest.raises(SystemExit) as exit_info:
        script.main([*(str(places.get(word, word)) for word in arguments), "--judge", str(judge_file)])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "Traceback" not in error


def test_without_the_judge_it_is_said_where_it_should_be(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main(["--real", str(tree), "--judge", "models/none.safetensors"])
    assert "models/none.safetensors does not exist" in capsys.readouterr().err
