"""Measure generated images under a protocol, or compare such measurements.

    python evaluate.py out/
    python evaluate.py --fake out/ --real data/cityscapes --labels data/cityscapes --protocol classic
    python evaluate.py compare a/card.json b/card.json --format latex

A folder of generate.py says by itself which maps it was made from; of others name --real, --labels and
--dataset, and call each image after its map. A protocol (configs/protocols/NAME.yaml, or a file) fixes size,
filter, segmenter, metrics and least numbers of images. Written are OUT/card.json with the figures and all
that decides them, and OUT/index.html to look at. What networks make of the images is kept in CACHE, so a run
that was stopped goes on; --shard 1/4 to 4/4 share the work, and the command without it brings it together.
Weights are never downloaded: docs/evaluation.md says which are needed, what is missing is named, and the
rest is computed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cldm.cli import keep_freed_memory, parse_shard, refuse

if TYPE_CHECKING:
    from metrics.evaluation import Request

COMPARE = "compare"
FORMATS = ("markdown", "latex")
WEIGHTS = ("inception", "alexnet", "segmenter")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments, before anything slow is imported."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    text = "a folder of generated images; or the word compare and two cards or more"
    parser.add_argument("what", nargs="*", metavar="WHAT", help=text)
    add = parser.add_argument_group("what is measured").add_argument
    add("--fake", type=Path, metavar="DIR", help="generated images, PNG")
    add("--real", type=Path, metavar="DIR", help="a data set or a folder (default: as in training)")
    add("--labels", type=Path, metavar="DIR", help="a data set or a folder of maps (default: as in training)")
    add("--labels_hold", choices=("auto", "label_ids", "train_ids", "colours"), default="auto")
    add("--dataset", help="whose maps they are (default: as in training)")
    add("--split", help="of a data set (default: as the run validated, or val)")
    add("--ckpt", type=Path, metavar="FILE", help="that made the images (default: found by its hash)")
    add("--allow_leak", action="store_true", help="measure images of maps that were trained on")
    add = parser.add_argument_group("how").add_argument
    add("--protocol", help="classic, native, streets, or a YAML file (default: by the data set)")
    add("--allow_few", action="store_true", help="drop the protocol's least numbers of images")
    add("--inception", type=Path, metavar="FILE", help="weights of the Inception of the FID")
    add("--alexnet", type=Path, metavar="FILE", help="weights of the AlexNet of LPIPS")
    add("--segmenter", type=Path, metavar="PATH", help="a folder of transformers, or a Streets judge")
    add("--predicted", type=Path, metavar="DIR", help="maps that a segmenter elsewhere made of the images")
    add("--predicted_real", type=Path, metavar="DIR", help="and of the real ones")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--cache", type=Path, default=Path("cache/evaluation"), help="(default: %(default)s)")
    add("--shard", metavar="I/N", default="1/1", help="compute this part of the blocks and write no card")
    add = parser.add_argument_group("what is written").add_argument
    add("--out", type=Path, metavar="DIR", help="(default: output/evaluation/NAME of the images' folder)")
    add("--format", choices=FORMATS, default="markdown", help="of the table (default: %(default)s)")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what does not go together; paths and shard in their places."""
    args.cards = [Path(word) for word in args.what[1:]] if args.what[:1] == [COMPARE] else []
    if args.what[:1] == [COMPARE]:
        if len(args.cards) < 2:
            parser.error("compare takes two cards or more")
        return
    folders = [Path(word) for word in args.what] + ([args.fake] if args.fake else [])
    if len(folders) != 1:
        parser.error(f"expected one folder of generated images, found {len(folders)}")
    args.fake = folders[0]
    for name in ("fake", "real", "labels", "ckpt", *WEIGHTS, "predicted", "predicted_real"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            parser.error(f"{path} does not exist")
    if bool(args.predicted) != bool(args.predicted_real):
        parser.error(
            "--predicted and --predicted_real belong together: without the second there is no ceiling"
        )
    args.shard = parse_shard(parser, args.shard)
    args.out = args.out or Path("output/evaluation") / args.fake.resolve().name


def main(argv: Sequence[str] | None = None) -> None:
    """Images -> passes -> card and page; or cards -> table."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    keep_freed_memory()
    try:
        print(compare_cards(args) if args.cards else measure(args))
    except (ValueError, OSError) as error:
        refuse(str(error))


def compare_cards(args: argparse.Namespace) -> str:
    """The table."""
    from metrics.compare import compare

    return compare(args.cards, args.format)


def measure(args: argparse.Namespace) -> str:
    """Evaluate, write card and page; the figures for people."""
    from metrics.card import write_card
    from metrics.compare import FORMATS as WRITERS
    from metrics.compare import table_of
    from metrics.evaluation import evaluate
    from metrics.evaluation_page import write_report

    findings = evaluate(request_of(args))
    if findings is None:
        return f"shard {args.shard[0]} of {args.shard[1]} is computed; run without --shard when all are"
    write_card(args.out / "card.json", findings.card)
    report = write_report(findings, args.out)
    header, rows = table_of({args.fake.resolve().name: findings.card})
    return "\n".join([WRITERS[args.format](header, rows), *remarks(findings.card), f"open {report}"])


def request_of(args: argparse.Namespace) -> Request:
    """The arguments as `metrics.evaluation` takes them."""
    from metrics.blocks import Shard
    from metrics.evaluation import Request

    same = ("fake", "real", "labels", "labels_hold", "dataset", "split", "protocol", "predicted")
    same += ("predicted_real", "cache", "device", "allow_leak", "allow_few")
    return Request(
        checkpoint=args.ckpt,
        shard=Shard(args.shard[0] - 1, args.shard[1]),
        weights={name: getattr(args, name) for name in WEIGHTS if getattr(args, name)},
        **{name: getattr(args, name) for name in same},
    )


def remarks(card: dict[str, Any]) -> list[str]:
    """What has to be said beside the figures."""
    lines = [f"{metric} is left out: {why}" for metric, why in card["left_out"].items()]
    segmentation = card["metrics"].get("segmentation", {}).get("samples", {})
    if segmentation.get("absent"):
        lines.append(f"classes that no map has: {', '.join(segmentation['absent'])}")
    if card["real"].get("grey"):
        lines.append(
            f"{card['real']['grey']} real images are grey; they are taken as they are, in three channels"
        )
    if card["leaks"]["status"] != "clean":
        lines.append(f"leak check: {card['leaks'].get('why') or len(card['leaks']['leaked'])}")
    return lines


if __name__ == "__main__":
    main()
