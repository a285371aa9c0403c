"""Short rows of a batch, several in a line of tokens: the same rows in each step, and hardly any padding.

    rows of a batch                 ab  cdef  g  hij  klm  no
    a line each, padded             ab..  cdef  g...  hij.  klm.  no..
    packed in three lines           cdefg  hijno  klmab        segments 11112  11122  11122
                                                               place    4  0  1  2  ...     of rows ab, cdef, g, hij

Tokens see those of their own segment, and what is computed of a row is found by its place: line * most + segment - 1,
where a line has at most `most` segments. Rows go to the shortest line, the longest first, so that lines are even; the
rows of each device and micro-batch have lines of their own.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxtune.data.batches import GRAIN, Assembler, Plan, widths
from jaxtune.data.rows import Rows

SAMPLED = 8192  # rows of the batches by which the number of lines is chosen
TRIED = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)  # rows a line
BESIDE = 400  # tokens of a line whose attention takes as long as the rest of a step


def most_segments(segments: int, lines: int) -> int:
    """How many segments a line holds at most: twice as many as on average."""
    return -(-2 * segments // lines)


def dealt(length: np.ndarray, lines: int, most: int) -> list[list[int]]:
    """Deal rows of these lengths to lines of at most `most` rows, so that they are even: the rows of each line."""
    found: list[list[int]] = [[] for _ in range(lines)]
    filled = [0] * lines
    for row in np.argsort(-length, kind="stable").tolist():
        line = min((i for i in range(lines) if len(found[i]) < most), key=filled.__getitem__)
        found[line].append(row)
        filled[line] += int(length[row])
    return found


class LinesAssembler(Assembler):
    """Lays the rows of a batch in few lines, if `packing`; else every row, or text of a row, has a line of its own.

    Attributes:
        group: rows of a device and micro-batch, which have `count` lines: as many as keep a step's work least, by
            padding and by attention over a line, in batches drawn at random.
        total: tokens of each data row.
        texts: of a row; each is a segment.
    """

    WITHIN = True
    texts = 1

    def __init__(
        self,
        rows: list[Rows],
        batch_size: int,
        grad_accum: int,
        max_length: int,
        packing: bool,
        grain: int = GRAIN,
        pool: int = 1,
        parts: int = 1,
    ):
        super().__init__(rows, batch_size, grad_accum, max_length, packing, grain, pool)
        self.total = np.concatenate([part.length for part in rows]).astype(np.int64)
        self.group = self.count = batch_size // grad_accum // (parts if batch_size // grad_accum % parts == 0 else 1)
        if packing:
            drawn = np.random.PCG64(0).random_raw(max(SAMPLED, self.group)) % len(self.total)
            samples = self.total[drawn[: len(drawn) // self.group * self.group].astype(np.int64)]
            work, needs = {}, {}
            for count in sorted({max(1, round(self.group / each)) for each in TRIED}):
                self.count = count
                needs[count] = np.array([self._needed(one) for one in samples.reshape(-1, self.group)])
                work[count] = (count * needs[count] * (1 + needs[count] / BESIDE)).mean()
            self.count = min(work, key=work.__getitem__)
            self.widths = widths(needs[self.count], 1, grain=grain)

    @property
    def packs(self) -> bool:
        """Whether lines hold several rows; features of whole rows have nothing that is laid in lines."""
        return self.packing and (self.features is None or self.features.per_token)

    @property
    def most(self) -> int:
        """Segments of a line at most."""
        return most_segments(self.group * self.texts, self.count)

    def _dealt(self, length: np.ndarray) -> list[list[int]]:
        return dealt(length, self.count, self.most // self.texts)

    def _needed(self, length: np.ndarray) -> int:
        return max(int(length[line].sum()) for line in self._dealt(length))

    def lines(self, plan: Plan) -> list[list[int]]:
        """The rows of each line of the batch, counted in `plan`."""
        members = np.array([member for (member,) in plan], np.int64)
        if not self.packs:
            return [[b] for b in range(len(members))]
        length = np.zeros(self.batch_size, np.int64)
        length[: len(members)] = self.total[members]
        found = []
        for first in range(0, self.batch_size, self.group):
            lines = self._dealt(length[first : first + self.group])
            found += [[first + b for b in line if first + b < len(members)] for line in lines]
        return found

    def width(self, plan: Plan) -> int:
        if not self.packs:
            return super().width(plan)
        need = max(sum(int(self.total[plan[b][0]]) for b in line) for line in self.lines(plan))
        last = int(self.widths[-1])
        if need > last:  # longer than in any batch that was drawn
            unit = max(GRAIN, last // 4 // GRAIN * GRAIN)
            return -(-need // unit) * unit
        return int(self.widths[np.searchsorted(self.widths, need)])

    def laid(self, plan: Plan) -> int:
        return self.batch_size // self.group * self.count * self.width(plan)

    def empty(self, t: int) -> np.ndarray:
        """Zeros of a batch's lines, i32[R, t]."""
        rows = self.batch_size if not self.packs else self.batch_size // self.group * self.count
        return np.zeros((rows, t), np.int32)

    def _features(self, plan: Plan, n: int, t: int) -> np.ndarray:
        return super()._features(plan, len(self.empty(1)), t)

    def place(self, line: int, segment: int) -> int:
        """Where what is computed of a segment, counted from 1, lies on its device."""
        return line % self.count * self.most + segment - 1

    def finished(
        self, batch: Mapping[str, np.ndarray], plan: Plan, lines: Sequence[Sequence[int]], t: int
    ) -> dict[str, np.ndarray]:
        """`_finished` of lines: features lie as their tokens would."""
        return self._finished(dict(batch), [[plan[b][0] for b in line] for line in lines], t)
