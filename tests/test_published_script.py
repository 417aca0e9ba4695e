"""The training script that tutorials of ControlNet print runs as it is, but for what Lightning 2 renamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cldm.cldm import ControlLDM

# The calls of the published script, in its order. Changed: `gpus=1`, and `max_steps` so that it ends.
SCRIPT = """
import pytorch_lightning as pl
from torch.utils.data import DataLoader
from tutorial_dataset import MyDataset
from cldm.logger import ImageLogger
from cldm.model import create_model, load_state_dict

model = create_model('./models/cldm_v15.yaml').cpu()
model.load_state_dict(load_state_dict('./models/control_sd15_ini.ckpt', location='cpu'))
model.learning_rate = 1e-5
model.sd_locked = True
model.only_mid_control = False
dataset = MyDataset()
dataloader = DataLoader(dataset, num_workers=0, batch_size=4, shuffle=True)
logger = ImageLogger(batch_frequency=300)
trainer = pl.Trainer(accelerator='cpu', devices=1, max_steps=2, precision=32, callbacks=[logger])
trainer.fit(model, dataloader)
"""


@pytest.fixture
def tutorial(
    tmp_path: Path, tiny_yaml: Path, tiny_model_once: ControlLDM, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder that the tutorial tells to prepare, with a tiny model and five pictures."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/cldm_v15.yaml").write_text(tiny_yaml.read_text(encoding="utf-8"), encoding="utf-8")
    torch.save(tiny_model_once.state_dict(), tmp_path / "models/control_sd15_ini.ckpt")
    root, lines, rng = tmp_path / "training/fill50k", [], np.random.default_rng(0)
    for i in range(5):
        names = {"source": f"source/{i}.png", "target": f"target/{i}.png"}
        for name in names.values():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(root / name)
        lines.append(json.dumps({**names, "prompt": f"circle {i}"}))
    (root / "prompt.json").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_published_training_script_runs_and_trains(
    tutorial: Path, tiny_model_once: ControlLDM, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    step = ControlLDM.training_step

    def counted(self: ControlLDM, batch: Any, i: int) -> torch.Tensor:
        sizes.append(len(batch["jpg"]))
        assert set(batch) <= {"jpg", "txt", "hint", "key"}, "no label map: a batch of these is enough"
        return step(self, batch, i)

    monkeypatch.setattr(ControlLDM, "training_step", counted)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(SCRIPT, "tutorial_train_of_the_tutorial.py", "exec"), names)
    before, after = tiny_model_once.state_dict(), names["model"].state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.startswith("control_model.")}
    assert sizes == [4, 1]
    grids = sorted(tutorial.glob("lightning_logs/version_0/image_log/*.png"))
    assert [path.name for path in grids] == ["step=000000.png", "step=000002.png"]
    grid = np.asarray(Image.open(grids[0]))
    for i in range(4):  # a row is hint, image, overlay and photo, with 4 white pixels between
        row = grid[68 * i : 68 * i + 64]
        for name, x in (("source", 0), ("target", 3 * 68)):
            assert (row[:, x : x + 64] == np.asarray(Image.open(f"training/fill50k/{name}/{i}.png"))).all()
