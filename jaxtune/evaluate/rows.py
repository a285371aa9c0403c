"""Held-out rows for evaluation: tokens to score, a prompt to answer, the expected answer, and a group."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import data
from jaxtune.data.formats import make_reader
from jaxtune.data.tokenize import Encoder
from jaxtune.errors import UserError

MOST_GROUPS = 40


@dataclass
class Row:
    """One held-out row.

    Attributes:
        where: its place in words.
        tokens, mask: ids, and which of them are predicted (the first never is).
        prompt: the ids before the last trained span; None where the row has no prompt or was cut to fit.
        answer: the ids of that span, with the end token.
        asked, expected: both as text.
        group: the value of the column that rows are grouped by.
        file: the name of the file that it stands in.
    """

    where: str
    tokens: list[int]
    mask: list[bool]
    prompt: list[int] | None
    answer: list[int]
    asked: str
    expected: str
    group: str | None = None
    file: str = ""


def read_rows(
    tokenizer: Any,
    sources: str | Sequence[str],
    *,
    group_by: str | None = None,
    limit: int | None = None,
    keep: Callable[[data.Rows], np.ndarray] | None = None,
    **settings: Any,
) -> tuple[list[Row], list[str]]:
    """Read and tokenise rows as training would: (rows, sentences on what was read and left out).

    Args:
        tokenizer: a fast tokenizer of transformers.
        sources: as `jaxtune.data.prepare` takes them.
        group_by: a column of the files.
        limit: at most so many rows: those with the lowest hashes of their content, whatever their order.
        keep: rows -> which of them count, bool[N]; `limit` comes after it.
        settings: of `jaxtune.data.prepare`; with `eval_fraction` the rows that training held out of `sources`.

    Raises:
        UserError: as `prepare`; the column to group by is missing or has too many values.
    """
    rows, lines = tokenised(tokenizer, sources, limit, keep, **settings)
    groups = group_values(rows, data_names(sources), group_by) if group_by else [None] * len(rows)
    prefix = len(Encoder(tokenizer).prefix)
    cut = _cut(rows, settings)
    return [as_row(rows, i, tokenizer, prefix, bool(cut[i]), groups[i]) for i in range(len(rows))], lines


def tokenised(
    tokenizer: Any,
    sources: str | Sequence[str],
    limit: int | None = None,
    keep: Callable[[data.Rows], np.ndarray] | None = None,
    **settings: Any,
) -> tuple[data.Rows, list[str]]:
    """Read rows as training would, or those that it held out: (rows, sentences on them); see `read_rows`."""
    train, held_out, report = data.prepare(tokenizer, sources, **settings)
    rows = data.Rows.concatenate(train) if held_out is None else held_out
    lines = [report.lines()[-1]] if held_out is not None else report.lines()
    if keep is not None:
        rows = rows.select(keep(rows))
    if limit is not None and limit < len(rows):
        rows = rows.select(np.sort(np.argsort(rows.digest, kind="stable")[:limit]))
        lines.append(f"{limit:,} of the rows are used, drawn by a hash of their content")
    return rows, lines


def data_names(sources: str | Sequence[str]) -> list[str]:
    """The names of the sources in an argument of `prepare`."""
    return data.source_names(sources)


def check_format(training: str, names: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Refuse evaluation data that would be read in another format than the training data was.

    Args:
        training: the first source of the training data; if it cannot be read any more, nothing is checked.
        names: the sources of the evaluation data.
        settings: of `make_reader`.
    """
    try:
        source = data.read(training)
        expected = make_reader(source, **settings)
    except UserError:
        return
    for name in names:
        other = data.read(name)
        number, row = next(iter(other))
        try:
            found = make_reader(other, **settings)
        except UserError as error:
            raise UserError(str(error).replace("data.columns", "--columns")) from None
        if found.format != expected.format:
            raise UserError(
                f"{other.where(number)}: this file is {found.format}, and the run was trained on {expected.format} "
                f"({training}: {', '.join(expected.columns)}). Columns found: {', '.join(row)}. Give --columns "
                "(prompt=THEIRS,completion=THEIRS), or --format if another format is meant."
            )


def _cut(rows: data.Rows, settings: Mapping[str, Any]) -> np.ndarray:
    """Which rows may be pieces of longer ones, so that prompt or answer is incomplete."""
    if settings.get("overlength", "drop") == "drop":
        return np.zeros(len(rows), bool)
    if (form := settings.get("labels")) is not None and form.cuts_itself:
        return form.incomplete(rows)
    places = np.stack([rows.source.astype(np.int64), rows.origin])
    _, inverse, counts = np.unique(places, axis=1, return_inverse=True, return_counts=True)
    return (rows.length >= settings["max_length"]) | (counts[inverse.ravel()] > 1)


def as_row(
    rows: data.Rows, i: int, tokenizer: Any, prefix: int = 0, cut: bool = False, group: str | None = None
) -> Row:
    """Row i in the form that evaluation uses.

    Args:
        rows: tokenised rows.
        i: which of them.
        tokenizer: that made them.
        prefix: how many tokens the tokenizer puts before every text; a row with no more than these has no prompt.
        cut: whether the row may be a piece of a longer one; such a row has no prompt.
        group: its value of the column that rows are grouped by, if any.
    """
    tokens, mask = rows[i]
    found = row_of(tokenizer, tokens.tolist(), mask.astype(bool), rows.where(i), prefix, cut)
    found.group, found.file = group, Path(rows.file(i)).name
    return found


def row_of(
    tokenizer: Any, ids: list[int], mask: np.ndarray, where: str = "", prefix: int = 0, cut: bool = False
) -> Row:
    """Tokens of a row, with which of them are trained, bool[T], in the form that evaluation uses; see `as_row`."""
    end = len(mask) - int(np.argmax(mask[::-1]))
    before = np.flatnonzero(~mask[:end])
    start = int(before[-1]) + 1 if len(before) else 0
    whole, asked = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:end], ids[:start]))
    alone = tokenizer.decode(ids[start:end], skip_special_tokens=True)
    expected = whole[len(asked) :] if whole.startswith(asked) else alone
    prompt = ids[:start] if start > prefix and not cut else None
    scored = mask.copy()
    scored[0] = False
    return Row(where, ids, scored.tolist(), prompt, ids[start:end], tokenizer.decode(ids[:start]), expected.strip())


def group_values(rows: data.Rows, names: Sequence[str], column: str) -> list[str]:
    """The column's value for each row."""
    by_label: dict[str, dict[int, str]] = {}
    for name in names:
        source = data.read(name)
        wanted = {int(o) for o, s in zip(rows.origin, rows.source, strict=True) if rows.labels[int(s)] == source.label}
        values = by_label.setdefault(source.label, {})
        for number, row in source:
            if column not in row:
                meant = [f" Did you mean {name!r}?" for name in difflib.get_close_matches(column, row, n=1, cutoff=0.7)]
                raise UserError(
                    f"--group-by={column}: {source.where(number)} has no column {column!r}.{''.join(meant)} "
                    f"Group by one that it has: {', '.join(row)}."
                )
            if number in wanted:
                values[number] = "(none)" if row[column] is None else str(row[column])
    found = [by_label[rows.labels[int(s)]][int(o)] for o, s in zip(rows.origin, rows.source, strict=True)]
    distinct = len(set(found))
    if distinct > MOST_GROUPS:
        raise UserError(
            f"--group-by={column}: {distinct:,} different values in {len(found):,} rows; a column with at most "
            f"{MOST_GROUPS} makes groups that can be compared."
        )
    return found
