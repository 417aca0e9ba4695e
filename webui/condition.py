"""What a page is about: where its hints come from, in which words, and what it starts with.

The builder knows nothing else of a condition, so another one (edges, lines, depth) is another `Condition`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cldm.pictures import Rgb
from datasets.label_space import Ids, LabelSpace, Size

EXAMPLES = 6  # shown on a page


class Hint(NamedTuple):
    """What the control branch is told."""

    name: str  # of the file, without its folder
    colours: Rgb  # (H, W, 3); what the network sees and what is laid over the images
    digest: str  # of the file, or of the labels
    found: str = ""  # what its file was taken for, in words
    labels: Ids | None = None  # (H, W) train ids, of a label map; what priors start from
    space: str | None = None  # the name of its label space


class Example(NamedTuple):
    """A hint to pick, with the prompt that belongs to it."""

    hint: Hint
    prompt: str


class Models(NamedTuple):
    """Files that ship with the project, by their path in it; None where there is none."""

    checkpoint: str | None = None
    base: str | None = None
    prior: str | None = None
    segmenter: str | None = None


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
    find_examples: Callable[[Path, Size | None], Path | None]  # a folder of hints; may make it in the first
    models: Models  # what is taken if none is named
    space: LabelSpace | None = None  # of hints that are label maps: they are edited on the page
    from_labels: Callable[[Ids, str], Hint] | None = None  # (labels, name): the hint of an edited map
