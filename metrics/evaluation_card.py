"""Parts of an evaluation's card: sets of images by hash, how they were generated, what computed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from datasets.streets.tree import CARD
from metrics.blocks import Digests
from metrics.card import renderer_of, versions
from metrics.image_sets import Item, said

Card = dict[str, Any]

SHOWN = 5  # values that are listed where there are more
LISTED = 20
ENGINES = ("torch-fidelity", "torchvision", "pillow")


def data_card(items: Sequence[Item], digests: Digests, what: str) -> Card:
    """Number and hash of real images, or of the maps that were sampled.

    what  images or labels
    """
    by_key = {item.key: item for item in items}
    kept = [by_key[key] for key in sorted(by_key)]
    paths = [item.picture.path if what == "images" else item.labels for item in kept]
    found = digests.of_set([path for path in paths if path is not None])
    names = hashlib.sha256("\n".join(sorted(by_key)).encode()).hexdigest()
    card: Card = {"count": len(kept), "sha256": found, "keys_sha256": names}
    if what == "images":
        card["sizes"] = top(Counter(said(item.picture.size) for item in kept))
        card["formats"] = top(Counter(item.picture.format for item in kept))
        card["grey"] = sum(item.picture.mode not in ("RGB", "RGBA", "P") for item in kept)
    return card


def fake_card(items: Sequence[Item], samples: Sequence[Item], digests: Digests) -> Card:
    """Number, hash and size of generated images, and samples of a map."""
    per_map, all_of_map = (Counter(Counter(i.key for i in some).values()) for some in (items, samples))
    return {
        "count": len(items),
        "maps": len({item.key for item in items}),
        "samples_of_a_map": sorted(per_map),
        "samples_for_diversity": sorted(all_of_map),
        "size": list(items[0].picture.size),
        "sha256": digests.of_set([item.picture.path for item in items]),
    }


def generation_card(items: Sequence[Item]) -> Card:
    """Settings in the images: those of all, and of those that differ how they do."""
    settings = [item.picture.settings for item in items]
    names = sorted({name for some in settings for name in some} - {"hint", "hint_fingerprint"})
    card: Card = {}
    for name in names:
        values = [some.get(name) for some in settings]
        different = list(dict.fromkeys(map(str, values)))
        if len(different) == 1:
            card[name] = values[0]
        else:
            card[name] = {
                "different": len(different),
                "sha256": hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest(),
                "first": different[: LISTED if name == "seed" else SHOWN],
            }
    return card


def top(counts: Counter[str]) -> dict[str, int]:
    """The most frequent, and the rest as one."""
    found = dict(counts.most_common(SHOWN))
    rest = sum(counts.values()) - sum(found.values())
    return found | ({"others": rest} if rest else {})


def renderer_near(path: Path) -> Card | None:
    """Renderer of the Streets tree that a folder belongs to."""
    resolved = path.resolve()
    for folder in [resolved, *list(resolved.parents)[:3]]:
        if (folder / CARD).is_file():
            return renderer_of(folder)
    return None


def environment() -> dict[str, str]:
    """What computed."""
    found = versions()
    for name in ENGINES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
