"""Every script: help is its docstring, wrong arguments are refused, flags are frozen, imports do nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from house import ROOT, flags_in, help_of, parse, run_script, scripts

# The flags that users have in their fingers. A new flag is a new entry here, in the same change.
FLAGS = {
    "evaluate.py": {
        *("--fake", "--real", "--labels", "--labels_hold", "--dataset", "--split", "--ckpt"),
        *("--allow_leak", "--allow_few", "--protocol", "--inception", "--alexnet", "--segmenter"),
        *("--predicted", "--predicted_real", "--device", "--cache", "--shard", "--out", "--format"),
    },
    "generate.py": {
        *("--ckpt", "--base", "--config", "--hint", "--hint_type", "--palette", "--prompt", "--out"),
        "--encoding",
        *("--negative_prompt", "--size", "--num", "--seed", "--steps", "--sampler", "--eta", "--scale"),
        *(
            "--strength",
            "--guess_mode",
            "--no-guess_mode",
            "--batch_size",
            "--device",
            "--precision",
            "--parameterization",
        ),
        *("--attn_backend", "--overwrite"),
    },
    "gradio_seg2image.py": {
        *("--ckpt", "--base", "--config", "--condition", "--palette", "--prior", "--segmenter", "--size"),
        *("--examples", "--device", "--precision"),
        *("--port", "--auth", "--listen", "--share"),
    },
    "noise_prior.py": {
        *("--dataset", "--root", "--split", "--resolution", "--sample_size", "--seed", "--ckpt", "--base"),
        *("--config", "--ddpm_steps", "--covariance", "--published", "--save_dir", "--save_name", "--cache"),
        *("--shard", "--processes", "--batch_size", "--num_workers", "--device", "--show"),
    },
    "noise_prior_inference.py": {
        *("--dataset", "--root", "--split", "--sample_size", "--resolution", "--ckpt", "--base", "--config"),
        *("--seed", "--prior_type", "--prior", "--stat_dir", "--stat_name", "--resample_prior"),
        *("--diffusion_steps", "--steps_after_start", "--spatial_scale", "--class_scale", "--undivided"),
        *("--shrinkage", "--weighting", "--prompt", "--scale", "--steps", "--sampler", "--eta"),
        *("--strength", "--negative_prompt", "--save_dir", "--overwrite", "--copy_real", "--shard"),
        *("--batch_size", "--device", "--precision"),
    },
    "tool_add_control.py": {"--control", "--config", "--seed"},
    "tool_check_dataset.py": {
        *("--dataset", "--root", "--split", "--quick", "--json", "--sheet", "--rows", "--workers"),
    },
    "tool_convert_hint.py": {"--from", "--palette", "--void", "--channels"},
    "tool_demo_page.py": {
        *(
            "--data",
            "--game",
            "--run",
            "--fresh",
            "--shipped",
            "--cards",
            "--scene",
            "--prompts",
            "--commands",
        ),
    },
    "tool_doctor.py": {"--json"},
    "tool_export.py": {
        *("--to", "--dtype", "--base", "--config", "--parameterization", "--ema", "--verify", "--no-verify"),
    },
    "tool_judge_streets.py": {
        *("--real", "--first_stage", "--images", "--labels", "--judge", "--count", "--device", "--out"),
    },
    "tool_make_streets.py": {
        *("--domain", "--conditions", "--size", "--train", "--val", "--out", "--seed", "--workers"),
    },
    "tool_show_run.py": {"--out"},
    "tool_train_streets_base.py": {"--config", "--minutes", "--out", "--print_config"},
    "tool_train_streets_judge.py": {"--config", "--minutes", "--out", "--print_config"},
    "tool_train_streets_vae.py": {"--config", "--minutes", "--out", "--print_config"},
    "tool_transfer_control.py": {"--from", "--to", "--swap", "--whole", "--dtype"},
    "tutorial_dataset.py": {"--root", "--index", "--make", "--dataset", "--out"},
    "tutorial_train.py": {
        *(
            "--dataset",
            "--config",
            "--batch_size",
            "--default_root_dir",
            "--gpus",
            "--logger_freq",
            "--dry_run",
        ),
        *(
            "--max_steps",
            "--preset",
            "--resume",
            "--resume_path",
            "--sd_locked",
            "--no-sd_locked",
            "--print_config",
        ),
    },
}
# What the predecessors' scripts took has to stay, whatever else a script learns.
INHERITED = {
    "tutorial_train.py": {
        *("--resume_path", "--batch_size", "--logger_freq", "--sd_locked", "--config", "--dataset"),
        *("--max_steps", "--default_root_dir", "--gpus"),
        *("--no-sd_locked", "--print_config"),
    },
    "noise_prior.py": {
        *("--dataset", "--sample_size", "--ddpm_steps", "--seed", "--save_name", "--config", "--ckpt"),
        *("--resolution", "--save_dir"),
    },
    "noise_prior_inference.py": {
        *(
            "--dataset",
            "--sample_size",
            "--diffusion_steps",
            "--seed",
            "--save_dir",
            "--resolution",
            "--ckpt",
        ),
        *("--config", "--stat_dir", "--stat_name", "--scale", "--prior_type", "--spatial_scale"),
        *("--class_scale", "--batch_size"),
    },
}
HEAVY = {"torch", "pytorch_lightning", "open_clip", "torchvision", "diffusers", "transformers", "gradio"}

every_script = pytest.mark.parametrize("script", [path.name for path in scripts()])


def statements_with_effect(source: str) -> list[str]:
    """Return the top-level statements that do something when a module is imported."""
    return [ast.unparse(node) for node in ast.parse(source).body if not is_inert(node)]


def is_inert(node: ast.stmt) -> bool:
    """Return whether a top-level statement only imports, defines, documents or guards `main`."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
        return True
    if isinstance(node, ast.If):
        test = ast.unparse(node.test)
        return test == "__name__ == '__main__'" or (
            test in ("TYPE_CHECKING", "typing.TYPE_CHECKING") and all(is_inert(child) for child in node.body)
        )
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return not any(is_effect(child) for child in ast.walk(node))
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_effect(node: ast.AST) -> bool:
    """Return whether an expression calls anything but what only makes a value."""
    harmless = {
        "Path",
        "resolve",
        "getLogger",
        "frozenset",
        "set",
        "dict",
        "tuple",
        "list",
        "compile",
        "range",
    }
    if not isinstance(node, ast.Call):
        return isinstance(node, ast.Await | ast.NamedExpr)
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name not in harmless and not name[:1].isupper()  # a capital makes an object of a class


@every_script
def test_help_is_the_docstring_and_needs_no_heavy_import(script: str) -> None:
    result = help_of(script)
    docstring = ast.get_docstring(parse(Path(__file__).parent.parent / script))
    assert result.returncode == 0, result.stderr[-2000:]
    assert docstring, "the docstring is the help page"
    assert " ".join(docstring.split()) in " ".join(result.stdout.split())
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert imported & HEAVY == set(), "arguments are read before anything heavy is imported"


@every_script
def test_an_unknown_flag_exits_with_2_and_is_named(script: str) -> None:
    result = run_script(script, "--no-such-flag")
    assert result.returncode == 2, result.stderr[-2000:]
    assert "usage:" in result.stderr


@every_script
def test_importing_a_script_does_nothing(script: str) -> None:
    source = (Path(__file__).parent.parent / script).read_text(encoding="utf-8")
    assert statements_with_effect(source) == []


@every_script
def test_flags_are_frozen(script: str) -> None:
    flags = flags_in(help_of(script).stdout) - {"-h", "--help"}
    assert INHERITED.get(script, set()) <= flags
    if script not in FLAGS:
        pytest.skip(f"{script} has no row in FLAGS yet; it takes {', '.join(sorted(flags)) or 'none'}")
    assert flags == FLAGS[script]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.set_num_threads(1)",
        "MODEL = load_model()",
        "for x in y:\n    pass",
        "parser.add_argument('--x')",
        "if True:\n    import os",
        "ROOT, y = Path('.'), os.makedirs('out')",
    ],
)
def test_a_planted_effect_is_caught(source: str) -> None:
    assert statements_with_effect(source)


def test_a_plain_script_has_no_effect() -> None:
    source = '"""Help."""\nimport os\nX: int = 3\nROOT = Path(__file__).resolve().parent\n'
    source += "ROWS = (Row('a', 1),)\nif __name__ == '__main__':\n    main()\n"
    assert statements_with_effect(source) == []


PAGE = """usage: x.py [-h]

Use --not-this one.
  --nor-this in a docstring

positional arguments:
  source  a --file

options:
  -h, --help  show
  --sd_locked, --no-sd_locked  see --other
  -s SEED, --seed SEED
                 --wrapped help text

sampling:
  --eta ETA  x
"""


def test_flags_are_read_from_the_option_lines_only() -> None:
    assert flags_in(PAGE) == {"-h", "--help", "--sd_locked", "--no-sd_locked", "-s", "--seed", "--eta"}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has the switch")
def test_memory_that_is_freed_stays_with_the_process() -> None:
    program = """
import sys
from cldm.cli import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
before = resident()
taken = bytearray(b"x" * (100 << 20))
del taken
print(resident() - before)
"""
    grown = {}
    for mode in ("kept", "given back"):
        done = subprocess.run(
            [sys.executable, "-c", program, mode], cwd=ROOT, capture_output=True, text=True, check=True
        )
        grown[mode] = float(done.stdout)
    assert grown["kept"] > 90
    assert grown["given back"] < 20
