"""Two curves of a training: its loss, and on fixed samples whether the model follows its hints."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from cldm.control_ldm import ControlLDM
from cldm.generate import draw_noise
from cldm.logger import Samples, evaluating
from cldm.whole_files import whole_file
from ldm.models.diffusion.latent import channels_first

log = logging.getLogger(__name__)

VALIDATION, TRAINING = "validation.jsonl", "training.jsonl"
METRICS = ("loss_simple", "loss_shuffled_hint", "adherence")  # what loggers get, behind val/
BANDS = 4  # of noise levels, equally wide; each sample is measured once in each
CLEAR_ERRORS, CLEAR_SHARE = 4.0, 0.01  # what a clear adherence exceeds: standard errors, and this itself
LEAST_CLEAR = 8  # samples; the standard error of fewer says too little
GOLDEN = (5**0.5 - 1) / 2


class Fixed(NamedTuple):
    """A batch that is measured again and again; all but the rows on the device of the model."""

    rows: list[int]  # which samples
    others: list[int]  # whose hints they get when the hints are shuffled
    x_start: Tensor  # (B, C, h, w)
    context: Tensor  # (B, L, D)
    t: Tensor  # (BANDS, B)
    noise: Tensor  # (BANDS, B, C, h, w)


class Validation(pl.Callback):
    """Measures the loss on fixed samples at step 0, every `every` optimizer steps, and at the end.

    Latents are the means of the first stage. Sample i gets its noise from generator `seed` + i, and a level
    in each of four bands, so that a measurement differs from the last one by the model alone. It is done
    twice, with each sample's own hint and with the hint of another:

        adherence = 1 - loss_simple / loss_shuffled_hint

    is the part of the loss that is gone because the hint is the right one. It is 0, exactly, while the
    control branch gives zeros, and stays about 0 while hints have an effect that does not depend on what they
    show. It is clear when it is above 1 % and the paired differences of the samples have a mean above four
    standard errors; a chance correlation can pass the second alone. After two clear measurements in a row
    one line says since when the model follows its hints.

    Logs `val/loss_simple`, `val/loss_shuffled_hint` and `val/adherence`, and writes a line of JSON for each
    measurement to <log_dir>/validation.jsonl. Draws from its own generators alone, so training is bit by bit
    what it would be without.

    samples     two or more: `jpg` (H, W, 3) in [-1, 1], `hint` (H, W, C) in [0, 1], `txt`
    batch_size  samples at a time
    """

    def __init__(self, every: int, samples: Samples, *, batch_size: int = 4, seed: int = 0) -> None:
        if every < 1:
            raise ValueError(f"expected a measurement every 1 or more optimizer steps, found {every}")
        if len(samples) < 2:
            raise ValueError(
                f"expected 2 or more samples, as a hint is held against another's, found {len(samples)}"
            )
        self.every = every
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.last_step = -1
        self.clear_since: int | None = None  # the first of the measurements in a row that are clear
        self.follows_since: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fix the file: asking Lightning for its folder is a collective, so every rank does it here."""
        self.path = Path(trainer.log_dir or trainer.default_root_dir) / VALIDATION

    def state_dict(self) -> dict[str, Any]:
        """Since when hints are followed, and the last measured step."""
        return {name: getattr(self, name) for name in ("clear_since", "follows_since", "last_step")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as before."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Encode the samples, keep no photo, and measure the untrained model."""
        forget_after(self.path, trainer.global_step)
        hints = np.stack([np.asarray(sample["hint"]) for sample in self.samples])
        self.hints = torch.from_numpy(hints)
        with evaluating(trainer, pl_module):
            self.batches = list(fixed_batches(pl_module, self.samples, self.batch_size, self.seed))
        self.samples = ()
        if trainer.global_step == 0:
            self.measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Measure when a multiple of `every` optimizer steps is reached."""
        if trainer.global_step % self.every == 0:
            self.measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the result, but not that of a run which was told to stop and will go on."""
        if not trainer.should_stop:
            self.measure(trainer, pl_module)

    @rank_zero_only
    def measure(self, trainer: pl.Trainer, model: ControlLDM) -> None:
        """Measure once for each optimizer step; log it, write it, and say when the hints are followed."""
        step = trainer.global_step
        if step == self.last_step:
            return
        self.last_step, start = step, time.monotonic()
        with evaluating(trainer, model):
            right, shuffled = self.losses(model)
        found = summary(right, shuffled)
        model.validation_loss = step, found["loss_simple"]
        found["news"] = self.decide(step, found)
        found["follows_since"] = self.follows_since
        found["bands"] = band_losses(right, shuffled, model.num_timesteps)
        found |= {"samples": right.shape[1], "seconds": round(time.monotonic() - start, 2)}
        append_line(self.path, {"step": step, **found})
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{name}": found[name] for name in METRICS}, step)

    def losses(self, model: ControlLDM) -> tuple[Tensor, Tensor]:
        """(BANDS, N) float64 losses with the right hints, and with shuffled ones."""
        both = [
            torch.stack([self.batch_losses(model, batch, rows) for rows in (batch.rows, batch.others)])
            for batch in self.batches
        ]
        right, shuffled = torch.cat(both, dim=2).double().cpu()
        return right, shuffled

    def batch_losses(self, model: ControlLDM, batch: Fixed, rows: list[int]) -> Tensor:
        """(BANDS, B) losses of a batch with the hints of `rows`."""
        hint = channels_first(self.hints[rows], model.device)
        cond = {"c_crossattn": [batch.context], "c_concat": [hint]}
        levels = zip(batch.t, batch.noise, strict=True)
        return torch.stack([sample_losses(model, batch.x_start, cond, t, noise) for t, noise in levels])

    def decide(self, step: int, found: Mapping[str, Any]) -> str | None:
        """After two clear measurements in a row, once: the line that says since when hints are followed."""
        since = self.clear_since
        self.clear_since = None if not found["is_clear"] else step if since is None else since
        if self.clear_since is None or since is None or self.follows_since is not None:
            return None
        self.follows_since = since
        news = (
            f"the model follows its hints since step {since}: with the right hint its loss is "
            f"{found['adherence']:.1%} lower than with another's"
        )
        log.info(news)
        return news


class LossCurve(pl.Callback):
    """Writes the training loss to <log_dir>/training.jsonl, the mean of every `every` optimizer steps."""

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self.last_step = 0
        self.losses: list[Tensor] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fix the file: asking Lightning for its folder is a collective, so every rank does it here."""
        self.path = Path(trainer.log_dir or trainer.default_root_dir) / TRAINING

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the file of a resumed run."""
        forget_after(self.path, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Losses that no line has yet."""
        return {"last_step": self.last_step, "losses": [loss.item() for loss in self.losses]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as before."""
        self.last_step, self.losses = state_dict["last_step"], list(map(torch.tensor, state_dict["losses"]))

    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Keep the loss on its device; read it when a line is due, as that waits for the device."""
        self.losses.append(trainer.callback_metrics["train/loss_simple"])  # neither weighted nor divided
        step = trainer.global_step
        if step % self.every == 0 and step > self.last_step:
            append_line(self.path, {"step": step, "loss_simple": torch.stack(self.losses).mean().item()})
            self.last_step, self.losses = step, []


def fixed_batches(model: ControlLDM, samples: Samples, batch_size: int, seed: int) -> Iterator[Fixed]:
    """Latents, texts, levels and noise of the samples; each but the text is the sample's own affair."""
    count = len(samples)
    for start in range(0, count, batch_size):
        rows = list(range(start, min(start + batch_size, count)))
        photos = np.stack([np.asarray(samples[i]["jpg"]) for i in rows])
        posterior = model.encode_first_stage(channels_first(photos, model.device))
        x_start = model.get_first_stage_encoding(posterior.mode())
        yield Fixed(
            rows,
            [(i + count // 2) % count for i in rows],  # far away, as neighbours may show one scene
            x_start,
            model.get_learned_conditioning([samples[i]["txt"] for i in rows]),
            torch.tensor(levels(rows, model.num_timesteps), device=model.device),
            draw_noise([seed + i for i in rows], BANDS, tuple(x_start.shape[1:])).to(x_start),
        )


def levels(rows: Sequence[int], num_timesteps: int) -> list[list[int]]:
    """For each band the timestep of each sample; in a band the samples are spread evenly."""
    return [[int((band + golden(i)) * num_timesteps / BANDS) for i in rows] for band in range(BANDS)]


def golden(i: int) -> float:
    """Point `i` of a sequence whose first points, however many, are spread evenly over [0, 1)."""
    return i * GOLDEN % 1


def sample_losses(model: ControlLDM, x_start: Tensor, cond: Any, t: Tensor, noise: Tensor) -> Tensor:
    """(B,) what `p_losses` is the mean of."""
    prediction = model.apply_model(model.q_sample(x_start, t, noise), t, cond)
    target = noise if model.parameterization == "eps" else model.get_v(x_start, noise, t)
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


def summary(right: Tensor, shuffled: Tensor) -> dict[str, Any]:
    """Mean losses, adherence with its standard error, and whether it is clear; both are (BANDS, N).

    What makes a sample or a level hard is in both losses, so the error is that of their differences.
    """
    difference = (shuffled - right).mean(dim=0)
    whole, mean = shuffled.mean(), difference.mean()
    error = difference.std() / len(difference) ** 0.5
    return {
        "loss_simple": right.mean().item(),
        "loss_shuffled_hint": whole.item(),
        "adherence": (mean / whole).item(),
        "adherence_error": (error / whole).item(),
        "is_clear": bool(mean > CLEAR_ERRORS * error and mean > CLEAR_SHARE * whole)
        and len(difference) >= LEAST_CLEAR,
    }


def band_losses(right: Tensor, shuffled: Tensor, num_timesteps: int) -> list[dict[str, float]]:
    """Mean losses of each band of timesteps, `first` to `last`."""
    edges = [band * num_timesteps // BANDS for band in range(BANDS + 1)]
    means = zip(right.mean(dim=1).tolist(), shuffled.mean(dim=1).tolist(), strict=True)
    return [
        {"first": edges[i], "last": edges[i + 1] - 1, "loss_simple": a, "loss_shuffled_hint": b}
        for i, (a, b) in enumerate(means)
    ]


def forget_after(path: Path, step: int) -> None:
    """Remove lines of later steps than `step`, which a run wrote that stopped before it could save them."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        with whole_file(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line of JSON to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
