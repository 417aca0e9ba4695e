"""The configuration of a run: what wins over what, and what a mistake is answered with."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from omegaconf import OmegaConf

import tutorial_train
from cldm.config import RunConfig, SampleConfig, load_run_config

SCRIPT_FLAGS = [
    # flag, its words on the command line, key, value in the resolved run
    ("batch_size", ["--batch_size", "7"], "train.batch_size", 7),
    ("default_root_dir", ["--default_root_dir", "else: #3"], "train.default_root_dir", "else: #3"),
    ("gpus", ["--gpus", "0", "1"], "train.gpus", [0, 1]),
    ("logger_freq", ["--logger_freq", "17"], "train.logger_freq", 17),
    ("max_steps", ["--max_steps", "23"], "train.max_steps", 23),
    ("resume", ["--resume", "last"], "train.resume", "last"),
    ("resume_path", ["--resume_path", "else.pth"], "model.checkpoint", "else.pth"),
    ("dry_run", ["--dry_run"], "train.dry_run", True),
    ("sd_locked", ["--no-sd_locked"], "train.sd_locked", False),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder that has only a run file of each data set."""
    write(tmp_path / "configs/cityscapes.yaml", {"train": {"lr": 2.0e-6, "batch_size": 3}})
    write(tmp_path / "configs/fill50k.yaml", {"train": {"lr": 7.0e-6}})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def resolve(*words: str) -> Any:
    return tutorial_train.resolve(tutorial_train.parse_args(words))


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the sentence with which the script refuses; it must exit with 2 and print nothing else."""
    with pytest.raises(SystemExit) as exit_info:
        tutorial_train.main(words)
    out, err = capsys.readouterr()
    assert exit_info.value.code == 2
    assert out == ""
    assert "Traceback" not in err
    return err


# -- what wins over what ----------------------------------------------------------------------------------


def test_schema_then_run_file_then_flag_then_override(here: Path) -> None:
    assert RunConfig().train.batch_size == 4  # the four layers differ, so that each can be seen to win
    assert resolve("--dataset", "fill50k").train.batch_size == 4
    assert resolve().train.batch_size == 3
    assert resolve("--batch_size", "5").train.batch_size == 5
    assert resolve("--batch_size", "5", "train.batch_size=6").train.batch_size == 6
    assert resolve("train.batch_size=6", "--batch_size", "5").train.batch_size == 6
    assert resolve("train.batch_size=6", "train.batch_size=8").train.batch_size == 8


def test_each_data_set_has_its_own_run_file_and_its_own_name(here: Path) -> None:
    assert resolve("--dataset", "fill50k").data.name == "fill50k"
    assert resolve("--dataset", "fill50k").train.lr == 7.0e-6
    assert resolve().data.name == "cityscapes"
    assert resolve().train.lr == 2.0e-6


def test_a_run_file_may_name_its_data_set(here: Path) -> None:
    write(here / "mine.yaml", {"data": {"name": "fill50k"}})
    assert resolve("--config", "mine.yaml").data.name == "fill50k"
    assert resolve("--config", "mine.yaml", "--dataset", "cityscapes").data.name == "cityscapes"


def test_the_other_keys_stay_what_the_schema_says(here: Path) -> None:
    expected = asdict(RunConfig())
    expected["train"] |= {"lr": 2.0e-6, "batch_size": 3}
    assert OmegaConf.to_container(resolve()) == expected


@pytest.mark.parametrize(("flag", "words", "key", "value"), SCRIPT_FLAGS, ids=lambda x: str(x))
def test_every_flag_sets_its_key_and_no_other(
    here: Path, flag: str, words: list[str], key: str, value: Any
) -> None:
    without, given = resolve(), resolve(*words)
    section, _, name = key.partition(".")
    assert without[section][name] != value
    assert given[section][name] == value
    given[section][name] = without[section][name]
    assert given == without


def test_no_flag_is_left_out_of_the_table_above() -> None:
    assert {flag: key for flag, _, key, _ in SCRIPT_FLAGS} == tutorial_train.FLAGS


@pytest.mark.parametrize("locked", [True, False])
def test_sd_locked_is_the_run_files_unless_a_flag_says_otherwise(here: Path, locked: bool) -> None:
    write(here / "configs/cityscapes.yaml", {"train": {"sd_locked": locked}})
    assert resolve().train.sd_locked is locked
    assert resolve("--sd_locked").train.sd_locked is True
    assert resolve("--no-sd_locked").train.sd_locked is False


def test_a_model_file_and_a_run_file_are_told_apart_by_content(here: Path) -> None:
    model_file = write(here / "run.yaml", {"model": {"target": "cldm.cldm.ControlLDM", "params": {}}})
    run_file = write(here / "cldm_v15.yaml", {"model": {"config": "other.yaml"}, "train": {"lr": 1.0e-3}})
    with_model, with_run = resolve("--config", str(model_file)), resolve("--config", str(run_file))
    assert (with_model.model.config, with_model.train.lr) == (str(model_file), 2.0e-6)
    assert (with_run.model.config, with_run.train.lr) == ("other.yaml", 1.0e-3)
    assert with_run.train.batch_size == 4, "the run file stands for configs/cityscapes.yaml, not over it"


@pytest.mark.parametrize(("asked", "there"), [("w.safetensors", "w.ckpt"), ("w.ckpt", "w.safetensors")])
def test_weights_are_found_under_the_other_ending(here: Path, asked: str, there: str) -> None:
    assert resolve("--resume_path", asked).model.checkpoint == asked
    (here / there).touch()
    assert resolve("--resume_path", asked).model.checkpoint == there
    (here / asked).touch()
    assert resolve("--resume_path", asked).model.checkpoint == asked, "what was asked for wins"


def test_random_is_no_file_name(here: Path) -> None:
    (here / "random.safetensors").touch()
    assert resolve("--resume_path", "random").model.checkpoint == "random"


def test_print_config_prints_what_loads_back_to_the_same(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data.size=[64,128]", "data.prompt='a: text # here'", "train.clip=0.5", "--gpus", "1"]
    tutorial_train.main([*words, "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["data"] == {
        **asdict(RunConfig())["data"],
        "size": [64, 128],
        "prompt": "a: text # here",
    }
    (here / "again.yaml").write_text(printed, encoding="utf-8")
    assert resolve("--config", "again.yaml") == resolve(*words)


# -- what a mistake is answered with ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("train.batchsize=2", "train.batch_size"),
        ("sample.step=2", "sample.steps"),
        ("model.ckpt=x", "model."),
    ],
)
def test_an_unknown_key_is_answered_with_the_near_one(here: Path, override: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"{override}: unknown key {override.partition('=')[0]}") as error:
        resolve(override)
    assert near in str(error.value)


def test_an_unknown_key_of_a_file_names_the_file(here: Path) -> None:
    write(here / "mine.yaml", {"train": {"max_step": 5}})
    with pytest.raises(
        ValueError, match=r"mine\.yaml: unknown key train\.max_step; did you mean train\.max_steps"
    ):
        resolve("--config", "mine.yaml")


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("train.max_steps=many", "many"),
        ("train.max_steps=1.5", "1.5"),
        ("train.sd_locked=perhaps", "perhaps"),
        ("data.size=[64,wide]", "wide"),
    ],
)
def test_a_value_of_another_type_is_one_sentence(here: Path, override: str, found: str) -> None:
    with pytest.raises(ValueError, match=override.partition("=")[0].replace(".", r"\.")) as error:
        resolve(override)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_an_override_without_a_value_is_refused(here: Path) -> None:
    with pytest.raises(ValueError, match=r"expected key=value.*found 'lr'"):
        resolve("lr")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dataset", "cityscape"], "Did you mean 'cityscapes'"),
        (["data.name=citiscapes"], "Did you mean 'cityscapes'"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--config", "list.yaml"], "list.yaml"),
        (["--config", "broken.yaml"], "broken.yaml"),
        (["train.lrr=1"], "train.lr"),
        (["train.lr=[1"], "train.lr"),
    ],
)
def test_the_script_refuses_in_a_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    write(here / "list.yaml", ["model", "data"])
    (here / "broken.yaml").write_text("model: {a: [1\n", encoding="utf-8")
    assert said in refusal(capsys, *words)


def test_all_that_is_missing_is_said_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "data.root=dat", "--resume_path", "w.ckpt", "model.config=m.yaml")
    for name in ("dat", "w.ckpt", "m.yaml", "cityscapes-dataset.com", "tool_add_control.py", "random"):
        assert name in said
    (here / "dat/leftImg8bit").mkdir(parents=True)
    (here / "m.yaml").touch()
    said = refusal(capsys, "data.root=dat", "--resume_path", "w.ckpt", "model.config=m.yaml")
    assert str(Path("dat/gtFine")) in said
    assert "leftImg8bit" not in said
    assert "m.yaml" not in said


def test_the_message_comes_before_torch_is_imported(repo_root: Path, tmp_path: Path) -> None:
    code = "import sys, tutorial_train\ntry:\n    tutorial_train.main()\nfinally:\n    "
    code += "print(*sorted({'torch', 'pytorch_lightning', 'open_clip'} & set(sys.modules)), 'end')"
    words = [f"data.root={tmp_path / 'none'}", "--resume_path", "none.ckpt"]
    result = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=repo_root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "none.ckpt is missing" in result.stderr
    assert result.stdout.split() == ["end"], "these were imported before the message"


def test_every_run_file_of_ours_fits_the_schema_and_names_model_files_that_exist(
    repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo_root)
    stages = "streets_"  # they have schemas of their own
    names = [path.stem for path in Path("configs").glob("*.yaml") if not path.stem.startswith(stages)]
    assert {"cityscapes", "fill50k"} <= set(names)
    for name in names:
        config = load_run_config(None, f"configs/{name}.yaml", [])
        assert "target" in yaml.safe_load(Path(config.model.config).read_text(encoding="utf-8"))["model"]
        assert not [side for side in config.data.size or () if side % 64]
        written = yaml.safe_load(Path(f"configs/{name}.yaml").read_text(encoding="utf-8"))
        for section, values in written.items():
            for key, value in values.items():
                assert config[section][key] == value


@pytest.mark.parametrize("is_run", [False, True])
def test_generate_samples_as_given_else_as_the_run_did_else_by_default(tmp_path: Path, is_run: bool) -> None:
    from generate import fill_from_run, parse_args

    run = "data: {prompt: a road, size: [64, 128]}\nsample: {scale: 2.5, steps: 7, guess_mode: true}"
    path = tmp_path / "step.safetensors"
    notes = {"run_config": run} if is_run else None
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, notes)
    args = parse_args(["--ckpt", str(path), "--hint", __file__, "--out", "out", "--steps", "3"])
    expected = SampleConfig(steps=3, scale=2.5, guess_mode=True) if is_run else SampleConfig(steps=3)
    assert fill_from_run(args) == expected
    assert (args.prompt, args.size) == (("a road", (64, 128)) if is_run else ("{caption}", None))
    words = ["--prompt", "", "--size", "64", "64", "--scale", "1", "--no-guess_mode"]
    args = parse_args(["--ckpt", str(path), "--hint", __file__, "--out", "out", *words])
    settings = fill_from_run(args)
    assert (settings.scale, settings.guess_mode, args.prompt, args.size) == (1.0, False, "", (64, 64))
