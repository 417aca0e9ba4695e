"""GTA5 (Richter et al. 2016, Playing for Data): frames of a game with the classes of Cityscapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datasets.cityscapes import TRAIN_ID_ENDING
from datasets.files import read_labels
from datasets.label_space import RawIds
from datasets.segmentation import SegmentationDataset, index_by_stem

SPLITS = ("train", "val", "test")
LICENCE_PLATE = 34  # in its files; -1, that is 255, in those of Cityscapes
TRAIN_IDS = f"{TRAIN_ID_ENDING}.png"


class GTADataset(SegmentationDataset):
    """Photos in `images`, label ids in `labels`, both by number; a split is a list of numbers.

    The list is `<split>.txt` beside the folders. Without one `train` is all frames, as in DGInStyle. Maps of
    train ids that a converter wrote (`00001_labelTrainIds.png`) stand in where there are no label ids.
    """

    label_space = "cityscapes"
    layout = "images/*.png and labels/*.png, those of {split}.txt"
    source = "https://download.visinf.tu-darmstadt.de/data/from_games/"
    default_root = "data/gta"
    default_size = (512, 512)
    default_prompt = "City road scenes."

    @classmethod
    def find_photos(cls, root: Path, split: str) -> dict[str, Path]:
        """Photo by number."""
        return cls._of_split(root, split, index_by_stem((root / "images").glob("*.png"), ".png"))

    @classmethod
    def find_label_maps(cls, root: Path, split: str) -> dict[str, Path]:
        """Label map by number; label ids win over train ids."""
        files = sorted((root / "labels").glob("*.png"))
        train_ids = index_by_stem((f for f in files if cls.holds_train_ids(f)), TRAIN_IDS)
        label_ids = index_by_stem((f for f in files if not cls.holds_train_ids(f)), ".png")
        return cls._of_split(root, split, train_ids | label_ids)

    @classmethod
    def splits(cls, root: Path) -> list[str]:
        """Names of the lists."""
        return [split for split in SPLITS if (root / f"{split}.txt").is_file()] or ["train"]

    @classmethod
    def holds_train_ids(cls, path: Path) -> bool:
        """True of what a converter wrote."""
        return path.stem.endswith(TRAIN_ID_ENDING)

    @classmethod
    def read_raw_ids(cls, path: Path) -> RawIds:
        """Ids with the licence plate as Cityscapes has it."""
        ids = read_labels(path)
        return ids if cls.holds_train_ids(path) else np.where(ids == LICENCE_PLATE, ids.dtype.type(255), ids)

    @classmethod
    def _of_split(cls, root: Path, split: str, files: dict[str, Path]) -> dict[str, Path]:
        listed = root / f"{split}.txt"
        if listed.is_file():
            numbers = {Path(line.strip()).stem for line in listed.read_text(encoding="utf-8").splitlines()}
            return {number: path for number, path in files.items() if number in numbers}
        return files if split == "train" and cls.splits(root) == ["train"] else {}
