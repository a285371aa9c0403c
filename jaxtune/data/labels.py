"""Labelled rows: texts with a label, several labels or a value; pairs of texts; words with a tag each.

    text, label                 label: a name or number; several as a list, or as 0 and 1 for each; or a value
    text, text_pair, label      two texts, which the tokenizer joins as transformers' does
    tokens, labels              lists of equal length, as CoNLL files (.conll) give them

A file with other columns is mapped by `columns` (jaxtune's name -> the file's). The names of pairs that data sets use
(PAIRS) are known.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxtune.data.files import Decoder, header_hint
from jaxtune.data.formats import Reader, own_columns
from jaxtune.data.label_rows import LabelEncoder, label_counts
from jaxtune.data.row_form import RowForm
from jaxtune.data.rows import Rows
from jaxtune.data.sources import Source, kind
from jaxtune.errors import UserError, nearest

SEQUENCE_COLUMNS, PAIR_COLUMNS = ("text", "label"), ("text", "text_pair", "label")
TOKEN_COLUMNS = ("tokens", "labels")
# Names that data sets give to the two texts of a pair.
PAIRS = (
    *(("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence")),
    *(("question1", "question2"), ("text1", "text2"), ("text_a", "text_b"), ("sentence_a", "sentence_b")),
    *(("sentence_A", "sentence_B"), ("query", "passage"), ("query", "document"), ("question", "passage")),
    *(("question", "context"), ("claim", "evidence"), ("sent1", "sent2"), ("s1", "s2"), ("text_1", "text_2")),
)
# What people call a label, a text, words and their tags.
LABELS = (
    *("label", "labels", "category", "intent", "class", "sentiment", "topic", "emotion", "gold_label", "label_text"),
    *("categories", "tags", "genres", "topics", "classes", "intents", "emotions"),
    *("is_duplicate", "rating", "stars", "score", "similarity", "relatedness_score", "fine_label", "coarse_label"),
)
TEXTS = ("text", "sentence", "message", "utterance", "review", "content", "question", "query", "prompt")
WORDS, TAGS = ("tokens", "words"), ("labels", "ner_tags", "tags", "pos_tags")
JOINED = "\n"  # between the two texts of a pair, for a decoder
IGNORED = -100  # the label of words that are not trained, in transformers' data
PLACEHOLDER = re.compile(r"LABEL_\d+")  # what transformers calls labels without names
NUMBER = re.compile(r"-?[0-9]+")
OUTSIDE = "O"  # the tag of words outside any entity


@dataclass
class LabelForm(RowForm):
    """How labelled rows are read and tokenised, for `prepare`.

    Attributes:
        per_token: a label for each word, else for each text.
        names: of the labels, in the order of their ids.
        several: a text may have several labels, or none.
        value: a text has a number instead of a label (regression).
        columns: jaxtune's name of a column -> the file's.
        origin: where the names come from, for errors.
        first: the number of the first label, where rows have numbers and the labels have names; None: 0 if it occurs.
        joined: what is put between the two texts of a pair; None: they are two segments.
        notes: sentences for the user on how the labels were read.
    """

    per_token: bool
    names: tuple[str, ...] = ()
    several: bool = False
    value: bool = False
    columns: Mapping[str, str] | None = None
    origin: str = "objective.labels"
    first: int | None = None
    joined: str | None = None
    notes: list[str] = field(default_factory=list)
    learnt: int | None = field(default=None, init=False)  # `first`, as found in a source that was read before

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the tokens and labels of a row."""
        return {
            **{"per_token": self.per_token, "names": self.names, "several": self.several, "value": self.value},
            **{"columns": dict(self.columns or {}), "first": self.first, "joined": self.joined},
        }

    def theirs(self, source: Source) -> dict[str, str]:
        """{jaxtune's name: the file's} of the columns in use. Raises UserError for missing columns."""
        number, row = next(iter(source))
        return _mapped(source, number, row, self.per_token, own_columns(source, self.columns or {}))

    def reader(self, source: Source) -> Reader:
        """The reader of a source. Raises UserError for missing columns, and for ambiguous numbers and vectors."""
        columns = self.theirs(source)
        *first, second = columns.values()
        if unused := [name for name in next(iter(source))[1] if name not in columns.values()]:
            self.note(f"columns of {source.name} that are not used: {', '.join(unused)}")
        if len(first) == 2 and self.joined is not None:
            self.note(
                f"{first[0]} and {first[1]} are joined to one text for a decoder, with {self.joined!r} between them"
            )
        alone = not self.per_token and len(first) == 1 and "text" not in (self.columns or {})
        vectors = self.several and self._vectors(source, second)
        ids = {} if vectors else self._ids_of(source, second)

        def convert(where: str, row: dict) -> tuple[Any, Any]:
            if not self.per_token:
                if alone and "text_pair" in row:
                    raise UserError(
                        f"{where}: a second text in column 'text_pair', which the first row lacks. Give all rows one "
                        f"or set data.columns=text={first[0]} if it is not to be read."
                    )
                texts = tuple(_text(where, row, column) for column in first)
                text = texts[0] if len(texts) == 1 else texts if self.joined is None else self.joined.join(texts)
                return text, self._labels(where, second, value_of(where, row, second), ids, vectors)
            words, tags = (list_of(where, row, column) for column in columns.values())
            if len(words) != len(tags):
                raise UserError(
                    f"{where}: {len(words)} {first[0]}, but {len(tags)} {second}; there must be one for each."
                )
            return [_word(where, first[0], word) for word in words], [
                None if is_ignored(tag) else self._id(where, second, tag, ids) for tag in tags
            ]

        what = "words and tags" if self.per_token else "text and label" if len(first) == 1 else "two texts and label"
        return Reader(what, tuple(columns.values()), convert)

    def encoder(self, tokenizer: Any) -> LabelEncoder:
        return LabelEncoder(tokenizer, self)

    def _ids_of(self, source: Source, column: str) -> Mapping[str, int]:
        """{label in the source: id} of labels that are not names: numbers, or names where the model has placeholders.

        Raises:
            UserError: numbers may count from 0 or from 1.
        """
        if self.value or _numbered(self.names):
            return {}
        classes = source.classes.get(column, ())
        if len(classes) == len(self.names) and all(map(PLACEHOLDER.fullmatch, self.names)):
            return {name: i for i, name in enumerate(classes)}
        first = self.learnt if self.first is None else self.first
        if first is None:
            seen: Counter = Counter()
            for _, row in source:
                for label in _each(row.get(column), self.per_token, self.several):
                    if (n := whole_number(label)) is None:
                        return {}  # names
                    seen[n] += 1
                if 0 in seen:
                    break
            seen.pop(IGNORED, None)
            if not seen:
                return {}
            if 0 not in seen:
                shown = f"{self.names[0]!r}, {self.names[1]!r}, ..." if len(self.names) > 1 else repr(self.names[0])
                raise UserError(
                    f"{source.name}: column {column!r} has the numbers {min(seen)} to {max(seen)} and no 0, and the "
                    f"labels of {self.origin} have names ({shown}): it is unclear whether the first is 0 or "
                    "1. Set objective.first_label to 0 or 1, or write the names."
                )
            first = self.learnt = 0
        shown = ", ".join(f"{i + first} = {name}" for i, name in enumerate(self.names[:3]))
        self.note(f"numbers in column {column!r} are read as the labels' ids: {shown}{', ...' * (len(self.names) > 3)}")
        return {str(i + first): i for i in range(len(self.names))}

    def _vectors(self, source: Source, column: str) -> bool:
        """Whether all rows hold a 0 or 1 for each label. Raises UserError if their count is not that of labels."""
        width = vector_width(several_labels(source.where(n), column, row.get(column)) for n, row in source)
        if width is None or (width != len(self.names) and width < 2):
            return False
        if width != len(self.names):
            raise UserError(
                f"{source.name}: column {column!r} has {width} numbers 0 and 1 in each row, and there are "
                f"{len(self.names)} labels ({shown(self.names)}): give as many, or the names of those that are there."
            )
        return True

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _labels(self, where: str, column: str, label: Any, ids: Mapping[str, int], vectors: bool) -> list[float]:
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
            return [self._id(where, column, label, ids)]
        found = several_labels(where, column, label)
        if vectors:
            return [float(yes) for yes in found]
        chosen = [self._id(where, column, one, ids) for one in found]
        if len(set(chosen)) < len(chosen):
            raise UserError(f"{where}: column {column!r} has a label twice: {json.dumps(found, default=str)[:60]}.")
        return [float(i in chosen) for i in range(len(self.names))]

    def _id(self, where: str, column: str, label: Any, ids: Mapping[str, int]) -> int:
        name = label_name(where, column, label)
        if (known := _index(self.names).get(name)) is not None:
            return known
        if (known := ids.get(name)) is not None:
            return known
        if name in ("-1", str(IGNORED)):
            raise UserError(
                f"{where}: {column} is {name}, as data sets mark rows without a label: leave those rows out."
            )
        raise UserError(
            f"{where}: {column} {name!r} is not one of the {len(self.names)} labels of {self.origin} "
            f"({shown(self.names)}).{nearest(name, self.names)} Correct it, or list all labels in objective.labels."
        )

    def check(self, rows: Sequence[Rows]) -> None:
        """Raise UserError if all training rows have the same label (or value), from which nothing can be learnt."""
        if self.per_token:
            marks = np.unique(np.concatenate([np.unique(r[i][1]) for r in rows for i in range(len(r))]))
            seen = [self.names[int(mark) - 1] for mark in marks if mark]
        else:
            seen = np.unique(np.concatenate([r.target for r in rows]), axis=0).tolist()
        if len(seen) < 2:
            plain = self.per_token or self.value or self.several
            found = seen[0] if plain else self.names[int(seen[0][0])]
            raise UserError(
                f"data.train: every row has the same label, {found!r}; at least two are needed to learn from."
            )

    def classes(self, rows: Sequence[Rows]) -> Counter | None:
        """How often each label occurs in the training rows, without the tag O, which is no class; None for values."""
        if self.value:
            return None
        counts = dict(zip(self.names, label_counts(rows, self).tolist(), strict=True))
        return Counter({name: n for name, n in counts.items() if not (self.per_token and name == OUTSIDE)})

    def answers(self, rows: Rows) -> np.ndarray:
        marks = (rows[i][1] for i in range(len(rows))) if self.per_token else rows.target
        return np.array([hash(mark.tobytes()) for mark in marks], np.int64)

    def sides(self, example: tuple[Any, list]) -> tuple[str, str]:
        given, found = example
        given = "\n".join(given) if isinstance(given, tuple) else given
        if self.value:
            return given, f"{found[0]:g}"
        names = self.names_of(found)
        return (" ".join(given), " ".join(names)) if self.per_token else (given, ", ".join(names))

    def names_of(self, found: list) -> list[str]:
        """The names of a row's labels; for tagged words one for each word, "" for ignored ones."""
        if self.per_token:
            return ["" if i is None else self.names[i] for i in found]
        ids = [i for i, yes in enumerate(found) if yes] if self.several else map(int, found)
        return [self.names[i] for i in ids]

    def classes_of(self, example: tuple[Any, list]) -> list[str]:
        """Labels, or tags without O."""
        return [name for name in self.names_of(example[1]) if not (self.per_token and name in ("", OUTSIDE))]

    def pieces(self, example: tuple[Any, list]) -> list[tuple[str, bool]]:
        if not self.per_token:
            return super().pieces(example)
        pieces = []
        for word, tag in zip(example[0], self.names_of(example[1])):
            pieces += [(f"{word} ", False)] + ([(f"{tag} ", True)] if tag not in ("", OUTSIDE) else [])
        return pieces

    def render(self, rows: Rows, tokenizer: Any, n: int = 2) -> str:
        """The first n rows: the text as the model sees it, and its label; or each tagged token with its tag."""
        lines = []
        for i in range(min(n, len(rows))):
            ids, marks = rows[i]
            if self.per_token:
                pieces = zip(tokenizer.convert_ids_to_tokens(ids.tolist()), marks)
                lines.append(" ".join(f"{piece}⟦{self.names[mark - 1]}⟧" if mark else piece for piece, mark in pieces))
            else:
                target = rows.target[i].tolist()
                chosen = target if self.value else self.names_of(target)
                lines.append(f"{tokenizer.decode(ids.tolist())} ⟦{', '.join(map(str, chosen))}⟧")
            lines[-1] = f"{rows.where(i)}: {len(ids)} tokens\n{lines[-1]}\n"
        return "\n".join(lines)


def shown(names: Sequence[str]) -> str:
    """The first names, for a message."""
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


@functools.lru_cache(maxsize=8)
def _index(names: tuple[str, ...]) -> dict[str, int]:
    return {canonical(name): i for i, name in enumerate(names)}


@functools.lru_cache(maxsize=8)
def _numbered(names: tuple[str, ...]) -> bool:
    """Whether the names of labels are numbers, so that a number in the data is a name and not an id."""
    return any(NUMBER.fullmatch(name) for name in names)


def canonical(name: str) -> str:
    """A label's name for comparison: without surrounding white space; true and false in lower case."""
    name = name.strip()
    return name.lower() if name.lower() in ("true", "false") else name


def whole_number(label: Any) -> int | None:
    """The integer that a label, or its text, is; None if it is not one."""
    if isinstance(label, bool):
        return None
    if isinstance(label, float) and label.is_integer():
        return int(label)
    if isinstance(label, str) and NUMBER.fullmatch(label.strip()):
        return int(label)
    return label if isinstance(label, int) else None


def is_ignored(label: Any) -> bool:
    """Whether a label is -100, which training skips."""
    return whole_number(label) == IGNORED


def vector_width(lists: Iterable[list[Any]]) -> int | None:
    """The length of all lists if they have the same length and hold 0 and 1 only; else None."""
    width = None
    for found in lists:
        if width is None:
            width = len(found)
        numbers = all(isinstance(one, int | float) and one in (0, 1) for one in found)  # true and false are 1 and 0
        if len(found) != width or not found or not numbers:
            return None
    return width


def _each(value: Any, per_token: bool, several: bool) -> list[Any]:
    """The labels of a row, as a list; unreadable ones are skipped."""
    if several and isinstance(value, str):
        value = several_labels("", "", value)
    return value if isinstance(value, list) else [] if value is None or per_token else [value]


def value_of(where: str, row: Mapping[str, Any], column: str) -> Any:
    """A row's value in a column; raises UserError where the row has no such column."""
    if column not in row:
        raise UserError(f"{where}: no column {column!r}. Columns found: {', '.join(row)}.{nearest(column, row)}")
    return row[column]


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    if not isinstance(text := value_of(where, row, column), str):
        raise UserError(f"{where}: column {column!r} is {kind(text)}, expected text.")
    return text


def _word(where: str, column: str, word: Any) -> str:
    if word is None:
        raise UserError(f"{where}: column {column!r} has a word that is null.")
    return str(word)


def _mapped(
    source: Source, number: int, row: Mapping[str, Any], per_token: bool, columns: dict[str, str]
) -> dict[str, str]:
    """{jaxtune's name of each column: the file's}."""
    where, ours = source.where(number), TOKEN_COLUMNS if per_token else PAIR_COLUMNS
    for name in columns:
        if name not in ours:
            raise UserError(f"data.columns: {name!r} is not a column that jaxtune knows. Known: {', '.join(ours)}.")
    theirs = {name: columns.get(name, name) for name in ours}
    if not per_token:
        if "label" not in columns and "label" not in row and "labels" in row:
            theirs["label"] = "labels"
        pair = next((pair for pair in PAIRS if set(pair) <= set(row)), None)
        if not {"text", "text_pair"} & set(columns) and "text" not in row and pair:
            theirs["text"], theirs["text_pair"] = pair
        if "text_pair" not in columns and theirs["text_pair"] not in row:
            del theirs["text_pair"]
    if missing := [name for name, column in theirs.items() if column not in row]:
        known = dict(zip(ours, (WORDS, TAGS) if per_token else (TEXTS, (), LABELS)))
        guess = {name: next((c for c in row if c.lower() in known[name]), "THEIRS") for name in missing}
        raise UserError(
            f"{where}: no column {theirs[missing[0]]!r}.{nearest(theirs[missing[0]], row)} Columns found: "
            f"{', '.join(row)}. Set data.columns, for example {','.join(f'{a}={b}' for a, b in guess.items())}."
            f"{header_hint(source.name, list(row))}"
        )
    return theirs


def label_name(where: str, column: str, label: Any) -> str:
    """The name of a label, which data may give as text or as an integer."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, str) and label.strip():
        return canonical(label)
    if not isinstance(label, str) and (number := whole_number(label)) is not None:
        return str(number)
    if isinstance(label, list):
        raise UserError(
            f"{where}: column {column!r} is a list: where a text has several labels, set "
            "objective.problem_type=multi_label_classification."
        )
    found = "empty" if isinstance(label, str) else f"{kind(label)} ({label!r})" if label is not None else "null"
    raise UserError(f"{where}: column {column!r} is {found}; expected a label.")


def several_labels(where: str, column: str, label: Any) -> list[Any]:
    """A list of labels; in a file without lists, from JSON text."""
    if isinstance(label, str):
        try:
            label = Decoder().decode(label)
        except json.JSONDecodeError:
            label = None
    if not isinstance(label, list):
        raise UserError(f'{where}: column {column!r} must be a list of labels (in a table, as JSON: ["a", "b"]).')
    return label


def list_of(where: str, row: Mapping[str, Any], column: str) -> list[Any]:
    """A row's list in a column; raises UserError where it is none, or empty."""
    found = value_of(where, row, column)
    if not isinstance(found, list) or not found:
        raise UserError(f"{where}: column {column!r} is {kind(found)}, expected a list that is not empty.")
    return found
