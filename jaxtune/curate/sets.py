"""Checks that compare rows with one another by the hashes in the ledger; none of them reads a chunk."""

from collections.abc import Iterator

import numpy as np

from jaxtune.curate.finding import ERROR, SHOWN, WARNING, Finding, graded, share
from jaxtune.curate.stream import EVAL, TRAIN, Chunk, Ledger

FEW = 5  # copies of an answer from which it is reported


class SetCheck:
    """A check that needs the ledger only."""

    def see(self, chunk: Chunk) -> None:
        pass


def first_of(keys: np.ndarray) -> np.ndarray:
    """Return for each entry the position of the first entry that equals it, i64[N]."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def pairs(ledger: Ledger, index: np.ndarray, others: np.ndarray) -> tuple[str, ...]:
    """Return `"a.jsonl:7 = a.jsonl:3"` for the first pairs of two lists of indices."""
    return tuple(f"{ledger.where(i)} = {ledger.where(j)}" for i, j in zip(index[:SHOWN], others[:SHOWN]))


class Duplicates(SetCheck):
    """Training rows that are equal in the columns that are used."""

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        rows = ledger.rows(TRAIN)
        first = first_of(ledger.digest[rows])
        again = first != np.arange(len(rows))
        if again.any():
            index, others = rows[again], rows[first[again]]
            yield Finding(
                "duplicates",
                graded(len(index), len(rows)),
                f"{share(len(index), len(rows))} of the training data repeat an earlier one exactly",
                "leave them out with jaxtune data --write-clean; to weight rows, use data.weights or more epochs",
                pairs(ledger, index, others),
                len(index),
                index,
                others,
            )


class Overlap(SetCheck):
    """Evaluation rows, or their prompts, that are in the training data too."""

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        train, held = ledger.rows(TRAIN), ledger.rows(EVAL)
        if not len(held):
            return
        known, lines = _lookup(ledger.digest[train], ledger.digest[held])
        same = known >= 0
        if same.any():
            ours, theirs = lines
            yield Finding(
                "overlap",
                ERROR,
                f"{share(int(same.sum()), len(held))} of the evaluation data are in the training data: their score is "
                "memory, not skill",
                "leave the training rows out with jaxtune data --write-clean, or draw other evaluation rows",
                pairs(ledger, held[same], train[known[same]]),
                int(same.sum()),
                train[ours[same[theirs]]],
                held[theirs[same[theirs]]],
            )
        known, _ = _lookup(ledger.prompt[train], ledger.prompt[held])
        asked = (known >= 0) & ~same & (ledger.prompt[held] != 0)
        if asked.any():
            message = "have a prompt that is in the training data (case and white space apart)"
            yield Finding(
                "overlap",
                WARNING,
                f"{share(int(asked.sum()), len(held))} of the evaluation data {message}",
                "draw other evaluation rows, or take the training rows out; nothing is removed for you",
                pairs(ledger, held[asked], train[known[asked]]),
                int(asked.sum()),
            )


def _lookup(train: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """For each of `held` the position of the first equal in `train` or -1; and all pairs (in train, first in held)."""
    values, first = np.unique(held, return_index=True)
    at = np.searchsorted(values, train)
    hit = (at < len(values)) & (values[np.minimum(at, len(values) - 1)] == train)
    ours = np.flatnonzero(hit)
    values, first_ours = np.unique(train, return_index=True)
    back = np.searchsorted(values, held)
    found = (back < len(values)) & (values[np.minimum(back, len(values) - 1)] == held) if len(values) else back < 0
    known = np.where(found, first_ours[np.minimum(back, len(values) - 1)] if len(values) else -1, -1)
    return known, (ours, first[at[ours]])


class Conflicts(SetCheck):
    """Training rows with the same prompt and different answers."""

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        rows = ledger.rows(TRAIN)
        rows = rows[ledger.prompt[rows] != 0]
        first = first_of(ledger.prompt[rows])
        differs = ledger.answer[rows] != ledger.answer[rows[first]]
        if not differs.any():
            return
        prompts = len(np.unique(first[differs]))
        labels = len(np.unique(ledger.answer[rows])) <= len(rows) / 10
        yield Finding(
            "conflicts",
            WARNING if labels else graded(int(differs.sum()), len(rows)),
            f"{share(int(differs.sum()), len(rows))} of the training data answer one of {prompts:,} earlier prompts "
            f"differently (case and white space apart)",
            "decide which answer is right: where answers are labels, one of them is wrong; nothing is removed for you",
            tuple(
                f"{ledger.where(i)} against {ledger.where(j)}"
                for i, j in zip(rows[differs][:SHOWN], rows[first[differs]][:SHOWN])
            ),
            int(differs.sum()),
        )


class RepeatedAnswers(SetCheck):
    """One answer to many questions, where answers are otherwise free text."""

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        rows = ledger.rows(TRAIN)
        rows = rows[(ledger.prompt[rows] != 0) & (ledger.answer[rows] != 0)]
        values, counts = np.unique(ledger.answer[rows], return_counts=True)
        if not len(values) or len(values) <= len(rows) / 10:  # labels, or short forms: see the balance of classes
            return
        for at in np.argsort(-counts, kind="stable")[:3]:
            if counts[at] < max(FEW, len(rows) / 100):
                return
            index = rows[ledger.answer[rows] == values[at]]
            yield Finding(
                "repeated_answers",
                WARNING,
                f"{share(len(index), len(rows))} of the training data have one and the same answer",
                "the model learns to give it without reading: keep some of these rows, or write answers for them",
                ledger.places(index, SHOWN),
                len(index),
            )


def set_checks(*, labelled: bool = False, judged: bool = False) -> list[SetCheck]:
    """Return the checks, fresh; labels repeat by nature, and a prompt has several answers where they are judged."""
    checks = [Overlap(), Duplicates(), *([] if judged else [Conflicts()])]
    return [*checks, *([] if labelled else [RepeatedAnswers()])]
