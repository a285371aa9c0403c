"""Rows of texts that are compared with one another, as sentence-transformers' data sets have them.

    anchor, positive                          also: query, document; question, answer; ...
    anchor, positive, negative, ...           negatives: columns negative, negative_1, ..., or a list in one of them
    sentence1, sentence2, score               a number: how alike the two are
    query, document, label                    1 for alike, 0 for not
    query, positive, negative, ..., scores    a teacher's score of each, or of the differences from the first
    text, label                               texts of one class are alike

Which of them a run reads follows from its loss (`jaxtune.objectives.contrasts`). Other names are mapped by `columns`
(jaxtune's name -> the file's): first, second, negative, label.

A row's texts lie one behind the other; the mark of a token is the number of its text, from 1.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.batches import Plan
from jaxtune.data.files import Decoder
from jaxtune.data.formats import Reader, own_columns
from jaxtune.data.lines import LinesAssembler
from jaxtune.data.messages import Notes
from jaxtune.data.row_form import RowForm
from jaxtune.data.rows import ROW, Rows
from jaxtune.data.sources import Source, kind
from jaxtune.data.tokenize import check_unicode
from jaxtune.errors import UserError, nearest
from jaxtune.objectives.contrasts import BINARY, CLASS, CONTRASTS, NOTHING, SCORE, SCORES, Contrast

PAIRS = (  # what data sets call two texts, in the order in which they are looked for
    *(("anchor", "positive"), ("query", "positive"), ("query", "document"), ("query", "passage"), ("query", "answer")),
    *(("question", "answer"), ("question", "positive"), ("question", "passage"), ("question", "context")),
    *(("query", "pos"), ("sentence1", "sentence2"), ("sentence_A", "sentence_B"), ("sentence_a", "sentence_b")),
    *(("text1", "text2"), ("text_1", "text_2"), ("premise", "hypothesis"), ("question1", "question2")),
    *(("title", "abstract"), ("title", "body"), ("sent1", "sent2"), ("text", "text_pair"), ("text", "positive")),
)
ALIKE = {"sentence1", "sentence_A", "sentence_a", "text1", "text_1", "premise", "question1", "sent1"}  # no query
SINGLE = ("text", "sentence", "query", "question")
NEGATIVE = re.compile(r"(hard_)?neg(ative)?s?([_-]?\d+)?", re.IGNORECASE)
LABELS = ("score", "scores", "label", "labels", "similarity", "similarity_score", "relatedness_score", "category")
OURS = ("first", "second", "negative", "label")
MOST = 255  # texts of a row


class Texts(NamedTuple):
    """A row: its texts, and what is known of them (floats)."""

    texts: tuple[str, ...]
    label: tuple[float, ...]


@dataclass
class TextsForm(RowForm):
    """How such rows are read.

    Attributes:
        contrast: the name of the loss.
        reads: what the loss needs.
        prefixes: what stands before a row's first text, and before the others.
        columns: jaxtune's name of a column -> the file's.
        cut: texts are cut to so many tokens; None: rows of longer ones are left out.
        ignore: columns that are not read.
    """

    contrast: str
    reads: Contrast
    prefixes: tuple[str, str] = ("", "")
    columns: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    ignore: Sequence[str] = ()
    wide: int = field(default=0, init=False)  # floats of the longest label

    cuts_itself = True
    lists = False  # labels are as long as a row has documents
    setting = "objective.contrast"
    number = staticmethod(np.asarray)

    @classmethod
    def of(
        cls, data: Mapping[str, Any], contrast: str, reads: Contrast, prompts: Mapping[str, str], length: int
    ) -> "TextsForm":
        """The form that section `data` of a config describes."""
        prefixes = prompts.get("query", ""), prompts.get("document", "")
        cut = length if data["overlength"] == "truncate" else None
        return cls(contrast, reads, prefixes, dict(data["columns"]), cut, tuple(data["ignore"] or ()))

    def proposes(self) -> list[tuple[str, Any, str]]:
        return [
            ("data.overlength", "truncate", "a longer text keeps its beginning"),
            ("objective.name", "embedding", "vectors of texts: retrieval, search, clustering"),
            ("objective.temperature", 0.05, "lower: the nearest wrong texts count for more"),
        ]

    def rows_a_step(self, rows: int) -> int:
        return 64 if rows >= 640 else 16  # texts that are compared with one another learn from more of them

    def cut_to(self, length: int) -> None:
        self.cut = length

    @property
    def belongs(self) -> bool:
        return self.reads.label == NOTHING

    @property
    def settings(self) -> dict[str, Any]:
        return {
            **{"form": "texts", "contrast": self.contrast, "prefixes": self.prefixes},
            **{"columns": dict(self.columns), "cut": self.cut, "ignore": sorted(self.ignore), "wide": self.wide},
        }

    # ------------------------------------------------------------------------------------------------------- columns

    def theirs(self, source: Source) -> tuple[list[str], list[str], str | None]:
        """(the columns of single texts, those of negatives, that of the label), as the source has them.

        Raises:
            UserError: columns are missing, or more than the loss reads.
        """
        number, row = next(iter(source))
        where, there = source.where(number), [name for name in row if name not in self.ignore]
        columns = own_columns(source, self.columns)
        if wrong := [name for name in columns if name not in OURS]:
            raise UserError(
                f"data.columns: no column of ours is called {wrong[0]!r} here (ours=theirs)."
                f"{nearest(wrong[0], OURS)} Known: {', '.join(OURS)}."
            )
        if lost := [(ours, name) for ours, name in columns.items() if name not in row]:
            ours, name = lost[0]
            raise UserError(
                f"data.columns: {where} has no column {name!r} for {ours!r}.{nearest(name, row)} Columns found: "
                f"{', '.join(row)}."
            )
        texts = self._texts(columns, there)
        if texts is None:
            wants = "a text" if self.reads.most == 1 else "two texts, such as anchor and positive"
            raise UserError(
                f"{where}: {self.setting}={self.contrast} needs {wants}. Columns found: {', '.join(row)}. Name "
                "them with data.columns=first=THEIRS,second=THEIRS."
            )
        label = columns.get("label") or next((name for name in LABELS if name in there and name not in texts), None)
        if self.reads.label == NOTHING:
            if label is not None and columns.get("label"):
                raise UserError(f"data.columns=label={label}: {self.setting}={self.contrast} reads no label.")
            if label is not None:
                raise UserError(
                    f"{where}: column {label!r} says how alike the texts are, and {self.setting}={self.contrast} "
                    "takes every row for a pair that belongs together. Choose another loss (cosent, contrastive), or "
                    f"leave the column out knowingly with data.ignore={label}."
                )
        elif label is None:
            raise UserError(
                f"{where}: {self.setting}={self.contrast} needs {WORDS[self.reads.label]} in each row. Columns "
                f"found: {', '.join(row)}. Name it with data.columns=label=THEIRS."
            )
        negatives = []
        if self.reads.most != 1:
            given = columns.get("negative")
            negatives = [given] if given else [n for n in there if NEGATIVE.fullmatch(n) and n not in (*texts, label)]
        if negatives and self.reads.most == 2:
            raise UserError(
                f"{where}: column {negatives[0]!r} holds negatives, which {self.setting}={self.contrast} does not "
                f"read: choose infonce or triplet, or leave it out knowingly with data.ignore={negatives[0]}."
            )
        if not negatives and self.reads.least > 2:
            raise UserError(
                f"{where}: {self.setting}={self.contrast} needs a text that does not belong to the first (a column "
                f"negative). Columns found: {', '.join(row)}. Name it with data.columns=negative=THEIRS."
            )
        return texts, negatives, label

    def _texts(self, columns: Mapping[str, str], there: Sequence[str]) -> list[str] | None:
        if self.reads.most == 1:
            found = columns.get("first") or next((name for name in SINGLE if name in there), None)
            return [found] if found else None
        if "first" in columns and "second" in columns:
            return [columns["first"], columns["second"]]
        pairs = [tuple(columns.get(ours, name) for ours, name in zip(OURS, pair)) for pair in PAIRS]
        found = next((pair for pair in pairs if set(pair) <= set(there)), None)
        return list(found) if found else None

    def reader(self, source: Source) -> Reader:
        texts, negatives, label = self.theirs(source)
        kept = {*texts, *negatives, *([label] if label else [])}
        notes = Notes()
        alike = self.reads.most == 1 or texts[0] in ALIKE or self.columns.get("first") in ALIKE
        first, rest = self.prefixes if not alike else (self.prefixes[0],) * 2

        def convert(where: str, row: dict) -> Texts:
            for name in row.keys() - kept - {*self.ignore}:
                notes.add("columns that are not used", name, where)
            found = [_text(where, row, name) for name in texts]
            for name in negatives:
                found += _several(where, name, row.get(name))
            if len(found) < self.reads.least:
                raise UserError(
                    f"{where}: {len(found)} texts, and {self.setting}={self.contrast} needs at least "
                    f"{self.reads.least}: column {negatives[0]!r} is empty."
                )
            if self.reads.most and len(found) > self.reads.most:
                raise UserError(
                    f"{where}: {len(found)} texts, and {self.setting}={self.contrast} reads {self.reads.most}: "
                    f"give one negative a row, or choose objective.contrast=infonce."
                )
            if len(found) > MOST:
                raise UserError(f"{where}: {len(found)} texts in a row; at most {MOST}.")
            prefixed = (first + found[0], *(rest + text for text in found[1:]))
            return Texts(prefixed, self._label(where, label, row, len(found)))

        what = " and ".join(filter(None, [f"{len(texts)} texts" if len(texts) > 1 else "a text", label]))
        # Negatives that are added to a row do not move it to the other side of the split.
        reader = Reader(what, tuple(kept), convert, notes, together=lambda row: [row.get(name) for name in texts])
        return self._wide_enough(source, reader)

    def opened(self, sources: Iterable[Source]) -> None:
        for source in sources:
            self.reader(source)  # which makes `wide` wide enough

    def _wide_enough(self, source: Source, reader: Reader) -> Reader:
        """The reader, when `wide` holds the label of every row of its source: lists of scores differ in length."""
        differs = self.reads.label == SCORES or (self.lists and self.reads.most is None)
        for number, row in source if differs else islice(source, 1):
            with suppress(UserError):  # it is said where the row is read
                self.wide = max(self.wide, len(reader.convert(source.where(number), row).label))
        reader.notes.found.clear()
        return reader

    def _label(self, where: str, column: str | None, row: Mapping[str, Any], texts: int) -> tuple[float, ...]:
        if column is None or self.reads.label == NOTHING:
            return ()
        value = row.get(column)
        if self.reads.label == CLASS:
            if value is None or isinstance(value, list | dict) or not str(value).strip():
                raise UserError(f"{where}: column {column!r} is {kind(value)}, expected the name of a class.")
            return class_numbers(str(value).strip())
        if self.reads.label == SCORES:
            values = Decoder().decode(value) if isinstance(value, str) and value.startswith("[") else value
            values = values if isinstance(values, list) else [values]
            numbers = tuple(_number(where, column, one) for one in values)
            if len(numbers) not in (texts - 1, *((texts - 2,) if self.contrast == "margin_mse" else ())):
                raise UserError(
                    f"{where}: column {column!r} has {len(numbers)} scores for {texts - 1} texts behind the first; "
                    "there must be one for each."
                )
            if len(numbers) == texts - 2:  # differences from the first, whose score may then as well be 0
                return (0.0, *(-number for number in numbers))
            return numbers
        number = _number(where, column, value)
        if self.reads.label == BINARY and number not in (0, 1):
            raise UserError(
                f"{where}: column {column!r} is {number:g}; {self.setting}={self.contrast} needs 1 (alike) or 0. "
                "For other numbers choose cosent or cosine_mse."
            )
        if self.contrast == "cosine_mse" and not -1 <= number <= 1:
            raise UserError(
                f"{where}: column {column!r} is {number:g}, which no cosine reaches; bring scores to 0 to 1, or choose "
                "objective.contrast=cosent, which reads their order alone."
            )
        return (number,)

    # -------------------------------------------------------------------------------------------------------- tokens

    def encoder(self, tokenizer: Any) -> "TextsEncoder":
        return TextsEncoder(tokenizer, self)

    def lengths(self, rows: Rows) -> np.ndarray:
        return np.array([text_lengths(rows[i][1]).max(initial=0) for i in range(len(rows))], np.int64)

    def sides(self, example: Texts) -> tuple[str, str]:
        """Of texts with a label: (texts, label); else the first text and the others."""
        if self.belongs:
            return example.texts[0], "\n".join(example.texts[1:])
        return "\n".join(example.texts), " ".join(map(str, example.label))

    def without_prefixes(self, example: Texts) -> list[str]:
        """The texts of a row as its file has them."""
        first, *others = example.texts
        return [first.removeprefix(self.prefixes[0]), *(text.removeprefix(self.prefixes[1]) for text in others)]

    def answers(self, rows: Rows) -> np.ndarray:
        """Rows of the same texts say the same; what differs is in the texts themselves."""
        if rows.target is None or not rows.target.shape[1]:
            return np.ones(len(rows), np.int64)
        return np.array([hash(tuple(row)) for row in rows.target.tolist()], np.int64)

    def check(self, rows: Sequence[Rows]) -> None:
        if self.reads.label in (SCORE, BINARY, CLASS):
            labels = np.concatenate([part.target for part in rows])
            if (labels == labels[0]).all():
                what = "texts are of one class" if self.reads.label == CLASS else f"scores are {labels[0, 0]:g}"
                raise UserError(
                    f"data.train: all {len(labels):,} {what}, and there is nothing to tell apart. Add rows of others"
                    + ("." if self.reads.label == CLASS else ", or choose objective.contrast=infonce for pairs alone.")
                )
        if not self.reads.alone and sum(map(len, rows)) < 2:
            raise UserError(
                f"data.train: one row is left, and {self.setting}={self.contrast} compares rows with one another; "
                "give at least 2."
            )

    def said(self, rows: Sequence[Rows]) -> list[str]:
        """How many rows share their second text, which is then no negative for them."""
        if self.contrast != "infonce":
            return []
        seen = Counter(texts_of(part, i)[1].tobytes() for part in rows for i in range(len(part)))
        shared = sum(n for n in seen.values() if n > 1)
        return [
            f"{shared:,} of {seen.total():,} rows share their second text with another row: where both are in a batch, "
            "it is no negative for either"
        ] * bool(shared)

    def pieces(self, example: Texts) -> list[tuple[str, bool]]:
        shown = [(f"{text}\n", i > 0) for i, text in enumerate(example.texts)]
        plain = self.reads.label not in (NOTHING, CLASS)
        return shown + ([(" ".join(f"{x:g}" for x in example.label), True)] if plain else [])

    def render(self, rows: Rows, tokenizer: Any, n: int = 2) -> str:
        shown = []
        for i in range(min(n, len(rows))):
            texts = texts_of(rows, i, self.number)
            lines = [f"  [{len(ids)}] {tokenizer.decode(ids.tolist())}" for ids in texts]
            label = "" if self.reads.label in (NOTHING, CLASS) else f", {' '.join(f'{x:g}' for x in rows.target[i])}"
            shown.append("\n".join([f"{rows.where(i)}: {len(texts)} texts{label}", *lines, ""]))
        return "\n".join(shown)


def recognised(source: Source, row: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[TextsForm, str] | None:
    """How rows of texts that belong together are read, named as sentence-transformers' data name them, and a sentence
    for the user; None: they are others.
    """
    if not {"anchor", "query", "question"} & set(row) or not {"positive", "pos"} & set(row):
        return None
    form = TextsForm("infonce", CONTRASTS["infonce"], ignore=tuple(given.get("ignore") or ()))
    form.reader(source)
    return form, "texts that belong together: vectors by in-batch negatives; objective.contrast names other losses"


WORDS = {
    SCORE: "a number for how alike two texts are",
    BINARY: "1 or 0 for whether two texts are alike",
    CLASS: "a class",
    SCORES: "a teacher's scores",
}


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        found = "empty" if isinstance(value, str) else kind(value)
        raise UserError(f"{where}: column {column!r} is {found}, expected a text.")
    return value


def _several(where: str, column: str, value: Any) -> list[str]:
    """The texts of a column of negatives: one, a list, or none."""
    if isinstance(value, str) and value.startswith("["):
        try:
            decoded = Decoder().decode(value)
            value = decoded if isinstance(decoded, list) else value
        except ValueError:
            pass
    values = [] if value is None else value if isinstance(value, list) else [value]
    if wrong := next((v for v in values if not isinstance(v, str) or not v.strip()), None):
        raise UserError(f"{where}: column {column!r} holds {kind(wrong)}, expected a text or a list of texts.")
    return [v for v in values if v is not None and v.strip()]


def _number(where: str, column: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else float(int(value))
        if not np.isfinite(number):
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(f"{where}: column {column!r} is {kind(value)} ({value!r}), expected a number.") from None
    return number


def class_numbers(name: str) -> tuple[float, float]:
    """Two numbers that stand for a class, 48 bits of a hash of its name: equal in every file and process."""
    found = hashlib.sha256(name.encode()).digest()
    return float(int.from_bytes(found[:3], "big")), float(int.from_bytes(found[3:6], "big"))


class TextsEncoder:
    """Texts to token ids, each as the tokenizer prepares it by itself, one behind the other."""

    FIRST, MARK = 0, np.dtype("u1")

    def __init__(self, tokenizer: Any, form: TextsForm):
        self.tokenize = Tokenize(tokenizer, form.cut)
        self.form, self.cut = form, form.cut
        self.notes = Notes()

    @property
    def ROW(self) -> np.dtype:
        """Of a row's numbers, when all sources have been opened."""
        return np.dtype([*ROW.descr, ("label", "<f4", (self.form.wide,))])

    def encode(self, places: list[str], examples: list[Texts]) -> Iterator[tuple[list[int], list[int], list[float]]]:
        """Yield (ids, marks, label) for each example, in order."""
        flat = [text for example in examples for text in example.texts]
        for place, example in zip(places, examples):
            for text in example.texts:
                check_unicode(place, text)
        found = iter(self.tokenize(flat))
        for place, example in zip(places, examples):
            ids, marks = [], []
            for number in range(1, len(example.texts) + 1):
                text, was_cut = next(found)
                if was_cut:
                    self.notes.add("texts that are cut", f"over {self.cut} tokens", place)
                ids += text
                marks += [number] * len(text)
            yield ids, marks, [*example.label, *[0.0] * (self.form.wide - len(example.label))]

    def longer(self, made: tuple) -> tuple[list[int], list[int]]:
        """Of what `encode` yields, the longest text: (ids, marks)."""
        ids, marks, _ = made
        lengths = text_lengths(np.asarray(marks))
        at = int(lengths.argmax()) + 1
        chosen = [i for i, mark in enumerate(marks) if mark == at]
        return [ids[i] for i in chosen], [1] * len(chosen)

    def closed(self, rows: Rows, max_length: int, whole: Rows) -> Rows:
        return rows


class Tokenize:
    """Texts -> (ids, whether they were cut), with the tokens that begin and end a text, of at most `cut` tokens."""

    def __init__(self, tokenizer: Any, cut: int | None = None):
        self.backend, self.cut = tokenizer.backend_tokenizer, cut

    def __call__(self, texts: Sequence[str]) -> Iterator[tuple[list[int], bool]]:
        self.backend.no_padding()
        if self.cut is None:
            self.backend.no_truncation()
        else:
            self.backend.enable_truncation(self.cut)
        try:
            found = self.backend.encode_batch(list(texts))
        finally:
            self.backend.no_truncation()
        for encoding in found:
            yield encoding.ids, bool(encoding.overflowing)


def text_lengths(marks: np.ndarray) -> np.ndarray:
    """Tokens of each text of a row, by its marks."""
    return np.bincount(np.asarray(marks, np.int64))[1:]


def texts_of(rows: Rows, i: int, number: Callable[[np.ndarray], np.ndarray] = np.asarray) -> list[np.ndarray]:
    """The token ids of each text of row i; `number` gives the number of each token's text from the marks."""
    ids, marks = rows[i]
    return np.split(ids, np.flatnonzero(np.diff(number(marks).astype(np.int64))) + 1)


class TextsAssembler(LinesAssembler):
    """Lays rows of texts: tokens, positions, segments i32[A, B, S, T]; there f32[A, B, S], 1 where a row has the text;
    same i32[A, B, S], a hash of each text; label f32[A, B, L]; weights f32[A, B], 0 for rows that are missing.

    S is the number of texts of the row that has the most, of all rows. With packing the first three are i32[A, R, T],
    lines that hold all texts of some rows, and `place` i32[A, B, S] tells where; see `data.lines`.

    Attributes:
        NUMBER: marks -> the number of each token's text, from 1.
        TYPED: batches hold token types.
        UNKNOWN: what stands in a label where a row has no text.
        texts: S.
    """

    NUMBER = staticmethod(np.asarray)
    UNKNOWN = 0.0
    TYPED = False

    def _lengths(self, rows: Rows) -> np.ndarray:
        each = [text_lengths(self.NUMBER(rows[i][1])) for i in range(len(rows))]
        self.texts = max([self.texts, *map(len, each)])
        return np.array([lengths.max() for lengths in each], np.int32)

    def assemble(self, plan: Plan, width: int | None = None) -> dict[str, np.ndarray]:
        n, s, t = self.batch_size, self.texts, width or self.width(plan)
        lines, packs = self.lines(plan), self.packs
        tokens, positions, segments, types = (
            self.empty(t) if packs else np.zeros((n, s, t), np.int32) for _ in range(4)
        )
        if not packs:
            segments[:, :, 0] = 1  # a text that is missing has one token, so that nothing is divided by 0
        there, same, place = np.zeros((n, s), np.float32), np.zeros((n, s), np.int32), np.zeros((n, s), np.int32)
        wide = max(0 if rows.target is None else rows.target.shape[1] for rows in self.rows)
        label = np.full((n, wide), self.UNKNOWN, np.float32)
        weights = np.zeros(n, np.float32)
        for number, line in enumerate(lines):
            at = 0
            for j, b in enumerate(line):
                rows, i = self.rows[self.source[plan[b][0]]], self.index[plan[b][0]]
                typed, begun = self.types(rows[i][1]), at
                for k, ids in enumerate(texts_of(rows, i, self.NUMBER)):
                    here = np.s_[number, at : at + len(ids)] if packs else np.s_[b, k, : len(ids)]
                    tokens[here], positions[here] = ids, np.arange(len(ids))
                    types[here] = typed[at - begun : at - begun + len(ids)]
                    segments[here] = 1 + s * j + k if packs else 1
                    there[b, k], same[b, k] = 1, text_hash(ids)
                    at += len(ids)
                weights[b], place[b] = 1, self.place(number, 1 + s * j) + np.arange(s)
                if wide:
                    label[b, : rows.target.shape[1]] = rows.target[i]
        batch = {"tokens": tokens, "positions": positions, "segments": segments, "there": there, "same": same}
        batch |= {"types": types} if self.TYPED else {}
        batch |= {"place": place} if packs else {}
        return self.finished(batch | {"label": label, "weights": weights}, plan, lines, t)

    @staticmethod
    def types(marks: np.ndarray) -> np.ndarray:
        """The token types in marks."""
        return np.zeros(len(marks), np.int32)


def text_hash(ids: np.ndarray) -> int:
    """31 bits of a hash of a text's tokens."""
    return int.from_bytes(hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=4).digest(), "big") >> 1


__all__ = ["Texts", "TextsAssembler", "TextsEncoder", "TextsForm", "Tokenize", "texts_of"]
