"""Look at one item of a data set; without --dataset at one of fill50k, the published control tutorial.

    python tutorial_dataset.py --index 1234
    python tutorial_dataset.py --make 5000 --root training/fill5k
    python tutorial_dataset.py --dataset cityscapes --index 7 --out item.png data.crop=random

Unpack fill50k.zip into training/, or let --make draw circles in its layout. --out writes the item as the
network gets it: image, hint, both laid over each other, prompt. Whether a data set is sound as a whole says
tool_check_dataset.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cldm.cli import refuse
from datasets import DATASETS, create_dataset, find_entry
from datasets.fill50k import CIRCLES, Fill50kDataset, make_fill50k

FILL50K = "training/fill50k"


class MyDataset(Fill50kDataset):
    """fill50k at `./training/fill50k`, under the name that the tutorial's training script imports."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--root", help=f"folder of the data (default: {FILL50K}, or that of --dataset)")
    parser.add_argument("--index", type=int, default=0, help="which item to show (default: %(default)s)")
    parser.add_argument(
        "--make", type=int, nargs="?", const=CIRCLES, metavar="N", help="draw N circles (default: %(const)s)"
    )
    parser.add_argument("--dataset", help=f"one of {', '.join(DATASETS)} (default: fill50k as it is)")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="write a picture of the item")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="data.* keys, with --dataset")
    args = parser.parse_intermixed_args(argv)
    if args.dataset is None and args.overrides:
        parser.error(f"{args.overrides[0]} needs --dataset")
    if args.dataset is not None and args.make is not None:
        parser.error("--make draws fill50k; it takes no --dataset")
    if args.out is not None and (args.out.suffix.lower() != ".png" or not args.out.parent.is_dir()):
        parser.error(f"--out must be a .png file in a folder that is there, found {args.out}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Print the shapes and the prompt of one item, and write its picture."""
    args = parse_args(argv)
    try:
        if args.make is not None:
            if args.make < 1:
                raise ValueError(f"expected --make of 1 or more, found {args.make}")
            make_fill50k(args.root or FILL50K, args.make)
        dataset = open_dataset(args)
        if not 0 <= args.index < len(dataset):
            raise ValueError(f"expected --index in 0..{len(dataset) - 1}, found {args.index}")
        item = dataset[args.index]
        if args.out is not None:
            write_item(args.out, item, getattr(dataset, "space", None))
    except (ValueError, OSError) as error:
        refuse(str(error))
    print(f"{len(dataset)} items; item {args.index} is {item['key']}: {item['txt']}")
    for name in ("jpg", "hint", "label"):
        if name in item:
            array = item[name]
            print(f"{name} {array.shape} {array.dtype} in [{array.min():.2f}, {array.max():.2f}]")


def open_dataset(args: argparse.Namespace) -> Any:
    """The data set that was named, with the settings of its run file; else fill50k."""
    if args.dataset is None:
        return MyDataset(args.root or FILL50K)
    from omegaconf import OmegaConf

    from cldm.config import load_run_config
    from datasets.check import options_among

    find_entry(args.dataset)
    settings = vars(OmegaConf.to_object(load_run_config(args.dataset, None, args.overrides).data))
    places = {"root": args.root or settings["root"], "split": settings["split"]}
    given = options_among(args.dataset, settings) | places
    return create_dataset(args.dataset, **{key: value for key, value in given.items() if value is not None})


def write_item(path: Path, item: dict[str, Any], space: Any) -> None:
    """Image, hint as the network sees it (a map, where it is no picture), overlay and prompt side by side."""
    from cldm.pictures import overlay, sheet, write_png
    from datasets.check.frame_pictures import paint_with_void, words

    photo: NDArray[np.uint8] = ((item["jpg"] + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    if item["hint"].shape[2] == 3:
        hint = (item["hint"] * 255).round().astype(np.uint8)
    else:
        hint = paint_with_void(space, item["label"].astype(np.uint8))
    text = words([item["key"], item["txt"] or "(no prompt)"], photo.shape[:2])
    write_png(path, sheet([(photo, hint, overlay(photo, hint), text)]))


if __name__ == "__main__":
    main()
