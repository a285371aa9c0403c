"""Checks that training makes on its data, from the tokens that it has read anyway, without the texts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxtune.curate.answers import of_rows
from jaxtune.curate.balance import MOST, ROWS_A_VALUE, class_balance, label_notes
from jaxtune.curate.finding import SEVERITIES, WARNING, Finding, graded, share
from jaxtune.curate.report import DataReport, length_summary
from jaxtune.curate.sets import set_checks
from jaxtune.curate.stream import EVAL, TRAIN, Ledger, Opened
from jaxtune.data import Report, RowForm, Rows, Source, SourceReport
from jaxtune.data.formats import Reader
from jaxtune.data.preview import runs
from jaxtune.data.rows import trained_counts

AT_ONCE = 2**20  # tokens that are hashed together


def glance(
    tokenizer: Any,
    train: Sequence[Rows],
    held_out: Rows | None,
    report: Report,
    form: RowForm | None = None,
    *,
    samples: int = 2,
) -> DataReport:
    """Look for duplicates, overlap, conflicts, repeated answers, unbalanced classes, and for rows that were left out.

    Args:
        tokenizer: a fast tokenizer of transformers.
        train: the training rows of each source, from `jaxtune.data.prepare`.
        held_out: the evaluation rows from there, or None.
        report: the report from there.
        form: of labelled rows; None: rows of text.
        samples: how many rows to show, from the first on.
    """
    train = [_whole(rows) for rows in train]
    ledger = Ledger([], report.sources[0].max_length)
    plain = form is None and all(source.format == "text" for source in report.sources)
    judged = form is not None and form.judged
    for rows in train:
        _add(ledger, rows, TRAIN, form, plain)
    if held_out is not None:
        _add(ledger, _whole(held_out), EVAL, form, plain)
    ledger.close()
    classes = form.classes(train) if form else None if plain else _answers(tokenizer, train, ledger)
    counted = None if judged else classes  # what judged answers are of is said in its own words
    findings = [
        *(finding for source in report.sources for finding in _left_out(source)),
        *(
            finding
            for check in set_checks(labelled=form is not None and not form.text, judged=judged)
            for finding in check.findings(ledger)
        ),
        *(of_rows(form, train, token_hashes) if judged else ()),
        *(class_balance(counted) if counted else ()),
        *(label_notes(form) if form else ()),
    ]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    drawn = [] if form else [(train[0].where(i), runs(tokenizer, *train[0][i])) for i in range(len(train[0]))[:samples]]
    return DataReport(findings, _summary(ledger, report, classes), drawn, ledger)


def _whole(rows: Rows) -> Rows:
    """Rows without the later pieces of those that were split."""
    places = np.stack([rows.source.astype(np.int64), rows.origin])
    return rows.select(np.sort(np.unique(places, axis=1, return_index=True)[1]))


def _add(ledger: Ledger, rows: Rows, split: int, form: RowForm | None, plain: bool) -> None:
    base = len(ledger.sources)
    for label in rows.labels:
        named = Source(label, label, lambda: iter(()), lambda: "")
        ledger.sources.append(Opened(named, Reader("", (), lambda where, row: row), split))
    if form is None or form.text:
        given, answer = token_hashes(rows, 0), token_hashes(rows, 1)
    else:  # the whole text is the prompt; what is predicted is not a token
        given, answer = token_hashes(rows, None), form.answers(rows)
    trained = trained_counts(rows, first=1 if form is None or form.text else 0)
    numbers = {"source": base + rows.source, "number": rows.origin, "length": rows.longest, "digest": rows.digest}
    texts = {"prompt": 0 * given if plain else given, "answer": answer}
    ledger.add(len(rows), numbers | texts | {"trained": trained, "fitted": trained})


def token_hashes(rows: Rows, side: int | None) -> np.ndarray:
    """Return a hash of each row's tokens in their order, i64[R]; 0 for a row without any.

    Args:
        rows: R rows.
        side: which tokens count. 0: those of the prompt; 1: those that are trained; None: all.
    """
    found = np.zeros(len(rows), np.uint64)
    ends = np.cumsum(rows.length, dtype=np.int64)
    at = 0
    while at < len(rows):
        before = ends[at - 1] if at else 0
        upto = max(at + 1, int(np.searchsorted(ends, before + AT_ONCE, side="right")))
        part = rows.select(np.arange(at, upto))
        owner = np.repeat(np.arange(len(part)), part.length)
        first = np.cumsum(part.length) - part.length
        place = part.start[owner] + np.arange(len(owner)) - first[owner]
        if side is not None:
            kept = (np.asarray(part.mask[place]) > 0) == bool(side)
            owner, place = owner[kept], place[kept]
        bounds = np.searchsorted(owner, np.arange(len(part) + 1))
        nth = np.arange(len(owner)) - bounds[owner]
        hashes = _mixed(_mixed(np.asarray(part.tokens[place]).astype(np.uint64)) ^ nth.astype(np.uint64))
        total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes, dtype=np.uint64)])
        found[at:upto] = np.where(bounds[1:] > bounds[:-1], (total[bounds[1:]] - total[bounds[:-1]]) | np.uint64(1), 0)
        at = upto
    return found.view(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Spread the bits of u64 (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _left_out(source: SourceReport) -> Iterator[Finding]:
    """What training dropped, cut or split."""
    if source.lost:
        yield Finding(
            "lost_words",
            WARNING,
            f"{source.lost:,} labelled words of {source.name} give no token, so that their labels are not trained",
            "they are white space or characters that the tokenizer drops: remove them",
            count=source.lost,
        )
    if source.too_long:
        fate = {"drop": "are dropped", "truncate": "are cut", "split": "are split"}[source.overlength]
        yield Finding(
            "max_length",
            graded(source.too_long, source.rows),
            f"{share(source.too_long, source.rows)} of {source.name} exceed data.max_length={source.max_length:,} "
            f"and {fate} (the longest has {source.longest:,} tokens)",
            "raise data.max_length if the model has more positions, or shorten these rows",
            count=source.too_long,
        )
    if source.untrained:
        yield Finding(
            "empty_masks",
            graded(source.untrained, source.rows),
            f"{share(source.untrained, source.rows)} of {source.name} have no token to train on and are dropped",
            "a conversation needs an assistant's turn, a pair a completion",
            count=source.untrained,
        )


def _answers(tokenizer: Any, train: Sequence[Rows], ledger: Ledger) -> Counter | None:
    """How often each answer occurs; None where there are too many for classes."""
    index = ledger.rows(TRAIN)
    values, firsts, counts = np.unique(ledger.answer[index], return_index=True, return_counts=True)
    if not 2 <= len(values) <= min(MOST, len(index) / ROWS_A_VALUE):
        return None
    bounds = np.cumsum([len(rows) for rows in train])
    found: Counter = Counter()
    for i, n in zip(firsts.tolist(), counts.tolist()):
        part = int(np.searchsorted(bounds, i, side="right"))
        tokens, mask = train[part][i - int(bounds[part]) + len(train[part])]
        found[tokenizer.decode(tokens[mask > 0], skip_special_tokens=True).strip()] += n
    return found


def _summary(ledger: Ledger, report: Report, classes: Counter | None) -> dict[str, Any]:
    index, first = ledger.rows(TRAIN), report.sources[0]
    pairs = [*(("train", source) for source in report.sources), *(("eval", source) for source in report.eval_sources)]
    return {
        "sources": [{"name": s.name, "format": s.format, "split": split, "rows": s.rows} for split, s in pairs],
        "rows": sum(source.rows for source in report.sources),
        "rows_trained": len(index),
        "eval_rows": report.eval_rows,
        "tokens": sum(source.tokens for source in report.sources),
        "trained_tokens": sum(source.trained for source in report.sources),
        "max_length": first.max_length,
        "overlength": first.overlength,
        "over_limit": sum(source.too_long for source in report.sources),
        "groups": {"label": [{"value": v, "rows": n} for v, n in classes.most_common()]} if classes else {},
        **length_summary(ledger.length[index]),
    }
