"""Your own data: rows of a target image, a control image and a prompt, from JSON lines or from folders."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from datasets.base import Choose, ControlSample, FramedDataset, View, check_size, resize_image
from datasets.files import IMAGE_SUFFIXES, read_image, read_labels
from datasets.label_space import LabelSpace, Rgb, Size, resize_labels
from datasets.segmentation import check_same_frame, files_by_stem

# What a column is called: here, in fill50k, in the lists of diffusers and DGInStyle.
COLUMNS = {
    "target": ("target", "image"),
    "control": ("control", "source", "conditioning_image"),
    "prompt": ("prompt", "text"),
    "label": ("label",),
}
FOLDERS = ("target", "control", "prompt", "label")


@dataclass(frozen=True)
class Row:
    """One target with what belongs to it."""

    target: Path
    control: Path
    prompt: str
    label: Path | None = None


class TriplesDataset(FramedDataset):
    """Target, control and prompt, of one size.

    A split is `<split>.jsonl`, `<split>/metadata.jsonl` or the folders `<split>/target`, `<split>/control`
    and `<split>/prompt` (.txt files), paired by stem; the training split may also lie in the root itself, as
    `metadata.jsonl`, `prompt.json` or folders. Controls are resized to the nearest pixel, as in sampling.
    """

    source = "files of your own"
    lists: ClassVar[tuple[str, ...]] = ("metadata.jsonl", "prompt.json")
    default_root = "data/triples"
    default_size = None
    default_prompt = "{caption}"

    def __init__(
        self,
        root: str | Path | None = None,
        split: str | None = None,
        size: Size | None = None,
        prompt: str | None = None,
        *,
        label_space: str | None = None,
        **options: Any,
    ) -> None:
        """Read the list of rows; their files are read one by one, when asked for.

        label_space  of the label maps, if there are any; their files hold its file ids
        options      as of `FramedDataset`; {caption} in the prompt is the row's own
        """
        super().__init__(root, split, size, prompt, **options)
        self.space = None if label_space is None else LabelSpace.load(label_space)
        self.rows = self._find_rows()
        self.keys = keys_of([row.target for row in self.rows])
        captions = dict(zip(self.keys, (row.prompt for row in self.rows), strict=True))
        self.set_prompts(captions, (), "")  # a row may be without a prompt
        self._check_labels()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def key_of(self, index: int) -> str:
        """Name of a row."""
        return self.keys[index]

    def files(self, index: int) -> tuple[Path, ...]:
        """Target, control and, if it is read, label map."""
        row = self.rows[index]
        labels = () if self.space is None or row.label is None else (row.label,)
        return row.target, row.control, *labels

    def view(self, index: int, choose: Choose) -> tuple[Rgb, View]:
        """Target, control and labels of one row in the window of `choose`."""
        row = self.rows[index]
        target, control, ids = read_image(row.target), read_image(row.control), None
        frame = (target.shape[0], target.shape[1])
        check_same_frame(frame, row.target, control.shape, row.control)
        if self.space is not None and row.label is not None:
            ids = self.space.check_file_ids(read_labels(row.label), where=str(row.label))
            check_same_frame(frame, row.target, ids.shape, row.label)
        window, size = choose(frame, ids), self.size or check_size(frame)
        shown = None if ids is None else resize_labels(window.cut(ids), size)
        view = View(self.keys[index], shown, resize_labels(window.cut(control), size))
        return resize_image(window.cut(target), size), view

    def conditions(self, view: View, rng: np.random.Generator) -> ControlSample:
        """Hint, prompt and, if there is one, label."""
        assert view.control is not None
        hint = view.control.astype(np.float32) / np.float32(255)
        sample: ControlSample = {"hint": hint, "txt": self.prompt_or_none(view, rng), "key": view.key}
        if self.space is not None and view.ids is not None:
            sample["label"] = self.space.to_train_ids(view.ids, where=view.key).astype(np.int64)
        return sample

    def own_options(self) -> dict[str, Any]:
        """The label space."""
        return {"label_space": None if self.space is None else self.space.name}

    def _find_rows(self) -> list[Row]:
        inside = self.root / self.split
        lists = [self.root / f"{self.split}.jsonl", *(inside / name for name in self.lists)]
        folders = [inside]
        if self.split == self.default_split:
            lists += [self.root / name for name in self.lists]
            folders.append(self.root)
        for path in lists:
            if path.is_file():
                return read_list(path)
        for folder in folders:
            if (folder / "target").is_dir():
                return pair_folders(folder)
        raise FileNotFoundError(
            f"{self.root}: expected rows of split {self.split!r} in"
            f" {', '.join(str(path.relative_to(self.root)) for path in lists)} or in folders"
            f" {', '.join(FOLDERS[:3])}, found none of them; {self._advice()}"
        )

    def _advice(self) -> str:
        return "a row is a JSON object with target, control and prompt"

    def _check_labels(self) -> None:
        labelled = sum(row.label is not None for row in self.rows)
        if self.space is None:
            if "classes" in self.prompts.names:
                raise ValueError(
                    f"prompt {self.prompt!r}: expected a label_space for {{classes}}, found none"
                )
        elif labelled < len(self.rows):
            raise ValueError(
                f"{self.root}: expected a label map for each of {len(self.rows)} rows, because label_space is"
                f" {self.space.name}, found {labelled}"
            )


def read_list(path: Path) -> list[Row]:
    """The rows of a file of JSON lines; paths in it start from its folder."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    rows = [_row(line, path, n) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path}: expected one JSON object a line, found none")
    return rows


def pair_folders(folder: Path) -> list[Row]:
    """The rows of folders, paired by stem; a target without control or prompt is an error that names it."""
    files = {name: _by_stem(folder / name) for name in FOLDERS}
    for name in ("control", "prompt"):
        if lost := sorted(files["target"].keys() - files[name].keys()):
            raise FileNotFoundError(
                f"{folder / name}: expected a file for each target, found none for {lost[0]}"
                f" ({len(lost)} in all)"
            )
    if not files["target"]:
        raise FileNotFoundError(f"{folder / 'target'}: expected images, found none")
    return [
        Row(
            target,
            files["control"][stem],
            files["prompt"][stem].read_text(encoding="utf-8-sig").strip(),
            files["label"].get(stem),
        )
        for stem, target in files["target"].items()
    ]


def keys_of(targets: Sequence[Path]) -> list[str]:
    """A name for each row: the stem of its target, where that is not unique its path and the row's number."""
    times = Counter(path.stem for path in targets)
    return [path.stem if times[path.stem] == 1 else f"{path}#{n}" for n, path in enumerate(targets)]


def _by_stem(folder: Path) -> dict[str, Path]:
    return files_by_stem(folder, {".txt"} if folder.name == "prompt" else IMAGE_SUFFIXES)


def _row(line: str, path: Path, number: int) -> Row:
    try:
        item = json.loads(line)
    except json.JSONDecodeError:
        item = None
    values: dict[str, str] = {}
    for column, names in COLUMNS.items():
        for name in names:
            if isinstance(item, dict) and isinstance(item.get(name), str):
                values.setdefault(column, item[name])
    if not {"target", "control", "prompt"} <= values.keys():
        raise ValueError(
            f"{path}:{number}: expected a JSON object with the texts target, control and prompt (or source,"
            f" image, conditioning_image, text), found {line[:80]!r}. Correct or remove the line."
        )
    label = values.get("label")
    return Row(
        path.parent / values["target"],
        path.parent / values["control"],
        values["prompt"],
        None if label is None else path.parent / label,
    )
