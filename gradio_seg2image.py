"""Paint streets from label maps in the browser: python gradio_seg2image.py, then open the address it prints.

    python gradio_seg2image.py
    python gradio_seg2image.py --ckpt work_dir/lightning_logs/version_0/checkpoints/step=005000.safetensors \\
        --size 512 1024 --examples data/cityscapes/gtFine/val
    python gradio_seg2image.py --listen --auth me:a-long-password

A label map (label ids, train ids or the colours of Cityscapes) or an example goes in, images come out, beside
themselves under the map; each PNG holds its settings. The page answers to this machine alone; --listen and
--share open it to others and need --auth. It reads and writes one temporary folder, removed at the end.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from cldm.cli import keep_freed_memory, refuse
from cldm.config import project_path
from webui.segmentation import SEGMENTATION
from webui.session import MAX_IMAGE_PIXELS, load_session

MAX_PORT = 65535


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the flags, before torch and gradio are imported."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    what = parser.add_argument_group("model", "by default the Streets control and its base")
    add = what.add_argument
    add("--ckpt", type=Path, help="a whole model, or a control branch over its base")
    add("--base", type=Path, help="base of a control branch, if neither recorded in it nor in models/")
    add("--config", type=Path, help="model YAML file; by default the recorded one, or the architecture's")
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
    for path in filter(None, (args.ckpt, args.base, args.config, args.examples)):
        if not path.exists():
            return f"{path} does not exist"
    if args.examples and not args.examples.is_dir():
        return f"--examples {args.examples} is no folder; name the folder that holds the maps"
    if args.size and any(side < 64 or side % 64 for side in args.size):
        return f"--size must be multiples of 64, found {args.size[0]} {args.size[1]}"
    if args.size and args.size[0] * args.size[1] > MAX_IMAGE_PIXELS:
        return f"--size must be at most {MAX_IMAGE_PIXELS} pixels, found {args.size[0]} {args.size[1]}"
    if args.port is not None and not 1 <= args.port <= MAX_PORT:
        return f"--port must lie in 1..{MAX_PORT}, found {args.port}"
    if args.auth is not None and not all(args.auth.partition(":")):
        return "--auth must be USER:PASSWORD"
    if (args.listen or args.share) and args.auth is None:
        return "--listen and --share let others use the page; give --auth USER:PASSWORD with them"
    if args.ckpt is None:
        return find_missing_weights()
    return ""


def find_missing_weights() -> str:
    """Which of the default weights are not there, and what to do."""
    missing = [name for name in SEGMENTATION.weights if not project_path(name).is_file()]
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder is removed then, too
    try:
        run(args)
    except KeyboardInterrupt:
        pass
    except (ValueError, OSError) as error:
        refuse(str(error))


def run(args: argparse.Namespace) -> None:
    """Build what was asked for and serve it."""
    from webui.examples import load_examples
    from webui.folder import KEPT, private_folder
    from webui.painter import Painter

    with private_folder() as folder:
        checkpoint = args.ckpt or project_path(SEGMENTATION.weights[0])
        session = load_session(
            folder,
            checkpoint,
            base=args.base,
            config=args.config,
            device=args.device,
            precision=args.precision,
            size=tuple(args.size) if args.size else None,
        )
        examples = load_examples(SEGMENTATION, args.examples, folder / KEPT / "streets", session.size)
        print("the model is ready; the page takes some seconds more", file=sys.stderr)
        from webui.page import build_page
        from webui.server import serving

        page = build_page(Painter(SEGMENTATION, session, examples))
        auth = tuple(args.auth.split(":", 1)) if args.auth else None
        with serving(
            page, folder, port=args.port, auth=auth, listen=args.listen, share=args.share
        ) as address:
            print(f"open {address} (stop with Ctrl-C)", flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    main()
