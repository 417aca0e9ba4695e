"""The doctor names planted conflicts, each with the command that mends it, and survives broken packages."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from house import ROOT, run_script
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from cldm import probes as probing
from cldm.doctor import (
    BROKEN,
    FLOORS,
    MODULES,
    SECURITY,
    WARNING,
    Probe,
    advise_precision,
    find_conflicts,
    read_bounds,
    release,
    runs_on,
    satisfies,
)
from cldm.probes import (
    PROBED,
    Wanted,
    installed_versions,
    locate_datasets,
    report_probes,
    torch_needed_by,
    try_all,
)

BOUNDS = read_bounds(ROOT / "requirements.txt")
HEALTHY = {
    **{"python": "3.11.7", "torch": "2.15.0", "torchvision": "0.29.2", "pytorch-lightning": "2.6.6"},
    **{"omegaconf": "2.4.0", "open-clip-torch": "3.3.0", "safetensors": "0.8.0", "pillow": "12.0.0"},
    **{
        "opencv-python-headless": "5.0.0.93",
        "numpy": "2.4.6",
        "tensorboard": "2.21.0",
        "tqdm": "4.70.1",
        "transformers": "5.23.0",
        "torchmetrics": "1.9.0",
        "torch-fidelity": "0.4.0",
        "gradio": "6.31.0",
    },
}
NOT_PROBED = {
    "tensorboard",
    "tqdm",
    "gradio",
    "torchmetrics",
    "torch-fidelity",
    "transformers",
}  # slow to import, rarely broken
NMS = "RuntimeError: operator torchvision::nms does not exist"
H200 = {"name": "H200", "memory_gib": 139.0, "capability": "9.0"}
WORKING = {name: Probe() for name in PROBED if name != "xformers"}


def diagnose(versions: dict[str, str | None], failures: dict[str, str], needs: dict[str, str] | None = None):
    """Return code -> conflict for a healthy installation with some versions and some imports changed."""
    probes = WORKING | {name: Probe(error) for name, error in failures.items()}
    conflicts = find_conflicts(HEALTHY | versions, probes, bounds=BOUNDS, needs=needs)
    return {conflict.code: conflict for conflict in conflicts}


@pytest.mark.parametrize(
    ("versions", "failures", "needs", "code", "severity", "mend"),
    [
        ({"python": "3.9.18"}, {}, {}, "python", BROKEN, "PYTHON=python3.12"),
        ({"torch": "2.9.1"}, {}, {}, "torch-old", SECURITY, "torch>=2.10"),
        (
            {"pytorch-lightning": "2.6.5"},
            {},
            {},
            "pytorch-lightning-old",
            SECURITY,
            "pytorch-lightning>=2.6.6",
        ),
        ({"gradio": "5.49.1"}, {}, {}, "gradio-old", SECURITY, "gradio>=6.17.3"),
        ({"open-clip-torch": "2.32.0"}, {}, {}, "open-clip-torch-old", BROKEN, "open-clip-torch>=3.0"),
        ({"safetensors": None}, {"safetensors": "gone"}, {}, "missing", BROKEN, "-r requirements.txt"),
        ({"omegaconf": "2.3.0"}, {}, {}, "omegaconf-untested", WARNING, "-r requirements.txt"),
        (
            {"torch": "2.15.0+cpu"},
            {"torchvision": NMS},
            {},
            "torchvision-mismatch",
            BROKEN,
            "reinstall torch torchv",
        ),
        ({}, {}, {"torchvision": "==2.14.0"}, "torchvision-mismatch", WARNING, "reinstall torch torchvision"),
        (
            {},
            {"cv2": "ImportError: numpy.core.multiarray failed to import"},
            {},
            "opencv-numpy",
            BROKEN,
            "opencv",
        ),
        (
            {},
            {"cv2": "ImportError: libGL.so.1: cannot open"},
            {},
            "opencv-desktop",
            BROKEN,
            "uninstall -y opencv-python",
        ),
        ({"opencv-python": "4.12.0.88"}, {}, {}, "opencv-twice", WARNING, "uninstall -y opencv-python"),
        (
            {"opencv-python": "4.12.0.88"},
            {"cv2": "ImportError: x"},
            {},
            "opencv-twice",
            BROKEN,
            "uninstall -y opencv",
        ),
        (
            {"xformers": "0.0.33"},
            {},
            {"xformers": "==2.9.0"},
            "xformers-mismatch",
            WARNING,
            "uninstall -y xformers",
        ),
        (
            {"xformers": "0.0.35"},
            {"xformers": "OSError: x"},
            {},
            "xformers-broken",
            WARNING,
            "uninstall -y xformers",
        ),
        ({"datasets": "4.4.1"}, {}, {}, "datasets-twin", WARNING, "uninstall -y datasets"),
        (
            {"datasets": "4.4.1"},
            {"datasets": "it leads to x"},
            {},
            "datasets-shadowed",
            BROKEN,
            "uninstall -y datasets",
        ),
        (
            {},
            {"torch": "OSError: libcudart.so.12"},
            {},
            "torch-broken",
            BROKEN,
            "reinstall torch torchvision",
        ),
        ({}, {"PIL": "ImportError: x"}, {}, "pillow-broken", BROKEN, "reinstall --no-deps pillow"),
    ],
)
def test_a_planted_conflict_is_the_only_one_named(versions, failures, needs, code, severity, mend) -> None:
    found = diagnose(versions, failures, needs)
    assert list(found) == [code]
    assert found[code].severity == severity
    assert mend in found[code].mend


def test_a_healthy_installation_has_no_conflict() -> None:
    assert diagnose({}, {}, {"torchvision": ">=2.14.0"}) == {}


def test_a_broken_torchvision_is_named_once_and_not_again_for_those_that_import_it() -> None:
    found = diagnose(
        {}, {"torchvision": NMS, "open_clip": NMS, "pytorch_lightning": NMS}, {"torchvision": "==2.15.0"}
    )
    assert list(found) == ["torchvision-mismatch"]
    assert NMS in found["torchvision-mismatch"].message
    assert "pytorch-lightning and open-clip" in found["torchvision-mismatch"].message


def test_without_torch_one_entry_says_so() -> None:
    lost = "ModuleNotFoundError: No module named 'torch'"
    failures = dict.fromkeys(("torch", "torchvision", "open_clip", "pytorch_lightning"), lost)
    assert list(diagnose({"torch": None}, failures)) == ["missing"]


def test_an_opencv_that_pip_does_not_know_is_not_missing() -> None:
    assert diagnose({"opencv-python-headless": None}, {}) == {}


def test_what_prevents_work_comes_first() -> None:
    found = diagnose({"torch": "2.9.1", "open-clip-torch": "2.0", "datasets": "4.4.1"}, {})
    assert [conflict.severity for conflict in found.values()] == [BROKEN, SECURITY, WARNING]


@pytest.mark.parametrize(
    ("facts", "driver", "code"),
    [
        ({"cuda_build": "13.2", "gpus": []}, ["H200, 535.1"], "gpu-unused"),
        ({"cuda_build": None, "gpus": []}, ["H200, 580.1"], "gpu-unused"),
        ({"cuda_build": "13.2", "gpus": [H200], "arch_list": ["sm_100", "sm_120"]}, [], "gpu-unsupported"),
        ({"cuda_build": "13.2", "gpus": [H200], "arch_list": ["sm_80", "sm_90"]}, ["H200, 580.1"], None),
        ({"cuda_build": "13.2", "gpus": []}, [], None),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_named(facts: dict, driver: list[str], code: str | None) -> None:
    probes = WORKING | {"torch": Probe(facts=facts), "gpu": Probe(facts={"names": driver})}
    assert [conflict.code for conflict in find_conflicts(HEALTHY, probes)] == ([code] if code else [])


@pytest.mark.parametrize(
    ("capability", "archs", "expected"),
    [
        ("8.6", ["sm_80", "sm_90"], True),  # binary code runs on a higher minor of the same major
        ("8.0", ["sm_86"], False),
        ("12.0", ["sm_90", "compute_90"], True),  # PTX is compiled for what comes later
        ("12.0", ["sm_90"], False),
        ("7.0", ["sm_75", "sm_80"], False),
    ],
)
def test_compute_capability_rules_of_cuda(capability: str, archs: list[str], expected: bool) -> None:
    assert runs_on(capability, archs) is expected


@pytest.mark.parametrize("version", ["2.9.1", "2.10", "2.10.0", "2.13.0+cpu", "2.15.3", "2.16.0", "3.0"])
@pytest.mark.parametrize("specifier", [">=2.10,<2.16", "==2.13.0", ">=2.14.0", "<3", "<=2.10", ">2.13", ""])
def test_specifiers_agree_with_the_packaging_library(version: str, specifier: str) -> None:
    assert satisfies(version, specifier) == SpecifierSet(specifier).contains(version)


def test_versions_are_ordered_as_the_packaging_library_orders_them() -> None:
    versions = ["5.0.0.93", "2.10.1", "2.6", "2.10", "2.9.1", "2.6.6", "1.0", "2.6.5", "0.29.2"]
    assert sorted(versions, key=release) == sorted(versions, key=Version)


def test_the_requirements_stand_on_the_floors_and_name_what_is_probed() -> None:
    for floor in FLOORS:
        if floor.package in BOUNDS:
            assert f">={floor.version}," in BOUNDS[floor.package], "requirements.txt and FLOORS disagree"
    modules = {MODULES.get(package, package) for package in BOUNDS}
    assert modules - NOT_PROBED == set(PROBED) - {"xformers"}
    assert all("<" in bound and ">=" in bound for bound in BOUNDS.values()), "each bound has two ends"


def test_no_requirement_brings_a_rival_of_our_datasets_package() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        assert "datasets" not in read_bounds(ROOT / name)


@pytest.mark.parametrize(
    ("capabilities", "flags", "expected"),
    [
        (["9.0", "8.0"], [], "bf16-mixed"),
        (["9.0", "7.5"], [], "16-mixed"),
        ([], ["avx2", "amx_bf16"], "32-true is what auto takes; bf16-mixed is faster"),
        ([], ["avx2"], "32-true"),
    ],
)
def test_precision_follows_the_oldest_device(
    capabilities: list[str], flags: list[str], expected: str
) -> None:
    assert advise_precision([{"capability": value} for value in capabilities], flags).startswith(expected)


def test_modules_that_raise_or_kill_are_told_apart_and_do_not_hide_the_rest(tmp_path: Path) -> None:
    (tmp_path / "cldm").symlink_to(ROOT / "cldm")
    (tmp_path / "raises_here.py").write_text("raise OSError('libx.so: no such file\\nand more')")
    (tmp_path / "kills_here.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    (tmp_path / "chatters_here.py").write_text("print('{\"probe\": 1}')\nprint('no newline', end='')")
    names = ("raises_here", "kills_here", "chatters_here", "not_there_at_all", "json")
    results = try_all(tmp_path, names)
    assert list(results) == ["raises_here", "kills_here", "chatters_here", "not_there_at_all", "json"]
    assert results["raises_here"].error == "OSError: libx.so: no such file"
    assert "did not survive" in results["kills_here"].error
    assert "-9" in results["kills_here"].error
    assert "ModuleNotFoundError" in results["not_there_at_all"].error
    assert results["chatters_here"] == results["json"] == Probe()


def test_a_child_reports_devices_and_attention(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    report_probes(["torch"])
    row = json.loads(capsys.readouterr().out.strip().removeprefix(probing.MARK))
    assert row["error"] == ""
    assert row["facts"]["cuda_build"] == torch.version.cuda
    assert len(row["facts"]["gpus"]) == torch.cuda.device_count()
    assert "works" in row["facts"]["attention"]


def test_torch_needed_by_reads_both_ways_of_writing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {
        "old": ["numpy", "torch (==2.9.0)"],
        "new": ["torch>=2.10; python_version>'3'", "torchaudio==1"],
    }
    metadata["extra"] = ["torch==1.0; extra == 'test'"]
    monkeypatch.setattr(probing.metadata, "requires", metadata.get)
    assert [torch_needed_by(name) for name in ("old", "new", "extra")] == ["==2.9.0", ">=2.10", ""]


def test_versions_of_absent_packages_are_none() -> None:
    assert installed_versions(("no-such-package-anywhere",))["no-such-package-anywhere"] is None


def test_datasets_is_looked_for_beside_the_scripts(tmp_path: Path) -> None:
    assert "missing" in locate_datasets(tmp_path).error
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("")
    assert str(ROOT / "datasets") in locate_datasets(tmp_path).error


@pytest.mark.parametrize("name", ["tool_doctor.py", "cldm/__init__.py", "cldm/doctor.py", "cldm/probes.py"])
def test_the_doctor_parses_on_an_old_python_and_needs_the_standard_library_alone(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 8))
    absolute = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in absolute
        for alias in node.names
    }
    standard = {
        "__future__",
        "argparse",
        "dataclasses",
        "importlib",
        "importlib.util",
        "json",
        "os",
        "pathlib",
    }
    standard |= {"platform", "re", "shutil", "subprocess", "sys", "typing"}
    assert names <= standard | {"cldm.doctor", "cldm.probes"}


def test_missing_files_are_listed_until_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requirements.txt").write_text("numpy>=1.26,<3\n")
    monkeypatch.setattr(probing, "try_all", lambda root: dict(WORKING))
    wanted = Wanted("models/x*.bin", "a test", "here")
    assert probing.examine(tmp_path, [wanted]).missing_files == [wanted]
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x-1.bin").touch()
    assert probing.examine(tmp_path, [wanted]).missing_files == []


@pytest.mark.slow
def test_the_script_reports_this_installation_as_json() -> None:
    import torch

    result = run_script("tool_doctor.py", "--json", timeout=300)
    report = json.loads(result.stdout)
    assert (
        report["versions"]["torch"] == torch.__version__ or report["versions"]["torch"] in torch.__version__
    )
    broken = [conflict for conflict in report["conflicts"] if conflict["severity"] == BROKEN]
    assert result.returncode == bool(broken)
    assert set(PROBED) <= set(report["probes"])
