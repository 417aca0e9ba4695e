"""Give a control branch other hint channels: python tool_convert_hint.py CONTROL OUT

    python tool_convert_hint.py models/control_streets.safetensors models/control_streets_onehot.safetensors
    python tool_convert_hint.py models/control_v11p_sd15_seg.pth OUT --palette ade20k
    python tool_convert_hint.py CONTROL OUT --channels 0-18 new:6 19

A branch that was taught painted maps becomes one that takes one-hot maps, a channel for each class and one
for void, and that gives the same output: its first convolution is composed with the palette. From there it
can be trained on without colours that two classes nearly share. With --channels the new channels are listed
by the old ones that they take their weights from: 0-18, 3, or new for a channel of zeros (new:6 for six). OUT
with the suffix .yaml is the model file that fits, for training; generate.py needs none.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cldm.cli import check_new, check_there, refuse
from datasets import DATASETS
from datasets.files import write_text
from datasets.hint_encoding import hint_encoding, seen_as_one_hot
from datasets.label_space import SPACES, LabelSpace

MOST_CHANNELS = 1000


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the arguments, before anything slow is imported."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("control", type=Path, help="control branch, or a whole model with one")
    add("target", type=Path, help="safetensors file to write; refused if it exists, and so is its .yaml")
    add("--from", dest="encoding", help="how it was taught maps (default: as recorded, or colours)")
    add("--palette", choices=SPACES, help="of which label space (default: as recorded)")
    add("--void", metavar="CLASS", help="class that stands for void, where the encoding tells several apart")
    add("--channels", nargs="+", metavar="OLD", help="old channel of each new one, instead of one-hot")
    args = parser.parse_args(argv)
    args.yaml = args.target.with_suffix(".yaml")
    check_there(parser, args.control)
    check_new(parser, args.target, args.yaml)
    if args.target.suffix != ".safetensors":
        parser.error(f"{args.target} has to end in .safetensors")
    if args.channels and (args.encoding or args.palette or args.void):
        parser.error(
            "--channels names channels; --from, --palette and --void are of label maps, so leave one out"
        )
    return args


def read_channels(words: Sequence[str], found: int) -> NDArray[np.float64]:
    """(N, C) ones and zeros: which of `found` old channels each new one is; zeros are none of them."""
    rows: list[NDArray[np.float64]] = []
    for word in words:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?|new(?::(\d+))?", word)
        if match is None:
            raise ValueError(
                f"expected a channel such as 3, a range such as 0-18, new or new:6, found {word!r}"
            )
        first, last, count = match.groups()
        if first is None:
            rows += [np.zeros(found)] * min(int(count or 1), MOST_CHANNELS + 1)
            continue
        old = range(int(first), int(last or first) + 1)
        if not old or old[-1] >= found:
            raise ValueError(f"expected channels of 0..{found - 1}, which the control has, found {word!r}")
        rows += [np.eye(found)[i] for i in old]
        if len(rows) > MOST_CHANNELS:
            break
    if not 0 < len(rows) <= MOST_CHANNELS:
        raise ValueError(f"expected 1 to {MOST_CHANNELS} channels, found {'more' if rows else 'none'}")
    return np.stack(rows)


def one_hot_of_maps(args: argparse.Namespace) -> tuple[NDArray[np.float32], dict[str, str | None], str]:
    """What the control saw for each one-hot channel, what its record is to say from now on, what was done."""
    from cldm.recorded_run import read_recorded_run

    run = read_recorded_run(args.control)
    own = DATASETS[run.dataset].label_space if run.dataset in DATASETS else None
    recorded = run.label_space or own
    palette = args.palette or recorded
    if palette is None:
        raise ValueError(
            f"{args.control} has no record of the label space that it was trained on; name it with --palette"
        )
    encoding = hint_encoding(LabelSpace.load(palette), args.encoding or run.hint or "colours")
    seen_as: dict[str, str | None] = {"hint": "onehot"} | ({} if palette == own else {"label_space": palette})
    return seen_as_one_hot(encoding, args.void), seen_as, f"{encoding.name} of {palette} to onehot"


def main(argv: Sequence[str] | None = None) -> None:
    """Read, compose, write, report."""
    args = parse_args(argv)
    import torch
    from omegaconf import OmegaConf

    from cldm.hint_channels import FIRST, convert_hint, read_branch
    from cldm.tensor_writing import write_tensors

    try:
        found = read_branch(args.control)[FIRST].shape[1]
        if args.channels:
            matrix = read_channels(args.channels, found)
            seen_as, rule = {"hint": None}, f"channels {' '.join(args.channels)}"
        else:
            matrix, seen_as, rule = one_hot_of_maps(args)
        made = convert_hint(args.control, args.target, torch.from_numpy(matrix), seen_as=seen_as, rule=rule)
        write_tensors(args.target, made.tensors, made.notes)
        write_text(args.yaml, f"# Of {args.target.name}: {rule}.\n{OmegaConf.to_yaml(made.config)}")
    except (ValueError, OSError) as error:
        refuse(str(error))
    print(
        f"wrote {args.target}: hints of {len(matrix)} channels instead of {found} ({rule}), and {args.yaml}"
    )


if __name__ == "__main__":
    main()
