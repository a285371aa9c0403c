"""Why a loss is not finite, where it is not the learning rate: asked once it is, and before anything is advised."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.run.training import Job
from jaxtune.tree import PyTree, flatten


def cause_of(job: Job) -> Callable[[int], str | None]:
    """Return a function: step whose loss is not finite -> the cause in a sentence or two; None: training itself.

    The base's own weights are looked at, then its own loss on the rows of the step, before any update.
    """

    def cause(number: int) -> str | None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no memory for it: what is known is said all the same
            return found(number)

    def found(number: int) -> str | None:
        experiment = job.experiment
        base = f"The base {experiment.base.path} itself"
        first = (
            "No update was made before it, so the rate is not the cause: look at these rows" if number == 1 else None
        )
        if first and experiment.module.dtype != jnp.float32:
            first += ", or use model.dtype=float32"
        first = first and f"{first}."
        if damage := not_finite(job.frozen):
            return f"{base} is damaged: {damage}. Use another copy of it."
        if job.stacked and number > 1:
            return None  # the members' own rates are what differs
        with warnings.catch_warnings(action="ignore"):  # it was read, and warned of, before
            params = experiment.base.load(experiment.recipe)
        if damage := not_finite(params):
            return f"{base} is damaged: {damage}. Use another copy of it."
        if job.stacked:
            return first
        start = experiment.recipe.start(params).state
        batch = job.put(job.batch_at(number - 1), [0])
        total, weight, _ = job.eval_step(start.trainable, start.member, job.frozen, batch)
        if not np.isfinite(total / weight):
            return f"{base} gives no finite loss on these rows, before any update: leave them out, or use another base."
        return first

    return cause


def not_finite(tree: PyTree) -> str | None:
    """The first array of a tree that holds a number that is not finite, with how many; None: there is none."""
    for path, leaf in flatten(tree).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and (count := int(_count(leaf))):
            several = "numbers that are" if count > 1 else "number that is"
            return f"{path.removesuffix('/w')} holds {count:,} {several} not finite"
    return None


@jax.jit
def _count(array: jax.Array) -> Any:
    return jnp.sum(~jnp.isfinite(array))
