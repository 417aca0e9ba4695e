"""Nothing is in the tree that no script reaches: by import, by a YAML `target:`, or by name in a table."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from house import PACKAGES, ROOT, covers, imports_of, name_of, product_files, scripts

# While one of these is not written, a file that nothing reaches yet is skipped and not failed.
AWAITED: tuple[str, ...] = ()


def sources() -> dict[str, str]:
    """Return dotted name -> source for the product files, and for the scripts as `script:NAME`."""
    table = {name_of(path): path.read_text(encoding="utf-8") for path in product_files()}
    return table | {f"script:{path.stem}": path.read_text(encoding="utf-8") for path in scripts()}


def yaml_targets(folder: Path) -> set[str]:
    """Return what the `target:` lines of the YAML files in models/ and configs/ name."""
    files = [*folder.glob("models/*.yaml"), *folder.glob("configs/**/*.yaml")]
    pattern = re.compile(r"^\s*-?\s*target:\s*['\"]?([\w.]+)", re.MULTILINE)
    return {target for path in files for target in pattern.findall(path.read_text(encoding="utf-8"))}


def named_in(tree: ast.AST, module: str) -> set[str]:
    """Return the modules that a file names in strings: `"datasets.ade20k:ADE20K"`, or `module="ade20k"`.

    The second form is the registry's, whose rows name modules of their own package to import on demand.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            match = re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)+)(?::\w+)?", node.value)
            if match and match[1].partition(".")[0] in PACKAGES:
                found.add(match[1])
        elif isinstance(node, ast.keyword) and node.arg == "module" and isinstance(node.value, ast.Constant):
            found.add(f"{module}.{node.value.value}")
    return found


def modules_behind(name: str, known: Mapping[str, str]) -> set[str]:
    """Return the known modules that importing a dotted name runs: its parent packages and itself."""
    return {module for module in known if covers(module, name)}


def reached(known: Mapping[str, str], targets: set[str]) -> set[str]:
    """Return every module that the scripts and the YAML targets reach, directly or through others."""
    waiting = [name for name in known if name.startswith("script:")]
    waiting += [module for target in targets for module in modules_behind(target, known)]
    seen = set(waiting)
    while waiting:
        module = waiting.pop()
        tree = ast.parse(known[module])
        names = imports_of(tree, module) | named_in(tree, module)
        fresh = {other for name in names for other in modules_behind(name, known)} - seen
        seen |= fresh
        waiting += fresh
    return seen


REACHED = reached(sources(), yaml_targets(ROOT))


@pytest.mark.parametrize("path", product_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_product_file_is_reached(path: Path) -> None:
    unwritten = [name for name in AWAITED if not (ROOT / name).exists()]
    if name_of(path) not in REACHED and unwritten:
        pytest.skip(f"nothing reaches it yet, but {', '.join(unwritten)} may")
    assert name_of(path) in REACHED, "no script and no YAML target leads here; use it or remove it"


def test_reach_follows_imports_targets_and_names_and_stops_there() -> None:
    known = {
        "script:run": "from ldm.a import f",
        "ldm": "",
        "ldm.a": "def f():\n    from cldm import b",
        "cldm": "",
        "cldm.b": "TABLE = {'x': 'datasets.c:Thing'}",
        "datasets": "ROWS = [Row(module='d')]",
        "datasets.c": "",
        "datasets.d": "",
        "cldm.yaml_only": "",
        "ldm.dead": "import ldm.dead_too",
        "ldm.dead_too": "'a sentence that names ldm.dead does not count'",
    }
    assert set(known) - reached(known, {"cldm.yaml_only.Net"}) == {"ldm.dead", "ldm.dead_too"}


def test_yaml_targets_are_found_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    text = (
        "model:\n  target: cldm.cldm.ControlLDM\n  params:\n    unet_config:\n      target: 'cldm.cldm.Net'\n"
    )
    (tmp_path / "models" / "x.yaml").write_text(text + "    # target: not.this.One\n")
    assert yaml_targets(tmp_path) == {"cldm.cldm.ControlLDM", "cldm.cldm.Net"}
