"""What is installed on this machine and what works: the data that `cldm.doctor` judges.

A package that is broken can raise, hang or kill the interpreter, so every import is tried in a child process.
Nothing here needs a package outside the standard library, or a Python newer than 3.8.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cldm.doctor import Conflict, Probe, advise_precision, find_conflicts, read_bounds

if TYPE_CHECKING:
    from collections.abc import Sequence

OPTIONAL = ("xformers", "diffusers", "transformers", "gradio", "datasets", "opencv-python")
# In the order of who imports whom, so that the first failure is the cause.
PROBED = (
    *("numpy", "cv2", "PIL", "omegaconf", "safetensors"),
    *("torch", "torchvision", "xformers", "open_clip", "pytorch_lightning"),
)
MARK = "probed: "  # opens the lines that are ours; packages print too
TIMEOUT_S = 300
GIB = 2**30


@dataclass(frozen=True)
class Wanted:
    """A file or folder that some command needs, and where it comes from."""

    pattern: str  # glob below the repository's root
    use: str
    source: str


WEIGHTS = (
    Wanted("models/streets*.safetensors", "the demo and the Streets lab", "git checkout -- models"),
    Wanted(
        "models/v1-5-pruned*.*",
        "adding control to Stable Diffusion 1.5",
        "v1-5-pruned.safetensors from huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    Wanted(
        "models/v2-1_512-ema-pruned.*",
        "adding control to Stable Diffusion 2.1",
        "v2-1_512-ema-pruned.safetensors from huggingface.co/stabilityai/stable-diffusion-2-1-base",
    ),
)


@dataclass(frozen=True)
class Report:
    """Everything the doctor says, ready for `json.dumps` after `asdict`."""

    versions: dict[str, str | None]
    machine: dict[str, Any]
    probes: dict[str, Probe]
    precision: str
    missing_files: list[Wanted]
    conflicts: list[Conflict]


def examine(root: Path, wanted: Sequence[Wanted] = WEIGHTS) -> Report:
    """Look at this machine, and at the repository in `root` for the files in `wanted`."""
    bounds = read_bounds(root / "requirements.txt")
    versions = installed_versions((*bounds, *OPTIONAL))
    probes = {**try_all(root), "gpu": ask_driver(), "datasets": locate_datasets(root)}
    needs = {name: torch_needed_by(name) for name in ("torchvision", "xformers")}
    machine = describe_machine(root)
    gpus = probes["torch"].facts.get("gpus", [])
    return Report(
        versions=versions,
        machine=machine,
        probes=probes,
        precision=advise_precision(gpus, machine["cpu_flags"]),
        missing_files=[item for item in wanted if not any(root.glob(item.pattern))],
        conflicts=find_conflicts(versions, probes, bounds=bounds, needs=needs),
    )


def as_json(report: Report) -> str:
    """The report as indented JSON."""
    return json.dumps(asdict(report), indent=2)


def installed_versions(names: tuple[str, ...]) -> dict[str, str | None]:
    """Python's version, and that of each distribution, None where it is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def torch_needed_by(package: str) -> str:
    """The specifier that a package's metadata gives for torch: "==2.10.0", or "" where there is none."""
    try:
        requirements = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return ""
    for requirement in requirements:
        match = re.match(r"torch\s*\(?([<>=!~][^);]*)", requirement)
        if match and "extra" not in requirement:
            return match[1].strip()
    return ""


def try_all(root: Path, names: tuple[str, ...] = PROBED) -> dict[str, Probe]:
    """Try each module in a child process; one that kills the child is named, and the rest still tried."""
    results: dict[str, Probe] = {}
    while len(results) < len(names):
        waiting = [name for name in names if name not in results]
        code = f"from cldm.probes import report_probes; report_probes({waiting!r})"
        output, end = run_child([sys.executable, "-c", code], root)
        for line in output.splitlines():
            if line.startswith(MARK):
                row = json.loads(line[len(MARK) :])
                results[row["probe"]] = Probe(row["error"], row["facts"])
        victim = next((name for name in waiting if name not in results), None)
        if victim:
            results[victim] = Probe(f"the interpreter did not survive it: {end}")
    return results


def run_child(command: list[str], cwd: Path) -> tuple[str, str]:
    """Run a command without input and without a network hub; its output, and how it ended."""
    path = os.pathsep.join([str(cwd), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        return partial.decode() if isinstance(partial, bytes) else partial, f"no answer within {TIMEOUT_S} s"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return done.stdout, f"exit status {done.returncode}, {last}"


def report_probes(names: list[str]) -> None:
    """Run in the child: one JSON line for each module, flushed at once because the next one may kill us."""
    special = {"torch": torch_facts, "torchvision": try_torchvision, "xformers": try_xformers}
    for name in names:
        error, facts = "", {}
        try:
            importlib.import_module(name)
            facts = special[name]() if name in special else {}
        except Exception as problem:  # whatever a broken package raises is the finding
            error = f"{type(problem).__name__}: {problem}".splitlines()[0][:300]
        row = json.dumps({"probe": name, "error": error, "facts": facts})
        sys.stdout.write(f"\n{MARK}{row}\n")
        sys.stdout.flush()


def torch_facts() -> dict[str, Any]:
    """What torch was built for, which devices it sees, and whether its attention runs on them."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.ones(1, 2, 8, 16, device=device)
    out = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    verdict = "works" if torch.allclose(out, query) else "gives wrong numbers"
    return {
        "cuda_build": torch.version.cuda,
        "arch_list": torch.cuda.get_arch_list(),
        "gpus": [describe_gpu(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())],
        "attention": f"torch SDPA {verdict} on {device}",
    }


def describe_gpu(properties: Any) -> dict[str, Any]:
    """Name, memory and compute capability from torch's description of a device."""
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / GIB, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }


def try_torchvision() -> dict[str, Any]:
    """Call one compiled operator: a torchvision made for another torch may import and fail here."""
    import torch
    from torchvision.ops import nms

    nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    return {}


def try_xformers() -> dict[str, Any]:
    """Try xformers' attention on a tiny tensor; it has no CPU kernels, which is a fact and not an error."""
    import torch
    from xformers.ops import memory_efficient_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    query = torch.ones(1, 8, 2, 16, device=device, dtype=torch.float16 if device == "cuda" else torch.float32)
    try:
        memory_efficient_attention(query, query, query)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return {"attention": f"no kernel on {device}: {error}".splitlines()[0][:200]}
    return {"attention": f"works on {device}"}


def ask_driver() -> Probe:
    """The GPUs that the NVIDIA driver shows, whatever torch thinks of them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Probe()
    output, end = run_child([tool, "--query-gpu=name,driver_version", "--format=csv,noheader"], Path.cwd())
    names = [line.strip() for line in output.splitlines() if line.strip()]
    return Probe(facts={"names": names if "exit status 0" in end else []})


def locate_datasets(root: Path) -> Probe:
    """Where `import datasets` leads from a script in `root`."""
    if not (root / "datasets" / "__init__.py").is_file():
        return Probe(f"{root}/datasets/__init__.py is missing")
    spec = importlib.util.find_spec("datasets")
    origin = str(spec.origin) if spec and spec.origin else "nowhere"
    inside = Path(origin).parent == root / "datasets"
    return Probe("" if inside else f"it leads to {origin}", {"origin": origin})


def describe_machine(root: Path) -> dict[str, Any]:
    """Cores, the CPU's matrix extensions, memory and the space left on the disk of `root`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo, memory = Path("/proc/cpuinfo"), None
    words = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.is_file() else set()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": cores,
        "cpu_flags": sorted(words & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "bf16"}),
        "memory_gib": memory,
        "disk_free_gib": round(shutil.disk_usage(root).free / GIB, 1),
    }
