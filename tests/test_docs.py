"""What the documents say exists: commands, flags, make targets, paths and links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from house import ROOT, flags_in, help_of

# README first; the migration guide names the predecessors' files, so its paths are not looked up.
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
PATHS_OF_OTHERS = {"migration.md"}
# Pages that other documents may name before they are written; empty once they are.
AWAITED: set[str] = set()
# Folders that users fill or that runs make; nothing in them is in the repository.
NOT_OURS = (
    "cache/",
    "checkpoints/",
    "data/",
    "image_log/",
    "maps/",
    "out/",
    "runs/",
    "statistics/",
    "training/",
    "work_dir/",
)

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def commands_in(text: str) -> list[list[str]]:
    """Return the words of each `python X.py` and `make X` line in the fenced code blocks of a document."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [
        line.strip().removeprefix("$ ")
        for block in blocks
        for line in re.sub(r"\\\n", " ", block).splitlines()
    ]
    return [
        shlex.split(line, comments=True) for line in lines if re.match(r"(python3? \S+\.py|make)\b", line)
    ]


def wrong_with(command: list[str], known_flags: dict[str, set[str]], targets: set[str]) -> list[str]:
    """Return what a command names that does not exist."""
    program, *words = command
    if program == "make":
        return [f"make has no target {word}" for word in words if "=" not in word and word not in targets]
    script, *arguments = words
    if script not in known_flags:
        return [f"{script} does not exist"]
    used = {word.partition("=")[0] for word in arguments if re.match(r"--?[A-Za-z]", word)}
    return [f"{script} has no flag {flag}" for flag in sorted(used - known_flags[script])]


def make_targets() -> set[str]:
    """Return the targets that the Makefile declares."""
    declared = re.findall(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return {word for line in declared for word in line.split()}


def paths_in(text: str) -> set[str]:
    """Return the `path/like.this` of a document: in backticks, with a slash and a suffix, no placeholder."""
    names = set(re.findall(r"`([\w./-]+/[\w.-]+\.\w+)`", text))
    return {
        name
        for name in names
        if not name.startswith(("/", "..", *NOT_OURS)) and not re.search(r"[A-Z]{4,}\.", name)
    }


def links_in(text: str) -> set[str]:
    """Return the targets of the links that stay inside the repository."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return {target for target in targets if not re.match(r"[a-z]+:", target)}


def needs_download(name: str) -> bool:
    """Return whether a path is a weight file that is not shipped."""
    return re.fullmatch(r"models/(?!streets).*\.(ckpt|pth|safetensors)", name) is not None


@every_document
def test_commands_name_scripts_flags_and_targets_that_exist(path: Path) -> None:
    commands = commands_in(path.read_text(encoding="utf-8"))
    named = {command[1] for command in commands if command[0] != "make"}
    known = {name: flags_in(help_of(name).stdout) for name in named if (ROOT / name).exists()}
    assert [fault for command in commands for fault in wrong_with(command, known, make_targets())] == []


@every_document
def test_paths_and_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lost = {link for link in links_in(text) if not (path.parent / link).exists()}
    if path.name not in PATHS_OF_OTHERS:
        found = {name for name in paths_in(text) if (ROOT / name).exists() or needs_download(name)}
        lost |= paths_in(text) - found - AWAITED
    assert lost == set(), "no such file; correct the name, or write the file"


def test_the_readme_names_the_commands_of_the_makefile() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    commands = commands_in(readme.read_text(encoding="utf-8"))
    assert {"demo", "test"} <= {word for command in commands if command[0] == "make" for word in command[1:]}


def test_every_advertised_make_target_has_a_rule_and_a_line_of_help() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = set(re.findall(r"^([a-z]+):(?!=)", text, re.MULTILINE))
    helped = set(re.findall(r'@echo "make (\w+)', text))
    assert make_targets() == rules
    assert make_targets() - {"help"} == helped


TEXT = """
Run `tool_x.py`; see `ldm/gone.py`, `models/v1-5.safetensors`, `data/a/b.png` and [here](docs/no.md#part), [out](https://x.y).

```bash
python tool_x.py in.pt \\
    --good 1 --bad=2   # a comment with --nothing
$ make test
make nonsense PYTHON=python3
```

    python not_fenced.py --bad
"""


def test_planted_faults_are_caught() -> None:
    commands = commands_in(TEXT)
    assert commands[0] == ["python", "tool_x.py", "in.pt", "--good", "1", "--bad=2"]
    faults = [
        fault for command in commands for fault in wrong_with(command, {"tool_x.py": {"--good"}}, {"test"})
    ]
    assert faults == ["tool_x.py has no flag --bad", "make has no target nonsense"]
    assert wrong_with(["python", "gone.py"], {}, set()) == ["gone.py does not exist"]
    assert paths_in(TEXT) == {"ldm/gone.py", "models/v1-5.safetensors"}
    assert links_in(TEXT) == {"docs/no.md"}
