"""Features, distances and passes over images: torchmetrics' own classes, known answers, exact merging."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_samples import JUDGE, noisy, write_alexnet, write_inception
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from datasets.label_space import LabelSpace
from datasets.streets.render import render_frame
from metrics.blocks import BLOCK, Block, split
from metrics.diversity import DiversityWork, load_lpips
from metrics.features import inception_work, kernel_distance, load_inception, moments_of
from metrics.frechet import frechet_distance
from metrics.image_sets import Item, Picture, resize_picture
from metrics.judge import StreetsJudge
from metrics.segmentation import bootstrap_interval, mean_iou_of, score_of
from metrics.segmentation_card import ratio_of_ious
from metrics.segmenters import SegmentationWork, from_images

CPU = torch.device("cpu")
Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="module")
def frames() -> tuple[Images, NDArray[np.uint8]]:
    """Rendered photos (8, 128, 256, 3), and their train ids."""
    drawn = [render_frame(seed) for seed in range(8)]
    space = LabelSpace.load("cityscapes")
    labels = [space.to_train_ids(frame.label_ids, "drawn") for frame in drawn]
    return np.stack([frame.image for frame in drawn]), np.stack(labels)


def jpeg(image: Images, quality: int) -> Images:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file))


def block_of(images: Images, labels: NDArray[np.uint8] | None = None, keys: list[str] | None = None) -> Block:
    names = keys or [str(i) for i in range(len(images))]
    items = [Item(name, Picture(Path(name), (1, 1), "RGB", "PNG")) for name in names]
    return Block(items, images, labels)


# -- distances -----------------------------------------------------------------------------------------------


class Extractor(nn.Module):
    """Our features for torchmetrics, which hands images over as (n, 3, H, W)."""

    num_features = 64

    def __init__(self, extract: Callable[[Images], NDArray[np.float32]]) -> None:
        super().__init__()
        self.extract = extract

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.extract(images.permute(0, 2, 3, 1).contiguous().numpy()))


def test_distances_are_those_of_torchmetrics(inception: Path, frames: tuple[Images, NDArray]) -> None:
    photos = frames[0]
    worse = np.stack([noisy(photo, 30, i) for i, photo in enumerate(photos)])
    extract = inception_work(inception, "64", CPU, {}).extract
    fid = FrechetInceptionDistance(Extractor(extract)).set_dtype(torch.float64)
    for images, is_real in ((photos, True), (worse, False)):
        fid.update(torch.from_numpy(images).permute(0, 3, 1, 2), real=is_real)
    a, b = extract(photos), extract(worse)
    found = frechet_distance(moments_of([a]), moments_of([b]))
    assert found == pytest.approx(fid.compute().item(), abs=1e-6)
    whole = kernel_distance([a], [b], subsets=1, subset_size=1000)
    expected = poly_mmd(torch.from_numpy(a).double(), torch.from_numpy(b).double()).item()
    assert whole["subset_size"] == 8, "no more than there are"
    assert whole["mean"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_the_distance_at_full_width_is_that_of_torch_fidelity(inception: Path, frames: tuple) -> None:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    extract = inception_work(inception, "2048", CPU, {}).extract
    sets = [extract(some) for some in (frames[0], np.stack([jpeg(photo, 10) for photo in frames[0]]))]
    theirs = [fid_features_to_statistics(torch.from_numpy(some)) for some in sets]
    expected = fid_statistics_to_metric(*theirs, verbose=False)[KEY_METRIC_FID]
    found = frechet_distance(*(moments_of(np.array_split(some, 3)) for some in sets))
    assert found == pytest.approx(expected, abs=1e-6)
    assert expected > 1e-3


def test_features_are_those_of_torch_fidelitys_network(inception: Path, frames: tuple) -> None:
    network = load_inception(inception, "64", CPU)
    expected = network(torch.from_numpy(frames[0]).permute(0, 3, 1, 2))[0].numpy()
    assert np.array_equal(inception_work(inception, "64", CPU, {}).extract(frames[0]), expected)


def test_parts_merge_to_one_pass() -> None:
    features = np.random.default_rng(0).normal(size=(90, 16)).astype(np.float32) + 5
    other = features[::-1] * 1.5
    whole = frechet_distance(moments_of([features]), moments_of([other]))
    for cuts in ([1, 30], [45], [89], list(range(1, 90))):
        parts = np.split(features, cuts)
        assert frechet_distance(moments_of(parts), moments_of([other])) == pytest.approx(whole, abs=1e-10)
        distances = [
            kernel_distance(some, [other], subsets=5, subset_size=20) for some in (parts, [features])
        ]
        assert distances[0] == distances[1]


def test_known_changes_are_ordered(inception: Path, frames: tuple[Images, NDArray]) -> None:
    photos = frames[0]
    extract = inception_work(inception, "64", CPU, {}).extract
    real = moments_of([extract(photos)])

    def distance(images: Images) -> float:
        return frechet_distance(real, moments_of([extract(images)]))

    identical, shuffled = distance(photos), distance(photos[::-1].copy())
    fine, coarse = (distance(np.stack([jpeg(p, quality) for p in photos])) for quality in (90, 10))
    noise = distance(np.stack([noisy(np.full_like(p, 128), 60, i) for i, p in enumerate(photos)]))
    assert identical == pytest.approx(0, abs=1e-6)
    assert shuffled == pytest.approx(0, abs=1e-6)
    assert 1e-5 < fine < coarse < noise


# -- agreement with maps -------------------------------------------------------------------------------------


def test_known_changes_lower_the_agreement_with_the_maps(frames: tuple[Images, NDArray]) -> None:
    photos, labels = frames
    work = SegmentationWork(from_images(StreetsJudge.load(JUDGE)), LabelSpace.load("cityscapes"), {})

    def miou(images: Images, truth: NDArray[np.uint8] = labels) -> float:
        return score_of(work(block_of(images, truth))["margins"]).miou

    real = miou(photos)
    coarse = miou(np.stack([jpeg(photo, 10) for photo in photos]))
    moved = miou(photos, np.roll(labels, 24, axis=2))
    shuffled = miou(photos, np.roll(labels, 3, axis=0))
    noise = miou(np.stack([noisy(np.full_like(p, 128), 60, i) for i, p in enumerate(photos)]))
    assert real > 0.3
    assert noise < shuffled < moved < real
    assert noise < coarse < real


def test_margins_hold_what_the_matrices_hold(frames: tuple[Images, NDArray]) -> None:
    photos, labels = frames
    work = SegmentationWork(from_images(StreetsJudge.load(JUDGE)), LabelSpace.load("cityscapes"), {})
    found = work(block_of(photos[:3], labels[:3]))
    hits, truth, predicted = found["margins"].sum(axis=0)
    matrix = found["confusion"][0]
    assert np.array_equal(hits, np.diag(matrix))
    assert np.array_equal(truth, matrix.sum(axis=1))
    assert np.array_equal(predicted, matrix.sum(axis=0))


def population(n: int = 3000, classes: int = 4) -> NDArray[np.int64]:
    """Margins (n, 3, K) of images that differ in what they show and in how well it is found."""
    rng = np.random.default_rng(3)
    shares = rng.dirichlet([3.0, 2.0, 1.0, 1.0], size=n)
    truth = np.array([rng.multinomial(400, share) for share in shares])
    hits = rng.binomial(truth, rng.beta(6, 3, size=(n, 1)) * np.linspace(1, 0.7, classes))
    missed = (truth - hits).sum(axis=1)
    wrong = np.array([rng.multinomial(m, np.full(classes, 1 / classes)) for m in missed])
    return np.stack([hits, truth, hits + wrong], axis=1)


@pytest.mark.parametrize("what", ["mean IoU", "ratio"])
def test_an_interval_holds_the_value_of_the_population_as_often_as_it_says(what: str) -> None:
    everything = population()
    statistic = mean_iou_of
    if what == "ratio":  # of each image the reading itself, and a better one
        better = everything.copy()
        better[:, 0] += (better[:, 1] - better[:, 0]) // 2
        everything, statistic = np.stack([everything, better], axis=1), ratio_of_ious
    truth = float(statistic(everything.sum(axis=0)[None])[0])
    rng, runs, held = np.random.default_rng(4), 250, 0
    for run in range(runs):
        sample = everything[rng.integers(len(everything), size=80)]
        found = bootstrap_interval(sample, statistic, resamples=300, seed=run)
        held += found.low <= truth <= found.high
    assert abs(held / runs - 0.95) < 4 * (0.95 * 0.05 / runs) ** 0.5


# -- diversity -----------------------------------------------------------------------------------------------


def test_diversity_is_the_mean_over_maps_of_the_mean_over_pairs(tmp_path: Path) -> None:
    path = write_alexnet(tmp_path / "alexnet.pth")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 64, 64, 3)).astype(np.uint8)
    images[5] = images[4]
    work = DiversityWork(path, CPU, 10, {})
    found = work(block_of(images, keys=["a", "a", "a", "b", "c", "c"]))["distances"]
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    pairs = [work.network(x[i : i + 1], x[j : j + 1]).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found == pytest.approx([np.mean(pairs), 0.0], rel=1e-5)
    assert np.std(pairs) > 0
    work.most = 2
    two = work(block_of(images, keys=["a", "a", "a", "b", "c", "c"]))
    assert two["distances"] == pytest.approx([pairs[0], 0.0], rel=1e-5)


def test_lpips_is_that_of_torchmetrics_with_the_same_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    path = write_alexnet(tmp_path / "alexnet.pth")
    plain = torchvision.models.alexnet(weights=None)
    plain.load_state_dict(torch.load(path, weights_only=True), strict=False)
    # torchmetrics fetches its AlexNet through torchvision, so it gets ours there
    monkeypatch.setattr(torchvision.models, "alexnet", lambda weights: plain)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = learned_perceptual_image_patch_similarity(x[:1], x[1:], net_type="alex").item()
    monkeypatch.undo()
    assert load_lpips(path)(x[:1], x[1:]).item() == pytest.approx(expected, rel=1e-6)
    assert expected > 0


# -- pieces --------------------------------------------------------------------------------------------------


def test_samples_of_a_map_stay_in_one_block() -> None:
    keys = [str(i // 5) for i in range(5 * 30)]
    items = [Item(key, Picture(Path(key), (1, 1), "RGB", "PNG")) for key in keys]
    blocks = split(items)
    assert [item for block in blocks for item in block] == items
    assert all(BLOCK <= len(block) < BLOCK + 5 for block in blocks[:-1])
    assert all(a[-1].key != b[0].key for a, b in pairwise(blocks))


def test_a_filter_is_pillows_and_leaves_images_of_the_size_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 64, 3)).astype(np.uint8)
    assert resize_picture(image, (32, 64), "bicubic") is image
    expected = np.asarray(Image.fromarray(image).resize((32, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(resize_picture(image, (16, 32), "bicubic"), expected)
    grid = np.kron([[0, 255]], np.ones((4, 4))).astype(np.uint8).repeat(3, axis=0).reshape(12, 8, 1)
    small = resize_picture(grid.repeat(3, axis=2), (6, 4), "box")
    assert np.array_equal(small[..., 0], np.tile([0, 0, 255, 255], (6, 1))), "averaged over what it covers"
