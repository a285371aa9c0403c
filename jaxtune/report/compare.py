"""The page of several runs: their losses in one chart, and a table of the settings that differ with the results."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jaxtune.report.chart import Chart, Series, chart, smooth
from jaxtune.report.evaluation import value
from jaxtune.report.page import reproduce
from jaxtune.report.render import render
from jaxtune.report.run import RunRecord
from jaxtune.report.words import duration, number, percent, setting

COLOURS = 8  # in the palette; runs beyond the best eight are drawn in grey

Cell = str | tuple[Any, str]  # text; or (sort key, text)


class Ranked(NamedTuple):
    """A row of the table of results.

    Attributes:
        name: of the run.
        href: its own page, relative to this one; None if there is none.
        colour: of its curves; None where it has none.
        cells: the columns after the name.
        status: of a point of a sweep.
        best: whether it is the best of all.
    """

    name: str
    href: str | None
    colour: int | None
    cells: list[Cell]
    status: str = ""
    best: bool = False


def comparison_page(runs: Sequence[RunRecord], folder: Path) -> str:
    """Return the HTML that compares `runs`; links are relative to `folder`, where it will be written."""
    names, colours, ranks = labels(runs), _colours(runs), order(runs)
    heads, rows = result_rows(runs)
    return render(
        "comparison.html",
        title=f"{len(runs)} runs",
        kind="comparison",
        summary=_summary(runs, names, ranks[0]),
        heads=heads,
        rows=[
            Ranked(names[i], link(runs[i].folder, folder), colours[i], row[1:])
            for i, row in zip(ranks, rows, strict=True)
        ],
        evaluated=evaluation_rows(runs),
        notes=evaluation_notes(runs),
        charts=_curves(runs, names, colours),
        winner=names[ranks[0]],
        again=reproduce(runs[ranks[0]]),
    )


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """Short distinct names of the runs: their paths relative to their common folder."""
    paths = [run.folder.resolve() for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(common)) for path in paths]


def differences(runs: Sequence[RunRecord]) -> list[str]:
    """Settings in which the runs are not all alike."""
    return [path for path, value in runs[0].settings.items() if any(run.settings[path] != value for run in runs)]


def _score(run: RunRecord) -> tuple[bool, float]:
    """The sort key of a run: its best held-out loss; runs without one come later, by smoothed training loss."""
    best = run.best()
    if best:
        return False, best.value
    losses = smooth(run.series("train/loss"))
    return True, losses[-1].value if losses else math.inf


def _colours(runs: Sequence[RunRecord]) -> list[int]:
    """The best eight runs get a colour each, in the order they were named."""
    best = set(sorted(range(len(runs)), key=lambda i: _score(runs[i]))[:COLOURS])
    slots = iter(range(1, COLOURS + 1))
    return [next(slots) if i in best else 0 for i in range(len(runs))]


def _summary(runs: Sequence[RunRecord], names: Sequence[str], winner: int) -> list[str]:
    differ = differences(runs)
    lines = [f"The runs differ in {', '.join(differ)}." if differ else "The runs have the same settings."]
    best, (_, score) = runs[winner].best(), _score(runs[winner])
    if math.isfinite(score):
        kind, at = ("held-out", f" at step {best.step:,}") if best else ("training", "")
        lines.append(f"{names[winner]} has the lowest {kind} loss, {number(score)}{at}.")
    without = sum(run.best() is None for run in runs)
    if without:
        behind = " and rank after the others" if without < len(runs) else ""
        lines.append(f"{without} of {len(runs)} have no held-out loss, are judged by their training loss{behind}.")
    return lines


def _curves(runs: Sequence[RunRecord], names: Sequence[str], colours: Sequence[int]) -> list[Chart]:
    ranks = sorted(range(len(runs)), key=lambda i: colours[i] > 0)  # grey curves first, below the others
    evals = [_eval_series(runs[i], names[i], colours[i]) for i in ranks]
    train = [Series(names[i], smooth(runs[i].series("train/loss")), colours[i]) for i in ranks]
    charts = chart("Held-out loss", evals, wide=True), chart("Training loss, smoothed", train, wide=True)
    return [c for c in charts if c]


def _eval_series(run: RunRecord, name: str, colour: int) -> Series:
    best = run.best()
    return Series(name, run.series("eval/loss"), colour, "dots", mark=best.step if best else None)


def result_rows(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[Cell]]]:
    """(heads, rows): one row a run, best first, with its best held-out loss and last training loss.

    Columns in which no run has a value are left out.
    """
    names, differ = labels(runs), differences(runs)
    heads = ["run", "held-out loss", "at step", "training loss", "valid JSON", "fields right"]
    heads += [*differ, "trained", "time", "tokens/s"]  # many settings may differ, so the results come first
    rows = []
    for i in order(runs):
        run, after, best = runs[i], runs[i].after(), runs[i].best()
        losses = run.series("train/loss")
        rows.append(
            [
                names[i],
                cell(best and best.value),
                cell(best and best.step, "{:,}".format),
                cell(losses[-1].value if losses else None),
                cell(after.get("eval/json_valid"), percent),
                cell(after.get("eval/json_exact"), percent),
                *(setting_cell(run.settings[path]) for path in differ),
                cell(run.fact("trainable"), "{:,}".format),
                cell(run.seconds(), duration),
                cell(run.speed()),
            ]
        )
    return used(heads, rows)


def evaluation_rows(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[Cell]]]:
    """(heads, rows): a row for each evaluated run, best first, with the tuned model's results in eval.json."""
    names = labels(runs)
    evaluated = {i: runs[i].evaluation["held_out"] for i in order(runs) if "held_out" in runs[i].evaluation}
    metrics = {name: entry["label"] for held in evaluated.values() for name, entry in held["metrics"].items()}
    rows = []
    for i, held in evaluated.items():
        row: list[Cell] = [names[i], (held["rows"], f"{held['rows']:,}")]
        for name in metrics:
            entry = held["metrics"].get(name)
            row.append((entry["tuned"]["value"], value(entry, "tuned")) if entry and "tuned" in entry else "")
        rows.append(row)
    return used(["evaluated", "rows", *metrics.values()], rows)


def evaluation_notes(runs: Sequence[RunRecord]) -> list[str]:
    """Notes on comparing the results in eval.json."""
    held = [run.evaluation.get("held_out") for run in runs]
    measured = [h for h in held if h]
    notes = []
    if measured and len(measured) < len(runs):
        without = ", ".join(name for name, h in zip(labels(runs), held, strict=True) if not h)
        notes.append(f"Not evaluated: {without} (jaxtune eval RUN).")
    if len({(tuple(h.get("data", ())), h["rows"]) for h in measured}) > 1:
        notes.append("The runs were evaluated on different rows: their results cannot be compared.")
    return notes


def order(runs: Sequence[RunRecord]) -> list[int]:
    """The runs' indices, best first."""
    return sorted(range(len(runs)), key=lambda i: _score(runs[i]))


def used(heads: list[str], rows: list[list[Cell]]) -> tuple[list[str], list[list[Cell]]]:
    """Both without empty columns."""
    kept = [j for j in range(len(heads)) if any(row[j] != "" for row in rows)]
    return [heads[j] for j in kept], [[row[j] for j in kept] for row in rows]


def setting_cell(value: Any) -> Cell:
    """A setting's value."""
    return (value if isinstance(value, int | float) else setting(value), setting(value))


def cell(value: float | None, show: Callable[[float], str] = number) -> Cell:
    """A cell with a number, or an empty one."""
    return "" if value is None else (value, show(value))


def link(run: Path, folder: Path) -> str | None:
    """A run's own page, relative to `folder`; None if there is none."""
    page = run / "report.html"
    return quote(os.path.relpath(page.resolve(), folder.resolve())) if page.is_file() else None
