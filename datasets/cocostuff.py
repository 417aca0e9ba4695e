"""COCO-Stuff 164k: the photos of COCO 2017 with 80 classes of things and 91 of stuff."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from datasets.two_folders import TwoFolderDataset


class COCOStuffDataset(TwoFolderDataset):
    """Scenes with 171 classes; a file holds 0..181 without eleven ids that were removed, and 255 for void."""

    label_space = "cocostuff"
    layout = "images/{split}/*.jpg and annotations/{split}/*.png (stuffthingmaps_trainval2017)"
    source = "https://github.com/nightrome/cocostuff"
    folders: ClassVar[Mapping[str, str]] = {"train": "train2017", "val": "val2017"}
    default_root = "data/cocostuff"
    default_size = (384, 512)
    default_prompt = "high quality, detailed."
