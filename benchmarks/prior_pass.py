"""Measuring a noise prior: our one pass and the predecessor's three, on the same images and autoencoder.

    python benchmarks/prior_pass.py                                  # the Streets autoencoder
    python benchmarks/prior_pass.py --arch sd15 --images 4 --steps 1

Ours is the pass of noise_prior.py: every image is read and encoded once, in batches, and all moments are
taken from that. The other side does what SCP-Diff's script does, with batches of one: for the moments of
places it encodes each image; for those of classes it encodes the image again for each class that it shows,
and takes one random pixel of the class; for those of classes at places it encodes each image once more, and
updates the tables of all 256 ids for the ids that are there. Left out on that side, in its favour: the
encoding of the prompt that goes with each encoding of an image, drawing from the posterior, the files, and
that its third pass sees a quarter of the data. Both sides read through the same loader and use the same
network with random weights. Times are end to end, from files to tables.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ARCHITECTURES, alternate, environment, figures, open_project, ratio, report, summary

if TYPE_CHECKING:
    from torch import Tensor

    from cldm.prior_pass import FirstStage, Work

IDS = 256  # tables of theirs


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--arch", choices=ARCHITECTURES, default="streets", help="of the autoencoder (default: %(default)s)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), default=[128, 256], help="of the images")
    add("--frames", type=Path, metavar="ROOT", help="a Streets tree (default: rendered for this run)")
    add("--images", type=int, default=16, help="of a pass (default: %(default)s)")
    add("--batch", type=int, default=4, help="of ours (default: %(default)s)")
    add("--steps", type=int, default=2, help="counted passes of each side (default: %(default)s)")
    add("--warmup", type=int, default=0, help="passes before that (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args(argv)
    if any(side < 64 or side % 64 for side in args.size):
        parser.error(f"--size must be multiples of 64, found {args.size[0]} {args.size[1]}")
    if min(args.images, args.batch, args.steps) < 1 or args.warmup < 0:
        parser.error("--images, --batch and --steps must be 1 or more, --warmup 0 or more")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Make the frames, let both sides pass over them in turn, compare what they find."""
    args = parse_args(argv)
    open_project()
    with tempfile.TemporaryDirectory() as folder:
        record = run(args, Path(folder))
    kept = {name: getattr(args, name) for name in ("arch", "size", "images", "batch", "steps", "device")}
    report({"benchmark": "prior_pass", **kept, **record, "environment": environment(args.device)})


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Times of both sides, their encodings, and how far apart their moments of places are."""
    import numpy as np

    from cldm.prior_file import read_prior

    first_stage = make_first_stage(args)
    encodings: list[int] = []
    first_stage.autoencoder.encoder.register_forward_hook(
        lambda _m, given, _out: encodings.append(len(given[0]))
    )
    work = make_work(args, folder, first_stage)
    theirs = Predecessor(work, first_stage)
    counted: dict[str, int] = {}

    def ours(_round: int) -> None:
        work.path.unlink(missing_ok=True)
        encodings.clear()
        work.run(first_stage, lambda images: None)
        counted["ours"] = sum(encodings)

    def predecessor(_round: int) -> None:
        encodings.clear()
        theirs.run()
        counted["predecessor"] = sum(encodings)

    sides = {"ours": ours, "predecessor": predecessor}
    seconds = alternate(sides, args.steps, warmup=args.warmup, device=args.device)
    mean = read_prior(work.path).moments.places.mean.transpose(2, 0, 1)
    apart = np.abs(theirs.spatial[0] - mean).max() / np.abs(mean).max()
    return {
        **{
            name: summary(values) | {"encodings_per_image": figures(counted[name] / args.images)}
            for name, values in seconds.items()
        },
        "classes_per_image": figures(theirs.classes / args.images),
        "ratio": ratio(seconds["predecessor"], seconds["ours"]),
        "relative_error": figures(float(apart), 2),
    }


def make_first_stage(args: argparse.Namespace) -> FirstStage:
    """The autoencoder of an architecture with random weights."""
    from oracles import randomize

    from cldm.model import load_model_config
    from cldm.prior_pass import FirstStage
    from ldm.util import instantiate_from_config

    params = load_model_config(ARCHITECTURES[args.arch]).model.params
    autoencoder = randomize(instantiate_from_config(params.first_stage_config))
    return FirstStage(autoencoder.requires_grad_(False).eval().to(args.device), 0.18215)


def make_work(args: argparse.Namespace, folder: Path, first_stage: FirstStage) -> Work:
    """Our pass over the first training frames of a tree."""
    import numpy as np

    from cldm.prior_pass import Work, card_of
    from datasets.cached import collate_rows
    from datasets.framing import Views
    from datasets.latent_rows import LatentRows
    from datasets.streets.dataset import StreetsDataset
    from datasets.streets.tree import Plan, make_tree

    root = args.frames or folder / "streets"
    if args.frames is None:
        make_tree(root, Plan("camera", size=tuple(args.size), train=args.images, val=1), workers=1)
    source = StreetsDataset(root, "train", tuple(args.size))
    if len(source) < args.images:
        raise SystemExit(f"expected {args.images} frames in {root}, found {len(source)}")
    views, frames = Views(source.framing), np.arange(args.images)
    latent = tuple(side // first_stage.autoencoder.downsampling for side in args.size)
    card = card_of(source, frames, first_stage, dataset="streets", rows={}, seed=0, total=args.images)
    return Work(
        path=folder / "part.safetensors",
        card=card,
        ranges=((0, args.images),),
        rows=LatentRows(source, views, (latent[0], latent[1])),
        order=frames,
        collate=collate_rows,
        weights=None,  # type: ignore[arg-type]  # of other processes, of which there are none
        shape=(first_stage.autoencoder.embed_dim, latent[0], latent[1]),
        batch_size=args.batch,
    )


class Predecessor:
    """The three passes, an image at a time."""

    def __init__(self, work: Work, first_stage: FirstStage) -> None:
        self.work, self.first_stage = work, first_stage
        self.classes = 0  # that images show, in sum
        self.spatial: tuple[Any, Any] = (None, None)
        self.by_class: dict[int, tuple[Any, Any]] = {}
        self.joint: tuple[Any, Any] = (None, None)

    def run(self) -> None:
        """All statistics."""
        self.places()
        self.categories()
        self.places_of_categories()

    def samples(self) -> Any:
        """Photo (1, H, W, 3) and label map (h, w) of each image, through the loader of ours."""
        from torch.utils.data import DataLoader, Subset

        rows = Subset(self.work.rows, self.work.order.tolist())  # type: ignore[arg-type]
        for batch in DataLoader(rows, batch_size=1, collate_fn=self.work.collate):
            yield batch["jpg"], batch["label"][0]

    def encode(self, photo: Any) -> Tensor:
        """The latent (C, h, w) of a photo, scaled."""
        import torch

        from cldm.prior_pass import device_of
        from ldm.models.diffusion.latent import channels_first

        autoencoder, scale = self.first_stage
        with torch.no_grad():
            posterior = autoencoder.encode(channels_first(photo, device_of(autoencoder)))
        return (posterior.mode()[0] * scale).cpu()

    def places(self) -> None:
        """Every latent is kept; then mean and deviation over all."""
        import numpy as np

        raw = np.stack([self.encode(photo).numpy() for photo, _ in self.samples()])
        self.spatial = raw.mean(0), raw.std(0)

    def categories(self) -> None:
        """A random pixel of each class of each image, of an encoding of its own."""
        import numpy as np

        rng = np.random.default_rng(0)
        raw: dict[int, list[Any]] = {}
        self.classes = 0
        for photo, label in self.samples():
            for k in np.unique(label).tolist():
                ys, xs = np.nonzero(label == k)
                at = rng.integers(len(ys))
                raw.setdefault(k, []).append(self.encode(photo)[:, ys[at], xs[at]].numpy())
                self.classes += 1
        self.by_class = {k: (np.mean(some, axis=0), np.std(some, axis=0, ddof=0)) for k, some in raw.items()}

    def places_of_categories(self) -> None:
        """Running mean and variance of every id at every place."""
        import torch

        shape = self.work.shape
        mean, square = torch.zeros(IDS, *shape), torch.zeros(IDS, *shape)
        count = torch.zeros(IDS, 1, *shape[1:])
        for photo, label in self.samples():
            latent, ids = self.encode(photo), torch.as_tensor(label)
            for k in ids.unique().tolist():
                mask = (ids == k)[None].float()
                count[k] += mask
                delta = (latent - mean[k]) * mask
                mean[k] += delta / (count[k] + 1e-6)
                square[k] += delta * (latent - mean[k]) * mask
        self.joint = mean, (square / (count + 1e-6)).sqrt()


if __name__ == "__main__":
    main()
