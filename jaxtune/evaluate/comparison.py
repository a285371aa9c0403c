"""Per-row values of a metric for one model or two, compared: intervals, a paired test and a verdict, also by group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.evaluate import statistics


@dataclass(frozen=True)
class Column:
    """Per-row values of one metric for each model, on the rows where it applies to all of them.

    values: name of the model -> [N, ...]; at: the rows, i64[N]; statistic: values -> float.
    """

    label: str
    better: int
    share: bool
    statistic: statistics.Statistic
    values: dict[str, np.ndarray]
    at: np.ndarray


def compare(found: Mapping[str, Column]) -> dict[str, Any]:
    """For each metric the value of each model with its interval; for two models also the difference and a verdict."""
    return {name: _compared(column, np.arange(len(column.at))) for name, column in found.items()}


def compare_groups(found: Mapping[str, Column], groups: Sequence[str]) -> dict[str, Any]:
    """The same for each group, with p-values adjusted over the groups of a metric (Holm).

    Returns:
        {"rows": {group: n}, "metrics": {metric: {group: ...}}}, without groups where a metric applies to no row.
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
    return {"rows": {group: sum(g == group for g in groups) for group in names}, "metrics": result}


def _compared(column: Column, at: np.ndarray) -> dict[str, Any]:
    values = {name: v[at] for name, v in column.values.items()}
    entry = {"label": column.label, "better": column.better, "share": column.share, "rows": len(at)}

    def as_json(interval):
        share = column.share and column.better > 0
        return (statistics.exact_at_the_edge(interval, len(at)) if share else interval)._asdict()

    if set(values) != {"base", "tuned"}:
        [(name, alone)] = values.items()
        return entry | {name: as_json(statistics.interval(alone, column.statistic))}
    result = statistics.paired(values["base"], values["tuned"], column.statistic)
    verdict = statistics.verdict(result.difference.value, result.p, column.better)
    difference = result.difference
    if column.share:
        difference = statistics.paired_at_the_edge(result, values["base"], values["tuned"])
    models = {"base": as_json(result.base), "tuned": as_json(result.tuned), "difference": difference._asdict()}
    return entry | models | {"p": result.p, "verdict": verdict}
