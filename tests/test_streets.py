"""Streets: the renderer against closed forms, the palette table and Cityscapes' own conventions."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from house import run_script
from PIL import Image

import tutorial_train
from datasets import create_dataset, find_entry, missing_paths
from datasets.cityscapes import CityscapesDataset
from datasets.label_space import resize_labels
from datasets.streets import CONDITIONS, DOMAINS, StreetsDataset
from datasets.streets import tree as streets_tree
from datasets.streets.caption import WORDS
from datasets.streets.geometry import Camera, Stage, finish, inset
from datasets.streets.layout import build_scene
from datasets.streets.raster import look, paint
from datasets.streets.render import SOURCES, render_frame, renderer_hash
from datasets.streets.tree import Plan, list_items, make_tree

ROOT = Path(__file__).resolve().parent.parent
SMALL = (64, 128)
with (ROOT / "datasets/palettes/cityscapes.tsv").open(encoding="utf-8") as file:
    TABLE = list(csv.DictReader(file, delimiter="\t"))
ROAD, SKY = 7, 23


def digest(frame) -> str:
    content = frame.image.tobytes() + frame.label_ids.tobytes() + frame.instance_ids.tobytes()
    return hashlib.sha256(content + frame.caption.encode()).hexdigest()


@pytest.fixture(scope="module")
def many():
    """Labels of 240 scenes, without their pictures, which no test of labels needs."""
    maps = []
    for seed in range(240):
        scene = build_scene(seed)
        polygons = finish(scene.stage)
        canvas = np.zeros((SMALL[0] * 2, SMALL[1] * 2, 4), np.uint16)
        paint(look(polygons, scene.street.camera, SMALL), canvas, np.zeros((len(polygons.material), 3)))
        labels = np.array([SKY, *np.array(scene.stage.labels)[polygons.thing]])
        maps.append(resize_labels(labels[canvas[..., 3]], SMALL))
    return np.stack(maps)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("streets") / "data"
    make_tree(root, Plan(size=SMALL, train=7, val=5), workers=1)
    return root


# -- determinism -------------------------------------------------------------------------------------------


def test_another_process_gives_the_same_bytes_in_another_order_on_another_number_of_threads() -> None:
    code = (
        "import cv2; cv2.setNumThreads(7)\nimport sys; sys.path.insert(0, 'tests')\n"
        "from test_streets import digest, render_frame\n"
        "for seed in (5, 4):\n"
        "    print(digest(render_frame(seed, domain='camera', condition='rain')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    here = [digest(render_frame(seed, domain="camera", condition="rain")) for seed in (4, 5)]
    assert done.stdout.split() == here[::-1]


def test_labels_do_not_depend_on_how_it_looks() -> None:
    frames = [render_frame(11, SMALL, domain=d, condition=c) for d in DOMAINS for c in CONDITIONS]
    assert len({frame.label_ids.tobytes() for frame in frames}) == 1
    assert len({frame.instance_ids.tobytes() for frame in frames}) == 1
    assert len({frame.image.tobytes() for frame in frames}) == len(DOMAINS) * len(CONDITIONS)


@pytest.mark.parametrize("seed", range(6))
def test_the_same_seed_at_twice_the_size_is_the_same_scene(seed: int) -> None:
    small, large = render_frame(seed, (128, 256)), render_frame(seed, (256, 512))
    assert (resize_labels(large.label_ids, (128, 256)) == small.label_ids).mean() > 0.95
    other = render_frame(seed + 100, (256, 512))
    assert (resize_labels(other.label_ids, (128, 256)) == small.label_ids).mean() < 0.9


def test_the_hash_is_that_of_all_sources_that_draw() -> None:
    folder = ROOT / "datasets/streets"
    assert {*SOURCES} == {path.name for path in folder.glob("*.py")} - {
        "__init__.py",
        "crops.py",
        "photos.py",
        "dataset.py",
        "tree.py",
    }
    joined = b"".join((folder / name).read_text(encoding="utf-8").encode() for name in sorted(SOURCES))
    assert renderer_hash() == hashlib.sha256(joined).hexdigest()


# -- geometry ----------------------------------------------------------------------------------------------


def test_the_camera_projects_as_a_pinhole() -> None:
    camera, size = Camera(height=1.5, pitch=math.radians(3), focal=0.9), (128, 256)
    point = np.array([(2.0, 0.7, 12.0)])
    # By rotation matrix: x-axis turn by the pitch, then divide by depth.
    sin, cos = math.sin(camera.pitch), math.cos(camera.pitch)
    turn = np.array([(1, 0, 0), (0, cos, sin), (0, -sin, cos)])
    x, y, z = turn @ (point[0] - (0, 1.5, 0))
    flat, depth = camera.project(point, size)
    assert depth[0] == pytest.approx(z)
    assert flat[0] == pytest.approx((128 + 0.9 * 256 * x / z, 64 - 0.9 * 256 * y / z))
    far, _ = camera.project(np.array([(0, 1.5, 1e7)]), size)
    assert camera.horizon(size) == pytest.approx(far[0, 1], abs=1e-3)


def test_ground_depth_is_the_inverse_of_projection() -> None:
    camera, size = Camera(height=1.4, pitch=math.radians(2), focal=0.8), (128, 256)
    depth = camera.ground_depth(size)
    row = 100
    for z in (3.0, 8.0, 30.0):
        flat, expected = camera.project(np.array([(0, 0, z)]), size)
        row = int(flat[0, 1])
        if row < 127:
            assert depth[row + 1] < expected[0] < depth[max(row - 1, 0)]


@pytest.mark.parametrize("depth", [5.0, 20.0, 60.0])
@pytest.mark.parametrize("x", [-1.03, 0.0, 0.41, 1.77])
def test_a_thin_pole_is_one_pixel_wide_and_a_near_one_as_wide_as_projected(depth: float, x: float) -> None:
    camera, size, width = Camera(height=1.5, pitch=0.0, focal=1.0), (128, 256), 0.12
    stage = Stage()
    stage.thing(17, depth)
    stage.lines([(x, 0, depth), (x, 3, depth)], width, "pole")
    polygons = finish(stage)
    canvas = np.zeros((256, 512, 4), np.uint16)
    paint(look(polygons, camera, size), canvas, np.zeros((1, 3)))
    shown = resize_labels(canvas[..., 3], size)[64].sum()
    assert abs(shown - max(1, width * 256 / depth)) <= 1
    assert shown >= 1


def test_near_things_hide_far_ones_whatever_the_order_of_building() -> None:
    stage = Stage()
    for depth, label in ((5.0, 26), (50.0, 11), (10.0, 24)):
        stage.thing(label, depth)
        half = 0.1 * depth
        stage.add([(-half, 0, depth), (half, 0, depth), (half, 2, depth), (-half, 2, depth)], "paint")
    polygons = finish(stage)
    assert [stage.labels[thing] for thing in polygons.thing] == [11, 24, 26]


def test_inset_is_bilinear() -> None:
    quad = np.array([(0, 0, 0), (4, 0, 0), (4, 2, 2), (0, 2, 2)], float)
    assert inset(quad, (0.25, 0.5, 0.5, 1)).tolist() == [[[1, 1, 1], [2, 1, 1], [2, 2, 2], [1, 2, 2]]]


# -- labels ------------------------------------------------------------------------------------------------


def test_every_class_appears_and_every_id_is_one_of_cityscapes(many) -> None:
    known = {int(row["id"]): int(row["trainId"]) for row in TABLE if int(row["id"]) >= 0}
    found = set(np.unique(many).tolist())
    assert found <= known.keys()
    assert {known[i] for i in found} >= set(range(19))
    assert len([i for i in found if known[i] == 255]) >= 6  # void of several kinds


def test_rare_classes_are_rare_and_the_street_is_in_the_right_place(many) -> None:
    share = np.bincount(many.ravel(), minlength=40) / many.size
    for label in (12, 19, 25, 27, 28, 31, 32):
        assert 0.0002 < share[label] < 0.012, label
    assert share[ROAD] > share[11] > share[26] > share[24] > share[25]
    assert (many[:, 40:52, 56:72] == ROAD).mean() > 0.7
    assert (many[:, 40:] == SKY).sum() == 0
    assert (many[:, :16] == ROAD).sum() == 0


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_instance_ids_follow_label_ids(seed: int) -> None:
    frame = render_frame(seed, SMALL)
    counted = {int(row["id"]) for row in TABLE if row["hasInstances"] == "1"}
    for label, instance in set(
        zip(frame.label_ids.ravel().tolist(), frame.instance_ids.ravel().tolist(), strict=True)
    ):
        if label in counted:
            assert instance // 1000 == label
        else:
            assert instance == label
    cars = np.unique(frame.instance_ids[frame.label_ids == 26])
    assert len(cars) > 1, "a street has several cars, each with its number"


# -- captions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_captions_name_the_condition_and_the_largest_classes(seed: int) -> None:
    words = {"clear": "clear", "rain": "rain", "fog": "fog", "snow": "snow", "night": "night"}
    condition, domain = CONDITIONS[seed % 5], DOMAINS[seed % 2]
    frame = render_frame(seed, SMALL, domain=domain, condition=condition)
    place, _, listed = frame.caption.partition(" with ")
    assert [w for w in words.values() if re.search(rf"\b{w}\b", place)] == [words[condition]]
    assert ("game" in place) == (domain == "game")
    sizes = {label: int((frame.label_ids == label).sum()) for label in WORDS}
    named = [next(i for i, w in WORDS.items() if w == word) for word in re.split(", | and ", listed)]
    assert [sizes[i] for i in named] == sorted((sizes[i] for i in named), reverse=True)
    assert max(sizes, key=lambda i: sizes[i]) == named[0]
    assert min(sizes[i] for i in named) > 0.003 * frame.label_ids.size


# -- appearance --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looks():
    """Grey pictures by condition, and their labels, of eight scenes."""
    frames = {c: [render_frame(seed, SMALL, condition=c) for seed in range(20, 28)] for c in CONDITIONS}
    labels = np.stack([frame.label_ids for frame in frames["clear"]])
    pictures = {c: np.stack([f.image.astype(float) for f in row]) for c, row in frames.items()}
    return pictures, labels


def test_night_is_dark_and_snow_is_white_on_the_ground(looks) -> None:
    pictures, labels = looks
    brightness = {condition: picture.mean() for condition, picture in pictures.items()}
    assert brightness["night"] < 0.55 * brightness["clear"]
    walk = np.isin(labels, (8, 22))
    assert pictures["snow"][walk].mean() > pictures["clear"][walk].mean() + 30


def test_fog_takes_the_contrast_of_what_is_far_and_leaves_that_of_what_is_near(looks) -> None:
    pictures, labels = looks
    far, near = labels == 11, labels == ROAD
    far[:, :14], far[:, 30:], far[..., :54], far[..., 74:] = (
        False,
        False,
        False,
        False,
    )  # the end of the street
    near[:, :44], near[:, 54:] = False, False
    kept = {
        name: pictures["fog"][area].std(axis=0).mean() / pictures["clear"][area].std(axis=0).mean()
        for name, area in (("far", far), ("near", near))
    }
    assert kept["far"] < 0.4
    assert kept["near"] > 1.5 * kept["far"]
    sky = pictures["fog"][labels == SKY]
    assert sky.std() < pictures["clear"][labels == SKY].std()


def test_a_wet_road_is_darker_and_reflects(looks) -> None:
    pictures, labels = looks
    road = labels == ROAD
    assert pictures["rain"][road].mean() < pictures["clear"][road].mean()
    # A dry road is grey everywhere; a wet one takes the colours of what stands on it.
    colour = {c: (pictures[c].max(-1) - pictures[c].min(-1))[road].std() for c in ("rain", "snow")}
    assert colour["rain"] > colour["snow"]


def test_games_are_more_colourful_and_cameras_have_grain() -> None:
    game, camera = (render_frame(31, SMALL, domain=d).image.astype(np.float32) for d in ("game", "camera"))
    assert (game.max(-1) - game.min(-1)).mean() > 1.15 * (camera.max(-1) - camera.min(-1)).mean()
    road = render_frame(31, SMALL).label_ids == ROAD
    flat = cv2.erode(road.astype(np.uint8), np.ones((5, 5))) > 0
    edges = {n: np.abs(cv2.Laplacian(im[..., 1], cv2.CV_32F))[flat] for n, im in (("g", game), ("c", camera))}
    assert np.median(edges["g"]) < 0.5 < np.median(edges["c"])


@pytest.mark.parametrize("wrong", [{"domain": "film"}, {"condition": "hail"}, {"size": (100, 256)}])
def test_what_cannot_be_rendered_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"expected|multiples of 64"):
        render_frame(0, **wrong)


# -- the tree ----------------------------------------------------------------------------------------------


def test_the_tree_has_cityscapes_names_and_nothing_else(tree: Path) -> None:
    files = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    name = r"(train|val)/([a-z-]+)/\2_\d{6}_\d{6}"
    photos = {f for f in files if re.fullmatch(rf"leftImg8bit/{name}_leftImg8bit\.png", f)}
    labels = {f for f in files if re.fullmatch(rf"gtFine/{name}_gtFine_(color|labelIds|instanceIds)\.png", f)}
    assert (len(photos), len(labels)) == (12, 36)
    assert files - photos - labels == {"captions.json", "streets.json"}


def test_cityscapes_own_loader_reads_it_and_ours_adds_captions(tree: Path) -> None:
    plain = CityscapesDataset(tree, "val", size=SMALL)
    ours = create_dataset("streets", root=tree, split="val", size=SMALL)
    assert isinstance(ours, StreetsDataset)
    assert len(plain) == len(ours) == 5
    for a, b in zip((plain[i] for i in range(5)), (ours[i] for i in range(5)), strict=True):
        assert a["key"] == b["key"]
        np.testing.assert_array_equal(a["jpg"], b["jpg"])
        np.testing.assert_array_equal(a["label"], b["label"])
        condition = b["key"].split("_")[0].partition("-")[2]
        frame = render_frame(1_000_000 + int(b["key"][-6:]), SMALL, condition=condition)
        assert b["txt"] == frame.caption
        np.testing.assert_array_equal(np.round((b["jpg"] + 1) * 127.5), frame.image)
    assert StreetsDataset(tree, "val", SMALL, prompt="x")[0]["txt"] == "x"
    assert (
        StreetsDataset.preview(2, root=tree, split="val", size=SMALL, prompts=ours.prompts)[1]["txt"]
        == ours[1]["txt"]
    )


def test_colour_files_hold_the_colours_of_the_table_void_ids_too(tree: Path) -> None:
    colours = {int(row["id"]): (int(row["R"]), int(row["G"]), int(row["B"]), 255) for row in TABLE}
    voids = set()
    for path in sorted(tree.rglob("*_labelIds.png"))[:6]:
        ids = np.array(Image.open(path))
        painted = Image.open(str(path).replace("labelIds", "color"))
        assert (painted.mode, ids.dtype) == ("RGBA", np.uint8)
        pixels = painted.load()
        for row in range(0, SMALL[0], 3):
            for column in range(0, SMALL[1], 3):
                assert pixels[column, row] == colours[int(ids[row, column])]
        voids |= set(np.unique(ids).tolist()) & {1, 4, 5, 6, 9, 10}
    assert voids
    instances = np.array(Image.open(str(path).replace("labelIds", "instanceIds")))
    np.testing.assert_array_equal(np.where(instances >= 1000, instances // 1000, instances), ids)


def test_an_interrupted_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, calls = Plan(size=SMALL, train=4, val=1, conditions=("clear",)), []
    real = streets_tree.render_frame

    def interrupted(seed, *args, **kwargs):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(seed, *args, **kwargs)

    monkeypatch.setattr(streets_tree, "render_frame", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_tree(tmp_path / "a", plan, workers=1)
    assert missing_paths("streets", tmp_path / "a") == [tmp_path / "a/captions.json"]
    next((tmp_path / "a").rglob("*_000001_leftImg8bit.png")).unlink()  # as if killed before its last file
    make_tree(tmp_path / "a", plan, workers=1)
    assert calls == [0, 1, 2, 1, 2, 3, 1_000_000]
    make_tree(tmp_path / "b", plan, workers=1)
    trees = [
        {
            str(p.relative_to(tmp_path / name)): p.read_bytes()
            for p in (tmp_path / name).rglob("*")
            if p.is_file()
        }
        for name in "ab"
    ]
    assert trees[0] == trees[1]


def test_another_size_or_renderer_is_not_mixed_in(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"streets\.json: expected frames of .* 128x256, found"):
        make_tree(tree, Plan(size=(128, 256), train=1, val=0))


def test_splits_and_seeds_never_share_a_scene() -> None:
    plans = [Plan(train=50, val=20, seed=seed) for seed in range(3)]
    seeds = [
        {item.seed for item in list_items(plan) if item.split == split}
        for plan in plans
        for split in ("train", "val")
    ]
    assert [len(s) for s in seeds] == [50, 20] * 3
    assert len(set().union(*seeds)) == 210
    with pytest.raises(ValueError, match="at most 1000000"):
        list_items(Plan(train=1_000_001))


def test_several_processes_write_the_same_bytes(tmp_path: Path, tree: Path) -> None:
    plan = Plan(size=SMALL, train=33, val=0, conditions=("night", "fog"))
    make_tree(tmp_path / "two", plan, workers=2)
    item = list_items(plan)[32]
    with Image.open(item.paths(tmp_path / "two")["photo"]) as picture:
        np.testing.assert_array_equal(picture, render_frame(32, SMALL, condition="night").image)


def test_training_renders_what_is_missing_and_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(streets_tree, "make_tree", lambda root, **options: made.append((root, options)))
    monkeypatch.setattr(tutorial_train, "train", lambda config: made.append("train"))
    run = ["--dataset", "streets", "--resume_path", "random", f"data.root={tmp_path / 'x'}"]
    tutorial_train.main(run)
    assert made == [(str(tmp_path / "x"), {"size": (128, 256)}), "train"]
    for name in find_entry("streets").expected:
        (tmp_path / "x" / name).mkdir(parents=True)
    tutorial_train.main(run)
    assert made[2:] == ["train"]
    with pytest.raises(ValueError, match="obtained from https"):
        find_entry("cityscapes").make()


# -- the scripts -------------------------------------------------------------------------------------------


def test_the_tool_renders_and_refuses_what_it_cannot(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = run_script(
        "tool_make_streets.py",
        *("--train", "2", "--val", "1", "--size", "64", "128", "--domain", "game", "--out", out),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3/3" in done.stderr  # the progress bar
    assert sorted(path.name for path in (tmp_path / "out/leftImg8bit").iterdir()) == ["train", "val"]
    for wrong, named in (
        (("--size", "100", "256"), "--size"),
        (("--train", "-1"), "--train"),
        (("--out", __file__), "--out"),
    ):
        refused = run_script("tool_make_streets.py", *wrong)
        assert refused.returncode == 2
        assert named in refused.stderr.splitlines()[-1]


def test_the_benchmark_prints_one_line() -> None:
    done = run_script(
        "benchmarks/render_streets.py", "--scenes", "2", "--workers", "1", "--size", "64", "128"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["scenes_per_s"] > 0
    done = run_script("benchmarks/render_streets.py", "--statistics", "--scenes", "3", "--size", "64", "128")
    ours = [row["ours"] for row in json.loads(done.stdout)["classes"].values()]
    assert sum(ours) == pytest.approx(1, abs=0.01)
