"""Read a sweep directory: its points, their status, and which is best."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtune.config import find_setting
from jaxtune.errors import UserError
from jaxtune.report import sweep_table
from jaxtune.report.chart import smooth
from jaxtune.report.compare import differences
from jaxtune.report.run import RunRecord, is_number, read_object, read_run
from jaxtune.train.log import read_metrics

LR, SEED = "optim.lr", "train.seed"
ENDED = ("finished", "cut", "failed")


@dataclass(frozen=True)
class MemberRecord:
    """A point of a sweep, with its status and results.

    Attributes:
        name: of its directory.
        point: the swept settings, path -> value.
        status: one of ENDED, or "unfinished", "not started", "stopped", "no result".
        why: the reason for that status, if known.
        run: its record; None if it has logged nothing.
    """

    name: str
    point: dict[str, Any]
    status: str
    why: str
    run: RunRecord | None

    def setting(self, path: str) -> Any:
        """The value of a setting; one that is not swept is known once the run has begun."""
        return self.run.settings[path] if self.run else self.point.get(path)

    def knows(self, path: str) -> bool:
        return self.run is not None or path in self.point

    def loss(self, held_out: bool) -> float:
        """The loss that ranks it: its best held-out loss, or its smoothed training loss at the end; else infinity."""
        if self.run is None:
            return math.inf
        best = self.run.best() if held_out else next(reversed(smooth(self.run.series("train/loss"))), None)
        return best.value if best else math.inf

    def rank(self, held_out: bool) -> tuple[float, float]:
        """What to sort by, the least first: train.best where there is held-out data, then the loss."""
        return self.run.cost_of_best() if held_out and self.run else math.inf, self.loss(held_out)


@dataclass(frozen=True)
class SweepRecord:
    """A sweep directory, read.

    Attributes:
        folder: as it was given.
        members: the best first; those that failed or have no loss after the others.
        swept: setting paths that its points vary.
    """

    folder: Path
    members: list[MemberRecord]
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
    def runs(self) -> list[RunRecord]:
        return [m.run for m in self.members if m.run]

    @property
    def winner(self) -> MemberRecord | None:
        best = self.members[0]
        return best if best.status != "failed" and math.isfinite(self.loss(best)) else None

    @property
    def over(self) -> bool:
        return all(m.status in ENDED for m in self.members)

    def loss(self, member: MemberRecord) -> float:
        return member.loss(self.held_out)

    def values(self, path: str) -> list[Any]:
        """The distinct values of a setting; numbers sorted, others in the order of the points."""
        values = {key(m.setting(path)): m.setting(path) for m in self.members if m.knows(path)}
        return _in_order(values.values())

    def lines(self) -> dict[tuple[Any, ...], list[MemberRecord]]:
        """The points grouped by all swept settings other than rate and seed."""
        others = [path for path in self.differ if path not in (LR, SEED)]
        lines: dict[tuple[Any, ...], list[MemberRecord]] = {}
        for member in self.members:
            if all(member.knows(path) for path in (LR, *others)):
                lines.setdefault(tuple(key(member.setting(path)) for path in others), []).append(member)
        return lines


# ------------------------------------------------------------------------------------------------------------ reading


def is_sweep(folder: Path) -> bool:
    """Whether a folder is the directory of a sweep rather than of a run."""
    return (folder / "sweep.json").is_file()


def read_sweep(folder: str | os.PathLike) -> SweepRecord:
    """Read a sweep directory; its points may have any status.

    Raises:
      UserError: it is not a sweep, no point has logged anything, or a file is not what a sweep writes.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; give the --workdir of a sweep")
    if not is_sweep(folder):
        raise UserError(
            f"{folder} is not the directory of a sweep: it has no sweep.json. If launch/sweep_lr.sh made it, "
            f"`python -m jaxtune.report.sweep_table {folder}` writes that"
        )
    if folder.name in ("", ".."):  # commands to paste contain the folder's name
        folder = folder.resolve()
    points = _planned(folder / "sweep.json")
    members = [_member(folder / name, point) for name, point in points.items()]
    if not any(m.run for m in members):
        raise UserError(f"{folder}: none of its {len(members)} runs has logged a step yet; there is nothing to report")
    swept = list(dict.fromkeys(path for point in points.values() for path in point))
    held_out = any(m.run and m.run.best() for m in members)
    members.sort(key=lambda m: (m.status == "failed", *m.rank(held_out)))
    return SweepRecord(folder, members, swept)


def _planned(file: Path) -> dict[str, dict[str, Any]]:
    """The planned points: directory name -> point."""
    points = sweep_table.read_points(file)
    for name, point in points.items():
        for path in point:
            find_setting(path, f"{file}: the point {name!r}")
    return points


def _member(folder: Path, point: dict[str, Any]) -> MemberRecord:
    there = (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file()
    run = read_run(folder) if there and any(_is_step(line) for line in read_metrics(folder)) else None
    status, why = _status(folder, run)
    return MemberRecord(folder.name, point, status, why, run)


def _is_step(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("step"), int)


def _status(folder: Path, run: RunRecord | None) -> tuple[str, str]:
    """The status of a point, and the reason if known."""
    why, file = "", folder / "member.json"
    if file.is_file():
        record = read_object(file, "a sweep")
        if not isinstance(record.get("status"), str):
            raise UserError(f"{file}: expected a 'status', as a sweep writes it; found {record}")
        status, why = record["status"], str(record.get("why", ""))
    else:
        status = sweep_table.status(folder)
    if status == "finished" and run and not run.summary.get("early_stop") and run.fact("cut_at") is not None:
        return "cut", f"halving ended it at step {run.fact('cut_at'):,}"
    if status.startswith("failed ("):
        return "failed", f"exit status {status[len('failed (') : -1]}: {sweep_table.last_line(folder / 'jaxtune.log')}"
    if status == "running":  # when it was written; it may have been killed since
        status = "unfinished"
    if status not in ENDED and run:
        planned = run.settings["train.steps"]
        why = f"at step {run.last_step():,}" + (f" of {planned:,}" if planned else "")
    return status, why


def key(value: Any) -> Any:
    """A setting's value as a hashable key: JSON has lists where a config has tuples."""
    if isinstance(value, dict):
        return tuple((name, key(entry)) for name, entry in sorted(value.items()))
    return tuple(map(key, value)) if isinstance(value, list | tuple) else value


def _in_order(values: Iterable[Any]) -> list[Any]:
    values = list(values)
    return sorted(values) if all(map(is_number, values)) else values
