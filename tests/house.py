"""What the house tests share: the list of our files, and what each of them imports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cldm", "datasets", "ldm", "metrics", "webui")
NOT_PRODUCT = {"tests", "benchmarks", "docs", "configs", "models"}


def scripts() -> list[Path]:
    """Return the scripts: the Python files in the root."""
    return sorted(ROOT.glob("*.py"))


def product_files() -> list[Path]:
    """Return every Python file of the packages."""
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def all_files() -> list[Path]:
    """Return every Python file that we wrote, tests and benchmarks included."""
    extra = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    return [*scripts(), *product_files(), *sorted(extra)]


def name_of(path: Path, root: Path = ROOT) -> str:
    """Return the dotted name of a file: ldm/modules/__init__.py -> ldm.modules."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, module: str, *, is_package: bool = False) -> set[str]:
    """Return every dotted name that a module imports, anywhere in it; `from a import b` gives `a.b`.

    Imports under TYPE_CHECKING count: the direction of an arrow does not depend on when it is drawn.
    """
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                keep = len(parents) - node.level + is_package
                base = ".".join([*parents[:keep], *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def covers(prefix: str, name: str) -> bool:
    """Return whether a dotted name is `prefix` or lies below it."""
    return name == prefix or name.startswith(f"{prefix}.")


def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def run_script(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run Python in the root, in plain colours and wide lines, so that help pages can be read."""
    plain = {"NO_COLOR": "1", "PYTHON_COLORS": "0", "TERM": "dumb", "COLUMNS": "200", "PYTHONUTF8": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **plain},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@cache
def help_of(script: str) -> subprocess.CompletedProcess[str]:
    """Return what `python SCRIPT --help` does; `-X importtime` lists on stderr what it imports for that."""
    return run_script("-X", "importtime", script, "--help")


def flags_in(page: str) -> set[str]:
    """Return the flags that an argparse help page lists in its sections of arguments."""
    flags: set[str] = set()
    listing = False
    for line in page.splitlines():
        if re.fullmatch(r"(positional arguments|options|optional arguments|[\w ]+):", line):
            listing = True
        elif line and not line.startswith(" "):
            listing = False
        elif listing and re.match(r" {2,4}-", line):
            names = re.split(r"\s{2,}", line.strip())[0]
            flags |= set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", names))
    return flags
