"""Curves over the step, and repeats over a rate, as inline SVG that is crisp at any width.

The drawing is stretched over its box and strokes keep their width; labels are HTML that is placed by percentages. So a
page needs no script to be read: the script only adds the read-out under the pointer.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from jaxtune.report.html import Html, compact, h, join, number
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
class Spread:
    """Repeats over a positive x: a dot each, a line through the means, and a band from the lowest to the highest.

    values: x -> what the repeats there came to.
    lost: x -> how many of them came to nothing, which is marked at the top edge.
    """

    name: str
    values: Mapping[float, Sequence[float]]
    lost: Mapping[float, int] = field(default_factory=dict)
    colour: int = 1


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


def _tried_axis(values: Iterable[float]) -> Axis:
    """A log axis whose ticks are the values themselves, if they are not too close for that."""
    values = sorted(values)
    axis = log_axis(values)
    close = any(axis.at(b) - axis.at(a) < 0.07 for a, b in pairwise(values))
    return axis if close else Axis(axis.lo, axis.hi, tuple(values), log=True)


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
    paths = [_curve(s, points, x, y) for s, points in drawn]
    curves = [
        {"name": s.name, "colour": s.colour, "points": [[p.step, _short(p.value)] for p in points]}
        for s, points in drawn
    ]
    return _figure(title, "step", x, y, paths, curves, _legend(series), wide=wide)


def spread_chart(title: str, by: str, spreads: Sequence[Spread]) -> Html | None:
    """Return a wide `<figure>` of repeats over `by`, on a log axis; None where there is no value.

    The lowest value of all is ringed.
    """
    values = [v for s in spreads for there in s.values.values() for v in there]
    if not values:
        return None
    x, y = _tried_axis({x for s in spreads for x in (*s.values, *s.lost)}), value_axis(values)
    paths = [_spread(s, x, y, min(values)) for s in spreads]
    curves = [{"name": s.name, "colour": s.colour, "points": _read_out(s, y.hi)} for s in spreads]
    lost = [_lost(at, [s for s in spreads if s.lost.get(at)], x) for at in {at for s in spreads for at in s.lost}]
    keys = [_key(s.name, "line", s.colour) for s in spreads if s.values and len(spreads) > 1]
    keys += [h("span", h("i", "× ", class_="c0"), "failed")] if lost else []
    legend = h("span", *keys, class_="legend") if keys else None
    return _figure(title, by, x, y, paths, curves, legend, lost, wide=True)


def _figure(
    title: str,
    by: str,
    x: Axis,
    y: Axis,
    paths: Sequence[Html],
    curves: Sequence[dict],
    legend: Html | None,
    marks: Sequence[Html] = (),
    *,
    wide: bool,
) -> Html:
    """A chart from what is drawn (`paths`, `marks`) and what the read-out says (`curves`)."""
    svg = h(
        "svg",
        _grid(y),
        *paths,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{title}, by {by}",
    )
    labels = [h("span", y.label(t), class_="ty", style=f"top:{100 * (1 - y.at(t)):.2f}%") for t in y.ticks]
    labels += [h("span", x.label(t), class_="tx", style=f"left:{100 * x.at(t):.2f}%") for t in x.ticks]
    readout = h("div", class_="cursor", hidden=True), h("div", class_="tip", hidden=True, role="status")
    data = {"x": [x.lo, x.hi], "log": x.log, "by": by, "series": curves}
    return h(
        "figure",
        h("figcaption", h("b", title), h("span", " log scale", class_="mute") if y.log else None, legend),
        h("div", svg, *labels, *marks, *readout, class_="plot", tabindex="0"),
        h("script", _json(data), type="application/json"),
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


def _spread(spread: Spread, x: Axis, y: Axis, best: float) -> Html:
    def place(at, value):
        return f"{WIDTH * x.at(at):.1f} {HEIGHT * (1 - y.at(value)):.1f}"

    def line(points: Iterable[tuple[float, float]]):
        return "M" + "L".join(place(*point) for point in points)

    def dots(points: Iterable[tuple[float, float]]):
        return "".join(f"M{place(*point)}h0" for point in points)

    repeats = sorted(spread.values.items())
    if not repeats:
        return Html("")
    edge = [(at, min(there)) for at, there in repeats] + [(at, max(there)) for at, there in reversed(repeats)]
    every = [(at, value) for at, there in repeats for value in there]
    paths = [
        ("band", line(edge) + "Z" if len(every) > len(repeats) else ""),
        ("line", line((at, statistics.fmean(there)) for at, there in repeats)),
        ("dot", dots(every)),
        *((kind, dots(point for point in every if point[1] == best)) for kind in ("ring", "hole", "dot")),
    ]
    return join(h("path", class_=f"{kind} c{spread.colour}", d=d) for kind, d in paths if d)


def _read_out(spread: Spread, top: float) -> list[list]:
    """[x, mean, its text, a note] at each x; what is lost altogether counts as being at the `top`."""
    points = []
    for at in sorted({*spread.values, *spread.lost}):
        there, lost = spread.values.get(at, ()), spread.lost.get(at, 0)
        if not there:
            points.append([at, _short(top), f"{lost} failed" if lost > 1 else "failed", ""])
            continue
        mean = statistics.fmean(there)
        notes = [f"{number(min(there))} to {number(max(there))} in {len(there)} runs"] if len(there) > 1 else []
        notes += [f"{lost} failed"] if lost else []
        points.append([at, _short(mean), number(mean), ", ".join(notes)])
    return points


def _lost(at: float, spreads: Sequence[Spread], x: Axis) -> Html:
    crosses = [h("i", "×", class_=f"c{s.colour}") for s in spreads]
    return h("span", *crosses, class_="lost", style=f"left:{100 * x.at(at):.2f}%")


def _legend(series: Sequence[Series]) -> Html | None:
    """The coloured curves by name, and grey ones together, if there are more than a few."""
    if len(series) == 1 and not series[0].note:
        return None  # the title says it
    grey = [s for s in series if s.points and not s.colour]
    together = len(grey) > 3
    keys = [_key(s.name, s.style, s.colour, s.note) for s in series if s.points and (s.colour or not together)]
    if together:
        keys.append(_key(f"{len(grey)} others", grey[0].style, 0))
    return h("span", *keys, class_="legend")


def _key(name: str, style: str, colour: int, note: str = "") -> Html:
    return h("span", h("i", class_=f"key {style} c{colour}"), name, h("em", f" {note}") if note else None)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _json(data: dict) -> Html:
    """JSON that cannot end its script element."""
    return Html(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))
