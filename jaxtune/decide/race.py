"""A sequential paired test: candidates are measured on more and more rows, and one that has lost is stopped.

Each candidate is compared with the leader on the same rows after a quarter, half and all of them, at a third of the
level each (Bonferroni), so that a candidate as good as the leader is stopped by chance in fewer than 5% of races.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxtune.evaluate import statistics

FEWEST = 40  # rows of a look


class Raced(NamedTuple):
    """How far a candidate was measured. `stopped`: a sentence where that was not to the end."""

    scores: list[float]
    stopped: str | None


def looks(rows: int) -> list[int]:
    """After how many rows a candidate is compared with the leader: a quarter, half and all, but not below FEWEST."""
    return sorted({rows} | {n for n in (rows // 4, rows // 2) if n >= FEWEST})


def race(measure: Callable[[int, int], Sequence[float]], rows: int, leader: Sequence[float] | None) -> Raced:
    """Measure a candidate until it has lost against the leader, or on all rows.

    Args:
        measure: (start, end) -> the scores of these rows.
        rows: how many there are.
        leader: the scores of the leader, of the first rows or all; None: there is none yet.
    """
    scores: list[float] = []
    stops = looks(rows)
    level = (1 - statistics.LEVEL) / len(stops)
    for stop in stops:
        scores += measure(len(scores), stop)
        if leader is None or stop == rows or len(leader) < stop:
            continue
        found = compared(leader[:stop], scores)
        if found.difference.value < 0 and found.p is not None and found.p < level:
            return Raced(scores, f"behind after {stop:,} rows (p={found.p:.3g} below {level:.3g})")
    return Raced(scores, None)


def compared(first: Sequence[float], second: Sequence[float]) -> statistics.Paired:
    """The paired comparison of two candidates on the rows that both were measured on: second minus first."""
    n = min(len(first), len(second))
    a, b = np.asarray(first[:n], float), np.asarray(second[:n], float)
    result = statistics.paired(a, b)
    if is_share(a) and is_share(b):
        edge = statistics.paired_at_the_edge(result, a, b)
        base, tuned = (statistics.exact_at_the_edge(i, n) for i in (result.base, result.tuned))
        result = result._replace(difference=edge, base=base, tuned=tuned)
    return result


def interval(scores: Sequence[float]) -> statistics.Interval:
    """The mean score with its interval."""
    values = np.asarray(scores, float)
    found = statistics.interval(values)
    return statistics.exact_at_the_edge(found, len(values)) if is_share(values) else found


def is_share(values: np.ndarray) -> bool:
    """Whether each row is right or wrong."""
    return bool(np.isin(values, (0.0, 1.0)).all())
