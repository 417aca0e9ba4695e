"""Loading Cityscapes frames as training samples: from files, from a cache, and as the predecessor does.

    python benchmarks/load_frames.py --root data/cityscapes
    python benchmarks/load_frames.py                          # rendered frames of 1024x2048

What the predecessor does for a sample of SCP-Diff's Cityscapes loader is done here in the same steps: photo,
colour PNG and train ids are each read by Pillow, turned into a tensor and resized by torchvision (ids too,
which is why it invents some), photo to [-1, 1], colours to [0, 1]. Its painting of pixels in a Python loop,
for data sets without a colour PNG, is left out. Files that a download lacks are made first. All
sides go through torch's loader with the same processes and batches; what is timed are batches that arrive.
The cache holds moments of no autoencoder: reading them costs what reading real ones does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import alternate, figures, open_project, ratio, report, summary

NAMES = ("_leftImg8bit.png", "_gtFine_labelIds.png", "_gtFine_color.png", "_gtFine_labelTrainIds.png")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add(
        "--root", type=Path, help="Cityscapes; its training frames are taken in turn (default: rendered ones)"
    )
    add("--samples", type=int, default=48, help="of a pass (default: %(default)s)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), default=[512, 1024])
    add("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    add("--batch", type=int, default=4, help="(default: %(default)s)")
    add("--steps", type=int, default=5, help="counted passes of each side (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.samples, args.workers, args.batch, args.steps) < 1:
        parser.error("--samples, --workers, --batch and --steps must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Make the frames, build the three loaders, time a pass of each in turn."""
    args = parse_args(argv)
    open_project()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        make_tree(tree, args)
        sides = make_sides(tree, Path(folder) / "cache", args)
        seconds = alternate(sides, args.steps)
    record: dict[str, Any] = {"benchmark": "load_frames", **facts(args)}
    record |= {name: summary(times) for name, times in seconds.items()}
    per_sample = {name: figures(1000 * min(times) / args.samples) for name, times in seconds.items()}
    record["ms_per_sample"] = per_sample
    for name in ("files", "cache"):
        record[f"ratio_{name}"] = ratio(seconds["predecessor"], seconds[name])
    report(record)


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    from importlib.metadata import version

    kept = {name: getattr(args, name) for name in ("samples", "size", "workers", "batch", "steps")}
    packages = ("torch", "torchvision", "pillow", "opencv-python-headless", "numpy")
    return {
        **kept,
        "frames": "cityscapes" if args.root else "streets",
        **{name: version(name) for name in packages},
    }


def make_tree(tree: Path, args: argparse.Namespace) -> None:
    """A training split of `samples` frames, links to a few real or rendered ones; with the peer's files."""
    import numpy as np
    from PIL import Image

    from datasets.cityscapes import CityscapesDataset
    from datasets.label_space import LabelSpace

    root = args.root
    if root is None:
        from datasets.streets.tree import Plan
        from datasets.streets.tree import make_tree as render

        root = tree.parent / "rendered"
        render(root, Plan("camera", size=(1024, 2048), train=4, val=1), workers=2)
    space, source = LabelSpace.load("cityscapes"), CityscapesDataset(root)
    colours = np.zeros((256, 3), np.uint8)
    colours[np.array(space.row_ids) % 256] = space.row_colours
    for pair in source.pairs:
        made = {name: tree.parent / f"{pair.key}{name}" for name in NAMES}
        ids = source.read_file_ids(source.with_label_ids(pair.labels))
        shutil.copy(pair.image, made[NAMES[0]])
        Image.fromarray(ids).save(made[NAMES[1]])
        Image.fromarray(colours[ids]).save(made[NAMES[2]])
        Image.fromarray(space.to_train_ids(ids, where=pair.key)).save(made[NAMES[3]])
    for i in range(args.samples):
        key = source.pairs[i % len(source)].key
        for name in NAMES:
            folder = tree / ("leftImg8bit" if name == NAMES[0] else "gtFine") / "train" / "ulm"
            folder.mkdir(parents=True, exist_ok=True)
            # the peer's train ids would also be found by ours, which then would not have to translate
            stem = f"ulm_{i:06d}_000019{name}" if name != NAMES[3] else f"ulm_{i:06d}_peer.png"
            os.link(tree.parent / f"{key}{name}", folder / stem)


def make_sides(tree: Path, cache: Path, args: argparse.Namespace) -> dict[str, Callable[[int], None]]:
    """A pass over all samples for each side."""
    import torch
    from torch.utils.data import DataLoader

    from cldm.cache import write_samples
    from datasets.cached import CachedDataset, ViewRows, collate_rows, identity_of_rows
    from datasets.cityscapes import CityscapesDataset
    from datasets.framing import Views

    source = CityscapesDataset(tree, size=tuple(args.size))
    views = Views(source.framing)
    costless = SimpleNamespace(
        device=torch.device("cpu"), first_stage_model=no_autoencoder(), encode_first_stage=encode
    )
    rows, identity = ViewRows(source, views), identity_of_rows(source, views, cache)
    write_samples(cache, rows, collate_rows, costless, identity, num_workers=args.workers)  # type: ignore[arg-type]
    sides = {
        "predecessor": Predecessor(tree, args.size),
        "files": source,
        "cache": CachedDataset(source, views, cache),
    }
    options = {"batch_size": args.batch, "num_workers": args.workers, "persistent_workers": True}
    loaders = {name: DataLoader(dataset, **options) for name, dataset in sides.items()}
    return {name: lambda _, loader=loader: sum(1 for _ in loader) for name, loader in loaders.items()}


def no_autoencoder() -> Any:
    """Modules whose weights the cache asks for."""
    from torch import nn

    return SimpleNamespace(encoder=nn.Identity(), quant_conv=nn.Identity())


def encode(images: Any) -> Any:
    """Zeros of the shape of moments, 8x down."""
    height, width = images.shape[2] // 8, images.shape[3] // 8
    return SimpleNamespace(parameters=images.new_zeros(len(images), 8, height, width))


class Predecessor:
    """A sample as SCP-Diff's Cityscapes loader makes it."""

    def __init__(self, tree: Path, size: Sequence[int]) -> None:
        self.photos = sorted((tree / "leftImg8bit/train").glob(f"*/*{NAMES[0]}"))
        self.colours = sorted((tree / "gtFine/train").glob(f"*/*{NAMES[2]}"))
        self.labels = sorted((tree / "gtFine/train").glob("*/*_peer.png"))
        self.size = tuple(size)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.photos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read, turn into tensors, resize."""
        from PIL import Image
        from torchvision.transforms.functional import pil_to_tensor, resize, to_tensor

        photo = to_tensor(Image.open(self.photos[index]).convert("RGB"))
        hint = to_tensor(Image.open(self.colours[index]).convert("RGB"))
        label = pil_to_tensor(Image.open(self.labels[index]))
        photo, hint, label = (resize(tensor, list(self.size)) for tensor in (photo, hint, label))
        return {
            "jpg": photo.permute(1, 2, 0) * 2 - 1,
            "hint": hint.permute(1, 2, 0),
            "txt": "City road scenes.",
            "label": label[0].long(),
        }


if __name__ == "__main__":
    main()
