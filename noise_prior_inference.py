"""Sample images for the label maps of a data set, starting from its noise prior at any noise level.

    python noise_prior_inference.py --dataset streets --ckpt models/control_streets.safetensors \\
        --prior_type spatial-class-joint --diffusion_steps 799
    python noise_prior_inference.py --ckpt FILE --prior FILE --prior_type class --sample_size 2000 --shard 1/4
    python noise_prior_inference.py --ckpt FILE --prior_type normal --diffusion_steps 951

Writes SAVE_DIR/DATASET/DATASET_N_T_PRIOR with sample/, real/ and gt_label/ by number, and manifest.jsonl, a
line for each image. --diffusion_steps T is the first timestep; those of the --steps grid that are below it
follow, or with --steps_after_start exactly so many, evenly spaced. The last example is plain sampling, as
generate.py has it. A half-done folder is completed by the same command.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from cldm.cli import INTERRUPTED, check_least, keep_freed_memory, parse_shard, refuse
from cldm.config import MEASURED_PRIORS, SAMPLER_NAMES
from datasets import DATASETS, create_labelled, find_entry, registered_name

if TYPE_CHECKING:
    from cldm.cldm import ControlledModel
    from cldm.sample_tree import Job
    from ldm.priors.prior import NoisePrior

log = logging.getLogger("noise_prior_inference")

UNMEASURED = ("normal", "x0")  # kinds that need no file
AUTO, AUTO_FRAMES = "auto", 16
KEPT_FRAMES = 64
SAMPLE_FLAGS = {
    "scale": (float, "guidance"),
    "steps": (int, "of the whole grid of timesteps"),
    "sampler": (str, "of the reverse process"),
    "eta": (float, "randomness of DDIM, 0..1"),
    "strength": (float, "of the control"),
    "negative_prompt": (str, "what to stay away from"),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the flags, before anything slow is imported."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    what = parser.add_argument_group("what")
    add = what.add_argument
    add("--dataset", default="cityscapes", help=f"one of {', '.join(DATASETS)} (default: %(default)s)")
    add("--root", help="folder of the data (default: that of the run file, or the data set's own)")
    add("--split", default="val", help="whose label maps (default: %(default)s)")
    add("--sample_size", type=int, metavar="N", help="images; every map once, then again (default: once)")
    add("--resolution", type=int, nargs=2, metavar=("H", "W"), help="of the images (default: as in training)")
    add("--ckpt", type=Path, required=True, help="a whole model, or a control branch over its base")
    add("--base", type=Path, help="base of a control branch, if neither recorded in it nor in models/")
    add("--config", help="model file; or run file, which then says how to sample and not the checkpoint")
    add("--seed", type=int, default=42, help="of all images (default: %(default)s)")
    add_start(parser.add_argument_group("start"))
    how = parser.add_argument_group(
        "how", "if not given, as the training run sampled, else as the run file says"
    )
    add = how.add_argument
    add("--prompt", help="may hold {classes} and {caption}")
    for name, (kind, text) in SAMPLE_FLAGS.items():
        add(f"--{name}", type=kind, choices=SAMPLER_NAMES if name == "sampler" else None, help=text)
    where = parser.add_argument_group("where")
    add = where.add_argument
    add("--save_dir", type=Path, default=Path("temp"), help="(default: %(default)s)")
    add("--overwrite", action="store_true", help="make images again that are there with other settings")
    add("--copy_real", action="store_true", help="copy the photos instead of linking to them")
    add("--shard", metavar="I/N", default="1/1", help="part I of N of the images alone, into the same folder")
    add("--batch_size", type=int, default=5, help="images at a time (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--precision", choices=("auto", "32", "bf16", "16"), default="auto", help="of all but the VAE")
    add("overrides", nargs="*", metavar="key=value", help="data.* and sample.* keys of a run")
    args = parser.parse_intermixed_args(argv)
    check_least(parser, args, {"sample_size": 1, "seed": 0, "batch_size": 1})
    if args.diffusion_steps != AUTO:
        if not args.diffusion_steps.isdecimal():
            parser.error(f"--diffusion_steps must be auto or in 0..999, found {args.diffusion_steps}")
        args.diffusion_steps = int(args.diffusion_steps)
    elif args.prior_type == "x0":
        parser.error("--diffusion_steps auto has no answer for x0, which knows the image; name a timestep")
    args.shard = parse_shard(parser, args.shard)
    return args


def add_start(group: Any) -> None:
    """The flags that say where sampling starts."""
    add = group.add_argument
    kinds = (*UNMEASURED, *MEASURED_PRIORS)
    add("--prior_type", choices=kinds, default="normal", help="(default: %(default)s)")
    add(
        "--prior",
        type=Path,
        metavar="FILE",
        help="(default: STAT_DIR/DATASET/STAT_NAME.safetensors, else models/)",
    )
    add("--stat_dir", type=Path, default=Path("statistics"), help="(default: %(default)s)")
    add("--stat_name", help="(default: DATASET_train_HxW)")
    add("--resample_prior", action="store_true", help="take one of another resolution, its places mixed")
    add(
        "--diffusion_steps", default="999", metavar="T", help="first timestep, 0..999, or auto (default: 999)"
    )
    add("--steps_after_start", type=int, metavar="N", help="network evaluations, N <= T + 1, evenly spaced")
    add("--spatial_scale", type=float, default=1.0, help="weight in spatial-class (default: %(default)s)")
    add("--class_scale", type=float, default=1.0, help="weight in spatial-class (default: %(default)s)")
    add("--undivided", action="store_true", help="spatial-class with the mean as published, not divided")
    add("--shrinkage", type=float, help="of cells that few images show, in images; 0 as published")
    add("--weighting", choices=("pixels", "images"), default="pixels", help="of classes; images as published")


def main(argv: Sequence[str] | None = None) -> None:
    """Maps and a prior -> jobs that are not done -> model -> images."""
    args = parse_args(argv)
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        print(sample(args))
    except KeyboardInterrupt:
        refuse("stopped; what was made is kept, and the same command goes on", INTERRUPTED)
    except (ValueError, OSError) as error:
        refuse(str(error))


def sample(args: argparse.Namespace) -> str:
    """Make all that is not there; say what is."""
    from cldm.sample_tree import SampleTree, plan, shard_of

    run = Run(args, resolve(args))
    keys = [run.source.key_of(i) for i in range(len(run.source))]
    jobs = plan(keys, args.sample_size, args.seed)
    first, evaluations = run.timesteps[0], len(run.timesteps)
    tree = SampleTree(args.save_dir / args.dataset / f"{args.dataset}_{len(jobs)}_{first}_{args.prior_type}")
    jobs = [run.with_settings(job) for job in shard_of(jobs, *args.shard)]
    todo = tree.missing(jobs, overwrite=args.overwrite)
    log.info(
        "%s: %d images, %d there already; each by %d network evaluations from timestep %d: %s",
        *(tree.root, len(jobs), len(jobs) - len(todo), evaluations, first, spelt(run.timesteps)),
    )
    number, count = args.shard
    manifest = "manifest.jsonl" if count == 1 else f"manifest-{number}-of-{count}.jsonl"
    tree.fill(jobs, todo, run.batches(todo), run.make, manifest=manifest, copy=args.copy_real)
    return f"{len(jobs)} images in {tree.root}"


def spelt(timesteps: Sequence[int]) -> str:
    """The timesteps, of many the ends."""
    shown = [str(t) for t in timesteps]
    return ", ".join(shown if len(shown) < 8 else [*shown[:3], "...", *shown[-2:]])


def resolve(args: argparse.Namespace) -> DictConfig:
    """The run file of the data set, under what the checkpoint recorded, under the flags."""
    from cldm.recorded_run import sampling_config

    args.dataset = registered_name(args.dataset)
    find_entry(args.dataset)
    for path in filter(None, (args.ckpt, args.base)):
        if not path.is_file():
            raise FileNotFoundError(f"expected weights at {path}, found nothing")
    data = {"root": args.root, "split": args.split, "size": args.resolution, "prompt": args.prompt}
    flags = {"data": data, "sample": {name: getattr(args, name) for name in SAMPLE_FLAGS}}
    return sampling_config(args.dataset, args.config, args.ckpt, args.overrides, flags)


class Run:
    """All that determines the images; what costs time is opened when it is first needed."""

    def __init__(self, args: argparse.Namespace, config: DictConfig) -> None:
        from cldm.prior_start import find_prior

        self.args, self.config = args, config
        self.settings = OmegaConf.to_object(config.sample)
        self.source = self.open_source()
        self.frame = lru_cache(maxsize=KEPT_FRAMES)(self.source.__getitem__)
        self.own = cache(self.own_settings)
        self.path = args.prior or find_prior(args.stat_dir, args.dataset, self.source.size, args.stat_name)
        self.measured = self.open_prior()

    def open_source(self) -> Any:
        """The maps, seen as the training saw its own; of random windows the centre."""
        data = OmegaConf.to_object(self.config.data)
        options = {name: getattr(data, name) for name in ("root", "split", "size", "prompt", "captions")}
        options |= {"label_space": data.label_space, "words": data.words or None}
        options |= {"seed": self.config.train.seed} if data.words else {}
        options |= {"crop": "centre" if data.crop == "random" else data.crop} if data.crop != "none" else {}
        options |= {"hint": data.hint} if data.hint != "colours" else {}
        return create_labelled(self.args.dataset, **options)

    def open_prior(self) -> Any:
        """The prior of the file, if it fits; None for a kind that needs none."""
        from cldm.prior_start import open_prior

        if self.args.prior_type in UNMEASURED:
            return None
        found = open_prior(
            self.path, self.source.size, self.source.space.names, resample=self.args.resample_prior
        )
        if (found.card.dataset, found.card.split) == (self.args.dataset, self.source.split):
            log.warning(
                "%s was measured on the frames that are sampled now: no figure of them is fair", self.path
            )
        return found

    @cached_property
    def model(self) -> ControlledModel:
        """The model, where and in the precision that was asked for."""
        from cldm.model import load_model, load_model_config, model_config_of, place
        from cldm.prior_start import check_first_stage

        args = self.args
        config = (
            load_model_config(self.config.model.config)
            if args.config
            else model_config_of(args.ckpt, args.base)
        )
        model = place(load_model(config, args.ckpt, args.base), args.device, args.precision)
        if self.measured is not None:
            check_first_stage(self.measured.card, str(self.path), model)
        return model

    @cached_property
    def prior(self) -> NoisePrior:
        """The prior of the kind that was asked for."""
        from cldm.prior_sampling import make_prior

        moments = None if self.measured is None else self.measured.moments
        size, num_classes = self.source.size, self.source.space.num_classes
        return make_prior(self.model, moments, size, num_classes, kind=self.args.prior_type, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """How the prior is taken, as options of `NoisePrior`."""
        from ldm.priors.prior import SHRINKAGE

        args = self.args
        return {
            "shrinkage": SHRINKAGE if args.shrinkage is None else args.shrinkage,
            "weighting": args.weighting,
            "spatial_scale": args.spatial_scale,
            "class_scale": args.class_scale,
            "undivided": args.undivided,
        }

    @cached_property
    def timesteps(self) -> list[int]:
        """The timesteps that are walked."""
        from cldm.prior_sampling import choose_start, timesteps_of
        from cldm.sample_tree import plan

        first = self.args.diffusion_steps
        if first == AUTO:
            keys = [self.source.key_of(i) for i in range(len(self.source))]
            frames = [self.frame(job.frame) for job in plan(keys, min(AUTO_FRAMES, len(keys)), 0)]
            first, loss = choose_start(self.model, self.prior, frames)
            log.info("start at timestep %d: loss %.4f nats a value on %d frames", first, loss, len(frames))
        return timesteps_of(self.settings, first, self.args.steps_after_start)

    @cached_property
    def sampler(self) -> Any:
        """Makes the images of a batch."""
        from cldm.prior_sampling import PriorSampler

        return PriorSampler(self.model, self.prior, self.timesteps, self.settings)

    def with_settings(self, job: Job) -> Job:
        """A job with all that determines its image."""
        from cldm.sample_tree import with_settings

        return with_settings(job, {**self.shared, **self.own(job.frame)})

    @cached_property
    def shared(self) -> dict[str, Any]:
        """Settings that all images have."""
        from cldm.digests import fingerprint

        args = self.args
        prior = None
        if self.measured is not None:
            prior = {"file": self.path.name, "fingerprint": fingerprint(self.path), **self.options}
        return {
            **asdict(self.settings),
            **{"dataset": args.dataset, "split": self.source.split, "size": list(self.source.size)},
            **{"crop": self.source.framing.crop, "encoding": self.config.data.hint},
            **{"checkpoint": args.ckpt.name, "checkpoint_fingerprint": fingerprint(args.ckpt)},
            "base_fingerprint": args.base and fingerprint(args.base),
            "config_fingerprint": args.config and fingerprint(args.config),
            **{"precision": args.precision, "prior_type": args.prior_type},
            "prior": prior,
            **{"evaluations": len(self.timesteps), "timesteps": self.timesteps},
        }

    def own_settings(self, index: int) -> dict[str, Any]:
        """Settings of the images of one map."""
        from cldm.digests import fingerprint

        photo, labels = self.source.files(index)
        names = self.source.prompts.names
        key = self.source.key_of(index)
        prompt = self.frame(index)["txt"] if "classes" in names else self.source.prompts.of(key)
        mark = {"key": key, "hint": labels.name, "hint_fingerprint": fingerprint(labels), "prompt": prompt}
        return mark | ({"photo_fingerprint": fingerprint(photo)} if self.args.prior_type == "x0" else {})

    def photo(self, index: int) -> Any:
        """The photo of a map: its file if all of that is shown, else the pixels that are."""
        if self.source.framing.crop == "none":
            return self.source.files(index)[0]
        return ((self.frame(index)["jpg"] + 1) * 127.5).round().astype("uint8")

    def batches(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Jobs whose prompts take as many chunks, at most --batch_size of them together."""
        from cldm.sample_tree import batches

        return batches(
            jobs, lambda job: self.sampler.text_length(job.settings["prompt"]), self.args.batch_size
        )

    def make(self, batch: Sequence[Job]) -> Iterator[tuple[Any, Any, Any]]:
        """Image, map and photo of each job of a batch."""
        frames = [self.frame(job.frame) for job in batch]
        prompts, seeds = [job.settings["prompt"] for job in batch], [job.seed for job in batch]
        for job, frame, image in zip(batch, frames, self.sampler(frames, prompts, seeds), strict=True):
            yield image, frame["label"], self.photo(job.frame)


if __name__ == "__main__":
    main()
