"""The stage that trains text encoder and UNet of the Streets base, on latents and captions without maps."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from cldm.checkpoint import SCHEDULE_KEYS, with_position_ids
from cldm.config import SampleConfig
from cldm.control_ldm import ControlLDM
from cldm.first_stage import PREFIX, encode_in_chunks
from cldm.generate import generate
from cldm.pictures import Rgb, sheet
from cldm.slices import TrainingSlice
from cldm.stage_figures import StageFigures
from cldm.stage_training import StageTraining
from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.tensor_writing import write_tensors

log = logging.getLogger(__name__)

Half = NDArray[np.float16]
FIGURE_LEVELS = (100, 300, 500, 700, 900)  # noise levels of the held-out loss


@dataclass(frozen=True)
class Latents:
    """Posteriors of photos, each encoded once, as it is and mirrored."""

    mean: Half  # (2, N, C, h, w), not scaled
    std: Half  # (2, N, C, h, w)
    captions: list[str]


@torch.no_grad()
def encode_photos(model: ControlLDM, photos: Rgb, captions: Sequence[str]) -> Latents:
    """Posteriors of `photos` (N, H, W, 3), with a progress bar.

    In bf16 and channels-last, which on a CPU with AMX is four times as fast and moves the means by a
    hundredth of their spread; the decoder does not see a twentieth.
    """
    means, stds = [], []
    model.first_stage_model.to(memory_format=torch.channels_last)
    bar = tqdm(total=2 * len(photos), desc="encoding", unit="photo")
    with bar, torch.autocast(model.device.type, torch.bfloat16):
        for side in (photos, photos[:, :, ::-1]):
            for x, posterior in encode_in_chunks(model.first_stage_model, side):
                means.append(posterior.mean.half().cpu())
                stds.append(posterior.std.float().half().cpu())
                bar.update(len(x))
    mean, std = (torch.cat(parts).unflatten(0, (2, -1)).numpy() for parts in (means, stds))
    return Latents(mean, std, list(captions))


def encode_once(
    path: Path, model: ControlLDM, photos: Rgb, captions: Sequence[str], first_stage: str
) -> Latents:
    """Posteriors from the file of an earlier slice if it is of the same photos, else encoded and written.

    first_stage  digest of the autoencoder's file
    """
    mark = hashlib.sha256(f"{first_stage} {photos.shape} ".encode())
    mark.update(photos.tobytes())
    if path.is_file() and read_metadata(path).get("of") == mark.hexdigest():
        tensors = read_tensors(path)
        return Latents(tensors["mean"].numpy(), tensors["std"].numpy(), list(captions))
    latents = encode_photos(model, photos, captions)
    tensors = {"mean": torch.from_numpy(latents.mean), "std": torch.from_numpy(latents.std)}
    write_tensors(path, tensors, {"of": mark.hexdigest()})
    return latents


class LatentBatches:
    """Batch number `step` of a run, whatever was drawn before it: `z` (B, C, h, w), not scaled, and `txt`.

    drop  share of captions that are left out, so that the model also knows how to go without (Ho and
          Salimans 2022)
    """

    def __init__(self, latents: Latents, steps: int, *, batch: int, drop: float, seed: int) -> None:
        self.latents, self.steps = latents, steps
        self.batch, self.drop, self.seed = batch, drop, seed

    def __len__(self) -> int:
        """Number of batches."""
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Photos drawn with replacement, half of them mirrored, each with a fresh draw from its posterior."""
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.integers(len(self.latents.captions), size=self.batch)
        side = rng.integers(2, size=self.batch)
        mean, std = self.latents.mean[side, chosen], self.latents.std[side, chosen]
        z = mean + std * rng.standard_normal(mean.shape, dtype=np.float32)
        dropped = rng.random(self.batch) < self.drop
        texts = ["" if d else self.latents.captions[i] for i, d in zip(chosen, dropped, strict=True)]
        return {"z": z, "txt": texts, "step": step}


class BaseTraining(StageTraining):
    """Trains text encoder and UNet together on batches of `z`, `txt` and `step`."""

    def __init__(self, model: ControlLDM, how: DictConfig) -> None:
        parts = {"unet": model.model.diffusion_model, "text": model.cond_stage_model}
        super().__init__(nn.ModuleDict(parts), how)
        self.model = model.requires_grad_(False)
        self.trained.requires_grad_(True)
        if how.compile:
            model.model.diffusion_model.compile()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch at random noise levels, the text encoder in the graph."""
        z = self.model.get_first_stage_encoding(batch["z"])
        generator = self.noise_of(batch)
        t = torch.randint(self.model.num_timesteps, (len(z),), generator=generator, device=z.device)
        noise = torch.randn(z.shape, generator=generator, device=z.device)
        cond = {"c_crossattn": [self.model.cond_stage_model(batch["txt"])]}
        loss, _ = self.model.p_losses(z, cond, t, noise)
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(z))
        return loss


class BaseFigures(StageFigures):
    """Loss on held-out photos at fixed noise, and what the model makes of some of their captions.

    held_out  photos that are not trained on; each is measured at every one of FIGURE_LEVELS
    rows      captions of the picture, one row for each domain
    """

    def __init__(
        self,
        model: ControlLDM,
        held_out: Latents,
        rows: Sequence[Sequence[str]],
        size: tuple[int, int],
        running: TrainingSlice,
        folder: str | Path,
        *,
        freq: int,
        settings: SampleConfig,
    ) -> None:
        super().__init__(running, folder, freq=freq)
        self.model, self.held_out = model, held_out
        self.rows, self.size, self.settings = rows, size, settings

    def take(self) -> tuple[dict[str, float], Rgb | None]:
        """Losses at each level, and a sheet of samples."""
        losses = held_out_losses(self.model, self.held_out)
        figures = {"val_loss": sum(losses.values()) / len(losses)}
        figures |= {f"val_loss_{level}": loss for level, loss in losses.items()}
        prompts = [prompt for row in self.rows for prompt in row]
        if not prompts:
            return figures, None
        seeds = range(len(prompts))
        images = iter(generate(self.model, None, prompts, seeds, self.settings, size=self.size).numpy())
        return figures, sheet([[next(images) for _ in row] for row in self.rows])


@torch.no_grad()
def held_out_losses(model: ControlLDM, latents: Latents) -> dict[int, float]:
    """Mean squared error at each of FIGURE_LEVELS on the photos as they are, noise and latents fixed."""
    device = next(model.parameters()).device
    z = model.get_first_stage_encoding(torch.from_numpy(latents.mean[0]).float().to(device))
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(device)
    context = model.get_learned_conditioning(latents.captions)
    losses = {}
    for level in FIGURE_LEVELS:
        t = torch.full((len(z),), level, device=device)
        loss, _ = model.p_losses(z, {"c_crossattn": [context]}, t, noise)
        losses[level] = loss.item()
    return losses


def take_first_stage(model: ControlLDM, path: str | Path) -> None:
    """Give `model` the autoencoder of a file, strictly."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"expected the trained autoencoder at {path}, found nothing; train it first:"
            " python tool_train_streets_vae.py"
        )
    tensors = read_tensors(path)
    state = {name.removeprefix(PREFIX): value.float() for name, value in tensors.items() if PREFIX in name}
    try:
        model.first_stage_model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds no autoencoder of the model file: {error}") from error


def write_base(path: str | Path, model: ControlLDM, running: TrainingSlice, notes: Mapping[str, str]) -> None:
    """Write autoencoder, averaged text encoder and averaged UNet in fp16 under the published names."""
    with running.average.applied(running.network):
        state = with_position_ids(model.state_dict())
        kept = {name: value for name, value in state.items() if not name.startswith("control_model.")}
        tensors = {
            name: value.half() if value.is_floating_point() and name not in SCHEDULE_KEYS else value
            for name, value in kept.items()
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, notes)
