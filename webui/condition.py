"""What a page is about: where its hints come from, in which words, and what it starts with.

The builder knows nothing else of a condition, so another one (edges, lines, depth) is another `Condition`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cldm.pictures import Rgb
from datasets.label_space import Size

EXAMPLES = 6  # shown on a page


class Hint(NamedTuple):
    """What the control branch is told."""

    name: str  # of the file, without its folder
    colours: Rgb  # (H, W, 3); what the network sees and what is laid over the images
    legend: Mapping[str, tuple[int, int, int]]  # colour by name, of what is in it; largest first
    digest: str  # of the file


class Example(NamedTuple):
    """A hint to pick, with the prompt that belongs to it."""

    hint: Hint
    prompt: str


@dataclass(frozen=True)
class Condition:
    """One kind of page."""

    title: str
    summary: str  # one sentence under the title
    noun: str  # what a hint is called
    upload: str  # what may be loaded
    kinds: Mapping[
        str, str
    ]  # what a file can hold: the words on the page -> what `read` takes; first: default
    read: Callable[[Path, str, Size | None], Hint]  # (file, kind, size of the images); refuses in a sentence
    find_examples: Callable[[Path, Size | None], Path]  # a folder of hints; makes them in the first argument
    weights: tuple[str, ...]  # files of the model that is taken if none is named, the checkpoint first
