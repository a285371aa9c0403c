"""The page of several runs: their losses together, and a table of what they differ in and what came of it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxtune.report.chart import Series, chart, smooth
from jaxtune.report.evaluation import value
from jaxtune.report.html import Html, duration, h, join, number, percent
from jaxtune.report.page import document, reproduce, section, shown, table
from jaxtune.report.run import Run

COLOURS = 8  # in the palette; runs beyond the best eight are drawn in grey


def comparison_page(runs: Sequence[Run], folder: Path) -> str:
    """Return the HTML that compares `runs`; links in it are relative to `folder`, where it will lie."""
    names = labels(runs)
    colours = _colours(runs)
    title = f"{len(runs)} runs"
    winner = min(range(len(runs)), key=lambda i: _score(runs[i]))
    return document(
        title,
        h("p", "jaxtune · comparison", class_="eyebrow"),
        h("h1", title),
        h("p", " ".join(_summary(runs, names, winner)), class_="lead"),
        section("Results", _results(runs, names, colours, folder)),
        section("Evaluated on held-out rows", _evaluated(runs)),
        section("Curves", _curves(runs, names, colours)),
        section(f"The best run again: {names[winner]}", *reproduce(runs[winner])),
    )


def labels(runs: Sequence[Run]) -> list[str]:
    """Short names that tell the runs apart: their paths from the folder that holds them all."""
    paths = [run.folder.resolve() for run in runs]
    common = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(common)) for path in paths]


def differences(runs: Sequence[Run]) -> list[str]:
    """Settings in which the runs are not all alike."""
    return [path for path, value in runs[0].settings.items() if any(run.settings[path] != value for run in runs)]


def _score(run: Run) -> float:
    """What a run is judged by: its best held-out loss; without one, its smoothed training loss at the end."""
    best = run.best()
    if best:
        return best.value
    losses = smooth(run.series("train/loss"))
    return losses[-1].value if losses else float("inf")


def _colours(runs: Sequence[Run]) -> list[int]:
    """The best eight runs get a colour each, in the order they were named."""
    best = set(sorted(range(len(runs)), key=lambda i: _score(runs[i]))[:COLOURS])
    slots = iter(range(1, COLOURS + 1))
    return [next(slots) if i in best else 0 for i in range(len(runs))]


def _summary(runs: Sequence[Run], names: Sequence[str], winner: int) -> list[str]:
    differ = differences(runs)
    held_out = all(run.best() for run in runs)
    said = [f"The runs differ in {', '.join(differ)}." if differ else "The runs have the same settings."]
    scores = [_score(run) for run in runs]
    if any(score < float("inf") for score in scores):
        kind = "held-out loss" if held_out else "loss"
        best = runs[winner].best()
        at = f" at step {best.step:,}" if best else ""
        said.append(f"{names[winner]} has the lowest {kind}, {number(scores[winner])}{at}.")
    if not held_out:
        without = sum(run.best() is None for run in runs)
        said.append(f"{without} of {len(runs)} have no held-out loss and are judged by their training loss.")
    return said


def _curves(runs: Sequence[Run], names: Sequence[str], colours: Sequence[int]) -> Html | None:
    order = sorted(range(len(runs)), key=lambda i: colours[i] > 0)  # grey lies below
    evals = [_eval_series(runs[i], names[i], colours[i]) for i in order]
    train = [Series(names[i], smooth(runs[i].series("train/loss")), colours[i]) for i in order]
    charts = [
        c for c in (chart("Held-out loss", evals, wide=True), chart("Training loss, smoothed", train, wide=True)) if c
    ]
    return h("div", *charts, class_="charts") if charts else None


def _eval_series(run: Run, name: str, colour: int) -> Series:
    best = run.best()
    return Series(name, run.series("eval/loss"), colour, "dots", mark=best.step if best else None)


def result_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[Any]]]:
    """(heads, rows): one row a run, best first, with its best held-out loss and last training loss.

    A cell is text or `(value, shown)`. Columns in which no run has a value are left out.
    """
    names, differ = labels(runs), differences(runs)
    heads = ["run", *differ, "held-out loss", "at step", "training loss", "valid JSON", "fields right"]
    heads += ["trained", "time", "tokens/s"]
    rows = []
    for i in order(runs):
        run, after, best = runs[i], runs[i].after(), runs[i].best()
        losses = run.series("train/loss")
        rows.append(
            [
                names[i],
                *(_setting(run.settings[path]) for path in differ),
                _cell(best and best.value),
                _cell(best and best.step, "{:,}".format),
                _cell(losses[-1].value if losses else None),
                _cell(after.get("eval/json_valid"), percent),
                _cell(after.get("eval/json_exact"), percent),
                _cell(run.fact("trainable"), "{:,}".format),
                _cell(run.seconds(), duration),
                _cell(run.speed()),
            ]
        )
    return _used(heads, rows)


def evaluation_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[Any]]]:
    """(heads, rows): a row for each evaluated run, best first: what eval.json has of its tuned model."""
    names = labels(runs)
    evaluated = {i: runs[i].evaluation["held_out"] for i in order(runs) if "held_out" in runs[i].evaluation}
    metrics = {name: entry["label"] for held in evaluated.values() for name, entry in held["metrics"].items()}
    rows = []
    for i, held in evaluated.items():
        row: list[Any] = [names[i], (held["rows"], f"{held['rows']:,}")]
        for name in metrics:
            entry = held["metrics"].get(name)
            row.append((entry["tuned"]["value"], value(entry, "tuned")) if entry and "tuned" in entry else "")
        rows.append(row)
    return _used(["evaluated", "rows", *metrics.values()], rows)


def evaluation_notes(runs: Sequence[Run]) -> list[str]:
    """What to mind when the figures of eval.json are compared."""
    held = [run.evaluation.get("held_out") for run in runs]
    measured = [h for h in held if h]
    notes = []
    if measured and len(measured) < len(runs):
        without = ", ".join(name for name, h in zip(labels(runs), held, strict=True) if not h)
        notes.append(f"Not evaluated: {without} (jaxtune eval RUN).")
    if len({(tuple(h.get("data", ())), h["rows"]) for h in measured}) > 1:
        notes.append("The runs were evaluated on different rows: their figures cannot be compared.")
    return notes


def order(runs: Sequence[Run]) -> list[int]:
    """The runs' places, best first."""
    return sorted(range(len(runs)), key=lambda i: _score(runs[i]))


def _used(heads: list[str], rows: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
    used = [j for j in range(len(heads)) if any(row[j] != "" for row in rows)]
    return [heads[j] for j in used], [[row[j] for j in used] for row in rows]


def _results(runs: Sequence[Run], names: Sequence[str], colours: Sequence[int], folder: Path) -> Html:
    """The rows of `result_rows`, with the colours of the curves and links to the runs' own pages."""
    heads, rows = result_rows(runs)
    marked = []
    for i, row in zip(order(runs), rows, strict=True):
        name = join([h("i", class_=f"key c{colours[i]}"), _link(runs[i], names[i], folder)])
        marked.append([(names[i], name), *row[1:]])
    return table(heads, marked, right=1, sortable=True)


def _evaluated(runs: Sequence[Run]) -> Html | None:
    heads, rows = evaluation_rows(runs)
    if not rows:
        return None
    said = "Figures of each run's eval.json, with 95% intervals."
    note = h("p", " ".join([said, *evaluation_notes(runs)]), class_="note")
    return join([table(heads, rows, right=1, sortable=True), note])


def _setting(value: Any) -> tuple[Any, str]:
    return (value if isinstance(value, int | float) else shown(value), shown(value))


def _cell(value: float | None, show=number) -> tuple[float, str] | str:
    return "" if value is None else (value, show(value))


def _link(run: Run, name: str, folder: Path) -> Html | str:
    """To the run's own page, where there is one."""
    page = run.folder / "report.html"
    if not page.is_file():
        return name
    return h("a", name, href=quote(os.path.relpath(page.resolve(), folder.resolve())))
