"""Labelled rows: texts with a label, several labels or a value; words with a tag each.

    text, label         label: a name or number; several as a list; or a value
    tokens, labels      lists of equal length, as CoNLL files (.conll) give them

A file with other columns is mapped by `columns` (our name -> the file's name).
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from jaxtune.data.batches import Assembler, Plan
from jaxtune.data.formats import Reader
from jaxtune.data.sources import Source, kind
from jaxtune.data.tokenize import ROW, Rows, check_unicode
from jaxtune.errors import UserError, nearest

SEQUENCE_COLUMNS, TOKEN_COLUMNS = ("text", "label"), ("tokens", "labels")


@dataclass
class LabelForm:
    """How labelled rows are read and tokenised: what `prepare` does instead for them.

    Attributes:
        per_token: a label for each word, else for each text.
        names: of the labels, in the order of their ids.
        several: a text has any number of labels.
        value: a text has a number instead of a label.
        columns: our name of a column -> the file's.
        origin: where the names come from, for errors.
    """

    per_token: bool
    names: tuple[str, ...] = ()
    several: bool = False
    value: bool = False
    columns: Mapping[str, str] | None = None
    origin: str = "objective.labels"

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the tokens and labels of a row."""
        return {
            **{"per_token": self.per_token, "names": self.names, "several": self.several, "value": self.value},
            "columns": dict(self.columns or {}),
        }

    def reader(self, source: Source) -> Reader:
        """Raises UserError for missing columns."""
        ours = TOKEN_COLUMNS if self.per_token else SEQUENCE_COLUMNS
        number, row = next(iter(source))
        columns = _mapped(source.where(number), ours, self.columns or {}, row)
        first, second = columns

        def convert(where: str, row: dict) -> tuple[Any, Any]:
            if not self.per_token:
                return _text(where, row, first), self._ids(where, second, _value(where, row, second))
            words, tags = (_list(where, row, column) for column in columns)
            if len(words) != len(tags):
                raise UserError(f"{where}: {len(words)} {first}, but {len(tags)} {second}; there must be one for each.")
            return [str(word) for word in words], [self._id(where, second, tag) for tag in tags]

        return Reader("words and tags" if self.per_token else "text and label", columns, convert)

    def encoder(self, tokenizer: Any) -> "LabelEncoder":
        return LabelEncoder(tokenizer, self)

    def _ids(self, where: str, column: str, label: Any) -> list[float]:
        if self.value:
            try:
                if isinstance(label, bool):
                    raise ValueError
                number = float(label)
            except (TypeError, ValueError):
                raise UserError(f"{where}: column {column!r} is {label!r}; a regression needs a number.") from None
            if not np.isfinite(number):
                raise UserError(f"{where}: column {column!r} is {label!r}; a regression needs a finite number.")
            return [number]
        if not self.several:
            return [self._id(where, column, label)]
        chosen = {self._id(where, column, one) for one in several_labels(where, column, label)}
        return [float(i in chosen) for i in range(len(self.names))]

    def _id(self, where: str, column: str, label: Any) -> int:
        name = label_name(where, column, label)
        if (known := _index(self.names).get(name)) is not None:
            return known
        if isinstance(label, int) and 0 <= label < len(self.names) and not _numbered(self.names):
            return label  # data sets of the hub hold ids
        shown = ", ".join(self.names[:12]) + (", ..." if len(self.names) > 12 else "")
        raise UserError(
            f"{where}: {column} {name!r} is not one of the {len(self.names)} labels of {self.origin} ({shown})."
            f"{nearest(name, self.names)} Mend the row, or list all labels in objective.labels."
        )


@functools.lru_cache(maxsize=8)
def _index(names: tuple[str, ...]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}


@functools.lru_cache(maxsize=8)
def _numbered(names: tuple[str, ...]) -> bool:
    """Whether labels are called by numbers, so that a number in the data is a name and never an id."""
    return any(re.fullmatch(r"-?\d+", name) for name in names)


def _value(where: str, row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise UserError(f"{where}: no column {column!r}. Columns found: {', '.join(row)}.{nearest(column, row)}")
    return row[column]


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    if not isinstance(text := _value(where, row, column), str):
        raise UserError(f"{where}: column {column!r} is {kind(text)}, expected text.")
    return text


def _mapped(where: str, ours: Sequence[str], columns: Mapping[str, str], row: Mapping[str, Any]) -> tuple[str, ...]:
    """The file's names of our columns."""
    for name in columns:
        if name not in ours:
            raise UserError(f"data.columns: no column of ours is called {name!r}. Known: {', '.join(ours)}.")
    theirs = tuple(columns.get(name, name) for name in ours)
    if missing := [column for column in theirs if column not in row]:
        raise UserError(
            f"{where}: no column {missing[0]!r}.{nearest(missing[0], row)} Columns found: {', '.join(row)}. "
            f"Set data.columns, for example {','.join(f'{name}=THEIRS' for name in ours)}."
        )
    return theirs


def label_name(where: str, column: str, label: Any) -> str:
    """The name of one label, which data may give as text or as a whole number."""
    if isinstance(label, str | bool | int) and label != "":
        return str(label).strip() if isinstance(label, str) else str(label)
    raise UserError(f"{where}: column {column!r} is {'empty' if label == '' else kind(label)}; expected a label.")


def several_labels(where: str, column: str, label: Any) -> list[Any]:
    """A list of labels; in a file without lists, as JSON."""
    if isinstance(label, str):
        try:
            label = json.loads(label)
        except json.JSONDecodeError:
            label = None
    if not isinstance(label, list):
        raise UserError(f'{where}: column {column!r} must be a list of labels (in a table, as JSON: ["a", "b"]).')
    return label


def _list(where: str, row: Mapping[str, Any], column: str) -> list[Any]:
    found = _value(where, row, column)
    if not isinstance(found, list) or not found:
        raise UserError(f"{where}: column {column!r} is {kind(found)}, expected a list that is not empty.")
    return found


class Counted(NamedTuple):
    """How often each label occurs, by name, and in how many rows."""

    labels: Counter
    rows: int


def count_labels(sources: Iterable[Source], form: LabelForm) -> Counted:
    """Count the labels of the data; `form` says where they are."""
    found: Counter = Counter()
    rows = 0
    for source in sources:
        ours = TOKEN_COLUMNS if form.per_token else SEQUENCE_COLUMNS
        number, row = next(iter(source))
        _, column = _mapped(source.where(number), ours, form.columns or {}, row)
        for number, row in source:
            rows += 1
            where = source.where(number)
            label = _value(where, row, column)
            if form.per_token:
                labels = _list(where, row, column)
            else:
                labels = several_labels(where, column, label) if form.several else [label]
            found.update(label_name(where, column, one) for one in labels)
    return Counted(found, rows)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Labels sorted: numbers by size, names by the alphabet, O first among tags."""
    names = list(names)
    if all(name.lstrip("-").isdigit() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names, key=lambda name: (name != "O", name)))


class LabelEncoder:
    """Labelled rows to token ids, as the tokenizer prepares a text by itself, with the tokens that begin and end it.

    A mark is 1 at each token of a text. Of tagged words it is 1 + the label's id at the first token of each word, else
    0: what continues a word is not counted, as is usual since BERT.
    """

    FIRST = 0  # every token can be trained, also the first

    def __init__(self, tokenizer: Any, form: LabelForm):
        self.form = form
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()  # a tokenizer.json may carry both; neither may act unseen
        self.backend.no_padding()
        self.MARK = np.dtype("<i4" if form.per_token else "u1")
        size = 0 if form.per_token else len(form.names) if form.several else 1
        self.ROW = np.dtype([*ROW.descr, ("label", "<f4", (size,))])
        if form.per_token and isinstance(self.backend.pre_tokenizer, ByteLevel):
            self.backend.pre_tokenizer.add_prefix_space = True  # words stand alone, as they do behind a space
        x = self.backend.encode("x")
        behind = len(x.ids) - max((i for i, special in enumerate(x.special_tokens_mask) if not special), default=0) - 1
        self.suffix = x.ids[len(x.ids) - behind :]

    def encode(self, places: list[str], examples: list) -> Iterator[tuple[list[int], Any, Any]]:
        """Yield (ids, marks, label) for each example, in order."""
        for place, (text, _) in zip(places, examples):
            check_unicode(place, " ".join(text) if self.form.per_token else text)
        texts = [text for text, _ in examples]
        encodings = self.backend.encode_batch(texts, is_pretokenized=self.form.per_token)
        for encoding, (_, labels) in zip(encodings, examples):
            if not self.form.per_token:
                yield encoding.ids, [1] * len(encoding.ids), labels
                continue
            words = encoding.word_ids
            marks = [0] * len(words)
            for at, word in enumerate(words):
                if word is not None and (not at or words[at - 1] != word):
                    marks[at] = 1 + labels[word]
            yield encoding.ids, marks, []

    def closed(self, rows: Rows, max_length: int) -> Rows:
        """`rows`, cut to `max_length`, so that those that were cut end as the tokenizer ends a text."""
        n = len(self.suffix)
        cut = [i for i in np.flatnonzero(rows.length == max_length) if n and rows[i][0][-n:].tolist() != self.suffix]
        if not cut:
            return rows
        tokens, mask = np.array(rows.tokens), np.array(rows.mask)
        for i in cut:
            end = int(rows.start[i]) + max_length
            tokens[end - n : end] = self.suffix
            mask[end - n : end] = 0 if self.form.per_token else 1
        return replace(rows, tokens=tokens, mask=mask)


def check_classes(rows: Sequence[Rows], form: LabelForm) -> None:
    """Raise UserError if all that is trained has the same label (or value), from which nothing can be learnt."""
    if form.per_token:
        seen = np.unique(np.concatenate([np.unique(r[i][1]) for r in rows for i in range(len(r))]))
        seen = [form.names[int(mark) - 1] for mark in seen if mark]
    else:
        seen = np.unique(np.concatenate([r.target for r in rows]), axis=0).tolist()
    if len(seen) < 2:
        found = seen[0] if form.per_token or form.value or form.several else form.names[int(seen[0][0])]
        raise UserError(f"data.train: every row has the same label, {found!r}; at least two are needed to learn from.")


def label_counts(rows: Sequence[Rows], form: LabelForm) -> np.ndarray:
    """How often each label occurs in what is trained, i64[C]."""
    counts = np.zeros(len(form.names), np.int64)
    for part in rows:
        if form.per_token:
            for i in range(len(part)):
                counts += np.bincount(part[i][1], minlength=len(counts) + 1)[1:]
        elif form.several:
            counts += part.target.sum(0).astype(np.int64)
        else:
            counts += np.bincount(part.target[:, 0].astype(int), minlength=len(counts))
    return counts


class LabelAssembler(Assembler):
    """Lays labelled rows into arrays: label f32[A,B,n] and weights f32[A,B], or targets and weights [A,B,T]."""

    def assemble(self, plan: Plan, width: int | None = None) -> dict[str, np.ndarray]:
        n, t = self.batch_size, width or self.width(plan)
        size = self.rows[0].target.shape[1]
        tokens, positions, segments, targets = (np.zeros((n, t), np.int32) for _ in range(4))
        weights = np.zeros((n,) if size else (n, t), np.float32)
        label = np.zeros((n, size), np.float32)
        for b, (member,) in enumerate(plan):
            rows, i = self.rows[self.source[member]], self.index[member]
            ids, marks = rows[i]
            end = len(ids)
            tokens[b, :end], positions[b, :end], segments[b, :end] = ids, np.arange(end), 1
            if size:
                label[b], weights[b] = rows.target[i], 1
            else:
                targets[b, :end], weights[b, :end] = np.maximum(marks, 1) - 1, marks > 0
        batch = {"tokens": tokens, "positions": positions, "segments": segments, "weights": weights}
        batch |= {"label": label} if size else {"targets": targets}
        return self._finished(batch, plan, t)


def render_labelled(rows: Rows, tokenizer: Any, form: LabelForm, n: int = 2) -> str:
    """The first n rows: the text as the model sees it, and its label; or each tagged token with its tag."""
    lines = []
    for i in range(min(n, len(rows))):
        ids, marks = rows[i]
        if form.per_token:
            pieces = zip(tokenizer.convert_ids_to_tokens(ids.tolist()), marks)
            lines.append(" ".join(f"{piece}⟦{form.names[mark - 1]}⟧" if mark else piece for piece, mark in pieces))
        else:
            target = rows.target[i].tolist()
            chosen = target if form.value else [form.names[j] for j in _chosen(target, form)]
            lines.append(f"{tokenizer.decode(ids.tolist())} ⟦{', '.join(map(str, chosen))}⟧")
        lines[-1] = f"{rows.where(i)}: {len(ids)} tokens\n{lines[-1]}\n"
    return "\n".join(lines)


def _chosen(target: list[float], form: LabelForm) -> list[int]:
    return [j for j, yes in enumerate(target) if yes] if form.several else [int(target[0])]
