"""Arrows point down: who may import whom, and what no product file may contain. All of it read with `ast`."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
from house import (
    NOT_PRODUCT,
    PACKAGES,
    ROOT,
    all_files,
    covers,
    imports_of,
    name_of,
    parse,
    product_files,
    run_script,
    scripts,
)

# The longest matching row holds. The four on the ground import only themselves.
MAY_IMPORT = {
    "ldm": {"ldm"},
    "ldm.util": {"ldm.util"},
    "ldm.modules": {"ldm.modules"},
    "ldm.priors": {"ldm.priors"},
    "ldm.models": {"ldm.models", "ldm.modules", "ldm.util"},
    "cldm": {"cldm", "ldm"},
    "datasets": {"datasets"},
    "metrics": {"metrics", "cldm", "datasets", "ldm.priors.moments"},
    "webui": {"webui", "cldm", "datasets"},
}
RIM_ONLY = (
    *("accelerate", "cleanfid", "diffusers", "gradio", "lpips", "scipy"),
    *("torch_fidelity", "torchmetrics", "transformers"),
)
MAY_IMPORT_FROM_THE_RIM = {
    "metrics": {"scipy", "torch_fidelity", "torchmetrics", "transformers"},
    "webui": {"gradio"},
}
SCRIPT_NAMES = {path.stem for path in scripts()}


def illegal_imports(source: str, module: str) -> list[str]:
    """Return the imports of a product module that the tables do not allow."""
    imported = imports_of(ast.parse(source), module)
    row = max((prefix for prefix in MAY_IMPORT if covers(prefix, module)), key=len)
    rim = set(RIM_ONLY) - MAY_IMPORT_FROM_THE_RIM.get(module.partition(".")[0], set())
    ours = {name for name in imported if name.partition(".")[0] in {*PACKAGES, *SCRIPT_NAMES}}
    upward = {name for name in ours if not any(covers(prefix, name) for prefix in MAY_IMPORT[row])}
    return sorted(upward | {name for name in imported if name.partition(".")[0] in rim})


def illegal_code(source: str, kind: str) -> list[str]:
    """Return the banned calls and imports of a "library", a "script" or a "test", in rising freedom.

    A test may unpickle, to show that a bait is live; nobody may call torch.load without weights_only.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append(f"line {node.lineno}: star import")
        elif isinstance(node, ast.Call):
            found += [f"line {node.lineno}: {what}" for what in illegal_call(node, kind)]
    return found


def illegal_call(node: ast.Call, kind: str) -> list[str]:
    """Return what is wrong with one call."""
    name = ast.unparse(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    found = []
    if name == "torch.load" and not is_true(keywords.get("weights_only")):
        found.append("torch.load without weights_only=True runs what the file says")
    unpickles = name in ("pickle.load", "pickle.loads") or is_true(keywords.get("allow_pickle"))
    if kind != "test" and unpickles:
        found.append("unpickling runs what the file says")
    if kind == "library" and name.endswith(".cuda"):
        found.append(".cuda(): device follows the tensor")
    if kind == "library" and name == "print":
        found.append("print: a library logs")
    return found


def is_true(node: ast.expr | None) -> bool:
    """Return whether a keyword is the constant True."""
    return isinstance(node, ast.Constant) and node.value is True


@pytest.mark.parametrize("path", product_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert illegal_imports(path.read_text(encoding="utf-8"), name_of(path)) == []


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_no_script_imports_a_script(path: Path) -> None:
    others = SCRIPT_NAMES - {path.stem}
    assert {name for name in imports_of(parse(path), path.stem) if name.partition(".")[0] in others} == set()


@pytest.mark.parametrize("path", all_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_banned_call(path: Path) -> None:
    kinds = {"tests": "test", **dict.fromkeys(PACKAGES, "library")}
    kind = kinds.get(path.relative_to(ROOT).parts[0], "script")
    assert illegal_code(path.read_text(encoding="utf-8"), kind) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ldm.modules.attention", "from ldm.util import instantiate_from_config"),
        ("ldm.modules.attention", "def f():\n    import cldm.model"),
        ("ldm.models.autoencoder", "import ldm.priors.prior"),
        ("ldm.priors.prior", "from ldm import models"),
        ("cldm.model", "from datasets import DATASETS"),
        ("cldm.model", "if TYPE_CHECKING:\n    from webui.page import Page"),
        ("cldm.logger", "from scipy.linalg import sqrtm"),
        ("datasets.base", "from ldm.util import f"),
        ("datasets.base", "import transformers"),
        ("metrics.fid", "import ldm.priors.prior"),
        ("metrics.fid", "import gradio"),
        ("cldm.model", "from tool_doctor import main"),
        ("ldm.modules.attention", "from .. import models"),
    ],
)
def test_a_planted_import_is_caught(module: str, source: str) -> None:
    assert illegal_imports(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ldm.models.autoencoder", "from ldm.modules.diffusionmodules.model import Encoder\nimport torch"),
        ("cldm.cldm", "import ldm.priors.prior, cldm.model"),
        ("metrics.card", "from ldm.priors.moments import Moments"),
        ("webui.page", "import gradio, cldm.generate"),
    ],
)
def test_a_lawful_import_is_let_pass(module: str, source: str) -> None:
    assert illegal_imports(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "np.load('x', allow_pickle=True)",
        "pickle.load(file)",
        "x.cuda()",
        "self.net(x).cuda(0)",
        "print('x')",
        "from os import *",
    ],
)
def test_a_planted_call_is_caught(source: str) -> None:
    assert illegal_code(source, "library")


def test_what_is_allowed_is_let_pass() -> None:
    assert illegal_code("print(torch.cuda.is_available())", "script") == []
    assert illegal_code("torch.cuda.device_count()\ntorch.load(p, weights_only=True)", "library") == []
    assert illegal_code("pickle.loads(pickle.dumps(dataset))", "test") == []
    assert illegal_code("torch.load(p)", "test") != []


def test_every_folder_with_code_is_a_regular_package() -> None:
    lost = {
        str(path.parent.relative_to(ROOT))
        for path in product_files()
        if not (path.parent / "__init__.py").exists()
    }
    assert lost == set(), "these folders need an __init__.py"


def test_every_package_has_its_row_in_the_tables() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    assert folders - NOT_PRODUCT <= set(PACKAGES), "add the new package to house.PACKAGES and MAY_IMPORT"
    assert set(PACKAGES) <= set(MAY_IMPORT)


def test_import_datasets_gives_ours_even_beside_a_rival(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (ROOT / "datasets").is_dir():
        pytest.skip("datasets/ is not written yet")
    spec = importlib.util.find_spec("datasets")
    assert spec is not None
    assert spec.origin == str(ROOT / "datasets" / "__init__.py")
    rival = tmp_path / "datasets"
    rival.mkdir()
    (rival / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_script("-c", "import datasets; print(datasets.__file__)").stdout.strip() == spec.origin
