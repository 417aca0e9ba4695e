"""The data set of the published control tutorial, fill50k; run it to look at one item.

Unpack fill50k.zip into training/, then: python tutorial_dataset.py --index 1234
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cldm.cli import refuse
from datasets.fill50k import Fill50kDataset


class MyDataset(Fill50kDataset):
    """fill50k at `./training/fill50k`, under the name that the tutorial's training script imports."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--root", default="training/fill50k", help="holds prompt.json (default: %(default)s)")
    parser.add_argument("--index", type=int, default=0, help="which item to show (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the shapes and the prompt of one item."""
    args = parse_args(argv)
    try:
        dataset = MyDataset(args.root)
        if not 0 <= args.index < len(dataset):
            raise ValueError(f"expected --index in 0..{len(dataset) - 1}, found {args.index}")
        item = dataset[args.index]
    except (ValueError, OSError) as error:
        refuse(str(error))
    print(f"{len(dataset)} items; item {args.index} is {item['key']}: {item['txt']}")
    for name in ("jpg", "hint"):
        array = item[name]
        print(f"{name} {array.shape} {array.dtype} in [{array.min():.2f}, {array.max():.2f}]")


if __name__ == "__main__":
    main()
