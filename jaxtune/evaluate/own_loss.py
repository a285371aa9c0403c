"""Evaluate tasks without their own evaluator on held-out rows: the task's loss and metrics, one row at a time."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune import data
from jaxtune.errors import UserError
from jaxtune.evaluate import evaluation, statistics
from jaxtune.evaluate.comparison import Column
from jaxtune.evaluate.evaluation import Options, Progress
from jaxtune.evaluate.kept import Kept, in_batches, key_of
from jaxtune.evaluate.known import KNOWN
from jaxtune.evaluate.rows import data_names, group_values, tokenised
from jaxtune.evaluate.systems import System, base_identity, identity, systems
from jaxtune.infer.generation import bucket
from jaxtune.infer.logprobs import batches_by_length, most_tokens
from jaxtune.infer.source import Tuned, open_source, tokenizer_of


class OfRow(NamedTuple):
    """The summed loss of a row, its weight, and the task's metrics on this row."""

    loss: float
    weight: float
    metrics: dict[str, float]


class OwnLoss:
    """The `jaxtune.evaluate.evaluation.Evaluator` of any task, for a run of it.

    A metric of all rows is the mean of those of the single rows, weighted as their losses are.
    """

    def __init__(self, source: Tuned, cfg: Any, options: Options):
        from jaxtune.config.recipe import experiment

        kind = f"objective.name={cfg.objective.name}"
        options.refuse(("format", "metrics", "schema", "scorer", "labels", "max_new_tokens"), f"a run of {kind}")
        self.source, self.dtype = source, evaluation.dtype_of(cfg)
        self.tokenizer = tokenizer_of(source)
        of_run = experiment(cfg, weights=False)
        self.task, self.name = of_run.task, cfg.objective.name
        _, sources, fraction = evaluation.sources(source, cfg, options)
        read_as = data.reading(of_run.data)
        read_as |= {} if options.columns is None else {"columns": options.columns}
        length = of_run.recipe.batch.length
        rows, self.lines = tokenised(
            self.tokenizer,
            sources,
            options.rows,
            eval_fraction=fraction,
            **read_as,
            labels=self.task.form,
            max_length=length - len(of_run.prefix),
            overlength=of_run.data.overlength,
            vocab_size=of_run.module.spec.vocab,
            cache=of_run.data.cache,
        )
        self.rows = rows.prefixed(of_run.prefix)
        self.assembler = self.task.assembler([self.rows], 1, 1, length, False)
        self.names = data_names(sources)
        self.groups = group_values(self.rows, self.names, options.group_by) if options.group_by else None
        self.tokens = int(self.rows.length.sum())
        self.base, self.notes = evaluation.base_to_compare(cfg, options)

    def systems(self) -> Iterator[System]:
        if self.source.adapter is None:
            yield from systems(self.source, base=self.base and not _drawn(self.source), dtype=self.dtype)
            return
        module, params, _ = open_source(self.source, dtype=self.dtype)
        if self.base and not module.new_head:
            yield from (s for s in systems(self.source, dtype=self.dtype) if s.name == "base")
        else:
            self.notes.append("The base has no head for this task, so there is nothing to compare with.")
        below = base_identity(self.source, self.dtype)
        yield System("tuned", module, params, key_of(below, identity(self.source.adapter)))

    def measure(self, system: System, kept: Kept, progress: Progress) -> list[OfRow]:
        loss_fn = self.task.loss(system.module, 1)
        run = jax.jit(jax.vmap(partial(loss_fn, key=None), in_axes=(None, 0)))

        def measured(batch):
            width = min(bucket(max(int(self.rows.longest[i]) for i in batch)), self.assembler.max_length)
            padded = [*batch, *[batch[-1]] * ((1 << (len(batch) - 1).bit_length()) - len(batch))]
            laid = [self.assembler.assemble([np.array([i])], width) for i in padded]
            arrays = jax.tree.map(lambda *leaves: np.concatenate(leaves), *laid)  # [rows, 1, ...]
            (loss, weight), aux = jax.device_get(run(system.params, arrays))
            return [self._of_row(loss[n], weight[n], jax.tree.map(lambda x, n=n: x[n], aux)) for n in range(len(batch))]

        keys = [
            key_of(self.name, system.identity, *(_listed(part) for side in self.rows.sides for part in side[i]))
            for i in range(len(self.rows))
        ]
        batches = batches_by_length(self.rows.longest.tolist(), most_tokens())
        found = in_batches(kept, keys, batches, measured, progress(f"{system.name}: loss", len(self.rows)))
        return [OfRow(*record) for record in found]

    def _of_row(self, loss: Any, weight: Any, aux: Any) -> OfRow:
        loss, weight = float(loss), float(weight)
        found = self.task.metrics(loss / weight, weight, aux) if weight else {}
        return OfRow(loss, weight, {name.removeprefix("eval/"): float(value) for name, value in found.items()})

    def columns(self, measured: Mapping[str, list[OfRow]]) -> dict[str, Column]:
        at = np.array([i for i, row in enumerate(next(iter(measured.values()))) if row.weight])
        if not len(at):
            raise UserError(f"No row of {', '.join(self.names)} has anything to compute a loss on.")
        names = next(iter(measured.values()))[at[0]].metrics

        def column(name, value):
            label, better, share = KNOWN.get(name, (name.replace("_", " "), 0, False))
            pairs = {who: np.array([(value(rows[i]), rows[i].weight) for i in at]) for who, rows in measured.items()}
            return Column(label, better, share, statistics.mean, pairs, at)

        losses = {"loss": column("loss", lambda row: row.loss)}
        return losses | {
            name: column(name, lambda row, name=name: row.metrics[name] * row.weight)
            for name in names
            if name not in ("tokens", "rows")
        }

    def records(self, measured: Mapping[str, list[OfRow]], found: Mapping[str, Column]) -> Iterable[dict[str, Any]]:
        for i in range(len(self.rows)):
            ids = self.rows[i][0].tolist()
            record = {"where": self.rows.where(i), "prompt": self.tokenizer.decode(ids), "expected": ""}
            if self.groups is not None:
                record["group"] = self.groups[i]
            for who, rows in measured.items():
                record[who] = {"loss": rows[i].loss / rows[i].weight if rows[i].weight else None} | rows[i].metrics
            yield record

    def confusion(self, measured: Mapping[str, list[OfRow]]) -> None:
        return None


def _listed(part: Any) -> list[Any]:
    return np.asarray(part).tolist()


def _drawn(source: Tuned) -> bool:
    """Whether the head of a whole model was new in its run, so that the base has none."""
    from jaxtune.hf.load import read_config, resolve

    return read_config(resolve(source.base)).get("architectures") != read_config(source.model).get("architectures")
