"""What the fast path costs in quality: the same trainings in float32 and in it, measured on held-out samples.

    python benchmarks/fast_quality.py                                    # the Streets miniature
    python benchmarks/fast_quality.py --arch sd15 --size 256 256 --batch 1 --steps 50

Each seed trains the control branch twice from the same start on the same samples, noise and levels: in
float32, and with frozen weights in bf16 under bf16 autocast (train.frozen_precision=bf16). The Streets
miniature starts from its shipped base and sees rendered frames; SD1.5 has random weights and sees random
images, so its losses only say how far the two paths drift apart. The held-out loss is that of
cldm.validation, in each path's own precision and, for the weights of the fast path, in float32 as well. It
matters if the paths differ by more than the seeds of one path do.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from common import (
    ARCHITECTURES,
    PROMPT,
    check_size,
    environment,
    figures,
    make_parser,
    now,
    open_project,
    report,
    say,
    settings,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cldm.cldm import ControlLDM
    from cldm.validation import Validation

BASE = "models/streets_base.safetensors"
LEARNING_RATES = {"streets": 5e-4, "sd15": 1e-5}
PATHS = ("plain", "fast")


class Data(NamedTuple):
    """What is trained on, encoded; and what is measured."""

    moments: Tensor  # (N, 8, h, w)
    hints: Tensor  # (N, H, W, 3) in [0, 1]
    texts: list[str]
    held_out: Validation


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    parser = make_parser(__doc__, steps=200)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each path (default: %(default)s)")
    parser.add_argument("--first_seed", type=int, default=0, help="to go on (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=128, help="to train on (default: %(default)s)")
    parser.add_argument("--held_out", type=int, default=32, help="to measure (default: %(default)s)")
    args = check_size(parser, parser.parse_args(argv))
    if args.seeds < 1 or args.samples < args.batch or args.held_out < 2:
        parser.error("--seeds must be 1 or more, --held_out 2 or more, --samples at least a batch")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train each seed in both paths; print the losses and how far apart they are."""
    args = parse_args(argv)
    open_project()
    plain = make_model(args)
    data = make_data(args, plain)
    models = {"plain": plain, "fast": fast_twin(plain)}
    start = {name: value.clone() for name, value in plain.control_model.state_dict().items()}
    losses: dict[str, list[float]] = {name: [] for name in (*PATHS, "fast_in_float32")}
    seconds: dict[str, list[float]] = {name: [] for name in PATHS}
    before = held_out_loss(plain, data, "plain")
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for path in PATHS:
            plain.control_model.load_state_dict(start)
            seconds[path] += train(args, models[path], data, path, seed)
            losses[path].append(held_out_loss(models[path], data, path))
            say(f"seed {seed} {path}: {losses[path][-1]:.5f}")
        losses["fast_in_float32"].append(held_out_loss(plain, data, "plain"))
    record = {
        "benchmark": "fast_quality",
        **settings(args),
        "first_seed": args.first_seed,
        "samples": args.samples,
        "held_out": args.held_out,
    }
    record |= {"loss_before": figures(before)} | summary_of(losses)
    record["step_median_s"] = {name: figures(statistics.median(seconds[name])) for name in PATHS}
    report({**record, "environment": environment(args.device)})


def summary_of(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Losses by seed, their spread in float32, and the mean of the paired differences of the paths."""
    pairs = {name: zip(losses[name], losses["plain"], strict=True) for name in ("fast", "fast_in_float32")}
    return {
        "loss": {name: [figures(value, 5) for value in values] for name, values in losses.items()},
        "spread_of_seeds": figures(statistics.stdev(losses["plain"]), 2)
        if len(losses["plain"]) > 1
        else None,
        "difference": {name: figures(statistics.mean(a - b for a, b in pairs[name]), 2) for name in pairs},
    }


def make_model(args: argparse.Namespace) -> ControlLDM:
    """The Streets base with a fresh control branch, or SD1.5 with random weights."""
    if args.arch == "streets":
        from cldm.add_control import add_control
        from cldm.checkpoint import to_model_keys
        from cldm.model import create_model, load_model_config, load_weights
        from cldm.tensor_files import read_tensors

        config = load_model_config(ARCHITECTURES["streets"])
        model = create_model(config)
        state, _ = add_control(config, to_model_keys(read_tensors(BASE)))
        load_weights(model, to_model_keys(state), where=BASE)
        return model.to(args.device)
    import peers

    return peers.make_model(args.arch)[0].to(args.device)


def make_data(args: argparse.Namespace, model: ControlLDM) -> Data:
    """Samples that are encoded once; afterwards the model has neither first stage nor text encoder."""
    import torch

    from cldm.validation import Validation, fixed_batches
    from ldm.models.diffusion.latent import channels_first

    samples, measured = (streets if args.arch == "streets" else noise)(args)
    with torch.no_grad():
        held_out = Validation(1, measured, batch_size=args.batch)
        held_out.hints = torch.stack([torch.as_tensor(sample["hint"]) for sample in measured])
        held_out.batches = list(fixed_batches(model.eval(), measured, args.batch, 0))
        moments = []
        for sample in samples:
            image = channels_first(torch.as_tensor(sample["jpg"])[None], model.device)
            moments.append(model.encode_first_stage(image).parameters.cpu())
        texts = [sample["txt"] for sample in samples]
        embeddings = {text: model.get_learned_conditioning([text])[0].cpu() for text in set(texts)}
    model.first_stage_model = model.cond_stage_model = torch.nn.Identity()
    hints = torch.stack([torch.as_tensor(sample["hint"]) for sample in samples])
    model.known_texts = lambda wanted: torch.stack([embeddings[text] for text in wanted])
    return Data(torch.cat(moments), hints, texts, held_out)


def streets(args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Rendered frames with their captions, to train on and to measure."""
    from datasets import create_dataset
    from datasets.streets.tree import Plan, make_tree

    height, width = args.size
    with tempfile.TemporaryDirectory() as folder:
        make_tree(folder, Plan(train=args.samples, val=args.held_out), size=(height, width), workers=1)
        options = {"root": folder, "size": (height, width)}
        sets = [create_dataset("streets", split=split, **options) for split in ("train", "val")]
        train_set, val_set = ([frames[i] for i in range(len(frames))] for frames in sets)
    return train_set, val_set


def noise(args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Random images and hints with one text."""
    import torch

    g = torch.Generator().manual_seed(0)
    shape = (args.samples + args.held_out, *args.size, 3)
    images, hints = torch.rand(shape, generator=g) * 2 - 1, torch.rand(shape, generator=g)
    rows = [{"jpg": a, "hint": b, "txt": PROMPT} for a, b in zip(images, hints, strict=True)]
    return rows[: args.samples], rows[args.samples :]


def fast_twin(plain: ControlLDM) -> ControlLDM:
    """A model with rounded frozen weights that trains the very control branch of `plain`."""
    from cldm.fast_path import round_frozen

    twin = copy.deepcopy(plain)
    round_frozen(twin)
    twin.control_model = plain.control_model
    return twin


def precision_of(path: str, model: ControlLDM) -> AbstractContextManager[Any]:
    """What a path computes in."""
    import torch

    return torch.autocast(model.device.type, dtype=torch.bfloat16) if path == "fast" else nullcontext()


def train(args: argparse.Namespace, model: ControlLDM, data: Data, path: str, seed: int) -> list[float]:
    """Train for `steps`; all that is random is a function of the seed. Returns the seconds of each step."""
    import torch

    from ldm.models.diffusion.draws import NOISE

    model.train()
    model.noise_seed, model.learning_rate = seed, LEARNING_RATES[args.arch]
    optimizer, order = model.configure_optimizers(), torch.Generator().manual_seed(seed)
    seconds = []
    for step in range(args.steps):
        start = now(args.device)
        rows = torch.randint(len(data.texts), (args.batch,), generator=order)
        batch = {
            "moments": data.moments[rows],
            "hint": data.hints[rows],
            "txt": [data.texts[i] for i in rows],
        }
        batch["number"] = torch.arange(step * args.batch, (step + 1) * args.batch)
        with precision_of(path, model):
            x_start, cond = model.get_input(batch, model.first_stage_key)
            draws = model.draws_of(batch)
            t = draws.levels(args.batch, model.num_timesteps)
            loss, _ = model.p_losses(x_start, cond, t, draws.normal(NOISE, x_start.shape))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now(args.device) - start)
    return seconds


def held_out_loss(model: ControlLDM, data: Data, path: str) -> float:
    """Mean loss of what was not trained on."""
    import torch

    with torch.no_grad(), precision_of(path, model):
        right, _ = data.held_out.losses(model.eval())
    return right.mean().item()


if __name__ == "__main__":
    main()
