"""Rows of a query and documents that a cross-encoder reads together, one pair at a time.

    query, document, label               one pair: 1 for an answer, 0 for none, or a number between
    query, positive, negative, ...       the answer and documents that are none; negatives as `jaxtune.data.embeddings`
    query, positive, negative, ..., scores   a number for each document

The names of columns are those of `jaxtune.data.embeddings`. A row's pairs lie one behind the other, each as the
tokenizer joins two texts; the mark of a token is the number of its pair, from 1, and 128 more in the second segment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtune.data.embeddings import LABELS, Texts, TextsAssembler, TextsEncoder, TextsForm, text_lengths
from jaxtune.data.formats import Reader
from jaxtune.data.messages import Notes
from jaxtune.data.rows import Rows
from jaxtune.data.sources import Source
from jaxtune.data.tokenize import check_unicode
from jaxtune.errors import UserError
from jaxtune.objectives.contrasts import SCORE, SCORES, Contrast

TYPE = 128
MOST = 127  # pairs of a row
SETTING = "objective.ranking"


def numbers(marks: np.ndarray) -> np.ndarray:
    """The number of each token's pair, from 1."""
    return np.asarray(marks) & (TYPE - 1)


@dataclass
class RankForm(TextsForm):
    """How such rows are read; `contrast` is the name of the loss."""

    joined: str | None = None  # what is put between the two texts for a decoder; None: they are two segments

    setting = SETTING
    lists = True
    number = staticmethod(numbers)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"form": "ranking", "joined": self.joined}

    def reader(self, source: Source) -> Reader:
        number, row = next(iter(source))
        labelled = self.columns.get("label") or next((name for name in LABELS if name in row), None)
        single = labelled is not None and not any(name in row for name in ("positive", "pos", "negative"))
        if single and self.contrast != "binary":
            raise UserError(
                f"{source.where(number)}: {SETTING}={self.contrast} compares the documents of a query, and this row "
                "has one with a label: give rows of query, positive and negative, or choose binary."
            )
        if single:
            self.reads = Contrast(SCORE)
        else:
            self.reads = Contrast(SCORES if labelled else "nothing", 3, None)
        inner = super().reader(source)

        def convert(where: str, row: dict) -> Texts:
            found = inner.convert(where, row)
            pairs = len(found.texts) - 1
            if pairs > MOST:
                raise UserError(f"{where}: {pairs} documents in a row; at most {MOST}.")
            label = found.label or (1.0, *[0.0] * (pairs - 1))
            if self.contrast == "binary" and not all(0 <= x <= 1 for x in label):
                raise UserError(f"{where}: {label} is no probability; {SETTING}=binary needs labels from 0 to 1.")
            return Texts(found.texts, label)

        return self._wide_enough(source, Reader(inner.format, inner.columns, convert, inner.notes))

    def encoder(self, tokenizer: Any) -> "RankEncoder":
        return RankEncoder(tokenizer, self)

    def lengths(self, rows: Rows) -> np.ndarray:
        return np.array([text_lengths(numbers(rows[i][1])).max(initial=0) for i in range(len(rows))], np.int64)

    def check(self, rows: Sequence[Rows]) -> None:
        labels = np.concatenate([part.target.reshape(-1) for part in rows])
        if len(labels) and (labels == labels[0]).all():
            raise UserError(
                f"data.train: all {len(labels):,} documents have the label {labels[0]:g}, and there is nothing to tell "
                "apart. Add documents that are no answers."
            )

    def said(self, rows: Sequence[Rows]) -> list[str]:
        return []


class RankEncoder(TextsEncoder):
    """Pairs of a query and a document to token ids, one behind the other."""

    def __init__(self, tokenizer: Any, form: RankForm):
        self.form, self.cut = form, form.cut
        self.backend, self.joined = tokenizer.backend_tokenizer, form.joined
        self.typed = "token_type_ids" in tokenizer.model_input_names
        self.notes = Notes()

    def encode(self, places: list[str], examples: list[Texts]) -> Iterator[tuple[list[int], list[int], list[float]]]:
        """Yield (ids, marks, label) for each example, in order; a label of -1 is that of a document that is missing."""
        pairs = []
        for place, (texts, _) in zip(places, examples):
            for text in texts:
                check_unicode(place, text)
            two = [(texts[0], text) for text in texts[1:]]
            pairs += two if self.joined is None else map(self.joined.join, two)
        self.backend.no_padding()
        if self.cut is None:
            self.backend.no_truncation()
        else:
            self.backend.enable_truncation(self.cut, strategy="longest_first")
        try:
            found = iter(self.backend.encode_batch(pairs))
        finally:
            self.backend.no_truncation()
        for place, (texts, label) in zip(places, examples):
            ids, marks = [], []
            for number in range(1, len(texts)):
                encoding = next(found)
                if encoding.overflowing:
                    self.notes.add("pairs that are cut", f"over {self.cut} tokens", place)
                ids += encoding.ids
                marks += [number + TYPE * (t if self.typed else 0) for t in encoding.type_ids]
            yield ids, marks, [*label, *[-1.0] * (self.form.wide - len(label))]

    def longer(self, made: tuple) -> tuple[list[int], list[int]]:
        """Of what `encode` yields, the longest pair: (ids, marks)."""
        ids, marks, label = made
        return super().longer((ids, numbers(np.array(marks)).tolist(), label))


class RankAssembler(TextsAssembler):
    """As `TextsAssembler`, with `types` like `tokens`; S pairs a row."""

    NUMBER = staticmethod(numbers)
    UNKNOWN = -1.0
    TYPED = True

    @staticmethod
    def types(marks: np.ndarray) -> np.ndarray:
        return np.asarray(marks, np.int32) // TYPE
