"""Rows as training reads them, a chunk at a time, and the few numbers kept for each.

    sources -> reader -> encoder -> Chunk (texts, tokens, masks: dropped when the checks have seen it)
                                      '-> Ledger (52 bytes a row: where it stands, lengths, hashes of its texts)

So a million rows need some tens of megabytes, however long they are. A row that training would refuse does not stop
the stream: it is recorded with its error.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.batches import Prefetch
from jaxtune.data.formats import ColumnTypes, Reader, make_reader, text_sides
from jaxtune.data.label_rows import LabelEncoder
from jaxtune.data.row_form import RowForm
from jaxtune.data.sources import Source
from jaxtune.data.tokenize import Encoder
from jaxtune.errors import UserError

CHUNK = 1024  # rows
TRAIN, EVAL = 0, 1

# The columns of the ledger: what is kept for each row.
COLUMNS = {
    "source": np.int32,  # index into Ledger.sources
    "number": np.int64,  # its line or row number there
    "length": np.int32,  # tokens, before data.max_length
    "trained": np.int32,  # of them
    "fitted": np.int32,  # tokens that are predicted within the first data.max_length
    "digest": np.uint64,  # of the columns in use
    "prompt": np.int64,  # hashes of the texts, without regard to case and white space; 0 where there is none
    "answer": np.int64,
}


@dataclass(frozen=True)
class Opened:
    """A source with its reader. `split` is TRAIN or EVAL."""

    source: Source
    reader: Reader
    split: int


@dataclass
class Chunk:
    """Rows of one source: those that could be read, and those that could not.

    Row k has the ledger index `first + k`, the texts `prompts[k]` (what is given) and `answers[k]` (what is trained),
    and the tokens `ids[start[k] : start[k] + length[k]]`, i32, with `mask` u8 (1: to be predicted); of a pair they are
    those of its longer text.
    `broken` holds (ledger index, number, message) of rows that training would refuse.
    """

    opened: Opened
    first: int
    numbers: list[int]
    rows: list[dict]
    examples: list[Any]
    prompts: list[str]
    answers: list[str]
    ids: np.ndarray
    mask: np.ndarray
    start: np.ndarray
    length: np.ndarray
    digests: np.ndarray
    broken: list[tuple[int, int, str]]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def end(self) -> np.ndarray:
        return self.start + self.length

    @cached_property
    def words(self) -> tuple[list[list[str]], list[list[str]]]:
        """The words of each prompt and of each answer, without regard to case."""
        prompts, answers = ([text.casefold().split() for text in texts] for texts in (self.prompts, self.answers))
        return prompts, answers

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum values i[N] over the tokens of each row."""
        total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return total[self.end] - total[self.start]

    def where(self, k: int) -> str:
        return self.opened.source.where(self.numbers[k])


class Ledger:
    """Columns of numbers, one entry a row (`COLUMNS`), in the order in which rows were read."""

    def __init__(self, sources: Sequence[Opened], max_length: int):
        self.sources = list(sources)
        self.max_length = max_length
        self._parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0, kind)] for name, kind in COLUMNS.items()}
        self._readable = [np.zeros(0, bool)]

    def see(self, chunk: Chunk) -> None:
        """Add the rows of a chunk; those that could not be read come last."""
        n, lost = len(chunk), len(chunk.broken)
        predicted = chunk.mask.copy()
        predicted[chunk.start[chunk.length > 0]] = 0  # nothing comes before a row's first token
        beyond = np.arange(len(chunk.ids)) - np.repeat(chunk.start, chunk.length) >= self.max_length
        columns = {
            "source": np.full(n, self.sources.index(chunk.opened)),
            "number": chunk.numbers,
            "length": chunk.length,
            "trained": chunk.sums(predicted),
            "fitted": chunk.sums(np.where(beyond, 0, predicted)),
            "digest": chunk.digests,
            "prompt": _text_hashes(chunk.prompts, chunk.words[0]),
            "answer": _text_hashes(chunk.answers, chunk.words[1]),
        }
        self.add(n, columns)
        broken = {"source": self.sources.index(chunk.opened), "number": [number for _, number, _ in chunk.broken]}
        self.add(lost, broken, readable=False)

    def add(self, n: int, columns: Mapping[str, Any], *, readable: bool = True) -> None:
        """Add n rows by their columns; a column that is not given is 0."""
        for name, kind in COLUMNS.items():
            row = np.zeros(n, kind)
            row[:] = columns.get(name, 0)
            self._parts[name].append(row)
        self._readable.append(np.full(n, readable))

    def close(self) -> "Ledger":
        """Join the chunks; the columns are attributes from then on, with `split` and `readable`."""
        for name in COLUMNS:
            setattr(self, name, np.concatenate(self._parts.pop(name)))
        self.readable = np.concatenate(self._readable)
        splits = np.array([opened.split for opened in self.sources], np.int8)
        self.split = splits[self.source] if len(self) else np.zeros(0, np.int8)
        return self

    def __len__(self) -> int:
        return len(self.number)

    def rows(self, split: int) -> np.ndarray:
        """Return the indices of the readable rows of a split, i64[N]."""
        return np.flatnonzero(self.readable & (self.split == split))

    def where(self, i: int) -> str:
        return self.sources[self.source[i]].source.where(int(self.number[i]))

    def places(self, index: Iterable[int], n: int) -> tuple[str, ...]:
        """Return the places (file and line) of the first n rows of an index."""
        return tuple(self.where(i) for i in islice(index, n))


def _text_hashes(texts: list[str], words: list[list[str]]) -> list[int]:
    return [hash(" ".join(found)) if text else 0 for text, found in zip(texts, words)]


class Reading(NamedTuple):
    """How rows become tokens, as in training.

    Attributes:
        reader: source -> reader; raises UserError for columns that do not fit.
        encoder: examples -> (ids, mask, ...).
        sides: example -> (prompt, answer), as text.
    """

    reader: Callable[[Source], Reader]
    encoder: Encoder | LabelEncoder
    sides: Callable[[Any], tuple[str, str]]


def text_form(tokenizer: Any, settings: Mapping[str, Any], allow_left_out: Sequence[str] = ()) -> Reading:
    """Text to be continued; `settings` are those of `make_reader`."""
    return Reading(lambda source: make_reader(source, **settings), Encoder(tokenizer, allow_left_out), text_sides)


def label_form(tokenizer: Any, labels: RowForm) -> Reading:
    """Texts, or words, with labels."""
    return Reading(labels.reader, labels.encoder(tokenizer), labels.sides)


def chunks(sources: Sequence[Opened], form: Reading) -> Iterator[Chunk]:
    """Yield all rows of all sources; the next chunk is tokenised in a thread while one is looked at.

    Raises:
        UserError: a file cannot be read to its end, because of a malformed line.
    """
    made = _chunks(sources, form)
    with _collected_rarely(), Prefetch(lambda _: next(made)) as ahead:
        yield from ahead


@contextmanager
def _collected_rarely() -> Iterator[None]:
    """Run the cycle collector a hundred times less often: chunks have no cycles, and it took a fifth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _chunks(sources: Sequence[Opened], form: Reading) -> Iterator[Chunk]:
    first = 0
    for opened in sources:
        types = ColumnTypes(opened.source, opened.reader.columns)
        numbered = iter(opened.source)
        while part := list(islice(numbered, CHUNK)):
            yield _chunk(opened, first, part, types, form)
            first += len(part)


def _chunk(opened: Opened, first: int, part: list[tuple[int, dict]], types: ColumnTypes, form: Reading) -> Chunk:
    source, reader = opened.source, opened.reader
    kept, broken = [], []
    for number, row in part:
        place = source.where(number)
        try:
            types.check(number, row)
            kept.append((number, row, place, reader.convert(place, row)))
        except UserError as error:
            broken.append((number, str(error)))
    encoded = _encode(form.encoder, [k[2] for k in kept], [k[3] for k in kept])
    broken += [(k[0], made) for k, made in zip(kept, encoded) if isinstance(made, str)]
    good = [(*k, made) for k, made in zip(kept, encoded) if not isinstance(made, str)]
    numbers, rows, _, examples, tokens = map(list, zip(*good)) if good else ([], [], [], [], [])
    tokens = list(map(form.encoder.longer, tokens)) if hasattr(form.encoder, "longer") else tokens
    length = np.array([len(ids) for ids, *_ in tokens], np.int64)
    texts = [form.sides(example) for example in examples]
    as_bytes = bytes if np.uint8 == form.encoder.MARK else lambda marks: bytes(map(bool, marks))  # marks name tags
    return Chunk(
        opened=opened,
        first=first,
        numbers=numbers,
        rows=rows,
        examples=examples,
        prompts=[prompt for prompt, _ in texts],
        answers=[answer for _, answer in texts],
        ids=np.fromiter(chain.from_iterable(ids for ids, *_ in tokens), np.int32, int(length.sum())),
        mask=np.frombuffer(b"".join(as_bytes(mask) for _, mask, *_ in tokens), np.uint8),
        start=np.cumsum(length) - length,
        length=length,
        digests=np.array([reader.digest(row) for row in rows], np.uint64),
        broken=[(first + len(good) + k, *b) for k, b in enumerate(broken)],
    )


def _encode(encoder: Any, places: list[str], examples: list[Any]) -> list[tuple[list[int], Any] | str]:
    """(ids, mask, ...) of each example, or its error message."""
    try:
        return list(encoder.encode(places, examples))
    except UserError as error:
        if len(examples) == 1:
            return [str(error)]
    return [made for pair in zip(places, examples) for made in _encode(encoder, [pair[0]], [pair[1]])]
