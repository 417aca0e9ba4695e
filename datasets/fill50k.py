"""Fill50k, the published exercise of control training: fill a circle outline with named colours.

The published archive, or circles of another draw in the same layout, made here.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import ImageColor
from tqdm import tqdm

from datasets.files import write_text
from datasets.triples import TriplesDataset

CIRCLES = 50_000
SIDE = 512  # pixels
LIST = "prompt.json"
# Names of CSS colours, in words; Pillow knows what they look like.
COLOURS = tuple(
    """
    alice blue, antique white, aqua, aquamarine, azure, beige, bisque, black, blanched almond, blue,
    blue violet, brown, burly wood, cadet blue, chartreuse, chocolate, coral, cornflower blue, cornsilk,
    crimson, dark blue, dark cyan, dark golden rod, dark gray, dark green, dark khaki, dark magenta,
    dark olive green, dark orange, dark orchid, dark red, dark salmon, dark sea green, dark slate blue,
    dark slate gray, dark turquoise, dark violet, deep pink, deep sky blue, dim gray, dodger blue,
    fire brick, floral white, forest green, fuchsia, gainsboro, ghost white, gold, golden rod, gray, green,
    green yellow, honey dew, hot pink, indian red, indigo, ivory, khaki, lavender, lavender blush,
    lawn green, lemon chiffon, light blue, light coral, light cyan, light golden rod yellow, light gray,
    light green, light pink, light salmon, light sea green, light sky blue, light slate gray,
    light steel blue, light yellow, lime, lime green, linen, maroon, medium aqua marine, medium blue,
    medium orchid, medium purple, medium sea green, medium slate blue, medium spring green,
    medium turquoise, medium violet red, midnight blue, mint cream, misty rose, moccasin, navajo white,
    navy, old lace, olive, olive drab, orange, orange red, orchid, pale golden rod, pale green,
    pale turquoise, pale violet red, papaya whip, peach puff, peru, pink, plum, powder blue, purple, red,
    rosy brown, royal blue, saddle brown, salmon, sandy brown, sea green, sea shell, sienna, silver,
    sky blue, slate blue, slate gray, snow, spring green, steel blue, tan, teal, thistle, tomato, turquoise,
    violet, wheat, white, white smoke, yellow, yellow green
    """.replace("\n", " ").split(",")
)


class Fill50kDataset(TriplesDataset):
    """The folder with `prompt.json`, one JSON object a line: source (hint), target (image), prompt."""

    source = "https://huggingface.co/lllyasviel/ControlNet/tree/main/training"
    lists = (LIST,)
    default_root = "training/fill50k"

    def _advice(self) -> str:
        return (
            f"unpack fill50k.zip from {self.source} so that {LIST}, source/ and target/ are in {self.root},"
            " or make circles of your own: python tutorial_dataset.py --make"
        )


def make_fill50k(root: str | Path, count: int = CIRCLES, side: int = SIDE, seed: int = 0) -> None:
    """Draw circles into `root`, with a progress bar; `prompt.json` comes last: it tells that all are there.

    Raises
        FileExistsError  a list that is there already is not replaced
    """
    root = Path(root)
    if (root / LIST).exists():
        raise FileExistsError(f"{root / LIST} is there already; choose another folder, or remove it")
    for name in ("source", "target"):
        (root / name).mkdir(parents=True, exist_ok=True)
    draw = partial(draw_circle, root, side=side, seed=seed)
    with ThreadPoolExecutor() as pool:
        rows = list(tqdm(pool.map(draw, range(count)), total=count, desc=f"drawing {root}", unit="circle"))
    write_text(root / LIST, "".join(json.dumps(row) + "\n" for row in rows))


def draw_circle(root: Path, number: int, *, side: int, seed: int) -> dict[str, str]:
    """Write the two images of a circle, which are a function of (seed, number); return its row."""
    rng = np.random.default_rng([seed, number])
    ink, ground = (COLOURS[i].strip() for i in rng.choice(len(COLOURS), 2, replace=False))
    radius = rng.uniform(0.06, 0.3) * side
    centre = rng.uniform(radius, side - radius, 2)
    outline = np.zeros((side, side, 3), np.uint8)
    filled = np.full((side, side, 3), rgb_of(ground), np.uint8)
    place = tuple(int(x * 16) for x in centre)  # cv2 takes sixteenths of a pixel
    for image, colour, thickness in ((outline, (255, 255, 255), 1), (filled, rgb_of(ink), cv2.FILLED)):
        cv2.circle(image, place, int(radius * 16), colour, thickness, cv2.LINE_AA, shift=4)
    row = {"source": f"source/{number}.png", "target": f"target/{number}.png"}
    for image, name in zip((outline, filled), row.values(), strict=True):
        done, content = cv2.imencode(".png", image[..., ::-1])
        assert done
        (root / name).write_bytes(content.tobytes())
    return {**row, "prompt": f"{ink} circle with {ground} background"}


def rgb_of(name: str) -> tuple[int, ...]:
    """The colour of a name in words."""
    return ImageColor.getrgb(name.replace(" ", ""))[:3]
