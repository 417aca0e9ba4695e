"""Two gloo processes: nothing waits for ever, each has noise of its own, one writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
