"""Hold cards against each other: refused where their figures do not compare, else a table."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Card = Mapping[str, Any]

SHOWN = 6  # differences that an error lists
MISSING = "-"


class Column(NamedTuple):
    """One figure of the table."""

    title: str
    path: str  # in the card's metrics
    interval: str | None = None
    digits: int = 3


COLUMNS = (
    Column("FID", "fid.distance", digits=2),
    Column("KID x1000", "kid.mean", digits=3),
    Column("mIoU", "segmentation.samples.miou", "segmentation.samples.intervals.miou"),
    Column("ceiling", "segmentation.ceiling.miou"),
    Column("ratio", "segmentation.ratio.miou", "segmentation.ratio.interval"),
    Column("pixel acc.", "segmentation.samples.pixel_accuracy"),
    Column("pixel acc. with void", "segmentation.samples.pixel_accuracy_with_void"),
    Column("class acc.", "segmentation.samples.class_accuracy"),
    Column("LPIPS", "diversity.lpips", "diversity.interval"),
    Column("Streets features", "streets_features.distance"),
)


def read_card(path: Path) -> dict[str, Any]:
    """A card of `evaluate.py`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a card of evaluate.py, found none ({error})") from error
    if not isinstance(found, dict) or not {"protocol", "metrics", "maps"} <= set(found):
        raise ValueError(f"{path}: expected a card of evaluate.py, found other JSON")
    return found


def comparable(card: Card, metrics: Collection[str]) -> dict[str, Any]:
    """What has to be the same for some figures of two cards to compare: all but the generation."""
    generated = card["generated"]
    return {
        "protocol": card["protocol"],
        "measured_by": {name: card["measured_by"][name] for name in metrics},
        "real": {name: card["real"][name] for name in ("count", "sha256")},
        "maps": {name: card["maps"][name] for name in ("count", "sha256", "keys_sha256")},
        "samples_of_a_map": generated["samples_of_a_map"],
        "kid_subset_size": card["metrics"]["kid"]["subset_size"] if "kid" in metrics else None,
        "leaks": card["leaks"]["status"] == "leaked",
    }


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def differences(a: Card, b: Card) -> list[tuple[str, Any, Any]]:
    """Path and both values of what differs."""
    common = [name for name in a["metrics"] if name in b["metrics"]]
    first, second = (dict(flat(comparable(card, common))) for card in (a, b))
    paths = dict.fromkeys([*first, *second])
    rows = [(path, first.get(path, MISSING), second.get(path, MISSING)) for path in paths]
    return [row for row in rows if row[1] != row[2]]


def check_comparable(cards: Mapping[str, Card]) -> None:
    """Refuse cards whose figures do not compare, and say in what they differ."""
    (name, first), *others = cards.items()
    for other, card in others:
        found = differences(first, card)
        if found:
            rows = "; ".join(f"{path} is {short(a)} and {short(b)}" for path, a, b in found[:SHOWN])
            rest = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise ValueError(f"{name} and {other} do not compare: {rows}{rest}")


def short(value: Any) -> str:
    """A value for an error; of a hash its beginning."""
    text = json.dumps(value)
    return f"{text[:13]}..." if len(text) == 66 else text


def figure(card: Card, column: Column) -> str:
    """A value with its interval, or a dash."""
    value = look_up(card["metrics"], column.path)
    if value is None:
        return MISSING
    value = value * 1000 if column.title == "KID x1000" else value
    text = f"{value:.{column.digits}f}"
    interval = look_up(card["metrics"], column.interval) if column.interval else None
    return (
        f"{text} ({interval[0]:.{column.digits}f} to {interval[1]:.{column.digits}f})" if interval else text
    )


def look_up(value: Any, path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def table_of(cards: Mapping[str, Card]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; columns that no card has are left out."""
    columns = [c for c in COLUMNS if any(figure(card, c) != MISSING for card in cards.values())]
    rows = [[name, *(figure(card, column) for column in columns)] for name, card in cards.items()]
    return ["", *(column.title for column in columns)], rows


def as_markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a README."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_latex(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a paper, with the rules of booktabs."""

    def row(cells: Sequence[str]) -> str:
        return " & ".join(map(escaped, cells)) + r" \\"

    body = [row(header), r"\midrule", *map(row, rows)]
    columns = "l" + "r" * (len(header) - 1)
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]
    )


def escaped(text: str) -> str:
    """Text that LaTeX takes as it is."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, rf"\{c}" if c in "&%$#_{}" else c) for c in text)


FORMATS = {"markdown": as_markdown, "latex": as_latex}


def compare(paths: Sequence[Path], form: str) -> str:
    """The table of cards that compare, in one of FORMATS.

    Raises
        ValueError  they do not compare, or a file is no card
    """
    cards = {str(path): read_card(path) for path in paths}
    check_comparable(cards)
    named = {name_of(path, paths): card for path, card in zip(cards, cards.values(), strict=True)}
    return FORMATS[form](*table_of(named))


def name_of(path: str, paths: Sequence[Path]) -> str:
    """The file's own name, unless two share it; a folder's for card.json."""
    own = Path(path)
    names = [p.parent.name if p.stem == "card" else p.stem for p in paths]
    name = own.parent.name if own.stem == "card" else own.stem
    return name if name and names.count(name) == 1 else path
