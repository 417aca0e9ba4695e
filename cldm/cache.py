"""What frozen networks make of a data set, on disk: moments of the photos, embeddings of the prompts.

    DIR/samples/00000.safetensors   `moments` (N, 2C, h, w): mean and log-variance, so that a latent is still
                                    drawn; `ids` (N, H, W) and `control` (N, H, W, 3) as the data set has them
    DIR/texts/00000.safetensors     `embeddings` (n, 77, D): a row for each chunk of each prompt

Each shard names in its metadata what it depends on, and a run that differs is refused. Shards are written
whole or not at all, so an interrupted cache goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm

from cldm.model import PRECISIONS
from cldm.tensor_files import CheckpointError, read_metadata, read_tensors
from cldm.tensor_writing import write_tensors
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.latent import LatentModel, channels_first
from ldm.modules.encoders.modules import TextEmbedder
from ldm.modules.encoders.tokenizer import CONTEXT_LENGTH

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

Identity = dict[str, Any]  # JSON values
SAMPLES, TEXTS = "samples", "texts"
SHARD_BYTES = 1 << 28
TEXTS_AT_ONCE, TEXTS_IN_SHARD = 32, 1024


class Rows(Protocol):
    """Rows before they are encoded: a data set for torch's loader, whose `jpg` becomes moments."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        """`jpg` (H, W, 3) in [-1, 1], and arrays that are kept as they are."""
        ...


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """One process at a time, as the ranks of a run may be started together; the others then find all done."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / ".lock").open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest_of(*modules: nn.Module) -> str:
    """Digest of all parameters and buffers of modules, whatever file they came from."""
    found = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()[:32]


def encoder_digest(first_stage: AutoencoderKL) -> str:
    """Digest of the part of an autoencoder that makes moments; decoders differ between releases of one."""
    return digest_of(first_stage.encoder, first_stage.quant_conv)


def check_identity(path: Path, expected: Identity) -> None:
    """Refuse a shard that was made of something else, and say of what."""
    try:
        found = json.loads(read_metadata(path).get("identity", "null"))
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no part of a cache; choose another data.cache, or remove it")
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"{path.parent.parent}: expected a cache of {name} {expected.get(name)}, found one of"
                f" {found.get(name)}; choose another data.cache, or remove that folder"
            )


# -- samples -----------------------------------------------------------------------------------------------


def write_samples(
    folder: str | Path,
    rows: Rows,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    model: LatentModel,
    identity: Identity,
    *,
    dtype: str = "32",
    batch_size: int = 8,
    num_workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Encode the rows of which there are no shards yet, on the device of the model, with a progress bar.

    Raises
        CheckpointError  the folder holds a cache of something else
        ValueError       a frame that cannot be read; what was encoded before it stays
    """
    first = encoded(collate([rows[0]]), model, dtype, 1)
    in_shard = max(1, shard_bytes // sum(tensor.nbytes for tensor in first.values()))
    made_of = {"first_stage": encoder_digest(model.first_stage_model), "dtype": dtype, "rows": len(rows)}
    identity = {**identity, **made_of}
    missing = missing_shards(Path(folder) / SAMPLES, len(rows), in_shard, identity)
    loader = DataLoader(
        rows,
        batch_sampler=[
            batch
            for wanted in missing.values()
            for batch in BatchSampler(wanted, batch_size, drop_last=False)
        ],
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator(),  # the run's own would be one draw further with a cache than without
    )
    total = sum(len(wanted) for wanted in missing.values())
    with tqdm(total=total, desc=f"encoding into {folder}", unit="view", disable=not total) as bar:
        batches = iter(loader)
        for path, wanted in missing.items():
            parts: list[dict[str, Tensor]] = []
            while sum(len(part["moments"]) for part in parts) < len(wanted):
                parts.append(encoded(next(batches), model, dtype, batch_size))
                bar.update(len(parts[-1]["moments"]))
            tensors = {name: torch.cat([part[name] for part in parts]) for name in first}
            write_tensors(path, tensors, {"identity": json.dumps(identity)})


def missing_shards(folder: Path, total: int, in_shard: int, identity: Identity) -> dict[Path, range]:
    """Rows of each shard that is not there yet, by its file; those that are there are checked."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, total, in_shard)
    rows = {
        folder / f"{number:05d}.safetensors": range(start, min(total, start + in_shard))
        for number, start in enumerate(starts)
    }
    found = sorted(folder.glob("*.safetensors"))
    for path in found:
        check_identity(path, identity)
        if path not in rows:
            raise CheckpointError(
                f"{path} is none of {len(rows)} shards of this cache; remove {folder.parent}"
            )
    return {path: wanted for path, wanted in rows.items() if path not in found}


@torch.no_grad()
def encoded(batch: Mapping[str, Any], model: LatentModel, dtype: str, batch_size: int) -> dict[str, Tensor]:
    """A batch of rows with moments (B, 2C, h, w) instead of photos.

    What a network makes of an image depends on the number of images beside it, in the last bits; so a smaller
    batch is filled up, and training with that batch size is bit by bit the same with a cache and without.
    """
    images, count = channels_first(batch["jpg"], model.device), len(batch["jpg"])
    images = torch.cat([images, images[-1:].expand(batch_size - count, -1, -1, -1)])
    moments = model.encode_first_stage(images).parameters[:count]
    kept = {name: torch.as_tensor(value) for name, value in batch.items() if name != "jpg"}
    return {"moments": moments.to("cpu", PRECISIONS[dtype]), **kept}


# -- texts -------------------------------------------------------------------------------------------------


class TextTable:
    """Embeddings of known prompts, mapped from their shards; called as a text encoder is."""

    def __init__(self, folder: str | Path) -> None:
        self.rows: dict[str, Tensor] = {}
        for path in sorted((Path(folder) / TEXTS).glob("*.safetensors")):
            embeddings = read_tensors(path)["embeddings"]
            for text, start, stop in json.loads(read_metadata(path)["texts"]):
                self.rows[text] = embeddings[start:stop]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """B prompts -> (B, 77 n, D) float32, n the chunks of the longest; others get empty ones.

        Raises
            KeyError  a prompt that was not embedded
        """
        found = [self.rows[text] for text in texts]
        chunks = max(len(rows) for rows in found)
        blank = self.rows[""]
        whole = [torch.cat([rows, *[blank] * (chunks - len(rows))]) for rows in found]
        return torch.stack(whole).flatten(1, 2).float()


def write_texts(
    folder: str | Path, texts: Iterable[str], encoder: TextEmbedder, *, dtype: str = "32"
) -> TextTable:
    """Embed the prompts that are not there yet, with a progress bar, and return the table of all."""
    target = Path(folder) / TEXTS
    target.mkdir(parents=True, exist_ok=True)
    identity = {"text_encoder": digest_of(encoder), "dtype": dtype}
    shards = sorted(target.glob("*.safetensors"))
    for path in shards:
        check_identity(path, identity)
    table = TextTable(folder)
    new = sorted({"", *texts} - set(table.rows))
    with tqdm(total=len(new), desc="embedding prompts", unit="prompt", disable=len(new) < 2) as bar:
        for number, start in enumerate(range(0, len(new), TEXTS_IN_SHARD), len(shards)):
            embeddings, places = embedded(new[start : start + TEXTS_IN_SHARD], encoder, bar)
            notes = {"identity": json.dumps(identity), "texts": json.dumps(places)}
            path = target / f"{number:05d}.safetensors"
            write_tensors(path, {"embeddings": embeddings.to(PRECISIONS[dtype])}, notes)
    return TextTable(folder) if new else table


@torch.no_grad()
def embedded(
    texts: Sequence[str], encoder: TextEmbedder, bar: tqdm
) -> tuple[Tensor, list[tuple[str, int, int]]]:
    """Embeddings (n, 77, D) of the chunks of prompts; and the range of chunks of each prompt."""
    chunks: list[Tensor] = []
    places = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[start : start + TEXTS_AT_ONCE]
        together = encoder(some).unflatten(1, (-1, CONTEXT_LENGTH)).cpu()
        for text, rows in zip(some, together, strict=True):
            own = rows[: encoder.tokenize([text]).shape[1]]
            places.append((text, len(chunks), len(chunks) + len(own)))
            chunks += own
        bar.update(len(some))
    return torch.stack(chunks), places
