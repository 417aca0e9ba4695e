"""Data sets: discovery in untidy trees, the sample contract, the registry and the tutorial's data set."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

import tutorial_dataset
import tutorial_train
from cldm.config import load_run_config
from datasets import DATASETS, create_dataset, missing_paths, options_of
from datasets.base import check_size, label_sample, resize_image, to_signed
from datasets.cityscapes import CityscapesDataset
from datasets.fill50k import Fill50kDataset
from datasets.hint_encoding import hint_encoding
from datasets.label_space import LabelSpace
from tutorial_dataset import MyDataset

SAMPLES = Path(__file__).parents[2] / "shared" / "data" / "cityscapes"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"no real samples at {SAMPLES}")
SMALL = (64, 128)


def save(path: Path, array: np.ndarray, **options: str) -> Path:
    """Write an array as an image, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def add_photo(root: Path, split: str, stem: str, shape: tuple[int, int] = SMALL) -> Path:
    """A photo of noise at its place in the tree."""
    rgb = np.random.default_rng(len(stem)).integers(0, 256, (*shape, 3), np.uint8)
    return save(root / "leftImg8bit" / split / stem.split("_")[0] / f"{stem}_leftImg8bit.png", rgb)


def add_labels(
    root: Path, split: str, stem: str, ids: np.ndarray, kind: str = "labelIds", **options: str
) -> Path:
    """A label map at its place in the tree."""
    return save(root / "gtFine" / split / stem.split("_")[0] / f"{stem}_gtFine_{kind}.png", ids, **options)


def constant(value: int, shape: tuple[int, int] = SMALL) -> np.ndarray:
    """A map of one id."""
    return np.full(shape, value, np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two train frames of two cities, one val frame, and a test folder as the download has it."""
    for split, stem, file_id in [
        ("train", "ulm_000001_000019", 7),
        ("train", "aachen_000000_000019", 26),
        ("val", "munster_000000_000019", 23),
        ("test", "berlin_000000_000019", 3),
    ]:
        add_photo(tmp_path, split, stem)
        add_labels(tmp_path, split, stem, constant(file_id))
    return tmp_path


def test_a_sample_keeps_the_contract(root: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 34, (100, 200), np.uint8)
    photo = add_photo(root, "train", "aachen_000000_000019", (100, 200))
    add_labels(root, "train", "aachen_000000_000019", ids)
    sample = CityscapesDataset(root, "train", size=SMALL)[0]
    assert sample["key"] == "aachen_000000_000019"
    assert sample["txt"] == "City road scenes."
    assert (sample["jpg"].shape, sample["jpg"].dtype) == ((64, 128, 3), np.float32)
    assert (sample["hint"].shape, sample["hint"].dtype) == ((64, 128, 3), np.float32)
    assert (sample["label"].shape, sample["label"].dtype) == ((64, 128), np.int64)
    assert set(np.unique(sample["label"])) <= {*range(19), 255}
    space = LabelSpace.load("cityscapes")
    np.testing.assert_allclose(sample["hint"] * 255, space.paint(sample["label"]), atol=1e-4)
    area = cv2.resize(np.asarray(Image.open(photo), np.float32), (128, 64), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(sample["jpg"], area / 127.5 - 1, atol=0.51 / 127.5)


@pytest.mark.parametrize(
    ("split", "keys"),
    [("train", ["aachen_000000_000019", "ulm_000001_000019"]), ("val", ["munster_000000_000019"])],
)
def test_a_split_holds_its_own_frames_although_a_test_folder_exists(
    root: Path, split: str, keys: list[str]
) -> None:
    dataset = CityscapesDataset(root, split, size=SMALL)
    assert [dataset[i]["key"] for i in range(len(dataset))] == keys


def test_photo_and_map_meet_by_stem_and_not_by_order(root: Path) -> None:
    # One extra on each side: both lists have three entries, and sorted order would pair strangers.
    add_photo(root, "train", "aachen_000009_000019")
    add_labels(root, "train", "bochum_000000_000019", constant(8))
    dataset = CityscapesDataset(root, "train", size=SMALL)
    labels = {
        sample["key"]: np.unique(sample["label"]).tolist() for sample in map(dataset.__getitem__, range(2))
    }
    assert labels == {"aachen_000000_000019": [13], "ulm_000001_000019": [0]}


def test_files_without_a_partner_are_left_out_and_counted(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_photo(root, "train", "aachen_000008_000019")
    add_photo(root, "train", "aachen_000009_000019")
    add_labels(root, "train", "bochum_000000_000019", constant(8))
    with caplog.at_level(logging.WARNING, logger="datasets"):
        assert len(CityscapesDataset(root, "train", size=SMALL)) == 2
    photos, maps = (record.getMessage() for record in caplog.records)
    assert photos.startswith("2 of 4 photos have no label map")
    assert "aachen_000008_000019" in photos
    assert maps.startswith("1 of 3 label maps have no photo")
    assert "bochum_000000_000019" in maps


def test_hidden_files_are_no_frames(root: Path) -> None:
    for name in (
        "leftImg8bit/train/ulm/._ulm_1_leftImg8bit.png",
        "gtFine/train/ulm/._ulm_1_gtFine_labelIds.png",
    ):
        (root / name).write_bytes(b"resource fork")
    assert len(CityscapesDataset(root, "train", size=SMALL)) == 2


def test_ready_train_ids_win_and_the_others_are_derived(root: Path) -> None:
    add_labels(root, "train", "ulm_000001_000019", constant(18), kind="labelTrainIds")
    dataset = CityscapesDataset(root, "train", size=SMALL)
    assert [np.unique(dataset[i]["label"]).tolist() for i in range(2)] == [[13], [18]]


def test_palette_train_ids_are_indices(root: Path) -> None:
    path = root / "gtFine/train/ulm/ulm_000001_000019_gtFine_labelTrainIds.png"
    image = Image.new("P", SMALL[::-1], 4)
    image.putpalette([255 - v for v in range(256) for _ in range(3)])
    image.save(path)
    assert np.unique(CityscapesDataset(root, size=SMALL)[1]["label"]).tolist() == [4]


def test_the_same_stem_twice_is_an_error(root: Path) -> None:
    twin = root / "leftImg8bit/train/copy/ulm_000001_000019_leftImg8bit.png"
    save(twin, np.zeros((*SMALL, 3), np.uint8))
    with pytest.raises(ValueError, match=r"one file for ulm_000001_000019, found .*copy.* and .*ulm"):
        CityscapesDataset(root, "train")


@pytest.mark.parametrize(("kind", "value"), [("labelIds", 34), ("labelTrainIds", 19)])
def test_an_id_out_of_range_names_its_file(root: Path, kind: str, value: int) -> None:
    add_labels(root, "train", "ulm_000001_000019", constant(value), kind=kind)
    with pytest.raises(
        ValueError, match=rf"ulm_000001_000019_gtFine_{kind}\.png: .*found {value} in 8192 pixels"
    ):
        CityscapesDataset(root, "train", size=SMALL)[1]


def test_a_jpeg_label_map_named_png_is_refused(root: Path) -> None:
    add_labels(root, "train", "ulm_000001_000019", constant(7), format="JPEG")
    with pytest.raises(ValueError, match=r"ulm_000001_000019_gtFine_labelIds\.png: .*found JPEG"):
        CityscapesDataset(root, "train", size=SMALL)[1]


def test_a_map_of_another_shape_is_refused_and_a_scaled_one_is_not(root: Path) -> None:
    dataset = CityscapesDataset(root, "train", size=SMALL)
    add_labels(root, "train", "ulm_000001_000019", constant(7, (32, 64)))
    assert dataset[1]["label"].shape == SMALL
    add_labels(root, "train", "ulm_000001_000019", constant(7, (128, 64)))
    with pytest.raises(ValueError, match=r"shape of its photo \(64x128.*found 128x64"):
        dataset[1]


def test_an_empty_split_says_what_was_expected_and_what_is_there(root: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        CityscapesDataset(root, "validation")
    message = str(caught.value)
    assert "leftImg8bit/validation/<city>/*_leftImg8bit.png" in message
    assert "0 photos and 0 label maps" in message
    assert "test, train, val" in message
    assert "https://www.cityscapes-dataset.com/" in message


@pytest.mark.parametrize("ids", [constant(3), None])
def test_the_withheld_test_split_is_refused_with_the_reason(root: Path, ids: np.ndarray | None) -> None:
    if ids is None:
        (root / "gtFine/test/berlin/berlin_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="withholds the test labels: use split 'val'"):
        CityscapesDataset(root, "test")


def test_a_labelled_test_split_is_read(root: Path) -> None:
    add_labels(root, "test", "berlin_000000_000019", constant(7))
    assert len(CityscapesDataset(root, "test", size=SMALL)) == 1


def test_label_maps_need_no_photo(root: Path) -> None:
    add_labels(root, "val", "lindau_000000_000019", constant(24))
    maps = CityscapesDataset.label_maps(root, "val")
    assert list(maps) == ["lindau_000000_000019", "munster_000000_000019"]
    ids = CityscapesDataset.read_file_ids(maps["lindau_000000_000019"])
    encoding = hint_encoding(LabelSpace.load("cityscapes"))
    sample = label_sample(ids, (128, 64), encoding, txt="a street", key="k")
    assert np.unique(sample["label"]).tolist() == [11]
    assert sample["hint"].shape == (128, 64, 3)
    np.testing.assert_allclose(sample["hint"][0, 0] * 255, [220, 20, 60], rtol=1e-6)
    with pytest.raises(FileNotFoundError, match="found 0 label maps"):
        CityscapesDataset.label_maps(root, "demo")


@pytest.mark.parametrize(
    ("size", "near"), [((500, 1000), "512x1024"), ((1, 64), "64x64"), ((96, 64), "128x64")]
)
def test_a_size_that_the_model_cannot_take_is_answered_with_the_near_one(
    size: tuple[int, int], near: str
) -> None:
    with pytest.raises(ValueError, match=f"multiples of 64.*{near}"):
        check_size(size)


def test_shrinking_averages_and_growing_interpolates() -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 200
    assert np.unique(resize_image(stripes, (64, 64))).tolist() == [100]
    assert np.unique(resize_image(stripes, (256, 64))).tolist() == [100]  # one side grows, the other shrinks
    assert resize_image(stripes, (128, 128)) is stripes
    ramp = resize_image(np.array([[[0] * 3, [200] * 3]], np.uint8), (1, 64))[0, :, 0].astype(int)
    assert (np.diff(ramp) >= 0).all()
    assert len(np.unique(ramp)) > 16


def test_the_signed_range_reaches_both_ends() -> None:
    assert to_signed(np.array([[[0, 255, 51]]], np.uint8)).ravel().tolist() == pytest.approx([-1, 1, -0.6])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_default_collate_makes_tensors(root: Path, num_workers: int) -> None:
    dataset = pickle.loads(pickle.dumps(CityscapesDataset(root, size=SMALL)))  # as spawned workers get it
    (batch,) = DataLoader(dataset, batch_size=2, num_workers=num_workers)
    assert batch["jpg"].shape == batch["hint"].shape == (2, 64, 128, 3)
    assert batch["label"].unique().tolist() == [0, 13]
    assert batch["key"] == ["aachen_000000_000019", "ulm_000001_000019"]
    assert batch["txt"] == ["City road scenes."] * 2


@needs_samples
def test_the_real_tree_has_four_train_pairs_one_val_pair_and_four_val_maps() -> None:
    train = CityscapesDataset(SAMPLES, "train")
    assert [pair.key for pair in train.pairs] == [f"aachen_00000{i}_000019" for i in range(4)]
    sample = train[0]
    ids = np.asarray(Image.open(train.pairs[0].labels))
    assert sample["label"].shape == (512, 1024)
    assert (sample["label"] == 0).mean() == pytest.approx((ids == 7).mean(), abs=0.002)  # road
    val = CityscapesDataset(SAMPLES, "val", size=(128, 256))
    assert [pair.key for pair in val.pairs] == ["frankfurt_000000_000294"]
    assert len(CityscapesDataset.label_maps(SAMPLES, "val")) == 4


@needs_samples
def test_the_real_test_folder_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match="withholds the test labels"):
        CityscapesDataset(SAMPLES, "test")


@pytest.fixture
def fill50k(tmp_path: Path) -> Path:
    """Two items in the published layout."""
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    lines = []
    for i in range(2):
        save(tmp_path / f"source/{i}.png", rgb)
        save(tmp_path / f"target/{i}.png", rgb[::-1])
        lines.append(
            json.dumps({"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": f"circle {i}"})
        )
    (tmp_path / "prompt.json").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def test_fill50k_gives_target_source_and_prompt(fill50k: Path) -> None:
    dataset = MyDataset(fill50k)
    item = dataset[1]
    rgb = np.asarray(Image.open(fill50k / "source/1.png"), np.float32)
    assert len(dataset) == 2
    assert (item["txt"], item["key"], set(item)) == ("circle 1", "1", {"jpg", "hint", "txt", "key"})
    np.testing.assert_allclose(item["hint"], rgb / 255, atol=1e-6)
    np.testing.assert_allclose(item["jpg"], rgb[::-1] / 127.5 - 1, atol=1e-6)
    assert Fill50kDataset(fill50k, size=(128, 64))[0]["jpg"].shape == (128, 64, 3)


def test_fill50k_without_its_files_says_what_they_are(fill50k: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"none: expected rows of split 'train' in .*prompt\.json.*fill50k\.zip"
    ):
        MyDataset(tmp_path / "none")
    (fill50k / "target/0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"target.0\.png"):
        MyDataset(fill50k)[0]


@pytest.mark.parametrize(
    "line", ["[", '{"source": "a", "target": "b"}', '{"source": 1, "target": "b", "prompt": ""}']
)
def test_fill50k_names_the_line_that_is_wrong(fill50k: Path, line: str) -> None:
    with (fill50k / "prompt.json").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=r"prompt\.json:4: expected a JSON object"):
        MyDataset(fill50k)


def test_fill50k_of_odd_size_needs_one(fill50k: Path) -> None:
    save(fill50k / "target/0.png", np.zeros((100, 100, 3), np.uint8))
    with pytest.raises(ValueError, match="nearest valid size is 128x128"):
        MyDataset(fill50k)[0]


def test_the_tutorial_script_shows_an_item(
    fill50k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tutorial_dataset.main(["--root", str(fill50k), "--index", "1"])
    shown = capsys.readouterr().out
    assert "circle 1" in shown
    assert "jpg (64, 64, 3) float32" in shown
    (fill50k / "source/0.png").unlink()
    for words, said in (
        (["--root", str(fill50k), "--index", "2"], "expected --index in 0..1"),
        (["--root", str(tmp_path / "none")], "prompt.json"),
        (["--root", str(fill50k), "--index", "0"], "source/0.png"),
    ):
        with pytest.raises(SystemExit) as stop:
            tutorial_dataset.main(words)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


def test_the_registry_makes_data_sets_by_name(root: Path, fill50k: Path) -> None:
    dataset = create_dataset("cityscapes", root=root, split="val", size=SMALL)
    assert isinstance(dataset, CityscapesDataset)
    assert len(dataset) == 1
    assert isinstance(create_dataset("fill50k", root=fill50k), Fill50kDataset)
    with pytest.raises(
        ValueError, match=r"'cityscape': expected one of ade20k, cityscapes, .*mean 'cityscapes'"
    ):
        create_dataset("cityscape")


def test_the_registry_agrees_with_the_classes() -> None:
    for entry in DATASETS.values():
        assert entry.load().source == entry.source
        assert getattr(entry.load(), "label_space", None) == entry.label_space


@pytest.mark.parametrize("name", DATASETS)
def test_options_of_every_run_file_are_those_of_its_data_set(name: str) -> None:
    config = load_run_config(name, None, [])
    given = set(tutorial_train.dataset_options(config)) - {"root"}
    assert given <= set(options_of(DATASETS[name].load()))
    for every in ("size", "prompt", "crop", "zoom", "flip", "words", "drop_prompt", "seed"):
        assert every in options_of(DATASETS[name].load())
    assert "options" not in options_of(DATASETS[name].load())


def test_suffixes_in_capitals_are_files_too(tmp_path: Path) -> None:
    ids = np.ones((64, 64), np.uint8)
    add_pair(tmp_path, "images/training/a.JPG", "annotations/training/a.PNG", ids)
    assert create_dataset("ade20k", root=tmp_path, size=(64, 64))[0]["key"] == "a"


def test_the_default_root_is_used_when_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^data.cityscapes: "):
        create_dataset("cityscapes")
    with pytest.raises(FileNotFoundError, match=r"^training.fill50k: "):
        MyDataset()


def test_missing_paths_are_listed(root: Path, tmp_path: Path) -> None:
    assert missing_paths("cityscapes", root) == []
    assert missing_paths("cityscapes", tmp_path / "none") == [tmp_path / "none"]
    assert missing_paths("cityscapes", root / "gtFine") == [
        root / "gtFine/leftImg8bit",
        root / "gtFine/gtFine",
    ]
    assert missing_paths("fill50k", root) == [root / name for name in ("prompt.json", "source", "target")]


def add_pair(root: Path, photo: str, labels: str, ids: np.ndarray, *, grey: bool = False) -> None:
    """A photo of noise and its label map, wherever a data set wants them."""
    shape = ids.shape if grey else (*ids.shape, 3)
    save(root / photo, np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    save(root / labels, ids)


def test_ade20k_reads_its_two_splits_and_zero_is_void(tmp_path: Path) -> None:
    ids = np.array([[0, 1], [7, 150]], np.uint8).repeat(64, axis=0).repeat(64, axis=1)
    add_pair(
        tmp_path, "images/training/ADE_train_1.jpg", "annotations/training/ADE_train_1.png", ids, grey=True
    )
    add_pair(tmp_path, "images/validation/ADE_val_1.jpg", "annotations/validation/ADE_val_1.png", ids)
    train, val = (create_dataset("ade20k", root=tmp_path, split=s, size=(128, 128)) for s in ("train", "val"))
    assert [train[0]["key"], val[0]["key"]] == ["ADE_train_1", "ADE_val_1"]
    assert train[0]["label"][[0, 0, 100, 100], [0, 100, 0, 100]].tolist() == [255, 0, 6, 149]
    assert np.ptp(train[0]["jpg"], axis=2).max() == 0, "a grey photo has three equal channels"
    hint = np.round(train[0]["hint"][[0, 0, 100], [0, 100, 0]] * 255).astype(int)
    assert hint.tolist() == [[0, 0, 0], [120, 120, 120], [140, 140, 140]]
    assert (
        create_dataset("ade20k", root=tmp_path, split="validation", size=(128, 128))[0]["key"] == "ADE_val_1"
    )
    grid = create_dataset("ade20k", root=tmp_path, size=(128, 128), hint="scp_diff_grid")[0]["hint"]
    assert np.round(grid[100, 100] * 255).tolist() == [90, 0, 90]  # 150 = 3 * 49 + 0 * 7 + 3


def test_coco_stuff_keeps_void_and_refuses_ids_beyond_its_table(tmp_path: Path) -> None:
    ids = np.array([[0, 11], [150, 255]], np.uint8).repeat(64, axis=0).repeat(64, axis=1)
    add_pair(tmp_path, "images/train2017/000000000001.jpg", "annotations/train2017/000000000001.png", ids)
    sample = create_dataset("cocostuff", root=tmp_path, size=(128, 128))[0]
    assert sample["label"][[0, 0, 100, 100], [0, 100, 0, 100]].tolist() == [0, 255, 139, 255]
    add_pair(tmp_path, "images/val2017/2.jpg", "annotations/val2017/2.png", np.full((64, 64), 182, np.uint8))
    with pytest.raises(ValueError, match=r"2\.png: expected cocostuff label ids 0\.\.181, 255, found 182"):
        create_dataset("cocostuff", root=tmp_path, split="val", size=(64, 64))[0]
    with pytest.raises(FileNotFoundError, match=r"images/test/\*\.jpg.*splits on disk: train2017, val2017"):
        create_dataset("cocostuff", root=tmp_path, split="test")


def test_gta_has_cityscapes_ids_licence_plates_and_lists_as_splits(tmp_path: Path) -> None:
    ids = np.array([[7, 34]], np.uint8).repeat(64, axis=0).repeat(64, axis=1)
    for number in ("00001", "00002", "00003"):
        add_pair(tmp_path, f"images/{number}.png", f"labels/{number}.png", ids)
    save(tmp_path / "labels/00003_labelTrainIds.png", np.zeros((64, 128), np.uint8))
    (tmp_path / "labels/00002.png").rename(tmp_path / "labels/00002_labelTrainIds.png")
    save(tmp_path / "labels/00002_labelTrainIds.png", np.where(ids == 7, 13, 255).astype(np.uint8))
    frames = create_dataset("gta", root=tmp_path, size=(64, 128))
    assert [(s["key"], *s["label"][0, [0, 100]].tolist()) for s in (frames[i] for i in range(3))] == [
        ("00001", 0, 255),
        ("00002", 13, 255),
        ("00003", 0, 255),
    ]
    plates = create_dataset("gta", root=tmp_path, size=(64, 128), hint="label_colours")[0]
    assert np.round(plates["hint"][0, 100] * 255).tolist() == [0, 0, 142]
    with pytest.raises(FileNotFoundError, match=r"those of val\.txt.*splits on disk: train"):
        create_dataset("gta", root=tmp_path, split="val")
    (tmp_path / "README.txt").write_text("not a split", encoding="utf-8")
    assert len(create_dataset("gta", root=tmp_path, size=(64, 128))) == 3
    (tmp_path / "val.txt").write_text("00003.png\n", encoding="utf-8")
    (tmp_path / "train.txt").write_text("00001\n00002\n", encoding="utf-8")
    keys = {s: [p.key for p in create_dataset("gta", root=tmp_path, split=s).pairs] for s in ("train", "val")}
    assert keys == {"train": ["00001", "00002"], "val": ["00003"]}


@needs_samples
def test_real_coco_stuff_and_gta_maps_are_read() -> None:
    coco = create_dataset("cocostuff", root=SAMPLES.parent / "coco-stuff")
    assert [sample["jpg"].shape for sample in (coco[i] for i in range(len(coco)))] == [(384, 512, 3)] * 4
    present = np.unique(coco[0]["label"]).tolist()
    table = LabelSpace.load("cocostuff")
    named = {table.names[k] for k in present if k != 255}
    assert named == {"person", "cat", "bed", "laptop", "textile-other"}, "what 000000017914.jpg shows"
    maps = create_dataset_class("gta").find_label_maps(SAMPLES.parent / "gta", "train")
    assert list(maps) == ["06835", "07025"]
    ids = create_dataset_class("gta").read_train_ids(maps["07025"])
    np.testing.assert_array_equal(ids, np.asarray(Image.open(maps["07025"])))


def create_dataset_class(name: str) -> type:
    """The class of a data set, for what it knows of files without a photo."""
    return DATASETS[name].load()


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, datasets; assert not {'numpy', 'cv2', 'torch'} & sys.modules.keys();"
        "datasets.DATASETS['cityscapes'].load(); datasets.DATASETS['fill50k'].load();"
        "assert 'torch' not in sys.modules"
    )
    repository = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
