"""Export of a control branch: its tensors, its base, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import tool_export as script
from cldm.cldm import ControlLDM
from cldm.model import create_model
from cldm.tensor_files import read_metadata, read_tensors
from cldm.tensor_writing import write_tensors
from cldm.weights import base_notes


@pytest.fixture
def trained(tmp_path: Path, tiny_model: ControlLDM, tiny_yaml: Path) -> dict[str, Path]:
    """A base, the file that training began from, and a checkpoint of that training."""
    state = tiny_model.state_dict()
    paths = {name: tmp_path / "run" / f"{name}.safetensors" for name in ("base", "ini", "checkpoint")}
    paths["base"].parent.mkdir()
    write_tensors(paths["base"], {k: v for k, v in state.items() if not k.startswith("control_model.")}, {})
    write_tensors(paths["ini"], state, {})
    control = {k: v + 0.25 for k, v in state.items() if k.startswith("control_model.")}
    yaml = OmegaConf.to_yaml(OmegaConf.load(tiny_yaml))
    notes = {"model_config": yaml, "step": "7", **base_notes(paths["ini"], beside=tmp_path / "run")}
    write_tensors(paths["checkpoint"], control, notes)
    return paths


def test_the_branch_is_written_in_half_and_loads_over_the_plain_base(
    trained: dict[str, Path], tmp_path: Path, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "models" / "control.safetensors"
    script.main([str(trained["checkpoint"]), str(target), "--base", str(trained["base"])])
    assert "in fp16" in capsys.readouterr().out
    trained["ini"].unlink()
    before, after = read_tensors(trained["checkpoint"]), read_tensors(target)
    assert {value.dtype for value in after.values()} == {torch.float16}
    assert all(torch.equal(after[key], value.half()) for key, value in before.items())
    assert after.keys() == before.keys()
    assert read_metadata(target)["step"] == "7"
    model = create_model(tiny_yaml, target)  # the base is found by the path in the file
    unet = {k: v for k, v in read_tensors(trained["base"]).items() if k.startswith("model.diffusion_model.")}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in unet.items())


def test_the_base_of_the_training_is_recorded_unless_another_is_named(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "control.safetensors"
    script.main([str(trained["checkpoint"]), str(target), "--dtype", "fp32"])
    assert read_metadata(target)["base"] == "run/ini.safetensors"
    assert {value.dtype for value in read_tensors(target).values()} == {torch.float32}


@pytest.mark.parametrize("wrong", ["another base", "a decoder", "no control", "target"])
def test_what_cannot_be_exported_is_said_in_a_sentence(
    trained: dict[str, Path], tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target, arguments = tmp_path / "control.safetensors", []
    if wrong == "another base":
        state = {key: value.clone() for key, value in read_tensors(trained["base"]).items()}
        state["model.diffusion_model.out.2.bias"] += 1
        write_tensors(tmp_path / "other.safetensors", state, {})
        arguments = ["--base", str(tmp_path / "other.safetensors")]
        said = "they differ in model.diffusion_model.out.2.bias"
    elif wrong == "a decoder":
        state = dict(read_tensors(trained["checkpoint"]))
        state["model.diffusion_model.out.2.bias"] = torch.zeros(4)
        write_tensors(trained["checkpoint"], state, read_metadata(trained["checkpoint"]))
        said = "carries a UNet decoder"
    elif wrong == "no control":
        trained["checkpoint"] = trained["base"]
        said = "control"
    else:
        target.touch()
        said = "exists; choose another name"
    with pytest.raises(SystemExit) as exit_info:
        script.main([str(trained["checkpoint"]), str(target), *arguments])
    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err
    assert wrong == "target" or not target.exists()
