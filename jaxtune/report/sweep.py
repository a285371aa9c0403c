"""The page of a sweep: what won, the losses together, what the learning rate does, and a table of all its points."""

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jaxtune import sweep_table
from jaxtune.config import BY_PATH, find_setting
from jaxtune.errors import UserError
from jaxtune.log import read_metrics
from jaxtune.report.chart import Series, Spread, chart, smooth, spread_chart
from jaxtune.report.compare import COLOURS, differences
from jaxtune.report.html import Html, duration, h, join, number
from jaxtune.report.page import document, reproduce, section, settings_table, shown, table
from jaxtune.report.run import Run, is_number, read_run

LR, SEED = "optim.lr", "train.seed"
ENDED = ("finished", "cut", "failed")
LISTED = 4  # values of a setting that are said one by one; more are said as a range


@dataclass(frozen=True)
class Member:
    """A point of a sweep and what became of it.

    Attributes:
        name: of its directory.
        point: the swept settings, path -> value.
        status: one of ENDED, or how it stands otherwise: "unfinished", "not started", "stopped", "no result".
        why: what is known of that status.
        run: what it has logged; None where that is nothing.
    """

    name: str
    point: dict[str, Any]
    status: str
    why: str
    run: Run | None

    def setting(self, path: str) -> Any:
        """The value that applies; that of a setting which is not swept is known once the run has begun."""
        return self.run.settings[path] if self.run else self.point.get(path)

    def knows(self, path: str) -> bool:
        return self.run is not None or path in self.point

    def loss(self, held_out: bool) -> float:
        """What it is judged by: its best held-out loss, or its smoothed training loss at the end; else infinity."""
        if self.run is None:
            return math.inf
        best = self.run.best() if held_out else next(reversed(smooth(self.run.series("train/loss"))), None)
        return best.value if best else math.inf


@dataclass(frozen=True)
class Sweep:
    """A sweep directory, read.

    Attributes:
        folder: as it was given.
        members: the best first; those that failed or have no loss after the others.
        swept: setting paths that its points vary.
    """

    folder: Path
    members: list[Member]
    swept: list[str]

    @cached_property
    def held_out(self) -> bool:
        """Whether the points are judged by held-out loss."""
        return any(m.run and m.run.best() for m in self.members)

    @cached_property
    def differ(self) -> list[str]:
        """Settings in which the points differ, the swept ones first."""
        paths = [*self.swept, *(path for path in differences(self.runs) if path not in self.swept)]
        return [path for path in paths if len(self.values(path)) > 1]

    @property
    def runs(self) -> list[Run]:
        return [m.run for m in self.members if m.run]

    @property
    def winner(self) -> Member | None:
        best = self.members[0]
        return best if best.status != "failed" and math.isfinite(self.loss(best)) else None

    @property
    def over(self) -> bool:
        return all(m.status in ENDED for m in self.members)

    def loss(self, member: Member) -> float:
        return member.loss(self.held_out)

    def values(self, path: str) -> list[Any]:
        """The different values of a setting; numbers in their order, others as the points have them."""
        values = {_key(m.setting(path)): m.setting(path) for m in self.members if m.knows(path)}
        return _in_order(values.values())

    def lines(self) -> dict[tuple[Any, ...], list[Member]]:
        """The points that differ in nothing but rate and seed, by what else differs."""
        others = [path for path in self.differ if path not in (LR, SEED)]
        lines: dict[tuple[Any, ...], list[Member]] = {}
        for member in self.members:
            if all(member.knows(path) for path in (LR, *others)):
                lines.setdefault(tuple(_key(member.setting(path)) for path in others), []).append(member)
        return lines


# ------------------------------------------------------------------------------------------------------------ reading


def is_sweep(folder: Path) -> bool:
    """Whether it is the directory of a sweep, and not that of a run."""
    return (folder / "sweep.json").is_file() or (not (folder / "config.json").exists() and bool(_by_rate(folder)))


def read_sweep(folder: str | os.PathLike) -> Sweep:
    """Read a sweep directory; its points may have any status.

    Raises:
      UserError: it is none, no point has logged anything, or a file is not what a sweep writes.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; give the --workdir of a sweep")
    if not is_sweep(folder):
        raise UserError(f"{folder} is not the directory of a sweep: it has no sweep.json, and no folders lr=RATE")
    if folder.name in ("", ".."):  # commands to paste name what lies in it
        folder = folder.resolve()
    points = _planned(folder / "sweep.json") if (folder / "sweep.json").is_file() else _by_rate(folder)
    members = [_member(folder / name, point) for name, point in points.items()]
    if not any(m.run for m in members):
        raise UserError(f"{folder}: none of its {len(members)} runs has logged a step yet; there is nothing to report")
    swept = list(dict.fromkeys(path for point in points.values() for path in point))
    held_out = any(m.run and m.run.best() for m in members)
    members.sort(key=lambda m: (m.status == "failed", m.loss(held_out)))
    return Sweep(folder, members, swept)


def _by_rate(folder: Path) -> dict[str, dict[str, Any]]:
    """What launch/sweep_lr.sh made: directory name -> point."""
    rates = {}
    for run in folder.glob("lr=*"):
        try:
            rates[run.name] = float(run.name.removeprefix("lr="))
        except ValueError:
            continue
    tried = {name: rate for name, rate in rates.items() if 0 < rate < math.inf and (folder / name).is_dir()}
    return {name: {LR: tried[name]} for name in sorted(tried, key=tried.get)}


def _planned(file: Path) -> dict[str, dict[str, Any]]:
    """What `jaxtune sweep` planned: directory name -> point."""
    points = _object(file).get("points")
    if not isinstance(points, dict) or not points:
        raise UserError(f"{file}: expected the points of a sweep under 'points', as `jaxtune sweep` writes them")
    for name, point in points.items():
        if Path(name).name != name or name in ("", ".."):
            raise UserError(f"{file}: the point {name!r} does not name a directory beside it")
        if not isinstance(point, dict):
            raise UserError(f"{file}: the point {name!r} is no object of settings: {point!r}")
        for path in point:
            find_setting(path, f"{file}: the point {name!r}")
    return points


def _member(folder: Path, point: dict[str, Any]) -> Member:
    there = (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file()
    run = read_run(folder) if there and any(_is_step(line) for line in read_metrics(folder)) else None
    status, why = _status(folder, run)
    return Member(folder.name, point, status, why, run)


def _is_step(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("step"), int)


def _status(folder: Path, run: Run | None) -> tuple[str, str]:
    """How a point stands, and what is known of that."""
    why, file = "", folder / "member.json"
    if file.is_file():
        record = _object(file)
        if not isinstance(record.get("status"), str):
            raise UserError(f"{file}: expected a 'status', as a sweep writes it; found {record}")
        status, why = record["status"], str(record.get("why", ""))
    else:
        status = sweep_table.status(folder)
    if status == "finished" and run and not run.summary.get("early_stop") and run.fact("cut_at") is not None:
        return "cut", f"halving ended it at step {run.fact('cut_at'):,}"
    if status.startswith("failed ("):
        return "failed", f"exit status {status[len('failed (') : -1]}: {_last_line(folder / 'jaxtune.log')}"
    if status == "running":  # when it was written: nobody knows whether it still is
        status = "unfinished"
    if status not in ENDED and run:
        planned = run.settings["train.steps"]
        why = f"at step {run.last_step():,}" + (f" of {planned:,}" if planned else "")
    return status, why


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected an object, as a sweep writes it; found {type(value).__name__}")
    return value


def _key(value: Any) -> Any:
    """A setting's value, to be compared and looked up: JSON has lists where a config has tuples."""
    if isinstance(value, dict):
        return tuple((key, _key(entry)) for key, entry in sorted(value.items()))
    return tuple(map(_key, value)) if isinstance(value, list | tuple) else value


def _in_order(values: Iterable[Any]) -> list[Any]:
    values = list(values)
    return sorted(values) if all(map(is_number, values)) else values


# ----------------------------------------------------------------------------------------------------------- the page


def sweep_page(sweep: Sweep, folder: Path) -> str:
    """Return the HTML of a sweep's page; links in it are relative to `folder`, where it will lie."""
    colours = {m.name: i + 1 if i < COLOURS else 0 for i, m in enumerate(m for m in sweep.members if m.run)}
    name, run, winner = sweep.folder.resolve().name, sweep.runs[0], sweep.winner
    return document(
        name,
        h("p", f"jaxtune · sweep · {run.settings['tune.method']} · {run.model}", class_="eyebrow"),
        h("h1", name),
        h("p", " ".join(_lead(sweep)), class_="lead"),
        section("Loss curves", _curves(sweep, colours)),
        section("The learning rate", *_by_learning_rate(sweep)),
        section("All points", _results(sweep, colours, folder)),
        section("Without a full result", _without_result(sweep)),
        section("Settings that differ", _differing(sweep), _shared(sweep)),
        section(f"The best again: {winner.name}", *reproduce(winner.run)) if winner else None,
    )


def _lead(sweep: Sweep) -> list[str]:
    over = f" over {_listed([_range(sweep, path) for path in sweep.differ])}" if sweep.differ else ""
    count = len(sweep.members)
    sentences = [f"{count} point{'s' * (count > 1)}{over}.", _best(sweep), _best_mean(sweep), _edge(sweep)]
    return [*filter(None, sentences), *_counts(sweep.members)]


def _range(sweep: Sweep, path: str) -> str:
    """`optim.lr (5 values from 1e-5 to 0.01)`."""
    values = sweep.values(path)
    if len(values) <= LISTED:
        return f"{path} ({', '.join(map(shown, values))})"
    ends = f" from {shown(values[0])} to {shown(values[-1])}" if all(map(is_number, values)) else ""
    return f"{path} ({len(values)} values{ends})"


def _best(sweep: Sweep) -> str:
    winner, kind = sweep.winner, "held-out" if sweep.held_out else "training"
    if winner is None:
        return "None came to a result."
    best = winner.run.best()
    at = f" at step {best.step:,}" if best else ""
    so_far = "" if sweep.over else " so far"
    told = f"{winner.name} has the lowest {kind} loss{so_far}, {number(sweep.loss(winner))}{at}."
    return told if sweep.held_out else f"{told} There is no held-out loss to judge by."


def _means(sweep: Sweep) -> dict[tuple[Any, ...], list[Member]]:
    """The points that differ in the seed alone, where none of several is lost; those with the lowest mean first."""
    groups: dict[tuple[Any, ...], list[Member]] = {}
    for others, members in sweep.lines().items():
        for member in members:
            groups.setdefault((_key(member.setting(LR)), *others), []).append(member)

    def whole(group):
        return len(group) > 1 and all(m.status != "failed" and math.isfinite(sweep.loss(m)) for m in group)

    ranked = sorted((key for key in groups if whole(groups[key])), key=lambda key: _mean(sweep, groups[key]))
    return {key: groups[key] for key in ranked}


def _mean(sweep: Sweep, members: Sequence[Member]) -> float:
    return statistics.fmean(sweep.loss(m) for m in members)


def _best_mean(sweep: Sweep) -> str:
    means = _means(sweep)
    if SEED not in sweep.differ or len(means) < 2:
        return ""
    group = next(iter(means.values()))
    labels = sweep_table.short_names(sweep.differ)
    settings = [f"{labels[path]}={shown(group[0].setting(path))}" for path in sweep.differ if path != SEED]
    return f"By the mean over {len(group)} seeds, {', '.join(settings)} is best: {number(_mean(sweep, group))}."


def _edge(sweep: Sweep) -> str:
    """Whether a better rate may lie beyond those that were tried."""
    rates = sweep.values(LR) if LR in sweep.swept else []
    if len(rates) < 2 or sweep.winner is None:
        return ""
    means = _means(sweep)
    best = next(iter(means.values()))[0] if SEED in sweep.differ and len(means) > 1 else sweep.winner
    rate = best.setting(LR)
    for end, word, beyond in ((rates[0], "lowest", "below"), (rates[-1], "highest", "above")):
        if rate == end:
            return f"The best learning rate, {shown(rate)}, is the {word} that was tried: try rates {beyond} it too."
    return ""


def _counts(members: Sequence[Member]) -> list[str]:
    """`Of them, 2 failed, 3 were cut by halving and 1 has not finished.`"""
    counts = {status: sum(m.status == status for m in members) for status in ("failed", "cut", "not started")}
    other = sum(m.status not in (*counts, "finished") for m in members)

    def told(count, one, many):
        return [f"{count} {one if count == 1 else many}"] if count else []

    parts = told(counts["failed"], "failed", "failed")
    parts += told(counts["cut"], "was cut by halving", "were cut by halving")
    parts += told(other, "has not finished", "have not finished")
    parts += told(counts["not started"], "has not begun", "have not begun")
    return [f"Of them, {_listed(parts)}."] if parts else []


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _curves(sweep: Sweep, colours: Mapping[str, int]) -> Html | None:
    members = [m for m in reversed(sweep.members) if m.run and not colours[m.name]]  # grey lies below
    members += [m for m in sweep.members if m.run and colours[m.name]]
    evals, train = [], []
    for m in members:
        colour, best = colours[m.name], m.run.best()
        mark = best.step if best and m is sweep.winner else None
        evals.append(Series(m.name, m.run.series("eval/loss"), colour, "dots" if colour else "faint", mark))
        train.append(Series(m.name, smooth(m.run.series("train/loss")), colour, "line" if colour else "faint"))
    charts = [chart("Held-out loss", evals, wide=True), chart("Training loss, smoothed", train, wide=True)]
    charts = [c for c in charts if c]
    return h("div", *charts, class_="charts") if charts else None


def _by_learning_rate(sweep: Sweep) -> list[Html]:
    if LR not in sweep.differ:
        return []
    lines = sweep.lines()
    order = sorted(lines, key=lambda key: min(map(sweep.loss, lines[key])))
    colours = {key: i + 1 if i < COLOURS else 0 for i, key in enumerate(order)}
    others = [path for path in sweep.differ if path not in (LR, SEED)]
    spreads = [
        _spread(sweep, _line_name(lines[key][0], others), lines[key], colours[key])
        for key in sorted(lines, key=lambda key: colours[key] > 0)  # grey lies below
    ]
    kind = "Held-out loss" if sweep.held_out else "Training loss"
    drawn = spread_chart(f"{kind} by learning rate", "learning rate", spreads)
    if drawn is None:
        return []
    note = ["A dot is a run at its best evaluation." if sweep.held_out else "A dot is a run at its end."]
    if SEED in sweep.differ:
        note.append("Lines go through the means over the seeds; bands reach from the lowest to the highest of them.")
    if any(m.status == "cut" for m in sweep.members):
        note.append("Runs that halving cut count with the loss they had by then.")
    return [drawn, h("p", " ".join(note), class_="note")]


def _line_name(member: Member, others: Sequence[str]) -> str:
    labels = sweep_table.short_names(others)
    return ", ".join(f"{labels[path]}={shown(member.setting(path))}" for path in others) or "all"


def _spread(sweep: Sweep, name: str, members: Sequence[Member], colour: int) -> Spread:
    values: dict[float, list[float]] = {}
    lost: dict[float, int] = {}
    for m in members:
        rate = m.setting(LR)
        if m.status == "failed":
            lost[rate] = lost.get(rate, 0) + 1
        elif math.isfinite(sweep.loss(m)):
            values.setdefault(rate, []).append(sweep.loss(m))
    return Spread(name, values, lost, colour)


def _results(sweep: Sweep, colours: Mapping[str, int], folder: Path) -> Html:
    """One row a point, best first. Empty columns are left out."""
    labels = sweep_table.short_names(sweep.differ)
    heads = ["run", "status", *(labels[path] for path in sweep.differ)]
    heads += ["held-out loss", "at step", "training loss", "trained", "time"]
    rows = []
    for m in sweep.members:
        best = m.run.best() if m.run else None
        losses = m.run.series("train/loss") if m.run else []
        rows.append(
            [
                (m.name, _name(sweep, m, colours.get(m.name), folder)),
                h("span", m.status, class_={"finished": "status", "failed": "status bad"}.get(m.status, "status dim")),
                *(_setting(m.setting(path)) if m.knows(path) else "" for path in sweep.differ),
                _cell(best and best.value),
                _cell(best and best.step, "{:,}".format),
                _cell(losses[-1].value if losses else None),
                _cell(m.run and m.run.fact("trainable"), "{:,}".format),
                _cell(m.run and m.run.seconds(), duration),
            ]
        )
    used = [j for j in range(len(heads)) if any(row[j] != "" for row in rows)]
    cells = [[row[j] for j in used] for row in rows]
    return table([heads[j] for j in used], cells, right=2, sortable=True, filterable=True)


def _name(sweep: Sweep, member: Member, colour: int | None, folder: Path) -> Html:
    """With the curves' colour, and a link to the run's own page where there is one."""
    page = sweep.folder / member.name / "report.html"
    href = quote(os.path.relpath(page.resolve(), folder.resolve()))
    key = h("i", class_=f"key c{colour}") if colour is not None else h("i", class_="key none")
    badge = h("span", "best", class_="badge good") if member is sweep.winner else None
    return join([key, h("a", member.name, href=href) if page.is_file() else member.name, badge and join([" ", badge])])


def _setting(value: Any) -> tuple[Any, str]:
    return (value if isinstance(value, int | float) else shown(value), shown(value))


def _cell(value: float | None, show=number) -> tuple[float, str] | str:
    return "" if value is None else (value, show(value))


def _without_result(sweep: Sweep) -> Html | None:
    """Points that did not go to their end, those of one fate together."""
    fates: dict[tuple[str, str], list[str]] = {}
    for m in sweep.members:
        if m.status != "finished":
            fates.setdefault((m.status, m.why), []).append(m.name)
    lines = [
        h("li", h("b", status), f", {why}" if why else None, f": {'; '.join(names)}")
        for (status, why), names in sorted(fates.items())
    ]
    return h("ul", *lines) if lines else None


def _differing(sweep: Sweep) -> Html | None:
    values = {path: ", ".join(map(shown, sweep.values(path))) for path in sweep.differ}
    return settings_table(values)


def _shared(sweep: Sweep) -> Html | None:
    """What all have in common beyond the defaults."""
    paths = [path for path in BY_PATH if any(path in run.overrides for run in sweep.runs) and path not in sweep.differ]
    values = settings_table({path: sweep.runs[0].settings[path] for path in paths})
    return values and h("details", h("summary", f"{len(paths)} more settings that they share, not defaults"), values)
