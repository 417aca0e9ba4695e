"""FID and KID: features and kernel distance by torch-fidelity, moments and Frechet distance in float64."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_kid import (
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    kid_features_to_metric,
)
from torch_fidelity.version import __version__ as fidelity_version

from cldm.digests import sha256_of
from cldm.tensor_files import CheckpointError, read_tensors
from metrics.blocks import Block
from metrics.frechet import FeatureMoments

SEED = 2020  # torch-fidelity's own, of the subsets of KID

Extract = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""(n, H, W, 3) images -> (n, D) features."""


class FeatureWork:
    """Features of each image."""

    def __init__(self, name: str, extract: Extract, identity: Mapping[str, Any]) -> None:
        self.name, self.extract, self.identity = name, extract, identity

    def __call__(self, block: Block) -> dict[str, NDArray[Any]]:
        """One row for each image."""
        return {"features": self.extract(block.images)}


def load_inception(path: Path, layer: str, device: torch.device) -> FeatureExtractorInceptionV3:
    """The Inception of torch-fidelity, that of pytorch-fid and TensorFlow, with the weights of a file.

    layer  one of metrics.protocol.LAYERS
    """
    # torch-fidelity unpickles whatever a file holds, so it gets a file that was made here of plain tensors.
    content = io.BytesIO()
    torch.save(read_tensors(path), content)
    content.seek(0)
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [layer], feature_extractor_weights_path=content
        )
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} holds no weights of the Inception of the FID; docs/evaluation.md says which file does"
        ) from error
    return network.to(device)


def inception_work(path: Path, layer: str, device: torch.device, identity: Mapping[str, Any]) -> FeatureWork:
    """Features of the Inception at a layer; it is loaded when the first block needs it."""

    @cache
    def network() -> FeatureExtractorInceptionV3:
        return load_inception(path, layer, device)

    @torch.no_grad()
    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous()
        return network()(pixels)[0].float().cpu().numpy()

    made_by = {"engine": f"torch-fidelity {fidelity_version}", "layer": layer, "weights": sha256_of(path)}
    return FeatureWork("inception", extract, {**identity, **made_by})


def moments_of(parts: Iterable[NDArray[np.floating]]) -> FeatureMoments:
    """Moments of features that come in parts."""
    merged: FeatureMoments | None = None
    for part in parts:
        found = FeatureMoments.of(part)
        merged = found if merged is None else merged.merge(found)
    if merged is None:
        raise ValueError("expected features of at least one image, found none")
    return merged


def kernel_distance(
    real: Iterable[NDArray[np.floating]],
    fake: Iterable[NDArray[np.floating]],
    *,
    subsets: int,
    subset_size: int,
) -> dict[str, Any]:
    """KID (Binkowski et al. 2018, arXiv:1801.01401): mean and deviation over drawn subsets.

    Features lie on disk, so only those of a subset are in memory. With fewer images than a subset is to have,
    it has as many as there are.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = [on_disk(parts, Path(folder) / f"{i}.bin") for i, parts in enumerate((real, fake))]
        size = min(subset_size, *(len(some) for some in rows))
        found = kid_features_to_metric(
            *rows, kid_subsets=subsets, kid_subset_size=size, rng_seed=SEED, verbose=False
        )
    return {
        "mean": found[KEY_METRIC_KID_MEAN],
        "deviation": found[KEY_METRIC_KID_STD],
        "subsets": subsets,
        "subset_size": size,
    }


def on_disk(parts: Iterable[NDArray[np.floating]], path: Path) -> Tensor:
    """(N, D) float32 of parts, mapped from a file."""
    count = width = 0
    with path.open("wb") as file:
        for part in as_float32(parts):
            file.write(part.tobytes())
            count, width = count + len(part), part.shape[1]
    if not count:
        raise ValueError("expected features of at least one image, found none")
    return torch.from_numpy(np.memmap(path, np.float32, "r+", shape=(count, width)))


def as_float32(parts: Iterable[NDArray[np.floating]]) -> Iterator[NDArray[np.float32]]:
    """The same parts in the precision of the engine."""
    for part in parts:
        yield np.ascontiguousarray(part, np.float32)
