"""The page of several runs: their losses together, and a table of what they differ in and what came of it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxtune.report.chart import Series, chart, smooth
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


def _results(runs: Sequence[Run], names: Sequence[str], colours: Sequence[int], folder: Path) -> Html:
    """One row a run, best first: the best held-out loss, the last training loss. Empty columns are left out."""
    differ = differences(runs)
    heads = ["run", *differ, "held-out loss", "at step", "training loss", "valid JSON", "fields right"]
    heads += ["trained", "time", "tokens/s"]
    rows = []
    for i in sorted(range(len(runs)), key=lambda i: _score(runs[i])):
        run, after, best = runs[i], runs[i].after(), runs[i].best()
        losses = run.series("train/loss")
        rows.append(
            [
                (names[i], join([h("i", class_=f"key c{colours[i]}"), _link(run, names[i], folder)])),
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
    used = [j for j in range(len(heads)) if any(row[j] != "" for row in rows)]
    return table([heads[j] for j in used], [[row[j] for j in used] for row in rows], right=1, sortable=True)


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
