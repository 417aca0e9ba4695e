"""What a file that was made of other files says of them."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from cldm.weights import cached_sha256


def origin_notes(rule: str, inputs: Mapping[str, str | Path]) -> dict[str, str]:
    """Metadata that name what made a file: the rule, inputs by name and SHA-256 (folders by name), versions.

    inputs  files by the part that they had, such as {"control": path}
    """
    content = {
        "rule": rule,
        **{part: _file(Path(path).resolve()) for part, path in inputs.items()},
        "versions": {"python": platform.python_version(), "torch": version("torch")},
    }
    return {"origin": json.dumps(content)}


def _file(path: Path) -> dict[str, str]:
    if path.is_dir():  # a diffusers folder
        return {"folder": path.name}
    return {"file": path.name, "sha256": cached_sha256(path, path.stat().st_mtime_ns)}
