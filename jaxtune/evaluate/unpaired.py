"""Questions without an answer, made from questions that have one: each beside the context of another row.

{"context": "Paris has two million people.", "question": "How many ...?", "answer": "two million"}     false
{"context": "Ants live in hills.",           "question": "How many ...?", "answer": "two million"}     true
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import data
from jaxtune.errors import UserError
from jaxtune.evaluate.asks import Ask, read_asks
from jaxtune.evaluate.evaluation import Options, sources
from jaxtune.evaluate.kept import key_of
from jaxtune.files import atomic_write_text

COLUMN = "unanswerable"


def unpaired(asks: Sequence[Ask], column: str) -> list[dict[str, Any]]:
    """The rows, and after them each with the context of another row, one in which its answer does not stand.

    Args:
        asks: the rows.
        column: that holds the context.

    Returns:
        The rows with a column `unanswerable`. A row for which there is no such context has no second one.

    Raises:
        UserError: a row has no such column, or no context is without the answers of other rows.
    """
    for ask in asks:
        if not isinstance(ask.row.get(column), str):
            raise UserError(
                f"--unpaired={column}: {ask.where} has no text in a column {column!r}; its columns: "
                f"{', '.join(ask.row)}. Name the one that holds what a question is answered from."
            )
        if COLUMN in ask.row:
            raise UserError(
                f"--unpaired={column}: {ask.where} has a column {COLUMN!r} already; give --unanswerable={COLUMN} alone."
            )
    made = []
    for i, ask in enumerate(asks):
        answer = ask.answer.casefold()
        others = (asks[(i + step) % len(asks)].row[column] for step in range(1, len(asks)))
        if other := next((text for text in others if text != ask.row[column] and answer not in text.casefold()), None):
            made.append({**ask.row, column: other, COLUMN: True})
    if not made:
        raise UserError(
            f"--unpaired={column}: in no row can another row's {column} stand, because all are equal or hold its "
            "answer; give rows of different contexts."
        )
    return [*({**ask.row, COLUMN: False} for ask in asks), *made]


def write_unpaired(source: Any, cfg: Any, tokenizer: Any, options: Options, column: str, file: Path) -> Options:
    """Write the rows of an evaluation with those that have no answer into a file, and return the options that read it.

    Raises:
        UserError: as `unpaired`, or the rows cannot be read.
    """
    settings, names, fraction = sources(source, cfg, options)
    reading = data.reading(settings.data)
    del reading["allow_left_out"]
    reading["format"] = options.format or reading["format"]
    if options.columns is not None:
        reading["columns"] = options.columns
    if options.columns is not None or options.format is not None:
        reading["template"] = None
    asks = read_asks(names, tokenizer, **reading)
    if fraction:
        out = data.held_out(np.array([ask.digest for ask in asks], np.uint64), fraction)
        asks = [ask for ask, held in zip(asks, out, strict=True) if held]
    asks = sorted(asks, key=lambda ask: key_of(ask.digest))[: options.rows]
    rows = unpaired(asks, column)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
    return replace(options, data=[str(file)], rows=None)
