"""Data sets with photos in `images/<split>` and label maps in `annotations/<split>`, paired by stem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from datasets.segmentation import SegmentationDataset, files_by_stem


class TwoFolderDataset(SegmentationDataset):
    """Photos as `.jpg` and label maps as `.png`, in a folder for each split."""

    folders: ClassVar[Mapping[str, str]]  # of a split, under the name that every data set has for it

    @classmethod
    def folder_of(cls, split: str) -> str:
        """Name of the folder of a split, which may be given by either name."""
        return cls.folders.get(split, split)

    @classmethod
    def find_photos(cls, root: Path, split: str) -> dict[str, Path]:
        """Photo by stem."""
        return files_by_stem(root / "images" / cls.folder_of(split), {".jpg", ".jpeg"})

    @classmethod
    def find_label_maps(cls, root: Path, split: str) -> dict[str, Path]:
        """Label map by stem."""
        return files_by_stem(root / "annotations" / cls.folder_of(split), {".png"})

    @classmethod
    def splits(cls, root: Path) -> list[str]:
        """Folders of images and annotations."""
        found = [*(root / "images").glob("*/"), *(root / "annotations").glob("*/")]
        return sorted({folder.name for folder in found if folder.is_dir()})
