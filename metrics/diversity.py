"""Diversity: mean LPIPS distance of all pairs of samples of one map (Zhu et al. 2017, arXiv:1711.11586)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics import __version__ as torchmetrics_version
from torchmetrics.functional.image.lpips import _NoTrainLpips

from cldm.digests import sha256_of
from cldm.tensor_files import CheckpointError, read_tensors
from metrics.blocks import Block

PAIRS_AT_ONCE = 8


class DiversityWork:
    """Mean distance of the pairs of samples of each map that has several."""

    name = "diversity"

    def __init__(self, path: Path, device: torch.device, most: int, identity: Mapping[str, Any]) -> None:
        """Remember what to load when the first block needs it.

        path  weights of torchvision's AlexNet
        most  samples of a map that are compared
        """
        self.path, self.device, self.most = path, device, most
        made_by = {"engine": f"torchmetrics {torchmetrics_version}", "weights": sha256_of(path), "most": most}
        self.identity = {**identity, **made_by}

    @cached_property
    def network(self) -> _NoTrainLpips:
        """LPIPS."""
        return load_lpips(self.path).to(self.device)

    @torch.no_grad()
    def __call__(self, block: Block) -> dict[str, NDArray[Any]]:
        """One distance for each map with two samples or more."""
        images = torch.from_numpy(block.images).to(self.device).permute(0, 3, 1, 2)
        found = []
        for rows in block.groups():
            pairs = list(combinations(range(rows.start, min(rows.stop, rows.start + self.most)), 2))
            if not pairs:
                continue
            total = 0.0
            for i in range(0, len(pairs), PAIRS_AT_ONCE):
                sides = torch.tensor(pairs[i : i + PAIRS_AT_ONCE], device=self.device).T
                a, b = (images[side].float() / 127.5 - 1 for side in sides)
                total += float(self.network(a, b).double().sum())
            found.append(total / len(pairs))
        return {"distances": np.array(found, np.float64)}


def load_lpips(path: Path) -> _NoTrainLpips:
    """LPIPS on AlexNet, its linear layers from torchmetrics, the network from a file.

    torchmetrics' own constructor fetches AlexNet from the net, so the network below is used.
    """
    network = _NoTrainLpips(net="alex", pnet_rand=True)
    given = {name.removeprefix("features."): value for name, value in read_tensors(path).items()}
    state = network.net.state_dict()  # named slice1.0.weight, where torchvision has features.0.weight
    try:
        filled = {name: given[name.partition(".")[2]] for name in state}
        network.net.load_state_dict(filled, strict=True)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds no weights of torchvision's AlexNet; docs/evaluation.md says which file does"
        ) from error
    return network
