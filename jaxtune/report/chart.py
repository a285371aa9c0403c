"""Curves as inline SVG, crisp at any width.

The drawing is stretched over its box and strokes keep their width; labels are HTML that is placed by percentages. So a
page needs no script to be read: the script only adds the read-out under the pointer.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from jaxtune.report.html import Html, compact, h, join
from jaxtune.report.run import Point

WIDTH, HEIGHT = 1000, 1000  # units of the drawing; the page decides what they measure
MOST_POINTS = 600  # of a curve: more than a page has pixels for


@dataclass(frozen=True)
class Series:
    """A curve of a chart.

    colour: 1 to 8, a slot of the palette; 0 for grey.
    style: "line", "faint" (a line behind the others) or "dots" (a line with its points).
    mark: the step whose point is ringed.
    note: said behind the name in the legend.
    """

    name: str
    points: Sequence[Point]
    colour: int = 1
    style: str = "line"
    mark: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """Where values lie between 0 and 1, and which ones are labelled."""

    lo: float
    hi: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        if self.log:
            return (math.log(value) - math.log(self.lo)) / (math.log(self.hi) - math.log(self.lo))
        return (value - self.lo) / (self.hi - self.lo)

    def label(self, tick: float) -> str:
        return compact(tick, largest=abs(tick) if self.log else max(map(abs, self.ticks)))


def linear_axis(values: Sequence[float], count: int = 5, *, zero: bool = False) -> Axis:
    """An axis with round ticks around `values`; it starts at 0 if asked to, or if that costs little."""
    lo, hi = min(values), max(values)
    if zero or 0 <= lo <= 0.35 * hi:
        lo = min(lo, 0.0)
    if lo == hi:
        lo, hi = lo - (abs(lo) or 1) * 0.05, hi + (abs(hi) or 1) * 0.05
    step = _round_step((hi - lo) / count)
    first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def step_axis(steps: Sequence[int]) -> Axis:
    """Steps from the first to the last, exactly; ticks are whole."""
    lo, hi = min(steps), max(steps)
    if lo == hi:
        return Axis(lo - 1, hi + 1, (lo,))
    every = max(1, round(_round_step((hi - lo) / 5)))
    return Axis(lo, hi, tuple(range(-(-lo // every) * every, hi + 1, every)))


def log_axis(values: Sequence[float]) -> Axis:
    """An axis from the last of 1, 2, 5, 10, ... below the values to the first above. All values are positive."""
    grid = [m * 10.0**e for e in range(-320, 309) for m in (1, 2, 5) if m * 10.0**e > 0]
    lo = max(g for g in grid if g <= min(values) * (1 + 1e-9))
    hi = min((g for g in grid if g >= max(values) * (1 - 1e-9) and g > lo), default=grid[-1])
    ticks = [g for g in grid if lo <= g <= hi]
    if len(ticks) > 8:
        decades = [g for g in ticks if f"{g:e}".startswith("1.0")]
        ticks = decades[:: math.ceil(len(decades) / 7)]
    return Axis(lo, hi, tuple(ticks), log=True)


def _round_step(size: float) -> float:
    """The first of 1, 2, 5, 10 times a power of ten that is not below `size`."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= size * (1 - 1e-9))


def value_axis(values: Sequence[float], *, zero: bool = False) -> Axis:
    """Logarithmic where the values are positive and span a factor of 30 or more, so that the end of a curve is seen."""
    if not zero and min(values) > 0 and max(values) >= 30 * min(values):
        return log_axis(values)
    return linear_axis(values, zero=zero)


def smooth(points: Sequence[Point], share: float = 0.04) -> list[Point]:
    """Exponential moving average over about `share` of the points, unbiased at the start (Adam's correction)."""
    keep = 1 - 1 / max(1.0, share * len(points))
    total = weight = 0.0
    smoothed = []
    for step, value in points:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(Point(step, total / weight))
    return smoothed


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points that draw the same picture: the ends, and the extremes of equal stretches."""
    if len(points) <= most:
        return list(points)
    stretches = (most - 2) // 2
    inner = points[1:-1]
    bounds = [len(inner) * i // stretches for i in range(stretches + 1)]
    kept = []
    for start, end in pairwise(bounds):
        piece = sorted(inner[start:end], key=lambda point: point.value)
        kept += sorted({piece[0], piece[-1]})
    return [points[0], *kept, points[-1]]


def chart(title: str, series: Sequence[Series], *, zero: bool = False, wide: bool = False) -> Html | None:
    """Return a `<figure>` with the curves over the step; None where no series has a point.

    Args:
      title: what is drawn, with its unit.
      zero: the value axis starts at 0.
      wide: takes a row of its own.
    """
    drawn = [(s, thin(s.points)) for s in series if s.points]
    if not drawn:
        return None
    x = step_axis([p.step for _, points in drawn for p in points])
    y = value_axis([p.value for _, points in drawn for p in points], zero=zero)
    svg = h(
        "svg",
        _grid(y),
        *(_curve(s, points, x, y) for s, points in drawn),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{title}, by step",
    )
    labels = [h("span", y.label(t), class_="ty", style=f"top:{100 * (1 - y.at(t)):.2f}%") for t in y.ticks]
    labels += [h("span", x.label(t), class_="tx", style=f"left:{100 * x.at(t):.2f}%") for t in x.ticks]
    readout = h("div", class_="cursor", hidden=True), h("div", class_="tip", hidden=True, role="status")
    return h(
        "figure",
        h("figcaption", h("b", title), h("span", " log scale", class_="mute") if y.log else None, _legend(series)),
        h("div", svg, *labels, *readout, class_="plot", tabindex="0"),
        h("script", _data(drawn, x), type="application/json"),
        class_="chart wide" if wide else "chart",
    )


def _grid(y: Axis) -> Html:
    lines = "".join(f"M0 {HEIGHT * (1 - y.at(t)):.1f}h{WIDTH}" for t in y.ticks)
    return h("path", class_="grid", d=lines)


def _curve(series: Series, points: Sequence[Point], x: Axis, y: Axis) -> Html:
    at = [(f"{WIDTH * x.at(p.step):.1f}", f"{HEIGHT * (1 - y.at(p.value)):.1f}") for p in points]
    line = h("path", class_=f"line {series.style} c{series.colour}", d="M" + "L".join(" ".join(xy) for xy in at))
    # A path of no length with round caps is a dot that the stretched drawing does not squash.
    dots = rings = None
    if series.style == "dots" or len(points) == 1:
        dots = h("path", class_=f"dot c{series.colour}", d="".join(f"M{a} {b}h0" for a, b in at))
    marked = [f"M{a} {b}h0" for p, (a, b) in zip(points, at) if p.step == series.mark]
    if marked:
        rings = join(h("path", class_=f"{kind} c{series.colour}", d=marked[0]) for kind in ("ring", "hole", "dot"))
    return join([line, dots, rings])


def _legend(series: Sequence[Series]) -> Html | None:
    if len(series) == 1 and not series[0].note:
        return None  # the title says it
    keys = [
        h("span", h("i", class_=f"key {s.style} c{s.colour}"), s.name, h("em", f" {s.note}") if s.note else None)
        for s in series
        if s.points
    ]
    return h("span", *keys, class_="legend")


def _data(drawn: Sequence[tuple[Series, Sequence[Point]]], x: Axis) -> Html:
    """What the read-out shows, as JSON that cannot end its script element."""
    curves = [
        {"name": s.name, "colour": s.colour, "points": [[p.step, float(f"{p.value:.5g}")] for p in points]}
        for s, points in drawn
    ]
    return Html(json.dumps({"x": [x.lo, x.hi], "series": curves}, separators=(",", ":")).replace("<", "\\u003c"))
