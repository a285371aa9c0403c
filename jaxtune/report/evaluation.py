"""eval.json as tables: its numbers in words for terminals, cards and pages, and the sections of a page."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError
from jaxtune.report.html import Html, h, join, number

MODELS = ("base", "tuned", "model")
MOST_CONFUSED = 15  # labels up to which a confusion matrix is shown
BADGES = {"better": "good", "worse": "bad", "no evidence": "even"}
COLOURS = {"base": 0, "tuned": 1, "model": 1}


def read_evaluation(folder: Path, step: int | None = None) -> dict[str, Any]:
    """Read the eval.json of a run: `{"held_out": ..., "tasks": ...}`, each if it was measured; {} without the file.

    Args:
        step: the last one of the run; what was measured at another one, before the run went on, is left out.

    Raises:
        UserError: it is not what `jaxtune eval` writes.
    """
    file = folder / "eval.json"
    if not file.is_file():
        return {}
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        held_out, tasks = whole.get("held_out"), whole.get("tasks")
        if held_out is not None:
            cells = [held_out["metrics"], *held_out.get("groups", {}).get("metrics", {}).values()]
            for entry in (entry for entries in cells for entry in entries.values()):
                _check_entry(entry)
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
    """better, worse or no evidence, and how sure."""
    return f"{entry['verdict']} {_p(entry)}".strip()


def _p(entry: Mapping[str, Any]) -> str:
    p = entry["p"]
    return "" if p is None else f"(p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})"


def tally(entries: Iterable[Mapping[str, Any]]) -> str:
    """How the metrics came out: "6 of 8 metrics better than the base, 1 worse, 1 without evidence"; or nothing."""
    told = [entry["verdict"] for entry in entries if "verdict" in entry]
    counts = {name: told.count(name) for name in BADGES}
    if not told:
        return ""
    parts = [f"{counts['better']} of {len(told)} metrics are better than the base's"]
    parts += [f"{counts['worse']} worse"] * bool(counts["worse"])
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


def held_out_table(held_out: Mapping[str, Any]) -> Html | None:
    """The metrics with intervals, drawn and in numbers, and what the paired test says."""
    entries = held_out["metrics"]
    if not entries:
        return None
    names = who(entries)
    both = len(names) == 2
    heads = [f"on {held_out['rows']:,} held-out rows", "", *names, *(["difference", "verdict"] if both else [])]
    rows = [
        [
            entry["label"],
            whiskers(entry),
            *(_figure(value(entry, n)) for n in names),
            *([_figure(difference(entry)), badge(entry)] if both else []),
        ]
        for entry in entries.values()
    ]
    note = "Brackets and bars: 95% bootstrap intervals over the rows."
    if both:
        note += " Verdicts: a paired randomisation test, 5%. Differences of shares are in points."
    return join([_table(heads, rows), h("p", note, class_="note"), *(_note(n) for n in held_out.get("notes", ()))])


def group_tables(held_out: Mapping[str, Any]) -> Html | None:
    """Every metric by group, one table each, the first ones open."""
    groups = held_out.get("groups")
    if not groups:
        return None
    entries, names = held_out["metrics"], who(held_out["metrics"])
    both = len(names) == 2
    parts = []
    for name, cells in groups["metrics"].items():
        heads = [str(groups["column"]), "rows", "", *names, *(["verdict"] if both else [])]
        span = _span(cells.values())
        rows = [
            [
                group,
                f"{cell['rows']:,}",
                whiskers(cell, span),
                *(_figure(value(cell, n)) for n in names),
                *([badge(cell)] if both else []),
            ]
            for group, cell in cells.items()
        ]
        opened = not parts or name == "accuracy"
        parts.append(h("details", h("summary", entries[name]["label"]), _table(heads, rows), open=opened))
    note = "Verdicts by group are corrected for the number of groups (Holm)." if both else None
    return join([*parts, h("p", note, class_="note") if note else None])


def confusion_tables(held_out: Mapping[str, Any]) -> Html | None:
    """Confusion matrices: a row an expected label, a column a predicted one."""
    labels = held_out.get("labels")
    if not labels or len(labels["names"]) > MOST_CONFUSED:
        return None
    parts = []
    for model, counts in labels["confusion"].items():
        rows = [
            [label, *(_shaded(count, sum(row)) for count in row)]
            for label, row in zip(labels["names"], counts, strict=True)
        ]
        heads = ["expected \\ predicted", *labels["names"]]
        parts.append(join([h("h3", model), _table(heads, rows, right=1)]))
    return join(parts)


def task_table(tasks: Mapping[str, Any]) -> Html | None:
    """The results of lm-evaluation-harness."""
    results = tasks["results"]
    if not results:
        return None
    rows = [
        [task, metric, *(_task_value(results[model].get(task, {}).get(metric)) for model in results)]
        for task, metrics in next(iter(results.values())).items()
        for metric in metrics
    ]
    return _table(["task", "metric", *results], rows, right=2)


def badge(entry: Mapping[str, Any]) -> Html:
    """The verdict as a badge, with its p beside it."""
    return join(
        [h("span", entry["verdict"], class_=f"badge flush {BADGES[entry['verdict']]}"), h("small", f" {_p(entry)}")]
    )


def _figure(words: str) -> Html:
    """A value, and its interval smaller beneath it."""
    head, bracket, bounds = words.partition(" [")
    return h("div", head, h("small", f"[{bounds}") if bracket else None, class_="figure")


def whiskers(entry: Mapping[str, Any], span: tuple[float, float] | None = None) -> Html:
    """Each model's value as a dot in the bar of its interval, from 0 to 1 for shares, else over `span`."""
    low, high = (0.0, 1.0) if entry["share"] else span or _span([entry])
    width = (high - low) or 1.0

    def at(x: float) -> float:
        return round(100 * min(1.0, max(0.0, (x - low) / width)), 2)

    drawn = []
    for name in MODELS:
        if name not in entry:
            continue
        v = entry[name]
        left, right = (v["value"] if v[b] is None else v[b] for b in ("low", "high"))
        bar = h("i", style=f"left:{at(left)}%;width:{max(0.0, at(right) - at(left)):.2f}%")
        drawn.append(h("span", bar, h("b", style=f"left:{at(v['value'])}%"), class_=f"c{COLOURS[name]}", title=name))
    return h("div", *drawn, class_="whiskers", role="img", aria_label="values with their intervals")


def _span(entries: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    values = [
        entry[name][b]
        for entry in entries
        for name in MODELS
        if name in entry
        for b in ("low", "value", "high")
        if entry[name][b] is not None
    ]
    return min(values), max(values)


def _shaded(count: int, total: int) -> Html:
    return h("div", f"{count:,}", class_="shade", style=f"--a:{0.75 * count / total if total else 0:.3f}")


def _task_value(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    error = entry.get("stderr")
    return f"{entry['value']:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def _note(text: Any) -> Html:
    return h("p", text, class_="note")


def _table(heads: list[str], rows: list[list[Any]], right: int | None = None) -> Html:
    from jaxtune.report.page import table

    return table(heads, rows, right=right)
