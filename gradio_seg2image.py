"""Paint a street in the browser and see it appear: python gradio_seg2image.py, then open what it prints.

    python gradio_seg2image.py
    python gradio_seg2image.py --ckpt work_dir/lightning_logs/version_0/checkpoints/step=005000.safetensors \\
        --size 512 1024 --examples data/cityscapes/gtFine/val --prior noise_priors/cityscapes/mine.safetensors
    python gradio_seg2image.py --condition none --ckpt models/control_v11p_sd15_canny.pth
    python gradio_seg2image.py --listen --auth me:a-long-password

The page edits a label map, which can be loaded as ids, as colours, or read from a photo by --segmenter, and
samples images for it; each PNG holds its settings and the map. With --condition none the picture that is
loaded is the hint itself. The page answers to this machine alone; --listen and --share open it to others and
need --auth. It reads and writes one temporary folder, removed at the end. Its API: docs/webui.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cldm.cli import keep_freed_memory, refuse
from cldm.config import project_path
from datasets import DATASETS
from datasets.label_space import SPACES, LabelSpace
from webui.conditions import CONDITIONS
from webui.uploads import MAX_IMAGE_PIXELS, STEP

if TYPE_CHECKING:
    from cldm.recorded_run import RecordedRun
    from metrics.segmentation import Segmenter
    from webui.condition import Condition, Models
    from webui.painter import Painter, Segment

DEFAULT_SPACE = "cityscapes"
MAX_PORT = 65535
CLOSING_SECONDS = 2.0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the flags, before torch and gradio are imported."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    what = parser.add_argument_group("model", "by default the Streets control and its base")
    add = what.add_argument
    add("--ckpt", type=Path, help="a whole model, or a control branch over its base")
    add("--base", type=Path, help="base of a control branch, if neither recorded in it nor in models/")
    add("--config", type=Path, help="model YAML file; by default the recorded one, or the architecture's")
    add(
        "--condition",
        choices=CONDITIONS,
        default=next(iter(CONDITIONS)),
        help="of the control (default: %(default)s)",
    )
    add("--palette", choices=SPACES, help="classes of the maps (default: as in training, or cityscapes)")
    add("--prior", type=Path, help="file of noise_prior.py (default: with the Streets models theirs)")
    add("--segmenter", type=Path, help="reads photos: a folder of transformers, or the weights of a judge of"
        " Streets (default: with the Streets models theirs)")  # fmt: skip
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="(default: the training run's, or each map's)")
    add("--examples", type=Path, metavar="DIR", help="maps to pick from (default: of Streets, validation)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "32", "bf16", "16"), default="auto", help="of all but the VAE")
    who = parser.add_argument_group("who may call")
    add = who.add_argument
    add("--port", type=int, help="(default: the first free one from 7860 on)")
    add("--auth", metavar="USER:PASSWORD", help="ask for a name and a password")
    add("--listen", action="store_true", help="answer to other machines, too; only with --auth")
    add("--share", action="store_true", help="a public address through Gradio's servers; only with --auth")
    args = parser.parse_args(argv)
    if problem := find_problem(args):
        parser.error(problem)
    return args


def find_problem(args: argparse.Namespace) -> str:
    """What is wrong with the flags, in a sentence; nothing if nothing is."""
    for path in filter(None, (args.ckpt, args.base, args.config, args.examples, args.prior, args.segmenter)):
        if not path.exists():
            return f"{path} does not exist"
    if args.examples and not args.examples.is_dir():
        return f"--examples {args.examples} is no folder; name the folder that holds the maps"
    if args.size and any(side < STEP or side % STEP for side in args.size):
        return f"--size must be multiples of 64, found {args.size[0]} {args.size[1]}"
    if args.size and args.size[0] * args.size[1] > MAX_IMAGE_PIXELS:
        return f"--size must be at most {MAX_IMAGE_PIXELS} pixels, found {args.size[0]} {args.size[1]}"
    if args.port is not None and not 1 <= args.port <= MAX_PORT:
        return f"--port must lie in 1..{MAX_PORT}, found {args.port}"
    if args.auth is not None and not all(args.auth.partition(":")):
        return "--auth must be USER:PASSWORD"
    if (args.listen or args.share) and args.auth is None:
        return "--listen and --share let others use the page; give --auth USER:PASSWORD with them"
    condition = CONDITIONS[args.condition](LabelSpace.load(args.palette or DEFAULT_SPACE))
    if condition.space is None and (args.prior or args.segmenter or args.palette):
        return f"--condition {args.condition} paints from pictures; leave --prior, --segmenter, --palette out"
    return find_missing_weights(args.condition, condition.models) if args.ckpt is None else ""


def find_missing_weights(name: str, models: Models) -> str:
    """Which of the default weights are not there, and what to do."""
    if models.checkpoint is None:
        return f"--condition {name} has no model of its own; name one with --ckpt"
    missing = [file for file in (models.checkpoint, models.base) if file and existing(file) is None]
    if not missing:
        return ""
    return (
        f"expected the weights of Streets, found no {' and no '.join(missing)}; get them as models/README.md "
        "says, or name another model with --ckpt"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Flags -> model -> page -> server, until interrupted."""
    args = parse_args(argv)
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio calls its own server
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed then, too
    try:
        run(args)
    except KeyboardInterrupt:
        pass
    except (ValueError, OSError) as error:
        refuse(str(error))


def run(args: argparse.Namespace) -> None:
    """Build what was asked for and serve it, until interrupted; the model is read meanwhile."""
    from webui.folder import private_folder

    has_ended = True
    try:
        with private_folder() as folder:
            painter = make_painter(args, folder)
            from webui.page import build_page
            from webui.server import serving

            page = build_page(painter)
            auth = tuple(args.auth.split(":", 1)) if args.auth else None
            options = {"port": args.port, "auth": auth, "listen": args.listen, "share": args.share}
            try:
                with serving(page, folder, **options) as address:
                    print(f"open {address} (stop with Ctrl-C)", flush=True)
                    painter.session.loading.result()  # or the model's refusal, which ends the page
                    print("the model is ready", file=sys.stderr)
                    threading.Event().wait()
            finally:
                has_ended = painter.close(CLOSING_SECONDS)
    finally:
        if not has_ended:  # torch aborts where a thread still computes when Python ends
            sys.stdout.flush()
            os._exit(0)


def make_painter(args: argparse.Namespace, folder: Path) -> Painter:
    """All of the page but its widgets."""
    from cldm.recorded_run import read_recorded_run
    from webui.examples import load_examples
    from webui.folder import KEPT
    from webui.painter import Painter
    from webui.session import open_session
    from webui.starts import Starts

    if args.ckpt is None:
        models = CONDITIONS[args.condition](LabelSpace.load(DEFAULT_SPACE)).models
        args.ckpt = project_path(str(models.checkpoint))
        args.prior = args.prior or existing(models.prior)
        args.segmenter = args.segmenter or existing(models.segmenter)
    recorded = read_recorded_run(args.ckpt)
    condition = make_condition(args, recorded)
    session = open_session(
        folder,
        args.ckpt,
        recorded,
        base=args.base,
        config=args.config,
        device=args.device,
        precision=args.precision,
        size=tuple(args.size) if args.size else None,
        starts=Starts(args.prior, condition.space) if args.prior and condition.space else None,
    )
    examples = load_examples(condition, args.examples, folder / KEPT / "maps", session.size)
    segment = make_segmenter(args.segmenter, condition, args.device) if args.segmenter else None
    return Painter(condition, session, examples, segment)


def make_condition(args: argparse.Namespace, run: RecordedRun) -> Condition:
    """What the page is about; a control that was trained on other hints than it offers is refused."""
    own = DATASETS[run.dataset].label_space if run.dataset in DATASETS else None
    space = LabelSpace.load(args.palette or run.label_space or own or DEFAULT_SPACE)
    condition = CONDITIONS[args.condition](space)
    if condition.space is None:
        return condition
    if run.hint not in (None, "colours"):
        raise ValueError(
            f"{args.ckpt}: expected a control of colour maps, which this page paints, found one that was"
            f" trained with data.hint={run.hint}; sample it with generate.py"
        )
    return condition


def make_segmenter(path: Path, condition: Condition, device: str) -> Segment | None:
    """What reads photos for a page that paints label maps; it is loaded with the first of them."""
    space = condition.space
    if space is None:
        return None

    @cache
    def segmenter() -> Segmenter:
        from cldm.model import find_device
        from metrics.segmenters import load_segmenter

        return load_segmenter(path, space, find_device(device))

    return lambda photo: segmenter()(photo[None])[0].astype("uint8")


def existing(name: str | None) -> Path | None:
    """A file that ships with the project, if it is there."""
    return project_path(name) if name and project_path(name).is_file() else None


if __name__ == "__main__":
    main()
