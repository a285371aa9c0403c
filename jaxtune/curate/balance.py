"""Class and group balance: columns of few values, and how answers depend on them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from jaxtune.curate.finding import NOTE, WARNING, Finding
from jaxtune.curate.stream import TRAIN, Chunk, Ledger
from jaxtune.data.row_form import RowForm

MOST = 200  # values of a column at most, for it to define groups
LONGEST = 64  # characters in a value
ROWS_A_VALUE = 5  # at least, on average; with fewer, values are names, not groups
IMBALANCE = 10.0  # the largest class over the smallest
RARE = 0.02  # share of the rows under which a group is small
ASSOCIATION = 0.3  # Cramér's V that counts as a medium effect for two classes (Cohen 1988)
LEVEL = 0.01  # of the test that answers do not depend on a group
ANSWER = "answer"


class Balance:
    """Counts rows by answer (if answers are classes) and by every column of few values.

    After the last chunk, `groups` is {column: Counter}; the answer's is under "answer".

    Args:
        several: example -> its classes, where an example has several; then these are counted.
    """

    def __init__(self, several: Callable[[Any], Iterable[str]] | None = None):
        self._several = several
        self.groups: dict[str, Counter] = {ANSWER: Counter()}
        self._with_answer: dict[str, Counter] = {}
        self._gone: set[str] = set()

    def see(self, chunk: Chunk) -> None:
        if chunk.opened.split != TRAIN:
            return
        if not any(chunk.prompts):
            self._drop(ANSWER)
        if self._several is not None and ANSWER in self.groups:
            self.groups[ANSWER].update(name for example in chunk.examples for name in self._several(example))
        values = {c: [row.get(c) for row in chunk.rows] for c in self._columns(chunk)}
        if ANSWER in self.groups and self._several is None:
            values[ANSWER] = chunk.answers
        for column, found in values.items():
            if self._grouped(found):
                self.groups.setdefault(column, Counter()).update(found)
            else:
                self._drop(column)
        for column in [c for c, counts in self.groups.items() if len(counts) > MOST]:
            self._drop(column)
        if ANSWER in values and ANSWER in self.groups:
            for column in self.groups.keys() & values.keys() - {ANSWER}:
                pairs = self._with_answer.setdefault(column, Counter())
                pairs.update(zip(values[column], chunk.answers))

    def _columns(self, chunk: Chunk) -> set[str]:
        names = {name for row in chunk.rows[:1] for name in row} | self.groups.keys() - {ANSWER}
        return names - self._gone

    def _drop(self, column: str) -> None:
        self.groups.pop(column, None)
        self._with_answer.pop(column, None)
        self._gone.add(column)

    @staticmethod
    def _grouped(values: list[Any]) -> bool:
        return all(
            v is None or isinstance(v, (bool, int)) or (isinstance(v, str) and len(v) <= LONGEST) for v in values
        )

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        self.groups = {
            c: counts
            for c, counts in self.groups.items()
            if len(counts) >= 2 and sum(counts.values()) >= ROWS_A_VALUE * len(counts)
        }
        answers = self.groups.get(ANSWER, Counter())
        for column in [c for c, counts in self.groups.items() if c != ANSWER and _as_text(counts) == answers]:
            del self.groups[column]  # the answer's own column
        if ANSWER in self.groups:
            yield from class_balance(self.groups[ANSWER])
        for column, counts in self.groups.items():
            if column != ANSWER:
                yield from self._group(column, counts)

    def _group(self, column: str, counts: Counter) -> Iterator[Finding]:
        total = sum(counts.values())
        rare = [(value, n) for value, n in reversed(counts.most_common()) if n < RARE * total]
        if rare:
            yield Finding(
                "group_balance",
                NOTE,
                f"of the {len(counts)} groups by column {column!r}, {len(rare)} have under {RARE:.0%} of the rows each",
                "the model learns little about them, and a score over all rows hides it: score by group",
                tuple(f"{_named(value)}: {n:,} rows" for value, n in rare[:5]),
            )
        pairs = self._with_answer.get(column, Counter())
        strength, p = cramers_v(pairs), independence(pairs)
        if strength >= ASSOCIATION and p < LEVEL:
            yield Finding(
                "group_bias",
                WARNING,
                f"the answer depends on column {column!r} (Cramér's V {strength:.2f} of 0 to 1, p = {p:.2g})",
                "if the column should not decide the answer, balance the answers within its groups, and score by group",
                tuple(f"{_named(value)}: {n:,} rows" for value, n in counts.most_common(5)),
            )


def label_notes(form: RowForm) -> Iterator[Finding]:
    """Notes on how the labels were read."""
    for note in form.notes:
        alike = "differ in case" in note
        yield Finding("labels", WARNING if alike else NOTE, note, "check that this is meant")


def class_balance(counts: Counter) -> Iterator[Finding]:
    """A finding if the classes have very different numbers of rows."""
    ordered = counts.most_common()
    (most, many), (least, few) = ordered[0], ordered[-1]
    if many >= IMBALANCE * few:
        yield Finding(
            "class_balance",
            WARNING,
            f"{len(counts)} classes, unbalanced: {_named(most)} {many:,} times, {_named(least)} {few:,}",
            "judge by macro-F1 rather than accuracy, and collect or repeat rows of the rare answers",
            tuple(f"{_named(value)}: {n:,} rows" for value, n in ordered[: -min(5, len(ordered)) - 1 : -1]),
        )


def _as_text(counts: Counter) -> Counter:
    return Counter({str(value): n for value, n in counts.items()})


def _named(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def independence(pairs: Counter) -> float:
    """The chi-squared test that a and b of counts {(a, b): n} are independent: p; 1 for a table of one row."""
    from scipy.special import chdtrc  # takes a third of a second

    table = _table(pairs)
    r, k = table.shape
    if min(r, k) < 2:
        return 1.0
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    return float(chdtrc((r - 1) * (k - 1), ((table - expected) ** 2 / expected).sum()))


def _table(pairs: Counter) -> np.ndarray:
    """Counts {(a, b): n} as a table, f64[A, B]."""
    first, second = (sorted({pair[side] for pair in pairs}, key=repr) for side in (0, 1))
    table = np.zeros((len(first), len(second)))
    rows, columns = ({value: i for i, value in enumerate(values)} for values in (first, second))
    for (a, b), n in pairs.items():
        table[rows[a], columns[b]] = n
    return table


def cramers_v(pairs: Counter) -> float:
    """Return Cramér's V of a table of counts {(a, b): n}, from 0 (independent) to 1; 0 for a table of one row.

    Corrected for the bias of small samples (Bergsma 2013).
    """
    if not pairs:
        return 0.0
    table = _table(pairs)
    total, (r, k) = table.sum(), table.shape
    if min(r, k) < 2 or total < 2:
        return 0.0
    expected = np.outer(table.sum(1), table.sum(0)) / total
    phi = ((table - expected) ** 2 / expected).sum() / total
    phi = max(0.0, phi - (r - 1) * (k - 1) / (total - 1))
    smaller = min(r - (r - 1) ** 2 / (total - 1), k - (k - 1) ** 2 / (total - 1)) - 1
    return float(np.sqrt(phi / smaller)) if smaller > 0 else 0.0
