"""Two gloo processes: nothing waits for ever, each has noise of its own, one writes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import write_streets_run

from cldm.cldm import ControlLDM
from cldm.tensor_files import read_tensors

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, sys
import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader
from cldm.config import SampleConfig
from cldm.logger import ImageLogger
from cldm.model import create_model
from cldm.saver import ControlCheckpoint

folder, model_file = sys.argv[1:]
pl.seed_everything(0, verbose=False)
model = create_model(model_file)
levels, p_losses = [], model.p_losses

def noted(x_start, cond, t, noise):
    levels.append([t.tolist(), float(noise.sum())])
    return p_losses(x_start, cond, t, noise)

model.p_losses = noted
rng = np.random.default_rng(0)
frames = rng.random((8, 64, 64, 3), dtype=np.float32)
data = [{"jpg": 2 * f - 1, "hint": f, "txt": "a", "key": i, "number": i} for i, f in enumerate(frames)]
callbacks = [ImageLogger(1, 1, settings=SampleConfig(steps=1)), ControlCheckpoint(1, None)]
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=2, callbacks=callbacks, default_root_dir=folder,
    logger=TensorBoardLogger(folder), enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(data, batch_size=2))
weights = [float(p.detach().double().abs().sum()) for p in model.control_model.parameters()]
with open(f"{folder}/rank{trainer.global_rank}.json", "w") as file:
    json.dump({"levels": levels, "weights": weights}, file)
"""


@pytest.mark.slow
def test_two_processes_train_one_model(tiny_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path), str(tiny_yaml)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, timeout=240, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    assert first["weights"] == second["weights"]  # the gradients were averaged
    assert len(first["levels"]) == len(second["levels"]) == 2
    assert all(a != b for a, b in zip(first["levels"], second["levels"], strict=True))
    (run,) = (tmp_path / "lightning_logs").iterdir()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step=000001.safetensors",
        "step=000002.safetensors",
    ]
    assert len(list((run / "image_log").iterdir())) == 3  # steps 0, 1 and 2, each once


TRAINING = """
import os, signal, sys
import pytorch_lightning as pl
import tutorial_train
from cldm import trainer as parts

processes, stop_at, *words = sys.argv[1:]
build_trainer, count_samples, build_callbacks = pl.Trainer, parts.count_samples, parts.build_callbacks

class Stop(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == int(stop_at) and trainer.global_rank == 0:  # the others are not told
            os.kill(os.getpid(), signal.SIGTERM)

if int(processes) > 1:
    options = {"devices": int(processes), "strategy": "ddp"}
    parts.pl.Trainer = lambda **given: build_trainer(**{**given, **options})
    parts.count_samples = lambda config: int(processes) * count_samples(config)
parts.build_callbacks = lambda *args: [Stop(), *build_callbacks(*args)]
tutorial_train.main(words)
"""


def train(tmp_path: Path, recipe: Path, name: str, processes: int, *words: str, stop_at: int = -1) -> Path:
    program = tmp_path / "training.py"
    program.write_text(TRAINING, encoding="utf-8")
    command = [sys.executable, str(program), str(processes), str(stop_at), "--config", str(recipe), *words]
    command += ["--default_root_dir", str(tmp_path / name)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, timeout=240, capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if stop_at < 0 else 128 + signal.SIGTERM), done.stderr[-3000:]
    return tmp_path / name / "lightning_logs/version_0"


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch_and_resume(
    tmp_path: Path, tiny_yaml: Path, tiny_model_once: ControlLDM
) -> None:
    recipe = write_streets_run(tmp_path, tiny_yaml, tiny_model_once, max_steps=4, checkpoint_freq=2, ema=0.9)
    one = train(tmp_path, recipe, "one", 1, "--batch_size", "4")
    two = train(tmp_path, recipe, "two", 2)
    ours, theirs = (read_tensors(run / "checkpoints/step=000004.safetensors") for run in (two, one))
    start = read_tensors(tmp_path / "start.safetensors")
    for name, value in theirs.items():
        moved = (value - start[name]).abs().max().item()
        assert moved > 0 or value.numel() == 0, name
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0.02 * moved + 1e-7)
    train(tmp_path, recipe, "parts", 2, stop_at=4)
    resumed = train(tmp_path, recipe, "parts", 2, "--resume", "last")
    for name in ("checkpoints/step=000004.safetensors", "state/step=000004.state.safetensors"):
        ours, theirs = (read_tensors(run / name) for run in (resumed, two))
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
