"""Batches as a pure function of (data, seed, step), and the thread that prepares them ahead.

An epoch is a permutation of its rows (packed: of its bins), drawn from (seed, epoch) alone. Epochs follow one another
without a gap: a batch may hold the end of one and the start of the next.
"""

import copy
import queue
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxtune.data.blocks import Blocks
from jaxtune.data.packing import pack
from jaxtune.data.rows import Rows
from jaxtune.errors import UserError

GRAIN = 2  # tokens: widths are multiples of it by default; cuDNN takes no odd ones
Plan = Sequence[np.ndarray]  # one entry a batch row: the data rows in it, one, or several where they are packed


def _shuffled(n: int, *key: int) -> np.ndarray:
    """Return a permutation of n, made of raw bits, which numpy keeps the same between versions."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(n), kind="stable")


def widths(
    length: np.ndarray, rows: int, most: int = 8, worth: float = 0.02, grain: int = GRAIN, pool: int = 1
) -> np.ndarray:
    """Return the widths that batches of `rows` rows are padded to, ascending; each is a program to compile.

    Among all choices of as many widths these pad the least, on average over batches of rows drawn at random. They are
    multiples of `grain` (or of a multiple of it, so that at most 64 are candidates). The last holds the longest row.

    Args:
        length: tokens of each data row, i64[N].
        rows: rows of a batch.
        most: how many widths there may be.
        worth: the share of the average width that one more width has to save.
        grain: what widths are multiples of, in tokens.
        pool: batches whose rows are drawn together, sorted by length and cut.
    """
    longest = int(length.max())
    grain *= -(-longest // (64 * grain))
    edges = grain * np.arange(-(-longest // grain) + 1)  # from 0
    shorter = np.searchsorted(np.sort(length), edges, side="right") / len(length)
    within = shorter**rows  # the probability that a batch's longest row is at most this long
    pool = max(1, min(pool, len(length) // rows))
    if pool > 1:  # it is the k-th of the pool's: its rank has a beta distribution (David & Nagaraja, eq. 2.1.5)
        from scipy.special import betainc  # takes a third of a second

        kth, after = rows * np.arange(1, pool + 1), rows * np.arange(pool)[::-1]
        within = betainc(kth[:, None], after[:, None] + 1, shorter).mean(0)
    # padded[i, j]: the share of batches whose longest row lies above edge i and up to edge j, times edge j.
    padded = np.where(np.tri(len(edges), dtype=bool), np.inf, (within - within[:, None]) * edges)
    cost, before = padded[0], []  # cost[j]: of all batches up to edge j
    while len(before) < min(most, len(edges) - 1) - 1:
        one_more = cost[:, None] + padded
        if one_more[:, -1].min() > (1 - worth) * cost[-1]:
            break
        before.append(one_more.argmin(0))
        cost = one_more.min(0)
    chosen = [len(edges) - 1]
    for choice in reversed(before):
        chosen.append(int(choice[chosen[-1]]))
    return edges[chosen[::-1]]


class Features(Protocol):
    """Precomputed features of each data row, which batches hold in place of its tokens; see `train.features`.

    Attributes:
        per_token: one vector for each token, not for each row.
    """

    per_token: bool

    def lay(self, plan: Plan, n: int, t: int) -> np.ndarray:
        """Return the features of the rows of `plan`, placed as their tokens would be: [n, t, D], or [n, D]."""


class Assembler:
    """Lays data rows into arrays [A, B, T].

    Attributes:
        features: of the data rows, counted over all sources; None: batches hold tokens.
        beside: name -> what else is kept of each row, and lies beside its tokens under that name.
        widths: what T may be; `pool` batches are sorted by length together.
        WITHIN: with packing a batch still has `batch_size` data rows; see `data.lines`.
    """

    features: Features | None = None
    beside: Mapping[str, Features] = {}
    WITHIN = False

    def __init__(
        self,
        rows: Sequence[Rows],
        batch_size: int,
        grad_accum: int,
        max_length: int,
        packing: bool,
        grain: int = GRAIN,
        pool: int = 1,
        parts: int = 1,
    ):
        if batch_size < 1 or grad_accum < 1:
            raise UserError(f"train.batch_size={batch_size} and train.grad_accum={grad_accum} must be at least 1.")
        if batch_size % grad_accum:
            raise UserError(
                f"train.batch_size={batch_size} cannot be split into train.grad_accum={grad_accum} equal parts."
            )
        self.rows = rows
        self.batch_size, self.grad_accum, self.max_length, self.packing = batch_size, grad_accum, max_length, packing
        if isinstance(rows, Blocks):
            self.source, self.index, self.length = rows.source, rows.index, rows.length
            lengths = rows.lengths()
        else:
            self.source = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
            self.index = np.concatenate([np.arange(len(r)) for r in rows])
            self.length = lengths = np.concatenate([self._lengths(r) for r in rows]).astype(np.int64)
        longest = int(lengths.max())
        if longest > max_length:
            raise ValueError(f"a row of {longest} tokens is longer than max_length={max_length}")
        self.widths = np.minimum(widths(lengths, batch_size, grain=grain, pool=pool), max_length)

    def _lengths(self, rows: Rows) -> np.ndarray:
        """Tokens that each row takes of a batch's row, i[R]."""
        return rows.length

    def width(self, plan: Plan) -> int:
        """Return T for a batch of these rows."""
        if self.packing:
            return self.max_length
        if self.features is not None and not self.features.per_token:
            plan = [self.length.argmax(keepdims=True)]  # nothing is computed over T, so one width serves all batches
        longest = max((int(self.length[row].sum()) for row in plan), default=1)
        return int(self.widths[np.searchsorted(self.widths, longest)])

    def laid(self, plan: Plan) -> int:
        """Return the tokens of a batch of these rows, with its padding."""
        return self.batch_size * self.width(plan)

    def assemble(self, plan: Plan, width: int | None = None) -> dict[str, np.ndarray]:
        """Return the batch of `plan`, filled up to batch_size with empty rows of weight 0."""
        n, t = self.batch_size, width or self.width(plan)
        tokens, targets, positions, segments = (np.zeros((n, t), np.int32) for _ in range(4))
        weights = np.zeros((n, t), np.float32)
        for b, members in enumerate(plan):
            at = 0
            for segment, member in enumerate(members, 1):
                ids, mask = self.rows[self.source[member]][self.index[member]]
                end = at + len(ids)
                tokens[b, at:end] = ids
                targets[b, at : end - 1] = ids[1:]
                weights[b, at : end - 1] = mask[1:]
                positions[b, at:end] = np.arange(len(ids))
                segments[b, at:end] = segment
                at = end
        batch = {
            "tokens": tokens,
            "targets": targets,
            "positions": positions,
            "segments": segments,
            "weights": weights,
        }
        return self._finished(batch, plan, t)

    def _finished(self, batch: dict[str, np.ndarray], plan: Plan, t: int) -> dict[str, np.ndarray]:
        """Add row numbers and, if any, features, and split into micro-batches [A, B, ...]."""
        n = self.batch_size
        batch["row"] = np.arange(n, dtype=np.int32)
        if self.features is not None:
            del batch["tokens"]
            batch["features"] = self._features(plan, n, t)
        batch |= {name: kept.lay(plan, n, t) for name, kept in self.beside.items()}
        return {k: v.reshape(self.grad_accum, len(v) // self.grad_accum, *v.shape[1:]) for k, v in batch.items()}

    def _features(self, plan: Plan, n: int, t: int) -> np.ndarray:
        return self.features.lay(plan, n, t)

    def places(self, plan: Plan) -> list[str]:
        return [self.rows[self.source[m]].where(self.index[m]) for members in plan for m in members]


def with_features(batches: Any, features: Features) -> Any:
    """Return the same `Batches` or `EvalBatches` with the features of their rows in place of tokens."""
    new = copy.copy(batches)
    new._assembler = copy.copy(batches._assembler)
    new._assembler.features = features
    return new


def with_beside(batches: Any, kept: Features, name: str) -> Any:
    """Return the same `Batches` or `EvalBatches` with what is kept of their rows beside the tokens, as `name`."""
    new = copy.copy(batches)
    new._assembler = copy.copy(batches._assembler)
    new._assembler.beside = {**new._assembler.beside, name: kept}
    return new


def with_reference(batches: Any, reference: np.ndarray) -> Any:
    """Return the same `Batches` or `EvalBatches` with numbers of their rows under a reference, f32[texts, R]."""
    new = copy.copy(batches)
    new._assembler = copy.copy(batches._assembler)
    new._assembler.reference = reference
    return new


class Batches:
    """An endless stream of training batches with random access.

    Args:
        sources: the rows of each source.
        weights: the share of each source in an epoch's rows, normalised; None: each row once an epoch. With weights an
            epoch still has as many rows as all sources together; each source runs through permutations of its rows, so
            that no row is repeated before all of its source were used.
        batch_size: rows (packed: bins) of a step, over all `grad_accum` micro-batches.
        grad_accum: micro-batches of a step.
        max_length: tokens of a row at most.
        seed: draws the permutations.
        packing: put several rows, as segments, into one row of `max_length` tokens.
        max_segments: of a packed row at most; None: as many as fit.
        grain: without packing, lengths are padded to multiples of it.
        group_by_length: make batches of rows of similar length, so that little is padded: each run of `GROUPED` batches
            of the permutation is sorted by length and cut into batches, which are shuffled.
        assembler: the class that puts rows into arrays.
        parts: devices that share the rows of a micro-batch.

    Raises:
        UserError: no rows, or weights that do not fit them.
        ValueError: both `packing` and `group_by_length`.
    """

    GROUPED = 16

    def __init__(
        self,
        sources: Sequence[Rows],
        *,
        weights: Sequence[float] | None = None,
        batch_size: int,
        grad_accum: int = 1,
        max_length: int,
        seed: int = 0,
        packing: bool = False,
        max_segments: int | None = None,
        grain: int = GRAIN,
        group_by_length: bool = False,
        assembler: type[Assembler] = Assembler,
        parts: int = 1,
    ):
        if packing and group_by_length:
            raise ValueError("packing leaves nothing to pad: group_by_length has no effect")
        self.sources = list(sources)
        self.seed = seed
        self.batch_size = batch_size
        self.packing, self.max_segments = packing and not assembler.WITHIN, max_segments
        self.group_by_length = group_by_length
        sizes = [len(s) for s in self.sources]
        if not sum(sizes):
            raise UserError("no training rows.")
        self.draws = _draws(sizes, weights)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        pool = self.GROUPED if group_by_length else 1
        self._assembler = assembler(self.sources, batch_size, grad_accum, max_length, packing, grain, pool, parts)
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._ends = [0]  # _ends[e]: batch rows in all epochs before e
        self._lock = threading.Lock()  # batch() may be called by a prefetching thread and by the loop

    @property
    def rows_per_epoch(self) -> int:
        """Data rows in an epoch."""
        return sum(self.draws)

    @property
    def steps_per_epoch(self) -> float:
        """Batches in the first epoch, a fraction: epochs are not padded to whole batches."""
        return len(self._plan(0)) / self.batch_size

    def steps(self, epochs: float) -> int:
        """Return how many batches it takes to cover `epochs` epochs, rounded up; at least 1."""
        return max(1, int(np.ceil(epochs * self.steps_per_epoch - 1e-9)))

    def epoch(self, step: int) -> float:
        """Return how many epochs lie before `step`."""
        return step / self.steps_per_epoch

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Return the batch of `step`, counted from 0.

        tokens, targets (the next token, 0 where there is none), positions (from 0 in each segment), segments (from 1;
        0 is padding) i32[A,B,T]; weights f32[A,B,T] (1 where the target is trained); row i32[A,B] (0..A*B-1).
        """
        return self._assembler.assemble(self._members(step))

    def places(self, step: int) -> list[str]:
        """Return the places (file and line) of the rows of `step`, in the order of the batch."""
        return self._assembler.places(self._members(step))

    def filled(self, steps: int) -> float:
        """Return the share of the first `steps` batches that is tokens; the rest is padding."""
        plans = [self._members(step) for step in range(steps)]
        tokens = sum(int(self._assembler.length[row].sum()) for plan in plans for row in plan)
        return tokens / sum(map(self._assembler.laid, plans))

    def _members(self, step: int) -> Plan:
        if step < 0:
            raise ValueError(f"step {step} is negative")
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        members: list[np.ndarray] = []
        with self._lock:
            while first < last:
                while self._ends[-1] <= first:
                    epoch = len(self._ends) - 1
                    same = epoch > 0 and self._same_size
                    self._ends.append(self._ends[-1] + (self._ends[1] if same else len(self._plan(epoch))))
                epoch = bisect_right(self._ends, first) - 1
                part = self._plan(epoch)[first - self._ends[epoch] : last - self._ends[epoch]]
                members.extend(part)
                first += len(part)
        return members

    @property
    def _same_size(self) -> bool:
        """Whether all epochs have as many batch rows: the number of bins depends on which rows are drawn."""
        return not self.packing or self.draws == [len(s) for s in self.sources]

    def _plan(self, epoch: int) -> Plan:
        if epoch not in self._plans:
            self._plans[epoch] = self._make_plan(epoch)
            while len(self._plans) > 2:
                self._plans.popitem(last=False)
        self._plans.move_to_end(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> Plan:
        drawn = np.concatenate([self._drawn(s, epoch) for s in range(len(self.sources))])
        drawn = drawn[_shuffled(len(drawn), self.seed, 1, epoch)]
        if self.group_by_length:
            drawn = self._grouped(drawn, epoch)
        if not self.packing:
            return drawn[:, None]
        bins = pack(self._assembler.length[drawn], self._assembler.max_length, self.max_segments)
        return [drawn[bins[i]] for i in _shuffled(len(bins), self.seed, 2, epoch)]

    def _grouped(self, drawn: np.ndarray, epoch: int) -> np.ndarray:
        """Reorder the rows of an epoch, except those of a batch that it shares with another epoch."""
        first = -self._ends[epoch] % self.batch_size
        count = max(0, len(drawn) - first) // self.batch_size
        whole = slice(first, first + count * self.batch_size)
        run = np.arange(count) // self.GROUPED
        by_length = np.lexsort((self._assembler.length[drawn[whole]], run.repeat(self.batch_size)))
        batches = drawn[whole][by_length].reshape(count, self.batch_size)
        shuffled = np.lexsort((_shuffled(count, self.seed, 3, epoch), run))
        return np.concatenate([drawn[:first], batches[shuffled].ravel(), drawn[whole.stop :]])

    def _drawn(self, source: int, epoch: int) -> np.ndarray:
        """Return the rows that `source` gives to `epoch`: a slice of its permutations laid end to end."""
        size, count = len(self.sources[source]), self.draws[source]
        first, last = epoch * count, (epoch + 1) * count
        parts = []
        while first < last:
            turn, at = divmod(first, size)
            part = _shuffled(size, self.seed, 0, source, turn)[at : at + last - first]
            parts.append(part)
            first += len(part)
        return np.concatenate(parts, dtype=np.int64) + self.offsets[source] if parts else np.zeros(0, np.int64)


def _draws(sizes: list[int], weights: Sequence[float] | None) -> list[int]:
    """Return how many rows each source gives to an epoch of sum(sizes) rows, by largest remainder."""
    if weights is None:
        return sizes
    weights = np.asarray(weights, float)
    if len(weights) != len(sizes):
        raise UserError(f"data.weights: {len(weights)} weights for {len(sizes)} sources.")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum():
        raise UserError(f"data.weights: {weights.tolist()}: expected numbers of 0 or more, one of them above 0.")
    for i, (weight, size) in enumerate(zip(weights, sizes)):
        if weight and not size:
            raise UserError(f"data.weights: source {i + 1} has weight {weight} but no rows left.")
    exact = weights / weights.sum() * sum(sizes)
    draws = np.floor(exact).astype(int)
    for i in np.argsort(-(exact - draws), kind="stable")[: sum(sizes) - draws.sum()]:
        draws[i] += 1
    return draws.tolist()


def side_by_side(streams: Sequence[Batches]) -> Callable[[int], dict[str, np.ndarray]]:
    """Return `batch(step)`: the batches of several streams stacked, [K,A,B,T], all as wide as the widest."""

    def batch(step: int) -> dict[str, np.ndarray]:
        plans = {id(s): s._members(step) for s in streams}
        width = max(s._assembler.width(plans[id(s)]) for s in streams)
        laid = {id(s): s._assembler.assemble(plans[id(s)], width) for s in {id(s): s for s in streams}.values()}
        batches = [laid[id(s)] for s in streams]
        return {name: np.stack([one[name] for one in batches]) for name in batches[0]}

    return batch


class EvalBatches:
    """All rows once, in order: `len` batches, the last filled with rows of weight 0. Same arrays as `Batches`."""

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        grad_accum: int = 1,
        max_length: int,
        packing: bool = False,
        max_segments: int | None = None,
        grain: int = GRAIN,
        assembler: type[Assembler] = Assembler,
        parts: int = 1,
    ):
        if not len(rows):
            raise UserError("no evaluation rows.")
        self._assembler = assembler([rows], batch_size, grad_accum, max_length, packing, grain, parts=parts)
        if packing and not assembler.WITHIN:
            self._plan = [np.asarray(b) for b in pack(self._assembler.length, max_length, max_segments)]
        else:
            self._plan = list(np.arange(len(rows))[:, None])

    def __len__(self) -> int:
        return -(-len(self._plan) // self._assembler.batch_size)

    def batch(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        n = self._assembler.batch_size
        return self._assembler.assemble(self._plan[i * n : (i + 1) * n])

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return map(self.batch, range(len(self)))


class Prefetch:
    """Iterates fn(start), fn(start + 1), ... up to `stop`, computed up to `depth` ahead in a thread.

    An error of fn is raised where its value would have come. Close it, or use it in a `with`, to end the thread.
    """

    def __init__(self, fn: Callable[[int], object], start: int = 0, stop: int | None = None, depth: int = 2):
        self._queue: queue.Queue = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(fn, start, stop), daemon=True, name="prefetch")
        self._thread.start()

    def _work(self, fn, i: int, stop: int | None) -> None:
        while not self._closed.is_set():
            try:
                item = (True, fn(i)) if stop is None or i < stop else (False, StopIteration())
            except BaseException as error:  # raised again in the reader
                item = (False, error)
            self._queue.put(item)
            if not item[0]:
                return
            i += 1

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self):
        if self._closed.is_set():
            raise StopIteration
        good, value = self._queue.get()
        if good:
            return value
        self.close()
        raise value

    def close(self) -> None:
        """End the thread; values not yet taken are dropped."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()  # a put may be waiting for room
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_) -> None:
        self.close()
