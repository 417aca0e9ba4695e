"""Training of the Streets judge: what it sees, its loss, its slices, its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from omegaconf import OmegaConf
from torch import Tensor

import tool_train_streets_judge as script
from cldm.stages import load_stage
from cldm.tensor_files import read_metadata, read_tensors
from datasets.files import read_image, read_labels
from datasets.label_space import LabelSpace
from datasets.streets import CONDITIONS
from datasets.streets.caption import compose_caption
from datasets.streets.tree import Plan, make_tree
from metrics.judge import StreetsJudge
from metrics.judge_data import (
    Augmentation,
    LabelledCrops,
    LabelledFrames,
    change,
    class_weights,
    condition_in,
    condition_of,
    rarest_classes,
    read_labelled,
)
from metrics.judge_stage import JudgeStage, check_judge_stage
from metrics.judge_training import build_judge_training

RUN = Path("configs/streets_judge.yaml")
PLAIN = Augmentation(gain=0, shift=0, blur=0, blur_sigma=1)
TINY = [
    *("model.hidden=[32,32]", "model.depths=[0,1]", "model.reductions=[4,2]", "model.widenings=[1,1]"),
    *("model.decoder=8", "model.refinements=1", "model.features=4"),
]


def marked_frames(count: int = 5, height: int = 32, width: int = 64) -> LabelledFrames:
    """Frames whose first colour is the label, and whose others tell frame and column."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 19, (count, height, width)).astype(np.uint8)
    images = np.stack([labels, np.zeros_like(labels), np.zeros_like(labels)], axis=-1)
    images[..., 1] = np.arange(count, dtype=np.uint8)[:, None, None]
    images[..., 2] = np.arange(width, dtype=np.uint8)
    return LabelledFrames(images, labels, np.arange(count) % 5, [f"frame {i}" for i in range(count)])


# -- what it sees --------------------------------------------------------------------------------------------


def test_frames_are_photos_maps_and_conditions_of_one_key(tmp_path: Path) -> None:
    make_tree(tmp_path, Plan(conditions=("night", "clear"), size=(64, 64), train=3, val=2), workers=1)
    frames = read_labelled(tmp_path, "train", (64, 64), 2)
    assert frames.keys == ["camera-night_000000_000000", "camera-clear_000000_000001"]
    assert [CONDITIONS[i] for i in frames.conditions] == ["night", "clear"]
    stem = tmp_path / "gtFine" / "train" / "camera-clear" / "camera-clear_000000_000001_gtFine_labelIds.png"
    ids, table = read_labels(stem), dict(zip(*rows_of_the_palette(), strict=True))
    assert all(table[int(i)] == t for i, t in zip(ids.ravel(), frames.labels[1].ravel(), strict=True))
    photo = tmp_path / "leftImg8bit/train/camera-clear/camera-clear_000000_000001_leftImg8bit.png"
    assert np.array_equal(read_image(photo), frames.images[1])
    assert len(read_labelled(tmp_path, "val", (64, 64))) == 2
    with pytest.raises(FileNotFoundError, match="expected 1 photos of test, found 0"):
        read_labelled(tmp_path, "test", (64, 64))
    stem.unlink()
    with pytest.raises(
        FileNotFoundError, match="a label map for each photo of train, found none for camera-c"
    ):
        read_labelled(tmp_path, "train", (64, 64), 2)


def rows_of_the_palette() -> tuple[list[int], list[int]]:
    space = LabelSpace.load("cityscapes")
    return [i % 256 for i in space.row_ids], list(space.row_train_ids)


def test_conditions_are_read_from_keys_and_from_the_captions_that_the_renderer_writes() -> None:
    for i, name in enumerate(CONDITIONS):
        assert condition_of(f"camera-{name}_000001_000000") == i
        assert condition_in(compose_caption("a city street", "game", name, np.full((4, 4), 26))) == i
    assert condition_in("a street") is None
    assert condition_in("a street at night in the rain") is None
    with pytest.raises(ValueError, match="expected a frame of a Streets tree, such as"):
        condition_of("aachen_000000_000019")


def test_crops_show_photo_map_and_condition_of_the_same_place() -> None:
    frames = marked_frames()
    crops = LabelledCrops(frames, 10, seed=3, batch=6, crop=(16, 32), rare_power=0.5, augmentation=PLAIN)
    sides = set()
    for step in range(4):
        batch = crops[step]
        pixels = np.round((batch["jpg"] + 1) * 127.5).astype(np.uint8)
        assert np.array_equal(pixels[..., 0], batch["label"])
        number = pixels[:, 0, 0, 1]
        assert np.array_equal(batch["condition"], frames.conditions[number])
        assert batch["txt"] == [f"frame {i}" for i in number]
        columns = pixels[:, 0, :, 2].astype(int)
        sides |= set(np.diff(columns, axis=1).ravel().tolist())
    assert sides == {1, -1}  # plain and mirrored


def test_a_share_of_the_crops_shows_the_rarest_class_of_its_frame() -> None:
    labels = np.zeros((5, 32, 96), np.uint8)
    for i, (y, x) in enumerate([(0, 0), (27, 91), (0, 50), (13, 0)]):
        labels[i, y : y + 5, x : x + 5] = 7
    conditions = np.zeros(5, np.int64)
    frames = LabelledFrames(np.repeat(labels[..., None], 3, axis=3), labels, conditions, list("abcde"))
    # so high a power that the last frame, which lacks the class, is never drawn
    how = {"seed": 2, "batch": 50, "crop": (16, 24), "rare_power": 50.0, "augmentation": PLAIN}
    shows = {}
    for share in (0.0, 0.5, 1.0):
        batches = [LabelledCrops(frames, 20, rare_share=share, **how)[step]["label"] for step in range(20)]
        shows[share] = np.mean([(crop == 7).any() for batch in batches for crop in batch])
    assert shows[1.0] == 1
    assert shows[0.0] < 0.45
    assert abs(shows[0.5] - (shows[0.0] + 1) / 2) < 0.06


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    how = {"batch": 3, "crop": (16, 16), "rare_power": 1.0, "augmentation": Augmentation(0.1, 8, 0.5, 1)}
    first, second, other = (LabelledCrops(marked_frames(), 9, seed=seed, **how) for seed in (1, 1, 2))
    for step in (7, 0, 4):
        a, b = first[step], second[step]
        assert np.array_equal(a["jpg"], b["jpg"])
        assert np.array_equal(a["label"], b["label"])
        assert a["step"] == step
    assert not np.array_equal(first[0]["jpg"], first[1]["jpg"])
    assert not np.array_equal(first[0]["jpg"], other[0]["jpg"])
    assert len(first) == 9


def test_rare_classes_weigh_more_and_their_frames_are_drawn_more_often() -> None:
    labels = np.zeros((8, 10, 10), np.uint8)
    labels[0, :4] = 3
    labels[5, :1] = 2  # ten pixels: too few to be shown
    labels[7] = 255
    share = np.array([650, 0, 10, 40]) / 700
    expected = np.array([share[0] ** -0.5, 0, share[2] ** -0.5, share[3] ** -0.5])
    expected /= (expected * share).sum()
    np.testing.assert_allclose(class_weights(labels, 4, 0.5), expected)
    rarest, chances = rarest_classes(labels, 4, 1.0)
    assert rarest.tolist() == [3, 0, 0, 0, 0, 0, 0, 255]
    assert chances[0] / chances[1] == pytest.approx(8 / (8 / 7))
    assert chances[5] == chances[1]
    assert chances.sum() == pytest.approx(1)
    np.testing.assert_allclose(rarest_classes(labels, 4, 0.0)[1], 1 / 8)


def test_light_and_focus_change_within_their_limits_and_no_more() -> None:
    rng, image = np.random.default_rng(0), np.full((8, 8, 3), 100, np.uint8)
    values = np.stack([change(image, Augmentation(0.1, 8, 0, 1), rng)[0, 0] for _ in range(500)]).astype(int)
    assert values.min() in range(82, 86)
    assert values.max() in range(114, 119)
    textured = marked_frames(1).images[0]
    assert np.array_equal(change(textured, PLAIN, rng), textured)
    blurred = change(textured, Augmentation(0, 0, 1, 0.1 + 1e-9), rng)
    assert np.array_equal(blurred, textured)  # a tenth of a pixel is no blur
    found = change(textured, Augmentation(0, 0, 1, 2.0), np.random.default_rng(5)).astype(float)
    draws = np.random.default_rng(5)
    _ = draws.uniform(-1, 1, 4), draws.random()
    sigma = draws.uniform(0.1, 2.0)
    expected = scipy.ndimage.gaussian_filter(textured.astype(float), (sigma, sigma, 0), mode="mirror")
    assert np.abs(found - expected).mean() < 0.5


def test_smoothing_takes_texture_and_leaves_edges() -> None:
    grain = np.random.default_rng(0).integers(-8, 9, (40, 40, 3))
    step = np.where(np.arange(40) < 20, 50, 200)[None, :, None]
    image = (grain + step).astype(np.uint8)
    rng = np.random.default_rng(1)
    how = Augmentation(0, 0, 0, 1, smooth=1, smooth_contrast=60)
    found = np.stack([change(image, how, rng) for _ in range(20)]).astype(float)
    for side, level in ((slice(0, 20), 50), (slice(20, 40), 200)):
        flat = found[:, :, side]
        assert abs(flat[:, :, [0, -1]].mean() - level) < 3
        assert flat.std(axis=(1, 2)).min() < 0.4 * grain.std()


# -- its loss ------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_cross_entropy_without_void_and_that_of_the_condition() -> None:
    config = load_stage(JudgeStage, RUN, [*TINY, "loss.condition=0.3", "loss.class_power=0.5"])
    frames = marked_frames()
    frames.labels[:, :3] = 255
    module = build_judge_training(config, frames.labels)
    crops = LabelledCrops(frames, 1, seed=0, batch=2, crop=(16, 32), rare_power=0, augmentation=PLAIN)
    batch = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in crops[0].items()}
    module.log = lambda *args, **more: None
    found = module.training_step(batch, 0).item()
    with torch.no_grad():
        answers = module.network(batch["jpg"].permute(0, 3, 1, 2))
    weights, total, count = class_weights(frames.labels, 19, 0.5), 0.0, 0.0
    scores = answers.labels.double().numpy()
    for n, y, x in np.ndindex(2, 16, 32):
        label = int(batch["label"][n, y, x])
        if label != 255:
            total += weights[label] * (np.log(np.exp(scores[n, :, y, x]).sum()) - scores[n, label, y, x])
            count += weights[label]
    weather = answers.conditions.double().numpy()
    right = weather[np.arange(2), batch["condition"].numpy()]
    expected = total / count + 0.3 * (np.log(np.exp(weather).sum(axis=1)) - right).mean()
    assert found == pytest.approx(expected, rel=1e-4)


# -- a run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("tree")
    make_tree(root, Plan(size=(64, 128), train=5, val=2), workers=1)
    data = [f"data.camera_root={root}", "data.camera_frames=5", "data.val_frames=2", "data.size=[64,128]"]
    train = ["batch_size=2", "crop=[32,32]", "warmup=2", "steps=3", "precision=32-true"]
    return [*TINY, *data, *(f"train.{setting}" for setting in train)]


def run(folder: Path, *arguments: str) -> dict[str, Tensor]:
    script.main([f"slice.folder={folder}", "slice.log_freq=100", *arguments])
    return dict(read_tensors(folder / "state.safetensors"))


def test_a_run_in_slices_is_bit_by_bit_the_run_in_one(tmp_path: Path, overrides: list[str]) -> None:
    whole, parts = run(tmp_path / "whole", *overrides), {}
    for i in range(1, 4):  # zero minutes are over behind the first step
        parts = run(tmp_path / "parts", "--minutes", "0", *overrides)
        notes = read_metadata(tmp_path / "parts" / "state.safetensors")
        assert json.loads(notes["progress"])["step"] == i
    assert parts.keys() == whole.keys()
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []
    written = [read_tensors(tmp_path / name / "judge.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(value, written[1][key]) for key, value in written[0].items())


def test_a_slice_leaves_a_log_a_picture_and_a_judge_that_says_what_made_it(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "judge.safetensors"
    run(tmp_path, "--minutes", "0", "--out", str(out), *overrides)
    said = capsys.readouterr().out
    assert "step 1 of 3" in said
    assert "the same command continues" in said
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert len(list((tmp_path / "pictures").iterdir())) == 2
    notes = read_metadata(out)
    figures = json.loads(notes["figures"])
    assert figures["step"] == 1
    assert len(figures["iou"]) == 19
    assert OmegaConf.create(notes["run_config"]).train.steps == 3
    root = OmegaConf.create(notes["run_config"]).data.camera_root
    assert notes["renderer"].split()[1] == json.loads(Path(root, "streets.json").read_text())["renderer_hash"]
    held_out = read_labelled(root, "val", (64, 128))
    predicted = StreetsJudge.load(out)(held_out.images)
    seen = held_out.labels != 255
    right = (predicted == held_out.labels)[seen].mean()
    assert figures["pixel_accuracy"] == pytest.approx(right, abs=0.01)  # the file is in fp16


def test_a_finished_run_writes_its_file_again(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, *overrides, "train.steps=1")
    path = tmp_path / "judge.safetensors"
    first = {key: value.clone() for key, value in read_tensors(path).items()}
    path.unlink()
    run(tmp_path, *overrides, "train.steps=1")
    assert "the run is complete" in capsys.readouterr().out
    assert all(torch.equal(value, first[key]) for key, value in read_tensors(path).items())


@pytest.mark.slow
def test_a_pole_of_one_pixel_is_learned(tmp_path: Path) -> None:
    from metrics.judge import to_signed

    torch.manual_seed(0)
    frames = marked_frames(4)
    frames.labels[:], frames.images[:] = 10, 200
    for i, column in enumerate((5, 18, 37, 60)):
        frames.labels[i, 4:28, column], frames.images[i, 4:28, column] = 5, 60
    module = build_judge_training(load_stage(JudgeStage, RUN, [*TINY, "train.lr=3e-3"]), frames.labels)
    optimizer = module.configure_optimizers()
    for _ in range(150):
        scores = module.network(to_signed(torch.from_numpy(frames.images))).labels
        loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(frames.labels).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert np.array_equal(StreetsJudge(module.network)(frames.images), frames.labels)


# -- what is wrong is said in a sentence ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lrr=1", "did you mean train.lr"),
        ("train.lr=0", "train.lr above 0, found 0"),
        ("train.crop=[120,128]", "train.crop=[HEIGHT,WIDTH] in multiples of 16, found [120, 128]"),
        ("train.crop=[256,256]", "train.crop within [128, 256], found [256, 256]"),
        ("train.precision=64", "train.precision to be one of 32-true, bf16-mixed, found '64'"),
        ("train.average=1.0", "train.average below 1"),
        ("augment.blur=1.5", "augment.blur of at most 1"),
        ("augment.smooth=1.5", "augment.smooth of at most 1"),
        ("model.depths=[1,1]", "an entry for each stage"),
        ("model.hidden=[32,40,64,64]", "model.hidden in multiples of 32"),
        ("model.reductions=[0,1,1,1]", "1 or more in every entry"),
        ("model.features=65", "model.features of at most 64, found 65"),
        ("data.val_frames=0", "data.val_frames of 1 or more, found 0"),
    ],
)
def test_a_wrong_setting_is_one_sentence(
    override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        script.main([override])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "Traceback" not in error


def test_the_run_file_passes_and_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    config: Any = load_stage(JudgeStage, RUN, [])
    check_judge_stage(config)
    script.main(["--print_config"])
    assert OmegaConf.create(capsys.readouterr().out) == config
