"""The weights that ship: what the table says of them, what they were trained on, that they work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cldm.config import SampleConfig
from cldm.digests import fingerprint, sha256_of
from cldm.generate import generate
from cldm.model import create_model, load_model_config, model_config_of
from cldm.prior_file import check_fits, read_whole
from cldm.prior_pass import encoder_fingerprint, load_first_stage, posteriors
from cldm.tensor_files import read_metadata, read_tensors
from datasets.label_space import LabelSpace
from datasets.streets import RENDERER_VERSION, render_frame, renderer_hash
from ldm.priors.prior import NoisePrior
from ldm.priors.start import start_loss
from metrics.judge import StreetsJudge

ROW = re.compile(r"^\| `(\w*streets\w*\.safetensors)` \| .*\| `([0-9a-f]{64})` \|$", re.MULTILINE)
LIMIT = 60e6  # bytes of all of them


@pytest.fixture(scope="module")
def shipped(repo_root: Path) -> dict[str, Path]:
    """The files that the table of models/README.md names."""
    rows = ROW.findall((repo_root / "models/README.md").read_text(encoding="utf-8"))
    return {name: repo_root / "models" / name for name, _ in rows}


def test_the_table_has_the_files_and_their_hashes(shipped: dict[str, Path], repo_root: Path) -> None:
    assert set(shipped) == {
        "streets_base.safetensors",
        "control_streets.safetensors",
        "streets_judge.safetensors",
        "streets_prior.safetensors",
    }
    for name, digest in ROW.findall((repo_root / "models/README.md").read_text(encoding="utf-8")):
        assert sha256_of(shipped[name]) == digest, name


def test_together_they_stay_small_and_in_half_precision(shipped: dict[str, Path]) -> None:
    assert sum(path.stat().st_size for path in shipped.values()) < LIMIT
    for path in (path for name, path in shipped.items() if "prior" not in name):
        large = {value.dtype for value in read_tensors(path).values() if value.numel() > 1000}
        assert large == {torch.float16}, path


@pytest.mark.parametrize("name", ["streets_base.safetensors", "streets_judge.safetensors"])
def test_the_renderer_is_the_one_they_were_trained_on(shipped: dict[str, Path], name: str) -> None:
    assert read_metadata(shipped[name])["renderer"] == f"{RENDERER_VERSION} {renderer_hash()}"


def test_the_prior_is_of_the_base_and_of_training_frames(shipped: dict[str, Path]) -> None:
    card, moments = read_whole(shipped["streets_prior.safetensors"])
    config = load_model_config("models/cldm_streets.yaml")
    first_stage = load_first_stage(config, shipped["streets_base.safetensors"], device="cpu")
    space = LabelSpace.load("cityscapes")
    fits = {"scale_factor": first_stage.scale_factor, "size": (128, 256), "classes": space.names}
    check_fits(card, "the prior", first_stage=encoder_fingerprint(first_stage.autoencoder), **fits)
    assert (card.images, card.dataset, card.split) == (4000, "streets", "train")
    # A frame that nobody measured is likelier under its prior than under standard noise.
    frame = render_frame(1_000_000, (128, 256), domain="camera", condition="clear")
    labels = torch.from_numpy(space.to_train_ids(frame.label_ids, "a frame").astype(int))[None]
    batch = {"jpg": frame.image[None].astype("float32") / 127.5 - 1}
    losses = [
        start_loss(NoisePrior(moments, kind).gaussian(labels), *posteriors(first_stage, batch, 1), 0.05)
        for kind in ("spatial-class-joint", "spatial", "normal")
    ]
    assert losses == sorted(losses)


def test_the_judge_sees_a_street(shipped: dict[str, Path]) -> None:
    judge = StreetsJudge.load(shipped["streets_judge.safetensors"])
    frame = render_frame(1_000_000, (128, 256), domain="camera", condition="clear")
    truth = LabelSpace.load("cityscapes").to_train_ids(frame.label_ids, "a frame")
    known = truth != 255
    assert (judge(frame.image[None])[0] == truth)[known].mean() > 0.8


def test_the_committed_report_is_of_these_weights(shipped: dict[str, Path], repo_root: Path) -> None:
    report = repo_root / "docs/reports/streets_control"
    card = json.loads((report / "card.json").read_text(encoding="utf-8"))
    control, judge = shipped["control_streets.safetensors"], shipped["streets_judge.safetensors"]
    assert card["generation"]["checkpoint_fingerprint"] == fingerprint(control)
    assert card["measured_by"]["segmentation"]["segmenter"]["sha256"] == sha256_of(judge)
    assert card["renderer"]["renderer_hash"] == renderer_hash()
    assert (card["generated"]["count"], card["maps"]["count"], card["leaks"]["status"]) == (750, 250, "clean")
    page = (report / "index.html").read_text(encoding="utf-8")
    assert all((report / picture).is_file() for picture in re.findall(r'src="([^"]+)"', page))


def test_the_control_finds_its_base_and_samples(shipped: dict[str, Path]) -> None:
    path = shipped["control_streets.safetensors"]
    model = create_model(model_config_of(path), path).eval()
    frame = render_frame(1_000_000, (64, 128), domain="camera", condition="night")
    space = LabelSpace.load("cityscapes")
    colours = space.paint(space.to_train_ids(frame.label_ids, "a frame"))
    hint = torch.from_numpy(colours).permute(2, 0, 1)[None].float() / 255
    settings = SampleConfig(steps=4, sampler="dpm++2m", scale=3.0)
    dark, bright = (
        generate(model, hint, [f"a photo of a city street {when}"], [0], settings).numpy().mean()
        for when in ("at night", "in the snow")
    )
    assert np.isfinite(dark)
    assert dark < bright - 30  # of 255
