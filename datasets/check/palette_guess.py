"""Which known palette the colours of a picture belong to, in RGB or in BGR order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from datasets.hint_encoding import ENCODINGS, hint_encoding
from datasets.label_space import SPACES, LabelSpace, Rgb

Codes = NDArray[np.uint32]  # colours as 0xRRGGBB, sorted
LEAST_COLOURS = 3  # of a palette, without black, before a picture is taken for a painted map
MAX_SIDE = 512  # pixels in a row that are looked at; a guess needs no more
_SHOWN = 3


@dataclass(frozen=True)
class PaletteGuess:
    """The palette that explains the largest share of a picture's pixels that are not black."""

    palette: str  # such as "ade20k" or "cityscapes label_colours"
    order: str  # RGB or BGR
    share: float
    other_order: float  # the share in the other order
    strangers: str  # colours that are not of it, the most frequent first

    def sentence(self) -> str:
        """'95 % of its pixels are colours of ade20k in BGR order'."""
        return f"{self.share:.0%} of its pixels are colours of {self.palette} in {self.order} order"


def guess_palette(picture: Rgb) -> PaletteGuess | None:
    """The likeliest palette of an (H, W, 3) RGB picture; None where fewer than 3 of its colours are known."""
    step = max(1, max(picture.shape[:2]) // MAX_SIDE)
    pixels = picture[::step, ::step].reshape(-1, 3).astype(np.uint32)
    packed = pixels[:, 0] << 16 | pixels[:, 1] << 8 | pixels[:, 2]
    colours, counts = np.unique(packed[packed > 0], return_counts=True)
    if not len(colours):
        return None
    orders = {"RGB": colours, "BGR": (colours & 255) << 16 | colours & 0xFF00 | colours >> 16}
    known = {
        (name, order): np.isin(codes, palette)
        for name, palette in known_palettes().items()
        for order, codes in orders.items()
    }
    shares = {place: float(counts[hit].sum() / counts.sum()) for place, hit in known.items()}
    # Palettes come smallest first and RGB before BGR, and `max` keeps the first of equals.
    name, order = max(shares, key=lambda place: shares[place])
    if known[name, order].sum() < LEAST_COLOURS:
        return None
    strange = ~known[name, order]
    rarest_last = np.argsort(-counts[strange], kind="stable")[:_SHOWN]
    listed = [f"({c >> 16}, {c >> 8 & 255}, {c & 255})" for c in colours[strange][rarest_last].tolist()]
    other = shares[name, "BGR" if order == "RGB" else "RGB"]
    return PaletteGuess(name, order, shares[name, order], other, ", ".join(listed))


@cache
def known_palettes() -> dict[str, Codes]:
    """The colours of every label space and of its hint encodings of three channels, the smallest first."""
    found: dict[str, Codes] = {}
    for name in SPACES:
        space = LabelSpace.load(name)
        for encoding, (only, _) in ENCODINGS.items():
            if only not in (None, name):
                continue
            table = hint_encoding(space, encoding).table
            if table.shape[1] == 3:
                label = name if encoding == "colours" else f"{name} {encoding}"
                colours = np.unique((table * 255).round().astype(np.uint32), axis=0)
                codes = colours[:, 0] << 16 | colours[:, 1] << 8 | colours[:, 2]
                found[label] = np.sort(codes[codes > 0])
    return dict(sorted(found.items(), key=lambda item: len(item[1])))
