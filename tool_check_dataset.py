"""Is a data set sound? python tool_check_dataset.py --dataset NAME [--root DIR] [key=value ...]

    python tool_check_dataset.py --dataset cityscapes
    python tool_check_dataset.py --dataset triples --root my_rows --sheet sheet.png data.label_space=ade20k

Reads every frame of every split: pairs, prompts, damaged files, ids and what they would mean if they were
shifted, swapped maps, leaks between splits. Takes the data.* keys of tutorial_train.py. The exit status is 0
where training may start, 1 where it should not, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cldm.cli import refuse
from datasets import DATASETS, find_entry

if TYPE_CHECKING:
    from datasets.check.findings import Report
    from datasets.check.listing import Source


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--dataset", required=True, help=f"one of {', '.join(DATASETS)}")
    add("--root", help="folder of the data (default: that of configs/NAME.yaml, or the data set's own)")
    add("--split", nargs="+", metavar="NAME", help="default: all that are on disk")
    add("--quick", action="store_true", help="headers of files, and a handful of frames")
    add("--json", type=Path, metavar="FILE", help="write everything that was found")
    add("--sheet", type=Path, metavar="FILE.png", help="write image, map, overlay and prompt of some frames")
    add("--rows", type=int, default=12, help="frames on the sheet, faulty ones first (default: %(default)s)")
    add("--workers", type=int, default=0, metavar="N", help="threads (default: one for each core)")
    add("overrides", nargs="*", metavar="key=value", help="data.* keys of a run, e.g. data.size=[512,1024]")
    args = parser.parse_intermixed_args(argv)
    if args.workers < 0 or args.rows < 1:
        parser.error("--workers must be 0 or more, --rows 1 or more")
    for path in (args.json, args.sheet):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path.parent} is no folder; make it first")
    if args.sheet is not None and args.sheet.suffix.lower() != ".png":
        parser.error(f"--sheet must be a .png file, found {args.sheet}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Check, write what was asked for, print, and exit with the verdict."""
    args = parse_args(argv)
    from omegaconf import OmegaConf

    from cldm.config import load_run_config
    from datasets.check import check_dataset, open_source, options_among
    from datasets.files import write_text

    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what data sets warn of is in the report
    try:
        find_entry(args.dataset)
        settings = load_run_config(args.dataset, None, args.overrides).data
        root, options = (
            args.root or settings.root,
            options_among(args.dataset, OmegaConf.to_object(settings).__dict__),
        )
        report = check_dataset(
            args.dataset, root, splits=args.split, options=options, quick=args.quick, workers=args.workers
        )
        print(report.text(), flush=True)
        if args.json is not None:
            write_text(args.json, report.to_json())
        if args.sheet is not None:
            write_sheet(args.sheet, open_source(args.dataset, root, options), report, args.rows)
    except (ValueError, OSError) as error:
        refuse(str(error))
    finally:
        logger.setLevel(level)
    sys.exit(0 if report.may_train else 1)


def write_sheet(path: Path, source: Source, report: Report, rows: int) -> None:
    """Frames as image, map, overlay and prompt, one below the other."""
    from cldm.pictures import overlay, sheet, write_png
    from datasets.check.frame_pictures import sheet_rows

    shown = sheet_rows(source, report, rows)
    if not shown:
        print(f"no sheet is written to {path}: there is no frame to show")
        return
    write_png(path, sheet([(p.photo, p.painted, overlay(p.photo, p.painted), p.words) for p in shown]))


if __name__ == "__main__":
    main()
