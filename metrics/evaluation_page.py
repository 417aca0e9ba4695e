"""The page of an evaluation: figures, samples, best and worst maps of each class, confusion, bars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cldm.pictures import Rgb, sheet, write_png
from datasets.files import write_text
from datasets.label_space import Size, resize_labels
from metrics.blocks import Block
from metrics.compare import as_markdown, flat, table_of
from metrics.evaluation import Findings
from metrics.image_sets import Item, resize_picture
from metrics.page import Html, bars, command, gallery, joined, page, picture, table, tag
from metrics.segmentation import Margins, ious_of
from metrics.segmentation_card import CONVENTIONS

HEIGHT = 192  # of a picture, at most
GRID = 8  # maps of the grid of samples
CLASSES = 24  # whose best and worst maps are shown; the most frequent ones
LEAST_SHARE = 0.005  # of an image, from which a class counts as shown in it
CELL = 22  # pixels of the confusion matrix
DRAWN_WIDTH = 760
DRAWN_CLASSES = 40  # beyond, the largest confusions are listed
LISTED = 30
SERIES = (("real images (ceiling)", 0), ("generated", 1))


class Story:
    """What the sections share: the findings, and the folder of their pictures."""

    def __init__(self, findings: Findings, folder: Path) -> None:
        self.findings, self.folder = findings, folder
        self.card, self.found = findings.card, findings.evaluation
        self.space = self.found.reader.space

    def show(self, name: str, rows: Sequence[Sequence[Rgb]], caption: str) -> Html:
        """Write a sheet and put it on the page."""
        write_png(self.folder / f"{name}.png", sheet(rows))
        return picture(f"{self.folder.name}/{name}.png", caption, caption)

    @property
    def shown_size(self) -> Size:
        """Of a picture on the page: that of the protocol, or a part of it."""
        height, width = self.found.reader.size
        part = min(1.0, HEIGHT / height)
        return round(part * height), round(part * width)

    def map_of(self, item: Item) -> Rgb:
        """The painted map of an item."""
        assert item.labels is not None
        return self.space.paint(resize_labels(self.found.reader.labels(item.labels), self.shown_size))

    def image_of(self, item: Item) -> Rgb:
        """The image as it was measured, perhaps made smaller."""
        return resize_picture(self.found.reader.image(item), self.shown_size, "box")

    def seen_in(self, item: Item) -> Rgb:
        """What the segmenter sees in an item, painted."""
        block = Block([item], self.found.reader.image(item)[None], None)
        seen = self.findings.works.segmentation[0].segment(block)[0]
        return self.space.paint(resize_labels(seen, self.shown_size))


def write_report(findings: Findings, out: Path) -> Path:
    """Write OUT/index.html and OUT/pictures; the page."""
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for earlier in pictures.glob("*.png"):
        earlier.unlink()
    write_text(out / "index.html", tell(Story(findings, pictures)))
    return out / "index.html"


def tell(story: Story) -> str:
    """The whole page; writes its pictures."""
    sections: list[tuple[str, str, list[Html]]] = [
        ("figures", "Figures", figures_section(story)),
        ("samples", "Samples", samples_section(story)),
    ]
    if story.findings.margins is not None and story.findings.confusion is not None:
        sections += [
            ("classes", "Classes", classes_section(story)),
            ("extremes", "Best and worst", extremes_section(story, story.findings.margins)),
            ("confusion", "Confusion", confusion_section(story, story.findings.confusion)),
        ]
    sections.append(("card", "What decides the figures", card_section(story)))
    return page(title_of(story.card), [tag("p", lead_of(story))], sections)


def title_of(card: dict[str, Any]) -> str:
    """Such as Evaluation of model.safetensors."""
    made_by = card["generation"].get("checkpoint")
    return f"Evaluation of {made_by}" if isinstance(made_by, str) else "Evaluation"


def lead_of(story: Story) -> str:
    """What was measured."""
    card, protocol = story.card, story.card["protocol"]
    height, width = protocol["size"]
    leaks = {
        "clean": "None of the maps was trained on.",
        "leaked": f"{len(card['leaks'].get('leaked', []))} of the maps were trained on.",
        "not checked": f"Whether the maps were trained on is not known: {card['leaks'].get('why')}.",
    }
    return (
        f"{card['generated']['count']} generated images of {card['generated']['maps']} maps of"
        f" {protocol['dataset']}, against {card['real']['count']} real images, under protocol"
        f" {protocol['name']} (version {protocol['version']}): all at {height} by {width},"
        f" {protocol['resize']}. {leaks[card['leaks']['status']]}"
    )


def figures_section(story: Story) -> list[Html]:
    """The row of the table, the segmenter's scores, and what is left out."""
    card = story.card
    parts = [table(*table_of({"generated": card}))]
    if "segmentation" in card["metrics"]:
        parts.append(score_table(card["metrics"]["segmentation"]))
    reasons: dict[str, list[str]] = {}
    for metric, why in card["left_out"].items():
        reasons.setdefault(why, []).append(metric)
    for why, metrics in reasons.items():
        words = f"Left out: {', '.join(metrics)}. {why[0].upper()}{why[1:]}."
        parts.append(tag("div", tag("p", words), class_="missing"))
    return parts


def score_table(scores: dict[str, Any]) -> Html:
    """Each score by its convention, ours beside the ceiling."""
    ours, ceiling = scores["samples"], scores["ceiling"]
    rows = []
    for name, words in CONVENTIONS.items():
        interval = ours["intervals"].get(name)
        reach = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        ratio = ours[name] / ceiling[name] if ceiling[name] else None
        part = "-" if ratio is None else f"{ratio:.0%}"
        rows.append([words, f"{ours[name]:.3f}", reach, f"{ceiling[name]:.3f}", part])
    header = ["", "generated", "95 % interval", "real images (ceiling)", "of the ceiling"]
    absent = ", ".join(ours["absent"])
    note = f"Classes that no map has, in no mean but the second: {absent}." if absent else ""
    return joined([table(header, rows), tag("p", note)])


def samples_section(story: Story) -> list[Html]:
    """A row for each of some maps: the map, the real image, samples."""
    by_key: dict[str, list[Item]] = {}
    for item in story.found.samples:
        by_key.setdefault(item.key, []).append(item)
    photos = {item.key: item for item in story.found.paired}
    keys = list(by_key)
    chosen = [keys[i] for i in np.unique(np.linspace(0, len(keys) - 1, GRID).round().astype(int))]
    cells = []
    for number, key in enumerate(chosen):
        some = by_key[key][:2]
        row = [story.map_of(some[0])]
        row += [story.image_of(photos[key])] if key in photos else []
        row += [story.image_of(item) for item in some]
        cells.append(story.show(f"grid_{number}", [row], key))
    return [tag("p", "The map, the real image of it, and what was generated."), gallery(cells, 1)]


def classes_section(story: Story) -> list[Html]:
    """Intersection over union of each class beside the ceiling."""
    scores, rows = story.card["metrics"]["segmentation"], []
    for name, colour in zip(story.space.names, story.space.colours, strict=True):
        values = [scores[who]["iou"][name] for who in ("ceiling", "samples")]
        if any(value is not None for value in values):
            rows.append((name, "rgb({}, {}, {})".format(*colour), values))
    return [tag("p", "Intersection over union, all images together."), bars(rows, SERIES)]


def extremes_section(story: Story, margins: Margins) -> list[Html]:
    """For each class the map on which it is found best, and worst: map, image, what the segmenter sees."""
    height, width = story.found.reader.size
    ious = np.where(margins[:, 1] >= LEAST_SHARE * height * width, ious_of(margins), np.nan)
    frequent = np.argsort(-margins[:, 1].sum(axis=0), kind="stable")[:CLASSES]
    cells = []
    for k in frequent:
        if np.isnan(ious[:, k]).all():
            continue
        for word, i in (("best", np.nanargmax(ious[:, k])), ("worst", np.nanargmin(ious[:, k]))):
            item = story.found.fake[int(i)]
            row = [story.map_of(item), story.image_of(item), story.seen_in(item)]
            caption = f"{story.space.names[k]}, {word}: {ious[i, k]:.2f} in {item.picture.path.stem}"
            cells.append(story.show(f"class_{k:03d}_{word}", [row], caption))
    words = "The map, the image, and what the segmenter sees in it; of images that show enough of the class."
    return [tag("p", words), gallery(cells, 2)]


def confusion_section(story: Story, confusion: NDArray[np.int64]) -> list[Html]:
    """The matrix as a drawing, or the largest confusions of many classes."""
    names = story.space.names
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    words = tag("p", "Share of the pixels of a class (row) that the segmenter sees as another (column).")
    if len(names) <= DRAWN_CLASSES:
        return [words, draw_matrix(shares, names)]
    off = shares - np.diag(np.diag(shares))
    order = np.argsort(-off, axis=None, kind="stable")[:LISTED]
    rows = [[names[i], names[j], f"{off[i, j]:.0%}"] for i, j in (divmod(int(n), len(names)) for n in order)]
    return [words, table(["class", "seen as", "share"], rows)]


def draw_matrix(shares: NDArray[np.float64], names: Sequence[str]) -> Html:
    """Squares, the darker the larger the share; names at both sides."""
    left, count = 120, len(names)
    parts = []
    for i, name in enumerate(names):
        middle = left + (i + 0.7) * CELL
        parts.append(tag("text", name, x=left - 6, y=middle, text_anchor="end"))
        turned = f"rotate(-60 {middle} {left - 6})"
        parts.append(tag("text", name, x=middle, y=left - 6, transform=turned))
        for j, other in enumerate(names):
            square = {"x": left + j * CELL, "y": left + i * CELL, "width": CELL - 1, "height": CELL - 1}
            title = f"{name} seen as {other}: {shares[i, j]:.1%}"
            inner = tag("title", title)
            fill = {"fill": "var(--series-1)", "fill_opacity": f"{shares[i, j] ** 0.5:.3f}"}
            parts.append(tag("g", inner, tag("rect", **square, **fill)))
    side = left + count * CELL
    drawn = tag("svg", *parts, viewBox=f"0 0 {side + 60} {side}", role="img", aria_label="confusion matrix")
    return tag("div", drawn, style=f"max-width: {DRAWN_WIDTH}px")


def card_section(story: Story) -> list[Html]:
    """The rest of the card, a line for each entry, and the row for a README."""
    rest = {k: v for k, v in story.card.items() if k not in ("metrics", "left_out")}
    lines = [f"{path}: {v if isinstance(v, str) else json.dumps(v)}" for path, v in flat(rest)]
    row = as_markdown(*table_of({"generated": story.card}))
    return [command(row), command("\n".join(lines))]
