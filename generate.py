"""Sample images for a hint or a folder of hints, with any checkpoint that this project or ControlNet wrote.

    python generate.py --ckpt work_dir/lightning_logs/version_0/checkpoints/step=005000.safetensors \\
        --hint data/cityscapes/gtFine/val --size 512 1024 --prompt "City road scenes." --out out/
    python generate.py --ckpt models/control_v11p_sd15_seg.pth --base models/v1-5-pruned.safetensors \\
        --hint edited_map.png --hint_type colours --prompt "a street at night" --num 4 --out out/

Hints are maps of label ids (_labelIds) or train ids (_labelTrainIds), maps painted in the colours of
--palette, or with --hint_type image the hint itself. An image is OUT/<name of the hint>_seed<seed>.png with
its settings in it; contact sheets lie beside (a row for each hint: the map, then image and overlay for each
seed). A half-done folder is completed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cldm.cli import keep_freed_memory, refuse
from cldm.config import SAMPLER_NAMES, SampleConfig
from cldm.pictures import is_made, overlay, sheet, write_png
from datasets import DATASETS
from datasets.files import read_image
from datasets.hint_encoding import hint_encoding
from datasets.hints import HINT_TYPES, find_hints, prompt_of, read_hint
from datasets.label_space import LabelSpace

if TYPE_CHECKING:
    from cldm.cldm import ControlledModel

ROWS_OF_A_SHEET = 16
KEPT_HINTS = 64
SAMPLE_FLAGS = {
    "steps": "network evaluations",
    "sampler": "of the reverse process",
    "scale": "guidance",
    "strength": "of the control",
    "eta": "randomness of DDIM, 0..1",
    "negative_prompt": "what to stay away from",
}

log = logging.getLogger("generate")

HintReader = Callable[[Path], NDArray[np.uint8]]


class Job(NamedTuple):
    """One image to make."""

    hint: Path
    target: Path
    seed: int
    settings: dict[str, Any]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments, before anything slow is imported."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    what = parser.add_argument_group("what")
    add = what.add_argument
    add("--ckpt", type=Path, required=True, help="a whole model, or a control branch over its base")
    add("--base", type=Path, help="base of a control branch, if neither recorded in it nor in models/")
    add("--config", type=Path, help="model YAML file; by default the recorded one, or the architecture's")
    add("--hint", type=Path, required=True, help="a hint or a folder of hints")
    add("--hint_type", choices=HINT_TYPES, default="auto", help="what the hints are (default: %(default)s)")
    add("--palette", help="label space of ids and colours (default: as in training, or cityscapes)")
    add("--encoding", help="what label maps look like to the control (default: as in training, or colours)")
    add("--out", type=Path, required=True, help="folder to write into")
    add("--overwrite", action="store_true", help="make images again that are there with other settings")
    add("--num", type=int, default=1, help="images of a hint (default: %(default)s)")
    add("--seed", type=int, default=0, help="of a hint's first image; the next count up")
    how = parser.add_argument_group("how", "if not given, as the training run sampled, else the default")
    add = how.add_argument
    add("--prompt", help="may hold {classes} and {caption} (default: as in training, or the caption if any)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="(default: that of the hint)")
    default = SampleConfig()
    for name, text in SAMPLE_FLAGS.items():
        value, choices = getattr(default, name), SAMPLER_NAMES if name == "sampler" else None
        add(f"--{name}", type=type(value), choices=choices, help=f"{text} (default: {value!r})")
    add("--guess_mode", action=argparse.BooleanOptionalAction, help="let the control do without the prompt")
    add("--parameterization", choices=("eps", "v"), help="what the network predicts")
    where = parser.add_argument_group("where")
    add = where.add_argument
    add("--batch_size", type=int, default=4, help="images at a time (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "32", "bf16", "16"), default="auto", help="of all but the VAE")
    add("--attn_backend", choices=("sdpa", "xformers"), help="by default that of the model file")
    args = parser.parse_args(argv)
    for path in filter(None, (args.ckpt, args.base, args.config, args.hint)):
        if not path.exists():
            parser.error(f"{path} does not exist")
    out, hint = args.out.resolve(), args.hint.resolve()
    if args.hint.is_dir() and hint in (out, *out.parents):
        parser.error(f"--out {args.out} lies in the folder of the hints; its images would become hints")
    for name, least, most in (("num", 1, 10**6), ("batch_size", 1, 10**4), ("seed", 0, 2**63 - 10**6)):
        if not least <= getattr(args, name) <= most:
            parser.error(f"--{name} must lie in {least}..{most}, found {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Hints -> jobs that are not done -> model -> images -> sheets."""
    args = parse_args(argv)
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        sample = fill_from_run(args)
        jobs = list(plan_jobs(args, sample))
        todo = [job for job in jobs if not is_made(job.target, job.settings, overwrite=args.overwrite)]
        prompt = jobs[0].settings["prompt"]
        log.info("%d images, %d there already; first prompt: %s", len(jobs), len(jobs) - len(todo), prompt)
        read = hint_reader(args)
        # All of them first: a bad one is named before an image is made.
        sizes = {path: read(path).shape for path in dict.fromkeys(job.hint for job in jobs)}
        if todo:
            run_jobs(args, sample, read, batches(todo, sizes, args.batch_size))
        write_sheets(args, read, jobs)
    except (ValueError, OSError) as error:
        refuse(str(error))
    print(f"{len(jobs)} images in {args.out}")


def fill_from_run(args: argparse.Namespace) -> SampleConfig:
    """How to sample: as given, else as the training run of the checkpoint did, else by default.

    Size, prompt and encoding are filled in alike.
    """
    from cldm.recorded_run import read_recorded_run

    run = read_recorded_run(
        args.ckpt, {field.name: getattr(args, field.name) for field in fields(SampleConfig)}
    )
    if args.prompt is None:
        args.prompt = run.prompt or "{caption}"  # runs of old recorded no sentence where they took captions
    args.words, args.words_seed = run.words, run.seed
    args.size = tuple(args.size) if args.size else run.size
    args.encoding = args.encoding or run.hint or "colours"
    own = DATASETS[run.dataset].label_space if run.dataset in DATASETS else None
    args.palette = args.palette or run.label_space or own or "cityscapes"
    return run.sample


def plan_jobs(args: argparse.Namespace, sample: SampleConfig) -> Iterator[Job]:
    """One job for each hint and seed, with all that determines its image."""
    from cldm.digests import fingerprint

    settings = {
        **asdict(sample),
        "size": args.size and list(args.size),
        "hint_type": args.hint_type,
        "palette": args.palette,
        "checkpoint": args.ckpt.name,
        "checkpoint_fingerprint": fingerprint(args.ckpt),
        "base_fingerprint": args.base and fingerprint(args.base),
        "config_fingerprint": args.config and fingerprint(args.config),
        "precision": args.precision,
        "parameterization": args.parameterization,
    }
    settings |= {} if args.encoding == "colours" else {"encoding": args.encoding}
    space = LabelSpace.load(args.palette)
    root = args.hint if args.hint.is_dir() else args.hint.parent
    taken: dict[Path, Path] = {}
    for hint in find_hints(args.hint, args.hint_type):
        stem = args.out / hint.relative_to(root).with_suffix("")
        if taken.setdefault(stem, hint) != hint:
            raise ValueError(f"{taken[stem]} and {hint} would be written under one name; rename one of them")
        options = {"words": args.words, "seed": args.words_seed, "size": args.size}
        prompt = prompt_of(hint, args.prompt, kind=args.hint_type, space=space, **options)
        mark = {"hint": hint.name, "hint_fingerprint": fingerprint(hint), "prompt": prompt}
        for seed in range(args.seed, args.seed + args.num):
            target = stem.with_name(f"{stem.name}_seed{seed}.png")
            yield Job(hint, target, seed, {**settings, **mark, "seed": seed})


def hint_reader(args: argparse.Namespace) -> HintReader:
    """A function from a path to its hint, (H, W, C) uint8; the last ones are kept."""
    encoding = hint_encoding(LabelSpace.load(args.palette), args.encoding)

    @lru_cache(maxsize=KEPT_HINTS)
    def read(path: Path) -> NDArray[np.uint8]:
        hint = read_hint(path, args.hint_type, encoding, args.size)
        return (hint * 255).round().astype(np.uint8)  # exact: it was made of bytes, or of 0 and 1

    return read


def model_of(args: argparse.Namespace) -> ControlledModel:
    """The model, where and in the precision that was asked for."""
    from cldm.model import load_model, load_model_config, model_config_of, place, with_choices

    config = load_model_config(args.config) if args.config else model_config_of(args.ckpt, args.base)
    config = with_choices(config, parameterization=args.parameterization, attn_backend=args.attn_backend)
    return place(load_model(config, args.ckpt, args.base), args.device, args.precision)


def run_jobs(
    args: argparse.Namespace, sample: SampleConfig, read: HintReader, batches: Sequence[list[Job]]
) -> None:
    """Sample batch after batch; each image is written as soon as it is there."""
    import torch
    from tqdm import tqdm

    from cldm.generate import generate

    model = model_of(args)
    with tqdm(total=sum(map(len, batches)), unit="image") as bar:
        for batch in batches:
            hints = torch.from_numpy(np.stack([read(job.hint) for job in batch])).permute(0, 3, 1, 2) / 255
            prompts = [job.settings["prompt"] for job in batch]
            images = generate(model, hints, prompts, [job.seed for job in batch], sample)
            for job, image in zip(batch, images.numpy(), strict=True):
                job.target.parent.mkdir(parents=True, exist_ok=True)
                write_png(job.target, image, job.settings)
            bar.update(len(batch))


def batches(jobs: Sequence[Job], sizes: Mapping[Path, Any], batch_size: int) -> list[list[Job]]:
    """Neighbouring jobs whose hints have one size, at most `batch_size` of them."""
    runs = [list(run) for _, run in groupby(jobs, key=lambda job: sizes[job.hint])]
    return [run[i : i + batch_size] for run in runs for i in range(0, len(run), batch_size)]


def write_sheets(args: argparse.Namespace, read: HintReader, jobs: Sequence[Job]) -> None:
    """Contact sheets: a row for each hint, with the map, then image and overlay for each seed."""
    rows = {path: list(group) for path, group in groupby(jobs, key=lambda job: job.hint)}
    for page, start in enumerate(range(0, len(rows), ROWS_OF_A_SHEET), start=1):
        cells = [sheet_row(read(path), rows[path]) for path in list(rows)[start : start + ROWS_OF_A_SHEET]]
        write_png(args.out / f"contact_sheet_{page:03d}.png", sheet(cells))


def sheet_row(colours: NDArray[np.uint8], jobs: Sequence[Job]) -> list[NDArray[np.uint8]]:
    """The map, then image and overlay for each seed; of a hint that is no picture the images alone."""
    images = [read_image(job.target) for job in jobs]
    if colours.shape[-1] != 3:
        return images
    return [colours, *(part for image in images for part in (image, overlay(image, colours)))]


if __name__ == "__main__":
    main()
