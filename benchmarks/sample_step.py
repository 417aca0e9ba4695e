"""A guided sampling step of ours and of diffusers in turn: same weights, same latents, one process.

    python benchmarks/sample_step.py                                     # the Streets miniature
    python benchmarks/sample_step.py --arch sd15 --size 256 256 --batch 1 --steps 5

A step predicts with and without the prompt in one batch, under control, guides, and makes one DDIM step. Ours
is a step of `generate`: what does not depend on the noise level (features of the hint, keys and values of the
text) is made before the first step. Theirs is the body of the loop of StableDiffusionControlNetPipeline. Both
walk the same timesteps. once_s is what each prepares before its first step, the encoding of the prompts
included; ratio_of_20_steps is that of whole runs with it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from common import (
    PROMPT,
    alternate,
    check_size,
    environment,
    figures,
    make_parser,
    open_project,
    ratio,
    report,
    settings,
    summary,
)

if TYPE_CHECKING:
    from peers import Peer
    from torch import Tensor

    from cldm.cldm import ControlLDM

    Step = Callable[[Tensor, int], Tensor]  # latent and number of the step -> next latent

SCALE = 9.0
WHOLE_RUN = 20  # steps


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments."""
    parser = make_parser(__doc__, steps=10)
    return check_size(parser, parser.parse_args(argv))


def main(argv: Sequence[str] | None = None) -> None:
    """Build both sides, let each walk its own latents in turn, compare where they arrive."""
    args = parse_args(argv)
    open_project()
    import torch

    with torch.no_grad():
        record = {"benchmark": "sample_step", **settings(args), **run(args)}
    report({**record, "environment": environment(args.device)})


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Times of both sides and the difference of their results."""
    import torch
    from oracles import relative_error
    from peers import make_model, make_peer

    model, config = make_model(args.arch)
    peer = make_peer(model, config)
    cast = [model.model, model.control_model, model.cond_stage_model, *peer.networks]
    for network in [model.eval(), *(network.eval() for network in peer.networks)]:
        network.to(args.device)
    for network in cast if args.precision == "bf16" else []:
        network.to(torch.bfloat16)

    x, hint = make_inputs(args)
    timesteps = make_timesteps(args.warmup + args.steps)
    makers = {
        "ours": lambda: make_our_step(model, hint, args.batch, timesteps),
        "diffusers": lambda: make_their_step(peer, hint, timesteps),
    }
    walkers = {name: Walker(make(), x) for name, make in makers.items()}
    once = alternate({name: as_call(make) for name, make in makers.items()}, 3, warmup=0, device=args.device)
    seconds = alternate(walkers, args.steps, warmup=args.warmup, device=args.device)
    before = {name: statistics.median(values) for name, values in once.items()}
    whole = {name: before[name] + WHOLE_RUN * statistics.median(seconds[name]) for name in walkers}
    return {
        **{name: summary(seconds[name]) | {"once_s": figures(before[name])} for name in walkers},
        "ratio": ratio(seconds["diffusers"], seconds["ours"]),
        "ratio_of_20_steps": figures(whole["diffusers"] / whole["ours"]),
        "relative_error": figures(relative_error(walkers["ours"].first, walkers["diffusers"].first), 2),
        "relative_error_last": figures(relative_error(walkers["ours"].x, walkers["diffusers"].x), 2),
    }


def as_call(make: Callable[[], Any]) -> Callable[[int], Any]:
    """Leave out the number of the round."""
    return lambda _round: make()


class Walker:
    """Carries a latent from step to step; keeps the result of the first."""

    def __init__(self, step: Step, x: Tensor) -> None:
        self.step, self.x = step, x
        self.number = 0
        self.first = x

    def __call__(self, _round: int) -> None:
        """Make the next step."""
        self.x = self.step(self.x, self.number)
        self.first = self.x if self.number == 0 else self.first
        self.number += 1


def make_inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random latents (B, 4, h, w) and hints (B, 3, H, W)."""
    import torch

    g = torch.Generator().manual_seed(0)
    height, width = args.size
    x = torch.randn(args.batch, 4, height // 8, width // 8, generator=g)
    return x.to(args.device), torch.rand(args.batch, 3, height, width, generator=g).to(args.device)


def make_timesteps(count: int) -> list[int]:
    """Decreasing timesteps of a run that is long enough, as both libraries space them."""
    import torch
    from peers import sample_schedule

    from ldm.models.diffusion.schedule import ddim_timesteps

    length = max(WHOLE_RUN, count)
    scheduler = sample_schedule()
    scheduler.set_timesteps(length)
    ours = ddim_timesteps(length)
    if not torch.equal(scheduler.timesteps, torch.tensor(ours)):
        raise ValueError(f"the libraries space {length} steps differently; choose fewer --steps")
    return ours


def make_our_step(model: ControlLDM, hint: Tensor, batch: int, timesteps: list[int]) -> Step:
    """A step of `cldm.generate.generate`."""
    from cldm.config import SampleConfig
    from cldm.generate import guided_predictor
    from ldm.models.diffusion.ddim import sample_ddim

    predict_eps = guided_predictor(model, hint, [PROMPT] * batch, SampleConfig(scale=SCALE))
    abar = model.alphas_cumprod.double().tolist()

    def step(x: Tensor, i: int) -> Tensor:
        # The sampler ends at abar[0], so one step to the next level is a run for which that level is abar[0].
        after = abar[timesteps[i + 1]] if i + 1 < len(timesteps) else abar[0]
        return sample_ddim(predict_eps, x, [timesteps[i]], [after, *abar[1:]])

    return step


def make_their_step(peer: Peer, hint: Tensor, timesteps: list[int]) -> Step:
    """The body of the loop of their pipeline."""
    import torch
    from peers import encode_text, sample_schedule

    scheduler = sample_schedule()
    scheduler.set_timesteps(len(timesteps), device=hint.device)
    dtype = peer.unet.dtype
    text = encode_text(peer, [""] * len(hint) + [PROMPT] * len(hint))
    image = torch.cat([hint] * 2).to(dtype)

    def step(x: Tensor, i: int) -> Tensor:
        t = scheduler.timesteps[i]
        both = scheduler.scale_model_input(torch.cat([x] * 2), t).to(dtype)
        down, middle = peer.controlnet(
            both,
            t,
            encoder_hidden_states=text,
            controlnet_cond=image,
            conditioning_scale=1.0,
            guess_mode=False,
            return_dict=False,
        )
        eps = peer.unet(
            both,
            t,
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        eps_u, eps_c = eps.chunk(2)
        return scheduler.step(eps_u + SCALE * (eps_c - eps_u), t, x, return_dict=False)[0]

    return step


if __name__ == "__main__":
    main()
