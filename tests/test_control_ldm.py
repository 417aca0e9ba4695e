"""The training module: what is frozen, what is computed, and the surface that user code holds."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from oracles import randomize
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cldm.cldm import ControlLDM, ControlledUnetModel, ControlNet, build_hint_block, guess_mode_scales, scaled
from cldm.model import create_model
from ldm.util import instantiate_from_config

DECODER = ("model.diffusion_model.output_blocks.", "model.diffusion_model.out.")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def t() -> Tensor:
    return torch.tensor([37, 901])


@pytest.fixture
def cond() -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    hint, text = torch.rand(2, 3, 64, 128, generator=g), torch.randn(2, 77, 32, generator=g)
    return {"c_concat": [hint], "c_crossattn": [text]}


def plain(cond: dict[str, Any]) -> dict[str, Any]:
    return {**cond, "c_concat": None}


def rows(cond: dict[str, Any], part: slice) -> dict[str, Any]:
    return {key: [value[part] for value in values] for key, values in cond.items()}


# -- what the control branch does to the prediction -------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("style", ["sd1", "sd2"])
def test_a_fresh_control_branch_changes_nothing(
    tiny_yamls: dict[str, Path], style: str, x: Tensor, t: Tensor, cond: dict[str, Any]
) -> None:
    model = create_model(tiny_yamls[style]).eval()
    randomize(model.model)  # the last convolution of a fresh UNet is zero, which would hide any control
    with_hint = model.apply_model(x, t, cond)
    assert with_hint.std() > 0.1
    assert torch.equal(with_hint, model.apply_model(x, t, plain(cond)))
    assert torch.equal(with_hint, model.model.diffusion_model(x, t, cond["c_crossattn"][0]))
    zero = [name for name, p in model.control_model.named_parameters() if not p.any()]
    assert {name.partition(".")[0] for name in zero} >= {"zero_convs", "middle_block_out"}
    nn.init.constant_(model.control_model.zero_convs[3][0].bias, 0.1)
    assert not torch.equal(with_hint, model.apply_model(x, t, cond))


@torch.no_grad()
def test_the_prediction_is_the_unet_with_scaled_residuals(
    tiny_model: ControlLDM, x: Tensor, t: Tensor, cond: dict[str, Any]
) -> None:
    unet, hint, text = tiny_model.model.diffusion_model, cond["c_concat"][0], cond["c_crossattn"][0]
    residuals = tiny_model.control_model(x=x, hint=hint, timesteps=t, context=text)
    scales = [0.1 * (i + 1) for i in range(13)]
    tiny_model.control_scales = scales
    weighted = [s * r for s, r in zip(scales, residuals, strict=True)]
    expected = unet(x=x, timesteps=t, context=text, control=weighted, only_mid_control=False)
    torch.testing.assert_close(tiny_model.apply_model(x, t, cond), expected, rtol=0, atol=1e-6)
    tiny_model.control_scales = [1.0] * 13
    found = tiny_model.apply_model(x, t, {**cond, "control_scales": scales})  # those of a call go first
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(tiny_model.apply_model(x, t, cond), expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_only_mid_control_adds_the_last_residual_alone(
    tiny_model: ControlLDM, x: Tensor, t: Tensor, cond: dict[str, Any]
) -> None:
    full = tiny_model.apply_model(x, t, cond)
    tiny_model.only_mid_control = True
    found = tiny_model.apply_model(x, t, cond)
    tiny_model.only_mid_control = False
    tiny_model.control_scales = [0.0] * 12 + [1.0]
    torch.testing.assert_close(found, tiny_model.apply_model(x, t, cond), rtol=0, atol=1e-6)
    assert not torch.allclose(found, full, rtol=0, atol=1e-3)


@torch.no_grad()
def test_zero_scales_are_no_control(
    tiny_model: ControlLDM, x: Tensor, t: Tensor, cond: dict[str, Any]
) -> None:
    tiny_model.control_scales = [0.0] * 13
    assert torch.equal(tiny_model.apply_model(x, t, cond), tiny_model.apply_model(x, t, plain(cond)))


@pytest.mark.parametrize("count", [12, 14])
def test_a_wrong_number_of_scales_is_refused(
    tiny_model: ControlLDM, x: Tensor, t: Tensor, cond: dict[str, Any], count: int
) -> None:
    tiny_model.control_scales = [1.0] * count
    with pytest.raises(ValueError, match=rf"expected 13 control_scales.*found {count}"):
        tiny_model.apply_model(x, t, cond)


def test_scales_weigh_and_leave_their_input() -> None:
    residuals = [torch.ones(1, 2, 1, 1), torch.full((1, 2, 1, 1), 3.0)]
    found = scaled(residuals, [2.0, 0.5])
    assert [r[0, 0].item() for r in found] == [2.0, 1.5]
    assert [r[0, 0].item() for r in residuals] == [1.0, 3.0]


@torch.no_grad()
def test_global_average_pooling_is_the_mean_over_the_map(tiny_yaml: Path, x: Tensor, t: Tensor) -> None:
    config: Any = OmegaConf.to_container(OmegaConf.load(tiny_yaml).model.params.control_stage_config)
    maps = randomize(instantiate_from_config(config))
    config["params"]["global_average_pooling"] = True
    pooled = randomize(instantiate_from_config(config))
    g = torch.Generator().manual_seed(2)
    hint, text = torch.rand(2, 3, 64, 128, generator=g), torch.randn(2, 77, 32, generator=g)
    for mean, residual in zip(pooled(x, hint, t, text), maps(x, hint, t, text), strict=True):
        expected = residual.double().numpy().mean((2, 3), keepdims=True)
        np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("pooled", [False, True])
def test_guess_mode_equals_the_two_halves_run_apart(
    tiny_model: ControlLDM, x: Tensor, t: Tensor, cond: dict[str, Any], pooled: bool
) -> None:
    # A hint for the second latent only: the first is predicted as if there were no control branch.
    tiny_model.control_model.global_average_pooling = pooled
    scales = guess_mode_scales(0.9, 13)
    guess = {**cond, "c_concat": [cond["c_concat"][0][1:]], "control_scales": scales}
    found = tiny_model.apply_model(x, t, guess)
    ready = tiny_model.apply_model(x, t, tiny_model.precompute_cond(guess))
    first, last = slice(0, 1), slice(1, 2)
    free = tiny_model.apply_model(x[first], t[first], plain(rows(cond, first)))
    steered = tiny_model.apply_model(x[last], t[last], {**rows(cond, last), "control_scales": scales})
    torch.testing.assert_close(found, torch.cat([free, steered]), rtol=0, atol=1e-5)
    torch.testing.assert_close(ready, found, rtol=0, atol=1e-6)


def test_guess_mode_scales_fade_as_published() -> None:
    expected = [0.7 * 0.825 ** (12 - i) for i in range(13)]
    assert guess_mode_scales(0.7, 13) == pytest.approx(expected)


@torch.no_grad()
def test_a_precomputed_condition_stands_for_the_condition(
    tiny_model: ControlLDM, x: Tensor, t: Tensor, cond: dict[str, Any]
) -> None:
    ready = tiny_model.precompute_cond(cond)
    assert torch.equal(tiny_model.apply_model(x, t, ready), tiny_model.apply_model(x, t, cond))
    without = tiny_model.precompute_cond(plain(cond))
    assert torch.equal(tiny_model.apply_model(x, t, without), tiny_model.apply_model(x, t, plain(cond)))
    # Hint and text were really replaced: the networks that make them are not called again.
    tiny_model.control_model.input_hint_block = nn.Identity()
    for module in tiny_model.modules():
        if getattr(module, "is_cross", False):
            module.to_k = module.to_v = nn.Identity()
    tiny_model.apply_model(x, t, ready)


@torch.no_grad()
def test_parts_of_a_condition_are_joined_along_the_text(
    tiny_model: ControlLDM, x: Tensor, t: Tensor, cond: dict[str, Any]
) -> None:
    text = cond["c_crossattn"][0]
    split = {**cond, "c_crossattn": [text[:, :30], text[:, 30:]]}
    assert torch.equal(tiny_model.apply_model(x, t, split), tiny_model.apply_model(x, t, cond))


def test_a_hint_of_other_channels_is_refused(
    tiny_model: ControlLDM, x: Tensor, t: Tensor, cond: dict
) -> None:
    with pytest.raises(ValueError, match="hint of 3 channels, as the model has, found 5"):
        tiny_model.apply_model(x, t, {**cond, "c_concat": [torch.rand(2, 5, 64, 128)]})


# -- what is frozen ---------------------------------------------------------------------------------------


def gradient_names(model: ControlLDM) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None}


def expected_names(model: ControlLDM, locked: bool) -> set[str]:
    trained = ("control_model.",) if locked else ("control_model.", *DECODER)
    return {name for name, _ in model.named_parameters() if name.startswith(trained)}


@pytest.mark.parametrize("changes", [[], [True], [False], [False, True], [True, False]])
def test_sd_locked_decides_what_trains_and_works_after_construction(
    tiny_model: ControlLDM, x: Tensor, t: Tensor, cond: dict[str, Any], changes: list[bool]
) -> None:
    for locked in changes:
        tiny_model.sd_locked = locked
    locked = changes[-1] if changes else True
    assert tiny_model.sd_locked is locked
    tiny_model.train()
    loss, _ = tiny_model.p_losses(x, cond, t, torch.ones_like(x))
    loss.backward()
    names = expected_names(tiny_model, locked)
    assert any(name.startswith(DECODER) for name in names) is not locked
    assert gradient_names(tiny_model) == names
    by_id = {id(p): name for name, p in tiny_model.named_parameters()}
    assert {by_id[id(p)] for p in tiny_model.trainable_parameters()} == names
    tiny_model.learning_rate = 3e-4
    optimizer = tiny_model.configure_optimizers()
    assert {by_id[id(p)] for group in optimizer.param_groups for p in group["params"]} == names
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}


@pytest.mark.parametrize("locked", [True, False])
def test_no_graph_is_recorded_through_the_frozen_encoder(
    tiny_model: ControlLDM, x: Tensor, t: Tensor, cond: dict[str, Any], locked: bool
) -> None:
    tiny_model.sd_locked = locked
    tiny_model.train()
    unet = tiny_model.model.diffusion_model
    graphs: list[bool] = []
    for block in (*unet.input_blocks, unet.middle_block, *unet.time_embed):
        block.register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    prediction = tiny_model.apply_model(x, t, cond)
    assert len(graphs) == 12 + 1 + 3
    assert not any(graphs)
    assert prediction.requires_grad


@pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)`")
def test_only_the_trained_parameters_move(tiny_model: ControlLDM, tiny_batch: dict[str, Any]) -> None:
    tiny_model.sd_locked = False
    tiny_model.learning_rate = 1e-2
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    tiny_model.train()
    optimizer = tiny_model.configure_optimizers()
    tiny_model.training_step(tiny_batch, 0).backward()
    optimizer.step()
    moved = {name for name, value in tiny_model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == expected_names(tiny_model, locked=False)


def test_first_stage_and_text_encoder_stay_in_evaluation_mode(tiny_model: ControlLDM) -> None:
    frozen = (tiny_model.first_stage_model, tiny_model.cond_stage_model)
    for mode in (True, False, True):
        assert tiny_model.train(mode) is tiny_model
        assert not any(m.training for part in frozen for m in part.modules())
        assert all(m.training is mode for m in tiny_model.control_model.modules())
        assert all(m.training is mode for m in tiny_model.model.modules())
    tiny_model.eval()
    assert not any(m.training for m in tiny_model.modules())


# -- loss and batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_the_loss_is_the_mean_square_of_a_plain_loop(
    tiny_model: ControlLDM, x: Tensor, t: Tensor, cond: dict, parameterization: str, training: bool
) -> None:
    tiny_model.parameterization = parameterization
    tiny_model.train(training)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    loss, logs = tiny_model.p_losses(x, cond, t, noise)

    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[t.numpy()]
    x_start, eps = x.double().numpy(), noise.double().numpy()
    a, b = (np.sqrt(value)[:, None, None, None] for value in (abar, 1 - abar))
    with torch.no_grad():
        predicted = tiny_model.apply_model(torch.from_numpy(a * x_start + b * eps).float(), t, cond).numpy()
    target = eps if parameterization == "eps" else a * eps - b * x_start
    total = 0.0
    for ours, wanted in zip(predicted.ravel(), target.ravel(), strict=True):
        total += (float(ours) - float(wanted)) ** 2
    assert loss.item() == pytest.approx(total / target.size, rel=1e-5)
    name = "train/loss_simple" if training else "val/loss_simple"
    assert list(logs) == [name]
    assert logs[name].item() == loss.item()
    assert not logs[name].requires_grad


def test_an_unknown_parameterization_is_refused(tiny_yaml: Path) -> None:
    config = OmegaConf.load(tiny_yaml)
    config.model.params.parameterization = "x0"
    with pytest.raises(ValueError, match="'eps' or 'v', found 'x0'"):
        create_model(config)


def test_predict_eps_turns_velocity_into_noise(
    tiny_model: ControlLDM, x: Tensor, cond: dict[str, Any]
) -> None:
    with torch.no_grad():
        network = tiny_model.apply_model(x, torch.tensor([801, 801]), cond)
        assert torch.equal(tiny_model.predict_eps(x, 801, cond), network)
        tiny_model.parameterization = "v"
        found = tiny_model.predict_eps(x, 801, cond)
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[801]
    expected = abar**0.5 * network + (1 - abar) ** 0.5 * x  # Salimans and Ho 2022, appendix D
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_get_input_gives_latent_hint_and_text(tiny_model: ControlLDM, tiny_batch: dict[str, Any]) -> None:
    torch.manual_seed(0)
    z, cond = tiny_model.get_input(tiny_batch, "jpg")
    image = tiny_batch["jpg"].permute(0, 3, 1, 2).contiguous()  # or randn_like would fill in another order
    torch.manual_seed(0)
    posterior = tiny_model.first_stage_model.encode(image)
    draw = posterior.mean + torch.exp(0.5 * posterior.logvar) * torch.randn_like(posterior.mean)
    torch.testing.assert_close(z, 0.18215 * draw, rtol=0, atol=1e-6)
    assert z.shape == (2, 4, 8, 16)
    assert not z.requires_grad
    assert torch.equal(cond["c_concat"][0], tiny_batch["hint"].permute(0, 3, 1, 2))
    assert torch.equal(cond["c_crossattn"][0], tiny_model.cond_stage_model(tiny_batch["txt"]))
    assert cond["c_crossattn"][0].shape == (2, 77, 32)


def test_bs_cuts_image_hint_and_text_alike(tiny_model: ControlLDM, tiny_batch: dict[str, Any]) -> None:
    z, cond = tiny_model.get_input(tiny_batch, "jpg", bs=1)
    assert [len(value) for value in (z, cond["c_concat"][0], cond["c_crossattn"][0])] == [1, 1, 1]
    assert torch.equal(cond["c_concat"][0][0], tiny_batch["hint"][0].permute(2, 0, 1))
    assert torch.equal(cond["c_crossattn"][0], tiny_model.cond_stage_model(tiny_batch["txt"][:1]))
    assert len(tiny_batch["txt"]) == 2


@pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)`")
def test_a_data_set_of_numpy_arrays_trains(tiny_model: ControlLDM) -> None:
    # The smallest data set that user code has: jpg, txt, hint and nothing else, collated by torch's default.
    rng = np.random.default_rng(0)
    samples = [
        {
            "jpg": rng.uniform(-1, 1, (64, 64, 3)).astype(np.float32),
            "txt": f"road {i}",
            "hint": rng.uniform(0, 1, (64, 64, 3)),  # float64, as `image / 255.0` gives
        }
        for i in range(2)
    ]
    tiny_model.train()
    for batch in DataLoader(samples, batch_size=2):
        loss = tiny_model.training_step(batch, 0)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in tiny_model.trainable_parameters())


@pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)`")
def test_the_training_step_draws_every_level(tiny_model: ControlLDM, tiny_batch: dict[str, Any]) -> None:
    seen: list[Tensor] = []

    def p_losses(x_start: Tensor, cond: Any, t: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(t)
        assert noise.shape == x_start.shape
        return t.float().mean(), {}

    tiny_model.p_losses = p_losses
    tiny_model.get_input = lambda batch, key: (torch.zeros(500, 4, 1, 1), {})
    torch.manual_seed(0)
    for i in range(40):
        tiny_model.training_step(tiny_batch, i)
    counts = torch.bincount(torch.cat(seen), minlength=1000)  # 20 a level are expected
    assert len(counts) == 1000
    assert counts.min() > 0
    assert abs(torch.cat(seen).float().mean().item() - 499.5) < 4 * 288.7 / 20_000**0.5


# -- the surface that user code and notebooks hold --------------------------------------------------------

SIGNATURES = {
    ControlNet.forward: ["self", "x", "hint", "timesteps", "context"],
    ControlledUnetModel.forward: ["self", "x", "timesteps", "context", "control", "only_mid_control"],
    ControlLDM.apply_model: ["self", "x_noisy", "t", "cond"],
    ControlLDM.get_input: ["self", "batch", "k", "bs"],
    ControlLDM.get_learned_conditioning: ["self", "texts"],
    ControlLDM.encode_first_stage: ["self", "image"],
    ControlLDM.get_first_stage_encoding: ["self", "posterior"],
    ControlLDM.decode_first_stage: ["self", "z"],
    ControlLDM.q_sample: ["self", "x_start", "t", "noise"],
    ControlLDM.q_posterior: ["self", "x_start", "x_t", "t"],
    ControlLDM.predict_start_from_noise: ["self", "x_t", "t", "noise"],
    ControlLDM.predict_start_from_z_and_v: ["self", "x_t", "t", "v"],
    ControlLDM.predict_eps_from_z_and_v: ["self", "x_t", "t", "v"],
    ControlLDM.get_v: ["self", "x", "noise", "t"],
    ControlLDM.p_losses: ["self", "x_start", "cond", "t", "noise"],
    create_model: ["config", "checkpoint", "base"],
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_published_calls_keep_their_arguments(function) -> None:
    assert list(inspect.signature(function).parameters) == SIGNATURES[function]


def test_published_defaults() -> None:
    def default(function, name: str) -> Any:
        return inspect.signature(function).parameters[name].default

    assert default(ControlledUnetModel.forward, "control") is None
    assert default(ControlledUnetModel.forward, "only_mid_control") is False
    assert default(ControlLDM.get_input, "bs") is None
    assert default(ControlLDM.p_losses, "noise") is None


@torch.no_grad()
def test_published_calls_give_their_shapes(tiny_model: ControlLDM, x: Tensor, t: Tensor, cond: dict) -> None:
    hint, text = cond["c_concat"][0], cond["c_crossattn"][0]
    residuals = tiny_model.control_model(x, hint, t, text)
    assert isinstance(residuals, list)
    sizes = [(8, 16)] * 3 + [(4, 8)] * 3 + [(2, 4)] * 3 + [(1, 2)] * 4
    widths = [16] * 4 + [32] * 9
    expected = [(2, w, *size) for w, size in zip(widths, sizes, strict=True)]
    assert [tuple(r.shape) for r in residuals] == expected
    text = tiny_model.get_learned_conditioning(["one", "two " * 100])
    assert text.shape == (2, 154, 32)
    posterior = tiny_model.encode_first_stage(hint * 2 - 1)
    values = (posterior.mean, posterior.std, posterior.logvar, posterior.mode(), posterior.sample())
    assert {tuple(value.shape) for value in values} == {(2, 4, 8, 16)}
    z = tiny_model.get_first_stage_encoding(posterior.mode())
    torch.testing.assert_close(z, posterior.mean * 0.18215)
    image = tiny_model.decode_first_stage(z)
    assert image.shape == (2, 3, 64, 128)
    torch.testing.assert_close(image, tiny_model.first_stage_model.decode(posterior.mean), rtol=0, atol=1e-5)
    noise = torch.ones_like(x)
    for value in (
        tiny_model.apply_model(x, t, cond),
        tiny_model.q_sample(x, t, noise),
        tiny_model.q_posterior(x, noise, t)[0],
        tiny_model.predict_start_from_noise(x, t, noise),
        tiny_model.predict_start_from_z_and_v(x, t, noise),
        tiny_model.predict_eps_from_z_and_v(x, t, noise),
        tiny_model.get_v(x, noise, t),
    ):
        assert value.shape == x.shape


def test_published_attributes(tiny_yaml: Path) -> None:
    model = create_model(tiny_yaml).cpu()  # as the published training script calls it
    assert model.parameterization == "eps"
    assert model.control_scales == [1.0] * 13
    assert model.only_mid_control is False
    assert model.sd_locked is True
    assert model.learning_rate == 1e-5
    assert model.num_timesteps == 1000
    assert model.scale_factor == 0.18215
    assert (model.first_stage_key, model.cond_stage_key, model.control_key) == ("jpg", "txt", "hint")
    buffers = {name for name, _ in model.named_buffers()}
    assert {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod"} <= buffers
    modules = dict(model.named_children())
    assert set(modules) == {"model", "control_model", "first_stage_model", "cond_stage_model"}


def test_a_fresh_hint_block_keeps_what_differs_from_place_to_place() -> None:
    torch.manual_seed(0)
    block = build_hint_block(3, 32)
    *convolutions, last = [layer for layer in block if isinstance(layer, torch.nn.Conv2d)]
    for convolution in convolutions:  # He et al. 2015, Eq. 10
        fan_in = convolution.weight[0].numel()
        spread = 4 * (2 / fan_in) ** 0.5 / (2 * convolution.weight.numel()) ** 0.5
        assert convolution.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, abs=spread)
        assert not convolution.bias.any()
    assert not last.weight.any()
    with torch.no_grad():
        features = block[:-1](torch.rand(2, 3, 64, 128).round())
    assert features.std(dim=(2, 3)).mean() > 0.02  # 0.0005 with torch's own start
