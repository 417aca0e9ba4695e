"""What a check of a data set found: single findings, and the report that holds them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SEVERITIES = ("error", "warning", "note")
SHOWN = 5  # messages of a code that the text gives in full
CLASSES_SHOWN = 24  # rows of the text's table of classes

# Every code, with its severity. An error means that training would learn something wrong, or stop.
CODES = {
    "all-void": "error",
    "bgr-control": "warning",
    "blended-ids": "error",
    "cannot-examine": "error",
    "cannot-open": "error",
    "colour-label": "error",
    "damaged-image": "error",
    "damaged-label": "error",
    "deep-map": "note",
    "duplicate-photo": "warning",
    "duplicate-stem": "error",
    "empty-file": "error",
    "empty-split": "warning",
    "grey-photo": "note",
    "instance-ids": "error",
    "jpeg-label": "error",
    "leaked-frame": "error",
    "map-without-photo": "warning",
    "mirrored-pair": "error",
    "misaligned-pair": "warning",
    "mixed-pairs": "error",
    "missing-file": "error",
    "missing-prompt": "error",
    "odd-size": "note",
    "other-resolution": "warning",
    "photo-without-map": "warning",
    "same-stem": "note",
    "shifted-ids": "error",
    "size-mismatch": "error",
    "small-photo": "note",
    "swapped-pair": "error",
    "unknown-colours": "warning",
    "unknown-ids": "error",
    "unreadable-label": "error",
    "void-lost": "warning",
    "withheld-labels": "note",
}


@dataclass(frozen=True)
class Frame:
    """The files of one sample."""

    split: str
    key: str
    photo: Path
    labels: Path | None = None
    control: Path | None = None
    prompt: str | None = None  # its own; None where the sentence is all there is

    @property
    def files(self) -> list[Path]:
        """Those that there are."""
        return [path for path in (self.photo, self.labels, self.control) if path is not None]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be; `message` is a sentence that names file and remedy."""

    severity: str  # one of SEVERITIES
    code: str  # one of CODES
    file: Path | None
    message: str
    split: str | None = None
    key: str | None = None  # of the frame


def finding(code: str, message: str, file: Path | None = None, **place: str | None) -> Finding:
    """A finding of the severity that its code has; `place` may hold split, key, and another severity."""
    severity = place.pop("severity", None) or CODES[code]
    return Finding(severity, code, file, message, **place)


@dataclass
class Report:
    """All findings of a check, and what was counted on the way.

    statistics  `splits` by name: frames, photo and map sizes, void share, shares of classes by name, prompts
    frames      of each split, for a sheet; they are not part of the JSON
    """

    name: str
    root: Path
    quick: bool
    findings: list[Finding] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    frames: dict[str, list[Frame]] = field(default_factory=dict)

    @property
    def may_train(self) -> bool:
        """Whether there is no error; warnings and notes do not stop a training."""
        return not any(item.severity == "error" for item in self.findings)

    def of(self, severity: str) -> list[Finding]:
        """The findings of one severity."""
        return [item for item in self.findings if item.severity == severity]

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        content = {
            "dataset": self.name,
            "root": str(self.root),
            "quick": self.quick,
            "may_train": self.may_train,
            "statistics": self.statistics,
            "findings": [
                {**asdict(item), "file": None if item.file is None else str(item.file)}
                for item in self.findings
            ],
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote."""
        content = json.loads(text)
        findings = [
            Finding(**{**item, "file": None if item["file"] is None else Path(item["file"])})
            for item in content["findings"]
        ]
        root, quick = Path(content["root"]), content["quick"]
        return cls(content["dataset"], root, quick, findings, content["statistics"])

    def text(self) -> str:
        """For people: tables of splits and classes, findings by code with the first few files, a verdict."""
        part = "quick check, a handful of frames read" if self.quick else "all frames read"
        lines = [f"{self.name} in {self.root} ({part})", ""]
        splits = self.statistics.get("splits", {})
        lines += _split_table(splits) + _class_table(splits) + self.findings_text().splitlines()
        return "\n".join([*lines, self.verdict()])

    def findings_text(self) -> str:
        """The findings alone, errors first; of each code the first few messages and a count."""
        lines: list[str] = []
        for severity in SEVERITIES:
            of_severity = self.of(severity)
            for code in dict.fromkeys(item.code for item in of_severity):
                messages = [item.message for item in of_severity if item.code == code]
                lines.append(f"{severity} {code} ({len(messages)})")
                lines += [f"  {message}" for message in messages[:SHOWN]]
                if len(messages) > SHOWN:
                    lines.append(f"  ... and {len(messages) - SHOWN} more; all of them are in the JSON")
        return "\n".join([*lines, ""] if lines else lines)

    def verdict(self) -> str:
        """One line: how much was found, and whether training may start."""
        counts = ", ".join(f"{len(self.of(severity))} {severity}s" for severity in SEVERITIES)
        return f"{counts}: training {'may start' if self.may_train else 'should not start'}"


def _split_table(splits: dict[str, Any]) -> list[str]:
    rows = [("split", "frames", "read", "photos", "maps", "void", "prompts")]
    for name, split in splits.items():
        void, prompts = split.get("void_share"), split.get("prompts")
        rows.append(
            (
                name,
                str(split["frames"]),
                str(split["examined"]),
                _sizes(split.get("photo_sizes", {})),
                _sizes(split.get("map_sizes", {})),
                "-" if void is None else f"{void:.1%}",
                f"{prompts['different']} different, {prompts['empty']} empty" if prompts else "one sentence",
            )
        )
    return [*_aligned(rows), ""] if splits else []


def _sizes(sizes: dict[str, int]) -> str:
    """The commonest size, and how many others there are."""
    if not sizes:
        return "-"
    first = max(sizes, key=lambda size: sizes[size])
    return first if len(sizes) == 1 else f"{first} and {len(sizes) - 1} more"


def _class_table(splits: dict[str, Any]) -> list[str]:
    shares = {name: split["class_shares"] for name, split in splits.items() if split.get("class_shares")}
    if not shares:
        return []
    names = list(next(iter(shares.values())))
    seen = [name for name in names if any(share[name] for share in shares.values())]
    seen.sort(key=lambda name: -max(share[name] for share in shares.values()))
    rows = [("class", *shares)]
    rows += [(name, *(f"{share[name]:.2%}" for share in shares.values())) for name in seen[:CLASSES_SHOWN]]
    lines = _aligned(rows)
    if len(seen) > CLASSES_SHOWN:
        lines.append(f"... and {len(seen) - CLASSES_SHOWN} more classes")
    if absent := [name for name in names if name not in seen]:
        lines.append(f"in no map: {', '.join(absent[:SHOWN])}" + _and_more(len(absent) - SHOWN))
    return [*lines, ""]


def _and_more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
