"""Write the page of `make demo`: python tool_demo_page.py [FOLDER]

    python tool_demo_page.py
    python tool_demo_page.py output/demo --run work_dir/lightning_logs/version_3

Tells in pictures what is in FOLDER: the rendered data, the training with its curves, samples of the control
that was trained and of the shipped one, the judge's figures on both, and one map under five prompts. Writes
FOLDER/index.html and its pictures, FOLDER/pictures; nothing in it comes from elsewhere. A part that is not
there is named with the command that makes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cldm.cli import refuse

PARTS = {  # by flag: where it is in FOLDER, and what it is
    "data": ("streets", "the rendered tree that was trained on"),
    "game": ("streets_game", "the same scenes as a game"),
    "run": ("lightning_logs/version_0", "log folder of the training"),
    "fresh": ("fresh", "samples of the control that was trained"),
    "shipped": ("shipped", "samples of the shipped control"),
    "cards": ("cards", "folder of the judge's fresh.json and shipped.json"),
    "scene": ("scene", "tree of one scene under five conditions"),
    "prompts": ("prompts", "samples for it"),
    "commands": ("commands.tsv", "lines of start in seconds, section, command"),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the flags."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    folder = Path("output/demo")
    parser.add_argument("folder", type=Path, nargs="?", default=folder, help="(default: %(default)s)")
    for flag, (place, what) in PARTS.items():
        parser.add_argument(f"--{flag}", type=Path, metavar="PATH", help=f"{what} (default: FOLDER/{place})")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder; make demo makes output/demo")
    for flag in PARTS:
        if (path := getattr(args, flag)) and not path.exists():
            parser.error(f"--{flag} {path} does not exist")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Folders -> story -> page."""
    args = parse_args(argv)
    from datasets.files import write_text
    from metrics.demo_inputs import read_commands
    from metrics.demo_page import Story, tell

    at = {flag: getattr(args, flag) or args.folder / place for flag, (place, _) in PARTS.items()}
    pictures = args.folder / "pictures"
    try:
        pictures.mkdir(exist_ok=True)
        for earlier in pictures.glob("*.png"):
            earlier.unlink()
        write_text(args.folder / "index.html", tell(Story(at, pictures, read_commands(at["commands"]))))
    except (ValueError, OSError) as error:
        refuse(str(error))
    print(f"open {args.folder / 'index.html'}")


if __name__ == "__main__":
    main()
