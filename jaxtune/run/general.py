"""Text outside the tuning data, whose loss a run logs at every evaluation: so one sees when it was lost."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxtune import data, tree
from jaxtune.curate.overlap import unshared
from jaxtune.data.batches import GRAIN
from jaxtune.objectives.causal_lm import causal_lm_task
from jaxtune.train import loop
from jaxtune.train.parallel import shard_batch

NAME = "eval/general_loss"


def read(experiment: Any, tokenizer: Any, train: Sequence[data.Rows]) -> tuple[data.Rows | None, list[str]]:
    """The rows that evaluate.general names, but for those that the training data holds too, and what became of them.

    They are read by their own columns, whatever the format of the training data; longer ones are split.

    Raises:
        UserError: they cannot be read, or most of them are training data.
    """
    named = experiment.evaluate.general
    if not named:
        return None, []
    rows, _, report = data.prepare(
        tokenizer,
        named,
        max_length=experiment.recipe.batch.length - len(experiment.prefix),
        overlength="split",
        vocab_size=experiment.module.spec.vocab,
        cache=experiment.data.cache,
    )
    rows = data.Rows.concatenate(rows)
    kept, said = unshared(rows, data.Rows.concatenate(train), tokenizer, "evaluate.general")
    return rows.select(kept), [*report.lines(), *said]


def losses(job: Any) -> Callable[[Any], list[float]]:
    """Return state -> the loss a token on the general text, of each run in the state."""
    experiment, rows = job.experiment, job.rows
    packed = experiment.data.packing
    recipe = replace(experiment.recipe, task=causal_lm_task(job.module, packed=packed))
    _, step = recipe.programs(job.mesh, members=len(job.members) if job.stacked else None)
    batches = data.EvalBatches(
        rows.general.prefixed(rows.prefix),
        grain=GRAIN,
        batch_size=experiment.train.batch_size,
        grad_accum=experiment.train.grad_accum,
        max_length=rows.length,
        packing=packed,
        assembler=recipe.task.assembler,
    )
    frozen = tree.without_other(job.frozen)  # a companion has no part in it
    evaluate = loop.make_evaluate(step, frozen, batches, lambda batch: shard_batch(batch, job.mesh))
    return lambda state: [values["eval/loss"] for values in evaluate(state)]
