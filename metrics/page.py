"""A page that shows results: plain HTML and one style sheet, no script, nothing from elsewhere.

Whatever is put into a page as text is escaped; only what these functions return, `Html`, is markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

VOID_TAGS = {"img", "meta", "line", "circle", "polyline", "polygon", "rect"}


class Html(str):
    """Markup; any other text is escaped when it is put into a page."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: object) -> Html:
    """An element; attributes are named as in HTML, with `_` for `-` and `class_` for `class`."""
    words = [name]
    for key, value in attributes.items():
        words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(str(value))}"')
    opening = " ".join(words)
    if name in VOID_TAGS:
        return Html(f"<{opening}/>")
    return Html(f"<{opening}>{joined(children)}</{name}>")


def joined(parts: Iterable[str], between: str = "") -> Html:
    """The parts one after the other, those that are text escaped."""
    return Html(between.join(part if isinstance(part, Html) else escape(part) for part in parts))


def picture(source: str, alt: str, caption: str | None = None) -> Html:
    """A picture with its caption; `source` is relative to the page."""
    image = tag("img", src=source, alt=alt, loading="lazy")
    return tag("figure", image, *([] if caption is None else [tag("figcaption", caption)]))


def gallery(pictures: Sequence[str], columns: int, *, wraps: bool = False) -> Html:
    """Pictures in columns, to be compared along rows and columns.

    wraps  take fewer columns on a narrow screen; by default the screen is scrolled sideways there
    """
    names = "gallery wraps" if wraps else "gallery"
    return tag("div", *pictures, class_=names, style=f"--columns: {columns}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A table; the first column names the rows."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")


def command(text: str, remark: str = "") -> Html:
    """A command as it was typed, and perhaps what there is to say of it."""
    said = [tag("span", remark, class_="remark")] if remark else []
    return tag("div", tag("pre", tag("code", text)), *said, class_="command")


def missing(what: str, how: str) -> Html:
    """What a section cannot show, and the command that makes it."""
    return tag("div", tag("p", f"Not here yet: {what}. The command for it:"), command(how), class_="missing")


def swatch(colour: str) -> Html:
    """A small square of a CSS colour."""
    return tag("span", class_="swatch", style=f"background: {colour}")


def bars(rows: Sequence[tuple[str, str, Sequence[float | None]]], series: Sequence[tuple[str, int]]) -> Html:
    """Shares of 1 as bars: (name, CSS colour, a value for each series) a row; None is no value.

    series  name and number of the page's colour of each
    """
    blocks = []
    for name, colour, values in rows:
        lines = [bar(value, number) for value, (_, number) in zip(values, series, strict=True)]
        label = tag("span", swatch(colour), name, class_="label")
        blocks.append(tag("div", label, tag("div", *lines, class_="bars"), class_="row"))
    return tag("div", legend(series), tag("div", *blocks, class_="barchart"))


def bar(value: float | None, number: int) -> Html:
    """One bar with its figure."""
    width = 100 * min(max(value or 0.0, 0.0), 1.0)
    inner = tag("span", class_="bar", style=f"width: {width:.1f}%; background: var(--series-{number})")
    figure = tag("span", "-" if value is None else f"{value:.2f}", class_="value")
    return tag("div", tag("span", inner, class_="track"), figure, class_="line")


def legend(series: Sequence[tuple[str, int]]) -> Html:
    """Names of the series beside their colours."""
    items = [tag("span", swatch(f"var(--series-{number})"), name) for name, number in series]
    return tag("p", *items, class_="legend")


def section(anchor: str, title: str, *body: str) -> Html:
    """A part of the page that can be linked to."""
    return tag("section", tag("h2", title), *body, id=anchor)


def page(title: str, lead: Sequence[str], sections: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """A whole page: `lead` below the title, then the sections by anchor, title and body."""
    links = tag("nav", *(tag("a", name, href=f"#{anchor}") for anchor, name, _ in sections))
    parts = [section(anchor, name, *body) for anchor, name, body in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    body = tag("body", tag("header", tag("h1", title), *lead, links), tag("main", *parts))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fbfaf8; --card: #ffffff; --line: #dcdad5; --track: #efede9;
  --text: #22252b; --faint: #6b7280; --accent: #1d6fa5;
  --series-0: #8b9099; --series-1: #1d6fa5; --series-2: #d9701a; --series-3: #3f9b5b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15171b; --card: #1d2026; --line: #33373f; --track: #24272e;
    --text: #e4e5e8; --faint: #9aa0aa; --accent: #6cb6e6;
    --series-0: #8b9099; --series-1: #58a9de; --series-2: #f0924a; --series-3: #6cc88a;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 40px; }
h1 { font-size: clamp(1.7rem, 4vw, 2.5rem); line-height: 1.15; margin: 0 0 .4em; letter-spacing: -.02em; }
h2 { font-size: 1.45rem; margin: 0 0 .5em; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 1.6em 0 .5em; }
p { max-width: 70ch; margin: 0 0 1em; }
a { color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 1.2em 0 0; padding: 12px 0;
  border-top: 1px solid var(--line); }
nav a { text-decoration: none; font-weight: 600; }
section { padding: 34px 0; border-top: 1px solid var(--line); }
.gallery { display: grid; gap: 12px; margin: 0 0 1em; overflow-x: auto;
  grid-template-columns: repeat(var(--columns), minmax(148px, 1fr)); }
.gallery.wraps { grid-template-columns:
  repeat(auto-fit, minmax(max(148px, calc(100% / var(--columns) - 12px)), 1fr)); }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 6px; background: var(--line); }
figcaption { font-size: .82rem; line-height: 1.35; color: var(--faint); padding: 5px 2px 0; }
.command { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: flex-end; gap: 2px 16px;
  margin: 0 0 .6em; padding: 8px 12px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); }
.command pre { flex: 1 1 420px; margin: 0; font-size: .82rem; line-height: 1.45; white-space: pre-wrap;
  overflow-wrap: anywhere; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.remark { font-size: .8rem; color: var(--faint); }
.news { border-left: 4px solid var(--series-3); padding: 8px 14px; background: var(--card); margin: 0 0 1em; }
.missing { border: 1px dashed var(--series-2); border-radius: 8px; padding: 12px 16px; margin: 0 0 1em; }
.charts { display: grid; gap: 24px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.charts h3 { margin-top: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--faint); font-size: 13px; font-family: inherit; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .85rem; color: var(--faint);
  margin: .3em 0 .8em; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .45em;
  box-shadow: 0 0 0 1px var(--line); }
.wide { overflow-x: auto; margin: 0 0 1.2em; }
table { border-collapse: collapse; min-width: 420px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 14px 6px 0; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; font-weight: 500; }
thead th { font-size: .85rem; color: var(--faint); font-weight: 500; }
.barchart { display: grid; gap: 12px 36px; margin: 0 0 1.4em;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
.row { display: grid; grid-template-columns: 112px 1fr; align-items: center; font-size: .88rem; }
.line { display: flex; align-items: center; gap: 8px; height: 14px; }
.track { flex: 1; height: 9px; border-radius: 3px; background: var(--track); }
.bar { display: block; height: 100%; border-radius: 3px; }
.value { width: 2.6em; font-size: .75rem; color: var(--faint); font-variant-numeric: tabular-nums; }
"""
