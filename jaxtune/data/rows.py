"""Tokenised rows as spans of flat arrays, how they are brought to a length, and the report on what was left out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from jaxtune.data.messages import Notes
from jaxtune.data.sources import file_of, place_of
from jaxtune.errors import UserError

NO_END = -1
AT_ONCE = 2**12  # rows whose trained tokens are counted together

# One entry a row: its span in the flat arrays, its line or row number in the source, a hash of its content.
ROW = np.dtype([("start", "<i8"), ("length", "<i4"), ("origin", "<i8"), ("digest", "<u8")])


@dataclass(frozen=True)
class Rows:
    """Tokenised rows as spans of flat arrays, which may be memory-mapped and shared between several Rows.

    tokens i32[N] and mask u8[N] (1: this token is to be predicted) are flat; per row: start i64[R], length i32[R],
    origin i64[R] (its line, or its row counted from 1, in the source), source i32[R] (an index into `labels`) and
    digest u64[R] (of its content); of labelled rows also target f32[R, n], and their mask has `label_rows`' marks.
    `labels[s].replace("{}", str(origin))` is the row's place in words. `other` holds a second text of each row, in the
    same order: of a pair the rejected answer after its prompt, where the rows themselves are the chosen ones.
    """

    tokens: np.ndarray
    mask: np.ndarray
    start: np.ndarray
    length: np.ndarray
    origin: np.ndarray
    source: np.ndarray
    digest: np.ndarray
    labels: tuple[str, ...]
    target: np.ndarray | None = None
    lost: int = 0  # labelled words of the source that gave no token
    other: "Rows | None" = None

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens i32[n], mask u8[n]) of row i."""
        span = slice(int(self.start[i]), int(self.start[i]) + int(self.length[i]))
        return self.tokens[span], self.mask[span]

    def select(self, index: np.ndarray) -> "Rows":
        """Return the rows of an index or boolean array, over the same flat arrays."""
        pick = {name: getattr(self, name)[index] for name in ("start", "length", "origin", "source", "digest")}
        target = None if self.target is None else self.target[index]
        other = None if self.other is None else self.other.select(index)
        return Rows(self.tokens, self.mask, labels=self.labels, target=target, other=other, **pick)

    @property
    def sides(self) -> tuple["Rows", ...]:
        """The rows, and behind them the second text of each where there is one."""
        return (self,) if self.other is None else (self, self.other)

    @property
    def longest(self) -> np.ndarray:
        """Tokens of each row's longest text, i32[R]."""
        return np.max([side.length for side in self.sides], axis=0)

    def prefixed(self, ids: Sequence[int]) -> "Rows":
        """Return the rows with `ids` before each, which are not to be predicted; the rows are copied."""
        if not ids:
            return self
        rows = [self[i] for i in range(len(self))]
        length = self.length + len(ids)
        return replace(
            self,
            tokens=np.concatenate([part for tokens, _ in rows for part in (ids, tokens)]).astype(np.int32),
            mask=np.concatenate([part for _, mask in rows for part in (np.zeros(len(ids), np.uint8), mask)]),
            start=np.concatenate([[0], np.cumsum(length[:-1], dtype=np.int64)]).astype(np.int64),
            length=length,
            other=None if self.other is None else self.other.prefixed(ids),
        )

    def where(self, i: int) -> str:
        return place_of(self.labels[int(self.source[i])], int(self.origin[i]))

    def file(self, i: int) -> str:
        """The file, or the data set, that row i stands in."""
        return file_of(self.labels[int(self.source[i])], int(self.origin[i]))

    @staticmethod
    def concatenate(parts: Sequence["Rows"]) -> "Rows":
        """Join rows of several sources; more than one part is copied."""
        if len(parts) == 1:
            return parts[0]
        labels: list[str] = []
        tokens, masks, sources = [], [], []
        for part in parts:
            tokens += [part[i][0] for i in range(len(part))]
            masks += [part[i][1] for i in range(len(part))]
            sources.append(part.source + len(labels))
            labels += part.labels
        join = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("length", "origin", "digest")}
        return Rows(
            tokens=np.concatenate(tokens),
            mask=np.concatenate(masks),
            start=np.concatenate([[0], np.cumsum(join["length"][:-1], dtype=np.int64)]).astype(np.int64),
            source=np.concatenate(sources).astype(np.int32),
            labels=tuple(labels),
            target=None if parts[0].target is None else np.concatenate([p.target for p in parts]),
            other=None if parts[0].other is None else Rows.concatenate([p.other for p in parts]),
            **join,
        )


@dataclass
class SourceReport:
    """How many rows and tokens of one source were read, kept and left out, with notes."""

    name: str
    format: str
    rows: int = 0  # in the source
    kept: int = 0  # after `fit`; pieces, where rows were split
    too_long: int = 0
    untrained: int = 0
    equal: int = 0  # pairs whose two answers are the same tokens
    max_length: int = 0
    overlength: str = "drop"
    longest: int = 0  # tokens in the longest row, before `fit`
    tokens: int = 0  # in the rows kept
    trained: int = 0
    cached: bool = False
    on_cache: str | None = None  # a line on the cache for the user
    lost: int = 0  # labelled words that gave no token
    notes: Notes = field(default_factory=Notes)  # what was not used, or left out by the chat template
    chat: bool = False  # whether a chat template made its text
    ends: dict[int, int] = field(default_factory=dict)  # token that ends what is trained -> how often; NO_END: words

    def line(self) -> str:
        """Return one sentence: `FILE (prompt_completion): 7,473 rows: 6,901 kept, 572 over 512 tokens dropped, ...`."""
        done = {"drop": "dropped", "truncate": "truncated", "split": "split"}[self.overlength]
        share = f" ({self.trained / self.tokens:.0%})" if self.tokens else ""
        return (
            f"{self.name} ({self.format}): {self.rows:,} rows: {self.kept:,} kept, "
            f"{self.too_long:,} over {self.max_length:,} tokens {done}, "
            f"{self.untrained:,} without a trained token dropped; "
            f"{self.tokens:,} tokens, {self.trained:,}{share} trained"
            + (f"; {self.equal:,} pairs of two equal answers, which teach nothing, dropped" if self.equal else "")
            + (f"; {self.lost:,} labelled words give no token and are not trained" if self.lost else "")
        )


@dataclass
class Report:
    """What was read and left out. `fingerprint` (hex) changes with anything that changes the rows of a batch."""

    sources: list[SourceReport] = field(default_factory=list)
    eval_sources: list[SourceReport] = field(default_factory=list)
    train_rows: int = 0
    eval_rows: int = 0
    fingerprint: str = ""

    def lines(self) -> list[str]:
        """Return a sentence for each source, and one on the evaluation set."""
        held_out = (
            [f"evaluation: {self.eval_rows:,} rows held out of training"]
            if self.eval_rows and not self.eval_sources
            else []
        )
        evaluation = [f"evaluation: {report.line()}" for report in self.eval_sources]
        notes = [f"{r.name}: {line}" for r in self.sources + self.eval_sources for line in r.notes.lines()]
        notes += [r.on_cache for r in self.sources + self.eval_sources if r.on_cache]
        if endless := self.ends[NO_END]:
            notes.append(
                f"{endless:,} of {self.ends.total():,} trained turns do not end with a special token of the tokenizer: "
                "the model does not learn to stop there"
            )
        return [report.line() for report in self.sources] + evaluation + held_out + notes

    @property
    def ends(self) -> Counter:
        """How often each token ends a turn, or a text, that is trained; NO_END: none does."""
        return sum((Counter(source.ends) for source in self.sources), Counter())


def fit(
    rows: Rows,
    max_length: int,
    overlength: str,
    report: SourceReport,
    first: int = 1,
    lengths: np.ndarray | None = None,
) -> Rows:
    """Bring rows to at most `max_length` tokens and drop those without a token to predict; count both in `report`.

    `overlength`: "drop" the row; "truncate" to its first tokens; "split" into pieces that share one token, so that
    every token of the row but the first is still predicted. `first`: the first token of a row that can be trained.
    `lengths`: what each row takes of max_length; default: the tokens of its longest text.
    """
    if overlength not in ("drop", "truncate", "split"):
        raise UserError(f"data.overlength: unknown {overlength!r}. Known: drop, truncate, split.")
    if max_length < 2:
        raise UserError(f"data.max_length: {max_length} leaves no token to predict; at least 2.")
    lengths = rows.longest if lengths is None else lengths
    long = lengths > max_length
    report.rows += len(rows)
    report.too_long += int(long.sum())
    report.max_length, report.overlength = max_length, overlength
    report.longest = max(report.longest, int(lengths.max(initial=0)))
    if overlength == "drop":
        rows = rows.select(~long)
    elif overlength == "truncate":
        cut = [replace(side, length=np.minimum(side.length, max_length)) for side in rows.sides]
        rows = replace(cut[0], other=cut[1] if cut[1:] else None)
    elif long.any():
        rows = _split(rows, max_length)
    trained = [trained_counts(side, first) for side in rows.sides]
    there = np.all([counts > 0 for counts in trained], axis=0)
    report.untrained += int((~there).sum())
    same = there & equal_sides(rows)
    report.equal += int(same.sum())
    there &= ~same
    kept = rows.select(there)
    report.kept += len(kept)
    report.tokens += sum(int(side.length.sum()) for side in kept.sides)
    report.trained += sum(int(counts[there].sum()) for counts in trained)
    return kept


def equal_sides(rows: Rows) -> np.ndarray:
    """Which rows have a second text of the same tokens, bool[R]: nothing tells the one from the other."""
    found = np.zeros(len(rows), bool)
    if rows.other is not None:
        for i in np.flatnonzero(rows.length == rows.other.length):
            found[i] = np.array_equal(rows[i][0], rows.other[i][0])
    return found


def _split(rows: Rows, max_length: int) -> Rows:
    # The last token of a piece is the first of the next: predicted in one, context in the other.
    stride = max_length - 1
    pieces = np.maximum(1, -(-(rows.length.astype(np.int64) - 1) // stride))
    index = np.repeat(np.arange(len(rows)), pieces)
    nth = np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    split = rows.select(index)
    start = split.start + nth * stride
    length = np.minimum(max_length, split.length - nth * stride).astype(np.int32)
    return replace(split, start=start, length=length)


def trained_counts(rows: Rows, first: int = 1) -> np.ndarray:
    """Count the tokens of each row that are trained, i64[R]."""
    found = np.zeros(len(rows), np.int64)
    for at in range(0, len(rows), AT_ONCE):
        start, length = rows.start[at : at + AT_ONCE].astype(np.int64), rows.length[at : at + AT_ONCE]
        low, high = int(start.min()), int((start + length).max())
        if high - low > 4 * int(length.sum()):  # they lie far apart
            found[at : at + AT_ONCE] = [np.count_nonzero(rows[i][1][first:]) for i in range(at, at + len(start))]
            continue
        upto = np.concatenate([[0], np.cumsum(np.asarray(rows.mask[low:high]) != 0)])
        found[at : at + AT_ONCE] = upto[start + length - low] - upto[start + np.minimum(first, length) - low]
    return found


def check_vocabulary(largest: int, vocab_size: int, tokenizer) -> None:
    """Raise UserError if the largest token of the data has no row in an embedding of `vocab_size` rows."""
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer ({len(tokenizer):,} tokens) is larger than the model's embedding ({vocab_size:,} rows): "
            f"the data has token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}). "
            "Use the tokenizer that belongs to the model."
        )
