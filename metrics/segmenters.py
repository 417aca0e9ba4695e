"""Segmenters: whatever says what each pixel shows, brought to one form."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cldm.digests import sha256_of
from cldm.tensor_files import read_metadata
from datasets.label_space import LabelSpace
from metrics.blocks import Block
from metrics.image_sets import read_predicted
from metrics.judge import Judgement, StreetsJudge
from metrics.segmentation import Segmenter, confusion_matrices, margins_of

WEIGHT_FILES = ("*.safetensors", "*.bin")
AT_ONCE = 4  # images through a network of transformers

Segment = Callable[[Block], NDArray[np.integer]]
"""A block -> (n, H, W) train ids."""


class SegmentationWork:
    """Confusion of each image with its map."""

    name = "segmentation"

    def __init__(self, segment: Segment, space: LabelSpace, identity: Mapping[str, Any]) -> None:
        self.segment, self.space, self.identity = segment, space, identity

    def __call__(self, block: Block) -> dict[str, NDArray[Any]]:
        """(n, 3, K) margins of each image, and the (1, K, K) matrix of all of them."""
        if block.labels is None:
            raise ValueError(f"expected a label map for each image, found none for {block.items[0].key}")
        counts = confusion_matrices(block.labels, self.segment(block), self.space.num_classes)
        return {"margins": margins_of(counts), "confusion": counts.sum(axis=0)[None]}


def from_images(segmenter: Segmenter) -> Segment:
    """A segmenter that needs nothing but the images."""
    return lambda block: segmenter(block.images)


def from_maps(space: LabelSpace) -> Segment:
    """Maps that a segmenter elsewhere made, one for each image."""

    def segment(block: Block) -> NDArray[np.integer]:
        size = block.images.shape[1:3]
        paths = [item.predicted for item in block.items]
        return np.stack([read_predicted(path, space, size) for path in paths if path is not None])

    return segment


class OneJudgement:
    """The judge's labels and features of the same images, computed once."""

    def __init__(self, judge: StreetsJudge) -> None:
        self.judge = judge
        self.last: tuple[NDArray[np.uint8] | None, Judgement | None] = (None, None)

    def of(self, images: NDArray[np.uint8]) -> Judgement:
        """What the judge says of (n, H, W, 3) images."""
        seen, found = self.last
        if seen is not images or found is None:
            found = self.judge.judge(images)
            self.last = (images, found)
        return found

    def labels(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(n, H, W) train ids."""
        return self.of(images).labels

    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, 64) features."""
        return self.of(images).features


class TransformersSegmenter:
    """A semantic segmenter of transformers from a local folder; called with images it is a `Segmenter`.

    Images are taken at the size that they have, normalised as the folder's preprocessor says; scores are
    brought to that size (bilinear) before the best class is taken.
    """

    def __init__(self, folder: Path, space: LabelSpace, device: torch.device) -> None:
        config = read_json(folder / "config.json")
        kind = config.get("model_type")
        loaders = {"segformer": segformer_scores, "mask2former": mask2former_scores}
        if kind not in loaders:
            raise ValueError(f"{folder}: expected a model of {' or '.join(loaders)}, found {kind!r}")
        found = len(config.get("id2label") or {})
        if found != space.num_classes:
            raise ValueError(
                f"{folder}: expected a segmenter of the {space.num_classes} classes of {space.name}, found"
                f" one of {found}; name another with --segmenter"
            )
        self.scores, self.device = loaders[kind], device
        self.network = load_network(folder, kind).to(device).eval()
        steps = read_json(folder / "preprocessor_config.json")
        shape = (1, 3, 1, 1)
        mean, deviation = (steps.get(f"image_{name}", value) for name, value in NORMALISATION.items())
        self.mean, self.deviation = (torch.tensor(v, device=device).view(shape) for v in (mean, deviation))

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.integer]:
        """(n, H, W, 3) -> (n, H, W) train ids."""
        parts = [self.some(images[i : i + AT_ONCE]) for i in range(0, len(images), AT_ONCE)]
        return np.concatenate(parts)

    def some(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """As many as fit at once."""
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 255
        scores = self.scores(self.network((pixels - self.mean) / self.deviation), images.shape[1:3])
        return scores.argmax(dim=1).to(torch.uint8).cpu().numpy()


NORMALISATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}  # of ImageNet


def load_network(folder: Path, kind: str) -> torch.nn.Module:
    """The model of a folder; nothing is fetched."""
    from transformers import Mask2FormerForUniversalSegmentation, SegformerForSemanticSegmentation

    classes = {
        "segformer": SegformerForSemanticSegmentation,
        "mask2former": Mask2FormerForUniversalSegmentation,
    }
    try:
        return classes[kind].from_pretrained(folder, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{folder}: the model could not be read: {str(error).splitlines()[0]}") from error


def segformer_scores(answer: Any, size: tuple[int, ...]) -> Tensor:
    """(n, K, H, W) scores."""
    return F.interpolate(answer.logits, size, mode="bilinear", align_corners=False)


def mask2former_scores(answer: Any, size: tuple[int, ...]) -> Tensor:
    """(n, K, H, W) scores: classes of the queries, weighed by their masks (Cheng et al. 2022)."""
    classes = answer.class_queries_logits.softmax(dim=-1)[..., :-1]  # the last is none of them
    masks = F.interpolate(answer.masks_queries_logits, size, mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", classes, masks)


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; {} without one."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found {error}") from error
    return found if isinstance(found, dict) else {}


def kind_of(path: Path) -> str:
    """What a path given with --segmenter is, by its content: a key of metrics.protocol.SEGMENTERS."""
    if path.is_dir() and (path / "config.json").is_file():
        return "transformers"
    if path.is_file() and "judge" in read_metadata(path):
        return "judge"
    raise ValueError(f"{path}: expected a folder of transformers with its config.json, or a Streets judge")


def load_segmenter(path: Path, space: LabelSpace, device: torch.device) -> Segmenter:
    """The segmenter of a path given with --segmenter, for the classes of a label space."""
    if kind_of(path) == "transformers":
        return TransformersSegmenter(path, space, device)
    if space.name != "cityscapes":
        raise ValueError(f"{path}: the judge knows the classes of cityscapes, not those of {space.name}")
    return StreetsJudge.load(path, device)


def hash_of(path: Path) -> dict[str, Any]:
    """What a segmenter is: file or folder, and the hash of its weights."""
    if path.is_file():
        return {"file": path.name, "sha256": sha256_of(path)}
    files = sorted(p for pattern in WEIGHT_FILES for p in path.glob(pattern))
    names = [*files, *(path / name for name in ("config.json", "preprocessor_config.json"))]
    return {"folder": path.name, "sha256": {p.name: sha256_of(p) for p in names if p.is_file()}}
