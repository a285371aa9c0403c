"""What a check returns: a finding, with its severity, where to look and what to do."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)  # worst first
MANY = 0.01  # the share of rows from which a defect of single rows is a warning rather than a note
SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a data set, or worth knowing about it.

    Attributes:
        check: the name of the check, "duplicates".
        severity: "error": training refuses it or learns something else than intended, or evaluation is meaningless;
            "warning": worth a look; "note": for information.
        message: what was found, in numbers.
        fix: what to do.
        rows: places of example rows, in words, `SHOWN` at most.
        count: how many rows it concerns; 0: all of them together.
        drops: ledger indices of training rows that a clean set leaves out, i64[N].
        asked: whether they are left out only on request (--drop-near).
        because: for each of `drops` the index of the row that it repeats, or -1.
    """

    check: str
    severity: str
    message: str
    fix: str
    rows: tuple[str, ...] = ()
    count: int = 0
    drops: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    because: np.ndarray | None = None
    asked: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "severity": self.severity,
            "message": self.message,
            "fix": self.fix,
            "rows": list(self.rows),
            "count": self.count,
            "removed_by_write_clean": 0 if self.asked else len(self.drops),
        }


def graded(count: int, total: int) -> str:
    """Return the severity of a defect that `count` of `total` rows have."""
    return WARNING if count >= MANY * total else NOTE


def share(count: int, total: int) -> str:
    """Return `"12 rows (3.4%)"`."""
    percent = 100 * count / total if total else 0.0
    return f"{count:,} row{'s' * (count != 1)} ({percent:.{1 if percent >= 0.1 else 2}f}%)"
