"""Does a noise prior make better images? Streets samples from several starts, judged; a resumable table.

    python tool_make_streets.py
    python noise_prior.py --dataset streets --ckpt models/streets_base.safetensors
    python benchmarks/prior_table.py --out output/priors \\
        --prior statistics/streets/streets_train_128x256.safetensors

Rows are kinds of priors at --steps steps with every seed, then plain noise twice: with as many network
evaluations as the others have, and from --start as they do, which tells what starting there does from what
the prior does; then all kinds at --other_steps with the first seed. Plain noise starts at 999 elsewhere, the
others at --start, which is fixed before looking. The same maps and seeds under each. Samples are judged as
tool_judge_streets.py does: mean IoU with a bootstrap interval over maps, pixel accuracy, and the Streets
feature distance, which is no FID. What is done is kept, so an interrupted table goes on with the same
command. Prints the table to stderr and one line of JSON; OUT/table.md and OUT/side_by_side.png stay.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import open_project, report, say

HEADLINE = ["normal", "spatial", "class", "spatial-class-joint"]
PURE_NOISE = 999
ROWS_SHOWN = 6  # maps of the sheet


class Cell(NamedTuple):
    """One row of the table."""

    name: str
    kind: str
    steps: int
    start: int
    evaluations: int | None  # None: as many as the grid leaves
    seeds: tuple[int, ...]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add(
        "--ckpt", type=Path, default=Path("models/control_streets.safetensors"), help="(default: %(default)s)"
    )
    add("--config", type=Path, help="model file of --ckpt, if that does not record it")
    add("--prior", type=Path, required=True, help="of training frames")
    add("--root", type=Path, default=Path("data/streets"), help="Streets tree (default: %(default)s)")
    add("--judge", type=Path, default=Path("models/streets_judge.safetensors"), help="(default: %(default)s)")
    add("--out", type=Path, required=True, help="folder of everything that is made")
    add("--maps", type=int, default=250, help="validation maps (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    add("--kinds", nargs="+", default=HEADLINE, help=f"(default: {' '.join(HEADLINE)})")
    add("--steps", type=int, default=20, help="(default: %(default)s)")
    add("--other_steps", type=int, nargs="*", default=[10, 50], help="with the first seed (default: 10 50)")
    add("--start", type=int, default=799, help="first timestep of the priors (default: %(default)s)")
    add("--prompt", default="{caption}", help="(default: %(default)s)")
    add("--sampler", default="ddim", help="(default: %(default)s)")
    add("--batch_size", type=int, default=8, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("ckpt", "prior", "root", "judge"):
        if not getattr(args, name).exists():
            parser.error(f"--{name} {getattr(args, name)} does not exist")
    if args.maps < 2 or min([args.batch_size, args.steps, *args.other_steps]) < 1:
        parser.error("--maps must be 2 or more, --batch_size, --steps and --other_steps 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Sample and judge row by row; then the table."""
    args = parse_args(argv)
    for name in ("ckpt", "config", "prior", "root", "judge", "out"):
        setattr(args, name, getattr(args, name) and getattr(args, name).resolve())
    open_project()
    rows = []
    for cell in cells(args):
        folders = {seed: sample(args, cell, seed) for seed in cell.seeds}
        cards = {seed: judge(args, cell, str(seed), {seed: folder}) for seed, folder in folders.items()}
        together = "_".join(map(str, cell.seeds))
        pooled = judge(args, cell, together, folders) if len(folders) > 1 else cards[cell.seeds[0]]
        rows.append(row_of(cell, folders, cards, pooled))
        say(json.dumps(rows[-1]))
    draw_sheet(args, [cell for cell in cells(args) if cell.name in {f"{k}_{args.steps}" for k in args.kinds}])
    table = markdown(rows)
    (args.out / "table.md").write_text(table, encoding="utf-8")
    say(table)
    kept = {name: getattr(args, name) for name in ("maps", "seeds", "steps", "start", "sampler", "prompt")}
    files = {name: getattr(args, name).name for name in ("ckpt", "prior", "judge")}
    report({"benchmark": "prior_table", **kept, **files, "rows": rows})


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """The rows to make."""
    from cldm.config import SampleConfig
    from cldm.prior_sampling import timesteps_of

    def start(kind: str) -> int:
        return PURE_NOISE if kind == "normal" else args.start

    seeds = tuple(args.seeds)
    for kind in args.kinds:
        yield Cell(f"{kind}_{args.steps}", kind, args.steps, start(kind), None, seeds)
    if "normal" in args.kinds:
        settings = SampleConfig(steps=args.steps, sampler=args.sampler)
        count = len(timesteps_of(settings, args.start, None))
        yield Cell(f"normal_{args.steps}_equal", "normal", args.steps, PURE_NOISE, count, seeds)
        yield Cell(f"normal_{args.steps}_from_start", "normal", args.steps, args.start, None, seeds)
    for steps in args.other_steps:
        for kind in args.kinds:
            yield Cell(f"{kind}_{steps}", kind, steps, start(kind), None, seeds[:1])


def sample(args: argparse.Namespace, cell: Cell, seed: int) -> Path:
    """The folder with the samples of a row and a seed; what is not there is made."""
    import noise_prior_inference
    from cldm.prior_file import read_card

    target = args.out / cell.name / f"seed_{seed}"
    words = ["--dataset", "streets", "--root", args.root, "--ckpt", args.ckpt, "--prior", args.prior]
    words += ["--prior_type", cell.kind, "--diffusion_steps", cell.start, "--steps", cell.steps]
    words += ["--sampler", args.sampler, "--sample_size", args.maps, "--seed", seed, "--save_dir", target]
    words += ["--batch_size", args.batch_size, "--resolution", *read_card(args.prior).size]
    words += ["--prompt", args.prompt]
    words += ["--steps_after_start", cell.evaluations] if cell.evaluations else []
    words += ["--config", args.config] if args.config else []
    with contextlib.redirect_stdout(sys.stderr):
        noise_prior_inference.main([str(word) for word in words])
    return target / "streets" / f"streets_{args.maps}_{cell.start}_{cell.kind}"


def judge(args: argparse.Namespace, cell: Cell, name: str, folders: dict[int, Path]) -> dict[str, Any]:
    """The card of samples, made anew if they are newer."""
    import tool_judge_streets

    of = f"{name}_{args.maps}_{args.judge.stem}"
    card, images = args.out / cell.name / f"card_{of}.json", args.out / cell.name / f"judged_{of}"
    manifests = [folder / "manifest.jsonl" for folder in folders.values()]
    if not card.exists() or card.stat().st_mtime < max(path.stat().st_mtime for path in manifests):
        images.mkdir(parents=True, exist_ok=True)
        for seed, folder in folders.items():
            for line in lines_of(folder):
                link = images / f"{line['key']}_seed{seed}.png"
                link.unlink(missing_ok=True)
                link.symlink_to(folder / line["image"])
        words = ["--images", images, "--labels", args.root, "--judge", args.judge, "--out", card]
        with contextlib.redirect_stdout(sys.stderr):
            tool_judge_streets.main([str(word) for word in words])
    return json.loads(card.read_text(encoding="utf-8"))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The manifest of a run."""
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def row_of(
    cell: Cell, folders: dict[int, Path], cards: dict[int, dict[str, Any]], pooled: dict[str, Any]
) -> dict[str, Any]:
    """The figures of a row: of all seeds together, and each one's own."""
    scores, condition = pooled["segmentation"], pooled["condition"] or {}
    return {
        "prior": cell.kind,
        "start": cell.start,
        "evaluations": lines_of(folders[cell.seeds[0]])[0]["evaluations"],
        "seeds": list(cell.seeds),
        "samples": pooled["samples"],
        "distance": pooled["feature_distance"]["distance"],
        "distance_by_seed": [card["feature_distance"]["distance"] for card in cards.values()],
        "distance_of_photos": pooled["feature_distance"]["between_halves_of_the_photos"],
        "miou": scores["miou"],
        "miou_interval": scores["miou_interval"],
        "miou_by_seed": [card["segmentation"]["miou"] for card in cards.values()],
        "miou_of_photos": pooled["ceiling"]["miou"],
        "pixel_accuracy": scores["pixel_accuracy"],
        "condition": condition.get("accuracy"),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    head = [
        "prior",
        "start",
        "evaluations",
        "images",
        "feature distance (by seed)",
        "mIoU (95 %)",
        "accuracy",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        low, high = row["miou_interval"]
        by_seed = ", ".join(f"{value:.3f}" for value in row["distance_by_seed"])
        start = [row["prior"], row["start"], row["evaluations"], row["samples"]]
        figures = [f"{row['distance']:.3f} ({by_seed})", f"{row['miou']:.4f} ({low:.4f} to {high:.4f})"]
        lines.append([*map(str, start), *figures, f"{row['pixel_accuracy']:.4f}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_sheet(args: argparse.Namespace, shown: Sequence[Cell]) -> None:
    """The same maps and seed under each prior: a row for each map, the map first."""
    from cldm.pictures import sheet, write_png
    from datasets.files import read_image, read_labels
    from datasets.label_space import LabelSpace

    space, seed = LabelSpace.load("cityscapes"), args.seeds[0]
    folders = [
        args.out / cell.name / f"seed_{seed}" / "streets" / f"streets_{args.maps}_{cell.start}_{cell.kind}"
        for cell in shown
    ]
    rows = []
    for number in range(min(ROWS_SHOWN, args.maps)):
        label = read_labels(folders[0] / "gt_label" / f"{number:06d}.png")
        samples = [read_image(folder / "sample" / f"{number:06d}.png") for folder in folders]
        rows.append([space.paint(label), *samples])
    write_png(args.out / "side_by_side.png", sheet(rows))


if __name__ == "__main__":
    main()
