"""Checks of pairs of texts that belong together: documents and queries that recur, leak, or contradict one another."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxtune.curate.finding import ERROR, NOTE, SHOWN, WARNING, Finding, graded, share
from jaxtune.curate.sets import first_of, pairs
from jaxtune.curate.stream import EVAL, TRAIN, Chunk, Ledger
from jaxtune.data import RowForm


def text_checks(form: RowForm | None, rows_a_batch: int) -> list[Any]:
    """Return the checks for rows of this form, fresh."""
    return [PairsOfTexts(form, rows_a_batch)] if form is not None and form.belongs else []


class PairsOfTexts:
    """Documents that several queries share, queries with several documents, documents on both sides of the split, and
    rows whose texts are the same, or whose negative is their positive.
    """

    def __init__(self, form: Any, rows_a_batch: int):
        self.form, self.rows_a_batch = form, rows_a_batch
        self._parts: list[tuple[np.ndarray, ...]] = [(*(np.zeros(0, np.int64) for _ in range(3)), np.zeros(0, bool))]

    def see(self, chunk: Chunk) -> None:
        if not len(chunk):
            return
        texts = [[_plain(text) for text in self.form.without_prefixes(example)] for example in chunk.examples]
        query, document = (np.array([hash(row[i]) for row in texts], np.int64) for i in range(2))
        wrong = np.array([row[1] in row[2:] for row in texts], bool)
        self._parts.append((chunk.first + np.arange(len(chunk)), query, document, wrong))

    def findings(self, ledger: Ledger) -> Iterator[Finding]:
        index, query, document, wrong = (np.concatenate(column) for column in zip(*self._parts))
        train = ledger.split[index] == TRAIN
        rows, asked, found = index[train], query[train], document[train]
        if not len(rows):
            return
        yield from _drops(
            rows[wrong[train]],
            len(rows),
            ledger,
            "own_negative",
            "have their own positive among their negatives",
            "take it out of the negatives, or leave the rows out with jaxtune data --write-clean",
        )
        yield from _drops(
            rows[asked == found],
            len(rows),
            ledger,
            "same_texts",
            "have one text twice, as query and as document, which teaches nothing",
            "leave them out with jaxtune data --write-clean; if there are many, see data.columns",
        )
        # The first of equal pairs, in the order of the data: hashes of texts are others in each process.
        apart = np.sort(np.unique(np.stack([asked, found], 1), axis=0, return_index=True)[1])
        yield from self._shared(rows[apart], found[apart], asked[apart], ledger)
        yield from _leaked(ledger, index, document, query)

    def _shared(self, rows, found, asked, ledger: Ledger) -> Iterator[Finding]:
        for key, name, words in (
            (found, "shared_documents", "have a document that answers other queries, too"),
            (asked, "several_documents", "have a query that other rows answer by other documents"),
        ):
            first, counts = first_of(key), np.unique(key, return_inverse=True, return_counts=True)
            size = counts[2][counts[1].reshape(-1)]
            if (size == 1).all():
                continue
            again = first != np.arange(len(key))
            meet = in_one_batch(size, len(key), self.rows_a_batch)
            yield Finding(
                name,
                WARNING if meet >= 0.1 else NOTE,
                f"{share(int((size > 1).sum()), len(key))} of the training data {words} (case and white space apart); "
                f"in a batch of {self.rows_a_batch} drawn at random, {meet:.1%} of rows meet one of these",
                "nothing, if texts are equal: such documents are no negatives of each other's queries. If there are "
                "many, a batch has fewer negatives: raise train.batch_size, or keep fewer of these rows",
                pairs(ledger, rows[again], rows[first[again]]),
                int((size > 1).sum()),
            )


def in_one_batch(size: np.ndarray, rows: int, batch: int) -> float:
    """How likely a row meets another of its group in a batch drawn at random without replacement.

    Args:
        size: of each row's group, i64[N], itself included.
        rows: N.
        batch: rows of a batch.
    """
    others = min(batch, rows) - 1
    drawn = np.arange(others)
    sizes, count = np.unique(size, return_counts=True)
    free = np.maximum(rows - sizes[:, None] - drawn, 0) / np.maximum(rows - 1 - drawn, 1)
    return float(1 - np.average(np.prod(free, axis=1), weights=count)) if others else 0.0


def _leaked(ledger: Ledger, index: np.ndarray, document: np.ndarray, query: np.ndarray) -> Iterator[Finding]:
    """Evaluation rows whose document is trained on under another query."""
    train, held = (ledger.split[index] == split for split in (TRAIN, EVAL))
    if not held.any():
        return
    known = {key: i for i, key in zip(index[train][::-1].tolist(), document[train][::-1].tolist())}
    asked = set(zip(query[train].tolist(), document[train].tolist()))
    leaked = [
        (i, known[d])
        for i, q, d in zip(index[held].tolist(), query[held].tolist(), document[held].tolist())
        if d in known and (q, d) not in asked
    ]
    if leaked:
        yield Finding(
            "leaked_documents",
            WARNING,
            f"{share(len(leaked), int(held.sum()))} of the evaluation data have a document that is trained on with "
            "other queries: they measure new queries, not new documents",
            "fine where all documents are known when the model is used, as in a search over one corpus; else draw "
            "evaluation rows of other documents",
            pairs(ledger, *np.array(leaked[:SHOWN]).T),
            len(leaked),
        )


def _drops(at: np.ndarray, total: int, ledger: Ledger, name: str, words: str, fix: str) -> Iterator[Finding]:
    if len(at):
        yield Finding(
            name,
            ERROR if len(at) == total else graded(len(at), total),
            f"{share(len(at), total)} of the training data {words} (case and white space apart)",
            fix,
            ledger.places(at, SHOWN),
            len(at),
            at,
        )


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
