"""Fixtures that every test file may use: where the repository is, real samples, and no network hub."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

import cldm.cli

if TYPE_CHECKING:
    from cldm.cldm import ControlLDM

ROOT = Path(__file__).resolve().parent.parent

# Read by huggingface_hub when it is first imported, so they are set before any test module is.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def pytest_configure(config: pytest.Config) -> None:
    """Forbid the hub: what a test needs is built or generated on the spot."""
    os.environ.update(OFFLINE)
    # The tiny models gain nothing from a second thread, and lose ten times over where cores are shared.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # It lasts as long as the process, and tests that measure memory share this one with those of the scripts.
    cldm.cli.keep_freed_memory = lambda: None
    if sys.argv[0] == "-c":  # in the processes of xdist; our sentences begin with the program
        sys.argv[0] = "pytest.py"
    # What runs in the background is born deaf to Ctrl-C; tests send it to themselves.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Time is the machine's affair; and a red CI run is to be the fault of the change, not of new examples.
    hypothesis.settings.register_profile("here", deadline=None, derandomize=bool(os.environ.get("CI")))
    hypothesis.settings.load_profile("here")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Return the folder that holds the scripts."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real samples (`cityscapes/`, `coco-stuff/`, ...); the repository has none."""
    path = Path(os.environ.get("SCENECONTROL_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real samples in {path}; set SCENECONTROL_REAL_DATA to a folder that has some")
    return path


# -- a model of every part in its smallest size; what needs torch is imported on use ----------------------

TINY_UNET = {
    "in_channels": 4,
    "model_channels": 16,
    "channel_mult": [1, 2, 2, 2],
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2, 1],
    "context_dim": 32,
    "norm_groups": 8,
}
TINY_STYLES: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {
        "unet": {"num_heads": 4},
        "text": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    },
    "sd2": {
        "unet": {"num_head_channels": 8, "use_linear_in_transformer": True},
        "text": {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"},
    },
}


def write_tiny_config(folder: Path, style: str) -> Path:
    """Write models/cldm_streets.yaml, shrunk, in the manner of SD1.5 or SD2.1."""
    from omegaconf import OmegaConf

    config = OmegaConf.load(ROOT / "models/cldm_streets.yaml")
    params = config.model.params
    unet = {**TINY_UNET, **TINY_STYLES[style]["unet"]}
    params.unet_config.params = {**unet, "out_channels": 4}
    params.control_stage_config.params = {**unet, "hint_channels": 3}
    params.first_stage_config.params.ddconfig.update({"ch": 16, "ch_mult": [1, 2, 2, 2]})
    text = {"width": 32, "num_layers": 2, "num_heads": 4}
    params.cond_stage_config = {**TINY_STYLES[style]["text"], "params": text}
    path = folder / f"tiny_{style}.yaml"
    OmegaConf.save(config, path)
    return path


@pytest.fixture(scope="session")
def tiny_yamls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return model files of a tiny ControlLDM: "sd1" and "sd2", which differ as SD1.5 and SD2.1 do."""
    folder = tmp_path_factory.mktemp("tiny")
    return {style: write_tiny_config(folder, style) for style in TINY_STYLES}


@pytest.fixture(scope="session")
def tiny_yaml(tiny_yamls: dict[str, Path]) -> Path:
    """Return the model file of a tiny ControlLDM with 13 control outputs, in the manner of SD1.5."""
    return tiny_yamls["sd1"]


@pytest.fixture(scope="session")
def tiny_model_once(tiny_yaml: Path) -> ControlLDM:
    """Build the model that `tiny_model` copies, which is faster than building it for every test."""
    from oracles import randomize

    from cldm.model import create_model

    return randomize(create_model(tiny_yaml)).eval()


@pytest.fixture
def tiny_model(tiny_model_once: ControlLDM) -> ControlLDM:
    """Return a model of `tiny_yaml` with every weight random, the zero ones too, in evaluation mode."""
    return copy.deepcopy(tiny_model_once)


@pytest.fixture(scope="module")
def model(tiny_model_once: ControlLDM) -> ControlLDM:
    """The tiny model, made sensitive to its hint: one after another its SiLUs shrink what varies."""
    model = copy.deepcopy(tiny_model_once)
    for name, parameter in model.control_model.input_hint_block.named_parameters():
        parameter.data.mul_(2.5 if name.endswith("weight") else 0)
    return model


@pytest.fixture
def tiny_batch() -> dict[str, Any]:
    """Return two collated samples of 64 x 128: not square, so that axes cannot be mixed up."""
    import torch

    g = torch.Generator().manual_seed(3)
    return {
        "jpg": torch.rand(2, 64, 128, 3, generator=g) * 2 - 1,
        "hint": torch.rand(2, 64, 128, 3, generator=g),
        "txt": ["a road in the rain", "a house"],
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, where there is one."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on the PATH; on Debian: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
