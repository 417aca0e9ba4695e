"""ADE20K as the scene parsing benchmark of 150 classes has it (ADEChallengeData2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from datasets.two_folders import TwoFolderDataset


class ADE20KDataset(TwoFolderDataset):
    """Scenes with 150 classes; 0 in a file is void, and some photos are grey."""

    label_space = "ade20k"
    layout = "images/{split}/*.jpg and annotations/{split}/*.png"
    source = "http://sceneparsing.csail.mit.edu/"
    folders: ClassVar[Mapping[str, str]] = {"train": "training", "val": "validation"}
    default_root = "data/ade20k"
    default_size = (512, 512)
    default_prompt = "Photorealistic and diverse images depicting various scenes"
