"""DDIM and DPM-Solver++ against diffusers with the same networks, and against exact flows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from omegaconf import OmegaConf
from oracles import randomize, relative_error, to_diffusers_control, to_diffusers_unet
from torch import Tensor

from cldm.cldm import ControlLDM
from cldm.model import create_model
from ldm.models.diffusion.ddim import sample_ddim
from ldm.models.diffusion.dpm_solver import sample_dpm_solver
from ldm.models.diffusion.guidance import classifier_free_guidance
from ldm.models.diffusion.schedule import ddim_timesteps, make_betas, uniform_timesteps

ABAR = (1 - make_betas("linear", 0.00085, 0.012, 1000)).cumprod(0).tolist()
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SD_DDIM = {**SD, "set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1}
SD_DPM = {**SD, "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
GUIDANCE = 4.0
TOLERANCE = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


# -- the same guided, controlled networks on both sides ---------------------------------------------------


@dataclass
class Pair:
    """Our guided predictor and that of diffusers, with the same weights, hint and texts."""

    model: ControlLDM
    ours: Callable[[Tensor, int], Tensor]  # predicts eps
    theirs: Callable[[Tensor, Tensor], Tensor]  # predicts what the network predicts
    x: Tensor


def build_pair(config: Path) -> Pair:
    model = randomize(create_model(config), seed=5).eval()
    g = torch.Generator().manual_seed(1)
    uncond, cond = (torch.randn(1, 77, 32, generator=g) for _ in range(2))
    hint = torch.rand(1, 3, 64, 128, generator=g)
    both = {"c_crossattn": [torch.cat([uncond, cond])], "c_concat": [torch.cat([hint, hint])]}
    ready = model.precompute_cond(both)
    params: Any = OmegaConf.to_container(OmegaConf.load(config).model.params)
    unet = to_diffusers_unet(model.model.diffusion_model, params["unet_config"]["params"])
    control = to_diffusers_control(model.control_model, params["control_stage_config"]["params"])

    def predict(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        down, mid = control(x, t, text, controlnet_cond=hint, return_dict=False)
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet(x, t, text, **extra).sample

    def theirs(x: Tensor, t: Tensor) -> Tensor:
        without = predict(x, t, uncond)
        return without + GUIDANCE * (predict(x, t, cond) - without)

    ours = classifier_free_guidance(lambda x, t: model.predict_eps(x, t, ready), GUIDANCE)
    return Pair(model, ours, theirs, torch.randn(1, 4, 8, 16, generator=g))  # not square


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def pair(request: pytest.FixtureRequest, tiny_yamls: dict[str, Path]) -> Iterator[Pair]:
    with torch.no_grad():
        yield build_pair(tiny_yamls[request.param])


@pytest.mark.parametrize(("eta", "parameterization"), [(0.0, "v"), (1.0, "eps")])
def test_guided_controlled_ddim_equals_diffusers(pair: Pair, eta: float, parameterization: str) -> None:
    pair.model.parameterization = parameterization
    compare_ddim(pair.ours, pair.theirs, pair.x, 5, eta, PREDICTIONS[parameterization])


@pytest.mark.parametrize(
    ("final", "end", "parameterization"), [("zero", 1.0, "eps"), ("sigma_min", None, "v")]
)
def test_guided_controlled_dpm_solver_equals_diffusers(
    pair: Pair, final: str, end: float | None, parameterization: str
) -> None:
    pair.model.parameterization = parameterization
    compare_dpm_solver(pair.ours, pair.theirs, pair.x, 5, final, end, PREDICTIONS[parameterization])


# -- the samplers alone: many numbers of steps, every predicted x_0 on the way ----------------------------


def compare_ddim(ours: Any, theirs: Any, x: Tensor, steps: int, eta: float, kind: str = "epsilon") -> None:
    noises = torch.randn(steps, *x.shape, generator=torch.Generator().manual_seed(7))
    scheduler = DDIMScheduler(**SD_DDIM, prediction_type=kind, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    state, expected = x, []
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        output = scheduler.step(theirs(state, t), t, state, eta=eta, variance_noise=noise if eta else None)
        state = output.prev_sample
        expected.append(output.pred_original_sample)

    drawn, found = iter(noises), []
    result = sample_ddim(
        ours,
        x,
        ddim_timesteps(steps),
        ABAR,
        eta=eta,
        noise_like=lambda _: next(drawn),
        callback=lambda step, x_0: found.append((step, x_0)),
    )
    assert relative_error(result, state) <= TOLERANCE
    assert_same_path(found, expected)


def compare_dpm_solver(
    ours: Any, theirs: Any, x: Tensor, steps: int, final: str, end: float | None, kind: str = "epsilon"
) -> None:
    options = {"prediction_type": kind, "timestep_spacing": "linspace", "final_sigmas_type": final}
    scheduler = DPMSolverMultistepScheduler(**SD_DPM, **options)
    scheduler.set_timesteps(steps)
    state, expected = x, []
    for t in scheduler.timesteps:
        state = scheduler.step(theirs(state, t), t, state).prev_sample
        expected.append(scheduler.model_outputs[-1])

    found: list[tuple[int, Tensor]] = []
    result = sample_dpm_solver(
        ours,
        x,
        uniform_timesteps(steps),
        ABAR,
        end=end,
        callback=lambda step, x_0: found.append((step, x_0)),
    )
    assert relative_error(result, state) <= TOLERANCE
    assert_same_path(found, expected)


def assert_same_path(found: list[tuple[int, Tensor]], expected: list[Tensor]) -> None:
    assert [step for step, _ in found] == list(range(len(expected)))
    for (step, ours), theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE, step


def curved(x: Tensor, t: int | Tensor) -> Tensor:
    """A predictor that mixes positions and bends, so that no two steps are alike."""
    return torch.tanh(0.8 * x.roll(1, -1) - 0.3 * x.flip(1) + int(t) / 1000) + 0.2 * x


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 8, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
def test_ddim_equals_diffusers(x: Tensor, steps: int, eta: float) -> None:
    compare_ddim(curved, curved, x, steps, eta)


@pytest.mark.parametrize(("final", "end"), [("zero", 1.0), ("sigma_min", None)])
@pytest.mark.parametrize("steps", [1, 5, 14, 15, 20, 50])
def test_dpm_solver_equals_diffusers(x: Tensor, steps: int, final: str, end: float | None) -> None:
    compare_dpm_solver(curved, curved, x, steps, final, end)


# -- exact flows: if the data are N(m, s^2), the best eps-predictor and the flow it drives are closed forms --

M, S = 0.7, 0.4


def best_eps(x: Tensor, t: int) -> Tensor:
    a = ABAR[t]
    return (1 - a) ** 0.5 * (x - a**0.5 * M) / (a * S**2 + 1 - a)


def flow(z: Tensor, level: float) -> Tensor:
    """Where the flow carries the standard normal z: the point of its quantile at `level`."""
    return level**0.5 * M + (level * S**2 + 1 - level) ** 0.5 * z


@pytest.fixture(scope="module")
def z() -> Tensor:
    return torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("start", [999, 801, 401])
def test_ddim_follows_the_exact_gaussian_flow_at_first_order(z: Tensor, start: int) -> None:
    def error(stride: int) -> float:
        found = sample_ddim(best_eps, flow(z, ABAR[start]), range(start, -1, -stride), ABAR)
        return (found - flow(z, ABAR[0])).abs().mean().item()

    assert error(4) < 0.01
    assert error(8) / error(4) > 1.5  # half the stride, about half the error


def test_ddim_with_its_own_timesteps_reaches_the_data(z: Tensor) -> None:
    steps = ddim_timesteps(500)
    found = sample_ddim(best_eps, flow(z, ABAR[steps[0]]), steps, ABAR)
    assert (found - flow(z, ABAR[0])).abs().mean() < 0.005


def test_ancestral_sampling_keeps_the_distribution(z: Tensor) -> None:
    g = torch.Generator().manual_seed(1)
    steps = ddim_timesteps(500)
    found = sample_ddim(
        best_eps,
        flow(z, ABAR[steps[0]]),
        steps,
        ABAR,
        eta=1.0,
        noise_like=lambda x: torch.randn(x.shape, dtype=x.dtype, generator=g),
    )
    level = ABAR[0]
    std = (level * S**2 + 1 - level) ** 0.5
    assert found.mean().item() == pytest.approx(level**0.5 * M, abs=4 * std / 4096**0.5)
    assert found.std().item() == pytest.approx(std, rel=0.06)
    assert abs(torch.corrcoef(torch.stack([found, z]))[0, 1].item()) < 0.1  # or no noise was added


def test_dpm_solver_is_of_second_order(z: Tensor) -> None:
    # Between t = 800 and 200, where steps even in t are smooth in log SNR as well.
    def error(stride: int) -> float:
        steps = range(800, 200, -stride)
        found = sample_dpm_solver(best_eps, flow(z, ABAR[800]), steps, ABAR, end=ABAR[200])
        return (found - flow(z, ABAR[200])).abs().mean().item()

    assert error(10) < 1e-3
    assert error(20) / error(10) > 3.3  # half the stride, about a quarter of the error
    assert error(10) / error(5) > 3.3


def test_a_run_that_ends_without_noise_ends_at_the_last_prediction(x: Tensor) -> None:
    seen: list[Tensor] = []
    found = sample_dpm_solver(
        curved, x, uniform_timesteps(20), ABAR, end=1.0, callback=lambda _, x_0: seen.append(x_0)
    )
    torch.testing.assert_close(found, seen[-1], rtol=0, atol=0)


# -- the contract -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 599, 999, 1000])
@pytest.mark.parametrize(
    ("sample", "timesteps"), [(sample_ddim, ddim_timesteps), (sample_dpm_solver, uniform_timesteps)]
)
def test_one_prediction_and_one_callback_a_step(sample, timesteps, steps: int) -> None:
    visited: list[int] = []
    called: list[int] = []

    def predict(x: Tensor, t: int) -> Tensor:
        visited.append(t)
        return 0.5 * x

    x = torch.ones(1, 4, 2, 3, dtype=torch.float64)
    result = sample(predict, x, timesteps(steps), ABAR, callback=lambda step, _: called.append(step))
    assert visited == timesteps(steps)
    assert called == list(range(steps))
    assert (result.dtype, result.shape) == (x.dtype, x.shape)
    assert torch.isfinite(result).all()
    assert (x == 1).all()  # the start is not changed in place


def test_ddim_draws_noise_at_eta_above_zero_only() -> None:
    draws: list[int] = []

    def noise_like(x: Tensor) -> Tensor:
        draws.append(1)
        return torch.zeros_like(x)

    x = torch.ones(1, 4, 2, 3)
    sample_ddim(curved, x, ddim_timesteps(20), ABAR, eta=0.0, noise_like=noise_like)
    assert len(draws) == 0
    sample_ddim(curved, x, ddim_timesteps(20), ABAR, eta=1.0, noise_like=noise_like)
    assert len(draws) == 20


def test_ddim_at_eta_zero_leaves_the_global_random_state(x: Tensor) -> None:
    before = torch.get_rng_state()
    sample_ddim(curved, x, ddim_timesteps(5), ABAR)
    sample_dpm_solver(curved, x, uniform_timesteps(5), ABAR)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_records_no_graph(x: Tensor) -> None:
    weight = torch.ones(1, requires_grad=True)
    for sample in (sample_ddim, sample_dpm_solver):
        assert not sample(lambda x, _: weight * x, x, [801, 401, 1], ABAR).requires_grad


# -- guidance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_guidance_equals_two_calls(x: Tensor, scale: float) -> None:
    texts = torch.randn(2, 4, 1, 1, generator=torch.Generator().manual_seed(2))  # without, with the prompt
    calls: list[tuple[int, int]] = []

    def predict(batch: Tensor, t: int) -> Tensor:
        calls.append((len(batch), t))
        return torch.sin(batch + t) * texts.repeat_interleave(len(batch) // 2, 0)

    found = classifier_free_guidance(predict, scale)(x, 37)
    without, with_prompt = (torch.sin(x + 37) * text for text in texts)
    torch.testing.assert_close(found, (1 - scale) * without + scale * with_prompt, rtol=1e-5, atol=1e-5)
    assert calls == [(2 * len(x), 37)]  # one batch, not two calls
