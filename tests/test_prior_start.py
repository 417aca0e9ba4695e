"""Where sampling starts: timesteps, levels, resolutions; against integers, closed forms and diffusers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from house import ROOT
from prior_samples import ABAR, LATENT, SIZE, C, K, noise_of, random_moments, write_random_prior
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.nn import functional as F

from cldm.cldm import ControlLDM
from cldm.config import SampleConfig
from cldm.generate import Start, generate
from cldm.prior_start import find_prior
from cldm.text_memory import TextMemory
from datasets import DATASETS, registered_name
from ldm.models.diffusion.schedule import ddim_timesteps, timesteps_from, uniform_timesteps
from ldm.priors.prior import Gaussian, NoisePrior
from ldm.priors.resampling import resampled
from ldm.priors.start import lowest_start, start_loss

# -- timesteps ---------------------------------------------------------------------------------------------


def test_a_grid_is_cut_at_any_timestep() -> None:
    for steps in (1, 7, 20, 50, 999, 1000):
        for grid in (ddim_timesteps(steps), uniform_timesteps(steps)):
            for t in range(1000):
                found = timesteps_from(t, grid)
                assert found[0] == t
                assert found[1:] == [s for s in grid if s < t]
                assert sorted(set(found), reverse=True) == found


def test_published_starts_take_as_many_evaluations_as_there() -> None:
    grid = ddim_timesteps(20)
    assert timesteps_from(799, grid)[:3] == [799, 751, 701]
    # SCP-Diff rounds 799 up to 801 and walks 17 steps.
    assert len(timesteps_from(799, grid)) == len(timesteps_from(801, grid)) == 17
    assert timesteps_from(951, grid) == grid
    assert timesteps_from(999, grid) == [999, *grid]
    assert timesteps_from(999, uniform_timesteps(20)) == uniform_timesteps(20)
    assert timesteps_from(0, grid) == [0]


def test_any_number_of_steps_is_walked_from_any_start() -> None:
    for t in (0, 1, 2, 9, 399, 799, 999):
        for steps in {1, 2, 7, 20, t // 2 + 1, t, t + 1} & set(range(1, t + 2)):
            found = timesteps_from(t, [], steps)
            assert len(found) == steps
            assert found[0] == t
            assert found[-1] >= 0
            assert (np.diff(found) < 0).all()
            gaps = -np.diff([*found, 0]) if steps <= t else -np.diff(found)
            assert steps == 1 or gaps.max() - gaps.min() <= 1
    assert timesteps_from(3, [], 4) == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: timesteps_from(1000, []), r"a timestep in 0\.\.999 to start from, found 1000"),
        (lambda: timesteps_from(-1, []), "found -1"),
        (lambda: timesteps_from(9, [], 11), r"expected 1\.\.10 steps, .* from 9 down, found 11"),
        (lambda: timesteps_from(9, [], 0), "found 0"),
    ],
)
def test_starts_that_there_are_not_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# -- the loss of a start -----------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("t", [999, 700, 50])
def test_the_loss_is_the_divergence_that_torch_computes(covariance: bool, t: int) -> None:
    prior = NoisePrior(random_moments(covariance=covariance), "spatial-class")
    rng = np.random.default_rng(1)
    labels = torch.from_numpy(rng.integers(0, K, (2, *LATENT)))
    mean, variance = (torch.from_numpy(rng.uniform(0.01, 1, (2, C, *LATENT))) for _ in range(2))
    found, a = prior.gaussian(labels), ABAR[t]
    z, own = mean.movedim(1, -1), (a * variance + 1 - a).movedim(1, -1)
    if covariance:
        start = MultivariateNormal(a**0.5 * found.mean, a * found.variance + (1 - a) * torch.eye(C))
        expected = kl_divergence(MultivariateNormal(a**0.5 * z, torch.diag_embed(own)), start).mean() / C
    else:
        start = Normal(a**0.5 * found.mean, (a * found.variance + 1 - a).sqrt())
        expected = kl_divergence(Normal(a**0.5 * z, own.sqrt()), start).mean()
    assert start_loss(found, mean, variance, a) == pytest.approx(float(expected), rel=1e-6)


def test_the_lowest_start_is_the_first_that_is_good_enough() -> None:
    prior = NoisePrior(random_moments(), "spatial").gaussian(torch.zeros(1, *LATENT))
    mean = torch.randn(1, C, *LATENT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = [start_loss(prior, mean, mean * 0, a) for a in ABAR]
    assert (np.diff(losses) < 0).all(), "noise only takes away"
    for limit in (0.3, 0.05, 0.01):
        t, loss = lowest_start(prior, mean, mean * 0, ABAR, limit)
        assert t == next(t for t in range(1000) if losses[t] <= limit)
        assert loss == pytest.approx(losses[t])
    assert lowest_start(prior, mean, mean * 0, ABAR, 1e-9)[0] == 999
    sharp = Gaussian(mean.movedim(1, -1), torch.full((1, *LATENT, C), 0.01, dtype=torch.float64))
    assert lowest_start(sharp, mean, mean * 0, ABAR)[0] < lowest_start(prior, mean, mean * 0, ABAR)[0]


def test_the_threshold_is_what_the_published_start_leaves_of_half_a_variance() -> None:
    # KL in the mean over images whose latents are N(m, s^2): log(1 + snr s^2) / 2, with s^2 = 0.5.
    snr = ABAR[799] / (1 - ABAR[799])
    assert np.log(1 + snr * 0.5) / 2 == pytest.approx(0.01, abs=0.0015)


# -- another resolution ------------------------------------------------------------------------------------


def by_torch(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, n) at another size, interpolated or averaged."""
    x = torch.from_numpy(values).movedim(-1, 0)[None]
    grows = size[0] >= values.shape[0]
    y = F.interpolate(x, size, mode="bilinear") if grows else F.adaptive_avg_pool2d(x, size)
    return y[0].movedim(0, -1).numpy()


@pytest.mark.parametrize("size", [(16, 32), (4, 8), (8, 16), (12, 24)])
@pytest.mark.parametrize("covariance", [False, True])
def test_places_are_mixed_in_their_first_two_moments(size: tuple[int, int], covariance: bool) -> None:
    moments = random_moments(covariance=covariance)
    found = resampled(moments, size)
    found.check_arrays()
    assert found.shape == (C, *size)
    assert found.images == 50
    mean, variance = moments.places.mean, moments.places.variance
    square = mean[..., :, None] * mean[..., None, :] if covariance else mean**2
    second = (variance + square).reshape(*LATENT, -1)
    got = found.places.mean
    np.testing.assert_allclose(got, by_torch(mean, size), atol=1e-12)
    own = got[..., :, None] * got[..., None, :] if covariance else got**2
    np.testing.assert_allclose(
        (found.places.variance + own).reshape(*size, -1), by_torch(second, size), atol=1e-12
    )
    np.testing.assert_array_equal(found.classes.mean, moments.classes.mean)
    if size == LATENT:
        for name, array in moments.arrays().items():
            np.testing.assert_allclose(found.arrays()[name], array, atol=1e-9)


def test_cells_of_a_class_weigh_by_their_counts() -> None:
    moments = random_moments()
    found = resampled(moments, (4, 8))
    for k, y, x in ((0, 0, 0), (5, 3, 7), (18, 2, 4)):
        cells = k, slice(2 * y, 2 * y + 2), slice(2 * x, 2 * x + 2)
        n = moments.joint.count[cells].reshape(-1)
        if n.sum():
            m = moments.joint.mean[cells].reshape(4, C)
            np.testing.assert_allclose(found.joint.mean[k, y, x], n @ m / n.sum())
            v = moments.joint.variance[cells].reshape(4, C)
            expected = n @ (v + m**2) / n.sum() - (n @ m / n.sum()) ** 2
            np.testing.assert_allclose(found.joint.variance[k, y, x], expected, rtol=1e-9)
        assert found.joint.count[k, y, x] == (max(1, round(n.sum() / 4)) if n.sum() else 0)


# -- sampling from a start ---------------------------------------------------------------------------------

HINT = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(2))
PROMPTS, SEEDS = ["a road in the rain", "a house"], [11, 5]


def test_a_start_from_noise_at_the_first_timestep_is_plain_sampling(tiny_model: ControlLDM) -> None:
    settings = SampleConfig(steps=4, scale=3.0, eta=0.8)
    noise = torch.cat([torch.from_numpy(noise_of(seed)) for seed in SEEDS]).float()
    plain = generate(tiny_model, HINT, PROMPTS, SEEDS, settings)
    started = generate(tiny_model, HINT, PROMPTS, SEEDS, settings, start=Start(noise, ddim_timesteps(4)))
    assert torch.equal(started, plain)  # the noise of later steps, too


@pytest.mark.parametrize("latents", [torch.zeros(1, C, *LATENT), torch.zeros(2, C, 4, 4)])
def test_a_start_of_something_else_is_refused(tiny_model: ControlLDM, latents: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected latents \(2, 4, 8, 16\) to start from"):
        generate(tiny_model, HINT, PROMPTS, SEEDS, SampleConfig(steps=2), start=Start(latents, [5, 1]))
    start = Start(torch.zeros(2, C, *LATENT), [])
    with pytest.raises(ValueError, match="and 0 timesteps"):
        generate(tiny_model, HINT, PROMPTS, SEEDS, SampleConfig(steps=2), start=start)


def test_remembered_texts_are_those_of_the_encoder(tiny_model: ControlLDM) -> None:
    texts = ["", "a road", "long " * 100, "a road"]
    memory = TextMemory(tiny_model.cond_stage_model)
    for some in (texts[:2], texts, texts[1:2]):
        torch.testing.assert_close(memory(some), tiny_model.get_learned_conditioning(some))
    assert [memory.chunks(text) for text in texts] == [1, 1, 2, 1]


# -- diffusers ---------------------------------------------------------------------------------------------


def snippets_of(page: str, word: str) -> list[str]:
    """The Python blocks of a document that hold a word."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if word in block]


def test_the_example_for_diffusers_samples_what_we_sample(
    tiny_model: ControlLDM, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

    from cldm.model import load_model_config

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import peers

    peer = peers.make_peer(tiny_model, load_model_config(tiny_yaml))
    pipe = StableDiffusionControlNetPipeline(
        peer.vae, peer.text_encoder, peer.tokenizer, peer.unet, peer.controlnet.eval(),
        DDIMScheduler(**peers.SCHEDULE), None, None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    path = tmp_path / "statistics/cityscapes/cityscapes_train_512x1024.safetensors"
    moments = write_random_prior(path, tiny_model)
    monkeypatch.chdir(tmp_path)
    (code,) = snippets_of("noise_priors.md", "pipe(")
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, K, (1, *SIZE)))
    names: dict[str, Any] = {"pipe": pipe, "labels": labels, "hint": HINT[:1]}
    exec(code, names)
    settings = SampleConfig(sampler="dpm++2m", scale=4.0)
    timesteps = [799, *(t for t in uniform_timesteps(20) if t < 799)]
    x = NoisePrior(moments).draw(labels, ABAR[799], [7])
    prompt = re.search(r'pipe\(\s*"([^"]+)"', code)
    assert prompt is not None
    ours = generate(tiny_model, HINT[:1], [prompt[1]], [7], settings, start=Start(x, timesteps))
    theirs = np.asarray(names["image"])
    assert theirs.std() > 20
    assert np.abs(theirs.astype(int) - ours[0].numpy().astype(int)).max() <= 2


# -- names -------------------------------------------------------------------------------------------------


def test_a_data_set_answers_to_the_name_of_the_predecessors_flag() -> None:
    assert registered_name("coco-stuff") in DATASETS
    assert [registered_name(name) for name in DATASETS] == list(DATASETS)


def test_the_prior_is_the_measured_one_else_the_shipped_one(tmp_path: Path) -> None:
    shipped = find_prior(tmp_path, "streets", (128, 256))
    assert (shipped.name, shipped.parent.name) == ("streets_prior.safetensors", "models")
    assert find_prior(tmp_path, "streets", (128, 256), "mine") == tmp_path / "streets/mine.safetensors"
    assert find_prior(tmp_path, "gta", (64, 128)) == tmp_path / "gta/gta_train_64x128.safetensors"
    measured = tmp_path / "streets/streets_train_128x256.safetensors"
    measured.parent.mkdir()
    measured.touch()
    assert find_prior(tmp_path, "streets", (128, 256)) == measured
