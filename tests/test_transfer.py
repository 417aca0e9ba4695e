"""Transfer of a control branch: the rule against exact fractions, the swap, what goes along, refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from oracles import randomize
from torch import Tensor

import tool_transfer_control as script
from cldm.checkpoint import SCHEDULE_KEYS
from cldm.cldm import ControlLDM
from cldm.config import SampleConfig
from cldm.generate import generate
from cldm.model import create_model, model_config_of
from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.tensor_writing import write_tensors
from cldm.transfer import check_architectures, counterparts, offset
from cldm.weights import base_notes

ROOT = Path(__file__).parents[1]
UNET, CONTROL = "model.diffusion_model.", "control_model."
FROM_THE_ENCODER = ("input_blocks.", "middle_block.", "time_embed.")
DECODER = (f"{UNET}output_blocks.", f"{UNET}out.")

Files = dict[str, Path]
State = dict[str, Tensor]


# -- the rule ---------------------------------------------------------------------------------------------


def wild(count: int, seed: int) -> Tensor:
    """float32 numbers over twenty orders of magnitude, with zeros."""
    g = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-12, 9, (count,), generator=g)
    return torch.randn(count, generator=g) * size * (torch.rand(count, generator=g) > 0.1)


def test_the_offset_is_that_of_exact_fractions() -> None:
    control, old, new = (wild(500, seed) for seed in range(3))
    found = offset(control, old, new)
    for a, c, b, n in zip(found.tolist(), control.tolist(), old.tolist(), new.tolist(), strict=True):
        exact = Fraction(c) + Fraction(n) - Fraction(b)
        assert abs(Fraction(a) - exact) <= Fraction(max(abs(c), abs(b), abs(n))) / 2**51


def test_an_untouched_branch_becomes_the_new_base_and_equal_bases_change_nothing() -> None:
    control, old, new = (wild(20_000, seed) for seed in range(3))
    assert torch.equal(offset(old, old, new).float(), new)
    assert torch.equal(offset(control, old, old).float(), control)


def test_transfers_add_up() -> None:
    control, old, new, third = (torch.randn(1000, dtype=torch.float64) for _ in range(4))
    torch.testing.assert_close(
        offset(offset(control, old, new), new, third), offset(control, old, third), rtol=0, atol=1e-14
    )
    twice = offset(2 * control, 2 * old, 2 * new)
    assert torch.equal(twice, 2 * offset(control, old, new))  # doubling is exact


def stand_ins(version: str) -> State:
    lines = (ROOT / f"tests/golden/keys_sd{version}.tsv").read_text().splitlines()
    rows = (line.split("\t") for line in lines)
    return {key: torch.zeros(()).expand(json.loads(shape)) for key, shape in rows}


@pytest.mark.parametrize("version", ["15", "21"])
def test_of_a_published_branch_what_began_as_a_copy_is_moved(version: str) -> None:
    state = stand_ins(version)
    branch = {key: value for key, value in state.items() if key.startswith(CONTROL)}
    pairs = counterparts(branch, state, "control.pth", "base.ckpt")
    lines = (ROOT / f"tests/golden/add_control_map_sd{version}.tsv").read_text().splitlines()
    published = dict(line.split("\t") for line in lines)  # what the published tool copies from where
    expected = {k: v for k, v in published.items() if k.startswith(CONTROL) and v != "NEW"}
    assert pairs == expected
    assert len(pairs) == 298


def test_two_architectures_are_refused_with_both_names() -> None:
    with pytest.raises(
        CheckpointError, match=r"seg\.pth is sd15 and v2-1\.ckpt is sd21; .* name another file"
    ):
        check_architectures({"seg.pth": stand_ins("15"), "v2-1.ckpt": stand_ins("21")})


# -- the tool, on the tiny model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state(tiny_model_once: ControlLDM) -> State:
    return {key: value.detach() for key, value in tiny_model_once.state_dict().items()}


@pytest.fixture(scope="module")
def other(tiny_yaml: Path) -> State:
    """Another base of the same sizes; its text encoder and autoencoder differ as well."""
    model = randomize(create_model(tiny_yaml), seed=5)
    return {k: v.detach() for k, v in model.state_dict().items() if not k.startswith(CONTROL)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, state: State, other: State, tiny_yaml: Path) -> Files:
    """Two bases, and a control branch that records the first."""
    folder = tmp_path_factory.mktemp("models")
    paths = {name: folder / f"{name}.safetensors" for name in ("old", "new", "control")}
    write_tensors(paths["old"], {k: v for k, v in state.items() if not k.startswith(CONTROL)})
    write_tensors(paths["new"], other)
    write_control(paths, {k: v for k, v in state.items() if k.startswith(CONTROL)}, tiny_yaml)
    return paths


@pytest.fixture
def files(written: Files, tmp_path: Path) -> Files:
    """The same under names of the test's own, to write over."""
    paths = {name: tmp_path / "models" / path.name for name, path in written.items()}
    (tmp_path / "models").mkdir()
    for name, path in paths.items():
        path.hardlink_to(written[name])
    return paths


def write_control(files: Files, tensors: State, tiny_yaml: Path, *, record: bool = True) -> None:
    run = "data:\n  hint: colours\n  size: [64, 128]\n"
    notes = {"model_config": tiny_yaml.read_text(), "run_config": run, "step": "7", "file": "not kept"}
    notes |= base_notes(files["old"], beside=files["control"].parent) if record else {}
    write_tensors(files["control"], tensors, notes)


@pytest.fixture
def run(files: Files, tmp_path: Path) -> Callable[..., State]:
    """Run the tool; return what it wrote."""

    def run(*options: str) -> State:
        target = tmp_path / "out.safetensors"
        target.unlink(missing_ok=True)
        script.main([str(files["control"]), str(target), "--to", str(files["new"]), *options])
        return read_tensors(target)

    return run


def moved_by_a_loop(control: State, old: State, new: State) -> State:
    """The rule written out, one tensor after another, in float64."""
    result = {}
    for key, value in control.items():
        name = key.replace(CONTROL, UNET)
        began_as_copy = key.removeprefix(CONTROL).startswith(FROM_THE_ENCODER) or key.startswith(UNET)
        result[key] = (new[name].double() + value.double() - old[name].double()) if began_as_copy else value
    return result


def test_every_tensor_is_that_of_a_plain_loop(
    run: Callable[..., State], state: State, other: State, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run()
    control = {key: value for key, value in state.items() if key.startswith(CONTROL)}
    expected = moved_by_a_loop(control, state, other)
    assert list(found) == list(control)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value.float(), rtol=0, atol=2e-7 * float(value.abs().max()))
        assert torch.equal(found[key], control[key]) == (
            not key.removeprefix(CONTROL).startswith(FROM_THE_ENCODER)
        )
    said = capsys.readouterr().out
    assert f"{len(control) - 42} tensors moved by the offset of the bases, 42 taken as they are" in said
    copies = {
        k: k.replace(CONTROL, UNET) for k in control if k.removeprefix(CONTROL).startswith(FROM_THE_ENCODER)
    }
    distance = sum(float((state[name] - state[k]).double().pow(2).sum()) for k, name in copies.items()) ** 0.5
    norm = sum(float(state[name].double().pow(2).sum()) for name in copies.values()) ** 0.5
    assert f"by {distance / norm:.1%} of their norm" in said


def test_a_copy_of_the_old_encoder_becomes_a_copy_of_the_new_one(
    files: Files, run: Callable[..., State], state: State, other: State, tiny_yaml: Path
) -> None:
    untouched = {
        key: state[name] if (name := key.replace(CONTROL, UNET)) in state else value
        for key, value in state.items()
        if key.startswith(CONTROL)
    }
    write_control(files, untouched, tiny_yaml)
    for key, value in run().items():
        assert torch.equal(value, other.get(key.replace(CONTROL, UNET), state[key])), key


def test_between_equal_bases_every_bit_stays(files: Files, run: Callable[..., State], state: State) -> None:
    files["new"].unlink()
    shutil.copy(files["old"], files["new"])
    assert all(torch.equal(value, state[key]) for key, value in run().items())


def test_types_are_those_of_the_control_file_unless_one_is_named(
    files: Files, run: Callable[..., State], state: State, other: State, tiny_yaml: Path
) -> None:
    half = {key: value.half() for key, value in state.items() if key.startswith(CONTROL)}
    write_control(files, half, tiny_yaml)
    expected = moved_by_a_loop(half, state, other)
    for options, dtype in ((), torch.float16), (("--dtype", "bf16"), torch.bfloat16):
        found = run(*options)
        assert {value.dtype for value in found.values()} == {dtype}
        for key, value in expected.items():  # rounded once
            assert (found[key].double() - value.to(dtype).double()).abs().max() <= 1e-6, key
    whole = run("--whole")
    assert {v.dtype for k, v in whole.items() if k.startswith(CONTROL)} == {torch.float16}
    assert all(torch.equal(whole[key], value) for key, value in other.items() if key not in SCHEDULE_KEYS)


def test_the_file_says_what_made_it_and_finds_its_base(
    files: Files, run: Callable[..., State], tmp_path: Path, other: State
) -> None:
    moved = run()
    target = tmp_path / "out.safetensors"
    notes = read_metadata(target)
    assert notes["base"] == "models/new.safetensors"
    assert notes["step"] == "7"
    assert "file" not in notes
    origin = json.loads(notes["origin"])
    assert origin["rule"] == "offset"
    for part, name in (("control", "control"), ("from", "old"), ("to", "new")):
        expected = hashlib.sha256(files[name].read_bytes()).hexdigest()
        assert origin[part] == {"file": f"{name}.safetensors", "sha256": expected}
    assert str(tmp_path) not in json.dumps(notes)
    found = create_model(model_config_of(target), target).state_dict()
    assert all(torch.equal(found[key], value) for key, value in {**other, **moved}.items())


def test_a_whole_model_is_the_base_with_the_moved_branch(
    run: Callable[..., State], tmp_path: Path, state: State, other: State
) -> None:
    branch, whole = run(), run("--whole")
    assert set(whole) - {"cond_stage_model.transformer.text_model.embeddings.position_ids"} == set(state)
    assert all(torch.equal(whole[key], value) for key, value in {**other, **branch}.items())
    assert not whole["logvar"].any()  # derived, and never moved
    assert "base" not in read_metadata(tmp_path / "out.safetensors")
    create_model(model_config_of(tmp_path / "out.safetensors"), tmp_path / "out.safetensors")


# -- the style swap ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_swapped_branch_gives_its_residuals_and_steers_the_other_unet(
    files: Files, run: Callable[..., State], tmp_path: Path, tiny_model: ControlLDM, other: State
) -> None:
    files["old"].unlink()  # a swap does not need it
    found = run("--swap")
    before = tiny_model.control_model.state_dict()
    assert all(torch.equal(found[CONTROL + key], value) for key, value in before.items())
    assert json.loads(read_metadata(tmp_path / "out.safetensors")["origin"])["rule"] == "swap"
    swapped = create_model(model_config_of(tmp_path / "out.safetensors"), tmp_path / "out.safetensors").eval()
    g = torch.Generator().manual_seed(0)
    x, t, text = (
        torch.randn(2, 4, 8, 16, generator=g),
        torch.tensor([5, 905]),
        torch.randn(2, 77, 32, generator=g),
    )
    hint = torch.rand(2, 3, 64, 128, generator=g)
    for ours, theirs in zip(
        swapped.control_residuals(x, t, text, hint),
        tiny_model.control_residuals(x, t, text, hint),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    own = generate(tiny_model, hint, ["a", "b"], [1, 2], SampleConfig(steps=2))
    tiny_model.load_state_dict(other, strict=False)  # the other base under the same branch, by hand
    expected = generate(tiny_model, hint, ["a", "b"], [1, 2], SampleConfig(steps=2))
    assert torch.equal(generate(swapped, hint, ["a", "b"], [1, 2], SampleConfig(steps=2)), expected)
    assert not torch.equal(expected, own)


# -- a decoder that was trained with its branch -----------------------------------------------------------


@pytest.fixture
def unlocked(state: State) -> State:
    """Branch and decoder of a run with --no-sd_locked."""
    g = torch.Generator().manual_seed(8)
    return {
        key: value + 0.1 * torch.randn(value.shape, generator=g) if key.startswith(DECODER) else value
        for key, value in state.items()
        if key.startswith((CONTROL, *DECODER))
    }


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_trained_decoder_is_moved_by_the_same_rule(
    files: Files,
    run: Callable[..., State],
    state: State,
    other: State,
    unlocked: State,
    tiny_yaml: Path,
    is_whole: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_control(files, {**state, **unlocked} if is_whole else unlocked, tiny_yaml, record=not is_whole)
    found = run(*(["--from", str(files["old"])] if is_whole else []))
    assert set(found) == set(unlocked)
    for key, value in moved_by_a_loop(unlocked, state, other).items():
        torch.testing.assert_close(found[key], value.float(), rtol=0, atol=2e-7 * float(value.abs().max()))
    assert "the decoder that was trained with the branch went along" in capsys.readouterr().out


def test_of_a_whole_model_that_was_trained_locked_the_branch_alone_is_moved(
    files: Files, run: Callable[..., State], state: State, tiny_yaml: Path
) -> None:
    half = {key: value.half() if key not in SCHEDULE_KEYS else value for key, value in state.items()}
    write_control(files, half, tiny_yaml, record=False)  # its decoder differs by the rounding alone
    found = run("--from", str(files["old"]))
    assert set(found) == {key for key in state if key.startswith(CONTROL)}


# -- what is refused --------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What can be made wrong."""

    files: Files
    branch: State
    state: State
    other: State
    unlocked: State
    yaml: Path

    def control(self, tensors: State, *, record: bool = False) -> None:
        write_control(self.files, tensors, self.yaml, record=record)

    def base(self, tensors: State, notes: dict[str, str] | None = None) -> None:
        write_tensors(self.files["new"], tensors, notes)

    def without(self, tensors: State, prefix: str) -> State:
        return {key: value for key, value in tensors.items() if not key.startswith(prefix)}


MIDDLE = f"{UNET}middle_block.0.in_layers.2.weight"
WRONG: dict[str, tuple[Callable[[Case], object], str, str]] = {  # what is done, the options, what is said
    "no record": (
        lambda case: case.control(case.branch),
        "",
        "control.safetensors has no record of the base that it was trained on; name it with --from FILE",
    ),
    "recorded base gone": (
        lambda case: case.files["old"].unlink(),
        "",
        "control.safetensors was trained on old.safetensors, found neither there",
    ),
    "whole": (
        lambda case: case.control(case.state),
        "",
        "control.safetensors is a whole model, whose decoder may have been trained",
    ),
    "another old base": (
        lambda case: case.control(case.state),
        "--from {new}",
        "the frozen model.diffusion_model.time_embed.0.weight differs",
    ),
    "swap of a decoder": (
        lambda case: case.control(case.unlocked, record=True),
        "--swap",
        "leave --swap out",
    ),
    "no branch": (
        lambda case: case.control(case.without(case.state, CONTROL)),
        "",
        "has no control branch",
    ),
    "no UNet": (lambda case: case.base(case.branch), "", "new.safetensors has no UNet"),
    "sizes": (
        lambda case: case.base({**case.other, MIDDLE: torch.zeros(5, 5)}),
        "",
        "middle_block.0.in_layers.2.weight is (5, 5); name a base of the same sizes",
    ),
    "part of a branch": (
        lambda case: case.control(case.without(case.branch, f"{CONTROL}zero_convs.3.0.bias"), record=True),
        "",
        "missing, first control_model.zero_convs.3.0.bias",
    ),
    "part of a base": (
        lambda case: case.base(case.without(case.other, "first_stage_model.decoder")),
        "",
        "missing, first first_stage_model.decoder",
    ),
    "prediction": (
        lambda case: case.base(
            case.other, {"model_config": case.yaml.read_text().replace("zation: eps", "zation: v")}
        ),
        "",
        "was trained to predict eps and",
    ),
    "schedule": (
        lambda case: case.base({**case.other, "alphas_cumprod": case.other["alphas_cumprod"] ** 2}),
        "",
        "holds a noise schedule that ends at",
    ),
    "overflow": (
        lambda case: case.base({**case.other, MIDDLE: case.other[MIDDLE] + 1e6}),
        "--dtype fp16",
        "is not finite in float16",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_files_that_do_not_belong_together_are_refused_in_a_sentence(
    wrong: str,
    files: Files,
    run: Callable[..., State],
    state: State,
    other: State,
    unlocked: State,
    tiny_yaml: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    branch = {key: value for key, value in state.items() if key.startswith(CONTROL)}
    spoil, options, said = WRONG[wrong]
    spoil(Case(files, branch, state, other, unlocked, tiny_yaml))
    with pytest.raises(SystemExit) as stop:
        run(*options.format(**files).split())
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gone.pth", "out", "--to", "here"], "gone.pth does not exist"),
        (["here", "out", "--to", "gone"], "gone does not exist"),
        (["here", "here", "--to", "here"], "here exists; choose another name"),
        (["here", "nowhere/out", "--to", "here"], "the folder nowhere does not exist"),
        (["here", "out"], "--to"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").touch()
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
