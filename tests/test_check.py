"""The checker of data sets: faults planted in a sound tree are found and named; a sound tree has none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from house import run_script
from PIL import Image

import tool_check_dataset
import tutorial_dataset
import tutorial_train
from datasets import create_dataset
from datasets.base import CAPTIONS
from datasets.check import check_dataset, quick_check, spread
from datasets.check.findings import CODES, Report
from datasets.check.label_faults import BLENDED, share_blended
from datasets.check.palette_guess import guess_palette
from datasets.files import read_image, read_labels
from datasets.label_space import LabelSpace
from datasets.streets.dataset import CARD
from datasets.streets.tree import Plan, make_tree

SPACE = LabelSpace.load("cityscapes")
TRAIN, VAL = 24, 6


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered tree without faults."""
    root = tmp_path_factory.mktemp("sound")
    make_tree(root, Plan(size=(64, 128), train=TRAIN, val=VAL), workers=1)
    return root


@dataclass
class Tree:
    """A copy of the sound tree, to be spoilt."""

    root: Path

    def files(self, kind: str, split: str = "train") -> list[Path]:
        """Photos, labelIds or instanceIds, in the order of their keys."""
        folder, ending = ("leftImg8bit", "leftImg8bit") if kind == "photo" else ("gtFine", f"gtFine_{kind}")
        return sorted((self.root / folder / split).glob(f"*/*_{ending}.png"))

    @property
    def photos(self) -> list[Path]:
        return self.files("photo")

    @property
    def maps(self) -> list[Path]:
        return self.files("labelIds")

    def check(self, **options: object) -> Report:
        return check_dataset("streets", self.root, workers=1, progress=False, **options)

    def rewrite(self, change: Callable[[np.ndarray], np.ndarray], split: str = "train") -> Path:
        """Change all maps of a split; return the first."""
        for path in self.files("labelIds", split):
            Image.fromarray(change(read_labels(path))).save(path)
        return self.files("labelIds", split)[0]


@pytest.fixture
def tree(sound: Path, tmp_path: Path) -> Tree:
    return Tree(Path(shutil.copytree(sound, tmp_path / "tree")))


def test_a_sound_tree_has_no_finding_but_that_it_is_small(sound: Path) -> None:
    report = Tree(sound).check(options={"size": [64, 128]})
    assert report.findings == []
    assert report.may_train
    splits = report.statistics["splits"]
    assert {name: split["examined"] for name, split in splits.items()} == {"train": TRAIN, "val": VAL}
    assert splits["train"]["photo_sizes"] == splits["train"]["map_sizes"] == {"64x128": TRAIN}
    assert splits["train"]["pairs_compared"] == TRAIN
    maps = [SPACE.to_train_ids(read_labels(path), "") for path in Tree(sound).maps]
    counts = np.bincount(np.concatenate([ids.ravel() for ids in maps]), minlength=256)
    shares = splits["train"]["class_shares"]
    np.testing.assert_allclose(list(shares.values()), counts[:19] / counts[:19].sum())
    assert splits["train"]["void_share"] == pytest.approx(counts[255] / counts.sum())


# -- planted faults: each returns the file that has to be named -------------------------------------------


def swap(tree: Tree) -> Path:
    a, b = tree.maps[3], tree.maps[17]
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    return a


def shift_pairs(tree: Tree) -> Path:
    contents = [path.read_bytes() for path in tree.maps]
    for path, content in zip(tree.maps, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    return tree.maps[0]


def mirror_map(tree: Tree) -> Path:
    path = tree.maps[4]
    Image.fromarray(read_labels(path)[:, ::-1]).save(path)
    return path


def leak(tree: Tree) -> Path:
    path = tree.files("photo", "val")[2]
    shutil.copy(tree.photos[0], path)
    return path


def leak_saved_again(tree: Tree) -> Path:
    path = tree.files("photo", "val")[2]
    Image.open(tree.photos[0]).save(path, compress_level=1)
    return path


def repeat_photo(tree: Tree) -> Path:
    shutil.copy(tree.photos[0], tree.photos[1])
    return tree.photos[1]


def paint(tree: Tree, path: Path) -> np.ndarray:
    return LabelSpace.load("ade20k").paint(SPACE.to_train_ids(read_labels(path), ""))


def wrong_palette(tree: Tree) -> Path:
    Image.fromarray(paint(tree, tree.maps[2])).save(tree.maps[2])
    return tree.maps[2]


def wrong_palette_bgr(tree: Tree) -> Path:
    Image.fromarray(paint(tree, tree.maps[2])[..., ::-1].copy()).save(tree.maps[2])
    return tree.maps[2]


def ids_plus_one(tree: Tree) -> Path:
    return tree.rewrite(lambda ids: ids + 1)


def ids_minus_one(tree: Tree) -> Path:
    return tree.rewrite(lambda ids: ids - 1)


def train_ids(tree: Tree) -> Path:
    return tree.rewrite(lambda ids: SPACE.to_train_ids(ids, ""))


def label_ids_as_train_ids(tree: Tree) -> Path:
    for path in tree.maps:
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    return tree.files("labelTrainIds")[0]


def jpeg_map(tree: Tree) -> Path:
    Image.open(tree.maps[6]).save(tree.maps[6], format="JPEG")
    return tree.maps[6]


def cut_map(tree: Tree) -> Path:
    tree.maps[7].write_bytes(tree.maps[7].read_bytes()[:-60])
    return tree.maps[7]


def cut_photo(tree: Tree) -> Path:
    content = tree.photos[7].read_bytes()
    tree.photos[7].write_bytes(content[: len(content) // 2])
    return tree.photos[7]


def spoil_photo(tree: Tree) -> Path:
    content = bytearray(tree.photos[8].read_bytes())
    content[len(content) // 2] ^= 255
    tree.photos[8].write_bytes(content)
    return tree.photos[8]


def lose_void(tree: Tree) -> Path:
    return tree.rewrite(lambda ids: np.where(SPACE.to_train_ids(ids, "") == 255, np.uint8(7), ids))


def all_void(tree: Tree) -> Path:
    Image.fromarray(np.full((64, 128), 3, np.uint8)).save(tree.maps[9])
    return tree.maps[9]


def no_frames(tree: Tree) -> Path:
    shutil.rmtree(tree.root / "leftImg8bit/train")
    shutil.rmtree(tree.root / "gtFine/train")
    return tree.root


def no_validation_frames(tree: Tree) -> Path:
    for path in [*tree.files("photo", "val"), *tree.files("labelIds", "val")]:
        path.unlink()
    return tree.root


def empty_photo(tree: Tree) -> Path:
    tree.photos[10].write_bytes(b"")
    return tree.photos[10]


def empty_map(tree: Tree) -> Path:
    tree.maps[10].write_bytes(b"")
    return tree.maps[10]


def garbage(tree: Tree) -> Path:
    tree.maps[11].write_bytes(np.random.default_rng(0).bytes(5000))
    return tree.maps[11]


def deep_map(tree: Tree) -> Path:
    Image.fromarray(read_labels(tree.maps[12]).astype(np.uint16)).save(tree.maps[12])
    return tree.maps[12]


def instance_map(tree: Tree) -> Path:
    shutil.copy(tree.files("instanceIds")[13], tree.maps[13])
    return tree.maps[13]


def other_shape(tree: Tree) -> Path:
    Image.fromarray(read_labels(tree.maps[14])[:, :100]).save(tree.maps[14])
    return tree.maps[14]


def other_resolution(tree: Tree) -> Path:
    Image.fromarray(read_labels(tree.maps[14])[::2, ::2]).save(tree.maps[14])
    return tree.maps[14]


def change_captions(tree: Tree, change: Callable[[dict[str, str], str], None]) -> Path:
    path = tree.photos[15]
    captions = json.loads((tree.root / CAPTIONS).read_text())
    change(captions, path.name.removesuffix("_leftImg8bit.png"))
    (tree.root / CAPTIONS).write_text(json.dumps(captions))
    return path


def lose_prompt(tree: Tree) -> Path:
    return change_captions(tree, lambda captions, key: captions.pop(key) and None)


def empty_prompt(tree: Tree) -> Path:
    return change_captions(tree, lambda captions, key: captions.update({key: " "}))


def twice(tree: Tree) -> Path:
    other = tree.photos[0].parent.with_name("zurich") / tree.photos[0].name
    other.parent.mkdir()
    shutil.copy(tree.photos[0], other)
    return tree.photos[0]


def blend(tree: Tree) -> Path:
    path = tree.maps[16]
    small = read_labels(path)[::2, ::2]
    Image.fromarray(cv2.resize(small, (128, 64), interpolation=cv2.INTER_LINEAR)).save(path)
    return path


def blend_downwards(tree: Tree) -> Path:
    path = tree.maps[16]
    large = np.kron(read_labels(path), np.ones((3, 3), np.uint8))
    Image.fromarray(cv2.resize(large, (128, 64), interpolation=cv2.INTER_LINEAR_EXACT)[:, ::-1]).save(path)
    large = cv2.resize(large, (90, 45), interpolation=cv2.INTER_AREA)
    Image.fromarray(cv2.resize(large, (128, 64), interpolation=cv2.INTER_LINEAR)).save(path)
    return path


def strange_id(tree: Tree) -> Path:
    ids = read_labels(tree.maps[18])
    ids[:3] = 77
    Image.fromarray(ids).save(tree.maps[18])
    return tree.maps[18]


def lose_map(tree: Tree) -> Path:
    tree.maps[19].unlink()
    return tree.photos[19]


def lose_photo(tree: Tree) -> Path:
    tree.photos[19].unlink()
    return tree.maps[19]


def grey_photo(tree: Tree) -> Path:
    Image.open(tree.photos[20]).convert("L").save(tree.photos[20])
    return tree.photos[20]


def odd_size(tree: Tree) -> Path:
    for path in (tree.photos[21], tree.maps[21]):
        Image.open(path).resize((256, 128), Image.Resampling.NEAREST).save(path)
    return tree.photos[21]


def unfinished(tree: Tree) -> Path:
    (tree.root / CAPTIONS).unlink()
    return tree.root


FAULTS = [
    (swap, "swapped-pair"),
    (shift_pairs, "swapped-pair"),
    (mirror_map, "mirrored-pair"),
    (leak, "leaked-frame"),
    (leak_saved_again, "leaked-frame"),
    (repeat_photo, "duplicate-photo"),
    (wrong_palette, "colour-label"),
    (wrong_palette_bgr, "colour-label"),
    (ids_plus_one, "shifted-ids"),
    (ids_minus_one, "shifted-ids"),
    (train_ids, "shifted-ids"),
    (label_ids_as_train_ids, "shifted-ids"),
    (jpeg_map, "jpeg-label"),
    (cut_map, "damaged-label"),
    (cut_photo, "damaged-image"),
    (spoil_photo, "damaged-image"),
    (lose_void, "void-lost"),
    (all_void, "all-void"),
    (no_frames, "empty-split"),
    (empty_photo, "empty-file"),
    (empty_map, "empty-file"),
    (garbage, "damaged-label"),
    (deep_map, "deep-map"),
    (instance_map, "instance-ids"),
    (other_shape, "size-mismatch"),
    (other_resolution, "other-resolution"),
    (lose_prompt, "missing-prompt"),
    (empty_prompt, "missing-prompt"),
    (twice, "duplicate-stem"),
    (blend, "blended-ids"),
    (blend_downwards, "blended-ids"),
    (strange_id, "unknown-ids"),
    (lose_map, "photo-without-map"),
    (lose_photo, "map-without-photo"),
    (grey_photo, "grey-photo"),
    (odd_size, "odd-size"),
    (unfinished, "cannot-open"),
]


@pytest.mark.parametrize(("plant", "code"), FAULTS, ids=[plant.__name__ for plant, _ in FAULTS])
def test_a_planted_fault_is_found_and_its_file_is_named(
    tree: Tree, plant: Callable[[Tree], Path], code: str
) -> None:
    path = plant(tree)
    report = tree.check(options={"size": [64, 128]})
    found = [item for item in report.findings if item.code == code]
    assert any(item.file == path and str(path) in item.message for item in found), report.text()
    assert {item.severity for item in found} == {CODES[code] if code != "empty-split" else "error"}
    assert report.may_train == (not report.of("error"))
    assert report.may_train == (CODES[code] in ("warning", "note") and code != "empty-split")
    assert str(path) in report.text()


def test_no_fault_is_taken_for_another_one(tree: Tree) -> None:
    swap(tree)
    report = tree.check(options={"size": [64, 128]})
    assert [item.code for item in report.findings] == ["swapped-pair"] * 2
    first, second = report.findings
    assert str(second.file) in first.message  # the map that it should have
    assert str(first.file) in second.message


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (wrong_palette, "of ade20k in RGB order"),
        (wrong_palette_bgr, "of ade20k in BGR order"),
        (ids_plus_one, "read as one too high"),
        (ids_minus_one, "read as one too low"),
        (train_ids, "read as train ids"),
        (label_ids_as_train_ids, "read as label ids"),
        (mirror_map, "mirror image"),
        (instance_map, "class x 1000"),
    ],
)
def test_the_message_says_what_the_files_are(tree: Tree, plant: Callable[[Tree], Path], told: str) -> None:
    plant(tree)
    assert told in tree.check().text()


def test_an_empty_split_that_is_not_trained_on_is_a_warning_unless_it_is_asked_for(tree: Tree) -> None:
    no_validation_frames(tree)
    report = tree.check(options={"size": [64, 128]})
    assert [(item.code, item.severity) for item in report.findings] == [("empty-split", "warning")]
    assert not tree.check(splits=["val"]).may_train


def test_an_exception_that_nobody_thought_of_names_the_frame(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("datasets.check.frame_faults.outline", fail)
    report = tree.check(splits=["val"])
    told = [item for item in report.findings if item.code == "cannot-examine"]
    assert [item.file for item in told] == tree.files("photo", "val")
    assert "ZeroDivisionError: surprise" in told[0].message


def test_every_code_of_the_planted_faults_is_listed_and_json_holds_everything(tree: Tree) -> None:
    for path in tree.maps:
        path.write_bytes(b"")
    report = tree.check()
    text = report.text()
    assert f"error empty-file ({TRAIN})" in text
    assert f"... and {TRAIN - 5} more; all of them are in the JSON" in text
    again = Report.from_json(report.to_json())
    assert (again.findings, again.statistics) == (report.findings, report.statistics)
    assert again.text() == text
    assert json.loads(report.to_json())["may_train"] is False


# -- the quick part ---------------------------------------------------------------------------------------

SEEN_QUICKLY = (
    *(leak, wrong_palette, ids_plus_one, ids_minus_one, train_ids, jpeg_map, cut_map, cut_photo, shift_pairs),
    *(empty_photo, empty_map, garbage, instance_map, other_shape, lose_map, lose_photo),
)


@pytest.mark.parametrize("plant", SEEN_QUICKLY, ids=lambda plant: plant.__name__)
def test_the_quick_part_finds_what_headers_and_a_handful_of_frames_show(
    tree: Tree, plant: Callable[[Tree], Path]
) -> None:
    dataset = create_dataset("streets", root=tree.root, size=(64, 128))
    path = plant(tree)
    if plant is leak:  # of the same name; another one costs reading all
        path = path.with_name(tree.photos[0].name)
        shutil.copy(tree.photos[0], path)
        label = tree.maps[0].name
        shutil.copy(tree.maps[0], tree.files("labelIds", "val")[0].with_name(label))
    report = quick_check(dataset)
    assert report.quick
    code = "mixed-pairs" if plant is shift_pairs else dict(FAULTS)[plant]
    assert code in {item.code for item in report.findings}, report.text()
    assert not report.may_train or code.endswith(("-map", "-photo"))
    if code not in ("mixed-pairs", "shifted-ids"):
        assert path in {item.file for item in report.findings if item.code == code}


def test_the_quick_part_has_nothing_to_say_of_a_sound_tree(sound: Path) -> None:
    report = quick_check(create_dataset("streets", root=sound, size=(64, 128)))
    assert report.findings == []
    assert report.statistics["splits"]["train"]["examined"] == 8
    assert quick_check(object()).may_train


# -- rows of target, control and prompt -------------------------------------------------------------------


@pytest.fixture
def rows(sound: Path, tmp_path: Path) -> Path:
    """Triples with painted controls and label maps, from the sound tree."""
    root, tree = tmp_path / "rows", Tree(sound)
    for name in ("target", "control", "prompt", "label"):
        (root / name).mkdir(parents=True)
    for n, (photo, labels) in enumerate(zip(tree.photos, tree.maps, strict=True)):
        shutil.copy(photo, root / f"target/{n:02d}.png")
        shutil.copy(labels, root / f"label/{n:02d}.png")
        control = SPACE.paint(SPACE.to_train_ids(read_labels(labels), ""))
        Image.fromarray(control).save(root / f"control/{n:02d}.png")
        (root / f"prompt/{n:02d}.txt").write_text(f"street {n}")
    return root


def check_rows(root: Path) -> Report:
    options = {"size": (64, 128), "label_space": "cityscapes"}
    return check_dataset("triples", root, options=options, workers=1, progress=False)


def test_sound_rows_have_no_finding(rows: Path) -> None:
    assert check_rows(rows).findings == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("bgr-control", "control/03.png"),
        ("unknown-colours", "control/03.png"),
        ("missing-prompt", "target/03.png"),
        ("size-mismatch", "control/03.png"),
        ("damaged-image", "control/03.png"),
        ("empty-file", "control/03.png"),
        ("jpeg-label", "label/03.png"),
    ],
)
def test_a_fault_of_a_row_is_found(rows: Path, code: str, name: str) -> None:
    path, control = rows / name, read_image(rows / "control/03.png")
    if code == "bgr-control":
        Image.fromarray(control[..., ::-1].copy()).save(path)
    elif code == "unknown-colours":
        control[:2, :40] += 3
        Image.fromarray(control).save(path)
    elif code == "missing-prompt":
        (rows / "prompt/03.txt").write_text(" \n")
    elif code == "size-mismatch":
        Image.fromarray(control[:40]).save(path)
    elif code == "jpeg-label":
        Image.open(path).save(path, format="JPEG")
    else:
        path.write_bytes(b"" if code == "empty-file" else path.read_bytes()[:50])
    report = check_rows(rows)
    assert [(item.code, item.file) for item in report.findings] == [(code, path)], report.text()


def test_a_row_whose_file_is_gone_is_named(rows: Path) -> None:
    lines = [
        json.dumps({"target": f"target/{n:02d}.png", "control": f"control/{n:02d}.png", "prompt": "a"})
        for n in range(3)
    ]
    (rows / "train.jsonl").write_text("\n".join(lines))
    (rows / "control/01.png").unlink()
    report = check_dataset("triples", rows, workers=1, progress=False)
    (lost,) = report.of("error")
    assert (lost.code, lost.file) == ("missing-file", rows / "control/01.png")


# -- parts ------------------------------------------------------------------------------------------------


def test_blending_is_counted_as_a_loop_over_the_pixels_counts_it() -> None:
    ids = np.random.default_rng(0).integers(0, 9, (14, 17)).astype(np.uint8)
    between = boundaries = 0
    for view in (ids.tolist(), ids.T.tolist()):
        for row in view:
            for a, b in pairwise(row):
                boundaries += abs(a - b) >= 2
            for a, x, b in zip(row, row[1:], row[2:], strict=False):
                between += a < x < b or a > x > b
    assert share_blended(ids) == between / boundaries


def test_drawn_maps_are_not_taken_for_blended_ones(sound: Path) -> None:
    assert max(share_blended(read_labels(path)) for path in Tree(sound).maps) < 0.75 * BLENDED


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "cocostuff", "coco_panoptic133"])
def test_the_palette_of_a_painted_map_is_told(name: str) -> None:
    space = LabelSpace.load(name)
    ids = np.random.default_rng(1).integers(0, space.num_classes, (64, 64)).astype(np.uint8)
    for order, picture in (("RGB", space.paint(ids)), ("BGR", space.paint(ids)[..., ::-1])):
        guess = guess_palette(np.ascontiguousarray(picture))
        assert guess is not None
        assert (guess.palette.partition(" ")[0], guess.order, guess.share) == (name, order, 1)


def test_a_photo_is_no_painted_map(sound: Path) -> None:
    for path in Tree(sound).photos:
        guess = guess_palette(read_image(path))
        assert guess is None or guess.share < 0.5


def test_frames_are_taken_from_all_over() -> None:
    assert spread(range(100), 4) == [12, 37, 62, 87]
    assert spread(range(3), 24) == [0, 1, 2]
    assert spread([], 5) == []


# -- the scripts ------------------------------------------------------------------------------------------


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        tool_check_dataset.main(list(words))
    return int(stop.value.code or 0)


def test_the_exit_status_says_whether_training_may_start(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--dataset", "streets", "--root", str(tree.root), "--workers", "1", "data.size=[64,128]")
    outputs = ("--json", str(tmp_path / "r.json"), "--sheet", str(tmp_path / "s.png"), "--rows", "3")
    assert run(*words, *outputs) == 0
    assert "training may start" in capsys.readouterr().out
    assert Report.from_json((tmp_path / "r.json").read_text()).may_train
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == (4 * 320 + 3 * 4, 3 * 160 + 2 * 4)
    garbage(tree)
    cut_photo(tree)
    assert run(*words, *outputs) == 1
    assert "training should not start" in capsys.readouterr().out
    assert run(*words, "--quick") == 1
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["r.json", "s.png"]  # nothing half written
    assert run("--dataset", "street") == 2
    assert "Did you mean 'streets'" in capsys.readouterr().err
    assert run(*words, "data.hint=colors") == 2
    assert run(*words, "data.sizes=[64,128]") == 2


def test_the_script_runs_on_its_own(sound: Path) -> None:
    result = run_script("tool_check_dataset.py", "--dataset", "cityscapes", "--root", str(sound / "none"))
    assert result.returncode == 1
    assert "error empty-split" in result.stdout


def test_a_sample_of_any_data_set_is_shown(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset", "streets", "--root", str(sound), "--index", "2", "--out", str(tmp_path / "x.png")]
    for hint in ("colours", "onehot"):
        tutorial_dataset.main([*words, "data.size=[64,128]", f"data.hint={hint}"])
        assert f"{TRAIN} items; item 2 is" in capsys.readouterr().out
        with Image.open(tmp_path / "x.png") as picture:
            assert picture.size[0] > 3 * 128
    with pytest.raises(SystemExit, match="2"):
        tutorial_dataset.main([*words[:4], "--out", str(tmp_path / "no" / "x.png")])


@pytest.mark.slow
def test_the_benchmark_prints_one_line_of_json() -> None:
    result = run_script("benchmarks/check_dataset.py", "--frames", "48", "--size", "64", "128")
    assert result.returncode == 0, result.stderr[-2000:]
    record = json.loads(result.stdout)
    assert record["frames_48"]["full"]["may_train"]
    assert record["frames_48"]["full"]["findings"] == record["frames_24"]["quick"]["findings"] == 0


# -- real samples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "folder"), [("cityscapes", "cityscapes"), ("cocostuff", "coco-stuff")])
def test_real_samples_raise_no_alarm(real_data: Path, name: str, folder: str) -> None:
    if not (real_data / folder).is_dir():
        pytest.skip(f"no {folder} in {real_data}")
    report = check_dataset(name, real_data / folder, workers=1, progress=False)
    assert report.of("error") == [], report.text()
    assert {item.code for item in report.findings} <= {"map-without-photo", "withheld-labels", "small-photo"}
    assert CARD not in report.text()


# -- before a training ---------------------------------------------------------------------------------------


def test_training_on_a_faulty_set_is_refused_unless_that_is_asked_for(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = jpeg_map(tree)
    words = [
        "--dataset",
        "cityscapes",
        "--resume_path",
        "random",
        f"data.root={tree.root}",
        "data.size=[64,64]",
    ]
    words += ["model.config=models/none.yaml", f"train.default_root_dir={tmp_path / 'runs'}"]
    for more, said in (
        ([], [broken.name, "training should not start", "python tool_check_dataset.py", "data.check=false"]),
        (["data.check=false"], ["models/none.yaml"]),
    ):
        with pytest.raises(SystemExit) as exit_info:
            tutorial_train.train(tutorial_train.resolve(tutorial_train.parse_args([*words, *more])))
        assert exit_info.value.code == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert all(part in last for part in said)
