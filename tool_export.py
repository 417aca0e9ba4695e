"""Bring weights of any origin into one file, and write them for diffusers, ComfyUI, webui and the original.

    python tool_export.py step=002000.safetensors full_pipeline --to diffusers
    python tool_export.py step=002000.safetensors models/control_mine.safetensors --to control
    python tool_export.py DIFFUSERS_FOLDER models/brought_in.safetensors --to original
    python tool_export.py v1-5-pruned.ckpt OUT.safetensors --to original --ema --dtype fp16

SOURCE is what a training wrote, any Stable Diffusion 1.5, 2.1 or ControlNet file, or a diffusers folder, of a
whole pipeline or of one of its networks. A part lies over the base that it records, or over --base.

diffusers  a folder that from_pretrained loads: UNet (a trained decoder is in it), control branch if there is
           one, autoencoder, text encoder, tokenizer, scheduler. It is then loaded in diffusers, if that is
           installed, and compared with our networks: text, autoencoder, one forward, a sample of 4 steps.
control    the control branch alone under the published names (control_model.*), for ComfyUI, webui and
           generate.py, which finds its base by the recorded path or hash. --base records another file as the
           base, after a check that it equals the one of the training in everything that is not control.
original   one file under the published names, for everything that reads .ckpt or .safetensors of the original
           code; the model file goes along in its metadata.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cldm.cli import check_new, check_there, refuse

if TYPE_CHECKING:
    from torch import Tensor

    from cldm.cldm import ControlledModel
    from cldm.export import Model

# Largest difference of a right export, relative to the largest value; the order of sums makes about 1e-6.
FORWARD_BOUND = 1e-4
IMAGE_BOUND = 1 / 255
PROMPT, NEGATIVE, SIZE, STEPS, SCALE = "a street in the rain, two cars", "blurred", (64, 64), 4, 9.0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments and check that files are there, and the target is not."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("source", type=Path, help="checkpoint of a training, weights of others, or a diffusers folder")
    add("target", type=Path, help="file (diffusers: folder) to write; refused if it exists")
    formats = ("diffusers", "control", "original")
    add("--to", choices=formats, default="control", help="what to write (default: %(default)s)")
    add(
        "--dtype",
        choices=("fp16", "bf16", "fp32"),
        help="of the tensors (default: fp16 for control, else as in the source)",
    )
    add("--base", type=Path, help="base of a control branch, if not the recorded one")
    add("--config", type=Path, help="model YAML file; by default the recorded one, or the architecture's")
    add("--parameterization", choices=("eps", "v"), help="what the network predicts, if nothing records it")
    add("--ema", action="store_true", help="take the EMA copies of the UNet that the source holds")
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare a diffusers folder with our networks (default: yes)",
    )
    args = parser.parse_args(argv)
    check_there(parser, args.source, args.base, args.config)
    check_new(parser, args.target, makes_folder=True)
    if args.to == "control" and (args.ema or args.config or args.parameterization):
        parser.error(
            "--ema, --config and --parameterization are about whole models; leave them out with --to control"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Read, choose, write, report."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        (export_control if args.to == "control" else export_model)(args)
    except (ValueError, OSError) as error:
        refuse(str(error))


def export_control(args: argparse.Namespace) -> None:
    """The control branch, and what was written."""
    from cldm.export import DTYPES, write_control

    dtype = args.dtype or "fp16"
    count, base = write_control(args.source, args.target, DTYPES[dtype], args.base)
    size = args.target.stat().st_size / 2**20
    print(f"wrote {args.target}: {count} tensors in {dtype}, {size:.1f} MiB, base {base}")


def export_model(args: argparse.Namespace) -> None:
    """A whole model, or what there is of one."""
    from cldm.export import DTYPES, read_model, write_diffusers, write_original

    dtype = DTYPES[args.dtype] if args.dtype else None
    model = with_arguments(args, read_model(args.source, args.base, load_config(args), ema=args.ema))
    if args.to == "original":
        count = write_original(model, args.target, dtype)
        print(f"wrote {args.target}: {count} tensors; {describe(model)}")
        return
    write_diffusers(model, args.target, args.source, dtype)
    print(f"wrote {args.target}; {describe(model)}")
    if not args.verify:
        print("not verified: --no-verify")
    elif importlib.util.find_spec("diffusers") is None:
        print("not verified: diffusers is not installed; pip install -r requirements-dev.txt brings it")
    else:
        verify(args.target, model, dtype)


def load_config(args: argparse.Namespace) -> Any:
    """The model file that was named, if one was."""
    from cldm.model import load_model_config

    return load_model_config(args.config) if args.config else None


def with_arguments(args: argparse.Namespace, model: Model) -> Model:
    """A model with what it predicts as said on the command line."""
    from omegaconf import OmegaConf

    from cldm.model import with_choices

    if model.config is None or args.parameterization is None:
        return model
    config = with_choices(model.config, parameterization=args.parameterization)
    return model._replace(config=config, notes={**model.notes, "model_config": OmegaConf.to_yaml(config)})


def describe(model: Model) -> str:
    """Say what was detected."""
    from cldm.checkpoint import parts

    inside = ", ".join(sorted(parts(model.state)))
    if model.config is None:
        return inside
    params = model.config.model.params
    hints = params.control_stage_config.params.get("hint_channels", 3)
    control = f", hints of {hints} channels" if "control" in parts(model.state) else ""
    return f"{inside}; predicts {params.get('parameterization', 'eps')}{control}"


# -- verification in diffusers ----------------------------------------------------------------------------


class Difference(NamedTuple):
    """One comparison: largest difference, and what a right export stays below."""

    what: str
    found: float
    bound: float


def verify(folder: Path, model: Model, dtype: Any) -> None:
    """Load the folder in diffusers, print the differences, and exit with 1 if one is too large."""
    from cldm.export import build

    try:
        differences = list(compare(build(model, dtype, str(folder)), load_pipeline(folder)))
    except (ValueError, OSError) as error:
        refuse(f"{folder} could not be verified and is kept: {error}", 1)
    for what, found, bound in differences:
        print(f"{what}: largest difference {found:.2g} (bound {bound:.2g})")
    if wrong := [row.what for row in differences if not row.found <= row.bound]:  # a NaN is wrong as well
        refuse(
            f"{folder} does not compute what the source computes ({', '.join(wrong)} differ); it is kept",
            1,
        )
    print("verified in diffusers")


def load_pipeline(folder: Path) -> Any:
    """The pipeline of the folder in float32, quiet."""
    import diffusers
    import torch
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compare(ours: ControlledModel, theirs: Any) -> Iterator[Difference]:
    """Text, autoencoder, one forward: relative to the largest value; a sample: colours in 0..1."""
    import torch

    generator = torch.Generator().manual_seed(0)
    channels = ours.control_model.hint_channels
    hint = torch.rand(1, channels, *SIZE, generator=generator)
    z = torch.randn(1, 4, SIZE[0] // 8, SIZE[1] // 8, generator=generator)
    t = torch.tensor([501])
    has_control = hasattr(theirs, "controlnet")
    with torch.no_grad():
        text = ours.get_learned_conditioning([PROMPT])
        yield Difference(
            "text", relative(text, theirs.encode_prompt(PROMPT, "cpu", 1, False)[0]), FORWARD_BOUND
        )
        image = ours.first_stage_model.decode(z)
        yield Difference("autoencoder", relative(image, theirs.vae.decode(z).sample), FORWARD_BOUND)
        cond = {"c_concat": [hint] if has_control else None, "c_crossattn": [text]}
        residuals = {}
        if has_control:
            down, mid = theirs.controlnet(z, t, text, controlnet_cond=hint, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        eps = theirs.unet(z, t, text, **residuals).sample
        what = "UNet and control" if has_control else "UNet"
        yield Difference(what, relative(ours.apply_model(z, t, cond), eps), FORWARD_BOUND)
    yield Difference(
        f"sample of {STEPS} steps",
        sample_difference(ours, theirs, hint if has_control else None),
        IMAGE_BOUND,
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def sample_difference(ours: ControlledModel, theirs: Any, hint: Tensor | None) -> float:
    """Largest difference of an image from the same noise, colours in 0..1."""
    from cldm.config import SampleConfig
    from cldm.generate import draw_noise, generate

    settings = SampleConfig(steps=STEPS, scale=SCALE, negative_prompt=NEGATIVE)
    image = generate(ours, hint, [PROMPT], [0], settings, size=None if hint is not None else SIZE)
    noise = draw_noise([0], 1, (4, SIZE[0] // 8, SIZE[1] // 8))[0]
    where = {"height": SIZE[0], "width": SIZE[1]} if hint is None else {"image": hint}
    found = theirs(
        PROMPT,
        negative_prompt=NEGATIVE,
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="np",
        **where,
    ).images
    return float(abs(image.numpy() / 255 - found).max())


if __name__ == "__main__":
    main()
