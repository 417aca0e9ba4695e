"""Add a control branch to Stable Diffusion weights: the checkpoint that training starts from.

    python tool_add_control.py models/v1-5-pruned.safetensors models/control_sd15_ini.safetensors
    python tool_add_control.py BASE OUT --control models/control_v11p_sd15_seg.pth
    python tool_add_control.py DIFFUSERS_FOLDER OUT.safetensors
    python tool_add_control.py            # the Streets miniature, models/control_streets_ini.safetensors

The branch starts as a copy of the UNet's encoder behind zero convolutions, so that the result computes what
the base computes, exactly; with --control it is taken from a published control file. SD1.5, SD2.1 and Streets
are told apart by their tensors; BASE and --control are files or diffusers folders. OUT is safetensors, or a
torch file when its name ends in .ckpt.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cldm.cli import check_new, check_there, refuse

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

STREETS = (Path("models/streets_base.safetensors"), Path("models/control_streets_ini.safetensors"))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments, before anything slow is imported."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument(
        "source",
        type=Path,
        nargs="?",
        help="Stable Diffusion without a control branch: file, diffusers folder",
    )
    parser.add_argument("target", type=Path, nargs="?", help="file to write; refused if it exists")
    parser.add_argument("--control", type=Path, help="published control weights to take instead of the copy")
    parser.add_argument("--config", type=Path, help="model YAML file; by default the one of the architecture")
    parser.add_argument("--seed", type=int, default=0, help="of the hint block, which nothing is copied into")
    args = parser.parse_args(argv)
    if args.source is None:
        args.source, args.target = STREETS
        if not args.source.exists():
            parser.error(
                f"without arguments the Streets base {args.source} is used, but it is not here; pass IN OUT"
            )
    if args.target is None:
        parser.error("expected two files, IN and OUT; OUT is missing")
    check_there(parser, args.source, args.control, args.config)
    check_new(parser, args.target)
    return args


def describe(sources: Mapping[str, str]) -> str:
    """Say what was copied from where and what is new, the new tensors by name."""
    control = {key: source for key, source in sources.items() if key.startswith("control_model.")}
    new = [key for key, source in sources.items() if source == "NEW"]
    copied = sum(source not in ("NEW", "CONTROL") for source in control.values())
    given = sum(source == "CONTROL" for source in control.values())
    lines = [f"{len(sources) - len(control) - sum(k not in control for k in new)} tensors kept from the base"]
    lines += [f"{copied} control tensors copied from the UNet's encoder"] if copied else []
    lines += [f"{given} control tensors taken from the control file"] if given else []
    return "\n".join([*lines, f"{len(new)} tensors new:", *(f"  {key}" for key in new)])


def describe_model(config: DictConfig) -> str:
    """Say what was detected."""
    params = config.model.params
    unet, control = params.unet_config.params, params.control_stage_config.params
    return (
        f"has {unet.model_channels} channels and text of width {unet.get('context_dim', 768)}, predicts "
        f"{params.get('parameterization', 'eps')}; hints of {control.get('hint_channels', 3)} channels"
    )


def read_branch(path: Path) -> dict[str, Tensor]:
    """Tensors of a control file; a branch that was trained together with its UNet's decoder is refused."""
    from cldm.checkpoint import parts
    from cldm.tensor_files import CheckpointError
    from cldm.weights import read_published

    control = read_published(path)
    if parts(control) == {"unet", "control"}:
        raise CheckpointError(
            f"{path} carries a UNet decoder that was trained with its control branch, so the branch alone "
            f"is of no use; train on from it: python tutorial_train.py --resume_path {path}"
        )
    return control


def main(argv: Sequence[str] | None = None) -> None:
    """Read, combine, write, report."""
    args = parse_args(argv)
    from omegaconf import OmegaConf

    from cldm.add_control import add_control
    from cldm.checkpoint import check_pair, parts, refuse_foreign
    from cldm.model import load_model_config, model_config_of, shapes_of, with_hint_channels
    from cldm.tensor_files import CheckpointError
    from cldm.tensor_writing import write_tensors
    from cldm.weights import read_published

    try:
        base = read_published(args.source)
        refuse_foreign(shapes_of(base), str(args.source))
        config = load_model_config(args.config) if args.config else model_config_of(args.source)
        if "control" in parts(base):
            raise CheckpointError(f"{args.source} has a control branch already; expected weights without one")
        control = None
        if args.control:
            control = read_branch(args.control)
            check_pair(control, base, str(args.control), str(args.source))
            config = with_hint_channels(config, shapes_of(control))
        state, sources = add_control(config, base, control, args.seed)
        write_tensors(args.target, state, {"model_config": OmegaConf.to_yaml(config)})
    except (ValueError, FileNotFoundError) as error:
        refuse(str(error))
    print(f"{args.source} {describe_model(config)}")
    print(describe(sources))
    print(
        f"wrote {args.target}\n"
        "train from it: python tutorial_train.py --dataset NAME "
        f"--resume_path {shlex.quote(str(args.target))}"
    )


if __name__ == "__main__":
    main()
