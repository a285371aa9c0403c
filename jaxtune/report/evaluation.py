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
    """Read the eval.json of a run: {part: ...}, those of `PARTS` that were measured; {} without the file.

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
        parts = {name: whole[name] for name in PARTS if whole.get(name)}
        for name, part in parts.items():
            PARTS[name](part)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not what jaxtune eval writes ({type(error).__name__}: {error}); remove it and evaluate again."
        ) from None
    return {name: part for name, part in parts.items() if step is None or part.get("step", step) == step}


def _check_rows(part: Any) -> None:
    for entries in (part["metrics"], *part.get("groups", {}).get("metrics", {}).values()):
        check_metrics(entries)
    gaps(part)
    for flips in part.get("flips", {}).values():
        str(flips["label"]), int(flips["rows"]), int(flips["lost"]), int(flips["gained"]), float(flips["p"])
        int(flips["right"]["base"]), int(flips["right"]["tuned"]), BADGES[flips["verdict"]]
    int(part["rows"])


def _check_confidence(part: Any) -> None:
    _check_rows(part)
    for curves in part["risk_coverage"].values():
        for points in curves.values():
            if not all(math.isfinite(x) for point in points for x in point):
                raise ValueError("a risk is not finite")


def _check_tasks(part: Any) -> None:
    for metrics in (m for task in part["results"].values() for m in task.values()):
        all(float(entry["value"]) for entry in metrics.values())


def _check_frontier(part: Any) -> None:
    losses = part["losses"]
    str(part["why"]), int(part["rows"]), int(part["general_rows"])
    for name in ("task", "general"):
        if len(losses[name]) != len(part["strengths"]):
            raise ValueError("not one loss for each strength")
        if not all(math.isfinite(i["value"]) for i in losses[name]):
            raise ValueError("a loss is not finite")
    part["strengths"].index(0.0), part["strengths"].index(1.0)
    strengths(part)


def _check_memory(part: Any) -> None:
    str(part["why"]), int(part["rows"]), int(part["held_out_rows"]), str(part["memorised"])
    memory_tables(part)


PARTS: dict[str, Callable[[Any], None]] = {  # of eval.json -> what raises if it is not as `jaxtune eval` makes it
    "held_out": _check_rows,
    "forgetting": _check_rows,
    "confidence": _check_confidence,
    "frontier": _check_frontier,
    "memory": _check_memory,
    "tasks": _check_tasks,
}


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
    """A model's value with its interval; nothing where it has none."""
    if name not in entry:
        return ""
    return _with_interval(entry[name], _show(entry), "%" if entry["share"] else "")


def difference(entry: Mapping[str, Any]) -> str:
    """The difference with its interval, signed; of shares in points; nothing where there is none."""
    if "difference" not in entry:
        return ""
    show = _show(entry)
    return _with_interval(entry["difference"], lambda x: f"{'+' if x >= 0 else '−'}{show(abs(x))}")


def verdict(entry: Mapping[str, Any]) -> str:
    """better, worse or no evidence, with the p-value; nothing without a test."""
    if "verdict" not in entry:
        return ""
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
        figures = [value(entry, n) for n in names]
        figures += [difference(entry)] if len(names) == 2 else []
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


def gaps(part: Mapping[str, Any]) -> list[str]:
    """A sentence on how far the groups of each metric are apart, and on groups that were not trained on."""
    groups = part.get("groups") or {}
    found = []
    if absent := groups.get("absent_from_training"):
        found.append(f"No training row is of {groups['column']} {', '.join(map(str, absent))}.")
    for metric, entry in groups.get("gaps", {}).items():
        cell = part["metrics"][metric]
        show, unit = _show(cell), " points" if cell["share"] else ""
        parts = [
            f"{name} {_with_interval(entry[name], show, unit)} (highest {entry[name]['highest']}, lowest "
            f"{entry[name]['lowest']}; by chance p = {entry[name]['p']:.3g})"
            for name in MODELS
            if name in entry
        ]
        change = f"; change {difference(entry | {'share': cell['share']})}" if "difference" in entry else ""
        found.append(f"Gap of {cell['label']} between groups: {', '.join(parts)}{change}.")
    return found


def flips(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table of answers that flipped, each with its badge and how sure the test is."""
    found = part.get("flips", {}).values()
    return [entry | {"badge": BADGES[entry["verdict"]], "how_sure": _p(entry)} for entry in found]


class Counted(NamedTuple):
    """A table in words: what stands over its first column, over the others, and its rows."""

    title: str
    heads: list[str]
    rows: list[list[str]]


def strengths(part: Mapping[str, Any]) -> Counted:
    """A frontier as a table; its last column is "chosen" or ""."""
    scales, losses, score = part["strengths"], part["losses"], part.get("score")
    general = [i["value"] for i in losses["general"]]
    cost = [loss - general[scales.index(0.0)] for loss in general]
    heads = ["loss on the task", "loss on general text", "gain kept", "general text against the base", ""]
    rows = []
    for i, scale in enumerate(scales):
        row = [f"{scale:g}"]
        if score:
            found = score["values"][i]
            row.append("" if found is None else value({"at": found, "share": score["share"]}, "at"))
        row += [_with_interval(losses[name][i], number) for name in ("task", "general")]
        kept = part.get("kept", [None] * len(scales))[i]
        row.append("" if kept is None else _with_interval(kept, lambda x: f"{100 * x:.0f}", "%"))
        row.append(f"{'+' if cost[i] >= 0 else '−'}{number(abs(cost[i]))}")
        rows.append([*row, "chosen" if scale == part["chosen"] else ""])
    return Counted("scale", [score["label"], *heads] if score else heads, rows)


MEMBERSHIP = {
    "base": "by the loss under the base",
    "tuned": "by the loss under the tuned model",
    "model": "by the loss",
    "gain": "by how much tuning lowered the loss",
}


def memory_tables(part: Mapping[str, Any]) -> list[Counted]:
    """What was measured of a run's memory: membership, continuations and canaries, as far as there are any."""
    auc = [[MEMBERSHIP[by], _with_interval(found, number)] for by, found in part["membership"].items()]
    tables = [Counted("which rows were trained on, told", ["AUC"], auc)]
    if found := part["verbatim"]:
        models = [name for name in MODELS if name in found[0]]
        rows = []
        for row in found:
            shares = [f"{row[name]:,} ({row[name] / row['rows']:.0%})" for name in models]
            seen = row["group"] if row["group"] == "held out" else f"in the training data {row['group']}"
            rows.append([seen, f"{row['rows']:,}", *shares])
        tables.append(Counted("go on word for word", ["rows", *models], rows))
    if found := part["canaries"]:
        models = [name for name in MODELS if name in found[0]]
        often = {0: "never", 1: "once"}
        rows = [
            [often.get(r["times"], f"{r['times']:,} times"), f"{r['count']}", *(f"{r[n]:.1f}" for n in models), _p(r)]
            for r in found
        ]
        tables.append(Counted("exposure of canaries, bits", ["canaries", *models, "by chance"], rows))
    return tables


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
