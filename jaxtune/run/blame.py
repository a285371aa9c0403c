"""Find why a loss is not finite, if the learning rate is not the cause, before advice is printed."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.run.training import Job
from jaxtune.tree import PyTree, flatten, without_other


def cause_of(job: Job) -> Callable[[int], str | None]:
    """Return a function: step whose loss is not finite -> the cause in a sentence or two; None: training diverged.

    It checks the base's weights, then the base's loss on the rows of the step, before any update.
    """

    def cause(number: int) -> str | None:
        with contextlib.suppress(
            jax.errors.JaxRuntimeError
        ):  # if there is no memory for the check, the plain message is printed
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
        if damage := not_finite(without_other(job.frozen)):
            return f"{base} is damaged: {damage}. Use another copy of it."
        if job.stacked and number > 1:
            return None  # members differ in their rates
        with warnings.catch_warnings(action="ignore"):  # loading has warned of it before
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
    """The first array of a tree with numbers that are not finite, and how many; None: there is none."""
    for path, leaf in flatten(tree).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and (count := int(_count(leaf))):
            several = "numbers that are" if count > 1 else "number that is"
            return f"{path.removesuffix('/w')} holds {count:,} {several} not finite"
    return None


@jax.jit
def _count(array: jax.Array) -> Any:
    return jnp.sum(~jnp.isfinite(array))
