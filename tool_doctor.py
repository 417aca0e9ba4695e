"""Say what is installed, what this machine can do, what is in conflict and which command mends it.

    python tool_doctor.py          a page to read
    python tool_doctor.py --json   the same for a program, or for a bug report

The exit status is 1 if something prevents work, else 0: a security floor that is missed, a file that is
missing or an optional package that does not work is reported and leaves it at 0. It runs with any of the
packages missing or broken, and takes about ten seconds because it imports each of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cldm.doctor import BROKEN, Conflict
from cldm.probes import WEIGHTS, Report, Wanted, as_json, examine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parent


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


def wanted_data() -> list[Wanted]:
    """What the data sets need, from their registry; nothing where another package took its name."""
    try:
        from datasets import DATASETS
    except ImportError:
        return []
    return [
        Wanted(f"{entry.default_root}/{part}", f"the {name} data set", entry.source)
        for name, entry in DATASETS.items()
        for part in entry.expected
    ]


def render(report: Report) -> Iterator[str]:
    """Give the report as lines to read."""
    yield "Versions"
    for name, version in report.versions.items():
        yield f"  {name:24} {version or 'not installed'}"
    yield from render_machine(report)
    yield from render_files(report.missing_files)
    yield from render_conflicts(report.conflicts)


def render_machine(report: Report) -> Iterator[str]:
    """Devices, attention and precision."""
    machine, torch, xformers = report.machine, report.probes["torch"], report.probes["xformers"]
    gpus = [
        f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}"
        for gpu in torch.facts.get("gpus", [])
    ]
    flags = ", ".join(machine["cpu_flags"]) or "no bf16 extension known"
    yield "This machine"
    yield f"  system                   {machine['system']}"
    yield f"  CPU                      {machine['cpu_cores']} cores ({flags})"
    yield f"  memory, free disk        {machine['memory_gib']} GiB, {machine['disk_free_gib']} GiB"
    yield f"  GPU                      {'; '.join(gpus) or 'none that torch can use'}"
    yield f"  CUDA build of torch      {torch.facts.get('cuda_build') or 'none'}"
    yield f"  attention                {torch.facts.get('attention') or torch.error}"
    installed = report.versions["xformers"] is not None
    tried = xformers.facts.get("attention") or xformers.error
    yield f"  xformers                 {tried if installed else 'not installed (optional)'}"
    yield f"  precision                {report.precision}"


def render_files(missing: Sequence[Wanted]) -> Iterator[str]:
    """What models/ and data/ lack; only the commands that use it need it."""
    yield "Files that are not here (each is needed only for what it names)"
    for wanted in missing:
        yield f"  {wanted.pattern}: for {wanted.use}; {wanted.source}"
    if not missing:
        yield "  none"


def render_conflicts(conflicts: Sequence[Conflict]) -> Iterator[str]:
    """What is wrong, and what to do."""
    yield "Conflicts"
    for conflict in conflicts:
        yield f"  {conflict.severity.upper()}: {conflict.message}"
        yield f"    mend: {conflict.mend}"
    if not conflicts:
        yield "  none known: everything that is needed is here and works"


def main(argv: Sequence[str] | None = None) -> int:
    """Examine, print, and answer with the exit status."""
    args = parse_args(argv)
    report = examine(ROOT, [*WEIGHTS, *wanted_data()])
    print(as_json(report) if args.json else "\n".join(render(report)))
    return int(any(conflict.severity == BROKEN for conflict in report.conflicts))


if __name__ == "__main__":
    sys.exit(main())
