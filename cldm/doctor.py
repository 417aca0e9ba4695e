"""What can be wrong with an installation, as rules over versions and probe results.

Pure functions over plain data: nothing here imports torch, and nothing needs a Python newer than 3.8, because
a broken or outdated installation is what they have to describe. `cldm.probes` collects the data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BROKEN, SECURITY, WARNING = "broken", "security", "warning"

REINSTALL_TORCH = "pip install --force-reinstall torch torchvision"
REINSTALL_OPENCV = (
    "pip uninstall -y opencv-python opencv-python-headless"
    " && pip install --force-reinstall opencv-python-headless"
)


@dataclass(frozen=True)
class Conflict:
    """One thing that is wrong, and the command that mends it."""

    code: str
    severity: str  # "broken" prevents work; "security" and "warning" do not
    message: str
    mend: str


@dataclass(frozen=True)
class Probe:
    """What happened when something was tried: `error` is empty where it worked."""

    error: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Floor:
    """The lowest version that will do, and why."""

    package: str
    version: str
    severity: str
    reason: str


FLOORS = (
    Floor("torch", "2.10", SECURITY, "reading a foreign checkpoint can corrupt memory (CVE-2026-24747)"),
    Floor("pytorch-lightning", "2.6.6", SECURITY, "a foreign checkpoint can run code (CVE-2026-58659)"),
    Floor("gradio", "6.17.3", SECURITY, "the web page can hand out files or load foreign scripts"),
    Floor("open-clip-torch", "3.0", BROKEN, "its transformer is not batch-first yet, and ours expects that"),
)

# Distribution name -> the name it is imported by, where the two differ.
MODULES = {
    "pytorch-lightning": "pytorch_lightning",
    "open-clip-torch": "open_clip",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
}


# What cannot be imported without torch: mending torch may mend them.
TORCH_FIRST = ("torchvision", "open_clip", "pytorch_lightning")


def find_conflicts(
    versions: Mapping[str, str | None],
    probes: Mapping[str, Probe],
    *,
    bounds: Mapping[str, str] | None = None,
    needs: Mapping[str, str] | None = None,
) -> list[Conflict]:
    """Name every known conflict, the ones that prevent work first.

    versions  distribution (and "python") -> installed version, None or absent where it is not installed
    probes    module (and "datasets", "gpu") -> what happened when it was tried; absent where it was not
    bounds    distribution -> specifier, from requirements.txt
    needs     distribution -> specifier of the torch that it was built for, from its own metadata
    """
    found = [
        *python_too_old(versions.get("python")),
        *below_floor(versions),
        *missing(versions, probes, bounds or {}),
        *out_of_bounds(versions, bounds or {}),
        *torchvision_mismatch(versions, probes, needs or {}),
        *opencv_trouble(versions, probes),
        *xformers_trouble(versions, probes, needs or {}),
        *broken_imports(versions, probes, bounds or {}),
        *shadowed_datasets(versions, probes),
        *gpu_trouble(probes),
    ]
    order = (BROKEN, SECURITY, WARNING)
    return sorted(found, key=lambda conflict: order.index(conflict.severity))


def python_too_old(version: str | None) -> Iterator[Conflict]:
    """Python below 3.10: the code does not even parse there."""
    if version and release(version) < (3, 10):
        message = f"Python is {version}; expected 3.10 or newer, because the code uses its syntax"
        yield Conflict("python", BROKEN, message, "make clean && make PYTHON=python3.12 install")


def below_floor(versions: Mapping[str, str | None]) -> Iterator[Conflict]:
    """Installed packages that are older than what is safe, or than what works."""
    for floor in FLOORS:
        version = versions.get(floor.package)
        if version and release(version) < release(floor.version):
            message = (
                f"{floor.package} is {version}, expected {floor.version} or newer: below it {floor.reason}"
            )
            mend = f'pip install --upgrade "{floor.package}>={floor.version}"'
            if floor.package == "torch":
                mend = 'pip install --upgrade "torch>=2.10" torchvision'
            yield Conflict(f"{floor.package}-old", floor.severity, message, mend)


def missing(
    versions: Mapping[str, str | None], probes: Mapping[str, Probe], bounds: Mapping[str, str]
) -> Iterator[Conflict]:
    """Required packages that are absent, in one entry, because one command brings them all.

    A module that imports without being installed under the expected name (conda's opencv) is there.
    """
    absent = [
        f"{package} ({bound})"
        for package, bound in bounds.items()
        if versions.get(package) is None and not works(probes, MODULES.get(package, package))
    ]
    if absent:
        message = f"required, but not installed: {', '.join(absent)}"
        yield Conflict("missing", BROKEN, message, "pip install -r requirements.txt")


def out_of_bounds(versions: Mapping[str, str | None], bounds: Mapping[str, str]) -> Iterator[Conflict]:
    """Installed packages outside of what this release was tested with."""
    named = {conflict.code for conflict in below_floor(versions)}
    for package, bound in bounds.items():
        version = versions.get(package)
        if version is None or satisfies(version, bound) or f"{package}-old" in named:
            continue
        message = f"{package} is {version}; requirements.txt asks for {bound}, and only that is tested"
        yield Conflict(f"{package}-untested", WARNING, message, "pip install -r requirements.txt")


def torchvision_mismatch(
    versions: Mapping[str, str | None], probes: Mapping[str, Probe], needs: Mapping[str, str]
) -> Iterator[Conflict]:
    """A torchvision compiled for another torch; it takes Lightning and open-clip down with it."""
    torch, vision = versions.get("torch"), versions.get("torchvision")
    error, need = error_of(probes, "torchvision"), needs.get("torchvision", "")
    if torch is None or vision is None or error_of(probes, "torch"):
        return
    if satisfies(torch, need):
        why = "their numbers fit, so one is a CPU build and the other is not"
    else:
        why = f"it asks for torch {need}"
    message = f"torchvision {vision} does not match torch {torch}: {why}. Take both from one index"
    if error:
        message += f". `import torchvision` fails, and pytorch-lightning and open-clip with it: {error}"
        yield Conflict("torchvision-mismatch", BROKEN, message, REINSTALL_TORCH)
    elif not satisfies(torch, need):
        yield Conflict("torchvision-mismatch", WARNING, message, REINSTALL_TORCH)


def opencv_trouble(versions: Mapping[str, str | None], probes: Mapping[str, Probe]) -> Iterator[Conflict]:
    """Two OpenCV packages in one place, one built for another numpy, or one that wants a desktop."""
    error, numpy = error_of(probes, "cv2"), versions.get("numpy")
    full, headless = versions.get("opencv-python"), versions.get("opencv-python-headless")
    if full and headless:
        message = f"opencv-python {full} and opencv-python-headless {headless} overwrite each other's files"
        message += f", and `import cv2` fails: {error}" if error else "; expected the headless one alone"
        yield Conflict("opencv-twice", BROKEN if error else WARNING, message, REINSTALL_OPENCV)
    elif re.search(r"numpy|multiarray|_ARRAY_API", error):
        message = f"OpenCV was built for another numpy than the installed {numpy}: {error}"
        yield Conflict("opencv-numpy", BROKEN, message, REINSTALL_OPENCV)
    elif "libGL" in error or "libgthread" in error:
        message = f"OpenCV wants the libraries of a desktop, which are not here: {error}"
        yield Conflict("opencv-desktop", BROKEN, message, REINSTALL_OPENCV)


def xformers_trouble(
    versions: Mapping[str, str | None], probes: Mapping[str, Probe], needs: Mapping[str, str]
) -> Iterator[Conflict]:
    """An xformers that cannot be used; attention then stays with torch's own, so this never prevents work."""
    torch, xformers = versions.get("torch"), versions.get("xformers")
    if xformers is None or torch is None:
        return
    need, error = needs.get("xformers", ""), error_of(probes, "xformers")
    mend = "pip uninstall -y xformers"
    if not satisfies(torch, need):
        message = f"xformers {xformers} was built for torch {need}, found {torch}; attention uses torch's own"
        yield Conflict("xformers-mismatch", WARNING, message, mend)
    elif error:
        message = f"xformers {xformers} is installed but does not import: {error}; attention uses torch's own"
        yield Conflict("xformers-broken", WARNING, message, mend)


def broken_imports(
    versions: Mapping[str, str | None], probes: Mapping[str, Probe], bounds: Mapping[str, str]
) -> Iterator[Conflict]:
    """Installed and required, yet not importable, for a reason that no other rule has named."""
    explained = set()
    if error_of(probes, "torch") or any(torchvision_mismatch(versions, probes, {})):
        explained |= set(TORCH_FIRST)
    if any(opencv_trouble(versions, probes)):
        explained.add("cv2")
    for package in bounds:
        module = MODULES.get(package, package)
        error = error_of(probes, module)
        if not error or versions.get(package) is None or module in explained:
            continue
        message = f"{package} {versions[package]} is installed, but `import {module}` fails: {error}"
        mend = REINSTALL_TORCH if module == "torch" else f"pip install --force-reinstall --no-deps {package}"
        yield Conflict(f"{package}-broken", BROKEN, message, mend)


def shadowed_datasets(versions: Mapping[str, str | None], probes: Mapping[str, Probe]) -> Iterator[Conflict]:
    """The package index has a `datasets` too; `import datasets` has to give the folder beside the scripts."""
    version, error = versions.get("datasets"), error_of(probes, "datasets")
    mend = "pip uninstall -y datasets"
    if error:
        message = f"`import datasets` does not give this repository's package: {error}. Run from its root"
        yield Conflict("datasets-shadowed", BROKEN, message, mend if version else "cd to that root")
    elif version:
        message = f"a PyPI package called datasets ({version}) is installed; outside the root it hides ours"
        yield Conflict("datasets-twin", WARNING, message, mend)


def gpu_trouble(probes: Mapping[str, Probe]) -> Iterator[Conflict]:
    """A GPU that is there but that this torch cannot use."""
    torch, driver = probes.get("torch", Probe()), probes.get("gpu", Probe())
    if torch.error or not torch.facts:
        return
    build, gpus = torch.facts.get("cuda_build"), torch.facts.get("gpus", [])
    names = driver.facts.get("names", [])
    if names and not gpus:
        why = f"is built for CUDA {build}, for which the driver may be too old" if build else "is a CPU build"
        message = f"the driver shows {', '.join(names)}, but torch {why}; everything would run on the CPU"
        yield Conflict("gpu-unused", WARNING, message, f"update the NVIDIA driver, or: {REINSTALL_TORCH}")
    for gpu in gpus:
        if not runs_on(gpu["capability"], torch.facts.get("arch_list", [])):
            message = f"torch has no code for {gpu['name']} (compute capability {gpu['capability']})"
            yield Conflict("gpu-unsupported", BROKEN, message, REINSTALL_TORCH)


def runs_on(capability: str, arch_list: list[str]) -> bool:
    """Whether `arch_list` has code for a GPU: the same major and a minor not above it, or older PTX."""
    major, minor = release(capability)
    for arch in arch_list:
        match = re.match(r"(sm|compute)_(\d+)(\d)", arch)
        if not match:
            continue
        kind, arch_major, arch_minor = match[1], int(match[2]), int(match[3])
        if kind == "sm" and arch_major == major and arch_minor <= minor:
            return True
        if kind == "compute" and (arch_major, arch_minor) <= (major, minor):
            return True
    return not arch_list


def error_of(probes: Mapping[str, Probe], name: str) -> str:
    """The error of a probe, empty where it worked or was not made."""
    return probes[name].error if name in probes else ""


def works(probes: Mapping[str, Probe], name: str) -> bool:
    """Whether a probe was made and had no error."""
    return name in probes and not probes[name].error


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version without trailing zeros: "2.13.0+cpu" -> (2, 13)."""
    match = re.match(r"\s*v?(\d+(?:\.\d+)*)", version)
    numbers = [int(part) for part in match[1].split(".")] if match else [0]
    while len(numbers) > 2 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def satisfies(version: str, specifier: str) -> bool:
    """Whether a version meets a specifier such as ">=2.10,<2.16"; what it cannot read, it lets pass."""
    tests = {
        "==": lambda a, b: a == b,
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "<": lambda a, b: a < b,
        ">": lambda a, b: a > b,
    }
    for clause in specifier.split(","):
        match = re.fullmatch(r"\s*(==|>=|<=|<|>)\s*([\w.+]+)\s*", clause)
        if match and not tests[match[1]](release(version), release(match[2])):
            return False
    return True


def read_bounds(requirements: Path) -> dict[str, str]:
    """Distribution -> specifier, from the lines of a requirements file."""
    bounds = {}
    for line in requirements.read_text(encoding="utf-8").splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)\s*([<>=!~][^#;]*)", line)
        if match:
            bounds[match[1].lower()] = match[2].strip()
    return bounds


def advise_precision(gpus: list[dict[str, Any]], cpu_flags: list[str]) -> str:
    """Which precision makes sense here, in Lightning's spelling, with the reason."""
    if gpus:
        oldest = min(release(gpu["capability"]) for gpu in gpus)
        if oldest >= (8, 0):
            return "bf16-mixed: every GPU has compute capability 8.0 or newer"
        return "16-mixed (fp16 with a gradient scaler): bf16 is slow below compute capability 8.0"
    if "amx_bf16" in cpu_flags:
        return "32-true is what auto takes; bf16-mixed is faster for SD1.5 and SD2.1 (AMX), not for Streets"
    return "32-true: no GPU, and a CPU without AMX is slower in bf16"
