"""Per-row values of a metric for one model or two, compared: intervals, a paired test and a verdict, also by group."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.evaluate import statistics

FEWEST = 5  # rows of a group that counts in a gap
MOST_DRAWN = 2**23  # resampled rows of a gap, in memory


@dataclass(frozen=True)
class Column:
    """Per-row values of one metric for each model, on the rows where it applies to all of them.

    values: name of the model -> [N, ...]; at: the rows, i64[N]; statistic: values -> float; interval: values -> the
    interval of a model's value, where the bootstrap's does not hold.
    """

    label: str
    better: int
    share: bool
    statistic: statistics.Statistic
    values: dict[str, np.ndarray]
    at: np.ndarray
    interval: Callable[[np.ndarray], statistics.Interval] | None = None


def compare(found: Mapping[str, Column]) -> dict[str, Any]:
    """For each metric the value of each model with its interval; for two models also the difference and a verdict."""
    return {name: _compared(column, np.arange(len(column.at))) for name, column in found.items()}


def compare_groups(found: Mapping[str, Column], groups: Sequence[str]) -> dict[str, Any]:
    """The same for each group, with p-values adjusted over the groups of a metric (Holm).

    Returns:
        {"rows": {group: n}, "metrics": {metric: {group: ...}}, "gaps": {metric: ...}}, without groups where a metric
        applies to no row; see `gap` for the last.
    """
    names = sorted(set(groups))
    result: dict[str, Any] = {}
    for name, column in found.items():
        own = np.array([groups[i] for i in column.at], object)
        here = {group: np.flatnonzero(own == group) for group in names}
        cells = {group: _compared(column, at) for group, at in here.items() if len(at)}
        adjusted = statistics.holm([cell.get("p") for cell in cells.values()])
        for cell, p in zip(cells.values(), adjusted, strict=True):
            if "p" in cell:
                cell["p"] = p
                cell["verdict"] = statistics.verdict(cell["difference"]["value"], p, column.better)
        result[name] = cells
    rows = {group: sum(g == group for g in groups) for group in names}
    gaps = {name: apart for name, column in found.items() if (apart := gap(column, groups))}
    return {"rows": rows, "metrics": result, "gaps": gaps}


def gap(column: Column, groups: Sequence[str], resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """How far the groups of a metric are apart: the highest value minus the lowest, of groups with `FEWEST` rows.

    Rows are resampled within their groups, the same ones for both models. Chance alone makes a gap: `p` is how likely
    one as large is if rows were in groups by chance, by permutation of the groups.

    Args:
        column: the metric's values.
        groups: of all rows.
        resamples: of rows, and permutations.
        seed: of both.

    Returns:
        {model: {value, low, high, p, highest, lowest}}, and for two models their difference as {value, low, high}; {}
        for fewer than two such groups, and for metrics of which neither more nor less is better.
    """
    own = np.array([groups[i] for i in column.at], object)
    resamples = max(99, min(resamples, MOST_DRAWN // max(1, len(own))))
    names, counts = np.unique(own.astype(str), return_counts=True)
    names = names[counts >= FEWEST]
    if len(names) < 2 or not column.better:
        return {}
    kept = np.isin(own.astype(str), names)
    group = np.searchsorted(names, own[kept].astype(str))
    members = [np.flatnonzero(group == g) for g in range(len(names))]
    found: dict[str, Any] = {}
    draws = {}
    for who, values in column.values.items():
        values = values[kept]
        rng = np.random.default_rng([seed, 3])  # the same rows for every model
        means = np.array([float(column.statistic(values[at][None])[0]) for at in members])
        drawn = np.stack(
            [column.statistic(values[at][rng.integers(0, len(at), (resamples, len(at)))]) for at in members]
        )
        chance = np.stack(
            [column.statistic(values[order]) for order in _permuted(rng, members, len(values), resamples)]
        )
        value = float(np.ptp(means))
        draws[who] = np.ptp(drawn, axis=0)
        as_large = (np.ptp(chance, axis=0) >= value * (1 - 1e-9)).sum()
        found[who] = _with_ends(value, draws[who]) | {
            "p": (int(as_large) + 1) / (resamples + 1),
            "highest": str(names[means.argmax()]),
            "lowest": str(names[means.argmin()]),
        }
    if {"base", "tuned"} <= found.keys():
        change = found["tuned"]["value"] - found["base"]["value"]
        found["difference"] = _with_ends(change, draws["tuned"] - draws["base"])
    return found


def _permuted(
    rng: np.random.Generator, members: Sequence[np.ndarray], rows: int, resamples: int
) -> Iterator[np.ndarray]:
    """For each group the rows [R, n] that fall into it where all rows are dealt out by chance."""
    order = rng.permuted(np.tile(np.arange(rows), (resamples, 1)), axis=1)
    yield from np.split(order, np.cumsum([len(at) for at in members])[:-1], axis=1)


def _with_ends(value: float, draws: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(draws, [(1 - statistics.LEVEL) / 2, (1 + statistics.LEVEL) / 2])
    return {"value": value, "low": float(low), "high": float(high)}


def _compared(column: Column, at: np.ndarray) -> dict[str, Any]:
    values = {name: v[at] for name, v in column.values.items()}
    entry = {"label": column.label, "better": column.better, "share": column.share, "rows": len(at)}

    def as_json(interval, who):
        if column.interval is not None:
            return column.interval(values[who])._asdict()
        return (statistics.exact_at_the_edge(interval, len(at)) if column.share else interval)._asdict()

    if set(values) != {"base", "tuned"}:
        [(name, alone)] = values.items()
        return entry | {name: as_json(statistics.interval(alone, column.statistic), name)}
    result = statistics.paired(values["base"], values["tuned"], column.statistic)
    verdict = statistics.verdict(result.difference.value, result.p, column.better)
    difference = result.difference
    if column.share:
        difference = statistics.paired_at_the_edge(result, values["base"], values["tuned"])
    models = {
        "base": as_json(result.base, "base"),
        "tuned": as_json(result.tuned, "tuned"),
        "difference": difference._asdict(),
    }
    return entry | models | {"p": result.p, "verdict": verdict}
