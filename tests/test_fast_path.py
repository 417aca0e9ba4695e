"""The fast path: frozen weights in bf16, recomputed activations, compiled networks; float32 is the oracle."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import randomize, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cldm import fast_path
from cldm.cldm import ControlLDM
from cldm.config import SampleConfig, check_run, load_run_config
from cldm.fast_path import compile_networks, compiler_lacking, round_frozen
from cldm.generate import generate
from cldm.model import create_model, load_model_config, with_choices
from cldm.shelf import Shelf
from cldm.tensor_writing import write_tensors
from cldm.weights import read_weights
from ldm.modules.diffusionmodules.util import MANY_CHANNELS, Conv3x3

CPU = torch.device("cpu")
Results = tuple[Tensor, dict[str, Tensor]]


def step(model: ControlLDM, batch: dict[str, Any], *, autocast: bool = False) -> Results:
    """Loss and gradients of a training step at fixed draws."""
    model.train().zero_grad()
    g = torch.Generator().manual_seed(5)
    noise, t = torch.randn(2, 4, 8, 16, generator=g), torch.tensor([300, 800])
    torch.manual_seed(0)  # the draw from the posterior
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x_start, cond = model.get_input(batch, "jpg")
        loss, _ = model.p_losses(x_start, cond, t, noise)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def all_gradients(results: Results) -> Tensor:
    return torch.cat([grad.flatten() for _, grad in sorted(results[1].items())])


def layers(model: ControlLDM) -> Iterator[tuple[str, nn.Module]]:
    """The convolutions and linear layers of the UNet."""
    unet = model.model.diffusion_model
    return ((n, m) for n, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))


# -- frozen weights in bf16 -------------------------------------------------------------------------------


@pytest.mark.parametrize("locked", [True, False])
def test_what_is_frozen_is_rounded_once_and_nothing_else(tiny_model: ControlLDM, locked: bool) -> None:
    tiny_model.sd_locked = locked
    before = copy.deepcopy(tiny_model.state_dict())
    round_frozen(tiny_model)
    after = tiny_model.state_dict()
    trained = {name for name, parameter in tiny_model.named_parameters() if parameter.requires_grad}
    rounded = {
        f"model.diffusion_model.{name}.{kind}" for name, m in layers(tiny_model) for kind in m.state_dict()
    }
    assert {name for name, value in after.items() if value.dtype == torch.bfloat16} == rounded - trained
    for name, value in before.items():
        expected = value.bfloat16() if name in rounded - trained else value
        assert torch.equal(after[name], expected), name
    assert any(".output_blocks." in name for name in rounded - trained) == locked


@pytest.mark.parametrize("locked", [True, False])
def test_a_step_is_bit_by_bit_that_of_autocast_on_float32_weights(
    tiny_model: ControlLDM, tiny_batch: dict[str, Any], locked: bool
) -> None:
    tiny_model.sd_locked = locked
    expected = step(tiny_model, tiny_batch, autocast=True)
    round_frozen(tiny_model)
    for _, layer in layers(tiny_model):
        layer.to(memory_format=torch.contiguous_format)  # the same order of sums
    found = step(tiny_model, tiny_batch, autocast=True)
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert [name for name in found[1] if not torch.equal(found[1][name], expected[1][name])] == []
    assert all(grad.dtype == torch.float32 for grad in found[1].values())


def test_a_step_is_near_that_of_float32(tiny_model: ControlLDM, tiny_batch: dict[str, Any]) -> None:
    expected = step(tiny_model, tiny_batch)
    round_frozen(tiny_model)
    found = step(tiny_model, tiny_batch, autocast=True)
    assert relative_error(found[0], expected[0]) < 0.01
    ours, theirs = all_gradients(found), all_gradients(expected)
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.999


class Casts(TorchDispatchMode):
    """Remembers the memory of what is cast to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.sources.add(args[0].data_ptr())
        return function(*args, **(kwargs or {}))


def test_no_frozen_weight_of_the_unet_is_cast_in_a_step(
    tiny_model: ControlLDM, tiny_batch: dict[str, Any]
) -> None:
    counts = []
    for _ in range(2):
        with Casts() as casts:
            step(tiny_model, tiny_batch, autocast=True)
        counts.append(sum(layer.weight.data_ptr() in casts.sources for _, layer in layers(tiny_model)))
        round_frozen(tiny_model)
    assert counts == [len(list(layers(tiny_model))), 0]


def test_samples_of_rounded_weights_are_near_those_of_float32(tiny_model: ControlLDM) -> None:
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    settings = SampleConfig(steps=3, scale=2.0)
    expected = generate(tiny_model, hint, ["a road"], [0], settings).float()
    round_frozen(tiny_model)
    with torch.autocast("cpu", torch.bfloat16):
        found = generate(tiny_model, hint, ["a road"], [0], settings).float()
    assert (found - expected).abs().mean() < 3


def test_a_cached_run_does_not_hold_on_to_the_file_of_its_weights(
    tiny_model: ControlLDM, tiny_yaml: Path, tmp_path: Path
) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system has no /proc")
    path = tmp_path / "weights.safetensors"
    write_tensors(path, tiny_model.state_dict())
    model = create_model(tiny_yaml, path)
    Shelf(model, lambda: read_weights(path))
    assert str(path) in maps.read_text()
    round_frozen(model)
    gc.collect()
    assert str(path) not in maps.read_text()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.frozen_precision=int4"], "expected train.frozen_precision to be one of null, bf16"),
        (["train.precision=32-true"], "expected train.precision of auto or bf16-mixed"),
        (["train.precision=16-mixed"], "expected train.precision of auto or bf16-mixed"),
        (["train.save_full=true"], "expected train.save_full=false"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], said: str) -> None:
    config = load_run_config("streets", None, ["train.frozen_precision=bf16", *overrides])
    with pytest.raises(ValueError, match=said):
        check_run(config)


# -- recomputed activations -------------------------------------------------------------------------------


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("rounded", [True, False])
def test_recomputing_activations_changes_nothing_but_memory(
    tiny_yaml: Path, tiny_batch: dict[str, Any], locked: bool, rounded: bool
) -> None:
    found, kept = [], []
    for use in (None, True):
        model = create_model(with_choices(load_model_config(tiny_yaml), use_checkpoint=use))
        randomize(model)
        model.sd_locked = locked
        if rounded:
            round_frozen(model)
        storages: dict[int, int] = {}

        def pack(x: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            found.append(step(model, tiny_batch, autocast=rounded))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(size for place, size in storages.items() if place not in own))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-6, atol=1e-8)
    assert kept[1] < kept[0]


# -- small maps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("shape", "stride"), [((1, 8, 8), 1), ((2, 5, 7), 1), ((2, 5, 8), 2), ((3, 1, 1), 1)]
)
def test_a_product_on_small_maps_is_the_convolution(
    shape: tuple[int, int, int],
    stride: int,
    memory_format: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    g = torch.Generator().manual_seed(0)
    layer = Conv3x3(MANY_CHANNELS, 8, stride).double().to(memory_format=memory_format)
    x = torch.randn(shape[0], MANY_CHANNELS, *shape[1:], generator=g, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(x, layer.weight, layer.bias, stride, padding=1)
    out = torch.randn(expected.shape, generator=g, dtype=torch.float64)
    inputs = (x, layer.weight, layer.bias)
    wanted = torch.autograd.grad((expected * out).sum(), inputs)
    monkeypatch.setattr(nn.Conv2d, "forward", None)  # it is the product that is tested
    found = layer(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * out).sum(), inputs), wanted)


def test_large_maps_and_few_channels_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: "torch")
    for channels, side in ((MANY_CHANNELS, 32), (MANY_CHANNELS // 2, 8)):
        assert Conv3x3(channels, 8)(torch.zeros(1, channels, side, side)) == "torch"


# -- compiled networks ------------------------------------------------------------------------------------


def test_without_a_compiler_compiling_is_refused_in_a_sentence(
    tiny_model: ControlLDM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_path, "compiler_lacking", lambda device: "expected a C++ compiler, found none")
    with pytest.raises(ValueError, match=r"cannot compile for cpu: .* found none; set train.compile=false"):
        compile_networks(tiny_model, CPU)


def test_a_missing_compiler_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert "expected a C++ compiler such as g++" in (compiler_lacking(CPU) or "")


@pytest.mark.slow
@pytest.mark.skipif(compiler_lacking(CPU) is not None, reason="no C++ compiler")
def test_compiled_networks_compute_the_same(tiny_yaml: Path, tiny_batch: dict[str, Any]) -> None:
    config = load_model_config(tiny_yaml)
    for network in ("unet_config", "control_stage_config"):  # one level: compiling takes its time
        config.model.params[network].params.update(
            channel_mult=[1], num_res_blocks=1, attention_resolutions=[1]
        )
    model = create_model(config)
    randomize(model)
    expected, names = step(model, tiny_batch), list(model.state_dict())
    compile_networks(model, CPU)
    found = step(model, tiny_batch)
    assert list(model.state_dict()) == names
    assert relative_error(found[0], expected[0]) < 1e-5
    ours, theirs = all_gradients(found), all_gradients(expected)
    assert relative_error(ours, theirs) < 1e-4
