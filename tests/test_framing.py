"""Windows of frames: one for photo, map and hint; ids stay ids; and the order of a run's samples."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import write_frame
from torch.utils.data import DataLoader

from datasets.cityscapes import CityscapesDataset
from datasets.framing import CROPS, Framing, Window
from datasets.label_space import resize_labels
from datasets.stream import Stream, order_of

SIZES = st.tuples(st.integers(1, 4).map(lambda n: 64 * n), st.integers(1, 4).map(lambda n: 64 * n))
FRAMES = st.tuples(st.integers(8, 300), st.integers(8, 300))


@settings(max_examples=300)
@given(
    frame=FRAMES,
    size=SIZES,
    crop=st.sampled_from(CROPS),
    flip=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 999),
)
def test_a_window_lies_in_its_frame_and_has_the_shape_of_the_sample(
    frame: tuple[int, int], size: tuple[int, int], crop: str, flip: float, seed: int
) -> None:
    zoom = (1.0, 3.0) if crop == "random" else (1.0, 1.0)
    framing = Framing(size, crop, zoom, flip)
    window = framing.window(frame, np.random.default_rng(seed))
    assert 0 <= window.top <= window.top + window.height <= frame[0]
    assert 0 <= window.left <= window.left + window.width <= frame[1]
    assert window.height >= 1 <= window.width
    if crop == "none":
        assert (window.height, window.width) == frame
    else:  # its shape is that of the sample to within the rounding to pixels
        assert abs(window.height * size[1] - window.width * size[0]) <= max(size) + min(size)
    if flip in (0, 1):
        assert window.mirrored == bool(flip)
    again = framing.window(frame, np.random.default_rng(seed))
    assert again == window


@settings(max_examples=300)
@given(frame=FRAMES, size=SIZES, flip=st.booleans(), seed=st.integers(0, 10_000))
def test_ids_after_window_flip_and_resize_are_a_subset_of_those_before(
    frame: tuple[int, int], size: tuple[int, int], flip: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 256, frame, np.uint8)
    window = Framing(size, "random", (1.0, 2.0), float(flip)).window(frame, rng)
    assert set(np.unique(resize_labels(window.cut(ids), size))) <= set(np.unique(ids))


@pytest.mark.slow
def test_ten_thousand_maps_keep_their_ids() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        frame, size = rng.integers(4, 200, 2), 64 * rng.integers(1, 4, 2)
        values = rng.integers(0, 256, rng.integers(1, 6), np.uint8)
        ids = rng.choice(values, frame)
        framing = Framing((int(size[0]), int(size[1])), "random", (1.0, 4.0), flip=0.5)
        found = resize_labels(framing.window(ids.shape, rng).cut(ids), framing.size)
        assert found.shape == framing.size
        assert set(np.unique(found)) <= set(values)


def test_a_cut_is_what_a_loop_over_its_pixels_gives() -> None:
    ids = np.arange(20 * 30).reshape(20, 30)
    for mirrored in (False, True):
        window = Window((20, 30), 3, 5, 7, 11, mirrored)
        loop = [[ids[3 + y, 5 + (10 - x if mirrored else x)] for x in range(11)] for y in range(7)]
        assert window.cut(ids).tolist() == loop
        photo = np.stack([ids] * 3, axis=2)
        assert window.cut(photo)[..., 1].tolist() == loop


def test_a_map_of_half_the_size_is_cut_at_the_same_place() -> None:
    ids = np.random.default_rng(0).integers(0, 19, (40, 80), np.uint8)
    photo = np.repeat(np.repeat(ids, 2, axis=0), 2, axis=1)
    window = Window((80, 160), 10, 20, 40, 60, mirrored=True)
    np.testing.assert_array_equal(window.cut(photo)[::2, ::2], window.cut(ids))


def test_the_centre_is_the_centre_and_the_largest_window() -> None:
    window = Framing((64, 64), "centre").window((100, 200), np.random.default_rng(0))
    assert (window.top, window.left, window.height, window.width) == (0, 50, 100, 100)
    window = Framing((64, 128), "centre").window((100, 100), np.random.default_rng(0))
    assert (window.top, window.left, window.height, window.width) == (25, 0, 50, 100)


def test_random_windows_and_mirrors_are_everywhere_alike() -> None:
    framing, tops, mirrored = Framing((64, 64), "random", (2.0, 2.0), flip=0.3), Counter(), 0
    for seed in range(4000):
        window = framing.window((20, 10), np.random.default_rng(seed))
        assert (window.height, window.width) == (5, 5)
        tops[window.top] += 1
        mirrored += window.mirrored
    assert set(tops) == set(range(16))
    chi_square = sum((n - 250) ** 2 / 250 for n in tops.values())
    assert chi_square < 37.7  # the 0.1 % point for 15 degrees of freedom
    assert abs(mirrored / 4000 - 0.3) < 0.03


def test_a_window_around_a_pixel_shows_it_anywhere_in_it() -> None:
    framing, rng, seen = Framing((64, 64), "random", (2.0, 4.0)), np.random.default_rng(0), set()
    for _ in range(500):
        pixel = (int(rng.integers(40)), int(rng.integers(60)))
        window = framing.moved(framing.window((40, 60), rng), pixel, rng)
        y, x = pixel[0] - window.top, pixel[1] - window.left
        assert 0 <= y < window.height
        assert 0 <= x < window.width
        assert 0 <= window.top <= 40 - window.height
        assert 0 <= window.left <= 60 - window.width
        seen.add((4 * y // window.height, 4 * x // window.width))
    assert len(seen) == 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"crop": "center"}, "unknown crop 'center': expected one of none, centre, random"),
        ({"crop": "random", "zoom": (0.5, 2.0)}, r"expected a zoom of \[LOW,HIGH\] with 1 <= LOW"),
        ({"zoom": (1.0, 2.0)}, "expected crop 'random' for a zoom"),
        ({"flip": 1.5}, "expected a share of mirrored samples in 0..1, found 1.5"),
    ],
)
def test_a_wrong_framing_is_one_sentence(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Framing((64, 64), **options)


# -- a data set with windows, and the order of its samples ---------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Five frames in which every pixel has its own colour, and the map the class of its column."""
    columns = np.arange(128, dtype=np.uint8)
    for i in range(5):
        photo = np.zeros((64, 128, 3), np.uint8)
        photo[..., 0], photo[..., 1], photo[..., 2] = columns, np.arange(64)[:, None], i
        ids = np.broadcast_to(np.where(columns < 64, 7, 8).astype(np.uint8), (64, 128))
        write_frame(tmp_path, "train", f"ulm_00000{i}_000019", photo, ids)
    return tmp_path


def build(tree: Path, **options: object) -> CityscapesDataset:
    return CityscapesDataset(tree, size=(64, 64), **options)


def test_photo_map_and_hint_are_cut_as_one(tree: Path) -> None:
    dataset = build(tree, crop="random", flip=0.5)
    sides = set()
    for seed in range(20):
        sample = dataset.sample(seed % 5, np.random.default_rng(seed))
        columns = np.round((sample["jpg"][0, :, 0] + 1) * 127.5)
        np.testing.assert_array_equal(sample["label"][0], np.where(columns < 64, 0, 1))
        np.testing.assert_allclose(sample["hint"], dataset.space.paint(sample["label"]) / 255, atol=1e-6)
        sides.add(columns[1] > columns[0])
    assert sides == {True, False}


def test_every_frame_comes_once_in_a_pass_and_passes_differ(tree: Path) -> None:
    stream = Stream(build(tree), seed=3, length=15)
    keys = [stream[i]["key"] for i in range(15)]
    passes = [keys[i : i + 5] for i in (0, 5, 10)]
    assert [len(set(part)) for part in passes] == [5, 5, 5]
    assert len({tuple(part) for part in passes}) > 1
    assert len(stream) == 15
    with pytest.raises(IndexError, match=r"0..14, found 15"):
        stream[15]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_depends_on_seed_and_number_alone(tree: Path, workers: int) -> None:
    stream = Stream(build(tree, crop="random", zoom=(1.0, 2.0), flip=0.5), seed=1, length=12)
    expected = [stream[i]["jpg"] for i in (7, 2, 11, 0, 1, 3, 4, 5, 6, 8, 9, 10)]
    expected = [expected[(7, 2, 11, 0, 1, 3, 4, 5, 6, 8, 9, 10).index(i)] for i in range(12)]
    loader = DataLoader(stream, batch_size=3, num_workers=workers)
    found = np.concatenate([batch["jpg"].numpy() for batch in loader])
    np.testing.assert_array_equal(found, np.stack(expected))
    assert len({image.tobytes() for image in expected}) == 12, "no two samples of a run are the same"
    other = Stream(build(tree, crop="random", zoom=(1.0, 2.0), flip=0.5), seed=2, length=12)
    assert not np.array_equal(other[0]["jpg"], expected[0])


def test_a_damaged_frame_is_named_and_another_stands_in(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = tree / "leftImg8bit/train/ulm/ulm_000002_000019_leftImg8bit.png"
    broken.write_bytes(broken.read_bytes()[:100])
    stream = Stream(build(tree), seed=0, length=100, budget=3)
    with caplog.at_level(logging.WARNING):
        keys = [stream[i]["key"] for i in range(100)]
    assert set(keys) == {f"ulm_00000{i}_000019" for i in (0, 1, 3, 4)}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, "twenty passes, one fault"
    assert said[0].startswith("skipped (1 of at most 3 faults)")
    assert str(broken) in said[0]
    for path in (tree / "leftImg8bit").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected at most 3 faults in the data, found 4; the last: .*png"):
        stream[0]


def test_a_stream_can_be_handed_to_spawned_processes(tree: Path) -> None:
    stream = Stream(build(tree), seed=0, length=4)
    loader = DataLoader(stream, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert [key for batch in loader for key in batch["key"]] == [stream[i]["key"] for i in range(4)]


def test_an_order_is_a_permutation_of_its_pass() -> None:
    assert sorted(order_of(1000, 0, 0).tolist()) == list(range(1000))
    assert not np.array_equal(order_of(1000, 0, 0), order_of(1000, 0, 1))
    assert not np.array_equal(order_of(1000, 0, 0), order_of(1000, 1, 0))
