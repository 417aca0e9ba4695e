"""Adding a control branch: where every tensor comes from, that it changes nothing, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DDPMScheduler
from oracles import randomize
from safetensors import safe_open
from torch import Tensor

import tool_add_control
from cldm.add_control import add_control
from cldm.checkpoint import to_model_keys
from cldm.cldm import ControlLDM
from cldm.model import create_model, load_model_config, model_config_of
from cldm.tensor_files import CheckpointError

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
SD_ABAR = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"

Run = Callable[..., dict[str, Tensor]]


# -- the published bases, their tensors stood in for by views of one number -------------------------------


def stand_ins(name: str) -> dict[str, Tensor]:
    """A tensor of the right shape and next to no memory for each line of a key list."""
    lines = (GOLDEN / name).read_text().splitlines()
    shapes = {key: json.loads(shape) for key, shape in (line.split("\t") for line in lines)}
    tensors = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    return tensors | ({"alphas_cumprod": SD_ABAR} if "alphas_cumprod" in tensors else {})


def published_base(version: str) -> dict[str, Tensor]:
    tensors = stand_ins(f"keys_sd{version}.tsv")
    added = ("control_model.", "logvar")
    base = {key: value for key, value in tensors.items() if not key.startswith(added)}
    return base | (stand_ins("keys_v1-5-pruned_only_in_base.tsv") if version == "15" else {})


@pytest.mark.parametrize("version", ["15", "21"])
def test_every_tensor_comes_from_where_the_published_tool_takes_it(version: str) -> None:
    lines = (GOLDEN / f"add_control_map_sd{version}.tsv").read_text().splitlines()
    expected = dict(line.split("\t") for line in lines)
    base = to_model_keys(published_base(version))
    state, sources = add_control(load_model_config(ROOT / f"models/cldm_v{version}.yaml"), base)
    assert sources == expected
    assert state.keys() == expected.keys()
    if version == "15":
        assert torch.equal(state[POSITION_IDS], torch.arange(77)[None])  # what transformers stored there
    assert sum(source == "NEW" for source in sources.values()) == 43
    copied = {
        key: source for key, source in sources.items() if key.startswith("control_") and source != "NEW"
    }
    assert len(copied) == 298
    assert all(state[key] is base[source] for key, source in copied.items())
    new = [key for key, source in sources.items() if source == "NEW"]
    assert (
        sum(bool(state[key].any()) for key in new) == 7
    )  # the hint block's weights but for its last convolution
    published = stand_ins(f"keys_sd{version}.tsv")
    assert {key: value.shape for key, value in state.items()} == {k: published[k].shape for k in expected}


def test_a_published_control_file_takes_the_place_of_the_copy() -> None:
    control = {k: v for k, v in stand_ins("keys_sd15.tsv").items() if k.startswith("control_model.")}
    base = to_model_keys(published_base("15"))
    _, sources = add_control(load_model_config(ROOT / "models/cldm_v15.yaml"), base, control)
    assert {key for key, source in sources.items() if source == "CONTROL"} == set(control)
    assert [key for key, source in sources.items() if source == "NEW"] == ["logvar"]


def test_the_bases_do_not_mix() -> None:
    base = to_model_keys(published_base("21"))
    with pytest.raises(CheckpointError, match=r"model\.diffusion_model: .*shapes? differ.*"):
        add_control(load_model_config(ROOT / "models/cldm_v15.yaml"), base)


def test_a_base_of_another_noise_schedule_is_refused() -> None:
    other = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195).alphas_cumprod
    config = load_model_config(ROOT / "models/cldm_v15.yaml")
    for abar in (other, SD_ABAR[:500]):
        base = {**to_model_keys(published_base("15")), "alphas_cumprod": abar}
        with pytest.raises(CheckpointError, match="the base holds a noise schedule that ends at"):
            add_control(config, base)


# -- the tool, on the tiny model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_model(tiny_yaml: Path) -> ControlLDM:
    return randomize(create_model(tiny_yaml), seed=9).eval()


@pytest.fixture(scope="module")
def base_state(base_model: ControlLDM) -> dict[str, Tensor]:
    state = {k: v.detach() for k, v in base_model.state_dict().items() if not k.startswith("control_model.")}
    return {**state, POSITION_IDS: torch.arange(77)[None]}  # as published files have it


@pytest.fixture(scope="module")
def base_file(base_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    safetensors.torch.save_file({k: v for k, v in base_state.items() if k != "logvar"}, path)
    return path


@pytest.fixture
def run(base_file: Path, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the tool in an empty folder; return the tensors of what it wrote, read without our code."""
    monkeypatch.chdir(tmp_path)

    def run(target: str | Path, *options: str, source: Path = base_file) -> dict[str, Tensor]:
        tool_add_control.main([str(source), str(target), "--config", str(tiny_yaml), *options])
        if str(target).endswith(".safetensors"):
            return safetensors.torch.load_file(target)
        return torch.load(target, weights_only=True)["state_dict"]

    return run


def refusal(run: Run, capsys: pytest.CaptureFixture[str], *options: str, **source: Path) -> tuple[int, str]:
    """The exit status and the one sentence that says why."""
    with pytest.raises(SystemExit) as stop:
        run("out.safetensors", *options, **source)
    assert not Path("out.safetensors").exists()
    assert not list(Path().glob(".*"))  # no leftover of a write either
    code = stop.value.code
    return (code, capsys.readouterr().err) if isinstance(code, int) else (1, str(code))


@torch.no_grad()
@pytest.mark.parametrize("name", ["out.safetensors", "out.ckpt"])  # a bare name, without a folder
def test_the_result_computes_exactly_what_the_base_computes(
    run: Run, base_model: ControlLDM, tiny_yaml: Path, name: str
) -> None:
    run(name)
    model = create_model(tiny_yaml, checkpoint=name).eval()
    g = torch.Generator().manual_seed(0)
    x, hint = torch.randn(2, 4, 8, 16, generator=g), torch.rand(2, 3, 64, 128, generator=g)
    t, text = torch.tensor([5, 905]), torch.randn(2, 77, 32, generator=g)
    expected = base_model.model.diffusion_model(x, t, text)
    assert expected.std() > 0.1
    assert torch.equal(model.apply_model(x, t, {"c_concat": [hint], "c_crossattn": [text]}), expected)
    assert torch.equal(model.apply_model(x, t, {"c_concat": None, "c_crossattn": [text]}), expected)
    image = torch.rand(1, 3, 64, 64, generator=g)
    assert torch.equal(model.encode_first_stage(image).mean, base_model.encode_first_stage(image).mean)
    assert torch.equal(model.get_learned_conditioning(["a"]), base_model.get_learned_conditioning(["a"]))


@pytest.mark.parametrize("name", ["out.safetensors", "out.ckpt"])
def test_the_file_holds_the_base_and_a_copy_of_its_encoder(
    run: Run, base_model: ControlLDM, base_state: dict[str, Tensor], name: str
) -> None:
    found = run(name)
    assert found.keys() == {*base_model.state_dict(), POSITION_IDS}
    for key, value in found.items():
        encoder_key = key.replace("control_model.", "model.diffusion_model.")
        if key in base_state:
            assert torch.equal(value, base_state[key]), key
        elif encoder_key in base_state:
            assert torch.equal(value, base_state[encoder_key]), key
        elif "input_hint_block" not in key or key.rpartition(".")[0].endswith(".14"):
            assert not value.any(), key
        elif key.endswith("weight"):
            # He et al. 2015: normal with variance 2 / fan-in; five standard errors
            expected, error = (2 / value[0].numel()) ** 0.5, (2 * value.numel()) ** -0.5
            assert abs(value.std() / expected - 1) < 5 * error, key
    assert len({value.untyped_storage().data_ptr() for value in found.values()}) == len(found)
    assert all(
        value.untyped_storage().nbytes() == value.nbytes for value in found.values() if name == "out.ckpt"
    )


def test_what_was_done_is_reported_and_recorded(
    run: Run, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run("out.safetensors")
    report = capsys.readouterr().out
    control = sum(key.startswith("control_model.") for key in found)
    assert f"{len(found) - control - 1} tensors kept from the base" in report
    assert f"{control - 42} control tensors copied" in report
    assert "43 tensors new" in report  # 24 + 16 + 2 of the branch, and logvar
    assert "control_model.input_hint_block.14.bias" in report
    assert "tutorial_train.py" in report
    with safe_open("out.safetensors", "pt") as file:
        assert load_model_config(tiny_yaml) == load_model_config(
            write("note.yaml", file.metadata()["model_config"])
        )


def write(name: str, text: str) -> Path:
    Path(name).write_text(text)
    return Path(name)


def test_the_seed_decides_and_the_global_random_state_stays(run: Run) -> None:
    torch.manual_seed(1234)  # a state that the tool itself does not leave behind
    before = torch.get_rng_state()
    first = run("a.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)  # the caller's random state has no part in it
    again = run("b.safetensors", "--seed", "0")
    other = run("c.safetensors", "--seed", "1")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    differ = {key for key in first if not torch.equal(first[key], other[key])}
    assert differ == {f"control_model.input_hint_block.{i}.weight" for i in range(0, 14, 2)}


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_given_control_file_is_taken_instead_of_the_copy(
    run: Run, base_model: ControlLDM, base_state: dict[str, Tensor], prefix: str
) -> None:
    control = {k: v.detach() for k, v in base_model.control_model.state_dict().items()}
    torch.save({prefix + key: value for key, value in control.items()}, "given.pth")
    found = run("out.safetensors", "--control", "given.pth")
    assert all(torch.equal(found[f"control_model.{key}"], value) for key, value in control.items())
    assert all(torch.equal(found[key], value) for key, value in base_state.items())


def test_of_a_whole_model_given_as_control_only_the_branch_is_taken(
    run: Run, tiny_yaml: Path, base_state: dict[str, Tensor]
) -> None:
    other = randomize(create_model(tiny_yaml), seed=77).state_dict()
    safetensors.torch.save_file(other, "whole.safetensors")
    found = run("out.safetensors", "--control", "whole.safetensors")
    for key, value in found.items():
        assert torch.equal(value, (other if key.startswith("control_model.") else base_state)[key]), key


def test_a_base_in_half_precision_keeps_its_type(run: Run, base_state: dict[str, Tensor]) -> None:
    safetensors.torch.save_file({k: v.half() for k, v in base_state.items()}, "half.safetensors")
    found = run("out.safetensors", source=Path("half.safetensors"))
    key = "input_blocks.0.0.weight"
    assert found[f"model.diffusion_model.{key}"].dtype == torch.float16
    assert torch.equal(found[f"control_model.{key}"], found[f"model.diffusion_model.{key}"])


# -- what is refused --------------------------------------------------------------------------------------


def test_a_file_with_a_control_branch_is_refused(run: Run, base_model: ControlLDM, capsys) -> None:
    safetensors.torch.save_file(base_model.state_dict(), "has.safetensors")
    code, message = refusal(run, capsys, source=Path("has.safetensors"))
    assert code == 2
    assert "has.safetensors has a control branch already" in message


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        (
            {"conditioner.embedders.0.weight": (1,), "model.diffusion_model.label_emb.0.0.weight": (4, 4)},
            "SDXL",
        ),
        ({"lora_unet_mid.lora_down.weight": (4, 4)}, "LoRA"),
    ],
)
def test_another_kind_of_model_is_named(
    run: Run, base_state: dict[str, Tensor], capsys, extra: dict[str, tuple[int, ...]], what: str
) -> None:
    tensors = base_state | {key: torch.ones(shape) for key, shape in extra.items()}
    safetensors.torch.save_file(tensors, "other.safetensors")
    code, message = refusal(run, capsys, source=Path("other.safetensors"))
    assert code == 2
    assert what in message


def test_an_incomplete_base_is_refused(run: Run, base_state: dict[str, Tensor], capsys) -> None:
    kept = {
        key: value for key, value in base_state.items() if not key.startswith("first_stage_model.encoder")
    }
    safetensors.torch.save_file(kept, "part.safetensors")
    code, message = refusal(run, capsys, source=Path("part.safetensors"))
    assert code == 2
    assert "first_stage_model: " in message
    assert "missing, first first_stage_model.encoder" in message


def test_an_incomplete_or_foreign_control_file_is_refused(run: Run, base_model: ControlLDM, capsys) -> None:
    control = {f"control_model.{k}": v.detach() for k, v in base_model.control_model.state_dict().items()}
    lost = control.pop("control_model.zero_convs.5.0.weight")
    torch.save(control, "part.pth")
    code, message = refusal(run, capsys, "--control", "part.pth")
    assert code == 2
    assert f"1 of {len(control) + 1} tensors missing, first control_model.zero_convs.5.0.weight" in message
    torch.save(control | {"control_model.zero_convs.5.0.weight": lost, "stray.weight": lost}, "stray.pth")
    code, message = refusal(run, capsys, "--control", "stray.pth")
    assert code == 2
    assert "stray: 1 unexpected, first stray.weight" in message


def test_what_is_no_weight_file_is_refused(run: Run, capsys) -> None:
    code, message = refusal(run, capsys, source=write("page.safetensors", "<!DOCTYPE html><html>"))
    assert code == 2
    assert "web page" in message


def test_a_pickle_that_runs_code_is_refused_and_not_run(run: Run, capsys) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, ("sprung",)

    torch.save({"state_dict": {"a": Trap()}}, "trap.ckpt")
    code, message = refusal(run, capsys, source=Path("trap.ckpt"))
    assert code == 2
    assert "mkdir" in message
    assert not Path("sprung").exists()


def test_an_existing_target_is_left_alone(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    write("out.ckpt", "mine")
    with pytest.raises(SystemExit) as stop:
        run("out.ckpt")
    assert stop.value.code == 2
    assert "out.ckpt exists; choose another name" in capsys.readouterr().err
    assert Path("out.ckpt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gone.ckpt", "out.ckpt"], "gone.ckpt does not exist"),
        (["here.ckpt", "nowhere/out.ckpt"], "the folder nowhere does not exist; create it first"),
        (["here.ckpt"], "OUT is missing"),
        (["here.ckpt", "out.ckpt", "--control", "gone.pth"], "gone.pth does not exist"),
        (["here.ckpt", "out.ckpt", "--config", "gone.yaml"], "gone.yaml does not exist"),
        ([], "Streets base"),
    ],
)
def test_bad_arguments_are_answered_before_torch_is_imported(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "here.ckpt").touch()
    command = [sys.executable, "-X", "importtime", str(ROOT / "tool_add_control.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tool_add_control.py: error: ")
    assert sentence in last
    assert "torch" not in done.stderr.replace(last, "")
    assert list(tmp_path.iterdir()) == [tmp_path / "here.ckpt"]


def test_a_branch_that_was_trained_with_its_decoder_is_refused(
    run: Run, base_state: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = {key: value for key, value in base_state.items() if ".output_blocks." in key}
    control = {"control_model.time_embed.0.bias": torch.zeros(4)}
    torch.save(control | decoder, "unlocked.pth")
    code, message = refusal(run, capsys, "--control", "unlocked.pth")
    assert code != 0
    assert "trained with its control branch" in message
    assert "--resume_path unlocked.pth" in message


# -- what a published file says of itself -----------------------------------------------------------------


@pytest.mark.parametrize("version", ["15", "21"])
@pytest.mark.parametrize("channels", [3, 20])
def test_architecture_and_hint_channels_are_read_from_a_published_file(
    version: str, channels: int, tmp_path: Path
) -> None:
    whole = stand_ins(f"keys_sd{version}.tsv")
    first = "control_model.input_hint_block.0.weight"
    whole[first] = torch.zeros(()).expand(16, channels, 3, 3)
    branch = {key: value for key, value in whole.items() if key.startswith("control_model.")}
    bare = {key.removeprefix("control_model."): value for key, value in branch.items()}
    # 1.0 holds its base as well, 1.1 the branch alone, others leave the prefix out
    for name, state in {"whole": whole, "branch": branch, "bare": bare}.items():
        torch.save(state, tmp_path / f"{name}.pth")
        params = model_config_of(tmp_path / f"{name}.pth").model.params
        assert params.control_stage_config.params.hint_channels == channels
        assert params.unet_config.params.context_dim == {"15": 768, "21": 1024}[version]


def test_a_branch_for_hints_of_other_channels_brings_them_along(
    run: Run, base_model: ControlLDM, tmp_path: Path
) -> None:
    control = {k: v.detach() for k, v in base_model.control_model.state_dict().items()}
    control["input_hint_block.0.weight"] = torch.ones(16, 6, 3, 3)
    torch.save(control, "six.pth")
    run("out.safetensors", "--control", "six.pth")
    config = model_config_of("out.safetensors")
    assert create_model(config, "out.safetensors").control_model.hint_channels == 6


def test_a_branch_of_another_base_is_refused_by_both_names(tmp_path: Path, capsys) -> None:
    torch.save(published_base("15"), tmp_path / "sd15.ckpt")
    control = {k: v for k, v in stand_ins("keys_sd21.tsv").items() if k.startswith("control_model.")}
    torch.save(control, tmp_path / "control_sd21.pth")
    arguments = [str(tmp_path / name) for name in ("sd15.ckpt", "out.safetensors")]
    with pytest.raises(SystemExit):
        tool_add_control.main([*arguments, "--control", str(tmp_path / "control_sd21.pth")])
    said = capsys.readouterr().err
    assert "control_sd21.pth is a control branch for Stable Diffusion 2.1, but " in said
    assert "sd15.ckpt is Stable Diffusion 1.5; a control branch needs the base" in said
