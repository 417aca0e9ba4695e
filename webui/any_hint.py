"""The condition "none": the picture that is loaded is the hint itself, for any control branch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cldm.digests import fingerprint
from datasets.hint_encoding import hint_encoding
from datasets.hints import read_hint
from datasets.label_space import LabelSpace, Size
from webui.condition import Condition, Hint, Models
from webui.uploads import check_picture, fitting_size, without_folder


def read_picture(path: Path, kind: str, size: Size | None) -> Hint:
    """A picture as it is, at the size of the images or else near its own; ValueError is one sentence."""
    with without_folder(path):
        own = check_picture(path)
        size = size or fitting_size(own)
        hint = read_hint(path, kind, hint_encoding(LabelSpace.load("cityscapes")), size)
    return Hint(path.name, (hint * 255).round().astype(np.uint8), fingerprint(path), "a picture as it is")


ANY_HINT = Condition(
    title="Paint from a hint",
    summary="Load the picture that the control branch was trained to take: edges, depth, a pose, a map.",
    noun="hint",
    upload="The hint itself: a picture, from any detector",
    kinds={"picture": "image"},
    read=read_picture,
    find_examples=lambda folder, size: None,
    models=Models(),
)
