"""eval.json as tables: its numbers as text for terminals, cards and pages, and the coordinates of bars on a page."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.errors import UserError
from jaxtune.reading import read_json
from jaxtune.report.words import number

MODELS = ("base", "tuned", "model")
MOST_CONFUSED = 12  # labels at most for a full confusion matrix
LISTED = 15  # confusions to list otherwise
BADGES = {"better": "good", "worse": "bad", "changed": "even", "no evidence": "even"}
COLOURS = {"base": 0, "tuned": 1, "model": 1}


def read_evaluation(folder: Path, step: int | None = None) -> dict[str, Any]:
    """Read the eval.json of a run: `{"held_out": ..., "tasks": ...}`, each if it was measured; {} without the file.

    Args:
        folder: of the run.
        step: the run's last step; results of an earlier one, from before the run was extended, are left out.

    Raises:
        UserError: it is not what `jaxtune eval` writes.
    """
    file = folder / "eval.json"
    if not file.is_file():
        return {}
    try:
        whole = read_json(file, halves=True)
        held_out, tasks = whole.get("held_out"), whole.get("tasks")
        if held_out is not None:
            for entries in (held_out["metrics"], *held_out.get("groups", {}).get("metrics", {}).values()):
                check_metrics(entries)
            int(held_out["rows"])
        if tasks is not None:
            for metrics in (m for task in tasks["results"].values() for m in task.values()):
                all(float(entry["value"]) for entry in metrics.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not what jaxtune eval writes ({type(error).__name__}: {error}); remove it and evaluate again."
        ) from None
    parts = {"held_out": held_out, "tasks": tasks}
    return {name: part for name, part in parts.items() if part and (step is None or part.get("step", step) == step)}


def check_metrics(entries: dict[str, Any]) -> dict[str, Any]:
    """Return entries {metric: its values}; raise an error of any kind if one is not as `jaxtune eval` writes it."""
    for entry in entries.values():
        _check_entry(entry)
    return entries


def _check_entry(entry: Any) -> None:
    str(entry["label"]), bool(entry["share"]), int(entry["rows"])
    parts = [name for name in MODELS if name in entry]
    if "p" in entry:
        parts.append("difference")
        if entry["verdict"] not in BADGES or {"base", "tuned"} - entry.keys():
            raise ValueError("a verdict without its models")
    for interval in (entry[name] for name in parts):
        bounds = [interval["value"], *(interval[b] for b in ("low", "high") if interval[b] is not None)]
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in bounds):
            raise ValueError(f"no finite numbers in {interval}")


# --------------------------------------------------------------------------------------------------------------- words


def who(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The models that were measured."""
    return [name for name in MODELS if any(name in entry for entry in entries.values())]


def value(entry: Mapping[str, Any], name: str) -> str:
    """A model's value with its interval."""
    return _with_interval(entry[name], _show(entry), "%" if entry["share"] else "")


def difference(entry: Mapping[str, Any]) -> str:
    """The difference with its interval, signed; of shares in points."""
    show = _show(entry)
    return _with_interval(entry["difference"], lambda x: f"{'+' if x >= 0 else '−'}{show(abs(x))}")


def verdict(entry: Mapping[str, Any]) -> str:
    """better, worse or no evidence, with the p-value."""
    return f"{entry['verdict']} {_p(entry)}".strip()


def _p(entry: Mapping[str, Any]) -> str:
    p = entry["p"]
    return "" if p is None else f"(p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})"


def tally(entries: Iterable[Mapping[str, Any]]) -> str:
    """A summary of the verdicts: "6 of 8 metrics better than the base, 1 worse, 1 without evidence"; or nothing."""
    verdicts = [entry["verdict"] for entry in entries if "verdict" in entry]
    counts = {name: verdicts.count(name) for name in BADGES}
    if not verdicts:
        return ""
    parts = [f"{counts['better']} of {len(verdicts)} metrics are better than the base's"]
    parts += [f"{counts['worse']} worse"] * bool(counts["worse"])
    parts += [f"{counts['changed']} changed"] * bool(counts["changed"])
    parts += [f"{counts['no evidence']} without evidence of a difference"] * bool(counts["no evidence"])
    return ", ".join(parts)


def _show(entry: Mapping[str, Any]) -> Callable[[float], str]:
    """A share in percent with one decimal, anything else with four digits."""
    return (lambda x: f"{100 * x:.1f}") if entry["share"] else number


def _with_interval(interval: Mapping[str, Any], show: Callable[[float], str], unit: str = "") -> str:
    low, high = interval["low"], interval["high"]
    bounds = "" if low is None or high is None else f" [{show(low)}, {show(high)}]"
    return show(interval["value"]) + unit + bounds


# ---------------------------------------------------------------------------------------------------------- the page


class Bar(NamedTuple):
    """A model's value, the dot, in its interval, the bar; percentages from the left."""

    name: str
    colour: int
    left: float
    width: float
    dot: float


class Line(NamedTuple):
    """A row of a table of results.

    Attributes:
        label: metric or group.
        rows: how many it was measured on.
        bars: the models' intervals.
        figures: (value, interval or "") of each model, and of the difference if there are two.
        verdict, badge, p: the test's verdict, its colour, its p-value; empty without a test.
    """

    label: str
    rows: int
    bars: list[Bar]
    figures: list[tuple[str, str]]
    verdict: str = ""
    badge: str = ""
    p: str = ""


def lines(entries: Mapping[str, Mapping[str, Any]], span: tuple[float, float] | None = None) -> list[Line]:
    """The rows of a table, by label. `span`: the range of the bars, for metrics that are not shares."""
    names = who(entries)
    found = []
    for label, entry in entries.items():
        figures = [value(entry, n) if n in entry else "" for n in names]
        figures += [difference(entry) if "difference" in entry else ""] if len(names) == 2 else []
        parted = [figure.partition(" [") for figure in figures]
        tested = (entry["verdict"], BADGES[entry["verdict"]], _p(entry)) if "verdict" in entry else ()
        bars = _bars(entry, span or _span([entry]))
        found.append(Line(label, entry["rows"], bars, [(a, f"[{b}" if b else "") for a, _, b in parted], *tested))
    return found


def by_label(entries: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    """The rows of a table of metrics."""
    return lines({entry["label"]: entry for entry in entries.values()})


def groups(held_out: Mapping[str, Any]) -> list[tuple[str, list[Line]]]:
    """(metric in words, its rows by group) of each metric."""
    found = held_out.get("groups")
    if not found:
        return []
    metrics = found["metrics"].items()
    return [(held_out["metrics"][name]["label"], lines(cells, _span(cells.values()))) for name, cells in metrics]


class Confusion(NamedTuple):
    """The confusions of a model.

    Attributes:
        model: its name.
        table: of few labels, (label, [(count, share of the row), ...]) for each expected one; else None.
        mistakes: of many labels, the most frequent (expected, predicted, count, count of the expected).
    """

    model: str
    table: list[tuple[str, list[tuple[int, float]]]] | None
    mistakes: list[tuple[str, str, int, int]]


def confusions(held_out: Mapping[str, Any]) -> list[Confusion]:
    """The confusions of each model: all, or the most frequent ones."""
    labels = held_out.get("labels")
    if not labels:
        return []
    names = labels["names"]
    found = []
    for model, counts in labels["confusion"].items():
        if len(names) <= MOST_CONFUSED:
            shares = [[(n, n / sum(row) if n else 0.0) for n in row] for row in counts]
            found.append(Confusion(model, list(zip(names, shares, strict=True)), []))
            continue
        wrong = [(i, j, n) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
        wrong.sort(key=lambda entry: -entry[2])
        most = [(names[i], names[j], n, sum(counts[i])) for i, j, n in wrong[:LISTED]]
        found.append(Confusion(model, None, most))
    return found


def task_rows(tasks: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """(models, rows of task, metric and their values) of lm-evaluation-harness."""
    results = tasks["results"]
    first = next(iter(results.values()), {})
    return list(results), [
        (task, metric, [_task_value(results[model].get(task, {}).get(metric)) for model in results])
        for task, metrics in first.items()
        for metric in metrics
    ]


def _bars(entry: Mapping[str, Any], span: tuple[float, float]) -> list[Bar]:
    """Each model's value and interval, from 0 to 1 for shares, else over `span`."""
    low, high = (0.0, 1.0) if entry["share"] else span
    width = (high - low) or 1.0

    def at(x: float) -> float:
        return round(100 * min(1.0, max(0.0, (x - low) / width)), 2)

    bars = []
    for name in MODELS:
        if name in entry:
            v = entry[name]
            left, right = (v["value"] if v[b] is None else v[b] for b in ("low", "high"))
            bars.append(Bar(name, COLOURS[name], at(left), round(max(0.0, at(right) - at(left)), 2), at(v["value"])))
    return bars


def _span(entries: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    values = [
        entry[name][b]
        for entry in entries
        for name in MODELS
        if name in entry
        for b in ("low", "value", "high")
        if entry[name][b] is not None
    ]
    return (min(values), max(values)) if values else (0.0, 0.0)


def _task_value(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    error = entry.get("stderr")
    return f"{entry['value']:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
