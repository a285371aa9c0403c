"""Write the training data without the rows that findings drop, and a log of what was removed and why."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxtune.curate.report import DataReport
from jaxtune.curate.stream import TRAIN
from jaxtune.errors import UserError
from jaxtune.files import atomic_open, refuse_existing


def targets(out: Path, sources: int) -> tuple[list[Path], Path]:
    """Return the path of each training source's file (`clean.jsonl`, or `clean-1.jsonl`, ...) and of the log.

    Raises:
        UserError: not a .jsonl file, or one of them exists.
    """
    if out.suffix != ".jsonl":
        raise UserError(
            f"--write-clean={out}: expected a .jsonl file: rows are written as JSON, with all their columns."
        )
    files = [out] if sources == 1 else [out.with_name(f"{out.stem}-{i}.jsonl") for i in range(1, sources + 1)]
    log = out.with_name(f"{out.stem}.removed.jsonl")
    for path in (*files, log):
        refuse_existing(path)
    return files, log


def write_clean(report: DataReport, out: Path, near: bool = False) -> tuple[list[Path], Path, int, int]:
    """Write every training row but those that a finding drops: (files, log, rows kept, rows removed).

    A line of the log gives a row's place (`row`), the check that dropped it, the row it repeats (`because`, if any) and
    its content. Sources are read a second time. Near duplicates stay unless `near` is set; an exact
    duplicate equals another row in everything that is rendered.

    Raises:
        UserError: see `targets`; nothing would be left; no room on the disk.
    """
    ledger = report.ledger
    sources = [(i, opened) for i, opened in enumerate(ledger.sources) if opened.split == TRAIN]
    files, log = targets(out, len(sources))
    reasons = _reasons(report, near)
    total = int((ledger.split == TRAIN).sum())
    if len(reasons) == total:
        raise UserError(f"--write-clean={out}: no row would be left; nothing was written.")
    at = {(int(ledger.source[i]), int(ledger.number[i])): i for i in reasons}
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(log) as removed:
        for (i, opened), path in zip(sources, files):
            with atomic_open(path) as clean:
                for number, row in opened.source:
                    index = at.get((i, number))
                    if index is None:
                        clean.write(_line(row))
                        continue
                    check, other = reasons[index]
                    because = {"because": ledger.where(other)} if other >= 0 else {}
                    place = {"row": opened.source.where(number), "check": check}
                    removed.write(_line({**place, **because, "content": row}))
    return files, log, total - len(reasons), len(reasons)


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace").decode() + "\n"


def _reasons(report: DataReport, near: bool) -> dict[int, tuple[str, int]]:
    """{ledger index: (check, index of the row it repeats or -1)}, by the worst finding that drops it."""
    return dict(reversed(list(_drops(report, near))))


def _drops(report: DataReport, near: bool) -> Iterator[tuple[int, tuple[str, int]]]:
    for finding in report.findings:
        if finding.asked and not near:
            continue
        because = np.full(len(finding.drops), -1) if finding.because is None else finding.because
        for i, other in zip(finding.drops.tolist(), because.tolist()):
            yield i, (finding.check, other)
