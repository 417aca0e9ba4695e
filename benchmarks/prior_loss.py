"""What each kind of noise prior knows of images that it was not measured on, at several noise levels.

    python tool_make_streets.py
    python noise_prior.py --dataset streets --ckpt models/streets_base.safetensors --covariance
    python benchmarks/prior_loss.py --prior statistics/streets/streets_train_128x256.safetensors

The start loss (docs/noise_priors.md) of validation frames, in nats for each latent value: lower is better,
and a difference says what a choice costs. Rows are the kinds, then the published arithmetic of each choice,
then kinds with the covariance of the channels, if the file has it. A difference comes with its standard error
over frames, as all rows see the same ones. Prints the table to stderr and one line of JSON.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import figures, open_project, report, say

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.priors.moments import LatentMoments


class Choice(NamedTuple):
    """One row: a kind, how it is taken, and the row that it is held against."""

    name: str
    kind: str
    options: dict[str, Any]
    against: str | None
    covariance: bool = False


KINDS = ("normal", "spatial", "class", "spatial-class", "spatial-class-joint", "class-spatial-joint")
WITH_CHANNELS = ("spatial", "class", "spatial-class-joint")
CHOICES = (
    *(Choice(kind, kind, {}, "normal" if kind != "normal" else None) for kind in KINDS),
    Choice("class, by image", "class", {"weighting": "images"}, "class"),
    Choice("spatial-class, undivided", "spatial-class", {"undivided": True}, "spatial-class"),
    *(
        Choice(f"{kind}, not shrunk", kind, {"shrinkage": 0}, kind)
        for kind in ("spatial-class-joint", "class-spatial-joint")
    ),
    *(Choice(f"{kind}, covariance", kind, {}, kind, covariance=True) for kind in WITH_CHANNELS),
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--prior", type=Path, required=True, help="of training frames")
    add("--root", type=Path, default=Path("data/streets"), help="Streets tree (default: %(default)s)")
    add("--ckpt", type=Path, default=Path("models/streets_base.safetensors"), help="(default: %(default)s)")
    add("--config", default="models/cldm_streets.yaml", help="model file of --ckpt (default: %(default)s)")
    add("--frames", type=int, default=200, help="validation frames (default: %(default)s)")
    add("--levels", type=int, nargs="+", default=[799, 599, 399], help="timesteps (default: 799 599 399)")
    args = parser.parse_args(argv)
    for name in ("prior", "root", "ckpt"):
        if not getattr(args, name).exists():
            parser.error(f"--{name} {getattr(args, name)} does not exist")
    if args.frames < 2 or not all(0 <= level < 1000 for level in args.levels):
        parser.error("--frames must be 2 or more, --levels in 0..999")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Latents of frames -> losses of all rows -> table."""
    args = parse_args(argv)
    args.prior, args.root, args.ckpt = (path.resolve() for path in (args.prior, args.root, args.ckpt))
    open_project()
    from cldm.prior_file import read_whole

    card, moments = read_whole(args.prior)
    frames = latents_of(args, card.size)
    losses = {
        choice.name: losses_of(choice, moments, frames, args)
        for choice in CHOICES
        if moments.has_covariance or not choice.covariance
    }
    rows = [row_of(choice, losses, args.levels) for choice in CHOICES if choice.name in losses]
    say(markdown(rows, args.levels))
    kept = {"prior": args.prior.name, "images": card.images, "frames": args.frames, "levels": args.levels}
    report({"benchmark": "prior_loss", **kept, "rows": rows})


def latents_of(args: argparse.Namespace, size: tuple[int, int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Labels (1, H, W), and mean and variance (1, C, h, w) of the latent of each frame."""
    import torch

    from cldm.model import load_model_config
    from cldm.prior_pass import load_first_stage, posteriors
    from datasets import create_labelled

    first_stage = load_first_stage(load_model_config(args.config), args.ckpt, device="cpu")
    source = create_labelled("streets", root=str(args.root), split="val", size=list(size))
    if len(source) < args.frames:
        raise SystemExit(f"expected {args.frames} validation frames in {args.root}, found {len(source)}")
    found = []
    for index in range(0, len(source), len(source) // args.frames)[: args.frames]:
        frame = source[index]
        mean, variance = posteriors(first_stage, {"jpg": frame["jpg"][None]}, 1)
        found.append((torch.as_tensor(frame["label"]).long()[None], mean, variance))
    return found


def losses_of(
    choice: Choice,
    moments: LatentMoments,
    frames: Sequence[tuple[Tensor, Tensor, Tensor]],
    args: argparse.Namespace,
) -> list[list[float]]:
    """The start loss at each level, of each frame."""
    from cldm.model import load_model_config
    from ldm.models.diffusion.schedule import make_betas, schedule_buffers
    from ldm.priors.prior import NoisePrior
    from ldm.priors.start import start_loss

    how = load_model_config(args.config).model.params
    betas = make_betas("linear", how.linear_start, how.linear_end, how.timesteps)
    abar = schedule_buffers(betas)["alphas_cumprod"].double().tolist()
    taken = moments if choice.covariance or not moments.has_covariance else without_covariance(moments)
    prior = NoisePrior(taken, choice.kind, **choice.options)
    given = [(prior.gaussian(labels), mean, variance) for labels, mean, variance in frames]
    return [[start_loss(*one, abar[level]) for one in given] for level in args.levels]


def without_covariance(moments: LatentMoments) -> LatentMoments:
    """The same moments with the variances of the channels alone."""
    from dataclasses import replace

    import numpy as np

    from ldm.priors.moments import LatentMoments

    def diagonal(table: Any) -> Any:
        return replace(table, m2=np.ascontiguousarray(np.diagonal(table.m2, axis1=-2, axis2=-1)))

    return LatentMoments(*(diagonal(table) for table in vars(moments).values()))


def row_of(choice: Choice, losses: dict[str, list[list[float]]], levels: Sequence[int]) -> dict[str, Any]:
    """Mean loss at each level, and the difference from the row that it is held against."""
    own = losses[choice.name]
    row: dict[str, Any] = {"name": choice.name, "against": choice.against, "loss": {}, "difference": {}}
    for level, values, others in zip(levels, own, losses.get(choice.against or "", own), strict=True):
        differences = [a - b for a, b in zip(values, others, strict=True)]
        mean = sum(differences) / len(differences)
        spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1))
        row["loss"][str(level)] = figures(sum(values) / len(values), 4)
        row["difference"][str(level)] = [figures(mean, 3), figures(spread / math.sqrt(len(differences)), 2)]
    return row


def markdown(rows: Sequence[dict[str, Any]], levels: Sequence[int]) -> str:
    """The table for people."""
    head = ["prior", *(f"loss at {level}" for level in levels), "against", f"difference at {levels[0]}"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        mean, error = row["difference"][str(levels[0])]
        against = [row["against"], f"{mean:+.2g} +- {error:.1g}"] if row["against"] else ["", ""]
        lines.append([row["name"], *(f"{row['loss'][str(level)]:.4g}" for level in levels), *against])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
