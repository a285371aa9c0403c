"""Curves over the step, and repeats over a rate: coordinates for the macro that draws them as inline SVG.

The drawing is scaled to its box and strokes keep their width; labels are HTML that is placed by percentages. So a
page is crisp at any width and readable without a script, which only adds the read-out under the pointer.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from jaxtune.report.run import Measured
from jaxtune.report.words import compact, number

WIDTH, HEIGHT = 1000, 1000  # units of the drawing; the page sets their size
MOST_POINTS = 600  # of a curve: more than a page has pixels for


@dataclass(frozen=True)
class Series:
    """A curve of a chart.

    colour: 1 to 8, a slot of the palette; 0 for grey.
    style: "line", "faint" (a line behind the others) or "dots" (a line with its points).
    mark: the step whose point is ringed.
    note: shown after the name in the legend.
    """

    name: str
    points: Sequence[Measured]
    colour: int = 1
    style: str = "line"
    mark: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Spread:
    """Repeats over a positive x: a dot each, a line through the means, and a band from the lowest to the highest.

    values: x -> the results of the repeats.
    lost: x -> how many repeats have no result; they are marked at the top edge.
    """

    name: str
    values: Mapping[float, Sequence[float]]
    lost: Mapping[float, int] = field(default_factory=dict)
    colour: int = 1


class Mark(NamedTuple):
    """A path of the drawing: its classes of style, and its commands."""

    kind: str
    d: str


class Label(NamedTuple):
    """A label beside the drawing, at a percentage from its top or its left."""

    at: float
    text: str


class Key(NamedTuple):
    """An entry of the legend."""

    name: str
    colour: int
    style: str = "line"
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart, ready to be drawn.

    Attributes:
        title: what is drawn, with its unit.
        by: what it is drawn over.
        log: whether the value axis is logarithmic.
        shapes, rows, columns, legend: what is drawn, in order, and the words beside it.
        lost: (percentage from the left, colours) of crosses at the top edge.
        readout: the text that the script shows under the pointer.
        wide: takes a row of its own.
    """

    title: str
    by: str
    log: bool
    shapes: list[Mark]
    rows: list[Label]
    columns: list[Label]
    legend: list[Key]
    lost: list[tuple[float, list[int]]]
    readout: dict[str, Any]
    wide: bool


@dataclass(frozen=True)
class Axis:
    """Maps values to 0..1, with ticks and their labels."""

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
        ticks = [g for g in ticks if f"{g:e}"[0] in "15"]
    if len(ticks) > 8:
        decades = [g for g in ticks if f"{g:e}"[0] == "1"]
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


TINY = 1e-290  # smaller values are drawn at 0, since a power of ten below them would underflow


def value_axis(values: Sequence[float], *, zero: bool = False) -> Axis:
    """Logarithmic where the values are positive and span a factor of 30 or more, so that the end of a curve is seen."""
    values = [value if abs(value) > TINY else 0.0 for value in values]
    if not zero and min(values) > 0 and max(values) >= 30 * min(values):
        return log_axis(values)
    return linear_axis(values, zero=zero)


def smooth(points: Sequence[Measured], share: float = 0.04) -> list[Measured]:
    """Exponential moving average over about `share` of the points, unbiased at the start (Adam's correction)."""
    keep = 1 - 1 / max(1.0, share * len(points))
    total = weight = 0.0
    smoothed = []
    for step, value in points:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(Measured(step, total / weight))
    return smoothed


def thin(points: Sequence[Measured], most: int = MOST_POINTS) -> list[Measured]:
    """At most `most` points that draw the same picture: the ends, and the extremes of equal intervals."""
    if len(points) <= most:
        return list(points)
    intervals = (most - 2) // 2
    inner = points[1:-1]
    bounds = [len(inner) * i // intervals for i in range(intervals + 1)]
    kept = []
    for start, end in pairwise(bounds):
        piece = sorted(inner[start:end], key=lambda point: point.value)
        kept += sorted({piece[0], piece[-1]})
    return [points[0], *kept, points[-1]]


def chart(
    title: str, series: Sequence[Series], *, by: str = "step", zero: bool = False, wide: bool = False
) -> Chart | None:
    """Draw curves over the step; None where no series has a point.

    Args:
        title: what is drawn, with its unit.
        series: the curves.
        by: what they are drawn over, if not the step: the points' `step` is then that.
        zero: the value axis starts at 0.
        wide: the chart takes a row of its own.
    """
    drawn = [(s, thin(s.points)) for s in series if s.points]
    if not drawn:
        return None
    x = (step_axis if by == "step" else linear_axis)([p.step for _, points in drawn for p in points])
    y = value_axis([p.value for _, points in drawn for p in points], zero=zero)
    shapes = [shape for s, points in drawn for shape in _curve(s, points, x, y)]
    curves = [
        {"name": s.name, "colour": s.colour, "points": [[p.step, _short(p.value)] for p in sorted(points)]}
        for s, points in drawn
    ]
    return _chart(title, by, x, y, shapes, curves, _legend(series), wide=wide)


def spread_chart(title: str, by: str, spreads: Sequence[Spread]) -> Chart | None:
    """Draw repeats over `by`, on a log axis; None where there is no value. The lowest value of all is ringed."""
    values = [v for s in spreads for there in s.values.values() for v in there]
    if not values:
        return None
    x, y = _tried_axis({x for s in spreads for x in (*s.values, *s.lost)}), value_axis(values)
    shapes = [shape for s in spreads for shape in _spread(s, x, y, min(values))]
    curves = [{"name": s.name, "colour": s.colour, "points": _read_out(s, y.hi)} for s in spreads]
    lost = [
        (round(100 * x.at(at), 2), [s.colour for s in spreads if s.lost.get(at)])
        for at in sorted({at for s in spreads for at in s.lost})
    ]
    legend = [Key(s.name, s.colour) for s in spreads if s.values and len(spreads) > 1]
    legend += [Key("failed", 0, "cross")] if lost else []
    return _chart(title, by, x, y, shapes, curves, legend, lost, wide=True)


def _chart(
    title: str,
    by: str,
    x: Axis,
    y: Axis,
    shapes: Sequence[Mark],
    curves: Sequence[dict],
    legend: list[Key],
    lost: Sequence[tuple[float, list[int]]] = (),
    *,
    wide: bool,
) -> Chart:
    """A chart from what is drawn (`shapes`, `lost`) and what the read-out says (`curves`)."""
    grid = Mark("grid", "".join(f"M0 {HEIGHT * (1 - y.at(t)):.1f}h{WIDTH}" for t in y.ticks))
    return Chart(
        title=title,
        by=by,
        log=y.log,
        shapes=[grid, *shapes],
        rows=[Label(round(100 * (1 - y.at(t)), 2), y.label(t)) for t in y.ticks],
        columns=[Label(round(100 * x.at(t), 2), x.label(t)) for t in x.ticks],
        legend=legend,
        lost=list(lost),
        readout={"x": [x.lo, x.hi], "log": x.log, "by": by, "series": curves},
        wide=wide,
    )


def _curve(series: Series, points: Sequence[Measured], x: Axis, y: Axis) -> list[Mark]:
    at = [(f"{WIDTH * x.at(p.step):.1f}", f"{HEIGHT * (1 - y.at(p.value)):.1f}") for p in points]
    colour = f"c{series.colour}"
    shapes = [Mark(f"line {series.style} {colour}", "M" + "L".join(" ".join(xy) for xy in at))]
    # A path of zero length with round caps is a dot that scaling does not distort.
    if series.style == "dots" or len(points) == 1:
        shapes.append(Mark(f"dot {colour}", "".join(f"M{a} {b}h0" for a, b in at)))
    marked = [f"M{a} {b}h0" for p, (a, b) in zip(points, at) if p.step == series.mark]
    return [*shapes, *(Mark(f"{kind} {colour}", marked[0]) for kind in ("ring", "hole", "dot") if marked)]


def _spread(spread: Spread, x: Axis, y: Axis, best: float) -> list[Mark]:
    def place(at, value):
        return f"{WIDTH * x.at(at):.1f} {HEIGHT * (1 - y.at(value)):.1f}"

    def line(points: Iterable[tuple[float, float]]):
        return "M" + "L".join(place(*point) for point in points)

    def dots(points: Iterable[tuple[float, float]]):
        return "".join(f"M{place(*point)}h0" for point in points)

    repeats = sorted(spread.values.items())
    if not repeats:
        return []
    edge = [(at, min(there)) for at, there in repeats] + [(at, max(there)) for at, there in reversed(repeats)]
    every = [(at, value) for at, there in repeats for value in there]
    paths = [
        ("band", line(edge) + "Z" if len(every) > len(repeats) else ""),
        ("line", line((at, statistics.fmean(there)) for at, there in repeats)),
        ("dot", dots(every)),
        *((kind, dots(point for point in every if point[1] == best)) for kind in ("ring", "hole", "dot")),
    ]
    return [Mark(f"{kind} c{spread.colour}", d) for kind, d in paths if d]


def _read_out(spread: Spread, top: float) -> list[list]:
    """[x, mean, its text, a note] at each x; an x without any result is placed at the `top`."""
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


def _legend(series: Sequence[Series]) -> list[Key]:
    """The coloured curves by name, and grey ones together, if there are more than a few."""
    if len(series) == 1 and not series[0].note:
        return []  # the title says it
    grey = [s for s in series if s.points and not s.colour]
    together = len(grey) > 3
    named = [s for s in series if s.points and s.colour] + ([] if together else grey)
    keys = [Key(s.name, s.colour, s.style, s.note) for s in named]
    return [*keys, Key(f"{len(grey)} others", 0, grey[0].style)] if together else keys


def _short(value: float) -> float:
    return float(f"{value:.5g}")
