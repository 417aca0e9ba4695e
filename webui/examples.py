"""The hints that a page offers to pick from."""

from __future__ import annotations

from pathlib import Path

from datasets.hints import find_caption, find_hints
from datasets.label_space import Size
from webui.condition import EXAMPLES, Condition, Example


def load_examples(condition: Condition, folder: Path | None, work: Path, size: Size | None) -> list[Example]:
    """Some hints of `folder`, spread over all of it, each with the caption of its frame.

    folder  of the user; by default the condition's own, made in `work` if there is none
    size    of the images; by default each hint's own
    """
    folder = folder or condition.find_examples(work, size)
    if folder is None:
        return []
    paths = find_hints(folder)
    spread = [paths[i * len(paths) // EXAMPLES] for i in range(EXAMPLES)]
    kind = next(iter(condition.kinds.values()))
    chosen = list(dict.fromkeys(spread))
    return [Example(condition.read(path, kind, size), find_caption(path) or "") for path in chosen]
