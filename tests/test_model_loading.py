"""From a weight file to a model: what loads, what is refused and in which words, where a base is found."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import safetensors.torch
import torch
from diffusers import DDPMScheduler
from oracles import randomize
from torch import Tensor

from cldm.cldm import ControlLDM
from cldm.model import (
    create_model,
    load_model,
    load_model_config,
    load_state_dict,
    load_weights,
    model_config_of,
)
from cldm.tensor_files import CheckpointError
from cldm.tensor_writing import write_tensors
from cldm.weights import base_notes, find_base, read_weights
from ldm.util import instantiate_empty, instantiate_from_config

Edit = Callable[[dict[str, Tensor]], dict[str, Any]]
GOLDEN = Path(__file__).parent / "golden"
SCHEDULE = {
    line.split("\t")[0]
    for line in (GOLDEN / "keys_sd15.tsv").read_text().splitlines()
    if "." not in line.split("\t")[0]
}


@pytest.fixture(scope="module")
def state(tiny_model_once: ControlLDM) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in tiny_model_once.state_dict().items()}


@pytest.fixture(scope="module")
def full(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "full.safetensors"
    safetensors.torch.save_file(state, path)
    return path


def assert_holds(model: ControlLDM, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == torch.float32, key
        assert torch.equal(found[key], value.float()), key


def test_without_a_checkpoint_the_parameters_are_real_and_trainable(tiny_yaml: Path) -> None:
    model = create_model(tiny_yaml).cpu()
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert model.control_model.input_blocks[0][0].weight.std() > 0


def test_a_checkpoint_gives_what_load_state_dict_gives(
    tiny_yaml: Path, full: Path, state: dict[str, Tensor]
) -> None:
    theirs = create_model(str(tiny_yaml)).cpu()
    theirs.load_state_dict(load_state_dict(str(full), location="cpu"))  # the two lines of published scripts
    ours = create_model(tiny_yaml, checkpoint=full)
    assert_holds(ours, state)
    assert_holds(theirs, state)
    frozen = {name: p.requires_grad for name, p in theirs.named_parameters()}
    assert {name: p.requires_grad for name, p in ours.named_parameters()} == frozen
    assert ours.device == torch.device("cpu")
    assert {p.device.type for p in (*ours.parameters(), *ours.buffers())} == {"cpu"}


def test_a_loaded_model_trains_and_leaves_its_file_alone(
    tiny_yaml: Path, full: Path, tiny_batch: dict[str, Any]
) -> None:
    before = hashlib.sha256(full.read_bytes()).hexdigest()
    model = create_model(tiny_yaml, checkpoint=full).train()
    model.sd_locked = False
    model.learning_rate = 0.1
    optimizer = model.configure_optimizers()
    x_start, cond = model.get_input(tiny_batch, "jpg")
    loss, _ = model.p_losses(x_start, cond, torch.tensor([10, 900]))
    loss.backward()
    optimizer.step()
    assert hashlib.sha256(full.read_bytes()).hexdigest() == before  # the weights were mapped from it


@pytest.mark.parametrize("name", ["again.safetensors", "again.ckpt"])
def test_a_written_model_reads_back(
    tiny_yaml: Path, state: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    write_tensors(tmp_path / name, state)
    assert_holds(create_model(tiny_yaml, checkpoint=tmp_path / name), state)


def test_a_half_precision_file_loads_in_single_precision(
    tiny_yaml: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    half = {key: value.half() for key, value in state.items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    model = create_model(tiny_yaml, checkpoint=tmp_path / "half.safetensors")
    expected = {key: state[key] if key in SCHEDULE else value for key, value in half.items()}
    assert_holds(model, expected)  # the schedule is computed, so it keeps its precision


# -- spellings and extras that published files have -------------------------------------------------------


def with_position_ids(state: dict[str, Tensor]) -> dict[str, Any]:
    key = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    return state | {key: torch.arange(77)[None]}


def with_ema(state: dict[str, Tensor]) -> dict[str, Any]:
    extra = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    for key, value in state.items():
        if key.startswith("model.diffusion_model."):
            extra["model_ema." + key.removeprefix("model.").replace(".", "")] = value + 1
    return state | extra


def without_schedule(state: dict[str, Tensor]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in SCHEDULE}


def without_logvar(state: dict[str, Tensor]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "logvar"}


def without_text_level(state: dict[str, Tensor]) -> dict[str, Any]:
    return {key.replace("transformer.text_model.", "transformer."): value for key, value in state.items()}


def as_lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    rest = {"epoch": 3, "global_step": 100, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}]}
    return {"state_dict": state, "pytorch-lightning_version": "1.6.5", **rest}


@pytest.mark.parametrize(
    "edit",
    [with_position_ids, with_ema, without_schedule, without_logvar, without_text_level, as_lightning],
    ids=lambda edit: edit.__name__,
)
def test_published_variants_load(
    tiny_yaml: Path, state: dict[str, Tensor], tmp_path: Path, edit: Edit
) -> None:
    torch.save(edit(state), tmp_path / "variant.ckpt")
    assert_holds(create_model(tiny_yaml, checkpoint=tmp_path / "variant.ckpt"), state)
    found = load_state_dict(tmp_path / "variant.ckpt")
    assert set(found) <= set(state)
    assert set(found) >= set(state) - SCHEDULE


def test_load_state_dict_gives_plain_tensors_by_published_name(full: Path, state: dict[str, Tensor]) -> None:
    found = load_state_dict(full)
    assert type(found) is dict
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert {value.device.type for value in load_state_dict(full, location="meta").values()} == {"meta"}


# -- strictness -------------------------------------------------------------------------------------------


def refusal(tiny_yaml: Path, tensors: dict[str, Tensor], tmp_path: Path) -> str:
    path = tmp_path / "odd.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError) as error:
        create_model(tiny_yaml, checkpoint=path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_missing_tensors_are_counted_and_the_first_is_named(
    tiny_yaml: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    lost = [key for key in state if key.startswith("first_stage_model.decoder.up.")]
    rest = {key: value for key, value in state.items() if key not in lost}
    total = sum(key.startswith("first_stage_model.") for key in state)
    message = refusal(tiny_yaml, rest, tmp_path)
    assert f"first_stage_model: {len(lost)} of {total} tensors missing, first {lost[0]}" in message


def test_unexpected_tensors_are_counted_and_the_first_is_named(
    tiny_yaml: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    extra = {f"control_model.zero_convs.{i}.0.weight": torch.ones(1) for i in (12, 13)}
    message = refusal(tiny_yaml, state | extra, tmp_path)
    assert "control_model: 2 unexpected, first control_model.zero_convs.12.0.weight" in message


def test_another_shape_is_said_with_both_shapes(
    tiny_yaml: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    key = "control_model.input_hint_block.0.weight"
    message = refusal(tiny_yaml, state | {key: torch.ones(16, 19, 3, 3)}, tmp_path)
    assert (
        f"control_model: 1 shape differs, first {key} expected (16, 3, 3, 3) found (16, 19, 3, 3)" in message
    )


def test_a_file_of_the_other_base_is_refused_module_by_module(
    tiny_yamls: dict[str, Path], tmp_path: Path
) -> None:
    other = create_model(tiny_yamls["sd2"]).state_dict()
    message = refusal(tiny_yamls["sd1"], {k: v.contiguous() for k, v in other.items()}, tmp_path)
    assert "cond_stage_model: " in message
    assert "tensors missing, first cond_stage_model.transformer.text_model." in message
    assert "unexpected, first cond_stage_model.model." in message
    # Linear projections are what tells the UNet of SD2.1 from one of SD1.5 of the same widths.
    for part in ("model.diffusion_model", "control_model"):
        key = f"{part}.input_blocks.1.1.proj_in.weight"
        assert f"first {key} expected (16, 16, 1, 1) found (16, 16)" in message


def test_weights_of_another_noise_schedule_are_refused(
    tiny_yaml: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195).alphas_cumprod
    message = refusal(tiny_yaml, state | {"alphas_cumprod": theirs}, tmp_path)
    assert f"{theirs[-1]:.6f}" in message
    assert "0.004660" in message
    assert "linear_start" in message


def test_a_schedule_of_another_length_is_refused(
    tiny_yaml: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    short = {key: value[:500] if key in SCHEDULE else value for key, value in state.items()}
    assert "expected (1000,) found (500,)" in refusal(tiny_yaml, short, tmp_path)


def test_sd21_weights_for_an_sd15_model_are_named() -> None:
    lines = (GOLDEN / "keys_sd21.tsv").read_text().splitlines()
    shapes = dict(line.split("\t") for line in lines)
    weights = {key: torch.zeros(()).expand(json.loads(shape)) for key, shape in shapes.items()}
    with torch.device("meta"):
        model = create_model(GOLDEN.parents[1] / "models/cldm_v15.yaml")
    with pytest.raises(CheckpointError, match=r"it is sd21, the model is sd15; models/cldm_v21\.yaml is"):
        load_weights(model, weights, "v2-1.ckpt")


@pytest.mark.parametrize("text", ["data: 3", "- a\n- b", "model: {params: {}}"])
def test_a_yaml_that_is_no_model_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(
        ValueError, match=r"odd\.yaml(: expected sections| is no model file: expected 'model' with 'target')"
    ):
        create_model(tmp_path / "odd.yaml")
    with pytest.raises(FileNotFoundError, match=r"found nothing at .*gone\.yaml"):
        load_model_config(tmp_path / "gone.yaml")


def test_the_model_file_is_recorded_in_a_checkpoint_or_known_by_its_shapes(
    tiny_yaml: Path, state: dict[str, Tensor], full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors(tmp_path / "noted.safetensors", state, {"model_config": tiny_yaml.read_text()})
    assert model_config_of(tmp_path / "noted.safetensors") == load_model_config(tiny_yaml)
    monkeypatch.chdir(Path(__file__).parents[1])
    assert model_config_of(full) == load_model_config("models/cldm_streets.yaml")


# -- weights that lie in two files ------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with models/ and runs/a/ in it."""
    (tmp_path / "models").mkdir()
    (tmp_path / "runs/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base(home: Path, state: dict[str, Tensor]) -> Path:
    path = home / "models/base.safetensors"
    kept = {key: value for key, value in state.items() if not key.startswith("control_model.")}
    safetensors.torch.save_file(kept, path)
    return path


def trained(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """What a run changed, each value one larger."""
    return {key: value + 1 for key, value in state.items() if key.startswith(prefixes)}


@pytest.mark.parametrize(
    "prefixes",
    [("control_model.",), ("control_model.", "model.diffusion_model.out")],
    ids=["locked", "unlocked"],
)
def test_what_was_trained_lies_over_its_base(
    tiny_yaml: Path, state: dict[str, Tensor], base: Path, prefixes: tuple[str, ...]
) -> None:
    new = trained(state, *prefixes)
    safetensors.torch.save_file(new, "control.safetensors")
    expected = state | new
    assert_holds(create_model(tiny_yaml, checkpoint="control.safetensors", base=base), expected)
    found = read_weights("control.safetensors", base)
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_bare_control_file_lies_over_its_base(
    tiny_yaml: Path, state: dict[str, Tensor], base: Path
) -> None:
    # ControlNet 1.1 files of other programs leave the prefix out.
    new = trained(state, "control_model.")
    bare = {key.removeprefix("control_model."): value for key, value in new.items()}
    torch.save(bare, "bare.pth")
    assert_holds(create_model(tiny_yaml, checkpoint="bare.pth", base=base), state | new)


def write_control(state: dict[str, Tensor], base: Path, folder: Path) -> Path:
    path = folder / "control.safetensors"
    write_tensors(path, trained(state, "control_model."), base_notes(base, folder))
    return path


def test_the_base_is_found_by_its_recorded_path_from_anywhere(
    state: dict[str, Tensor], base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = write_control(state, base, home / "runs/a")
    monkeypatch.chdir(home / "runs")  # models/ is not below, and relative paths mean something else
    assert find_base("a/control.safetensors").resolve() == base
    assert find_base(control).resolve() == base
    assert read_weights(control).keys() == state.keys()


def test_a_moved_base_is_found_by_its_hash(state: dict[str, Tensor], base: Path, home: Path) -> None:
    control = write_control(state, base, home / "runs/a")
    moved = base.rename(home / "models/zz_renamed.safetensors")
    decoy = bytearray(moved.read_bytes())
    decoy[-1] ^= 1
    (home / "models/aa_same_size.safetensors").write_bytes(decoy)
    (home / "models/folder").mkdir()
    assert find_base(control).resolve() == moved


def test_a_base_that_is_nowhere_is_asked_for(state: dict[str, Tensor], base: Path, home: Path) -> None:
    control = write_control(state, base, home / "runs/a")
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    base.unlink()
    with pytest.raises(CheckpointError, match="--base FILE") as error:
        read_weights(control)
    assert digest[:12] in str(error.value)
    assert "base.safetensors" in str(error.value)


def test_a_base_of_another_size_at_the_recorded_path_is_not_taken(
    state: dict[str, Tensor], base: Path, home: Path
) -> None:
    control = write_control(state, base, home / "runs/a")
    base.write_bytes(base.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match="--base FILE"):
        find_base(control)


def test_a_control_file_without_a_record_asks_for_its_base(state: dict[str, Tensor], home: Path) -> None:
    safetensors.torch.save_file(trained(state, "control_model."), "control.safetensors")
    with pytest.raises(CheckpointError, match=r"no record of its base.*--base FILE"):
        read_weights("control.safetensors")


def test_weights_without_control_name_the_tool_that_adds_it(base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no control branch.*tool_add_control\.py"):
        read_weights(base)


def test_both_bases_make_a_model_of_their_config(tiny_yamls: dict[str, Path], tmp_path: Path) -> None:
    for style, config in tiny_yamls.items():
        model = randomize(create_model(config))
        write_tensors(tmp_path / f"{style}.safetensors", model.state_dict())
        loaded = create_model(config, tmp_path / f"{style}.safetensors")
        assert_holds(loaded, model.state_dict())


def test_a_model_to_sample_with_is_that_of_the_training_module_and_needs_no_lightning(
    tiny_yaml: Path, full: Path, state: dict[str, Tensor]
) -> None:
    model = load_model(load_model_config(tiny_yaml), full)
    assert_holds(model, state)
    assert not any(module.training for module in model.modules())
    trained = create_model(tiny_yaml, checkpoint=full)
    assert isinstance(trained, pl.LightningModule)
    assert type(model) in type(trained).__mro__
    assert not isinstance(model, pl.LightningModule)
    code = """
import sys
from cldm.generate import generate
from cldm.model import load_model, load_model_config
load_model(load_model_config(sys.argv[1]), sys.argv[2])
print(*sys.modules, sep="\\n")
"""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code, str(tiny_yaml), str(full)]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "cldm.cldm" in loaded
    assert not loaded & {"pytorch_lightning", "torchmetrics", "torchvision", "torch._dynamo", "scipy"}


def test_what_is_made_empty_is_as_large_as_what_is_made_and_draws_nothing(tiny_yaml: Path) -> None:
    params = load_model_config(tiny_yaml).model
    before = torch.get_rng_state()
    empty = instantiate_empty(params)
    assert torch.equal(torch.get_rng_state(), before)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    shapes = {key: (value.shape, value.dtype) for key, value in empty.state_dict().items()}
    made = instantiate_from_config(params).state_dict()
    assert shapes == {key: (value.shape, value.dtype) for key, value in made.items()}
