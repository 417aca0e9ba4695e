"""Measure the noise prior of a data set: the moments of its latents by place, by class, and by both.

    python noise_prior.py --dataset streets --ckpt models/streets_base.safetensors
    python noise_prior.py --dataset cityscapes --ckpt models/v1-5-pruned.safetensors --resolution 512 1024
    python noise_prior.py --dataset ade20k --ckpt FILE --shard 1/4        # and 2/4, 3/4, 4/4 elsewhere
    python noise_prior.py merge OUT.safetensors SHARD.safetensors ...
    python noise_prior.py --dataset ade20k --ckpt FILE --published statistics/ade20k/ade20k_10000

Writes SAVE_DIR/DATASET/SAVE_NAME.safetensors (its schema: docs/noise_priors.md). Every image is encoded once,
or not at all where there is a cache of its latents. An interrupted run goes on with the same command. The
last form encodes nothing: it reads the statistics that SCP-Diff published, and executes nothing in them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from cldm.cli import INTERRUPTED, check_least, keep_freed_memory, parse_shard, refuse
from cldm.config import DataConfig, check_run, load_run_config
from datasets import DATASETS, create_labelled, find_entry, registered_name

if TYPE_CHECKING:
    from cldm.prior_file import PriorCard, Range
    from cldm.prior_pass import FirstStage, Weights, Work

log = logging.getLogger("noise_prior")

TAKEN_OF_RUNS = ("crop", "zoom", "flip", "hint", "label_space", "captions")
TRAIN_IDS = ("cityscapes",)  # label spaces whose published statistics are by train id, not by file id


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the flags, before anything slow is imported."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    what = parser.add_argument_group("what")
    add = what.add_argument
    add("--dataset", default="cityscapes", help=f"one of {', '.join(DATASETS)} (default: %(default)s)")
    add("--root", help="folder of the data (default: that of the run file, or the data set's own)")
    add("--split", help="which frames; never those that figures are taken on (default: train)")
    add("--resolution", type=int, nargs=2, metavar=("H", "W"), help="of the images (default: the run file's)")
    add("--sample_size", type=int, metavar="N", help="frames, drawn without replacement (default: all)")
    add("--seed", type=int, default=42, help="of that drawing (default: %(default)s)")
    add("--ckpt", type=Path, help="weights with the autoencoder (default: those of the run file)")
    add("--base", type=Path, help="base of a --ckpt that has none, if neither recorded in it nor in models/")
    add("--config", help="model file or run file (default: the model that --ckpt is of)")
    add("--ddpm_steps", type=int, help="taken for old command lines; no moment depends on it")
    add("--covariance", action="store_true", help="of the channels as well; most users need none")
    add("--published", metavar="PREFIX", help="convert PREFIX_*.npy of SCP-Diff instead of reading data")
    where = parser.add_argument_group("where")
    add = where.add_argument
    add("--save_dir", type=Path, default=Path("statistics"), help="(default: %(default)s)")
    add("--save_name", help="(default: DATASET_SPLIT_HxW, with the number of frames if they are drawn)")
    add(
        "--show",
        type=Path,
        metavar="PAGE.html",
        help="draw the prior as well; one file, to look at in a browser",
    )
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--cache", metavar="DIR", help="latents that data.cache=DIR of a training left: nothing is encoded")
    add(
        "--shard",
        metavar="I/N",
        default="1/1",
        help="part I of N alone, into a file of its own, to be merged",
    )
    add("--processes", type=int, default=1, metavar="N", help="side by side (default: %(default)s)")
    add("--batch_size", type=int, default=4, help="images at a time (default: %(default)s)")
    add("--num_workers", type=int, help="loaders for each process (default: 4 with a GPU, else none)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("overrides", nargs="*", metavar="key=value", help="data.* keys of a run, e.g. data.crop=centre")
    args = parser.parse_intermixed_args(argv)
    least = {"sample_size": 1, "seed": 0, "processes": 1, "batch_size": 1, "num_workers": 0}
    check_least(parser, args, least)
    args.shard = parse_shard(parser, args.shard)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, convert or merge; then say what there is."""
    argv = sys.argv[1:] if argv is None else list(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        if argv[:1] == ["merge"]:
            print(merge(argv[1:]))
            return
        args = parse_args(argv)
        config = resolve(args)
        keep_freed_memory()
        print(convert(args, config) if args.published else measure(args, config))
    except KeyboardInterrupt:
        refuse("stopped; what was reached is kept, and the same command goes on", INTERRUPTED)
    except (ValueError, OSError) as error:
        refuse(str(error))


def resolve(args: argparse.Namespace) -> DictConfig:
    """The run file of the data set, under the flags."""
    args.dataset = registered_name(args.dataset)
    find_entry(args.dataset)
    given = {"data.root": args.root, "data.split": args.split, "data.cache": args.cache}
    flags = [f"{key}={value}" for key, value in given.items() if value is not None]
    flags += [f"data.size={list(args.resolution)}"] if args.resolution else []
    flags += [f"model.checkpoint={args.ckpt}"] if args.ckpt else []
    config = load_run_config(args.dataset, args.config, [*flags, *args.overrides])
    check_run(config)
    args.ckpt = Path(config.model.checkpoint)
    for path in (args.ckpt, args.base):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"expected weights at {path}, found nothing; name them with --ckpt FILE")
    if args.cache and not (Path(args.cache) / "samples").is_dir():
        raise FileNotFoundError(f"expected a cache in {args.cache}, found none; leave --cache out to encode")
    return config


def load_weights(args: argparse.Namespace, config: DictConfig) -> tuple[Weights, FirstStage]:
    """Where the autoencoder is, and the autoencoder."""
    from cldm.model import load_model_config, model_config_of
    from cldm.prior_pass import Weights

    model_file = (
        load_model_config(config.model.config) if args.config else model_config_of(args.ckpt, args.base)
    )
    weights = Weights(model_file, args.ckpt, args.base, args.device)
    return weights, weights.load()


# -- measuring ---------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, config: DictConfig) -> str:
    """Data -> rows -> parts -> prior."""
    from tqdm import tqdm

    from cldm.prior_file import read_card
    from cldm.prior_parts import check_same, finish, run_all, share_out

    work, first_stage = plan(args, config)
    number, count = args.shard
    total = work.card.total
    images: Range = (total * (number - 1) // count, total * number // count)
    if images[0] == images[1]:
        raise ValueError(f"expected at most as many shards as images, {total}, found {count}")
    target = target_of(args, work.card)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        check_same(target, work.card)
        show(args, target, first_stage)
        return f"{target} is there already: {summary(read_card(target))}"
    works = share_out(target, images, work, args.processes)
    left = sum(stop - start for one in works for start, stop in one.ranges)
    done = images[1] - images[0] - left
    with tqdm(total=images[1] - images[0], initial=done, desc=str(target), unit="image") as bar:
        if works:
            run_all(works, first_stage, bar.update)
    card = finish(target, images)
    show(args, target, first_stage)
    return f"wrote {target}: {summary(card)}"


def show(args: argparse.Namespace, target: Path, first_stage: FirstStage) -> None:
    """Draw the prior, if that was asked for."""
    if args.show is None:
        return
    from cldm.prior_file import read_prior
    from cldm.prior_pass import decoder
    from datasets.files import write_text
    from metrics.prior_page import prior_page

    args.show.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.show, prior_page(read_prior(target), decoder(first_stage)))
    log.info("drawn in %s", args.show)


def plan(args: argparse.Namespace, config: DictConfig) -> tuple[Work, FirstStage]:
    """All that is to be done, but for who does it; and the autoencoder to do it with."""
    from cldm.prior_pass import Work, device_of
    from datasets.cached import collate_rows
    from datasets.framing import Views
    from datasets.latent_rows import LatentRows

    source = open_source(args, config)
    weights, first_stage = load_weights(args, config)
    views = Views(source.framing, config.data.cache_crops, config.train.seed)
    frames = choose_frames(len(source), args.sample_size, args.seed)
    latent = [side // first_stage.autoencoder.downsampling for side in source.size]
    cached, card = describe(args, config, source, views, frames, first_stage)
    loaders = args.num_workers
    if loaders is None:
        loaders = 4 if device_of(first_stage.autoencoder).type == "cuda" else 0
    work = Work(
        path=Path(),
        card=card,
        ranges=(),
        rows=LatentRows(source, views, tuple(latent), cached),
        order=(frames[:, None] * len(views) + range(len(views))).ravel(),
        collate=collate_rows,
        weights=weights,
        shape=(first_stage.autoencoder.embed_dim, *latent),
        batch_size=args.batch_size,
        num_workers=loaders,
    )
    return work, first_stage


def open_source(args: argparse.Namespace, config: DictConfig) -> Any:
    """The data set, seen as a training under this configuration sees it."""
    given, own = vars(OmegaConf.to_object(config).data), vars(DataConfig())
    options = {name: given[name] for name in TAKEN_OF_RUNS if given[name] != own[name]}
    return create_labelled(
        args.dataset, **options, **{name: given[name] for name in ("root", "split", "size")}
    )


def choose_frames(total: int, sample_size: int | None, seed: int) -> Any:
    """Indices of the frames, in order: all, or a seeded drawing without replacement."""
    import numpy as np

    if sample_size is None or sample_size >= total:
        if sample_size is not None and sample_size > total:
            log.warning("--sample_size %d: there are %d frames, each is taken once", sample_size, total)
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, sample_size, replace=False))


def describe(
    args: argparse.Namespace,
    config: DictConfig,
    source: Any,
    views: Any,
    frames: Any,
    first_stage: FirstStage,
) -> tuple[Any, PriorCard]:
    """The cache, if there is one, and the card of the prior."""
    from cldm.prior_pass import card_of, open_cache
    from datasets.cached import CachedDataset, identity_of_rows

    cache = config.data.cache
    cache = cache if cache and (Path(cache) / "samples").is_dir() else None
    rows = identity_of_rows(source, views, cache or args.save_dir / args.dataset)
    precision = "32" if cache is None else open_cache(cache, rows, first_stage, len(source) * len(views))
    card = card_of(
        source,
        frames,
        first_stage,
        dataset=args.dataset,
        rows=rows,
        seed=args.seed,
        total=len(frames) * len(views),
        precision=precision,
        covariance=args.covariance,
    )
    return None if cache is None else CachedDataset(source, views, cache), card


def target_of(args: argparse.Namespace, card: PriorCard) -> Path:
    """The file to write."""
    drawn = f"_{card.selection['sample_size']}" if "chosen" in card.selection else ""
    name = args.save_name or f"{card.dataset}_{card.split}_{card.size[0]}x{card.size[1]}{drawn}"
    shard = f".shard-{args.shard[0]}-of-{args.shard[1]}" if args.shard[1] > 1 else ""
    return args.save_dir / args.dataset / f"{name}{shard}.safetensors"


def summary(card: PriorCard) -> str:
    """A prior in a sentence."""
    part = "" if card.is_whole else f" of {card.total}"
    size = "x".join(map(str, card.size))
    return (
        f"{card.images}{part} images of {card.dataset} ({card.split}) at {size}, {len(card.classes)} classes"
    )


# -- shards, and the predecessor's files -------------------------------------------------------------------


def merge(argv: Sequence[str]) -> str:
    """Shards into one file."""
    parser = argparse.ArgumentParser(prog="noise_prior.py merge", description="Merge shards of one prior.")
    parser.add_argument("target", type=Path, metavar="OUT", help="file to write; refused if it exists")
    parser.add_argument("shards", type=Path, nargs="+", metavar="FILE", help="shards, in any order")
    args = parser.parse_args(argv)
    if args.target.exists():
        parser.error(f"{args.target} exists; choose another name or remove it first")
    from cldm.prior_file import merged, read_prior, write_prior

    prior = merged([(path, read_prior(path)) for path in args.shards])
    write_prior(args.target, prior)
    if not prior.card.is_whole:
        log.warning("%s is still a part: merge it with the shards that are not in it", args.target)
    return f"wrote {args.target}: {summary(prior.card)}"


def convert(args: argparse.Namespace, config: DictConfig) -> str:
    """Published statistics into a file of ours; what they do not say is taken from the flags, and said."""
    from cldm.prior_file import write_prior
    from cldm.published_priors import published_prior, read_published
    from datasets.label_space import LabelSpace

    space = LabelSpace.load(find_entry(args.dataset).label_space or "none")
    ids = list(range(space.num_classes)) if space.name in TRAIN_IDS else list(space.file_ids)
    found = read_published(args.published, ids, args.sample_size or 10_000)  # what their script draws
    for sentence in found.sentences():
        log.warning("%s", sentence)
    made_of = {
        "dataset": args.dataset,
        "split": args.split or "train",
        "label_space": space.name,
        "classes": tuple(space.names),
    }
    _, first_stage = load_weights(args, config)
    prior = published_prior(found, first_stage, Path(args.published).name, **made_of)
    target = target_of(args, prior.card)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise ValueError(f"{target} exists; choose another --save_name, or remove it first")
    write_prior(target, prior)
    show(args, target, first_stage)
    return f"wrote {target}: {summary(prior.card)}"


if __name__ == "__main__":
    main()
