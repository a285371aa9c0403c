"""Rows of sources that are larger than memory: blocks on disk, of which a few are mapped at a time.

A block is a run of rows of one source (`cache.BLOCK_ROWS`). What is known of all of them is how many rows each has
after `fit`, how many packed rows these give, and how often each length occurs.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.data.packing import pack
from jaxtune.data.rows import Rows, SourceReport, fit
from jaxtune.errors import DiskError
from jaxtune.files import atomic_write_text

BITS = 32  # the low bits of a row's number count within its block
WIDTHS_FROM = 200_000  # lengths that the widths of batches are chosen by


@dataclass(frozen=True, eq=False)
class Streamed:
    """The rows of a source, brought to a length, in blocks on disk.

    Attributes:
        folder: of the cache, where what was counted is kept beside the tokens.
        read: (block, whether to verify it) -> its rows in full.
        fitted: block -> its rows as they are trained; the report given counts what was left out.
        kept: rows of each block, i64[N].
        lengths: how often each length occurs, i64.
        prefix: virtual tokens before each row.
    """

    folder: Path
    read: Callable[[int, bool], Rows]
    fitted: Callable[[Rows, SourceReport], Rows]
    kept: np.ndarray
    lengths: np.ndarray
    prefix: Sequence[int] = ()
    _verified: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return int(self.kept.sum())

    def block(self, i: int) -> Rows:
        """The rows of a block, mapped from its file, which is verified when it is first read."""
        rows = self.read(i, i not in self._verified)
        self._verified.add(i)
        return self.fitted(rows, SourceReport("", "")).prefixed(self.prefix)

    def prefixed(self, ids: Sequence[int]) -> "Streamed":
        """The same rows with `ids` before each, as `Rows.prefixed`."""
        return replace(self, prefix=tuple(ids), lengths=np.concatenate([np.zeros(len(ids), np.int64), self.lengths]))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(np.flatnonzero(self.lengths).max(initial=0))

    def bins(self, capacity: int, most: int | None) -> np.ndarray:
        """How many packed rows each block gives, i64[N]: whatever the order in which its rows are packed."""
        lengths = [len(self.kept), self.kept.tolist(), np.flatnonzero(self.lengths).tolist()]

        def count() -> dict[str, Any]:
            return {"bins": [len(pack(self.block(i).length, capacity, most)) for i in range(len(self.kept))]}

        return np.array(_kept(self.folder, ["bins", capacity, most, *lengths], count)["bins"], np.int64)


def streamed(
    folder: Path,
    count: int,
    read: Callable[[int, bool], Rows],
    report: SourceReport,
    *,
    max_length: int,
    overlength: str,
    first: int,
    check: Callable[[int], None],
) -> Streamed:
    """Count what a source has after `fit`, block by block, unless that was done before.

    Args:
        folder: of its tokens.
        count: how many blocks it has.
        read: as in `Streamed`.
        report: is filled as `fit` does.
        max_length: tokens of a row at most.
        overlength: what happens to longer rows.
        first: the first token of a row that can be trained.
        check: is given the largest token; raises UserError if the model has no row for it.
    """

    def fitted(rows: Rows, told: SourceReport) -> Rows:
        return fit(rows, max_length, overlength, told, first)

    def look() -> dict[str, Any]:
        kept, lengths, largest = [], np.zeros(max_length + 1, np.int64), 0
        told = SourceReport(report.name, report.format)
        for i in range(count):
            rows = read(i, True)
            largest = max(largest, int(rows.tokens.max(initial=0)))
            rows = fitted(rows, told)
            kept.append(len(rows))
            lengths += np.bincount(rows.length, minlength=max_length + 1)
        counted = {name: value for name, value in asdict(told).items() if name in COUNTED}
        return {"kept": kept, "lengths": lengths.tolist(), "largest": largest, "report": counted}

    found = _kept(folder, ["fit", count, max_length, overlength, first, "largest"], look)
    check(found["largest"])
    for name, value in found["report"].items():
        setattr(report, name, value)
    return Streamed(folder, read, fitted, np.array(found["kept"], np.int64), np.array(found["lengths"], np.int64))


COUNTED = ("rows", "kept", "too_long", "untrained", "equal", "max_length", "overlength", "longest", "tokens", "trained")


def _kept(folder: Path, key: Sequence[Any], count: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was counted of a set, from a file beside it, or counted and written there."""
    file = folder / f"{key[0]}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    try:
        text, _, sum_ = file.read_text().partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() == sum_:
            return json.loads(text)
    except (OSError, ValueError):
        pass
    text = json.dumps(count())
    try:
        atomic_write_text(file, f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}")
    except DiskError as error:
        if not error.refused:
            raise
    return json.loads(text)


class Blocks(Sequence[Rows]):
    """The blocks of several sources, of which those used last are held.

    A row has the number block << BITS | its index in the block. `source`, `index` and `length` take such numbers, as
    the arrays of the same names in an assembler of rows in memory.
    """

    def __init__(self, sources: Sequence[Streamed], keep: int):
        self.sources, self.keep = list(sources), keep
        self.first = np.concatenate([[0], np.cumsum([len(s.kept) for s in sources])])
        self.kept = np.concatenate([s.kept for s in sources])
        self.source, self.index, self.length = _Source(), _Index(), _Length(self)
        self._held: OrderedDict[int, Rows] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, block: int) -> Rows:
        with self._lock:
            if block not in self._held:
                source = int(np.searchsorted(self.first, block, side="right")) - 1
                self._held[block] = self.sources[source].block(block - int(self.first[source]))
                while len(self._held) > self.keep:
                    self._held.popitem(last=False)
            self._held.move_to_end(block)
            return self._held[block]

    def lengths(self) -> np.ndarray:
        """Lengths of rows as often as they occur, i64, but for a common factor where there are many."""
        size = max(len(s.lengths) for s in self.sources)
        found = sum(np.pad(s.lengths, (0, size - len(s.lengths))) for s in self.sources)
        return np.repeat(np.arange(size), np.ceil(found * min(1.0, WIDTHS_FROM / found.sum())).astype(np.int64))


class _Source:
    def __getitem__(self, member: int) -> int:
        return int(member) >> BITS


class _Index:
    def __getitem__(self, member: int) -> int:
        return int(member) & ((1 << BITS) - 1)


class _Length:
    def __init__(self, blocks: Blocks):
        self.blocks = blocks

    def __getitem__(self, members: np.ndarray) -> np.ndarray:
        low = (1 << BITS) - 1
        return np.array([self.blocks[m >> BITS].length[m & low] for m in np.asarray(members).tolist()], np.int64)
