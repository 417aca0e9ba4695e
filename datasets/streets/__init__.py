"""Streets: rendered street scenes in the classes and the file tree of Cityscapes.

Importing this is light, so that scripts can check their flags; what draws is imported when it is asked for.
"""

from __future__ import annotations

import importlib

RENDERER_VERSION = "1.0"
DOMAINS = ("game", "camera")
CONDITIONS = ("clear", "rain", "fog", "snow", "night")

_LAZY = {
    "StreetsDataset": "datasets.streets.dataset",
    "make_tree": "datasets.streets.tree",
    "render_frame": "datasets.streets.render",
    "renderer_hash": "datasets.streets.render",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
