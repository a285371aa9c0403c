"""Better and worse answers as tokens: encoders of pairs and judged answers, and what lays them into batches.

`jaxtune.data.preferences` says how they are read.
"""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtune.data.batches import Assembler, Plan
from jaxtune.data.messages import Notes
from jaxtune.data.rows import ROW, Rows
from jaxtune.data.tokenize import Encoder

if TYPE_CHECKING:
    from jaxtune.data.preferences import Judged, Pair

BRANCH = 2**16  # of `jaxtune.models.attention`, which imports jax


def shared_prefix(rows: Rows, i: int) -> int:
    """How many tokens the two texts of pair i have in common before what is trained of either."""
    (a, marks_a), (b, marks_b) = rows[i], rows.other[i]
    n = min(len(a), len(b))
    apart = np.flatnonzero((a[:n] != b[:n]) | (marks_a[:n] > 0) | (marks_b[:n] > 0))
    return int(apart[0]) if len(apart) else n


def trunks(rows: Rows) -> np.ndarray:
    """How many tokens of each pair can be laid once, i64[R]: those before the last one that both texts share.

    From that one the first token of either answer is predicted, so each has it for itself.
    """
    return np.array([max(0, shared_prefix(rows, i) - 1) for i in range(len(rows))], np.int64)


def pair_lengths(rows: Rows, shared: bool) -> np.ndarray:
    """Tokens that both texts of each pair take in a packed row, i64[R]."""
    both = rows.length.astype(np.int64) + rows.other.length
    return both - trunks(rows) if shared else both


def beside(heads: Sequence[str], texts: Sequence[str], width: int = 58) -> str:
    """Two texts in columns of `width` characters."""
    columns = []
    for head, text in zip(heads, texts):
        lines = [part for line in text.strip("\n").split("\n") for part in textwrap.wrap(line, width) or [""]]
        columns.append([head, "-" * len(head), *lines])
    rows = max(map(len, columns))
    left, right = (column + [""] * (rows - len(column)) for column in columns)
    return "\n".join(f"{a:<{width}} | {b}".rstrip() for a, b in zip(left, right)) + "\n"


class PairEncoder:
    """Pairs to token ids: the chosen text and behind it the rejected one, with the first's tokens and the margin."""

    MARK, FIRST = Encoder.MARK, Encoder.FIRST
    ROW = np.dtype([*ROW.descr, ("first", "<i4"), ("label", "<f4", (1,))])

    def __init__(self, tokenizer: Any, allow_left_out: Sequence[str] = ()):
        self.inner = Encoder(tokenizer, allow_left_out)

    @property
    def notes(self) -> Notes:
        return self.inner.notes

    @property
    def ends(self) -> Counter:
        return self.inner.ends

    @property
    def chats(self) -> int:
        return self.inner.chats

    def encode(
        self, places: list[str], examples: "list[Pair]"
    ) -> Iterator[tuple[list[int], list[int], int, list[float]]]:
        """Yield (ids, mask, tokens of the first text, [margin]) for each pair, in order."""
        twice = [place for place in places for _ in range(2)]
        texts = self.inner.encode(twice, [text for pair in examples for text in (pair.chosen, pair.rejected)])
        for pair, (ids, mask) in zip(examples, texts):
            other, marks = next(texts)
            yield [*ids, *other], [*mask, *marks], len(ids), [pair.margin]

    def longer(self, made: tuple) -> tuple[list[int], list[int]]:
        """Of what `encode` yields, the longer text: (ids, mask)."""
        ids, mask, first, _ = made
        cut = slice(first) if 2 * first >= len(ids) else slice(first, None)
        return ids[cut], mask[cut]

    def closed(self, rows: Rows, max_length: int, whole: Rows) -> Rows:
        return rows


class JudgedEncoder(PairEncoder):
    """Judged answers to token ids; `closed` puts another row's answer behind each prompt."""

    ROW = np.dtype([*ROW.descr, ("label", "<f4", (1,))])

    def encode(self, places: list[str], examples: "list[Judged]") -> Iterator[tuple[list[int], list[int], list[float]]]:
        """Yield (ids, mask, [1 if good]) for each answer, in order."""
        texts = self.inner.encode(places, [example.answer for example in examples])
        for example, (ids, mask) in zip(examples, texts):
            yield ids, mask, [float(example.good)]

    def longer(self, made: tuple) -> tuple[list[int], list[int]]:
        return made[:2]

    def closed(self, rows: Rows, max_length: int, whole: Rows) -> Rows:
        """The rows, with the prompt of each and the answer of the one before it in `other`; the first takes the last's.

        Mismatched answers are what KTO estimates its KL from (arXiv:2402.01306, section 4.1).
        """
        if not len(rows):
            return rows
        first = [int(np.argmax(rows[i][1][1:] > 0)) + 1 for i in range(len(rows))]
        tokens, masks = [], []
        for i in range(len(rows)):
            before, other = rows[i][0][: first[i]], i - 1
            answer, marks = (part[first[other] :] for part in rows[other])
            tokens.append(np.concatenate([before, answer])[:max_length])
            masks.append(np.concatenate([np.zeros(len(before), np.uint8), marks])[:max_length])
        length = np.array([len(ids) for ids in tokens], np.int32)
        other = replace(
            rows,
            tokens=np.concatenate(tokens).astype(np.int32),
            mask=np.concatenate(masks).astype(np.uint8),
            start=np.cumsum(length, dtype=np.int64) - length,
            length=length,
            target=None,
        )
        return replace(rows, other=other)


# ---------------------------------------------------------------------------------------------------------- batches


class PairAssembler(Assembler):
    """Lays pairs: tokens, targets, positions, segments i32[A, B, 2, T], the chosen text first; answer f32[A, B, 2, T],
    1 where the target is trained; weights f32[A, B], 0 for rows that are missing; margin f32[A, B].

    Packed, a row holds up to P pairs, both texts of each: [A, B, T] in place of [A, B, 2, T], [A, B, P] of [A, B]; and
    owner i32[A, B, T], 2 * pair + text of each token.

    With a reference, `reference` f32[A, B, 2], or [A, B, P, 2]: sums of log-probabilities of the answers under it.

    Attributes:
        reference: of all rows' texts, f32[2, R]; None: batches have none.
    """

    reference: np.ndarray | None = None
    TARGET = "margin"
    TOGETHER = True  # both texts of a pair lie in one packed row
    SHARED = False

    def __init__(self, rows: list[Rows], *args: Any, **settings: Any):
        super().__init__(rows, *args, **settings)
        if self.packing:
            self.trunk = np.concatenate([trunks(r) if self.SHARED else np.zeros(len(r), np.int64) for r in rows])
            self.pairs = max(1, self.max_length // int(self.length.min()))

    def _lengths(self, rows: Rows) -> np.ndarray:
        return pair_lengths(rows, self.SHARED) if self.packing and self.TOGETHER else rows.longest

    def assemble(self, plan: Plan, width: int | None = None) -> dict[str, np.ndarray]:
        n, t = self.batch_size, width or self.width(plan)
        laid = (n, t) if self.packing and self.TOGETHER else (n, 2, t)
        per = (n, self.pairs) if self.packing else (n,)
        names = ("tokens", "targets", "positions", "segments", *(("owner",) if self.packing else ()))
        batch = {name: np.zeros(laid, np.int32) for name in names} | {"answer": np.zeros(laid, np.float32)}
        batch |= {"weights": np.zeros(per, np.float32), self.TARGET: np.zeros(per, np.float32)}
        batch |= {} if self.reference is None else {"reference": np.zeros((*per, 2), np.float32)}
        for b, members in enumerate(plan):
            at: Any = 0
            for p, member in enumerate(members):
                rows, i = self.rows[self.source[member]], self.index[member]
                if self.packing:
                    at = self._lay(batch, rows, i, int(self.trunk[member]), b, p, at)
                else:
                    for s, side in enumerate(rows.sides):
                        _lay(batch, (b, s), *side[i], at=0, segment=1)
                place = (b, p) if self.packing else (b,)
                batch["weights"][place] = 1
                if rows.target is not None:
                    batch[self.TARGET][place] = rows.target[i, 0]
                if self.reference is not None:
                    batch["reference"][place] = self.reference[:, member]
        return self._finished(batch, plan, t)

    def _lay(self, batch: dict[str, np.ndarray], rows: Rows, i: int, trunk: int, b: int, p: int, at: int) -> int:
        """Lay both texts of pair p of row b from token `at` on, the first `trunk` tokens once; return where it ends."""
        if trunk:
            ids, mask = rows[i]
            _lay(batch, (b,), ids[:trunk], mask[:trunk], at=at, segment=p + 1)
            at += trunk
        for s, side in enumerate(rows.sides):
            ids, mask = (part[trunk:] for part in side[i])
            segment = p + 1 + (s + 1) * BRANCH if trunk else 2 * p + 1 + s
            _lay(batch, (b,), ids, mask, at=at, segment=segment, first=trunk)
            batch["owner"][b, at : at + len(ids)] = 2 * p + s
            at += len(ids)
        return at

    def _features(self, plan: Plan, n: int, t: int) -> np.ndarray:
        """[n, 2, T, D] or, packed, [n, T, D]; those of second texts stand behind those of all first ones."""
        texts = (0, len(self.length))
        if self.packing and self.TOGETHER:
            return self.features.lay([[m + more for m in row for more in texts] for row in plan], n, t)
        return np.stack([self.features.lay([[m + more for m in row] for row in plan], n, t) for more in texts], axis=1)


class SharedAssembler(PairAssembler):
    """Lays what the texts of a packed pair begin with once, the trunk of two branches (`models.attention.sees`)."""

    SHARED = True


def _lay(
    batch: dict[str, np.ndarray],
    row: tuple[int, ...],
    ids: np.ndarray,
    mask: np.ndarray,
    *,
    at: int,
    segment: int,
    first: int = 0,
) -> None:
    """Lay a text into a row of a batch from token `at` on; `first` is the position of its first token."""
    end = at + len(ids)
    batch["tokens"][(*row, slice(at, end))] = ids
    batch["targets"][(*row, slice(at, end - 1))] = ids[1:]
    batch["answer"][(*row, slice(at, end - 1))] = mask[1:]
    batch["positions"][(*row, slice(at, end))] = first + np.arange(len(ids))
    batch["segments"][(*row, slice(at, end))] = segment


class JudgedAssembler(PairAssembler):
    """Lays judged answers as pairs: each, and its prompt with another's answer; `good` f32[A, B] is 1 or 0.

    Packed, the two lie in rows of their own, since the loss computes them apart: [A, B, 2, T] still, of P answers each,
    and owner i32[A, B, 2, T].
    """

    TARGET, TOGETHER = "good", False

    def _lay(self, batch: dict[str, np.ndarray], rows: Rows, i: int, trunk: int, b: int, p: int, at: Any) -> Any:
        """Lay the two texts of answer p from tokens `at` on, one for each row (0: both); return where they end."""
        ends = []
        for s, (side, first) in enumerate(zip(rows.sides, at or (0, 0), strict=True)):
            ids, mask = side[i]
            _lay(batch, (b, s), ids, mask, at=first, segment=p + 1)
            ends.append(first + len(ids))
            batch["owner"][b, s, first : ends[-1]] = 2 * p + s
        return ends
