"""Prompts of frames: a sentence in which {names} are filled in, a pure function of (seed, key, map).

"City road scenes."                                                   the same for every frame
"{caption}"                                                           from a caption file, by stem
"{classes}"                                                           what the map shows, the largest first
"A city street scene with {classes}, in {weather} weather."           any other name is drawn from its words
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Formatter

import numpy as np
from numpy.typing import NDArray

from datasets.label_space import LabelSpace

CAPTION, CLASSES = "caption", "classes"


class Prompts:
    """Fills a sentence for one frame after the other."""

    def __init__(
        self,
        sentence: str,
        *,
        words: Mapping[str, Sequence[str]] | None = None,
        captions: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        """Check the sentence.

        words     of each name in it that is neither `caption` nor `classes`
        captions  by key; needed for {caption}
        seed      of the draws among the words
        """
        self.sentence, self.words, self.captions, self.seed = sentence, dict(words or {}), captions, seed
        self.names = names_in(sentence)
        known = [CAPTION, CLASSES, *self.words]
        for name in self.names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {{{near[0]}}}?" if near else ""
                raise ValueError(
                    f"prompt {sentence!r}: expected names among {', '.join(known)}, found {{{name}}}{hint}"
                )
        if empty := [name for name in self.names if name in self.words and not self.words[name]]:
            raise ValueError(f"prompt {sentence!r}: expected words for {{{empty[0]}}}, found none")
        if CAPTION in self.names and captions is None:
            raise ValueError(f"prompt {sentence!r}: expected a caption file for {{{CAPTION}}}, found none")

    def check_keys(self, keys: Iterable[str], where: str) -> None:
        """Refuse frames without a caption, where captions are asked for; `where` names their file."""
        if CAPTION in self.names:
            lost = [key for key in keys if not (self.captions or {}).get(key, "").strip()]
            if lost:
                raise ValueError(
                    f"{where}: expected a caption for {lost[0]}, found none ({len(lost)} in all)"
                )

    def of(self, key: str, labels: NDArray[np.integer] | None = None, space: LabelSpace | None = None) -> str:
        """The prompt of a frame; {classes} needs its map (H, W) of train ids."""
        rng = np.random.default_rng([self.seed, *hashlib.sha256(key.encode()).digest()])
        drawn = sorted(set(self.names) & set(self.words))
        filled = {name: str(rng.choice(list(self.words[name]))) for name in drawn}
        if CAPTION in self.names:
            filled[CAPTION] = (self.captions or {}).get(key, "")
        if CLASSES in self.names:
            assert labels is not None
            assert space is not None
            filled[CLASSES] = ", ".join(classes_shown(labels, space))
        return self.sentence.format(**filled)


def names_in(sentence: str) -> list[str]:
    """The {names} of a sentence."""
    try:
        fields = list(Formatter().parse(sentence))
    except ValueError as error:
        raise ValueError(
            f"prompt {sentence!r}: expected names in braces, found {error}; a brace itself is written twice"
        ) from error
    for _, name, spec, conversion in fields:
        if name is not None and (spec or conversion or not name.isidentifier()):
            raise ValueError(
                f"prompt {sentence!r}: expected plain names in braces, found {{{name}}}; a brace itself is"
                " written twice"
            )
    return [name for _, name, _, _ in fields if name is not None]


def classes_shown(labels: NDArray[np.integer], space: LabelSpace) -> list[str]:
    """Names of the classes of a map of train ids, the largest first; void is none."""
    counts = np.bincount(np.asarray(labels).ravel(), minlength=space.void + 1)[: space.num_classes]
    return [space.names[k] for k in np.argsort(-counts, kind="stable") if counts[k]]


def read_captions(path: str | Path) -> dict[str, str]:
    """Caption by key, from a JSON object or from JSON lines of {"key": ..., "text": ...}."""
    text = Path(path).read_text(encoding="utf-8-sig")
    try:
        found = json.loads(text)
        if isinstance(found, dict) and found.keys() == {"key", "text"}:  # lines, but a single one
            found = {str(found["key"]): found["text"]}
    except json.JSONDecodeError:
        found = dict(
            _line(line, f"{path}:{n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()
        )
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{path}: expected captions by key, as a JSON object of texts or as JSON lines")
    return found


def _line(line: str, where: str) -> tuple[str, str]:
    try:
        item = json.loads(line)
        return str(item["key"]), item["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{where}: expected a JSON object with "key" and "text", found {line[:80]!r}'
        ) from error
