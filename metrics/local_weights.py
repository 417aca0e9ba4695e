"""Weights of the networks that measure: where each is obtained and put. Nothing is ever downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cldm.config import project_path
from cldm.digests import sha256_of


@dataclass(frozen=True)
class Weights:
    """One row of the table in docs/evaluation.md."""

    path: str  # where it is looked for
    what: str
    source: str
    licence: str
    sha256: str | None  # of a file; None where whatever lies there is taken and its hash recorded
    flag: str  # that names another place


WEIGHTS = {
    "inception": Weights(
        "models/weights-inception-2015-12-05-6726825d.pth",
        "Inception of the FID, TensorFlow's of 2015",
        "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0",
        "Apache-2.0",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "--inception",
    ),
    "alexnet": Weights(
        "models/alexnet-owt-7be5be79.pth",
        "AlexNet of LPIPS",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "BSD-3-Clause",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        "--alexnet",
    ),
    "judge": Weights(
        "models/streets_judge.safetensors",
        "judge of the Streets lab",
        "this repository, or: python tool_train_streets_judge.py --out models/streets_judge.safetensors",
        "Apache-2.0",
        None,
        "--segmenter",
    ),
    "segformer-cityscapes": Weights(
        "models/segformer-b5-finetuned-cityscapes-1024-1024",
        "SegFormer-B5 of Cityscapes",
        "https://huggingface.co/nvidia/segformer-b5-finetuned-cityscapes-1024-1024",
        "NVIDIA source code licence, not commercial",
        None,
        "--segmenter",
    ),
    "segformer-ade20k": Weights(
        "models/segformer-b5-finetuned-ade-640-640",
        "SegFormer-B5 of ADE20K",
        "https://huggingface.co/nvidia/segformer-b5-finetuned-ade-640-640",
        "NVIDIA source code licence, not commercial",
        None,
        "--segmenter",
    ),
}


class MissingWeights(FileNotFoundError):
    """Weights that are not there; the sentence says where they are obtained and where they go."""


def find_weights(name: str, given: Path | None = None) -> Path:
    """The file or folder of a row; `given` is taken as it is.

    Raises
        MissingWeights  nothing is there
        ValueError      something else is there
    """
    row = WEIGHTS[name]
    if given is not None:
        if not given.exists():
            raise MissingWeights(f"{row.flag} {given} does not exist")
        return given
    path = project_path(row.path)
    if not path.exists():
        raise MissingWeights(
            f"{row.what}: found no {row.path}; obtain it from {row.source} and put it there, or name another"
            f" place with {row.flag}"
        )
    if row.sha256 is not None and (found := sha256_of(path)) != row.sha256:
        raise ValueError(
            f"{row.path}: expected the file with sha256 {row.sha256[:12]}..., found {found[:12]}...; obtain"
            f" it again from {row.source}, or name it with {row.flag} if it is meant to differ"
        )
    return path
