"""Cityscapes, and anything written in its tree: leftImg8bit and gtFine by split and city."""

from __future__ import annotations

from pathlib import Path

from datasets.label_space import LabelSpace
from datasets.segmentation import SegmentationDataset, index_by_stem

PHOTO = "_leftImg8bit.png"
LABEL_IDS = "_gtFine_labelIds.png"
TRAIN_ID_ENDING = "_labelTrainIds"
TRAIN_IDS = f"_gtFine{TRAIN_ID_ENDING}.png"


class CityscapesDataset(SegmentationDataset):
    """Street scenes with 19 classes.

    `labelTrainIds` files are used where somebody made them; the download has only `labelIds`, from
    which they are derived. Photos and maps pair by city and frame number.
    """

    label_space = "cityscapes"
    layout = "leftImg8bit/{split}/<city>/*_leftImg8bit.png and gtFine/{split}/<city>/*_gtFine_labelIds.png"
    source = "https://www.cityscapes-dataset.com/"
    default_root = "data/cityscapes"
    default_size = (512, 1024)
    default_prompt = "City road scenes."

    @classmethod
    def find_photos(cls, root: Path, split: str) -> dict[str, Path]:
        """Photo by stem (`aachen_000000_000019`)."""
        return index_by_stem((root / "leftImg8bit" / split).glob(f"*/*{PHOTO}"), PHOTO)

    @classmethod
    def find_label_maps(cls, root: Path, split: str) -> dict[str, Path]:
        """Label map by stem; the train-id file of a frame wins over its file of label ids."""
        folder = root / "gtFine" / split
        derived = index_by_stem(folder.glob(f"*/*{LABEL_IDS}"), LABEL_IDS)
        ready = index_by_stem(folder.glob(f"*/*{TRAIN_IDS}"), TRAIN_IDS)
        maps = derived | ready
        if split == "test":
            cls._refuse_withheld(root, maps)
        return maps

    @classmethod
    def splits(cls, root: Path) -> list[str]:
        """Folders of leftImg8bit and gtFine."""
        folders = [*(root / "leftImg8bit").glob("*/"), *(root / "gtFine").glob("*/")]
        return sorted({folder.name for folder in folders if folder.is_dir()})

    @classmethod
    def holds_train_ids(cls, path: Path) -> bool:
        """True of `labelTrainIds` files."""
        return path.stem.endswith(TRAIN_ID_ENDING)

    @classmethod
    def with_label_ids(cls, path: Path) -> Path:
        """The `labelIds` file beside a `labelTrainIds` file."""
        other = path.with_name(path.name.replace(TRAIN_IDS, LABEL_IDS))
        return other if other.is_file() else path

    @classmethod
    def _refuse_withheld(cls, root: Path, maps: dict[str, Path]) -> None:
        """The benchmark keeps its test labels: the download has none, or maps that are void all over."""
        folder = root / "gtFine" / "test"
        advice = "The benchmark withholds the test labels: use split 'val'."
        if not maps:
            raise FileNotFoundError(f"{folder}: expected label maps of split 'test', found none. {advice}")
        first = min(maps.values())
        if (cls.read_train_ids(first) == LabelSpace.void).all():
            raise ValueError(f"{folder}: expected label maps with classes, {first} is all void. {advice}")
