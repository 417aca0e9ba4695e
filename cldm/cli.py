"""What the scripts share: how they refuse."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn


def refuse(message: str) -> NoReturn:
    """Say in one sentence why nothing more is done, exit with 2 as a wrong argument does."""
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {message}\n")
    sys.exit(2)
