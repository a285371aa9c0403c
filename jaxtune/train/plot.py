"""Curves in a terminal: braille cells, two dots wide and four high."""

import itertools
from collections.abc import Mapping, Sequence

from rich.text import Text

BITS = ((1, 2, 4, 64), (8, 16, 32, 128))  # of Unicode's braille patterns, by column and row of a cell
STYLES = ("cyan", "yellow", "magenta", "green", "blue", "red")
LABELS = 9  # characters left of the canvas

Points = Sequence[tuple[float, float]]


def plot(series: Mapping[str, Points], last: float, width: int = 80, height: int = 10) -> Text:
    """Return curves of (x, y) points over x from 0 to `last`, names below; where curves share a cell the last one wins.

    Args:
        series: name -> points in the order of x, y finite.
        last: where the x axis ends.
        width: in characters, with labels.
        height: in lines, with the legend.
    """
    columns, rows = max(width - LABELS, 1), max(height - 1, 1)
    values = [y for points in series.values() for _, y in points]
    low, high = min(values, default=0.0), max(values, default=0.0)
    cells: dict[tuple[int, int], tuple[int, str]] = {}
    for (_, points), style in zip(series.items(), _styles(len(series))):
        dots = [(_scale(x, 0, last, 2 * columns), 4 * rows - 1 - _scale(y, low, high, 4 * rows)) for x, y in points]
        for x, y in _joined(dots):
            at = y // 4, x // 2
            cells[at] = cells.get(at, (0, ""))[0] | BITS[x % 2][y % 4], style
    text = Text(no_wrap=True)
    for row in range(rows):
        label = {0: f"{high:.4g}", rows - 1: f"{low:.4g}"}.get(row, "")
        text.append(f"{label:>{LABELS - 2}} |")
        for column in range(columns):
            bits, style = cells.get((row, column), (0, ""))
            text.append(chr(0x2800 + bits) if bits else " ", style)
        text.append("\n")
    text.append(" " * LABELS)
    for name, style in zip(series, _styles(min(len(series), len(STYLES)))):
        text.append(f"{name}  ", style)
    return text


def _styles(n: int) -> list[str]:
    return [STYLES[i % len(STYLES)] for i in range(n)]


def _scale(value: float, low: float, high: float, size: int) -> int:
    """Where a value lies among `size` dots."""
    share = (value - low) / (high - low) if high > low else 0.0
    return min(size - 1, max(0, round(share * (size - 1))))


def _joined(dots: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The dots, and those of straight lines between neighbours."""
    found = list(dots[:1])
    for (x0, y0), (x1, y1) in itertools.pairwise(dots):
        n = max(abs(x1 - x0), abs(y1 - y0), 1)
        found += [(round(x0 + (x1 - x0) * i / n), round(y0 + (y1 - y0) * i / n)) for i in range(1, n + 1)]
    return found
