"""Write what others read of a training's checkpoint: python tool_export.py CKPT OUT [--dtype fp16]

    python tool_export.py work_dir/lightning_logs/version_0/checkpoints/step=002000.safetensors OUT
    python tool_export.py CKPT models/control_streets.safetensors --base models/streets_base.safetensors

OUT is the control branch alone under the published names (control_model.*), in half the size of training;
generate.py finds its base by the recorded path or hash. --base records another file as the base, after a
check that it equals the one of the training in everything that is not control.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cldm.cli import refuse


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments and check that files are there, and the target is not."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("source", type=Path, help="checkpoint of a training, or a whole model with control")
    parser.add_argument("target", type=Path, help="safetensors file to write; refused if it exists")
    parser.add_argument("--to", choices=("control",), default="control", help="format (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="of the tensors (default: fp16)"
    )
    parser.add_argument("--base", type=Path, help="file to record as the base, in place of the training's")
    args = parser.parse_args(argv)
    for path in filter(None, (args.source, args.base)):
        if not path.exists():
            parser.error(f"{path} does not exist")
    if args.target.exists():
        parser.error(f"{args.target} exists; choose another name or remove it first")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Read, choose, write, report."""
    args = parse_args(argv)
    from cldm.export import DTYPES, write_control

    try:
        count, base = write_control(args.source, args.target, DTYPES[args.dtype], args.base)
    except (ValueError, OSError) as error:
        refuse(str(error))
    size = args.target.stat().st_size / 2**20
    print(f"wrote {args.target}: {count} tensors in {args.dtype}, {size:.1f} MiB, base {base}")


if __name__ == "__main__":
    main()
