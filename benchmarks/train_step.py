"""Training steps of ours and of diffusers in turn: same weights, same images, one process.

    python benchmarks/train_step.py                                      # the Streets miniature
    python benchmarks/train_step.py --arch sd15 --size 256 256 --batch 1 --steps 5 --memory
    python benchmarks/train_step.py --arch sd15 --size 512 512 --batch 4 --device cuda --precision bf16 \\
        --compile --peak_tflops 990 --memory                             # and again with --batch 32

ours             encodes images and texts, draws from the posterior, adds noise, runs control branch and UNet,
                 goes backward and updates the control branch, on a CPU each weight once its gradient is there
ours_cached      the same from moments and embeddings that are there already (data.cache)
ours_fast        that under bf16 autocast with frozen weights in bf16 (train.frozen_precision=bf16)
diffusers        the step of its example train_controlnet.py with torch's AdamW as it comes
diffusers_fused  the same with the fused AdamW

--precision bf16 puts all sides but ours_fast, which has its own, under autocast; the frozen weights of
diffusers are cast then, as its example does. --compile compiles the networks of our sides. Nobody clips
gradients.

All update the same weights. `ratio` is the time of diffusers over that of ours. --memory runs each side once
more in a process of its own for its peak; what the caches replace is not there then. --peak_tflops gives the
share of that many TFLOP/s that each side reaches.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from common import (
    ARCHITECTURES,
    PROMPT,
    alternate,
    check_size,
    environment,
    figures,
    forget_peak,
    make_parser,
    memory_mib,
    now,
    open_project,
    ratio,
    report,
    say,
    settings,
    summary,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from peers import Peer
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from cldm.cldm import ControlLDM

OURS = ("ours", "ours_cached", "ours_fast")
THEIRS = ("diffusers", "diffusers_fused")


class Inputs(NamedTuple):
    """What a step is given."""

    images: Tensor  # (B, H, W, 3) in [-1, 1]
    hints: Tensor  # (B, H, W, 3) in [0, 1]
    texts: list[str]
    noise: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,)
    moments: Tensor | None = None  # (B, 8, h, w), of the images


@dataclass
class Side:
    """A way to train: its loss, what it trains, and what makes the optimizer once gradients are compared."""

    loss: Callable[[Inputs], Tensor]
    parameters: list[nn.Parameter]
    build: Callable[[list[nn.Parameter]], Optimizer]
    optimizer: Optimizer | None = None

    def forget_gradients(self) -> None:
        """Free them."""
        for parameter in self.parameters:
            parameter.grad = None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    parser = make_parser(__doc__, steps=5)
    parser.add_argument("--compile", action="store_true", help="compile the networks of our sides")
    parser.add_argument("--peak_tflops", type=float, help="of the device, to give each side's share of it")
    parser.add_argument("--memory", action="store_true", help="also measure the peak of each side alone")
    parser.add_argument("--only", choices=OURS + THEIRS, help="run one side and report its memory")
    parser.add_argument("--weights", type=Path, help="file of a whole model (default: random ones are made)")
    return check_size(parser, parser.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the memory of each side alone; then build all, compare what they compute, time them in turn."""
    args = parse_args(argv)
    open_project()
    with TemporaryDirectory() as folder:
        args.weights = args.weights or make_weights(args.arch, Path(folder))
        if args.only:
            report(run_alone(args))
            return
        record = {"benchmark": "train_step", **settings(args), "compile": args.compile}
        if args.memory:
            record["memory"] = {name: run_child(args, name) for name in (*OURS, THEIRS[0])}
        sides, batches, fill = make_sides(args, [*OURS, *THEIRS])
        record |= fill | compare(sides, batches[0]) | measure(args, sides, batches)
    report({**record, "environment": environment(args.device)})


def make_weights(arch: str, folder: Path) -> Path:
    """A file of random weights, which both libraries map, as they do with real ones."""
    from peers import make_model

    from cldm.tensor_writing import write_tensors

    write_tensors(folder / "weights.safetensors", make_model(arch)[0].state_dict())
    return folder / "weights.safetensors"


def make_sides(
    args: argparse.Namespace, names: Sequence[str]
) -> tuple[dict[str, Side], dict[int, Inputs], dict[str, float]]:
    """The sides on the same weights, each with parameters of its own; what they are given; its cost."""
    from cldm.model import create_model, load_model_config

    config = load_model_config(ARCHITECTURES[args.arch])
    model = create_model(config, args.weights).train().to(args.device)
    batches, fill = make_batches(args, model, names)
    sides = {}
    for name in names:
        sides[name] = (make_ours if name in OURS else make_theirs)(args, name, model, config)
    return sides, batches, fill


def make_batches(
    args: argparse.Namespace, model: ControlLDM, names: Sequence[str]
) -> tuple[dict[int, Inputs], dict[str, float]]:
    """What is given to each step, and what a cache of it took; only sides that have one make it."""
    batches = {i: make_inputs(args, i) for i in range(-1 - args.warmup, args.steps)}
    if not {"ours_cached", "ours_fast"} & set(names):
        return batches, {}
    known = model.get_learned_conditioning([PROMPT]).clone()
    seconds = []
    for i, batch in batches.items():
        start = now(args.device)
        moments = model.encode_first_stage(batch.images.permute(0, 3, 1, 2).contiguous()).parameters
        seconds.append(now(args.device) - start)
        batches[i] = batch._replace(moments=moments)
    model.cached_text = known
    return batches, {"cache_fill_s_per_image": figures(min(seconds) / args.batch)}


def make_ours(args: argparse.Namespace, name: str, model: ControlLDM, config: DictConfig) -> Side:
    """A side of ours; one with a cache has neither first stage nor text encoder."""
    import torch

    from cldm.fast_path import compile_networks, round_frozen
    from cldm.model import create_model
    from ldm.models.optimizer import AdamWInBackward, pays_in_backward

    cached, precision = name != "ours", "bf16" if name == "ours_fast" else args.precision
    with torch.device("meta"):
        twin = create_model(config).train()
    stages = ("first_stage_model.", "cond_stage_model.")
    state = {
        key: value for key, value in model.state_dict().items() if not (cached and key.startswith(stages))
    }
    twin.load_state_dict(state, strict=False, assign=True)
    if cached:
        text = model.cached_text
        twin.first_stage_model = twin.cond_stage_model = torch.nn.Identity()
        twin.known_texts = lambda texts: text.expand(len(texts), -1, -1)
    twin.to(args.device)  # moves nothing: Lightning would keep saying that the module is on meta
    if name == "ours_fast":
        round_frozen(twin)
    if not args.only:  # all sides update the same weights, not copies of them
        twin.control_model.load_state_dict(model.control_model.state_dict(), assign=True)
    if args.compile:
        compile_networks(twin, torch.device(args.device))

    def loss(inputs: Inputs) -> Tensor:
        batch = {"jpg": inputs.images, "txt": inputs.texts, "hint": inputs.hints}
        batch |= {"moments": inputs.moments} if cached else {}
        with autocast(args.device, precision):
            x_start, cond = twin.get_input(batch, twin.first_stage_key)
            return twin.p_losses(x_start, cond, inputs.t, inputs.noise)[0]

    pays = pays_in_backward(twin.trainable_parameters(), torch.device(args.device))
    kind = AdamWInBackward if pays else partial(torch.optim.AdamW, fused=True)
    return Side(loss, twin.trainable_parameters(), partial(kind, lr=twin.learning_rate))


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision as both training scripts use it; nothing at 32 bits."""
    import torch

    if precision == "32":
        return nullcontext()
    return torch.autocast(device.partition(":")[0], dtype=torch.bfloat16)


def make_theirs(args: argparse.Namespace, name: str, model: ControlLDM, config: DictConfig) -> Side:
    """The step of diffusers, with one of the two kinds of AdamW."""
    import torch
    from peers import make_peer

    peer = make_peer(model, config)
    trained = list(peer.controlnet.parameters())
    options = {"fused": True} if name == "diffusers_fused" else {}
    return Side(
        their_loss(peer, args), trained, partial(torch.optim.AdamW, lr=model.learning_rate, **options)
    )


def their_loss(peer: Peer, args: argparse.Namespace) -> Callable[[Inputs], Tensor]:
    """What a step of their example computes, at a given noise."""
    import torch
    from peers import encode_text, train_schedule
    from torch.nn import functional as F

    scheduler = train_schedule()
    dtype = torch.float32 if args.precision == "32" else torch.bfloat16
    for network in (peer.vae, peer.text_encoder, peer.unet) if args.precision == "bf16" else ():
        network.to(dtype)  # as the example casts what is frozen

    def loss(inputs: Inputs) -> Tensor:
        images, hints = (x.permute(0, 3, 1, 2).contiguous() for x in (inputs.images, inputs.hints))
        with autocast(args.device, args.precision):
            latents = peer.vae.encode(images.to(dtype)).latent_dist.sample() * peer.vae.config.scaling_factor
            noise = inputs.noise.to(dtype)
            noisy = scheduler.add_noise(latents, noise, inputs.t)
            text = encode_text(peer, inputs.texts)
            hints = hints.to(dtype)
            down, middle = peer.controlnet(
                noisy, inputs.t, encoder_hidden_states=text, controlnet_cond=hints, return_dict=False
            )
            prediction = peer.unet(
                noisy,
                inputs.t,
                encoder_hidden_states=text,
                down_block_additional_residuals=[residual.to(dtype) for residual in down],
                mid_block_additional_residual=middle.to(dtype),
                return_dict=False,
            )[0]
        return F.mse_loss(prediction.float(), noise.float())

    return loss


def make_inputs(args: argparse.Namespace, seed: int) -> Inputs:
    """Random images and hints, one text, noise at random levels."""
    import torch

    g = torch.Generator().manual_seed(seed % 2**31)
    height, width = args.size
    images = torch.rand(args.batch, height, width, 3, generator=g) * 2 - 1
    hints = torch.rand(args.batch, height, width, 3, generator=g)
    noise = torch.randn(args.batch, 4, height // 8, width // 8, generator=g)
    t = torch.randint(1000, (args.batch,), generator=g)
    images, hints, noise, t = (x.to(args.device) for x in (images, hints, noise, t))
    return Inputs(images, hints, [PROMPT] * args.batch, noise, t)


def compare(sides: dict[str, Side], inputs: Inputs) -> dict[str, Any]:
    """Relative differences from diffusers of the loss and of the gradient of the first trained convolution.

    Every path of the control branch ends there, so it stands for all gradients.
    """
    import torch
    from oracles import relative_error

    results = {}
    for name in (*OURS, THEIRS[0]):
        side = sides[name]
        torch.manual_seed(0)  # the draw from the posterior
        loss = side.loss(inputs)
        loss.backward()
        first = next(p for p in side.parameters if p.ndim == 4)
        results[name] = (loss.detach(), first.grad.clone())
        side.forget_gradients()
    errors: dict[str, Any] = {}
    for place, ending in enumerate(("", "_gradient")):
        theirs = results[THEIRS[0]][place]
        found = {name: figures(relative_error(results[name][place], theirs), 2) for name in OURS}
        errors |= {f"relative_error{ending}": found["ours"]}
        errors |= {f"relative_error{ending}_{name.partition('_')[2]}": found[name] for name in OURS[1:]}
    return errors


def measure(args: argparse.Namespace, sides: dict[str, Side], batches: dict[int, Inputs]) -> dict[str, Any]:
    """Time whole steps in turn."""
    flops = {name: count_flops(side, batches[0]) for name, side in sides.items() if args.peak_tflops}
    for side in sides.values():
        side.optimizer = side.build(side.parameters)
    if args.device == "cpu":
        share_state(sides, args, batches)

    def step_of(name: str) -> Callable[[int], None]:
        return lambda i: train_step(sides[name], batches[i])

    calls = {name: step_of(name) for name in sides}
    steps = alternate(calls, args.steps, warmup=args.warmup, device=args.device)
    found: dict[str, Any] = {}
    for name in sides:
        found[name] = summary(steps[name])
        if args.peak_tflops:
            reached = flops[name] / found[name]["median_s"] / 1e12
            found[name] |= {
                "tflop": figures(flops[name] / 1e12),
                "share_of_peak": figures(reached / args.peak_tflops),
            }
    return {
        **found,
        "ratio": ratio(steps["diffusers"], steps["ours"]),
        "ratio_cached": ratio(steps["diffusers"], steps["ours_cached"]),
        "ratio_fast": ratio(steps["diffusers"], steps["ours_fast"]),
        "ratio_same_optimizer": ratio(steps["diffusers_fused"], steps["ours"]),
        "ratio_fast_same_optimizer": ratio(steps["diffusers_fused"], steps["ours_fast"]),
    }


def count_flops(side: Side, inputs: Inputs) -> int:
    """Floating-point operations of products, convolutions and attention in a step, without the update."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        side.loss(inputs).backward()
    side.forget_gradients()
    return counter.get_total_flops()


def train_step(side: Side, inputs: Inputs) -> None:
    """One step; ours updates within the first line where it does so in training."""
    assert side.optimizer is not None
    side.optimizer.step(lambda: side.loss(inputs).backward())
    side.optimizer.zero_grad()


def share_state(sides: dict[str, Side], args: argparse.Namespace, batches: dict[int, Inputs]) -> None:
    """Let the optimizers work on the same moments: five times those of SD1.5 do not fit a small machine.

    The parameters are paired by the memory that they share.
    """
    train_step(sides["ours"], batches[min(batches)])
    ours = sides["ours"].optimizer.state
    by_memory = {parameter.data_ptr(): state for parameter, state in ours.items()}
    for name, side in sides.items():
        if name != "ours":
            for parameter in side.parameters:
                side.optimizer.state[parameter] = by_memory[parameter.data_ptr()]


# -- memory of one side alone -----------------------------------------------------------------------------


def run_alone(args: argparse.Namespace) -> dict[str, float | None]:
    """Peak memory of a process that trains with one side, and its peak before the first step.

    Pages of the mapped file of weights count where they were read, although the system can take them back.
    """
    import torch

    sides, batches, _ = make_sides(args, [args.only])
    side = sides[args.only]
    side.optimizer = side.build(side.parameters)
    start = {"start_peak_rss_mib": memory_mib()["peak_rss_mib"]}
    gc.collect()
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    forget_peak()
    for i in range(args.steps):
        train_step(side, batches[i])
        say(f"{args.only} alone {i}")
    if args.device.startswith("cuda"):
        return {"peak_gpu_mib": torch.cuda.max_memory_allocated() / 2**20, **memory_mib(), **start}
    return memory_mib() | start


def run_child(args: argparse.Namespace, side: str) -> dict[str, float | None]:
    """The same in a process of its own."""
    values = {"arch": args.arch, "batch": args.batch, "device": args.device, "precision": args.precision}
    values |= {"weights": args.weights, "only": side, "steps": 2, "warmup": 0}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    words += ["--size", *map(str, args.size), *(["--compile"] if args.compile else [])]
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
