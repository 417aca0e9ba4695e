"""Rare class sampling (Hoyer et al. 2022, DAFormer, section 3.2; used by DGInStyle): rare classes more often.

f_c is the share of class c among all labelled pixels, and P(c) = softmax((1 - f_c) / T). A sample draws a
class, then a frame among those with enough of it, then a window that shows it.
"""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from datasets.base import Sample
from datasets.files import write_text
from datasets.segmentation import SegmentationDataset

log = logging.getLogger(__name__)

TEMPERATURE = 0.01
LEAST_PIXELS = 3000  # of a class in a frame that is drawn for it
BY_FRAME, BY_PATH, BY_CLASS = (
    "sample_class_stats.json",
    "sample_class_stats_dict.json",
    "samples_with_class.json",
)


@dataclass(frozen=True)
class ClassStatistics:
    """Pixels of each class in each frame: `counts` (N, K), a row for each of `files`."""

    files: list[str]  # label maps
    counts: NDArray[np.int64]

    @property
    def shares(self) -> NDArray[np.float64]:
        """(K,) f_c."""
        return self.counts.sum(axis=0) / max(1, int(self.counts.sum()))

    def write(self, folder: str | Path) -> None:
        """The three files of DAFormer; keys are train ids, and a class that a frame lacks is left out."""
        shown = [{str(k): int(row[k]) for k in np.flatnonzero(row)} for row in self.counts]
        by_class = {
            str(k): [[self.files[i], int(self.counts[i, k])] for i in np.flatnonzero(self.counts[:, k])]
            for k in np.flatnonzero(self.counts.sum(axis=0))
        }
        content = {
            BY_FRAME: [{**row, "file": file} for row, file in zip(shown, self.files, strict=True)],
            BY_PATH: dict(zip(self.files, shown, strict=True)),
            BY_CLASS: by_class,
        }
        for name, value in content.items():
            write_text(Path(folder) / name, json.dumps(value))

    @classmethod
    def read(cls, folder: str | Path, num_classes: int) -> ClassStatistics:
        """Statistics that this project, DAFormer or DGInStyle wrote."""
        path = Path(folder) / BY_PATH
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            counts = np.zeros((len(rows), num_classes), np.int64)
            for i, row in enumerate(rows.values()):
                counts[i, [int(k) for k in row]] = list(row.values())
        except (json.JSONDecodeError, AttributeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{path}: expected pixels by train id (0..{num_classes - 1}) by label file, found {error};"
                " remove the file, and it is made again"
            ) from error
        return cls(list(rows), counts)


def measure_classes(dataset: SegmentationDataset) -> ClassStatistics:
    """Count the pixels of all label maps of a split, with a progress bar."""

    def count(path: Path) -> NDArray[np.int64]:
        return np.bincount(dataset.read_train_ids(path).ravel(), minlength=256)[: dataset.space.num_classes]

    files = [pair.labels for pair in dataset.pairs]
    with ThreadPoolExecutor() as pool:
        rows = list(tqdm(pool.map(count, files), total=len(files), desc="counting classes", unit="map"))
    return ClassStatistics([str(file) for file in files], np.stack(rows).astype(np.int64))


def class_chances(
    shares: NDArray[np.float64], present: NDArray[np.bool_], temperature: float
) -> NDArray[np.float64]:
    """(K,) P(c) over the classes of `present`; 0 for the others."""
    scores = np.where(present, (1 - shares) / temperature, -np.inf)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


class RareClassFrames:
    """A data set whose samples are drawn by class; for `datasets.stream.Stream`.

    Raises
        ValueError  statistics that do not belong to the frames
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        statistics: ClassStatistics,
        *,
        frames: Any = None,
        temperature: float = TEMPERATURE,
        least_pixels: int = LEAST_PIXELS,
    ) -> None:
        self.source = dataset if frames is None else frames  # the same frames, perhaps from a cache
        counts = counts_by_key(statistics)
        if lost := [pair.key for pair in dataset.pairs if pair.key not in counts]:
            raise ValueError(
                f"expected statistics of all {len(dataset)} frames, found none of {lost[0]} ({len(lost)} in"
                f" all); remove {BY_PATH} from the data root, and it is made again"
            )
        table = np.stack([counts[pair.key] for pair in dataset.pairs])
        enough = np.asarray(table > least_pixels, np.bool_)
        self.frames = [np.flatnonzero(column) for column in enough.T]
        if not enough.any():
            raise ValueError(
                f"expected frames with more than {least_pixels} pixels of a class, found none in {len(table)}"
            )
        shares = table.sum(axis=0) / max(1, int(table.sum()))
        self.chances = class_chances(shares, np.asarray(enough.any(axis=0)), temperature)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.source)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """A window that shows a class, which `rng` draws; the order of frames (`index`) plays no part."""
        train_id = int(rng.choice(len(self.chances), p=self.chances))
        return self.source.sample(int(rng.choice(self.frames[train_id])), rng, shown=train_id)


def counts_by_key(statistics: ClassStatistics) -> dict[str, NDArray[np.int64]]:
    """(K,) pixels of each frame, by its key, which the name of its label file begins with."""
    return {
        Path(file).stem.partition("_gtFine")[0].removesuffix("_labelTrainIds"): row
        for file, row in zip(statistics.files, statistics.counts, strict=True)
    }


def draw_rare_classes(dataset: Any, **options: Any) -> RareClassFrames:
    """A data set with rare class sampling; statistics are read from its root, or counted and kept there."""
    if not isinstance(dataset, SegmentationDataset):
        raise ValueError(
            f"expected a data set with label maps for rare classes, found {type(dataset).__name__}"
        )
    if (dataset.root / BY_PATH).is_file():
        statistics = ClassStatistics.read(dataset.root, dataset.space.num_classes)
    else:
        statistics = measure_classes(dataset)
        try:
            statistics.write(dataset.root)
            log.info("class statistics of %d frames are in %s", len(dataset), dataset.root / BY_PATH)
        except OSError as error:  # a read-only folder of data
            log.warning("the class statistics could not be kept: %s", error)
    return RareClassFrames(dataset, statistics, **options)
