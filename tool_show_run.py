"""Draw a training as a page, during it or after: python tool_show_run.py RUN

    python tool_show_run.py work_dir/lightning_logs/version_0

RUN is the log folder of a training. Written is RUN/index.html: whether the model follows its hints and
since when, training and validation loss, adherence, losses by noise level, grids from first to last.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cldm.cli import refuse


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("run", type=Path, help="log folder of a training")
    parser.add_argument("--out", type=Path, metavar="PAGE.html", help="(default: RUN/index.html)")
    args = parser.parse_args(argv)
    if not args.run.is_dir():
        parser.error(f"{args.run} is no folder; name one such as work_dir/lightning_logs/version_0")
    args.out = args.out or args.run / "index.html"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Lines and grids -> page."""
    args = parse_args(argv)
    from datasets.files import write_text
    from metrics.run_page import run_page

    try:
        content = run_page(args.run, args.out.parent)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, content)
    except (ValueError, OSError) as error:
        refuse(str(error))
    print(f"open {args.out}")


if __name__ == "__main__":
    main()
