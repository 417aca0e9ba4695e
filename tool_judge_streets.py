"""Ask the Streets judge: python tool_judge_streets.py --real ROOT | --first_stage FILE | --images DIR

    python tool_judge_streets.py --real data/streets
    python tool_judge_streets.py --first_stage models/streets_base.safetensors --labels data/streets
    python tool_judge_streets.py --images out/ --labels data/streets --out card.json

--real judges the validation photos of a Streets tree: the ceiling of every other figure. --first_stage judges
what the autoencoder of a weight file makes of these photos, beside the photos. --images judges samples that
generate.py made from validation maps: against their maps, against the maps of others, beside the photos of
the same maps; whether they show the condition that their prompt names; and how far their features lie from
those of the photos (the Streets feature distance, which is no FID). Intervals of 95 % are over maps drawn
again. OUT gets the figures with all that determines them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cldm.cli import keep_freed_memory, refuse

if TYPE_CHECKING:
    from metrics.judge import StreetsJudge
    from metrics.judge_data import LabelledFrames

SPLIT = "val"
FRAMES_AT_ONCE = 40  # through the autoencoder, between two movements of the progress bar


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the flags."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--real", type=Path, metavar="ROOT", help="a Streets tree; its photos are judged")
    what.add_argument("--first_stage", type=Path, metavar="FILE", help="weights with an autoencoder")
    what.add_argument("--images", type=Path, metavar="DIR", help="samples that generate.py wrote")
    add = parser.add_argument
    add(
        "--labels",
        type=Path,
        metavar="ROOT",
        default=Path("data/streets"),
        help="the Streets tree with photos and maps, for the last two (default: %(default)s)",
    )
    add(
        "--judge",
        type=Path,
        metavar="FILE",
        default=Path("models/streets_judge.safetensors"),
        help="weights of the judge (default: %(default)s)",
    )
    add("--count", type=int, metavar="N", help="validation frames to take (default: all)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--out", type=Path, help="JSON file to write the card to")
    args = parser.parse_args(argv)
    args.labels = args.real or args.labels
    for path in filter(None, (args.first_stage, args.images, args.labels, args.judge)):
        if not path.exists():
            parser.error(f"{path} does not exist")
    if args.count is not None and args.count < 2:
        parser.error(f"--count must be 2 or more, found {args.count}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Judge -> card -> table."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    keep_freed_memory()
    try:
        card = make_card(args)
        if args.out:
            from metrics.card import write_card

            write_card(args.out, card)
    except (ValueError, OSError) as error:
        refuse(str(error))
    print(page(card))


def make_card(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one question, and what determines them."""
    from cldm.model import find_device
    from metrics.card import data_card, file_card, renderer_of, versions
    from metrics.judge import StreetsJudge
    from metrics.judge_data import read_labelled
    from metrics.samples import read_samples

    judge = StreetsJudge.load(args.judge, find_device(args.device))
    samples = read_samples(args.images) if args.images else None
    size = samples.images.shape[1:3] if samples else tuple(renderer_of(args.labels)["size"])
    frames = read_labelled(args.labels, SPLIT, size, args.count)
    figures = judge_frames(args, judge, frames, samples)
    sources = {"judge": file_card(args.judge), "data": data_card(args.labels, SPLIT, frames)}
    if args.first_stage:
        sources["first_stage"] = file_card(args.first_stage)
    return {**figures, **sources, "versions": versions()}


def judge_frames(
    args: argparse.Namespace, judge: StreetsJudge, frames: LabelledFrames, samples: Any
) -> dict[str, Any]:
    """The figures that were asked for."""
    from metrics.judging import real_card, reconstruction_card, samples_card

    if args.first_stage:
        pictures, psnr = reconstruct_all(args, frames)
        return {
            "question": "reconstructions",
            "psnr": psnr,
            **reconstruction_card(judge, frames, pictures),
        }
    if samples is not None:
        return {"question": "samples", **samples_card(judge, samples, frames)}
    return {"question": "photos", **real_card(judge, frames)}


def reconstruct_all(args: argparse.Namespace, frames: LabelledFrames) -> tuple[Any, float]:
    """The photos after the autoencoder, and the mean PSNR."""
    import numpy as np
    from tqdm import trange

    from cldm.base_stage import take_first_stage
    from cldm.first_stage import PREFIX, reconstruct
    from cldm.model import create_model, find_device, model_config_of
    from cldm.tensor_files import read_shapes

    if not any(name.startswith(PREFIX) for name in read_shapes(args.first_stage)):
        raise ValueError(f"{args.first_stage} holds no autoencoder; expected tensors named {PREFIX}*")
    model = create_model(model_config_of(args.first_stage))
    take_first_stage(model, args.first_stage)
    autoencoder = model.first_stage_model.to(find_device(args.device)).eval()
    pictures, psnr = [], 0.0
    for i in trange(0, len(frames), FRAMES_AT_ONCE, desc="reconstructing", unit="part"):
        some = frames.images[i : i + FRAMES_AT_ONCE]
        found, figures = reconstruct(autoencoder, some)
        pictures.append(found)
        psnr += figures["psnr"] * len(some) / len(frames)
    return np.concatenate(pictures), psnr


def page(card: dict[str, Any]) -> str:
    """The figures for people."""
    pages = {"photos": photos_page, "reconstructions": reconstructions_page, "samples": samples_page}
    data, judge = card["data"], card["judge"]
    lines = [
        f"{data['frames']} frames of {data['split']}, renderer {data['renderer']} {data['renderer_hash'][:9]}"
    ]
    if judge.get("renderer", "").split() != [data["renderer"], data["renderer_hash"]]:
        lines.append(f"the judge was trained on another renderer: {judge.get('renderer', 'not recorded')}")
    return "\n".join([*lines, *pages[card["question"]](card)])


def photos_page(card: dict[str, Any]) -> list[str]:
    """Of --real."""
    return [
        *class_table({"photos": card["segmentation"]}),
        means("photos", card["segmentation"]),
        conditions(card["condition"]),
    ]


def reconstructions_page(card: dict[str, Any]) -> list[str]:
    """Of --first_stage."""
    from metrics.judging import THIN

    originals, ours, ratio = card["originals"]["segmentation"], card["segmentation"], card["ratio"]
    thin = ", ".join(f"{name} {number(ratio['iou'][name])}" for name in THIN)
    return [
        *class_table({"photos": originals, "reconstr.": ours}, ratio),
        means("photos", originals),
        means("reconstructions", ours),
        f"ratio {number(ratio['miou'])}; of thin things: {thin}; PSNR {card['psnr']:.2f} dB",
        conditions(card["condition"]),
    ]


def samples_page(card: dict[str, Any]) -> list[str]:
    """Of --images."""
    ceiling, ours, wrong = card["ceiling"], card["segmentation"], card["shuffled"]
    distance = card["feature_distance"]
    apart = "are disjoint" if card["intervals_disjoint"] else "overlap"
    return [
        f"{card['samples']} samples of {card['maps']} maps",
        *class_table({"photos": ceiling, "samples": ours, "shuffled": wrong}, card["ratio"]),
        means("photos of these maps", ceiling),
        means("samples", ours),
        means("samples against other maps", wrong),
        f"ratio to the photos {number(card['ratio']['miou'])}; the last two intervals {apart}",
        conditions(card["condition"]),
        f"{distance['name']} {distance['distance']:.4f} from {distance['photos']} photos; between two halves"
        f" of them it is {distance['between_halves_of_the_photos']:.4f}",
    ]


def class_table(columns: dict[str, Any], ratio: dict[str, Any] | None = None) -> list[str]:
    """IoU of each class, a column for each kind of image, and the ratio of the second to the first."""
    titles = [*columns, *(["ratio"] if ratio else [])]
    lines = [f"{'IoU':<15}" + "".join(f"{title:>11}" for title in titles)]
    for name in next(iter(columns.values()))["iou"]:
        values = [column["iou"][name] for column in columns.values()]
        values += [ratio["iou"][name]] if ratio else []
        lines.append(f"{name:<15}" + "".join(f"{number(value):>11}" for value in values))
    return lines


def means(what: str, scores: dict[str, Any]) -> str:
    """The scores of all classes together."""
    low, high = scores["miou_interval"]
    line = (
        f"{what}: mIoU {scores['miou']:.4f} ({low:.4f} to {high:.4f}), pixel accuracy"
        f" {scores['pixel_accuracy']:.4f}, mean class accuracy {scores['class_accuracy']:.4f}"
    )
    return line + (f"; absent: {', '.join(scores['absent'])}" if scores["absent"] else "")


def conditions(card: dict[str, Any] | None) -> str:
    """How often the condition is recognised."""
    if card is None:
        return "condition: no prompt names one"
    each = ", ".join(f"{name} {value:.2f}" for name, value in card["by_condition"].items())
    return f"condition recognised in {card['accuracy']:.4f} of {card['images']} images ({each})"


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
