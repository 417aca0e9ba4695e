"""The data sets by name. Importing this loads no data set, no numpy and no torch."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Dataset(Protocol):
    """What a torch DataLoader needs of a data set."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, object]:
        """One sample."""
        ...


@dataclass(frozen=True)
class DatasetEntry:
    """One row of the registry."""

    module: str  # inside this package
    class_name: str
    default_root: str
    expected: tuple[str, ...]  # what the root must hold
    source: str  # where it is obtained
    label_space: str | None  # a name for LabelSpace.load; None without label maps
    prepare: str | None = None  # a function of the module that makes the data at a root, if they can be made

    def load(self) -> Callable[..., Dataset]:
        """The class, imported now."""
        return self._find(self.class_name)

    def make(self, root: str | Path | None = None, **options: object) -> None:
        """Make the data where they are missing; for an entry that has `prepare`."""
        if self.prepare is None:
            raise ValueError(f"{self.default_root} cannot be made here; it is obtained from {self.source}")
        self._find(self.prepare)(self.default_root if root is None else root, **options)

    def _find(self, name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), name)


DATASETS: dict[str, DatasetEntry] = {
    "ade20k": DatasetEntry(
        module="ade20k",
        class_name="ADE20KDataset",
        default_root="data/ade20k",
        expected=("images", "annotations"),
        source="http://sceneparsing.csail.mit.edu/",
        label_space="ade20k",
    ),
    "cityscapes": DatasetEntry(
        module="cityscapes",
        class_name="CityscapesDataset",
        default_root="data/cityscapes",
        expected=("leftImg8bit", "gtFine"),
        source="https://www.cityscapes-dataset.com/",
        label_space="cityscapes",
    ),
    "cocostuff": DatasetEntry(
        module="cocostuff",
        class_name="COCOStuffDataset",
        default_root="data/cocostuff",
        expected=("images", "annotations"),
        source="https://github.com/nightrome/cocostuff",
        label_space="cocostuff",
    ),
    "fill50k": DatasetEntry(
        module="fill50k",
        class_name="Fill50kDataset",
        default_root="training/fill50k",
        expected=("prompt.json", "source", "target"),
        source="https://huggingface.co/lllyasviel/ControlNet/tree/main/training",
        label_space=None,
    ),
    "gta": DatasetEntry(
        module="gta",
        class_name="GTADataset",
        default_root="data/gta",
        expected=("images", "labels"),
        source="https://download.visinf.tu-darmstadt.de/data/from_games/",
        label_space="cityscapes",
    ),
    "streets": DatasetEntry(
        module="streets",
        class_name="StreetsDataset",
        default_root="data/streets",
        expected=("leftImg8bit", "gtFine", "captions.json"),  # the last is written when all is rendered
        source="python tool_make_streets.py",
        label_space="cityscapes",
        prepare="make_tree",
    ),
    "triples": DatasetEntry(
        module="triples",
        class_name="TriplesDataset",
        default_root="data/triples",
        expected=(),
        source="files of your own",
        label_space=None,
    ),
}

OTHER_NAMES = {"coco-stuff": "cocostuff"}  # what SCP-Diff's flags call them


def registered_name(name: str) -> str:
    """The name of a data set in DATASETS, also if it is given by one of OTHER_NAMES."""
    return OTHER_NAMES.get(name, name)


def find_entry(name: str) -> DatasetEntry:
    """The registry row of a data set; an unknown name is answered with the near one."""
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        suggestion = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(DATASETS)}.{suggestion}")
    return DATASETS[name]


def create_dataset(name: str, **kwargs: object) -> Dataset:
    """A data set by name, at its default root unless `root` is given."""
    entry = find_entry(name)
    cls = entry.load()
    options = {"root": entry.default_root, **kwargs}
    known = options_of(cls)
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"data set {name} has no option {unknown[0]!r}; it takes {', '.join(known)}")
    return cls(**options)


def create_labelled(name: str, **options: object) -> Any:
    """A data set with label maps whose samples are of one size; options that are None are not given.

    Raises
        ValueError  no label maps, no size, or an option that the data set does not have
    """
    source: Any = create_dataset(
        name, **{option: value for option, value in options.items() if value is not None}
    )
    if getattr(source, "space", None) is None:
        raise ValueError(f"expected a data set with label maps, found {name}, which has none")
    if source.size is None:
        raise ValueError("expected --resolution H W, as the frames have no size of their own, found none")
    return source


def options_of(cls: Callable[..., Dataset]) -> list[str]:
    """Names of the options of a class, those that it hands on to its bases too."""
    bases = getattr(cls, "__mro__", (cls,))
    found = [
        p for base in bases if "__init__" in vars(base) for p in inspect.signature(base).parameters.values()
    ]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return list(dict.fromkeys(p.name for p in found if p.kind not in kinds))


def missing_paths(name: str, root: str | Path | None = None) -> list[Path]:
    """What a data set needs and the root does not hold; looks at names only, so it costs nothing."""
    entry = find_entry(name)
    folder = Path(entry.default_root if root is None else root)
    if not folder.is_dir():
        return [folder]
    return [folder / name for name in entry.expected if not (folder / name).exists()]
