"""Render street scenes as a Cityscapes tree: python tool_make_streets.py [--domain NAME] [--out DIR]

    python tool_make_streets.py
    python tool_make_streets.py --domain game --conditions clear --train 1000 --out data/streets_game

Writes DIR/leftImg8bit, DIR/gtFine (color, labelIds, instanceIds) and DIR/captions.json. Frames take the
conditions in turn. An interrupted run is continued by the same command; another domain may be rendered
into the same folder, where it shows the same scenes. Train and val never share a scene.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cldm.cli import refuse
from datasets.streets import CONDITIONS, DOMAINS


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the flags."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--domain", choices=DOMAINS, default="camera", help="how it looks (default: %(default)s)")
    add("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), help="default: all five")
    add("--size", type=int, nargs=2, metavar=("H", "W"), default=[128, 256], help="multiples of 64")
    add("--train", type=int, default=4000, metavar="N", help="training frames (default: %(default)s)")
    add("--val", type=int, default=500, metavar="N", help="validation frames (default: %(default)s)")
    add("--out", type=Path, default=Path("data/streets"), help="folder to fill (default: %(default)s)")
    add("--seed", type=int, default=0, help="other scenes for another seed (default: %(default)s)")
    add("--workers", type=int, default=0, metavar="N", help="processes (default: one for each core)")
    args = parser.parse_args(argv)
    if any(side < 64 or side % 64 for side in args.size):
        parser.error(f"--size must be multiples of 64, found {args.size[0]} {args.size[1]}")
    if min(args.train, args.val, args.seed, args.workers) < 0 or args.train + args.val == 0:
        parser.error(
            "--train, --val, --seed and --workers must be 0 or more, and one of the first two above 0"
        )
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; name a folder")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Render, then say where."""
    args = parse_args(argv)
    from datasets.streets.tree import Plan, make_tree

    plan = Plan(args.domain, tuple(args.conditions), tuple(args.size), args.train, args.val, args.seed)
    try:
        make_tree(args.out, plan, workers=args.workers)
    except (ValueError, OSError) as error:
        refuse(str(error))
    print(f"{args.train} frames of train and {args.val} of val are in {args.out}")


if __name__ == "__main__":
    main()
