"""The noise schedule against diffusers, brute force and closed forms; the timesteps against diffusers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import nn

from ldm.models.diffusion.schedule import (
    NoiseSchedule,
    ddim_timesteps,
    make_betas,
    schedule_buffers,
    uniform_timesteps,
)

GOLDEN = Path(__file__).parent / "golden"
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
DIVISORS = [s for s in range(1, 1000) if 1000 % s == 0]


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    module = NoiseSchedule()
    module.register_schedule(make_betas("linear", 0.00085, 0.012, 1000))
    return module


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_the_schedule_is_that_of_diffusers(schedule: NoiseSchedule, scheduler: type) -> None:
    theirs = scheduler(**SD)
    torch.testing.assert_close(schedule.betas, theirs.betas, rtol=1e-6, atol=0)
    # diffusers multiplies up 1000 factors in float32, we in float64.
    torch.testing.assert_close(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5, atol=0)
    assert schedule.num_timesteps == 1000


def test_the_schedule_has_the_published_ends(schedule: NoiseSchedule) -> None:
    assert round(schedule.alphas_cumprod[0].item(), 8) == pytest.approx(0.99914998, abs=2e-8)
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(0.00466010, abs=1e-8)


@pytest.mark.parametrize("version", ["15", "21"])
def test_buffers_have_the_published_names_and_shapes(schedule: NoiseSchedule, version: str) -> None:
    lines = (GOLDEN / f"keys_sd{version}.tsv").read_text().splitlines()
    published = dict(line.split("\t") for line in lines if "." not in line.split("\t")[0])
    assert {key: str(list(value.shape)) for key, value in schedule.state_dict().items()} == published
    assert len(published) == 13
    assert {value.dtype for value in schedule.state_dict().values()} == {torch.float32}


def test_every_buffer_follows_from_beta_by_its_formula() -> None:
    beta = (0.00085**0.5 + np.arange(1000) / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
    abar, prev, product = np.empty(1000), np.empty(1000), 1.0
    for t in range(1000):
        prev[t], product = product, product * (1 - beta[t])
        abar[t] = product
    variance = beta * (1 - prev) / (1 - abar)
    expected = {
        "betas": beta,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": prev,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
        "log_one_minus_alphas_cumprod": np.log(1 - abar),
        "sqrt_recip_alphas_cumprod": abar**-0.5,
        "sqrt_recipm1_alphas_cumprod": np.sqrt((1 - abar) / abar),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": beta * np.sqrt(prev) / (1 - abar),
        "posterior_mean_coef2": (1 - prev) * np.sqrt(1 - beta) / (1 - abar),
        "logvar": np.zeros(1000),
    }
    ours = schedule_buffers(make_betas("linear", 0.00085, 0.012, 1000))
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(ours[name].numpy(), values, rtol=3e-7, atol=1e-30, err_msg=name)


@pytest.mark.parametrize("t", [1, 37, 500, 999])
def test_posterior_is_what_bayes_gives_on_a_grid(schedule: NoiseSchedule, t: int) -> None:
    # p(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised: here by a sum over a grid.
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    before, now, beta = np.prod(1 - betas[:t]), np.prod(1 - betas[: t + 1]), betas[t]
    x_0 = 0.8
    x_t = now**0.5 * x_0 + (1 - now) ** 0.5 * 0.6
    grid = np.linspace(-8, 8, 400_001)
    log_p = -((x_t - (1 - beta) ** 0.5 * grid) ** 2) / (2 * beta)
    log_p -= (grid - before**0.5 * x_0) ** 2 / (2 * (1 - before))
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = (p * grid).sum()
    variance = (p * (grid - mean) ** 2).sum()

    def latent(value: float) -> torch.Tensor:
        return torch.full((2, 4, 1, 3), value)

    got_mean, got_variance, got_log = schedule.q_posterior(latent(x_0), latent(x_t), torch.tensor([t, t]))
    assert got_mean.shape == (2, 4, 1, 3)
    assert got_variance.shape == (2, 1, 1, 1)
    np.testing.assert_allclose(got_mean.numpy(), mean, rtol=1e-5)
    np.testing.assert_allclose(got_variance.numpy(), variance, rtol=1e-4)
    np.testing.assert_allclose(got_log.numpy(), np.log(variance), rtol=1e-4)


@pytest.fixture
def latents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(5, 4, 3, 7, generator=g) for _ in range(2))
    return x_start, noise, torch.tensor([0, 1, 400, 800, 999])


def test_noising_and_velocity_equal_diffusers(schedule: NoiseSchedule, latents: tuple) -> None:
    x_start, noise, t = latents
    theirs = DDPMScheduler(**SD)
    x_t = schedule.q_sample(x_start, t, noise)
    torch.testing.assert_close(x_t, theirs.add_noise(x_start, noise, t), rtol=2e-5, atol=2e-6)
    v = schedule.get_v(x_start, noise, t)
    torch.testing.assert_close(v, theirs.get_velocity(x_start, noise, t), rtol=2e-5, atol=2e-6)


def test_what_is_predicted_leads_back_to_x_start_and_noise(schedule: NoiseSchedule, latents: tuple) -> None:
    x_start, noise, t = latents
    x_t = schedule.q_sample(x_start, t, noise)
    v = schedule.get_v(x_start, noise, t)
    # At t = 999 x_start is a fifteenth of x_t, so single precision is lost to that factor squared at most.
    torch.testing.assert_close(schedule.predict_start_from_noise(x_t, t, noise), x_start, rtol=0, atol=5e-5)
    torch.testing.assert_close(schedule.predict_start_from_z_and_v(x_t, t, v), x_start, rtol=0, atol=2e-6)
    torch.testing.assert_close(schedule.predict_eps_from_z_and_v(x_t, t, v), noise, rtol=0, atol=2e-6)


def test_noise_that_is_not_given_is_standard_normal(schedule: NoiseSchedule) -> None:
    x_start = torch.full((2, 4, 100, 100), 3.0)
    t = torch.tensor([10, 990])
    torch.manual_seed(0)
    x_t = schedule.q_sample(x_start, t)
    abar = DDPMScheduler(**SD).alphas_cumprod[t]
    torch.testing.assert_close(x_t.mean((1, 2, 3)), 3 * abar.sqrt(), rtol=0, atol=0.02)
    torch.testing.assert_close(x_t.std((1, 2, 3)), (1 - abar).sqrt(), rtol=0.02, atol=0)


def test_the_buffers_travel_with_the_module() -> None:
    class Owner(NoiseSchedule):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.register_schedule(make_betas("linear", 0.1, 0.2, 7))

    owner = Owner().to(torch.float64)
    assert owner.betas.dtype == torch.float64
    assert owner.num_timesteps == 7
    with torch.device("meta"):
        assert (
            Owner().betas.sum() > 0
        )  # a schedule is computed, not loaded, so it is real on the meta device too


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cosine'.*linear"):
        make_betas("cosine", 0.1, 0.2, 10)


# -- which timesteps a sampler visits ---------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [ddim_timesteps, uniform_timesteps])
def test_every_number_of_steps_is_walked_exactly(timesteps) -> None:
    for s in range(1, 1001):
        steps = timesteps(s)
        assert len(steps) == s
        assert all(type(t) is int for t in steps)
        assert all(a > b for a, b in pairwise(steps)), s
        assert steps[0] <= 999, s
        assert steps[-1] >= 0, s


def test_ddim_ends_at_one() -> None:
    assert {s: ddim_timesteps(s)[-1] for s in range(1, 1001)} == {**dict.fromkeys(range(1, 1000), 1), 1000: 0}
    assert ddim_timesteps(5) == [801, 601, 401, 201, 1]
    assert ddim_timesteps(20) == list(range(951, 0, -50))


def test_ddim_spacing_is_even_where_steps_do_not_divide() -> None:
    for s in range(1, 1000):
        gaps = {a - b for a, b in pairwise(ddim_timesteps(s))}
        assert gaps <= {1000 // s, 1000 // s + 1}, s


@pytest.mark.parametrize("steps", DIVISORS)
def test_ddim_timesteps_equal_diffusers(steps: int) -> None:
    theirs = DDIMScheduler(**SD, steps_offset=1, timestep_spacing="leading")
    theirs.set_timesteps(steps)
    assert ddim_timesteps(steps) == theirs.timesteps.tolist()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_uniform_timesteps_equal_diffusers() -> None:
    theirs = DPMSolverMultistepScheduler(**SD, timestep_spacing="linspace")
    for s in range(1, 1000):
        theirs.set_timesteps(s)  # S = 1000 is left out: there diffusers repeats a timestep
        assert uniform_timesteps(s) == theirs.timesteps.tolist(), s
    assert uniform_timesteps(20)[:2] == [999, 949]


@pytest.mark.parametrize("timesteps", [ddim_timesteps, uniform_timesteps])
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_that_the_schedule_does_not_have_are_refused(timesteps, steps: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.1000, found {steps}"):
        timesteps(steps)


@pytest.mark.parametrize("timesteps", [ddim_timesteps, uniform_timesteps])
def test_another_schedule_length_is_walked_as_well(timesteps) -> None:
    for s in range(1, 51):
        steps = timesteps(s, 50)
        assert len(set(steps)) == s
        assert 0 <= min(steps) <= max(steps) < 50
