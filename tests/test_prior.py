"""Every kind of prior against a plain loop over pixels, its draw against drawing twice, and diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray
from torch import Tensor

from cldm.generate import draw_noise
from datasets.label_space import resize_labels
from ldm.priors.moments import VOID, LatentMoments, Moments
from ldm.priors.prior import HARD_SWITCH, KINDS, NoisePrior

K, C, H, W = 4, 3, 4, 6
SEEN = 3  # classes 0..2; class 3 is never seen
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


@pytest.fixture(scope="module")
def moments() -> LatentMoments:
    return make_moments()


def make_moments(*, covariance: bool = False) -> LatentMoments:
    """Of 30 images, with correlated channels and means that differ by class and place."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, VOID], (30, H, W), p=[0.6, 0.28, 0.02, 0.1])
    mixing = rng.normal(size=(C, C))
    z = np.einsum("dc,bchw->bdhw", mixing, rng.normal(size=(30, C, H, W)))
    z = z + labels.clip(max=3)[:, None] + np.arange(W)
    found = LatentMoments.empty((C, H, W), K, covariance=covariance)
    found.update(z, rng.uniform(0.1, 0.3, z.shape), labels)
    return found


@pytest.fixture(scope="module")
def labels() -> Tensor:
    """Two maps with every class, void, and cells that no image has."""
    rng = np.random.default_rng(5)
    return torch.from_numpy(rng.choice([0, 1, 2, 3, VOID], (2, H, W)))


@pytest.fixture(scope="module")
def x0() -> Tensor:
    return torch.randn(2, C, H, W, generator=torch.Generator().manual_seed(0))


def given(kind: str, x0: Tensor) -> dict[str, Tensor]:
    return {"x0": x0} if kind == "x0" else {}


# -- the loop, written out ---------------------------------------------------------------------------------


def first_two(table: Moments, *index: int) -> tuple[int, NDArray, NDArray]:
    """Count, E x and E x^2 of a group."""
    mean = table.mean[index]
    return int(table.count[index]), mean, table.variance[index] + mean**2


def blend(cell: Any, coarser: Any, k: float) -> Any:
    n = cell[0]
    if n == 0:
        return (n, *coarser[1:])
    return (n, *((n * a + k * b) / (n + k) for a, b in zip(cell[1:], coarser[1:], strict=True)))


def loop(m: LatentMoments, kind: str, labels: NDArray, x0: NDArray, how: dict[str, Any]) -> Any:
    """Mean and standard deviation (B, C, h, w), pixel by pixel."""
    k, alpha, beta = how.get("shrinkage", 10.0), how.get("spatial_scale", 1), how.get("class_scale", 1)
    table = m.classes_by_image if how.get("weighting") == "images" else m.classes
    mean, std = np.zeros(x0.shape), np.zeros(x0.shape)
    for b, y, x in np.ndindex(labels.shape):
        c = labels[b, y, x]
        spatial = first_two(m.places, y, x)
        none = (0, np.zeros(C), np.zeros(C))
        of_class = none if c == VOID else (m.classes_by_image.count[c], *first_two(table, c)[1:])
        of_class = blend(of_class, spatial, k)
        cell = none if c == VOID else first_two(m.joint, c, y, x)
        if kind == "spatial-class" and how.get("undivided"):
            # SCP-Diff: the mean is a sum, and each component's variance is taken around it
            parts = [(w, p[1], p[2] - p[1] ** 2) for w, p in ((alpha, spatial), (beta, of_class))]
            centre = sum(w * mu for w, mu, _ in parts)
            variance = sum(w * (v + (mu - centre) ** 2) for w, mu, v in parts) / (alpha + beta)
            mean[b, :, y, x], std[b, :, y, x] = centre, variance**0.5
            continue
        found = {
            "normal": (0, np.zeros(C), np.ones(C)),
            "spatial": spatial,
            "class": of_class,
            "spatial-class": (
                0,
                *(
                    (alpha * s + beta * o) / (alpha + beta)
                    for s, o in zip(spatial[1:], of_class[1:], strict=True)
                ),
            ),
            "spatial-class-joint": blend(cell, spatial, k),
            "class-spatial-joint": blend(cell, of_class, k),
            "x0": (0, x0[b, :, y, x], x0[b, :, y, x] ** 2),
        }[kind]
        mean[b, :, y, x] = found[1]
        std[b, :, y, x] = np.sqrt(np.maximum(found[2] - found[1] ** 2, 0))
    return mean, std


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"shrinkage": HARD_SWITCH},
        {"shrinkage": 3.5, "weighting": "images", "spatial_scale": 0.3, "class_scale": 1.5},
        {"undivided": True, "spatial_scale": 0.7},
    ],
)
def test_mean_and_std_are_those_of_a_loop_over_pixels(
    moments: LatentMoments, labels: Tensor, x0: Tensor, kind: str, how: dict[str, Any]
) -> None:
    mean, std = NoisePrior(moments, kind, **how).mean_std(labels, **given(kind, x0))
    expected = loop(moments, kind, labels.numpy(), x0.double().numpy(), how)
    np.testing.assert_allclose(mean.numpy(), expected[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(std.numpy(), expected[1], rtol=1e-8, atol=1e-6)


def test_what_the_kinds_fall_back_to(moments: LatentMoments) -> None:
    void, unseen = torch.full((1, H, W), VOID), torch.full((1, H, W), SEEN)
    spatial = NoisePrior(moments, "spatial").mean_std(void)
    for kind in ("class", "spatial-class-joint", "class-spatial-joint"):
        for how in ({}, {"shrinkage": HARD_SWITCH}):
            for labels in (void, unseen):
                for found, expected in zip(
                    NoisePrior(moments, kind, **how).mean_std(labels), spatial, strict=True
                ):
                    torch.testing.assert_close(found, expected)
    # A cell that no image has is spatial in the one order, and of its class in the other.
    k, y, x = (int(i[0]) for i in np.nonzero(moments.joint.count[:SEEN] == 0))
    labels = torch.full((1, H, W), k)
    for kind, coarser in (("spatial-class-joint", "spatial"), ("class-spatial-joint", "class")):
        found = NoisePrior(moments, kind).mean_std(labels)[0][0, :, y, x]
        assert torch.equal(found, NoisePrior(moments, coarser).mean_std(labels)[0][0, :, y, x])


def test_published_defaults_double_the_mean_and_ours_do_not(moments: LatentMoments, labels: Tensor) -> None:
    ours = NoisePrior(moments, "spatial-class").mean_std(labels)
    theirs = NoisePrior(moments, "spatial-class", undivided=True).mean_std(labels)
    torch.testing.assert_close(theirs[0], 2 * ours[0])
    assert (theirs[1] > ours[1]).all()
    alone = NoisePrior(moments, "spatial-class", class_scale=0).mean_std(labels)
    torch.testing.assert_close(alone[0], NoisePrior(moments, "spatial").mean_std(labels)[0])


# -- draws -------------------------------------------------------------------------------------------------


def assert_moments(x: Tensor, mean: Tensor, std: Tensor) -> None:
    """Sample mean and variance (over the first axis) within five of their standard errors."""
    n = len(x)
    assert ((x.mean(0) - mean).abs() <= 5 * std / n**0.5 + 1e-6).all()
    assert ((x.var(0) - std**2).abs() <= 5 * std**2 * (2 / n) ** 0.5 + 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [999, 799, 200])
def test_one_draw_at_a_level_is_distributed_as_a_draw_of_x0_that_is_noised(
    moments: LatentMoments, labels: Tensor, x0: Tensor, kind: str, t: int
) -> None:
    n, abar = 4000, float(ABAR[t])
    prior = NoisePrior(moments, kind)
    several = {name: x.expand(n, -1, -1, -1) for name, x in given(kind, x0[:1]).items()}
    one = prior.draw(labels[:1].expand(n, -1, -1), abar, range(n), **several).double()
    mean, std = prior.mean_std(labels[:1], **given(kind, x0[:1]))
    g = torch.Generator().manual_seed(1)
    start = mean + std * torch.randn(n, C, H, W, generator=g, dtype=torch.float64)
    two = abar**0.5 * start + (1 - abar) ** 0.5 * torch.randn(start.shape, generator=g, dtype=torch.float64)
    expected = abar**0.5 * mean[0], (abar * std[0] ** 2 + 1 - abar).sqrt()
    assert_moments(one, *expected)
    assert_moments(two, *expected)


def test_a_seed_is_an_image_whatever_is_beside_it_and_normal_is_what_generate_draws(
    moments: LatentMoments, labels: Tensor
) -> None:
    prior = NoisePrior(moments)
    both = prior.draw(labels, 0.3, [7, 8])
    assert torch.equal(both[1:], prior.draw(labels[1:], 0.3, [8]))
    assert both.dtype == torch.float32
    assert both.is_contiguous()
    normal = NoisePrior(moments, "normal").draw(labels, float(ABAR[999]), [7, 8])
    torch.testing.assert_close(normal, draw_noise([7, 8], 1, (C, H, W))[0])


def test_the_covariance_of_the_channels_is_drawn(labels: Tensor) -> None:
    full, diagonal = make_moments(covariance=True), make_moments()
    n, abar = 8000, 0.4
    same = labels[:1].expand(n, -1, -1)
    for kind in ("spatial", "class", "spatial-class", "spatial-class-joint", "class-spatial-joint"):
        prior = NoisePrior(full, kind)
        for a, b in zip(prior.mean_std(labels), NoisePrior(diagonal, kind).mean_std(labels), strict=True):
            torch.testing.assert_close(a, b)
        x = prior.draw(same, abar, range(n)).double()
        expected = abar * prior.gaussian(labels[:1]).variance[0] + (1 - abar) * torch.eye(C, dtype=x.dtype)
        for y, column in ((0, 0), (2, 5)):
            found = torch.cov(x[:, :, y, column].T)
            torch.testing.assert_close(found, expected[y, column], rtol=0.1, atol=0.1)
    assert expected[2, 5].diag().sum() < expected[2, 5].abs().sum()  # there is something beside the diagonal


# -- label maps --------------------------------------------------------------------------------------------


def test_label_maps_of_the_image_are_resized_as_those_of_the_data_are(moments: LatentMoments) -> None:
    large = np.random.default_rng(0).choice([0, 1, 2, VOID], (1, 8 * H, 8 * W))
    prior = NoisePrior(moments)
    expected = resize_labels(large[0], (H, W))
    np.testing.assert_array_equal(prior.at_latent_size(torch.from_numpy(large))[0], expected)
    assert torch.equal(prior.draw(torch.from_numpy(large), 0.5, [1]), prior.draw(expected[None], 0.5, [1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, y: NoisePrior(m, "joint"), "unknown prior 'joint'; choose one of normal, spatial"),
        (lambda m, y: NoisePrior(m, weighting="all"), "unknown weighting"),
        (lambda m, y: NoisePrior(m, shrinkage=-1), "expected a shrinkage of 0 or more"),
        (lambda m, y: NoisePrior(m, spatial_scale=0, class_scale=0), "not both 0"),
        (lambda m, y: NoisePrior(m).draw(y[:, 1:], 0.5, [1, 2]), "label maps of 32x48, .* found 3x6"),
        (lambda m, y: NoisePrior(m).draw(y + 1, 0.5, [1, 2]), r"labels 0\.\.3 and 255 = void, found"),
        (lambda m, y: NoisePrior(m).draw(y, 0.5, [1]), "a seed for each of 2 label maps, found 1"),
        (lambda m, y: NoisePrior(m).draw(y, 1.5, [1, 2]), r"abar in 0\.\.1, found 1\.5"),
        (lambda m, y: NoisePrior(m, "x0").draw(y, 0.5, [1, 2]), "expected x0 for the prior x0"),
        (
            lambda m, y: NoisePrior(m, "x0").draw(y, 0.5, [1, 2], torch.zeros(2, C, H, H)),
            r"expected x0 \(2, 3, 4, 6\), found \(2, 3, 4, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(moments: LatentMoments, labels: Tensor, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(moments, labels)


# -- diffusers ---------------------------------------------------------------------------------------------

SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(**SD),
    "ddim, zero terminal signal": lambda: DDIMScheduler(**SD, rescale_betas_zero_snr=True),
    "dpm++": lambda: DPMSolverMultistepScheduler(**SD),
    "dpm++ karras": lambda: DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True),
    "unipc": lambda: UniPCMultistepScheduler(**SD),
    "euler": lambda: EulerDiscreteScheduler(**SD),
    "euler leading": lambda: EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1),
    "euler karras": lambda: EulerDiscreteScheduler(**SD, use_karras_sigmas=True),
    "heun": lambda: HeunDiscreteScheduler(**SD),
}


def prepared(name: str) -> Any:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(20)
    return scheduler


def noised_twice(scheduler: Any, prior: NoisePrior, labels: Tensor, t: Any, n: int) -> Tensor:
    """x_0 of the prior, and then the scheduler's own noise."""
    g = torch.Generator().manual_seed(3)
    mean, std = prior.mean_std(labels)
    start = mean + std * torch.randn(n, C, H, W, generator=g, dtype=torch.float64)
    noise = torch.randn(start.shape, generator=g, dtype=torch.float64)
    return scheduler.add_noise(start, noise, torch.as_tensor(t).repeat(n))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("place", [0, 4, 14])
def test_latents_are_distributed_as_diffusers_adds_its_noise(
    moments: LatentMoments, labels: Tensor, name: str, place: int
) -> None:
    scheduler, n = prepared(name), 4000
    t = scheduler.timesteps[place]
    prior, one_map = NoisePrior(moments), labels[:1]
    found = prior.latents(one_map.expand(n, -1, -1), t, scheduler, range(n)).double()
    # What add_noise does to a mean and to a noise of 1 gives the exact moments, so no sample errs twice.
    mean, std = prior.mean_std(one_map)
    zero, level = torch.zeros_like(mean), torch.as_tensor(t).repeat(1)
    signal = scheduler.add_noise(mean, zero, level)[0]
    gain = scheduler.add_noise(torch.ones_like(mean), zero, level)[0]
    noise = scheduler.add_noise(zero, torch.ones_like(mean), level)[0]
    deviation = ((gain * std[0]) ** 2 + noise**2).sqrt()
    assert_moments(found, signal, deviation)
    assert_moments(noised_twice(scheduler, prior, one_map, t, n), signal, deviation)


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler"])
def test_a_start_between_the_steps_of_a_schedule_is_where_a_custom_schedule_begins(
    moments: LatentMoments, labels: Tensor, name: str
) -> None:
    prior, t = NoisePrior(moments), 777
    before = prior.latents(labels, t, prepared(name), [1, 2])
    custom = SCHEDULERS[name]()
    if name == "ddim":
        torch.testing.assert_close(before, prior.draw(labels, float(ABAR[t]), [1, 2]))
        return
    custom.set_timesteps(timesteps=[777, 500, 200])
    torch.testing.assert_close(before, prior.latents(labels, t, custom, [1, 2]), rtol=1e-4, atol=1e-4)


def test_a_pipeline_multiplies_what_it_is_given(moments: LatentMoments, labels: Tensor) -> None:
    scheduler = EulerDiscreteScheduler(**SD)
    scheduler.set_timesteps(timesteps=[777, 500, 200])
    prior = NoisePrior(moments)
    given = prior.latents(labels, 777, scheduler, [1, 2], for_pipeline=True)
    expected = prior.latents(labels, 777, scheduler, [1, 2])
    torch.testing.assert_close(given * scheduler.init_noise_sigma, expected)
    sigma = (1 / ABAR[777] - 1) ** 0.5
    mean, std = prior.mean_std(labels)
    noise = draw_noise([1, 2], 1, (C, H, W))[0].double()
    torch.testing.assert_close(
        expected.double(), mean + (std**2 + sigma**2).sqrt() * noise, rtol=1e-4, atol=1e-4
    )


def test_schedulers_and_timesteps_of_something_else_are_refused(
    moments: LatentMoments, labels: Tensor
) -> None:
    prior = NoisePrior(moments)
    with pytest.raises(ValueError, match="found FlowMatchEulerDiscreteScheduler"):
        prior.latents(labels, 999, FlowMatchEulerDiscreteScheduler(), [1, 2])
    for t in (1000, -1, 3.5):
        with pytest.raises(ValueError, match=rf"timestep of the schedule or one of 0\.\.999, found {t}"):
            prior.latents(labels, t, prepared("ddim"), [1, 2])
