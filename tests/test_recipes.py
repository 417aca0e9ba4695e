"""The run files of configs/: they load, fit their data set and model, and say how they are used."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from house import ROOT
from omegaconf import DictConfig

import tool_add_control
import tutorial_train
from cldm.config import check_run, load_run_config
from datasets import DATASETS, find_entry, options_of
from datasets.hint_encoding import hint_encoding
from datasets.label_space import LabelSpace

STAGES = "streets_"  # these have schemas and scripts of their own
RUN_FILES = sorted(
    path.stem for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith(STAGES)
)
RECIPES = [name for name in RUN_FILES if name != "streets"]  # on data that are not here
PARTS = ("Needs: ", "Cost: ", "Expect: ", "Not run yet")
BASES = {
    "models/cldm_v15.yaml": "SD1.5",
    "models/cldm_v15_onehot20.yaml": "SD1.5",
    "models/cldm_v21.yaml": "SD2.1",
    "models/cldm_streets.yaml": "miniature",
}
DOCUMENT = ROOT / "docs/recipes.md"

every_run_file = pytest.mark.parametrize("name", RUN_FILES)
every_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def text_of(name: str) -> str:
    return (ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8")


def header_of(text: str) -> str:
    """Return the comment that a file opens with, without its signs."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#"))
    return "\n".join(lines)


def commands_in(header: str) -> dict[str, list[str]]:
    """Return script -> its words, for each `python SCRIPT.py WORDS` line of a header."""
    lines = re.sub(r" \\\n +", " ", header).splitlines()
    found = [shlex.split(line) for line in lines if line.startswith("   python ")]
    return {words[1]: words[2:] for words in found}


def load(name: str) -> DictConfig:
    return load_run_config(name if name in DATASETS else None, f"configs/{name}.yaml", [])


@every_run_file
def test_a_run_file_is_a_run(name: str) -> None:
    config = load(name)
    check_run(config)
    written = yaml.safe_load(text_of(name))
    for section, values in written.items():
        for key, value in values.items():
            assert config[section][key] == value, f"{section}.{key}"


@every_run_file
def test_its_command_is_read_by_the_script_and_leads_to_it(name: str) -> None:
    words = commands_in(header_of(text_of(name)))["tutorial_train.py"]
    assert words[:2] in (["--dataset", name], ["--config", f"configs/{name}.yaml"])
    found = tutorial_train.resolve(tutorial_train.parse_args(words))
    expected = load(name)
    expected.model.checkpoint = str(tutorial_train.find_weights(expected.model.checkpoint))
    for override in words[2:]:
        section, key = override.partition("=")[0].split(".")
        assert found[section][key] != expected[section][key]
        expected[section][key] = found[section][key]
    assert found == expected


@every_recipe
def test_it_names_its_data_set_and_options_that_the_data_set_has(name: str) -> None:
    config = load(name)
    assert yaml.safe_load(text_of(name))["data"]["name"] == config.data.name  # not the schema's by chance
    entry = find_entry(config.data.name)
    known = options_of(entry.load())
    assert [key for key in tutorial_train.dataset_options(config) if key not in known] == []
    if config.data.root is not None:
        assert config.data.root == entry.default_root


@every_run_file
def test_its_hints_have_the_channels_of_its_model_file(name: str) -> None:
    config = load(name)
    model = yaml.safe_load(Path(config.model.config).read_text(encoding="utf-8"))["model"]
    expected = model["params"]["control_stage_config"]["params"]["hint_channels"]
    assert hint_channels(config) == expected


def hint_channels(config: DictConfig) -> int:
    """Return the channels of a run's hints; without label maps a hint is a picture."""
    space = find_entry(config.data.name).label_space
    if space is None:
        assert config.data.hint == "colours", "an encoding is of label maps"
        return 3
    return hint_encoding(LabelSpace.load(space), config.data.hint).channels


def samples_of(train: DictConfig) -> int:
    return train.batch_size * train.accumulate * train.max_steps


@every_recipe
def test_its_header_says_what_it_needs_costs_and_gives(name: str) -> None:
    header = header_of(text_of(name))
    assert [part for part in PARTS if f"\n {part}" not in header] == []
    train = load(name).train
    passes = re.search(r"Cost: ([\d,]+) images, [^.]* that is (\d+(?:\.\d)?) passes", header)
    if passes:
        images = int(passes[1].replace(",", ""))
        assert float(passes[2]) == pytest.approx(samples_of(train) / images, rel=0.03)
    batch = f"{train.batch_size}" + (f" x {train.accumulate}" if train.accumulate > 1 else "")
    assert f"batch {batch}, {train.max_steps:,} optimizer steps" in " ".join(header.split())


@every_recipe
def test_adding_control_writes_what_training_starts_from(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, config = header_of(text_of(name)), load(name)
    words = commands_in(header).get("tool_add_control.py")
    if words is None:
        assert config.model.checkpoint.endswith(".pth"), "published weights with a branch of their own"
        assert Path(config.model.checkpoint).name in header
        return
    for word in words:
        if word.startswith("models/") and word != config.model.checkpoint:
            (tmp_path / word).parent.mkdir(exist_ok=True)
            (tmp_path / word).touch()
            assert (
                word.endswith(".yaml") or Path(word).name.partition(".safe")[0] in header.split("Needs:")[1]
            )
    monkeypatch.chdir(tmp_path)
    args = tool_add_control.parse_args(words)
    assert str(args.target) == config.model.checkpoint
    assert args.config is None or str(args.config) == config.model.config


def test_one_hot_model_differs_from_its_sibling_in_the_channels_alone() -> None:
    one_hot, plain = (
        yaml.safe_load(Path(f"models/cldm_v15{kind}.yaml").read_text(encoding="utf-8"))
        for kind in ("_onehot20", "")
    )
    params: dict[str, Any] = one_hot["model"]["params"]["control_stage_config"]["params"]
    assert params["hint_channels"] == 20
    params["hint_channels"] = 3
    assert one_hot == plain


def rows_of(text: str) -> dict[str, list[str]]:
    """Return run file -> the cells behind it, for each row of a table that begins with one."""
    rows = re.findall(r"^\| `configs/(\w+)\.yaml` \|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_the_document_lists_all_recipes_with_their_numbers() -> None:
    rows = rows_of(DOCUMENT.read_text(encoding="utf-8"))
    assert sorted(rows) == RECIPES
    for name, (data, base, size, images, batch, steps, trained, _) in rows.items():
        config = load(name)
        assert data == config.data.name
        assert f"{images} images, batch" in header_of(text_of(name)).replace("your images", "yours images")
        assert base == BASES[config.model.config]
        assert size == ("x".join(map(str, config.data.size)) if config.data.size else "512x512")
        accumulated = f" x {config.train.accumulate}" if config.train.accumulate > 1 else ""
        assert batch == f"{config.train.batch_size}{accumulated}"
        assert steps == f"{config.train.max_steps:,}"
        assert trained == ("branch" if config.train.sd_locked else "branch and decoder")
