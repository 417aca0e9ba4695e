"""Photos, or what a cache holds of them, with label maps at the size of the latent."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.base import FramedDataset
from datasets.cached import CachedDataset, ViewRows
from datasets.framing import Views
from datasets.label_space import Ids, Size, resize_labels


class LatentRows:
    """Every view of every frame, for a torch DataLoader with `datasets.cached.collate_rows`.

    latent  (h, w)
    cached  whose moments are read; without one photos are
    """

    def __init__(
        self, source: FramedDataset, views: Views, latent: Size, cached: CachedDataset | None = None
    ) -> None:
        self.photos, self.latent, self.cached = ViewRows(source, views), latent, cached

    def __len__(self) -> int:
        """Number of rows, which are in the order of frames, then of views."""
        return len(self.photos)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """`label` (h, w) uint8 train ids, with `jpg` (H, W, 3) in [-1, 1] or `moments` (2C, h, w)."""
        if self.cached is not None:
            moments = self.cached.read("moments", row).astype(np.float32)
            return {"moments": moments, "label": self.label(self.cached.view(row).ids, row)}
        found = self.photos[row]
        if "fault" in found:
            return found
        return {"jpg": found["jpg"], "label": self.label(found.get("ids"), row)}

    def label(self, ids: Ids | None, row: int) -> NDArray[np.uint8]:
        """Train ids (h, w) of file ids (H, W)."""
        source = self.photos.source
        key = source.key_of(row // len(self.photos.views))
        if ids is None or source.space is None:
            raise ValueError(f"{key}: expected a label map with each photo, found none")
        return source.space.to_train_ids(resize_labels(ids, self.latent), where=key)
