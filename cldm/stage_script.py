"""What the scripts of the stages share: their command line, the way to a slice, the notes of its file."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cldm.cli import refuse
from cldm.stages import load_stage


def parse_stage_args(
    argv: Sequence[str] | None, doc: str | None, run_file: str, result: str
) -> argparse.Namespace:
    """Read the flags of a stage's script.

    doc       of the script, which is its help
    run_file  settings of the stage
    result    name of the file that a slice ends with, in slice.folder
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=layout)
    add = parser.add_argument
    add("--config", default=run_file, help="run file (default: %(default)s)")
    add("--minutes", type=float, default=None, help="of training in this slice (default: slice.minutes)")
    add("--out", type=Path, default=None, help=f"file to write (default: {result} in slice.folder)")
    add("--print_config", action="store_true", help="print the settings and exit")
    add("overrides", nargs="*", metavar="key=value", help="any setting, e.g. train.lr=5e-4")
    args = parser.parse_intermixed_args(argv)
    args.result = result
    return args


def read_stage(args: argparse.Namespace, schema: type, check: Callable[[DictConfig], None]) -> DictConfig:
    """The settings that the flags ask for; what is wrong with them is said in a sentence."""
    flags = [] if args.minutes is None else [f"slice.minutes={args.minutes}"]
    try:
        config = load_stage(schema, args.config, [*flags, *args.overrides])
        check(config)
    except (ValueError, FileNotFoundError) as error:
        refuse(str(error))
    return config


def run_stage(
    args: argparse.Namespace, config: DictConfig, train: Callable[[DictConfig, Path], None]
) -> None:
    """Train one slice, logging to stderr; what is wrong is said in a sentence."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        train(config, args.out or Path(config.slice.folder) / args.result)
    except (ValueError, FileNotFoundError) as error:
        refuse(str(error))


def notes_of(config: DictConfig, figures: Mapping[str, Any], **more: str) -> dict[str, str]:
    """What made a file, for its metadata: settings, last figures, and `more` that the script knows."""
    return {"run_config": OmegaConf.to_yaml(config), "figures": json.dumps(figures), **more}


def closing_line(last: dict[str, Any]) -> str:
    """Whether there is something left to do."""
    return "the run is complete" if last["step"] == last["steps"] else "the same command continues"
