"""The tables of priors, in small: what is sampled and judged and not done twice; what each kind knows."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import randomize
from PIL import Image
from prior_samples import ABAR, SIZE, random_moments, write_random_prior

import cldm.prior_sampling
import tool_judge_streets
from cldm.cldm import ControlLDM
from cldm.tensor_writing import write_tensors
from datasets.streets.dataset import StreetsDataset
from datasets.streets.tree import Plan, make_tree
from metrics.judge import JudgeArch, JudgeNetwork, write_judge

ROOT = Path(__file__).resolve().parent.parent
TINY = JudgeArch(
    hidden=(32, 32), depths=(0, 1), reductions=(4, 2), widenings=(1, 1), decoder=8, refinements=0, features=4
)


@pytest.mark.slow
def test_rows_are_sampled_once_and_judged_with_all_seeds_together(
    tiny_model_once: ControlLDM,
    tiny_yaml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    table = importlib.import_module("prior_table")
    make_tree(tmp_path / "streets", Plan("camera", size=SIZE, train=1, val=6), workers=1)
    write_tensors(tmp_path / "model.safetensors", tiny_model_once.state_dict())
    write_random_prior(tmp_path / "prior.safetensors", tiny_model_once)
    write_judge(tmp_path / "judge.safetensors", randomize(JudgeNetwork(TINY)), {})
    made: list[int] = []
    generate = cldm.prior_sampling.generate
    monkeypatch.setattr(
        cldm.prior_sampling, "generate", lambda *a, **k: made.append(len(a[3])) or generate(*a, **k)
    )
    judged: list[Any] = []
    ask = tool_judge_streets.main
    monkeypatch.setattr(tool_judge_streets, "main", lambda argv: judged.append(argv) or ask(argv))
    words = ["--ckpt", tmp_path / "model.safetensors", "--config", tiny_yaml, "--out", tmp_path / "out"]
    words += ["--prior", tmp_path / "prior.safetensors", "--root", tmp_path / "streets", "--maps", 3]
    words += ["--judge", tmp_path / "judge.safetensors", "--seeds", 1, 2, "--kinds", "normal", "class"]
    words += ["--steps", 2, "--other_steps", 3]
    table.main([str(word) for word in words])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [(row["prior"], row["start"], row["evaluations"], len(row["seeds"])) for row in record["rows"]]
    # Grids: 501, 1 and 667, 334, 1. Noise starts at 999, the prior at 799.
    assert rows == [
        *(("normal", 999, 3, 2), ("class", 799, 3, 2), ("normal", 999, 3, 2), ("normal", 799, 3, 2)),
        *(("normal", 999, 4, 1), ("class", 799, 4, 1)),
    ]
    assert [row["samples"] for row in record["rows"]] == [6, 6, 6, 6, 3, 3]
    assert all(len(row["distance_by_seed"]) == len(row["seeds"]) for row in record["rows"])
    assert all(np.isfinite(row["distance"]) and 0 <= row["miou"] <= 1 for row in record["rows"])
    assert sum(made) == 6 + 6 + 6 + 6 + 3 + 3
    assert len(judged) == 4 * 3 + 2
    assert Image.open(tmp_path / "out" / "side_by_side.png").size == (3 * 128 + 8, 3 * 64 + 8)
    assert (tmp_path / "out" / "table.md").read_text().count("\n") == 8
    folder = tmp_path / "out" / "class_2" / "seed_2" / "streets" / "streets_3_799_class"
    (folder / "sample" / "000001.png").unlink()
    made.clear(), judged.clear()
    table.main([str(word) for word in words])
    assert made == [1]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == record["rows"]


def test_the_loss_of_each_choice_is_held_against_its_kind(
    tiny_model_once: ControlLDM,
    tiny_yaml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    benchmark = importlib.import_module("prior_loss")
    make_tree(tmp_path / "streets", Plan("camera", size=SIZE, train=1, val=5), workers=1)
    write_tensors(tmp_path / "model.safetensors", tiny_model_once.state_dict())
    moments = random_moments(covariance=True)
    write_random_prior(tmp_path / "prior.safetensors", tiny_model_once, moments, covariance=True)
    words = ["--ckpt", tmp_path / "model.safetensors", "--config", tiny_yaml, "--root", tmp_path / "streets"]
    words += ["--prior", tmp_path / "prior.safetensors", "--frames", 2, "--levels", 500]
    benchmark.main([str(word) for word in words])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert len(rows) == 13
    for row in rows.values():
        against = rows[row["against"] or row["name"]]
        difference = row["loss"]["500"] - against["loss"]["500"]
        rounding = 1e-3 * against["loss"]["500"] + 5e-3 * abs(difference)
        assert row["difference"]["500"][0] == pytest.approx(difference, abs=rounding)
    # Plain noise: KL(N(sqrt(a) mu, a v + 1 - a) || N(0, 1)) of the same latents, by numpy.
    abar, losses = float(ABAR[500]), []
    frames = StreetsDataset(tmp_path / "streets", "val", size=SIZE)
    with torch.no_grad():
        for index in (0, 2):
            image = torch.from_numpy(frames[index]["jpg"]).permute(2, 0, 1)[None]
            found = tiny_model_once.first_stage_model.encode(image)
            mean, variance = (
                (part * tiny_model_once.scale_factor**power).double().numpy()
                for part, power in ((found.mean, 1), (found.var, 2))
            )
            q = abar * variance + 1 - abar
            losses.append(((q + abar * mean**2) - 1 - np.log(q)).mean() / 2)
    assert rows["normal"]["loss"]["500"] == pytest.approx(np.mean(losses), rel=1e-3)
