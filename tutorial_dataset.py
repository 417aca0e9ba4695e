"""The data set of the published control tutorial, fill50k; run it to look at one item.

    python tutorial_dataset.py --index 1234
    python tutorial_dataset.py --make 5000 --root training/fill5k

Unpack fill50k.zip into training/, or let --make draw circles in its layout.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cldm.cli import refuse
from datasets.fill50k import CIRCLES, Fill50kDataset, make_fill50k


class MyDataset(Fill50kDataset):
    """fill50k at `./training/fill50k`, under the name that the tutorial's training script imports."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--root", default="training/fill50k", help="holds prompt.json (default: %(default)s)")
    parser.add_argument("--index", type=int, default=0, help="which item to show (default: %(default)s)")
    parser.add_argument(
        "--make", type=int, nargs="?", const=CIRCLES, metavar="N", help="draw N circles (default: %(const)s)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the shapes and the prompt of one item."""
    args = parse_args(argv)
    try:
        if args.make is not None:
            if args.make < 1:
                raise ValueError(f"expected --make of 1 or more, found {args.make}")
            make_fill50k(args.root, args.make)
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
