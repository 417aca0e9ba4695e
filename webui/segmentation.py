"""The condition "segmentation": a map of what stands where, as ids or in the colours of a known palette."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cldm.digests import fingerprint
from datasets import find_entry, missing_paths
from datasets.files import is_colour_map, read_image, read_labels
from datasets.label_space import SPACES, Ids, LabelSpace, RawIds, Size, resize_labels
from datasets.translation import translate
from webui.condition import EXAMPLES, Condition, Hint, Models
from webui.uploads import check_picture, fitting_size, without_folder

STREETS = Models(
    *(f"models/{name}.safetensors" for name in ("control_streets", "streets_base")),
    *(f"models/streets_{name}.safetensors" for name in ("prior", "judge")),
)
RENDERED_SIZE, BLANK_SIZE = (128, 256), (512, 512)
SAMPLED, MANY = 1 << 16, 1000  # pixels that are looked at; colours that no palette has
KINDS = {
    "detect": "auto",
    "label ids": "label_ids",
    "train ids": "train_ids",
    "colours": "colours",
}


@dataclass(frozen=True)
class LabelMaps:
    """Label maps of one label space, from files and from the editor."""

    space: LabelSpace

    def read(self, path: Path, kind: str, size: Size | None) -> Hint:
        """A label map from a file that a visitor brought, at the size of the images or else near its own.

        Raises
            ValueError  one sentence that names the file without its folder
        """
        with without_folder(path):
            own = check_picture(path)
            size = size or fitting_size(own)
            labels, found = self.read_labels(path, kind)
        if labels.shape != size:
            found += f", resized from {labels.shape[0]}x{labels.shape[1]}"
        labels = resize_labels(labels, size)
        return self.hint(path.name, labels, fingerprint(path), found)

    def from_labels(self, labels: Ids, name: str) -> Hint:
        """The hint of a map that was edited."""
        labels = self.space.check_train_ids(labels, name)
        digest = hashlib.sha256(repr(labels.shape).encode() + labels.tobytes()).hexdigest()
        return self.hint(name, labels, digest)

    def hint(self, name: str, labels: Ids, digest: str, found: str = "") -> Hint:
        """A label map as the control is told it."""
        return Hint(name, self.space.paint(labels), digest, found, labels, self.space.name)

    def read_labels(self, path: Path, kind: str) -> tuple[Ids, str]:
        """Train ids of a file, and what it was taken for."""
        if kind == "colours" or (kind == "auto" and is_colour_map(path)):
            return self.from_colours(path)
        ids, name = read_labels(path), self.space.name
        if kind == "auto":
            kind = self.kind_of_ids(path, ids)
        if kind == "train_ids":
            return self.space.check_train_ids(ids, str(path)), f"train ids of {name}"
        return self.space.to_train_ids(ids, str(path)), f"label ids of {name}"

    def kind_of_ids(self, path: Path, ids: RawIds) -> str:
        """Label ids or train ids: by the name, else by ids that only one of them has, else train ids."""
        for ending, kind in (("labelTrainIds", "train_ids"), ("labelIds", "label_ids")):
            if path.stem.endswith(ending):
                return kind
        # A street without a label id above 18 would be one without sky, vegetation, people and vehicles.
        beyond = (ids >= self.space.num_classes) & (ids != self.space.void)
        return "label_ids" if beyond.any() else "train_ids"

    def from_colours(self, path: Path) -> tuple[Ids, str]:
        """Train ids of a painted map, in the first palette that knows its colours; our own comes first."""
        rgb = read_image(path)
        if (count := len(np.unique(rgb.reshape(-1, 3)[:: max(1, rgb.size // 3 // SAMPLED)], axis=0))) > MANY:
            raise ValueError(f"{path}: expected a label map, found {count} colours and more; is it a photo?")
        others = [LabelSpace.load(name) for name in SPACES if name != self.space.name]
        refusal: ValueError | None = None
        for space in (self.space, *others):
            try:
                labels = space.from_colours(rgb, str(path))
            except ValueError as error:
                refusal = refusal or error
                continue
            return self.translated(labels, space)
        assert refusal is not None
        raise ValueError(f"{refusal} No other palette knows them all ({', '.join(s.name for s in others)}).")

    def translated(self, labels: Ids, space: LabelSpace) -> tuple[Ids, str]:
        """Train ids of our space, and the sentence that says what became of classes it does not have."""
        if space is self.space:
            return labels, f"colours of {space.name}"
        found = translate(labels, space, self.space)
        if not found.lost:
            return found.labels, f"colours of {space.name}, as classes of {self.space.name}"
        return found.labels, (
            f"colours of {space.name}; {found.lost:.0%} of it is void here, as {self.space.name} has no "
            f"{', '.join(found.lost_names)}"
        )


def find_street_maps(folder: Path, size: Size | None) -> Path:
    """The validation maps of the rendered data set, or a few that are rendered now, into `folder`."""
    root = Path(find_entry("streets").default_root)
    if not missing_paths("streets") and (root / "gtFine/val").is_dir():
        return root / "gtFine/val"
    from datasets.streets.tree import Plan, make_tree  # the renderer, only where it is needed

    make_tree(folder, Plan(train=0, val=EXAMPLES, size=size or RENDERED_SIZE), workers=1)
    return folder / "gtFine/val"


def blank_map(folder: Path, size: Size | None) -> Path:
    """A map of void to start from; void is black in every label space."""
    from cldm.pictures import write_png

    folder.mkdir(parents=True, exist_ok=True)
    write_png(folder / "blank.png", np.zeros((*(size or BLANK_SIZE), 3), np.uint8))
    return folder


def segmentation(space: LabelSpace) -> Condition:
    """The page of models that are told label maps of a label space."""
    maps = LabelMaps(space)
    of_streets = space is LabelSpace.load("cityscapes")
    return Condition(
        title="Paint a street from a label map" if of_streets else "Paint a scene from a label map",
        summary="Paint what stands where, or load a map, say what it should look like, and see it appear.",
        noun="map",
        upload="Label ids, train ids, or the colours of Cityscapes, ADE20K or COCO",
        kinds=KINDS,
        read=maps.read,
        find_examples=find_street_maps if of_streets else blank_map,
        models=STREETS,
        space=space,
        from_labels=maps.from_labels,
    )
