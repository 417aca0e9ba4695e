"""The condition "segmentation": a map of what stands where, as ids or in the colours of Cityscapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cldm.digests import fingerprint
from cldm.pictures import Rgb
from datasets import find_entry, missing_paths
from datasets.hint_encoding import hint_encoding
from datasets.hints import detect_hint_type, read_hint
from datasets.label_space import LabelSpace, Size
from webui.condition import EXAMPLES, Condition, Hint
from webui.uploads import check_picture

SPACE = LabelSpace.load("cityscapes")
ENCODING = hint_encoding(SPACE)
RENDERED_SIZE = (128, 256)
KINDS = {
    "detect": "auto",
    "label ids": "label_ids",
    "train ids": "train_ids",
    "colours": "colours",
}


def read_label_map(path: Path, kind: str, size: Size | None) -> Hint:
    """A label map from a file that a visitor brought, at the size of the images or else at its own.

    Raises
        ValueError  one sentence that names the file without its folder
    """
    try:
        check_picture(path)
        colours = read_hint(path, detect(path) if kind == "auto" else kind, ENCODING, size)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error
    painted = (colours * 255).round().astype(np.uint8)  # exact: it was painted from bytes
    return Hint(path.name, painted, legend_of(painted), fingerprint(path))


def detect(path: Path) -> str:
    """What a map holds; where that cannot be told, in the words of the page."""
    try:
        return detect_hint_type(path)
    except ValueError as error:
        raise ValueError(
            f"{path}: expected colours, or a name that ends in _labelIds or _labelTrainIds, found ids of "
            "unknown kind; choose label ids or train ids beside the file"
        ) from error


def legend_of(colours: Rgb) -> dict[str, tuple[int, int, int]]:
    """Colour by class name, of the classes of a painted map, the largest first; void is left out."""
    space = SPACE
    counts = np.bincount(space.from_colours(colours, "the map").ravel(), minlength=256)[: space.num_classes]
    present = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    rgb = {k: space.colours[k].tolist() for k in present}
    return {space.names[k]: (rgb[k][0], rgb[k][1], rgb[k][2]) for k in present}


def find_street_maps(folder: Path, size: Size | None) -> Path:
    """The validation maps of the rendered data set, or a few that are rendered now, into `folder`."""
    root = Path(find_entry("streets").default_root)
    if not missing_paths("streets") and (root / "gtFine/val").is_dir():
        return root / "gtFine/val"
    from datasets.streets.tree import Plan, make_tree  # the renderer, only where it is needed

    make_tree(folder, Plan(train=0, val=EXAMPLES, size=size or RENDERED_SIZE), workers=1)
    return folder / "gtFine/val"


SEGMENTATION = Condition(
    title="Paint a street from a label map",
    summary="Choose a map of what stands where, say what it should look like, and a ControlNet paints it.",
    noun="map",
    upload="A label map: label ids, train ids or the colours of Cityscapes (PNG, BMP, TIFF)",
    kinds=KINDS,
    read=read_label_map,
    find_examples=find_street_maps,
    weights=("models/control_streets.safetensors", "models/streets_base.safetensors"),
)
