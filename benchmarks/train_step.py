"""A training step of ours and of diffusers in turn: same weights, same images, one process.

    python benchmarks/train_step.py                                      # the Streets miniature
    python benchmarks/train_step.py --arch sd15 --size 256 256 --batch 1 --steps 5 --memory

A step encodes images and texts, draws from the posterior, adds noise, runs control branch and UNet, goes
backward and updates the control branch. The step of diffusers is that of its example train_controlnet.py with
torch's AdamW as it comes; `diffusers_fused` is the same with the fused kernel that ours uses, so that
ratio_same_optimizer compares the networks alone. Neither clips gradients.

Both update the same weights. --memory runs each side once more in a process of its own for its peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from common import (
    PROMPT,
    alternate,
    check_size,
    environment,
    figures,
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
    from peers import Peer
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from cldm.cldm import ControlLDM


class Inputs(NamedTuple):
    """What a step is given."""

    images: Tensor  # (B, H, W, 3) in [-1, 1]
    hints: Tensor  # (B, H, W, 3) in [0, 1]
    texts: list[str]
    noise: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,)


class Side(NamedTuple):
    """One of the two libraries: its loss, what it trains, and with what."""

    loss: Callable[[Inputs], Tensor]
    parameters: list[nn.Parameter]
    optimizer: Optimizer


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    parser = make_parser(__doc__, steps=5)
    parser.add_argument("--memory", action="store_true", help="also measure the peak of each side alone")
    parser.add_argument("--only", choices=("ours", "diffusers"), help="run one side and report its memory")
    return check_size(parser, parser.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> None:
    """Build both sides, compare what they compute, time them in turn."""
    args = parse_args(argv)
    open_project()
    sides = make_sides(args)
    if args.only:
        report(run_alone(args, sides[args.only]))
        return
    errors = compare(args, sides["ours"], sides["diffusers"])
    record = {"benchmark": "train_step", **settings(args), **errors, **measure(args, sides)}
    if args.memory:
        record["memory"] = {name: run_child(name, argv) for name in ("ours", "diffusers")}
    report({**record, "environment": environment(args.device)})


def make_sides(args: argparse.Namespace) -> dict[str, Side]:
    """Ours and theirs on the same weights; with `only`, what the other side alone needs is not made."""
    import torch
    from peers import make_model, make_peer

    model, config = make_model(args.arch)
    model.train().to(args.device)
    peer = make_peer(model, config)
    trained = model.trainable_parameters()
    theirs = list(peer.controlnet.parameters())
    sides = {"ours": Side(our_loss(model, args), trained, model.configure_optimizers())}
    loss = their_loss(peer, args)
    plain = torch.optim.AdamW(theirs, lr=model.learning_rate)
    fused = torch.optim.AdamW(theirs, lr=model.learning_rate, fused=True)
    return sides | {"diffusers": Side(loss, theirs, plain), "diffusers_fused": Side(loss, theirs, fused)}


def autocast(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """Mixed precision as both training scripts use it; nothing at 32 bits."""
    import torch

    if args.precision == "32":
        return nullcontext()
    return torch.autocast(args.device.partition(":")[0], dtype=torch.bfloat16)


def our_loss(model: ControlLDM, args: argparse.Namespace) -> Callable[[Inputs], Tensor]:
    """What `training_step` computes, at a given noise."""

    def loss(inputs: Inputs) -> Tensor:
        batch = {"jpg": inputs.images, "txt": inputs.texts, "hint": inputs.hints}
        with autocast(args):
            x_start, cond = model.get_input(batch, model.first_stage_key)
            return model.p_losses(x_start, cond, inputs.t, inputs.noise)[0]

    return loss


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
        with autocast(args):
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


def compare(args: argparse.Namespace, ours: Side, theirs: Side) -> dict[str, float]:
    """Relative differences of the loss, and of the gradient of the first convolution that is trained.

    Every path of the control branch ends there, so it stands for all gradients.
    """
    import torch
    from oracles import relative_error

    inputs = make_inputs(args, seed=0)
    results = []
    for side in (ours, theirs):
        torch.manual_seed(0)  # the draw from the posterior
        loss = side.loss(inputs)
        loss.backward()
        first = next(p for p in side.parameters if p.ndim == 4)
        results.append((loss.detach(), first.grad.clone()))
        side.optimizer.zero_grad()
    (our_loss, our_grad), (their_loss, their_grad) = results
    return {
        "relative_error": figures(relative_error(our_loss, their_loss), 2),
        "relative_error_gradient": figures(relative_error(our_grad, their_grad), 2),
    }


def measure(args: argparse.Namespace, sides: dict[str, Side]) -> dict[str, Any]:
    """Time whole steps in turn, and within them the update."""
    updates: dict[str, list[float]] = {name: [] for name in sides}
    if args.device == "cpu":
        share_state(sides, args)

    def step_of(name: str) -> Callable[[int], None]:
        return lambda i: updates[name].append(train_step(args, sides[name], make_inputs(args, i)))

    calls = {name: step_of(name) for name in sides}
    steps = alternate(calls, args.steps, warmup=args.warmup, device=args.device)
    updates = {name: values[args.warmup :] for name, values in updates.items()}
    networks = {name: [a - b for a, b in zip(steps[name], updates[name], strict=True)] for name in sides}
    optimizer = {name: {"optimizer_median_s": summary(updates[name])["median_s"]} for name in sides}
    return {
        **{name: summary(steps[name]) | optimizer[name] for name in sides},
        "ratio": ratio(steps["diffusers"], steps["ours"]),
        "ratio_same_optimizer": ratio(steps["diffusers_fused"], steps["ours"]),
        "ratio_network": ratio(networks["diffusers"], networks["ours"]),
        "ratio_optimizer": ratio(updates["diffusers"], updates["ours"]),
    }


def train_step(args: argparse.Namespace, side: Side, inputs: Inputs) -> float:
    """One step; returns the seconds that the update took."""
    side.loss(inputs).backward()
    start = now(args.device)
    side.optimizer.step()
    side.optimizer.zero_grad()
    return now(args.device) - start


def share_state(sides: dict[str, Side], args: argparse.Namespace) -> None:
    """Let the optimizers work on the same moments: three times those of SD1.5 do not fit a small machine.

    The parameters are paired by the memory that they share.
    """
    train_step(args, sides["ours"], make_inputs(args, -1))
    ours = sides["ours"].optimizer.state
    by_memory = {parameter.data_ptr(): state for parameter, state in ours.items()}
    for name in ("diffusers", "diffusers_fused"):
        side = sides[name]
        for parameter in side.parameters:
            side.optimizer.state[parameter] = by_memory[parameter.data_ptr()]


# -- memory of one side alone -----------------------------------------------------------------------------


def run_alone(args: argparse.Namespace, side: Side) -> dict[str, float | None]:
    """Peak memory of a process that trains with one side."""
    import torch

    for i in range(args.warmup + args.steps):
        train_step(args, side, make_inputs(args, i))
        say(f"{args.only} alone {i}")
    if args.device.startswith("cuda"):
        return {"peak_gpu_mib": torch.cuda.max_memory_allocated() / 2**20, **memory_mib()}
    return memory_mib()


def run_child(side: str, argv: Sequence[str] | None) -> dict[str, float | None]:
    """The same in a process of its own."""
    arguments = sys.argv[1:] if argv is None else argv
    command = [sys.executable, __file__, *arguments, "--only", side, "--steps", "2", "--warmup", "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
