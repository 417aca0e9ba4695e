"""Line charts as inline SVG, in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from metrics.page import Html, joined, legend, tag

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 14, 44  # of the frame that holds the lines
DOTTED = 40  # points of a line that are shown as such, at most


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]  # in rising order of x; points that are not finite are left out
    colour: int  # number of the page's colour
    errors: Sequence[float] = ()  # half the height of the bar at each point


@dataclass(frozen=True)
class Axis:
    """A range of values, and the pixels that it takes."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> Axis:
        """An axis from tick to tick around the values."""
        ticks = nice_ticks(min(values), max(values))
        return cls(ticks[0], ticks[-1], start, end)

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    @property
    def ticks(self) -> list[float]:
        """Round values from the lowest to the highest."""
        return nice_ticks(self.low, self.high)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose a range; at most `most` steps."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * power for m in (1, 2, 5, 10, 20) if (high - low) / (m * power) <= most - 1 + 1e-9)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(
    lines: Sequence[Line], *, x_name: str, y_name: str, mark: tuple[float, str] | None = None
) -> Html:
    """Lines over common axes with their legend.

    mark  an x, and what happened there
    """
    shown = [finite(line) for line in lines]
    points = [point for line in shown for point in line.points]
    if not points:
        return tag("p", "no figures yet")
    tops = [y + e for line in shown for (_, y), e in zip(line.points, errors_of(line), strict=True)]
    feet = [y - e for line in shown for (_, y), e in zip(line.points, errors_of(line), strict=True)]
    x = Axis.over([point[0] for point in points], LEFT, WIDTH - RIGHT)
    y = Axis.over([*tops, *feet], HEIGHT - BOTTOM, TOP)
    parts = [grid(x, y, x_name, y_name)]
    if mark is not None:
        parts.append(draw_mark(*mark, x))
    parts += [draw_line(line, x, y) for line in shown]
    chart = tag(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{y_name} by {x_name}"
    )
    return joined([chart, legend([(line.name, line.colour) for line in shown])])


def finite(line: Line) -> Line:
    """The line without the points that cannot be drawn."""
    kept = [i for i, point in enumerate(line.points) if all(map(math.isfinite, point))]
    errors = errors_of(line)
    return Line(line.name, [line.points[i] for i in kept], line.colour, [errors[i] for i in kept])


def errors_of(line: Line) -> Sequence[float]:
    """An error for each point; 0 where it is not given or not finite."""
    given = line.errors or [0.0] * len(line.points)
    return [error if math.isfinite(error) else 0.0 for error in given]


def grid(x: Axis, y: Axis, x_name: str, y_name: str) -> Html:
    """Lines and figures of the ticks, and what the axes show."""
    parts = []
    for value in y.ticks:
        at = y(value)
        parts.append(stroke(x.start, at, x.end, at, "var(--line)"))
        parts.append(label(number(value, y), x.start - 8, at + 4, "end"))
    for value in x.ticks:
        parts.append(label(number(value, x), x(value), y.start + 18, "middle"))
    parts.append(label(x_name, (x.start + x.end) / 2, HEIGHT - 4, "middle"))
    turned = f"rotate(-90 13 {(y.start + y.end) / 2})"
    parts.append(label(y_name, 13, (y.start + y.end) / 2, "middle", transform=turned))
    return tag("g", *parts)


def number(value: float, axis: Axis) -> str:
    """A tick's value with as many digits as tell it from the next."""
    step = axis.ticks[1] - axis.ticks[0]
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def draw_line(line: Line, x: Axis, y: Axis) -> Html:
    """A line with its points and their bars."""
    colour = f"var(--series-{line.colour})"
    path = " ".join(f"{x(a)},{y(b)}" for a, b in line.points)
    parts = [
        tag("polyline", points=path, fill="none", stroke=colour, stroke_width=2.2, stroke_linejoin="round")
    ]
    for (a, b), error in zip(line.points, errors_of(line), strict=True):
        if error:
            parts.append(stroke(x(a), y(b - error), x(a), y(b + error), colour, stroke_opacity=0.5))
    if len(line.points) <= DOTTED:
        parts += [tag("circle", cx=x(a), cy=y(b), r=3, fill=colour) for a, b in line.points]
    return tag("g", tag("title", line.name), *parts)


def draw_mark(at: float, what: str, x: Axis) -> Html:
    """An upright line at `at`, and what happened there, on the side that has room."""
    pixel, is_left = x(at), at < (x.low + x.high) / 2
    line = stroke(pixel, TOP, pixel, HEIGHT - BOTTOM, "var(--series-3)", stroke_dasharray="4 4")
    return tag(
        "g", line, label(what, pixel + (6 if is_left else -6), TOP + 12, "start" if is_left else "end")
    )


def stroke(x1: float, y1: float, x2: float, y2: float, colour: str, **more: object) -> Html:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, **more)


def label(words: str, x: float, y: float, anchor: str, **more: object) -> Html:
    """Words at a place."""
    return tag("text", words, x=x, y=y, text_anchor=anchor, **more)
