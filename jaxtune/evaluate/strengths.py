"""Losses and scores of a task by the strength of the tuning, with few passes over the rows.

Losses are measured at every strength. Of LoRA the strength is one number a layer, so the strengths share one program
and the base's weights; of whole models each in turn is a mixture of both, see `jaxtune.weights.strength`. Beyond
`SAMPLE` rows only a sample is read at every strength, and the others under the base and the tuned model alone, from
which their losses in between are predicted (`statistics.spread_out`): two passes and a little for many rows.

Answers take a pass for each token, so they are generated at the strengths that are asked for.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError
from jaxtune.evaluate import statistics
from jaxtune.evaluate.answers import Answers, answer_columns, losses, measure_answers
from jaxtune.evaluate.comparison import Column
from jaxtune.evaluate.evaluation import Progress
from jaxtune.evaluate.kept import Kept, in_batches, key_of
from jaxtune.evaluate.metrics import METRICS, RIGHT
from jaxtune.evaluate.rows import Row
from jaxtune.evaluate.systems import Pair, System
from jaxtune.infer.generation import bucket, prepare
from jaxtune.infer.logprobs import batches_by_length, most_tokens
from jaxtune.models.decoder import head_leaf, head_logits
from jaxtune.objectives.token_nats import token_nats
from jaxtune.weights.strength import at_strength, off_the_scale

ENDS = (0.0, 1.0)  # the base, and the tuned model
SAMPLE = 192  # rows that are read at every strength
FIRST = (*RIGHT, "accuracy", "rouge_l", "token_f1")  # scores by which a gain is counted: the first that got better

_mixed = jax.jit(at_strength)


@partial(jax.jit, static_argnames=("module", "in_turn"))
def _nats(module, tuned, below, strengths, tokens, targets, where, in_turn: bool) -> jax.Array:
    """Nats of each row at each strength, f32[K, B]; tokens, targets i32[B, T], where bool[B, T]."""
    members = 1 if in_turn else len(strengths)

    def of(strength):
        params = at_strength(tuned, below, strength)
        hidden = module.apply({"params": params}, tokens, method="hidden")
        project = partial(head_logits, spec=module.spec)
        return token_nats(project, head_leaf(params), hidden, targets, where, members=members).sum(1)

    return jax.lax.map(of, strengths) if in_turn else jax.vmap(of)(strengths)


class Tuning:
    """Both models of a source, with what lies between them.

    Attributes:
        models: both.
        below: the base's arrays of all that is no LoRA, see `off_the_scale`.
    """

    def __init__(self, models: Pair):
        """Look for what tuning changed.

        Raises:
            UserError: it has no strength.
        """
        self.models, self.below = models, off_the_scale(models.base, models.tuned)

    def at(self, strength: float) -> System:
        """The model at a strength, ready to decode."""
        module, tuned = self.models.module, self.models.tuned
        # Compiled, a mixture is made in one pass; a scale is a product of a few numbers, and copies no weight.
        mixed = _mixed if self.below else at_strength
        params = prepare(module, mixed(tuned, self.below, jnp.float32(strength)))
        return System(f"scale {strength:g}", module, params, key_of(self.models.identity, "strength", strength))

    def nats(
        self, rows: Sequence[Row], strengths: Sequence[float], kept: Kept, done: Callable[[int], None]
    ) -> np.ndarray:
        """The nats of each row's trained tokens at each strength, f64[N, K]."""
        module, at = self.models.module, jnp.array(strengths, jnp.float32)

        def nats(batch):
            width = min(bucket(max(len(rows[i].tokens) - 1 for i in batch)), module.spec.positions)
            size = 1 << (len(batch) - 1).bit_length()
            tokens, targets = np.zeros((2, size, width), np.int32)
            where = np.zeros((size, width), bool)
            for k, i in enumerate(batch):
                row, n = rows[i], len(rows[i].tokens) - 1
                tokens[k, :n], targets[k, :n], where[k, :n] = row.tokens[:-1], row.tokens[1:], row.mask[1:]
            found = _nats(module, self.models.tuned, self.below, at, tokens, targets, where, in_turn=bool(self.below))
            return np.asarray(found, np.float64).T[: len(batch)].tolist()

        keys = [key_of("strengths", self.models.identity, list(strengths), row.tokens, row.mask) for row in rows]
        batches = batches_by_length([len(row.tokens) for row in rows], most_tokens() // 4)
        return np.array(in_batches(kept, keys, batches, nats, done)).reshape(len(rows), len(strengths))

    def losses(
        self, rows: Sequence[Row], strengths: Sequence[float], kept: Kept, done: Callable[[int], None]
    ) -> np.ndarray:
        """Nats as of `nats`, f64[N, K]; of many rows, values with their mean.

        Args:
            rows: all of them.
            strengths: among them `ENDS`.
            kept: results stored by an earlier, interrupted run.
            done: called with the number of rows that were read.
        """
        sample = sample_of(rows)
        measured = self.nats([rows[i] for i in sample], strengths, kept, done)
        if len(sample) == len(rows):
            return measured
        rest = np.setdiff1d(np.arange(len(rows)), sample)
        known = np.zeros((len(rows), 3))
        known[sample, :2] = measured[:, [strengths.index(s) for s in ENDS]]
        others = [rows[i] for i in rest]
        for k, end in enumerate(ENDS):
            known[rest, k] = losses(self.at(end), others, kept)
        done(len(rest))
        known[:, 2] = [sum(row.mask) for row in rows]
        return statistics.spread_out(known, sample, measured)


def sample_of(rows: Sequence[Row]) -> np.ndarray:
    """Indices of the rows that are read at every strength, drawn by a hash of their content."""
    if len(rows) <= SAMPLE:
        return np.arange(len(rows))
    order = sorted(range(len(rows)), key=lambda i: key_of("sample", rows[i].tokens))
    return np.sort(order[:SAMPLE])


def sampled(*parts: Sequence[Row]) -> list[str]:
    """A sentence where there are more rows than are read at every strength."""
    if all(len(rows) <= SAMPLE for rows in parts):
        return []
    return [
        f"At other scales than 0 and 1 a sample of {SAMPLE} rows is read; what the others have there is predicted from "
        "what they have at those two."
    ]


class Scores:
    """Scores of the task's answers, measured at a strength when they are first asked for.

    Attributes:
        name, column: of the metric that the gain is counted by; None: there are no answers, or none got better.
        found: strength -> a value of each row that has one, [N], or values with their mean, as of `Tuning.losses`.
        measured: strength -> of how many rows.
    """

    def __init__(self, tuning: Tuning, task: Answers, asked: Sequence[str] | None, kept: Kept, progress: Progress):
        """Measure both ends.

        Args:
            tuning: both models.
            task: its rows, and what to measure of their answers.
            asked: the metric that was named, none for the loss; None: the first of `FIRST` that got better counts.
            kept: results stored by an earlier, interrupted run.
            progress: see `evaluation.Progress`.
        """
        self.tuning, self.task, self.kept, self.progress = tuning, task, kept, progress
        self.name: str | None = None
        self.column: Column | None = None
        self.found: dict[float, np.ndarray] = {}
        self.measured: dict[float, int] = {}
        if asked == [] or not (task.request.metrics or task.request.labels):
            return
        before, after = (self._columns(strength, range(len(task.rows))) for strength in ENDS)
        own = [name for name in after if name not in METRICS]  # the user's, and those of labels
        for name in dict.fromkeys(asked or (*own, *FIRST, *after)):
            if name not in before or name not in after or after[name].better <= 0:
                continue
            if after[name].values["tuned"].ndim > 1 and name != "accuracy":
                continue
            self.at = np.intersect1d(before[name].at, after[name].at)
            ends = [_values(column, self.at) for column in (before[name], after[name])]
            if asked or _grew(*ends):
                self.name, self.column = name, after[name]
                self.found = dict(zip(ENDS, ends, strict=True))
                self.measured = dict.fromkeys(ENDS, len(self.at))
                return

    def _columns(self, strength: float, index: Sequence[int]) -> dict[str, Column]:
        """What some rows' answers are worth at a strength."""
        rows, request = [self.task.rows[i] for i in index], self.task.request
        system = self.tuning.at(strength)
        found = measure_answers(system, rows, self.task.tokenizer, request, self.kept, self.progress)
        return answer_columns(rows, {"tuned": found}, request)

    def at_strength(self, strength: float) -> np.ndarray:
        """The scores at a strength."""
        if strength not in self.found:
            rows = self.at[sample_of([self.task.rows[i] for i in self.at])]
            if self.task.request.labels:  # which are chosen among those of all rows
                rows = np.arange(len(self.task.rows))
            column = self._columns(strength, rows).get(self.name)
            if column is None:
                raise UserError(f"--frontier: {self.name} applies to no answer at scale {strength:g}.")
            got = dict(zip(rows[column.at].tolist(), _right(column), strict=True))
            sample = np.array([n for n, i in enumerate(self.at.tolist()) if i in got])
            known = np.stack([*(self.found[s] for s in ENDS), np.ones(len(self.at))], 1)
            values = np.array([[got[i]] for i in self.at[sample].tolist()])
            self.found[strength] = statistics.spread_out(known, sample, values)[:, 0]
            self.measured[strength] = len(sample)
        return self.found[strength]


def _right(column: Column) -> np.ndarray:
    """The value of each row; of labels, whether the likeliest is the expected one."""
    values = column.values["tuned"]
    return values if values.ndim == 1 else (values[:, 0] == values[:, 1]).astype(float)


def _values(column: Column, at: np.ndarray) -> np.ndarray:
    """The values of the rows `at`, all of which the column has."""
    return _right(column)[np.searchsorted(column.at, at)]


def _grew(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether a score is better for certain."""
    found = statistics.interval(after - before) if len(before) >= statistics.FEWEST else None
    return found is not None and found.low > 0
