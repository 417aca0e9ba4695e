"""Networks against diffusers with the same random weights, and against the published key lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from oracles import randomize, relative_error, to_diffusers_control, to_diffusers_unet, to_diffusers_vae

from ldm.modules.attention import SLOW_BELOW, project_context, sdpa_attention
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[1]
SIZES = {
    "model_channels": 32,
    "channel_mult": [1, 2, 2, 2],
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2, 1],
}
STYLES: dict[str, dict[str, Any]] = {
    "sd1": {"num_heads": 4, "context_dim": 48, "norm_groups": 8},
    "sd2": {"num_head_channels": 16, "context_dim": 64, "use_linear_in_transformer": True},
}
TOLERANCE = 1e-5


def published(style: str) -> dict[str, Any]:
    """Parameters as a published YAML file has them, the ones without effect included."""
    unused = {"image_size": 32, "legacy": False, "use_spatial_transformer": True, "transformer_depth": 1}
    return {"in_channels": 4, **SIZES, **STYLES[style], **unused}


def build(target: str, **params: Any) -> torch.nn.Module:
    module = instantiate_from_config({"target": target, "params": params})
    return randomize(module).eval()


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def inputs(style: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 4, 8, 24, generator=g),  # not square
        "t": torch.tensor([37, 901]),
        "context": torch.randn(2, 77, STYLES[style]["context_dim"], generator=g),
        "hint": torch.rand(2, 3, 64, 192, generator=g),
    }


@torch.no_grad()
def test_unet_control_and_their_sum_equal_diffusers(style: str, inputs: dict[str, torch.Tensor]) -> None:
    x, t, context, hint = inputs.values()
    unet = build("cldm.cldm.ControlledUnetModel", out_channels=4, **published(style))
    control = build("cldm.cldm.ControlNet", hint_channels=3, **published(style))
    their_unet = to_diffusers_unet(unet, published(style))
    their_control = to_diffusers_control(control, {**published(style), "hint_channels": 3})

    down, mid = their_control(x, t, context, controlnet_cond=hint, return_dict=False)
    residuals = control(x, hint, t, context)
    assert len(residuals) == 13
    for ours, theirs in zip(residuals, [*down, mid], strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE

    plain = their_unet(x, t, context).sample
    assert relative_error(unet(x, t, context), plain) <= TOLERANCE
    steered = their_unet(
        x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid
    ).sample
    assert relative_error(steered, plain) > 0.01  # or the next line would not test the control
    assert relative_error(unet(x, t, context, control=residuals), steered) <= TOLERANCE
    mid_only = their_unet(
        x,
        t,
        context,
        down_block_additional_residuals=[0 * r for r in down],
        mid_block_additional_residual=mid,
    ).sample
    assert relative_error(unet(x, t, context, residuals, only_mid_control=True), mid_only) <= TOLERANCE
    assert len(residuals) == 13  # not eaten


@torch.no_grad()
def test_projected_context_and_hint_features_change_nothing(
    inputs: dict[str, torch.Tensor], style: str
) -> None:
    x, t, context, hint = inputs.values()
    control = build("cldm.cldm.ControlNet", hint_channels=3, **published(style))
    direct = control(x, hint, t, context)
    cached = control(x, control.encode_hint(hint), t, project_context(context, control))
    assert all(torch.equal(a, b) for a, b in zip(direct, cached, strict=True))


@torch.no_grad()
def test_autoencoder_equals_diffusers() -> None:
    ddconfig = {"ch": 32, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 2, "z_channels": 4, "norm_groups": 8}
    ddconfig |= {"double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3, "attn_resolutions": []}
    params = {"embed_dim": 4, "ddconfig": ddconfig, "monitor": "val/rec_loss"}
    ours = build("ldm.models.autoencoder.AutoencoderKL", **params)
    theirs = to_diffusers_vae(ours, params)
    image = torch.rand(1, 3, 64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior, expected = ours.encode(image), theirs.encode(image).latent_dist
    assert relative_error(posterior.mean, expected.mean) <= TOLERANCE
    assert relative_error(posterior.logvar, expected.logvar) <= TOLERANCE
    assert relative_error(posterior.std, expected.std) <= TOLERANCE
    assert relative_error(posterior.kl(), expected.kl()) <= TOLERANCE
    assert relative_error(ours.decode(posterior.mode()), theirs.decode(expected.mode()).sample) <= TOLERANCE
    draw = posterior.sample(torch.Generator().manual_seed(3))
    assert relative_error(draw, expected.sample(torch.Generator().manual_seed(3))) <= TOLERANCE


@pytest.mark.parametrize("version", ["15", "21"])
def test_every_published_tensor_has_a_home_of_its_shape(version: str) -> None:
    config = OmegaConf.to_container(OmegaConf.load(ROOT / f"models/cldm_v{version}.yaml"))
    with torch.device("meta"):
        model = instantiate_from_config(config["model"])
    ours = {key: str(list(value.shape)) for key, value in model.state_dict().items()}
    lines = (ROOT / f"tests/golden/keys_sd{version}.tsv").read_text().splitlines()
    expected = dict(line.split("\t") for line in lines if "position_ids" not in line)
    assert ours == expected


def test_timestep_embedding_is_the_closed_form() -> None:
    t, dim = torch.tensor([0.0, 1.0, 999.0]), 10
    emb = timestep_embedding(t, dim).double()
    for i in range(5):
        angle = t.double() * 10000 ** (-i / 5)
        torch.testing.assert_close(emb[:, i], angle.cos(), atol=2e-4, rtol=0)
        torch.testing.assert_close(emb[:, 5 + i], angle.sin(), atol=2e-4, rtol=0)
    assert timestep_embedding(t, 7).shape == (3, 7)


def test_deep_transformers_and_checkpointing_give_the_same_gradients(style: str) -> None:
    params = {**published(style), "transformer_depth": 2, "channel_mult": [1, 2], "num_res_blocks": 1}
    plain = build("cldm.cldm.ControlledUnetModel", out_channels=4, **params)
    saving = build("cldm.cldm.ControlledUnetModel", out_channels=4, **params, use_checkpoint=True)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    context = torch.randn(1, 77, params["context_dim"])
    for model in (plain, saving):
        model(x, t, context).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_half_precision_weights_keep_the_dtype_of_the_latent(style: str) -> None:
    params = {**published(style), "channel_mult": [1, 2], "num_res_blocks": 1}
    unet = build("cldm.cldm.ControlledUnetModel", out_channels=4, **params).to(torch.bfloat16)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, params["context_dim"], dtype=torch.bfloat16)
    assert unet(x, torch.tensor([5]), context).dtype == torch.float32


@pytest.mark.parametrize(
    ("target", "params", "message"),
    [
        ("os.system", {}, "not allowed"),
        ("cldm.cldm.Nothing", {}, "does not exist"),
        ("cldm.cldm.ControlNet", {"hint_chanels": 3, "num_heads": 1}, "did you mean 'hint_channels'"),
        ("cldm.cldm.ControlNet", {"num_heads": 1, "use_spatial_transformer": False}, "only True"),
        ("cldm.cldm.ControlNet", {"num_heads": 1, "attn_backend": "magic"}, "sdpa, xformers"),
        ("cldm.cldm.ControlNet", {}, "num_heads or num_head_channels"),
    ],
)
def test_a_bad_model_file_is_answered_with_a_sentence(target: str, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instantiate_from_config({"target": target, "params": params})


def test_identity_is_allowed_as_in_published_files() -> None:
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), torch.nn.Identity)


@pytest.mark.parametrize("places", [24, 520])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradients_are_those_of_the_formula(places: int, dtype: torch.dtype) -> None:
    assert (places * places > SLOW_BELOW) == (places == 520)  # bf16 takes both ways
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, places, 2, 8), (2, places, 2, 8), (2, places, 2, 8)]
    exact = [torch.randn(s, generator=generator).to(dtype).double().requires_grad_() for s in shapes]
    q, k, v = exact
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5).softmax(dim=-1)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    direction = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(dtype)
    (expected * direction).sum().backward()
    tensors = [x.detach().to(dtype).requires_grad_() for x in exact]
    found = sdpa_attention(*tensors)
    (found * direction).sum().backward()
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in [(found, expected), *((a.grad, b.grad) for a, b in zip(tensors, exact, strict=True))]:
        assert ours.dtype == dtype
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < limit
