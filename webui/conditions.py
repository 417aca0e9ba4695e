"""The conditions that a page can be about; another one is a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from datasets.label_space import LabelSpace
from webui.any_hint import ANY_HINT
from webui.condition import Condition
from webui.segmentation import segmentation

CONDITIONS: Mapping[str, Callable[[LabelSpace], Condition]] = {
    "segmentation": segmentation,
    "none": lambda space: ANY_HINT,
}
"""By name: the condition, given the label space of its hints if they are maps. The first is the default."""
