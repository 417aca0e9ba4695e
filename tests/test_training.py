"""tutorial_train.py from the command line to its files, and the callbacks that it uses."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from small_runs import write_frame
from torch import Tensor, nn
from torch.utils.data import DataLoader

import generate as generate_script
import tutorial_train
from cldm import trainer as parts
from cldm.cldm import ControlLDM
from cldm.config import SampleConfig
from cldm.digests import fingerprint, sha256_of
from cldm.generate import generate
from cldm.logger import ImageLogger, grid_row, send_image
from cldm.progress import StepProgressBar
from cldm.tensor_writing import write_tensors
from datasets import create_dataset

DECODER = ("model.diffusion_model.output_blocks.", "model.diffusion_model.out.")
# Of Cityscapes: label id and colour of road, car and sky.
CLASSES = [(7, (128, 64, 128)), (26, (0, 0, 142)), (23, (70, 130, 180))]
GAP = 4
SILENT = {"build_callbacks": lambda config, grid, saver: [saver]}  # neither grids nor a bar


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """Put back what a run of the script switches on in this process."""
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    yield
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cityscapes with four frames to train on and one to show, 64x128."""
    root, rng = tmp_path_factory.mktemp("cityscapes"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for i in range(count):
            blocks = rng.integers(0, len(CLASSES), (2, 4)).repeat(32, axis=0).repeat(32, axis=1)
            photo = rng.integers(0, 256, (64, 128, 3), np.uint8)
            ids = np.array([row[0] for row in CLASSES], np.uint8)[blocks]
            write_frame(root, split, f"ulm_{i:06d}_000019", photo, ids)
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_model_once: ControlLDM) -> Path:
    """A whole checkpoint to start from."""
    path = tmp_path_factory.mktemp("start") / "models/start.safetensors"
    path.parent.mkdir()
    write_tensors(path, tiny_model_once.state_dict())
    return path


class Run(NamedTuple):
    """A run that has ended."""

    model: ControlLDM
    folder: Path  # lightning_logs/version_0

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("checkpoints/*"))

    @property
    def grids(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("image_log/*"))


class Recipe(NamedTuple):
    """What all runs here have in common."""

    words: tuple[str, ...]

    def run(self, folder: Path, *words: str, **replaced: Any) -> Run:
        """Run the script in `folder`, with functions of it replaced."""
        built: list[ControlLDM] = []

        def build_model(config: Any) -> Any:
            model, saver = build(config)
            built.append(model)
            return model, saver

        with pytest.MonkeyPatch.context() as patch:
            build = parts.build_model
            patch.setattr(parts, "build_model", build_model)
            for name, function in replaced.items():
                patch.setattr(parts, name, function)
            tutorial_train.main([*self.words, *words, "--default_root_dir", str(folder)])
        return Run(built[0], folder / "lightning_logs/version_0")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tree: Path, start: Path, tiny_yaml: Path) -> Recipe:
    content = {
        "model": {"config": str(tiny_yaml), "checkpoint": str(start)},
        "data": {"root": str(tree), "size": [64, 128], "prompt": "a wet street", "num_workers": 0},
        "train": {"batch_size": 2, "lr": 1.0e-3, "max_steps": 2, "logger_freq": 1000}
        | {"checkpoint_precision": "32"},
        "sample": {"steps": 1, "scale": 2.0},
    }
    path = tmp_path_factory.mktemp("recipe") / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return Recipe(("--config", str(path)))


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Run:
    """Two steps with the UNet frozen, a grid at each."""
    return recipe.run(tmp_path_factory.mktemp("locked"), "--logger_freq", "1")


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by the format's own reader."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def notes(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def painted(path: Path) -> np.ndarray:
    """A map of label ids in its colours."""
    colours = dict(CLASSES)
    return np.array([[colours[int(i)] for i in row] for row in np.asarray(Image.open(path))], np.uint8)


# -- what a run writes and what it changes ----------------------------------------------------------------


def test_a_locked_run_writes_the_control_branch_and_trains_all_of_it(locked: Run, start: Path) -> None:
    assert locked.files == ["step=000002.safetensors"]
    before, after = tensors(start), tensors(locked.folder / "checkpoints" / locked.files[0])
    assert set(after) == {key for key in before if key.startswith("control_model.")}
    assert [key for key in after if torch.equal(after[key], before[key])] == []
    assert all(after[key].isfinite().all() for key in after)


def test_a_locked_run_leaves_every_frozen_tensor_bit_by_bit(locked: Run, start: Path) -> None:
    before, after = tensors(start), locked.model.state_dict()
    frozen = [key for key in before if not key.startswith("control_model.")]
    assert {key.partition(".")[0] for key in frozen} >= {"model", "first_stage_model", "cond_stage_model"}
    assert [key for key in frozen if not torch.equal(after[key], before[key])] == []
    saved = tensors(locked.folder / "checkpoints" / locked.files[0])
    assert all(torch.equal(saved[key], after[key]) for key in saved)


def test_a_checkpoint_records_its_base_and_its_run(locked: Run, start: Path, tree: Path) -> None:
    found = notes(locked.folder / "checkpoints" / locked.files[0])
    assert (locked.folder / "checkpoints" / found["base"]).resolve() == start.resolve()
    assert (found["base_sha256"], found["base_fingerprint"]) == (sha256_of(start), fingerprint(start))
    run = yaml.safe_load(found["run_config"])
    assert (run["data"]["root"], run["train"]["max_steps"], run["train"]["lr"]) == (str(tree), 2, 1.0e-3)
    assert yaml.safe_load(found["model_config"])["model"]["target"] == "cldm.cldm.ControlLDM"
    assert found["step"] == "2"


def test_generate_makes_of_a_checkpoint_what_the_model_in_training_makes(
    locked: Run, tree: Path, tmp_path: Path
) -> None:
    maps = tree / "gtFine/val"
    ckpt = locked.folder / "checkpoints" / locked.files[0]
    words = ["--hint", str(maps), "--steps", "1", "--seed", "0"]
    generate_script.main(["--ckpt", str(ckpt), *words, "--out", str(tmp_path)])
    (path,) = tmp_path.rglob("*_seed0.png")
    last_grid = np.asarray(Image.open(locked.folder / "image_log/step=000002.png"))
    image = np.asarray(Image.open(path)).astype(int)
    assert np.abs(image - last_grid[:, 128 + GAP : 256 + GAP]).max() <= 1


def test_a_grid_shows_map_image_overlay_and_photo_of_the_validation_split(
    locked: Run, tree: Path, tiny_model_once: ControlLDM
) -> None:
    assert locked.grids == ["step=000000.png", "step=000001.png", "step=000002.png"]
    first, last = (np.asarray(Image.open(locked.folder / "image_log" / name)) for name in locked.grids[::2])
    assert first.shape == (64, 4 * 128 + 3 * GAP, 3)
    cells = [first[:, x : x + 128] for x in range(0, first.shape[1], 128 + GAP)]
    (labels,), (photo,) = tree.rglob("val/ulm/*labelIds.png"), tree.rglob("val/ulm/*leftImg8bit.png")
    colours = painted(labels)
    assert (cells[0] == colours).all()
    assert (cells[3] == np.asarray(Image.open(photo))).all()
    assert np.abs(cells[2] - (cells[1].astype(float) + colours) / 2).max() <= 0.5
    hint = torch.from_numpy(colours).permute(2, 0, 1)[None] / 255
    settings = SampleConfig(steps=1, scale=2.0)
    untrained = generate(tiny_model_once, hint, ["a wet street"], [0], settings)[0].int().numpy()
    assert np.abs(cells[1] - untrained).max() <= 1, "step 0 is the model before training"
    assert (first[:, 132:260] != last[:, 132:260]).any()


def test_an_unlocked_run_carries_the_decoder_and_so_does_one_that_starts_from_it(
    recipe: Recipe, start: Path, tmp_path: Path
) -> None:
    before = tensors(start)
    first = recipe.run(tmp_path / "1", "--no-sd_locked", "--max_steps", "1", **SILENT)
    ckpt = first.folder / "checkpoints/step=000001.safetensors"
    saved = tensors(ckpt)
    assert set(saved) == {key for key in before if key.startswith(("control_model.", *DECODER))}
    assert [key for key in saved if torch.equal(saved[key], before[key])] == []
    encoder = [key for key in before if key not in saved]
    assert [key for key in encoder if not torch.equal(first.model.state_dict()[key], before[key])] == []

    second = recipe.run(tmp_path / "2", "--resume_path", str(ckpt), "--max_steps", "1", **SILENT)
    again = second.folder / "checkpoints/step=000001.safetensors"
    chained = tensors(again)
    assert set(chained) == set(saved)
    decoder = [key for key in saved if key.startswith(DECODER)]
    assert [key for key in decoder if not torch.equal(chained[key], saved[key])] == [], "locked this time"
    assert any(not torch.equal(chained[key], saved[key]) for key in saved)
    assert (again.parent / notes(again)["base"]).resolve() == start.resolve()


def test_a_random_start_writes_the_whole_model(recipe: Recipe, start: Path, tmp_path: Path) -> None:
    first = recipe.run(tmp_path / "1", "--resume_path", "random", "--max_steps", "1", **SILENT)
    path = first.folder / "checkpoints/step=000001.safetensors"
    derived = {key for key in tensors(path) if key.endswith(".position_ids")}
    assert set(tensors(path)) - derived == set(tensors(start)) - derived
    assert "base" not in notes(path)
    second = recipe.run(tmp_path / "2", "--resume_path", str(path), "--max_steps", "1", **SILENT)
    control = second.folder / "checkpoints/step=000001.safetensors"
    assert {key.partition(".")[0] for key in tensors(control)} == {"control_model"}
    assert (control.parent / notes(control)["base"]).resolve() == path.resolve()


# -- steps, batches, workers ------------------------------------------------------------------------------


def test_the_unit_is_the_optimizer_step(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    step = ControlLDM.training_step
    monkeypatch.setattr(
        ControlLDM,
        "training_step",
        lambda self, batch, i: sizes.append(len(batch["txt"])) or step(self, batch, i),
    )
    words = ["train.accumulate=2", "train.checkpoint_freq=2", "train.grid_images=1"]
    run = recipe.run(tmp_path, *words, "--batch_size", "1", "--max_steps", "4", "--logger_freq", "2")
    assert sizes == [1] * 8, "four optimizer steps of two batches each"
    assert run.files == ["step=000002.safetensors", "step=000004.safetensors"]
    assert run.grids == ["step=000000.png", "step=000002.png", "step=000004.png"]


def test_hints_of_other_channels_than_the_models_are_refused_at_the_start(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        recipe.run(tmp_path, "data.hint=onehot", **SILENT)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "expected hints of 3 channels" in said
    assert "found 20 of data.hint=onehot" in said


def test_windows_rare_classes_and_prompts_train(recipe: Recipe, tmp_path: Path, tree: Path) -> None:
    words = ["data.crop=random", "data.zoom=[1,2]", "data.flip=0.5", "data.drop_prompt=0.5"]
    words += ["data.rare_classes=true", "data.rare_pixels=10", "data.prompt='a street with {classes}'"]
    run = recipe.run(tmp_path, *words, **SILENT)
    assert run.files == ["step=000002.safetensors"]
    (tree / "sample_class_stats_dict.json").unlink()
    notes_of_run = yaml.safe_load(notes(run.folder / "checkpoints" / run.files[0])["run_config"])
    assert notes_of_run["data"]["prompt"] == "a street with {classes}"


def test_latents_are_not_kept_of_frames_that_change(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        recipe.run(tmp_path, "data.flip=0.5", "train.keep_latents=true", **SILENT)
    assert "expected samples that stay the same with train.keep_latents=true" in capsys.readouterr().err


def test_a_grid_that_does_not_fit_gets_fewer_rows_and_ends_no_run(
    tiny_model: ControlLDM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples = [{"hint": np.zeros((64, 64, 3), np.float32), "txt": "a"}] * 4
    images = ImageLogger(1, 4, samples=samples, settings=SampleConfig(steps=1, scale=1.0))
    images.folder = tmp_path
    whole = ImageLogger.sample

    def sample(self: ImageLogger, model: ControlLDM) -> Any:
        if len(self.samples) > 2:
            raise torch.OutOfMemoryError
        return whole(self, model)

    monkeypatch.setattr(ImageLogger, "sample", sample)
    plugin = SimpleNamespace(forward_context=nullcontext)
    for step in (1, 2):
        trainer = SimpleNamespace(global_step=step, precision_plugin=plugin, loggers=[])
        images.log_grid(trainer, tiny_model)
    assert [path.name for path in tmp_path.iterdir()] == ["step=000002.png"]
    assert "no grid at step 1, the next has 2 rows" in caplog.text


def test_curves_go_where_they_are_asked_to(recipe: Recipe, tmp_path: Path) -> None:
    run = recipe.run(tmp_path, "train.logger=csv", "--max_steps", "10")
    rows = (run.folder / "metrics.csv").read_text().splitlines()
    assert "train/loss_simple" in rows[0].split(",")
    assert run.grids


def test_weights_and_biases_are_named_where_they_are_missing(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "WandbLogger", lambda **options: __import__("no_such_wandb"))
    with pytest.raises(SystemExit):
        recipe.run(tmp_path, "train.logger=wandb")
    assert "pip install wandb" in capsys.readouterr().err


def test_the_control_branch_is_exported_at_the_end(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], start: Path
) -> None:
    target = tmp_path / "out/control.safetensors"
    run = recipe.run(tmp_path, f"train.export_at_end={target}", **SILENT)
    found, weights = tensors(target), tensors(run.folder / "checkpoints/step=000002.safetensors")
    assert set(found) == {name for name in weights if name.startswith("control_model.")}
    assert all(torch.equal(value, weights[name].half()) for name, value in found.items())
    assert notes(target)["base_fingerprint"] == fingerprint(start)
    with pytest.raises(SystemExit):
        recipe.run(tmp_path, f"train.export_at_end={target}", "--no-sd_locked")
    assert "expected train.sd_locked=true for train.export_at_end" in capsys.readouterr().err


def test_ranks_share_the_samples_of_a_run_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        monkeypatch.setattr(parts, "ranks_now", lambda rank=rank: (rank, 3))
        share = parts.RankShare(12)
        shares.append(list(share))
        assert len(share) == 4
    assert sorted(number for share in shares for number in share) == list(range(12))
    assert shares[1] == [1, 4, 7, 10]


def test_a_batch_may_be_larger_than_the_data_set(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    step = ControlLDM.training_step
    monkeypatch.setattr(
        ControlLDM,
        "training_step",
        lambda self, batch, i: sizes.append(len(batch["txt"])) or step(self, batch, i),
    )
    run = recipe.run(tmp_path, "--batch_size", "7", **SILENT)
    assert sizes == [7, 7], "the next pass begins in the same batch"
    assert run.files == ["step=000002.safetensors"]


@pytest.mark.parametrize(
    ("words", "replaced"),
    [([], SILENT), (["data.num_workers=2"], {})],
    ids=["nothing is logged", "two workers"],
)
def test_neither_logging_nor_workers_change_a_bit_of_the_result(
    recipe: Recipe, locked: Run, tmp_path: Path, words: list[str], replaced: dict[str, Any]
) -> None:
    other = recipe.run(tmp_path, *words, **replaced)
    ours, theirs = (tensors(run.folder / "checkpoints" / run.files[0]) for run in (locked, other))
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_seed_rate_and_where_control_enters_take_effect(recipe: Recipe, locked: Run, tmp_path: Path) -> None:
    ours = tensors(locked.folder / "checkpoints" / locked.files[0])
    run = recipe.run(tmp_path / "seed", "train.seed=1", **SILENT)
    theirs = tensors(run.folder / "checkpoints" / run.files[0])
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
    words = ["train.lr=5e-4", "train.only_mid_control=true", "train.update_in_backward=false"]
    words += ["--max_steps", "1"]
    model = recipe.run(tmp_path / "rate", *words, **SILENT).model
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == 5e-4
    assert model.only_mid_control
    gradient = {
        name: p.grad.abs().max() for name, p in model.control_model.named_parameters() if p.grad is not None
    }
    assert gradient["middle_block_out.0.weight"] > 0
    assert not [name for name in gradient if name.startswith("zero_convs") and gradient[name] > 0]


def test_the_samples_of_a_grid_are_training_ones_where_no_validation_split_is(
    recipe: Recipe, tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["data.val_split=validation", "train.grid_images=3", "--max_steps", "1"]
    with caplog.at_level(logging.WARNING):
        run = recipe.run(tmp_path, *words)
    assert "validation" in caplog.text
    grid = np.asarray(Image.open(run.folder / "image_log/step=000001.png"))
    maps = sorted(tree.rglob("train/ulm/*labelIds.png"))[:3]
    assert grid.shape[0] == 3 * 64 + 2 * GAP
    assert all((grid[68 * i : 68 * i + 64, :128] == painted(path)).all() for i, path in enumerate(maps))


def test_a_run_that_leaves_size_root_and_prompt_open_has_a_grid(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cityscapes").symlink_to(tree)
    (tmp_path / "run.yaml").write_text("train: {grid_images: 1}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    args = tutorial_train.parse_args(["--config", "run.yaml"])
    config = tutorial_train.resolve(args)
    dataset = create_dataset("cityscapes", **tutorial_train.dataset_options(config))
    (sample,) = tutorial_train.grid_samples(config, dataset)
    assert sample["hint"].shape == (512, 1024, 3), "the data set's own size"
    assert sample["txt"] == "City road scenes."


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU, and here is one")
def test_gpu_ids_without_a_gpu_train_on_the_cpu_with_one_warning(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="tutorial_train"):
        run = recipe.run(tmp_path, "--max_steps", "1", "--gpus", "0", **SILENT)
    assert [record.getMessage() for record in caplog.records if "CPU" in record.getMessage()] == [
        "no GPU found: training on the CPU"
    ]
    assert run.files == ["step=000001.safetensors"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_was_reached_is_saved_once_when_a_run_breaks_off(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    step, done = ControlLDM.training_step, []

    def breaks(self: ControlLDM, batch: Any, i: int) -> Tensor:
        if done:
            raise error("stop")
        done.append(i)
        return step(self, batch, i)

    monkeypatch.setattr(ControlLDM, "training_step", breaks)
    with pytest.raises((error, SystemExit)):
        recipe.run(tmp_path, "--max_steps", "5")
    (path,) = (tmp_path / "lightning_logs/version_0/checkpoints").iterdir()
    assert path.name == "step=000001.safetensors"
    assert notes(path)["step"] == "1"
    assert all(tensor.isfinite().all() for tensor in tensors(path).values())


def test_a_dry_run_is_one_step_with_its_grid_and_a_report(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="cldm.trainer"):
        run = recipe.run(tmp_path, "--dry_run", "--max_steps", "500", "train.accumulate=2")
    assert "Epoch" not in "".join(capsys.readouterr())
    assert run.grids == ["step=000000.png", "step=000001.png"]
    assert not (run.folder / "checkpoints").exists()
    (said,) = [message for message in caplog.messages if message.startswith("dry run")]
    trained = sum(p.numel() for p in run.model.control_model.parameters())
    assert "500 steps at that speed" in said
    assert f"a checkpoint takes {4 * trained / 2**30:.2f} GiB" in said
    seconds = float(re.search(r"took ([\d.]+) s", said)[1])
    peak = float(re.search(r"peak memory ([\d.]+) GiB", said)[1])
    assert 0 < seconds < 60
    assert 0.1 < peak < 24


def test_numbers_of_samples_stay_on_the_host(tiny_model: ControlLDM) -> None:
    batch = {"number": torch.arange(3), "hint": torch.zeros(3), "txt": ["a", "b", "c"]}
    moved = tiny_model.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["hint"].device.type == "meta"
    assert moved["number"].tolist() == [0, 1, 2]
    assert moved["txt"] == ["a", "b", "c"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_every_precision(recipe: Recipe, tmp_path: Path, precision: str) -> None:
    norms: list[float] = []

    class Norm(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: ControlLDM, *_: Any) -> None:
            norms.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in module.trainable_parameters()]))
            )

    built = parts.build_callbacks
    for clip in ("null", "1e-6"):
        words = [f"train.precision={precision}", f"train.clip={clip}", "train.update_in_backward=false"]
        words += ["--max_steps", "1"]
        recipe.run(tmp_path / clip, *words, build_callbacks=lambda *args: [*built(*args), Norm()])
    free, clipped = norms
    assert free > 1e-4
    assert clipped == pytest.approx(1e-6, rel=0.01)


def test_wrong_weights_are_one_sentence(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(SystemExit) as exit_info:
        recipe.run(tmp_path, "--resume_path", str(tmp_path / "w.safetensors"))
    assert exit_info.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.splitlines()[-1].partition(": ")[0].endswith(".py")
    assert "w.safetensors" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_one_batch_is_learned(tiny_model: ControlLDM, tiny_batch: dict[str, Any]) -> None:
    def loss_of(model: ControlLDM) -> float:
        torch.manual_seed(0)
        z, cond = model.get_input(tiny_batch, "jpg")
        levels = [torch.full((2,), t) for t in range(50, 1000, 100)]
        return sum(model.p_losses(z, cond, t, torch.randn_like(z))[0].item() for t in levels) / len(levels)

    tiny_model.learning_rate = 1e-3
    tiny_model.sd_locked = False
    with torch.no_grad():
        before = loss_of(tiny_model)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=60,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        tiny_model, DataLoader([{k: v[i] for k, v in tiny_batch.items()} for i in range(2)], batch_size=2)
    )
    with torch.no_grad():
        after = loss_of(tiny_model.eval())
    assert after < 0.7 * before


# -- the callbacks by themselves --------------------------------------------------------------------------


def test_the_logger_restores_the_mode_of_training_whatever_happens(
    tiny_model: ControlLDM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = {"hint": np.zeros((64, 64, 3), np.float32), "txt": "a"}
    logger = ImageLogger(samples=[sample], settings=SampleConfig(steps=1))
    plugin = SimpleNamespace(forward_context=torch.no_grad)
    trainer = SimpleNamespace(global_step=1, log_dir=str(tmp_path), loggers=[], precision_plugin=plugin)
    modes: list[bool] = []

    def sampling(model: ControlLDM) -> np.ndarray:
        modes.append(model.training)
        if len(modes) == 2:
            raise RuntimeError("out of memory")
        return np.zeros((1, 64, 64, 3), np.uint8)

    monkeypatch.setattr(logger, "sample", sampling)
    logger.setup(trainer, tiny_model, "fit")
    tiny_model.train()
    logger.log_grid(trainer, tiny_model)
    assert tiny_model.training
    assert not tiny_model.first_stage_model.training
    trainer.global_step = 2
    with pytest.raises(RuntimeError, match="out of memory"):
        logger.log_grid(trainer, tiny_model)
    assert tiny_model.training
    assert modes == [False, False]
    tiny_model.eval()
    trainer.global_step = 3
    logger.log_grid(trainer, tiny_model)
    assert not tiny_model.training


def test_a_row_has_what_the_sample_has() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    colours = np.array([[[0, 51, 255]] * 2] * 2, np.uint8)
    hint = colours.astype(np.float32) / 255
    assert [part.tolist() for part in grid_row({"hint": hint}, image)][:2] == [
        colours.tolist(),
        image.tolist(),
    ]
    one_hot = {"hint": np.zeros((2, 2, 19), np.float32), "jpg": np.full((2, 2, 3), -1, np.float32)}
    assert [part.tolist() for part in grid_row(one_hot, image)] == [image.tolist(), (image * 0).tolist()]


def test_a_grid_goes_to_loggers_that_take_pictures() -> None:
    picture, got = np.zeros((2, 3, 3), np.uint8), []
    board = SimpleNamespace(
        experiment=SimpleNamespace(add_image=lambda *args, **more: got.append((*args, more)))
    )
    send_image(board, "samples", picture, 7)
    assert got == [("samples", picture, 7, {"dataformats": "HWC"})]
    wandb = SimpleNamespace(log_image=lambda **more: got.append(more), experiment=None)
    send_image(wandb, "samples", picture, 7)
    assert got[1:] == [{"key": "samples", "images": [picture], "step": 7}]
    send_image(SimpleNamespace(experiment=object()), "samples", picture, 7)  # a CSV file takes none


def test_a_frequency_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more optimizer steps, found 0"):
        ImageLogger(batch_frequency=0)


class Line(pl.LightningModule):
    """The smallest thing that Lightning trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: dict[str, Tensor], i: int) -> Tensor:
        loss = self.layer(batch["txt"]).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("shown", [True, False])
def test_the_bar_counts_optimizer_steps_and_projects_a_run_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, shown: bool
) -> None:
    bar = StepProgressBar()
    if not shown:
        bar.disable()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=3,
        accumulate_grad_batches=2,
        callbacks=[bar],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with caplog.at_level(logging.INFO, logger="cldm.progress"):
        trainer.fit(Line(), DataLoader([{"txt": torch.ones(1)}] * 8, batch_size=1))
    err = capsys.readouterr().err
    assert bar.bar.total == 3
    assert ("3/3" in err) is shown
    assert ("images/s" in err and "loss" in err) is shown
    if shown:
        assert bar.bar.n == 3
    said = [record.getMessage() for record in caplog.records if record.name == "cldm.progress"]
    assert len(said) == 1
    assert "3 steps take about 0:00:0" in said[0]


def test_the_projection_is_the_first_step_times_the_steps(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cldm.progress"):
        StepProgressBar().project(7.2, 1000)
    assert caplog.messages == ["the first step took 7.2 s on the CPU; 1000 steps take about 2:00:00"]


# -- the fast path ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_rounded_frozen_weights_train_as_under_autocast_and_are_not_written(
    recipe: Recipe, start: Path, tmp_path: Path, cached: bool
) -> None:
    words = ["train.val_freq=1", "--logger_freq", "2", "data.val_split=train"]
    words += [f"data.cache={tmp_path / 'cache'}"] if cached else []
    plain = recipe.run(tmp_path / "plain", *words, "train.precision=bf16-mixed")
    words += ["train.frozen_precision=bf16", "train.activation_checkpointing=true"]
    fast = recipe.run(tmp_path / "fast", *words)
    assert fast.grids == ["step=000000.png", "step=000002.png"]
    before = tensors(start)
    expected, found = (tensors(run.folder / "checkpoints/step=000002.safetensors") for run in (plain, fast))
    assert set(found) == set(expected) == {key for key in before if key.startswith("control_model.")}
    assert {value.dtype for value in found.values()} == {torch.float32}
    moved = torch.cat([(expected[key] - before[key]).flatten() for key in sorted(found)])
    ours = torch.cat([(found[key] - before[key]).flatten() for key in sorted(found)])
    assert torch.nn.functional.cosine_similarity(ours, moved, dim=0) > 0.97  # Adam's first steps are signs
    losses = [(run.folder / "validation.jsonl").read_text().splitlines() for run in (plain, fast)]
    for ours_line, theirs_line in zip(*losses, strict=True):
        pair = [json.loads(line)["loss_simple"] for line in (ours_line, theirs_line)]
        assert pair[0] == pytest.approx(pair[1], rel=0.02)
    for key, value in fast.model.state_dict().items():
        if key.startswith("model.diffusion_model."):
            assert torch.equal(value, before[key].to(value.dtype)), f"{key} is frozen"
            assert value.dtype == (torch.bfloat16 if value.ndim > 1 else value.dtype)
