"""Other hint channels: the same output from one-hot maps as from painted ones, and channels by number."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from oracles import relative_error
from PIL import Image
from small_runs import IDS, write_streets_run
from torch import Tensor
from torch.nn import functional as F

import generate as generate_script
import tool_convert_hint as script
import tutorial_train
from cldm.cldm import ControlLDM, build_hint_block
from cldm.config import SampleConfig
from cldm.generate import generate
from cldm.hint_channels import FIRST, compose
from cldm.model import create_model, model_config_of
from cldm.recorded_run import read_recorded_run
from cldm.tensor_files import read_metadata, read_shapes, read_tensors
from cldm.tensor_writing import write_tensors
from cldm.weights import base_notes
from datasets.hint_encoding import ENCODINGS, hint_encoding, seen_as_one_hot
from datasets.label_space import SPACES, LabelSpace

ROOT = Path(__file__).parents[1]
CONTROL = "control_model."
CITYSCAPES = LabelSpace.load("cityscapes")
PALETTES = [
    (space, name)
    for space in SPACES
    for name, (only, _) in ENCODINGS.items()
    if only in (None, space) and name not in ("onehot", "label_colours")
]


def random_ids(space: LabelSpace, seed: int = 0) -> np.ndarray:
    """(64, 128) file ids in blocks, void among them, up to the border."""
    rng = np.random.default_rng(seed)
    known = np.array([*space.file_ids, space.void_file_id]) % 256
    return rng.choice(known, (16, 32)).astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1)


def hint(ids: np.ndarray, space: LabelSpace, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(hint_encoding(space, name).encode(ids)).permute(2, 0, 1)[None].to(dtype)


# -- the rule ---------------------------------------------------------------------------------------------


def test_the_composed_convolution_is_that_of_a_plain_loop() -> None:
    g = torch.Generator().manual_seed(0)
    weight, colours = torch.randn(4, 3, 3, 3, generator=g), torch.rand(5, 3, generator=g)
    found = compose(weight, colours)
    for m in range(4):
        for n in range(5):
            expected = sum(weight[m, c].double() * colours[n, c].double() for c in range(3))
            torch.testing.assert_close(found[m, n], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("space", "name"), PALETTES)
def test_a_one_hot_map_gives_what_its_painted_one_gave_up_to_the_border(space: str, name: str) -> None:
    labels = LabelSpace.load(space)
    encoding = hint_encoding(labels, name)
    block = build_hint_block(encoding.channels, 8).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(block)
    colours = torch.from_numpy(seen_as_one_hot(encoding))
    other[0].weight.data = compose(block[0].weight.data, colours)
    ids = random_ids(labels)
    painted, one_hot = (hint(ids, labels, kind, torch.float64) for kind in (name, "onehot"))
    assert one_hot.shape[1] == labels.num_classes + 1
    assert block(painted).std() > 1e-3
    assert (block(painted) - other(one_hot)).abs().max() < 1e-12
    painted, one_hot = painted.float(), one_hot.float()
    assert relative_error(other.float()[0](one_hot), block.float()[0](painted)) < 1e-6
    assert relative_error(other(one_hot), block(painted)) < 3e-6  # after seven more convolutions


def test_void_of_several_colours_needs_one_to_stand_for_all() -> None:
    encoding = hint_encoding(CITYSCAPES, "label_colours")
    with pytest.raises(ValueError, match=r"shows the void classes of cityscapes in .* --void unlabeled"):
        seen_as_one_hot(encoding)
    ground = CITYSCAPES.row_colours[CITYSCAPES.row_names.index("ground")]
    rows = seen_as_one_hot(encoding, "ground")
    np.testing.assert_allclose(rows[-1] * 255, ground, rtol=0, atol=1e-4)
    np.testing.assert_allclose(rows[:-1] * 255, CITYSCAPES.colours, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"expected a void class of cityscapes: .*found 'road'"):
        seen_as_one_hot(encoding, "road")
    with pytest.raises(ValueError, match="one-hot already"):
        seen_as_one_hot(hint_encoding(CITYSCAPES, "onehot"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["2", "0"], [2, 0]),
        (["0-3", "new:2", "3"], [0, 1, 2, 3, None, None, 3]),
        (["new", "1"], [None, 1]),
    ],
)
def test_channels_are_listed_by_old_ones(words: list[str], expected: list[int | None]) -> None:
    matrix = script.read_channels(words, 4)
    assert matrix.tolist() == [[float(i == old) for i in range(4)] for old in expected]
    weight = torch.randn(6, 4, 3, 3)
    made = compose(weight, torch.from_numpy(matrix))
    for new, old in enumerate(expected):
        assert torch.equal(made[:, new], torch.zeros(6, 3, 3) if old is None else weight[:, old].double())


@pytest.mark.parametrize("word", ["4", "3-1", "2-4", "old", "-1", "new:x", "1.0"])
def test_a_channel_that_there_is_not_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"expected (a channel|channels)"):
        script.read_channels([word], 4)


# -- the tool ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_model_once: ControlLDM, tiny_yaml: Path) -> Path:
    """A control branch in half precision beside its base, in a folder; it shows its hints."""
    model = copy.deepcopy(tiny_model_once)
    for name, parameter in model.control_model.input_hint_block.named_parameters():
        parameter.data.mul_(2.5 if name.endswith("weight") else 0)
    state = model.state_dict()
    folder = tmp_path_factory.mktemp("models")
    base = folder / "base.safetensors"
    write_tensors(base, {k: v for k, v in state.items() if not k.startswith(CONTROL)})
    notes = {"model_config": tiny_yaml.read_text(), "step": "7", **base_notes(base, folder)}
    notes["run_config"] = "data: {name: streets, hint: colours, size: [64, 128], prompt: a road}\n"
    branch = {k: v.half() for k, v in state.items() if k.startswith(CONTROL)}
    write_tensors(folder / "control.safetensors", branch, notes)
    return folder


@pytest.fixture
def control(written: Path, tmp_path: Path) -> Path:
    """The same in a folder of the test's own."""
    (tmp_path / "models").mkdir()
    for path in written.iterdir():
        (tmp_path / "models" / path.name).hardlink_to(path)
    return tmp_path / "models/control.safetensors"


def convert(control: Path, name: str, *options: str) -> Path:
    target = control.parents[1] / "out" / f"{name}.safetensors"
    target.parent.mkdir(exist_ok=True)
    script.main([str(control), str(target), *options])
    return target


def test_one_tensor_changes_and_the_record_with_it(
    control: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = convert(control, "onehot")
    before, after = read_tensors(control), read_tensors(target)
    assert [key for key in before if key != FIRST and not torch.equal(before[key], after[key])] == []
    assert list(before) == list(after)
    assert (after[FIRST].shape[1], after[FIRST].dtype) == (20, torch.float32)
    notes = read_metadata(target)
    run = read_recorded_run(target)
    assert (run.hint, run.dataset, run.size, run.prompt) == ("onehot", "streets", (64, 128), "a road")
    assert notes["step"] == "7"
    assert notes["base"] == "../models/base.safetensors"
    origin = json.loads(notes["origin"])
    assert origin["rule"] == "colours of cityscapes to onehot"
    assert origin["control"]["sha256"] == hashlib.sha256(control.read_bytes()).hexdigest()
    written = yaml.safe_load(target.with_suffix(".yaml").read_text())
    assert written == yaml.safe_load(notes["model_config"])
    assert written["model"]["params"]["control_stage_config"]["params"]["hint_channels"] == 20
    assert "hints of 20 channels instead of 3" in capsys.readouterr().out


@torch.no_grad()
def test_the_sampled_image_is_the_same(control: Path) -> None:
    target = convert(control, "onehot")
    ids = random_ids(CITYSCAPES, seed=3)
    images = [
        generate(
            create_model(model_config_of(path), path).eval(),
            hint(ids, CITYSCAPES, name),
            ["a road", "a house"],
            [1, 2],
            SampleConfig(steps=3, scale=3.0),
        ).int()
        for path, name in ((control, "colours"), (target, "onehot"))
    ]
    assert (images[0] - images[1]).abs().max() <= 1
    bare = generate(
        create_model(model_config_of(control), control).eval(),
        torch.zeros(1, 3, 64, 128),
        ["a road", "a house"],
        [1, 2],
        SampleConfig(steps=3, scale=3.0),
    )
    assert (images[0] - bare.int()).abs().max() > 10, "a hint that does nothing would agree with anything"


@pytest.mark.slow
def test_generate_finds_model_and_encoding_in_the_file_and_training_goes_on(
    control: Path, tmp_path: Path, tiny_yaml: Path, tiny_model_once: ControlLDM
) -> None:
    target = convert(control, "onehot")
    ids = IDS[np.random.default_rng(0).integers(0, 4, (4, 8))].repeat(16, axis=0).repeat(16, axis=1)
    Image.fromarray(ids).save(tmp_path / "map_labelIds.png")
    for path in (control, target):
        words = ["--ckpt", str(path), "--hint", str(tmp_path / "map_labelIds.png"), "--steps", "2"]
        generate_script.main([*words, "--out", str(tmp_path / path.stem), "--device", "cpu"])
    made = [
        np.asarray(Image.open(tmp_path / path.stem / "map_labelIds_seed0.png")) for path in (control, target)
    ]
    assert np.abs(made[0].astype(int) - made[1]).max() <= 1
    recipe = write_streets_run(tmp_path, tiny_yaml, tiny_model_once, max_steps=2)
    words = [
        "--config",
        str(recipe),
        "--resume_path",
        str(target),
        f"model.config={target.with_suffix('.yaml')}",
    ]
    tutorial_train.main([*words, "data.hint=onehot", "--default_root_dir", str(tmp_path / "run")])
    (trained,) = (tmp_path / "run").rglob("step=000002.safetensors")
    assert read_shapes(trained)[FIRST][1] == 20
    assert read_recorded_run(trained).hint == "onehot"


@torch.no_grad()
def test_the_shipped_control_gives_the_same_features(tmp_path: Path) -> None:
    shipped = ROOT / "models/control_streets.safetensors"
    target = tmp_path / "streets_onehot.safetensors"
    script.main([str(shipped), str(target)])
    ids = random_ids(CITYSCAPES, seed=5)
    features = []
    for path, name in ((shipped, "colours"), (target, "onehot")):
        state = read_tensors(path)
        h = hint(ids, CITYSCAPES, name)
        for i in range(0, 16, 2):  # the block written out
            weight, bias = (
                state[f"{CONTROL}input_hint_block.{i}.{part}"].float() for part in ("weight", "bias")
            )
            h = F.conv2d(h, weight, bias, stride=2 if i in (4, 8, 12) else 1, padding=1)
            h = F.silu(h) if i < 14 else h
        features.append(h)
    assert features[0].std() > 0.01
    assert (features[0] - features[1]).abs().max() < 1e-5 * features[0].abs().max()
    assert read_recorded_run(target).hint == "onehot"


def test_a_file_of_others_needs_its_palette_and_gets_a_record(
    tmp_path: Path, control: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "models/control.pth"
    torch.save({key.removeprefix(CONTROL): value for key, value in read_tensors(control).items()}, bare)
    with pytest.raises(SystemExit):
        convert(bare, "none")
    assert (
        "has no record of the label space that it was trained on; name it with --palette"
        in capsys.readouterr().err
    )
    run = read_recorded_run(convert(bare, "ade", "--palette", "ade20k"))
    assert (run.hint, run.label_space) == ("onehot", "ade20k")


def test_channels_are_taken_added_and_left_out(control: Path) -> None:
    onehot = convert(control, "onehot")
    wider = convert(onehot, "wider", "--channels", "0-18", "new:3", "19")
    old, new = read_tensors(onehot)[FIRST], read_tensors(wider)[FIRST]
    assert new.shape[1] == 23
    assert torch.equal(new[:, :19], old[:, :19])
    assert torch.equal(new[:, 22], old[:, 19])
    assert not new[:, 19:22].any()
    assert read_recorded_run(wider).hint is None
    back = convert(wider, "back", "--channels", "0-18", "22")
    assert torch.equal(read_tensors(back)[FIRST], old)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--from", "scp_diff_grid"], "unknown hint encoding 'scp_diff_grid' of cityscapes"),
        (["--from", "onehot"], "one-hot already"),
        (["--from", "label_colours"], "--void unlabeled"),
        (["--from", "label_colours", "--void", "road"], "expected a void class of cityscapes"),
        (["--channels", "3"], "expected channels of 0..2"),
        (["--channels", "0", "--palette", "ade20k"], "leave one out"),
        (["--palette", "mars"], "invalid choice"),
    ],
)
def test_what_cannot_be_converted_is_said_in_a_sentence(
    control: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        convert(control, "none", *options)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not list((control.parents[1] / "out").iterdir())


def test_another_encoding_than_the_branch_takes_is_refused(
    control: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onehot = convert(control, "onehot")
    with pytest.raises(SystemExit):
        convert(onehot, "none", "--from", "colours")
    assert (
        "expected a branch for hints of 3 channels, as the encoding has, found one for 20"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        convert(tmp_path / "models/base.safetensors", "none")
    assert "has no control branch" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert(control, "onehot")
    assert "exists; choose another name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["out.yaml"], "has to end in .safetensors"),
        (["out.safetensors", "--channels", "new:1000000000000"], "expected 1 to 1000 channels, found more"),
        (["out.safetensors", "--channels", "new:0"], "expected 1 to 1000 channels, found none"),
    ],
)
def test_a_target_and_a_number_that_cannot_be_are_refused(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control = ROOT / "models/control_streets.safetensors"
    with pytest.raises(SystemExit) as caught:
        script.main([str(control), str(tmp_path / words[0]), *words[1:]])
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
