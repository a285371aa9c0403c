"""`python -m jaxtune.report.sweep_table OUTDIR`: results of the runs of launch/sweep_lr.sh or `jaxtune sweep`.

Prints a table sorted by evaluation loss and writes it to OUTDIR/sweep.csv. The script's runs are the directories
OUTDIR/lr=RATE; they are written to OUTDIR/sweep.json first, as `jaxtune sweep` writes its points (--plan: that alone).
"""

import csv
import io
import json
import math
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError
from jaxtune.files import atomic_write_text
from jaxtune.reading import read_json
from jaxtune.train.best import sign
from jaxtune.train.log import read_metrics

FACTS = ("status", "eval_loss", "step", "train_loss", "run")


def sweep_rows(outdir: Path) -> list[dict[str, Any]]:
    """Return one row a run: the finished ones by train.best, the best first, then the others by what was swept.

    A row has a column for each swept setting, called by its last part, and FACTS: eval_loss is that of the best
    evaluation after a step, whose weights are the result, and step is where it was; train_loss is the last one logged.
    Each is None where there is none, or none that is finite.

    Raises:
        UserError: outdir holds no run of a sweep.
    """
    found = [_row(run, values) for run, values in _runs(outdir)]
    finished = [pair for pair in found if pair[0]["status"] == "finished"]
    finished.sort(key=lambda pair: pair[1])
    return [row for row, _ in finished] + [row for row, _ in found if row["status"] != "finished"]


def _runs(outdir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The runs, and the values of each for the swept settings, spelled as in its name where possible."""
    points = read_points(outdir / "sweep.json")
    labels = short_names({path for values in points.values() for path in values})

    def point_of(name, values):
        row = {labels[path]: value for path, value in values.items()}
        label, _, text = name.partition("=")
        return {label: text} if list(row) == [label] else row

    return [(outdir / name, point_of(name, values)) for name, values in points.items()]


def read_points(file: Path) -> dict[str, dict[str, Any]]:
    """The points of a sweep.json: {name of a run: {setting: value}}.

    Raises:
        UserError: it is not what a sweep writes.
    """
    points = read_json(file, halves=True).get("points")
    if not isinstance(points, dict) or not points:
        raise UserError(f"{file}: expected the points of a sweep under 'points', as `jaxtune sweep` writes them")
    for name, point in points.items():
        if Path(name).name != name or name in ("", ".."):
            raise UserError(f"{file}: the point {name!r} does not name a directory beside it")
        if not isinstance(point, dict):
            raise UserError(f"{file}: the point {name!r} is no object of settings: {point!r}")
    return points


def write_points(outdir: Path) -> None:
    """Write sweep.json for the directories lr=RATE that launch/sweep_lr.sh made; one from `jaxtune sweep` is kept.

    Raises:
        UserError: there are none.
    """
    file = outdir / "sweep.json"
    if file.is_file() and "rungs" in read_json(file, halves=True):
        return
    rates = sorted((rate, run.name) for run in outdir.glob("lr=*") if run.is_dir() and (rate := _rate(run)) is not None)
    if not rates:
        raise UserError(f"{outdir} holds no runs of a sweep (sweep.json, or folders lr=...).")
    points = {name: {"optim.lr": rate} for rate, name in rates}
    atomic_write_text(file, json.dumps({"points": points}, indent=1) + "\n")


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Setting path -> its last part, or the whole path where two would have the same name."""
    paths = sorted(paths)
    keys = [path.rpartition(".")[2] for path in paths]
    return {path: key if keys.count(key) == 1 else path for path, key in zip(paths, keys, strict=True)}


def status(run: Path) -> str:
    """The status of a run, from its files and those of `jaxtune sweep` or sweep_lr.sh."""
    if (run / "member.json").is_file():
        return str(read_json(run / "member.json", halves=True).get("status"))
    if (run / "summary.json").is_file() and any((run / result).is_dir() for result in ("adapter", "model")):
        return "finished"
    try:
        code = int((run / "exit_status").read_text())
    except (OSError, ValueError):
        return "unfinished" if (run / "config.json").exists() else "not started"
    if code in (3, 130, 143):  # by itself, SIGINT, SIGTERM
        return "stopped"
    return f"failed ({code})" if code else "no result"


def differing_settings(runs: list[Path]) -> list[str]:
    """Return the settings besides optim.lr in which the runs differ, as section.key."""
    files = [run / "config.json" for run in runs]
    configs = [_settings(read_json(file, halves=True)) for file in files if file.is_file()]
    names = {name for config in configs for name in config} - {"optim.lr"}
    return sorted(name for name in names if len({json.dumps(config.get(name)) for config in configs}) > 1)


def main(argv: list[str]) -> int:
    """Write the points of a sweep, or with --plan its planned runs, to OUTDIR; return the exit status."""
    *flags, outdir = [Path(argument) if argument != "--plan" else argument for argument in argv] or [None]
    if flags not in ([], ["--plan"]) or not isinstance(outdir, Path):
        print("usage: python -m jaxtune.report.sweep_table [--plan] OUTDIR", file=sys.stderr)
        return 2
    try:
        write_points(outdir)
        if flags:
            return 0
        rows = sweep_rows(outdir)
        text = io.StringIO()
        writer = csv.DictWriter(text, _swept(rows) + list(FACTS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write_text(outdir / "sweep.csv", text.getvalue())
    except UserError as error:
        print(f"sweep_table: error: {error}", file=sys.stderr)
        return 2
    _show(rows, outdir)
    return 0


def _rate(run: Path) -> float | None:
    try:
        rate = float(run.name.removeprefix("lr="))
    except ValueError:
        return None
    return rate if 0 < rate < math.inf else None


def _swept(rows: list[dict[str, Any]]) -> list[str]:
    """The columns of the swept settings."""
    return list(dict.fromkeys(column for row in rows for column in row if column not in FACTS))


def _row(run: Path, values: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The row of a run, and what to sort it by: less is better."""
    metrics = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    evaluations = [m for m in metrics if m["step"] and math.isfinite(m.get("eval/loss", math.nan))]
    metric = _judged_by(run)
    best = max((m for m in evaluations if metric in m), key=lambda m: sign(metric) * m[metric], default={})
    losses = [m["train/loss"] for m in metrics if math.isfinite(m.get("train/loss", math.nan))]
    row = {
        **values,
        "status": status(run),
        "eval_loss": best.get("eval/loss"),
        "step": best.get("step"),
        "train_loss": losses[-1] if losses else None,
        "run": str(run),
    }
    return row, -sign(metric) * best[metric] if best else math.inf


def _judged_by(run: Path) -> str:
    """The metric of train.best."""
    file = run / "config.json"
    return (read_json(file, halves=True).get("train", {}) if file.is_file() else {}).get("best") or "eval/loss"


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """section.key -> value, without the versions that made the run."""
    sections = {name: keys for name, keys in config.items() if name != "versions"}
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def _show(rows: list[dict[str, Any]], outdir: Path) -> None:
    swept = _swept(rows)
    cells = [(*swept, "status", "eval loss", "at step", "train loss"), *(_cells(row, swept) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print()
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print()
    for row in rows:
        if row["status"].startswith("failed"):
            print(f"{Path(row['run']).name} {row['status']}: {_why(Path(row['run']))}")
    runs = [Path(row["run"]) for row in rows]
    if swept == ["lr"] and (different := differing_settings(runs)):
        print(f"These runs differ not only in the learning rate, but also in {', '.join(different)}.")
    if rows[0]["status"] == "finished" and rows[0]["eval_loss"] is not None:
        print(f"best: {rows[0]['run']}")
    elif any(row["status"] == "finished" for row in rows):
        print("There is no evaluation loss to choose by: set data.eval or data.eval_fraction.")
    if any((run / "metrics.jsonl").is_file() for run in runs) and not (outdir / "report.html").exists():
        print(f"page: jaxtune report {shlex.quote(str(outdir))}")
    print(f"table: {outdir / 'sweep.csv'}")


def _cells(row: dict[str, Any], swept: list[str]) -> tuple[str, ...]:
    shown = ((row["eval_loss"], ".4f"), (row["step"], ""), (row["train_loss"], ".4f"))
    facts = ("-" if value is None else format(value, form) for value, form in shown)
    return *(str(row.get(column, "-")) for column in swept), row["status"], *facts


def _why(run: Path) -> str:
    """The reason for a failure, if known."""
    if (run / "member.json").is_file():
        return read_json(run / "member.json", halves=True).get("why", "no reason given")
    return last_line(run / "jaxtune.log")


def last_line(log: Path) -> str:
    """The last line of a log that is not blank."""
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
