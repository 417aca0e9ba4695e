"""A training that is killed again and again ends as one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import write_streets_run

from cldm.cldm import ControlLDM
from cldm.run_state import FOLDER, SUFFIX, find_state
from cldm.tensor_files import read_metadata, read_shapes, read_tensors

ROOT = Path(__file__).parents[1]
KILLS, STEPS = 20, 400


def start(recipe: Path, folder: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "tutorial_train.py",
        "--config",
        str(recipe),
        "--default_root_dir",
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen([*command, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)


def files_of(folder: Path) -> list[Path]:
    """What a user sees of a run: weights and states, by their final names."""
    found = [*folder.glob("lightning_logs/*/checkpoints/*"), *folder.glob(f"lightning_logs/*/{FOLDER}/*")]
    return [path for path in found if not path.name.startswith(".")]


@pytest.mark.soak
def test_killed_at_random_moments_it_ends_bit_by_bit_the_same(
    tmp_path: Path, tiny_yaml: Path, tiny_model_once: ControlLDM
) -> None:
    recipe = write_streets_run(
        tmp_path, tiny_yaml, tiny_model_once, max_steps=STEPS, checkpoint_freq=3, ema=0.99, keep_last=2
    )
    assert start(recipe, tmp_path / "whole").wait(timeout=1800) == 0
    parts, rng = tmp_path / "parts", random.Random(0)
    resume: list[str] = []
    for _ in range(KILLS):
        process = start(recipe, parts, *resume)
        time.sleep(rng.uniform(6, 14))  # a start takes 6 s
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in files_of(parts):
            read_shapes(path)
            assert "step" in read_metadata(path) or path.name.endswith(SUFFIX)
        if files_of(parts):
            find_state("last", parts)
            resume = ["--resume", "last"]
    assert start(recipe, parts, *resume).wait(timeout=1800) == 0
    name = f"step={STEPS:06d}"
    for file in (f"checkpoints/{name}.safetensors", f"{FOLDER}/{name}{SUFFIX}"):
        (ours,) = parts.glob(f"lightning_logs/*/{file}")
        found, expected = read_tensors(ours), read_tensors(tmp_path / "whole/lightning_logs/version_0" / file)
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert not list(parts.rglob("*.partial"))
