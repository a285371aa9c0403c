"""Batches of rows that are larger than memory, as a pure function of (data, seed, step).

An epoch of `Batches` is one permutation of all rows, and of several packed rows one packing. Here, blocks are drawn in
an order of their own; `WINDOW` of them are shuffled as one, and each is packed by itself. How many packed rows a block
gives does not depend on the order of its rows (best-fit decreasing sees their lengths only), so that what a step holds
is found from numbers of rows a block, and only the blocks of its window are read.

    epoch      a permutation of the blocks, of (seed, epoch)
    window     WINDOW blocks of it; a permutation of their rows, or packed rows, of (seed, epoch, window)
    packing    within a block, its rows in an order of (seed, epoch, block)

With weights each source has such a stream of its own, and a pattern of `PATTERN` packed rows, shuffled anew each time,
says which gives the next.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxtune.data.batches import GRAIN, Assembler, Batches, Plan, _draws, _shuffled
from jaxtune.data.blocks import BITS, Blocks, Streamed
from jaxtune.data.packing import pack
from jaxtune.errors import UserError

WINDOW = 16  # blocks that are shuffled as one
PATTERN = 2**12  # rows, or packed rows, after which each source has given its share


class StreamedBatches(Batches):
    """`Batches` of sources on disk.

    Args:
        sources: the blocks of each source.
        weights: the share of each source in the rows, normalised; None: each row once an epoch. With weights an epoch
            still has about as many rows as all sources together.
        window: blocks that are shuffled as one.
        others: as in `Batches`.
    """

    def __init__(
        self,
        sources: Sequence[Streamed],
        *,
        weights: Sequence[float] | None = None,
        batch_size: int,
        grad_accum: int = 1,
        max_length: int,
        seed: int = 0,
        packing: bool = False,
        max_segments: int | None = None,
        grain: int = GRAIN,
        assembler: type[Assembler] = Assembler,
        parts: int = 1,
        window: int = WINDOW,
    ):
        sources = list(sources)
        lanes = 1 if weights is None else len(sources)
        blocks = Blocks(sources, keep=2 * window * lanes)
        self.sources, self.seed, self.batch_size, self.packing = sources, seed, batch_size, packing
        self.rows = [len(source) for source in sources]
        if not sum(self.rows):
            raise UserError("no training rows.")
        self._assembler = assembler(blocks, batch_size, grad_accum, max_length, packing, grain, parts=parts)
        units = [source.bins(max_length, max_segments) if packing else source.kept for source in sources]
        bins = _Bins(blocks, seed, max_length, max_segments, 2 * window * lanes) if packing else None
        numbers = [np.arange(*ends) for ends in zip(blocks.first, blocks.first[1:])]
        if weights is None:
            numbers, units = [np.concatenate(numbers)], [np.concatenate(units)]
        self._lanes = [
            _Lane(ids, n, (seed, lane), bins, window) for lane, (ids, n) in enumerate(zip(numbers, units, strict=True))
        ]
        self._pattern = None
        self._units = sum(int(n.sum()) for n in units)
        if weights is not None:
            _draws(self.rows, weights)  # checks them
            share = np.asarray(weights, float) / np.sum(weights)
            share = share * [lane.total / max(1, n) for lane, n in zip(self._lanes, self.rows)]  # of packed rows
            self._units = round(sum(self.rows) * float(share.sum()))
            self._pattern = _Pattern(share / share.sum(), seed)
        self._lock = threading.Lock()

    @property
    def rows_per_epoch(self) -> int:
        return sum(self.rows)

    @property
    def steps_per_epoch(self) -> float:
        return self._units / self.batch_size

    def _members(self, step: int) -> Plan:
        if step < 0:
            raise ValueError(f"step {step} is negative")
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        with self._lock:
            if self._pattern is None:
                return self._lanes[0].take(first, self.batch_size)
            return [self._lanes[lane].take(at, 1)[0] for lane, at in map(self._pattern, range(first, last))]


class _Pattern:
    """Which source gives the n-th row: of each run of `size` rows a source gives a fixed number, at shuffled places."""

    def __init__(self, share: np.ndarray, seed: int):
        least = share[share > 0].min()
        size = max(PATTERN, 1 << int(np.ceil(np.log2(16 / least)))) if least > 2**-16 else 2**20
        exact = share * size
        self.counts = np.floor(exact).astype(np.int64)
        self.counts[np.argsort(self.counts - exact, kind="stable")[: size - self.counts.sum()]] += 1
        self.size, self.seed = size, seed
        self._run: tuple[int, np.ndarray, np.ndarray] | None = None

    def __call__(self, n: int) -> tuple[int, int]:
        """(source, which of its own rows) of row n."""
        run, at = divmod(n, self.size)
        if self._run is None or self._run[0] != run:
            lanes = np.repeat(np.arange(len(self.counts)), self.counts)[_shuffled(self.size, self.seed, 7, run)]
            nth = np.empty(self.size, np.int64)
            for lane, count in enumerate(self.counts):
                nth[lanes == lane] = np.arange(count)
            self._run = run, lanes, nth
        _, lanes, nth = self._run
        lane = int(lanes[at])
        return lane, run * int(self.counts[lane]) + int(nth[at])


class _Lane:
    """An endless stream of the rows, or packed rows, of some blocks, with random access."""

    def __init__(self, blocks: np.ndarray, units: np.ndarray, key: tuple[int, int], bins: "_Bins | None", window: int):
        self.blocks, self.units, self.key, self.bins, self.window = blocks, units, key, bins, window
        self.total = int(units.sum())
        self._epochs, self._windows = _Last(2), _Last(2)

    def take(self, first: int, n: int) -> list[np.ndarray]:
        """The members of the n from `first` on."""
        found: list[np.ndarray] = []
        while len(found) < n:
            epoch, at = divmod(first + len(found), self.total)
            order, ends = self._epochs(epoch, self._order)
            window = int(np.searchsorted(ends, at, side="right"))
            before = int(ends[window - 1]) if window else 0
            blocks, units = self._windows((epoch, window), self._shuffle, order)
            part = slice(at - before, at - before + n - len(found))
            for block, unit in zip(blocks[part].tolist(), units[part].tolist()):
                found.append(np.array([block << BITS | unit]) if self.bins is None else self.bins(epoch, block, unit))
        return found

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the places of the blocks in the order of an epoch, how many units lie before the end of each window)."""
        order = _shuffled(len(self.blocks), self.key[0], 4, self.key[1], epoch)
        ends = np.cumsum(self.units[order])
        return order, ends[
            np.minimum(np.arange(self.window - 1, len(ends) + self.window - 1, self.window), len(ends) - 1)
        ]

    def _shuffle(self, at: tuple[int, int], order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The units of a window, shuffled: (block, which of it)."""
        epoch, window = at
        places = order[window * self.window : (window + 1) * self.window]
        units = self.units[places]
        block = np.repeat(self.blocks[places], units)
        unit = np.arange(len(block)) - np.repeat(np.cumsum(units) - units, units)
        shuffled = _shuffled(len(block), self.key[0], 5, self.key[1], epoch, window)
        return block[shuffled], unit[shuffled]


class _Bins:
    """Packed rows of a block."""

    def __init__(self, blocks: Blocks, seed: int, capacity: int, most: int | None, keep: int):
        self.blocks, self.seed, self.capacity, self.most = blocks, seed, capacity, most
        self._packed = _Last(keep)

    def __call__(self, epoch: int, block: int, unit: int) -> np.ndarray:
        members, ends = self._packed((epoch, block), self._pack)
        return members[ends[unit - 1] if unit else 0 : ends[unit]]

    def _pack(self, at: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        epoch, block = at
        rows = _shuffled(len(self.blocks[block]), self.seed, 6, epoch, block)
        bins = pack(self.blocks[block].length[rows], self.capacity, self.most)
        flat = np.fromiter((item for one in bins for item in one), np.int64, len(rows))
        return (block << BITS) | rows[flat], np.cumsum([len(one) for one in bins])


class _Last:
    """The values of a function that were asked for last."""

    def __init__(self, keep: int):
        self.keep, self.held = keep, OrderedDict()

    def __call__(self, key: Any, make: Callable[..., Any], *more: Any) -> Any:
        if key not in self.held:
            self.held[key] = make(key, *more)
            while len(self.held) > self.keep:
                self.held.popitem(last=False)
        self.held.move_to_end(key)
        return self.held[key]
