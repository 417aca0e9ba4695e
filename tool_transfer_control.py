"""Move a control branch to another base: python tool_transfer_control.py CONTROL OUT --to BASE [--from BASE]

    python tool_transfer_control.py models/control_sd15_seg.pth models/photo_seg.safetensors \\
        --from models/v1-5-pruned.safetensors --to models/photo.safetensors
    python tool_transfer_control.py CONTROL OUT --to BASE --swap

The offset rule: new control = new base + (old control - old base), for each tensor that began as a copy of
the UNet's; hint block and zero convolutions as they are. A decoder that was trained with the branch is moved
by the same rule. --from is the base that the branch was trained on, by default the one that CONTROL records.
--swap takes the branch untouched: DGInStyle's way to the look of another base. OUT holds what the base does
not and names it by path and hash, so that generate.py finds it; --whole writes one file with everything.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cldm.cli import check_new, check_there, refuse

if TYPE_CHECKING:
    from cldm.transfer import Transfer


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments, before anything slow is imported."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("control", type=Path, help="control branch, or a whole model with one")
    add("target", type=Path, help="safetensors file to write; refused if it exists")
    add("--to", type=Path, required=True, metavar="BASE", help="Stable Diffusion to move it to")
    add("--from", type=Path, dest="old", metavar="BASE", help="Stable Diffusion that it was trained on")
    add("--swap", action="store_true", help="take the branch as it is, without the offset")
    add("--whole", action="store_true", help="write the whole model")
    add("--dtype", choices=("fp16", "bf16", "fp32"), help="of the tensors (default: as in the files)")
    args = parser.parse_args(argv)
    check_there(parser, args.control, args.to, args.old)
    check_new(parser, args.target)
    if args.target.suffix != ".safetensors":
        parser.error(f"{args.target} has to end in .safetensors")
    return args


def describe(made: Transfer) -> str:
    """What was done, and how far apart the three are."""
    lines = [f"{made.moved} tensors moved by the offset of the bases, {made.copied} taken as they are"]
    if made.has_decoder:
        lines.append("the decoder that was trained with the branch went along")
    if made.drift:
        trained, apart = made.drift
        lines.append(
            f"training had moved them by {trained:.1%} of their norm; the bases are {apart:.1%} apart"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, move, write, report."""
    args = parse_args(argv)
    from cldm.export import DTYPES
    from cldm.tensor_writing import write_tensors
    from cldm.transfer import transfer_control

    options = {"swap": args.swap, "whole": args.whole, "dtype": DTYPES[args.dtype] if args.dtype else None}
    try:
        made = transfer_control(args.control, args.target, args.to, args.old, **options)
        write_tensors(args.target, made.tensors, made.notes)
    except (ValueError, OSError) as error:
        refuse(str(error))
    print(describe(made))
    print(f"wrote {args.target}: {len(made.tensors)} tensors, {args.target.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
