"""What the tests of the evaluation share: networks with random weights, a small tree, samples of its maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch_fidelity.feature_extractor_inceptionv3 as engine
import torchvision
from house import ROOT
from numpy.typing import NDArray
from oracles import randomize

import evaluate
from cldm.digests import fingerprint
from cldm.pictures import write_png
from cldm.tensor_writing import write_tensors
from datasets.files import read_image
from datasets.streets.dataset import StreetsDataset
from datasets.streets.tree import Plan, make_tree

JUDGE = ROOT / "models/streets_judge.safetensors"
SIZE = (64, 128)
VALIDATION = 7
PROTOCOL = """
name: small
version: 1
metrics: [fid, kid, segmentation, diversity, streets_features]
resize: bicubic
samples: {samples}
inception_layer: "64"
kid_subsets: 10
kid_subset_size: 5
resamples: 200
least: {{fid: 2, kid: 2, streets_features: 2}}
data:
  streets:
    label_space: cityscapes
    size: [64, 128]
    segmenter: {{kind: judge, weights: judge}}
"""


class SmallEvaluation:
    """Files of a small evaluation, and the command that measures them.

    engines  with weights of Inception and AlexNet
    """

    def __init__(self, folder: Path, *, engines: bool = True) -> None:
        self.folder = folder
        self.tree = make_small_tree(folder / "tree")
        self.checkpoint = write_checkpoint(folder / "control.safetensors", self.tree)
        self.fake = write_samples(folder / "gen", self.tree, checkpoint=self.checkpoint, seeds=2)
        self.protocol = write_protocol(folder / "small.yaml")
        self.engines = engines
        if engines:
            self.inception = write_inception(folder / "inception.pth")
            self.alexnet = write_alexnet(folder / "alexnet.pth")

    def words(self, out: Path, *more: object, fake: Path | None = None, weights: bool = True) -> list[str]:
        """Arguments of evaluate.py."""
        found = [fake or self.fake, "--ckpt", self.checkpoint, "--protocol", self.protocol, "--out", out]
        found += ["--cache", self.folder / "cache", "--segmenter", JUDGE]
        if self.engines and weights:
            found += ["--inception", self.inception, "--alexnet", self.alexnet]
        return [str(word) for word in (*found, *more)]

    def card(self, out: Path, *more: object, **options: Any) -> dict[str, Any]:
        """The card that evaluate.py writes."""
        evaluate.main(self.words(out, *more, **options))
        return json.loads((out / "card.json").read_text())


def write_inception(path: Path) -> Path:
    """The Inception of torch-fidelity with random weights, in the form of the published file."""
    network_class = engine.FeatureExtractorInceptionV3
    with (
        patch.object(engine, "load_state_dict_from_url", lambda *_, **__: {}),
        patch.object(network_class, "load_state_dict", lambda *_, **__: None),
    ):
        network = network_class("random", ["2048"])
    torch.save(randomize(network, gain=1.4).state_dict(), path)
    return path


def write_alexnet(path: Path) -> Path:
    """The convolutions of torchvision's AlexNet with random weights, named as in the published file."""
    network = randomize(torchvision.models.alexnet(weights=None).features, gain=1.0)
    torch.save({f"features.{name}": value for name, value in network.state_dict().items()}, path)
    return path


def write_protocol(path: Path, samples: int = 0, **changes: str) -> Path:
    """A protocol for the small tree; `changes` replace lines by their key."""
    lines = [line for line in PROTOCOL.format(samples=samples).splitlines() if line]
    lines = [f"{k}: {changes[k]}" if (k := line.partition(":")[0]) in changes else line for line in lines]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_small_tree(root: Path) -> Path:
    """A Streets tree of some frames."""
    make_tree(root, Plan(size=SIZE, train=3, val=VALIDATION), workers=1)
    return root


def write_checkpoint(path: Path, root: Path) -> Path:
    """A file that records a training run on the tree."""
    run = f"data:\n  name: streets\n  root: {root}\n  split: null\n  val_split: val\n"
    write_tensors(path, {"nothing": torch.zeros(1)}, {"run_config": run})
    return path


def write_samples(
    folder: Path,
    tree: Path,
    *,
    checkpoint: Path | None = None,
    split: str = "val",
    seeds: int = 1,
    noise: float = 20.0,
) -> Path:
    """Photos with noise, as `generate.py` writes its images."""
    photos, maps = StreetsDataset.find_photos(tree, split), StreetsDataset.label_maps(tree, split)
    for number, (key, hint) in enumerate(maps.items()):
        for seed in range(seeds):
            settings: dict[str, Any] = {
                "hint": hint.name,
                "hint_fingerprint": fingerprint(hint),
                "palette": "cityscapes",
                "prompt": f"a street {number}",
                "seed": seed,
                "steps": 20,
            }
            if checkpoint:
                settings |= {"checkpoint": checkpoint.name, "checkpoint_fingerprint": fingerprint(checkpoint)}
            image = noisy(read_image(photos[key]), noise, 100 * number + seed)
            target = folder / key.partition("_")[0] / f"{hint.stem}_seed{seed}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_png(target, image, settings)
    write_png(folder / "contact_sheet_001.png", np.zeros((8, 8, 3), np.uint8))
    return folder


def noisy(image: NDArray[np.uint8], strength: float, seed: int) -> NDArray[np.uint8]:
    """An image with Gaussian noise."""
    noise = np.random.default_rng(seed).normal(size=image.shape) * strength
    return (image + noise).clip(0, 255).round().astype(np.uint8)
