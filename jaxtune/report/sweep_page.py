"""The page of a sweep: the winner, all losses, the effect of the learning rate, and a table of all points."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.config import BY_PATH
from jaxtune.report import sweep_table
from jaxtune.report.chart import Chart, Series, Spread, chart, smooth, spread_chart
from jaxtune.report.compare import COLOURS, Ranked, cell, link, setting_cell, used
from jaxtune.report.page import reproduce, settings_rows
from jaxtune.report.render import render
from jaxtune.report.run import is_number
from jaxtune.report.sweep import LR, SEED, MemberRecord, SweepRecord, key
from jaxtune.report.words import duration, listed, number, setting

LISTED = 4  # values of a setting to list one by one; more are given as a range


def sweep_page(sweep: SweepRecord, folder: Path) -> str:
    """Return the HTML of a sweep's page; links are relative to `folder`, where it will be written."""
    colours = {m.name: i + 1 if i < COLOURS else 0 for i, m in enumerate(m for m in sweep.members if m.run)}
    run, winner = sweep.runs[0], sweep.winner
    heads, rows = _results(sweep, colours, folder)
    by_rate = _by_learning_rate(sweep)
    return render(
        "sweep.html",
        title=sweep.folder.resolve().name,
        kind=f"sweep · {run.settings['tune.method']} · {run.model}",
        summary=_lead(sweep),
        charts=_curves(sweep, colours),
        by_rate=by_rate,
        by_rate_note=_dots_and_bands(sweep),
        heads=heads,
        rows=rows,
        fates=_without_result(sweep),
        differ=settings_rows({path: ", ".join(map(setting, sweep.values(path))) for path in sweep.differ}),
        shared=_shared(sweep),
        winner=winner and winner.name,
        again=reproduce(winner.run) if winner else [],
    )


def _lead(sweep: SweepRecord) -> list[str]:
    over = f" over {listed([_range(sweep, path) for path in sweep.differ])}" if sweep.differ else ""
    count = len(sweep.members)
    sentences = [f"{count} point{'s' * (count > 1)}{over}.", _best(sweep), _best_mean(sweep), _edge(sweep)]
    return [*filter(None, sentences), *_counts(sweep.members)]


def _range(sweep: SweepRecord, path: str) -> str:
    """`optim.lr (5 values from 1e-5 to 0.01)`."""
    values = sweep.values(path)
    if len(values) <= LISTED:
        return f"{path} ({', '.join(map(setting, values))})"
    ends = f" from {setting(values[0])} to {setting(values[-1])}" if all(map(is_number, values)) else ""
    return f"{path} ({len(values)} values{ends})"


def _best(sweep: SweepRecord) -> str:
    winner, kind = sweep.winner, "held-out" if sweep.held_out else "training"
    if winner is None:
        return "None has a result."
    best = winner.run.best()
    at = f" at step {best.step:,}" if best else ""
    so_far = "" if sweep.over else " so far"
    metric = winner.run.settings["train.best"]
    if best and metric != "eval/loss":
        value = dict(winner.run.series(metric))[best.step]
        return (
            f"{winner.name} is the best by {metric}{so_far}, {number(value)}{at} (held-out loss {number(best.value)})."
        )
    text = f"{winner.name} has the lowest {kind} loss{so_far}, {number(sweep.loss(winner))}{at}."
    return text if sweep.held_out else f"{text} There is no held-out loss to judge by."


def _means(sweep: SweepRecord) -> dict[tuple[Any, ...], list[MemberRecord]]:
    """Groups of points that differ only in the seed and all have results, the lowest mean first."""
    groups: dict[tuple[Any, ...], list[MemberRecord]] = {}
    for others, members in sweep.lines().items():
        for member in members:
            groups.setdefault((key(member.setting(LR)), *others), []).append(member)

    def whole(group):
        return len(group) > 1 and all(m.status != "failed" and math.isfinite(sweep.loss(m)) for m in group)

    ranked = sorted((key for key in groups if whole(groups[key])), key=lambda key: _mean(sweep, groups[key]))
    return {key: groups[key] for key in ranked}


def _mean(sweep: SweepRecord, members: Sequence[MemberRecord]) -> float:
    return statistics.fmean(sweep.loss(m) for m in members)


def _best_mean(sweep: SweepRecord) -> str:
    means = _means(sweep)
    if SEED not in sweep.differ or len(means) < 2:
        return ""
    group = next(iter(means.values()))
    labels = sweep_table.short_names(sweep.differ)
    settings = [f"{labels[path]}={setting(group[0].setting(path))}" for path in sweep.differ if path != SEED]
    return f"By the mean over {len(group)} seeds, {', '.join(settings)} is best: {number(_mean(sweep, group))}."


def _edge(sweep: SweepRecord) -> str:
    """A hint if a better rate may lie beyond those that were tried."""
    rates = sweep.values(LR) if LR in sweep.swept else []
    if len(rates) < 2 or sweep.winner is None:
        return ""
    means = _means(sweep)
    best = next(iter(means.values()))[0] if SEED in sweep.differ and len(means) > 1 else sweep.winner
    rate = best.setting(LR)
    for end, word, beyond in ((rates[0], "lowest", "below"), (rates[-1], "highest", "above")):
        if rate == end:
            return f"The best learning rate, {setting(rate)}, is the {word} that was tried: try rates {beyond} it too."
    return ""


def _counts(members: Sequence[MemberRecord]) -> list[str]:
    """`Of them, 2 failed, 3 were cut by halving and 1 has not finished.`"""
    counts = {status: sum(m.status == status for m in members) for status in ("failed", "cut", "not started")}
    other = sum(m.status not in (*counts, "finished") for m in members)

    def counted(count, one, many):
        return [f"{count} {one if count == 1 else many}"] if count else []

    parts = counted(counts["failed"], "failed", "failed")
    parts += counted(counts["cut"], "was cut by halving", "were cut by halving")
    parts += counted(other, "has not finished", "have not finished")
    parts += counted(counts["not started"], "has not begun", "have not begun")
    return [f"Of them, {listed(parts)}."] if parts else []


def _curves(sweep: SweepRecord, colours: Mapping[str, int]) -> list[Chart]:
    members = [
        m for m in reversed(sweep.members) if m.run and not colours[m.name]
    ]  # grey curves first, below the others
    members += [m for m in sweep.members if m.run and colours[m.name]]
    evals, train = [], []
    for m in members:
        colour, best = colours[m.name], m.run.best()
        mark = best.step if best and m is sweep.winner else None
        evals.append(Series(m.name, m.run.series("eval/loss"), colour, "dots" if colour else "faint", mark))
        train.append(Series(m.name, smooth(m.run.series("train/loss")), colour, "line" if colour else "faint"))
    charts = chart("Held-out loss", evals, wide=True), chart("Training loss, smoothed", train, wide=True)
    return [c for c in charts if c]


def _by_learning_rate(sweep: SweepRecord) -> Chart | None:
    if LR not in sweep.differ:
        return None
    lines = sweep.lines()
    order = sorted(lines, key=lambda line: min(map(sweep.loss, lines[line])))
    colours = {line: i + 1 if i < COLOURS else 0 for i, line in enumerate(order)}
    others = [path for path in sweep.differ if path not in (LR, SEED)]
    spreads = [
        _spread(sweep, _line_name(lines[line][0], others), lines[line], colours[line])
        for line in sorted(lines, key=lambda line: colours[line] > 0)  # grey curves first, below the others
    ]
    kind = "Held-out loss" if sweep.held_out else "Training loss"
    return spread_chart(f"{kind} by learning rate", "learning rate", spreads)


def _dots_and_bands(sweep: SweepRecord) -> str:
    """The caption of the chart by learning rate."""
    note = ["A dot is a run at its best evaluation." if sweep.held_out else "A dot is a run at its end."]
    if SEED in sweep.differ:
        note.append("Lines go through the means over the seeds; bands reach from the lowest to the highest of them.")
    if any(m.status == "cut" for m in sweep.members):
        note.append("Runs that halving cut count with the loss they had by then.")
    return " ".join(note)


def _line_name(member: MemberRecord, others: Sequence[str]) -> str:
    labels = sweep_table.short_names(others)
    return ", ".join(f"{labels[path]}={setting(member.setting(path))}" for path in others) or "all"


def _spread(sweep: SweepRecord, name: str, members: Sequence[MemberRecord], colour: int) -> Spread:
    values: dict[float, list[float]] = {}
    lost: dict[float, int] = {}
    for m in members:
        rate = m.setting(LR)
        if m.status == "failed":
            lost[rate] = lost.get(rate, 0) + 1
        elif math.isfinite(sweep.loss(m)):
            values.setdefault(rate, []).append(sweep.loss(m))
    return Spread(name, values, lost, colour)


def _results(sweep: SweepRecord, colours: Mapping[str, int], folder: Path) -> tuple[list[str], list[Ranked]]:
    """(heads, rows): one row a point, best first. Empty columns are left out."""
    labels = sweep_table.short_names(sweep.differ)
    heads = [*(labels[path] for path in sweep.differ), "held-out loss", "at step", "training loss", "trained", "time"]
    cells = []
    for m in sweep.members:
        best = m.run.best() if m.run else None
        losses = m.run.series("train/loss") if m.run else []
        cells.append(
            [
                *(setting_cell(m.setting(path)) if m.knows(path) else "" for path in sweep.differ),
                cell(best and best.value),
                cell(best and best.step, "{:,}".format),
                cell(losses[-1].value if losses else None),
                cell(m.run and m.run.fact("trainable"), "{:,}".format),
                cell(m.run and m.run.seconds(), duration),
            ]
        )
    heads, cells = used(heads, cells)
    rows = [
        Ranked(m.name, link(sweep.folder / m.name, folder), colours.get(m.name), row, m.status, m is sweep.winner)
        for m, row in zip(sweep.members, cells, strict=True)
    ]
    return ["run", "status", *heads], rows


def _without_result(sweep: SweepRecord) -> list[tuple[str, str, list[str]]]:
    """(status, why, names) of the points that did not finish, grouped by status and reason."""
    fates: dict[tuple[str, str], list[str]] = {}
    for m in sweep.members:
        if m.status != "finished":
            fates.setdefault((m.status, m.why), []).append(m.name)
    return [(status, why, names) for (status, why), names in sorted(fates.items())]


def _shared(sweep: SweepRecord) -> list[tuple[str, str, str, str]]:
    """The settings that all points share and that differ from the defaults."""
    paths = [path for path in BY_PATH if any(path in run.overrides for run in sweep.runs) and path not in sweep.differ]
    return settings_rows({path: sweep.runs[0].settings[path] for path in paths})
