"""What a run's answers are compared with, where its task asks for it: the model as the run begins."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxtune import tree
from jaxtune.errors import UserError
from jaxtune.files import cache_root
from jaxtune.run.experiment import Experiment
from jaxtune.train.features import GIB, Store
from jaxtune.train.recipe import Start, in_dtype
from jaxtune.train.reference import Reference
from jaxtune.weights.leaf import Adapter, is_weight


def check(experiment: Experiment) -> None:
    """Raise UserError where objective.reference=live has no base to compute from."""
    if experiment.task.reference != "live":
        return
    why = None
    if experiment.recipe.goes_on:
        why = "model.adapter is trained on, and the base under it is not what the run begins with"
    elif experiment.prefix:
        why = "its virtual tokens stand in every row"
    elif trained := _beside_adapters(experiment.recipe.abstract.mask):
        why = f"tune.method={experiment.method} trains {trained} itself, so that the base is not kept"
    if why:
        raise UserError(f"objective.reference=live: {why}; leave it at precomputed.")


def _beside_adapters(mask: Any) -> str | None:
    """The path of a parameter that is trained and no adapter's."""
    found = jax.tree.leaves_with_path(mask, is_leaf=is_weight)
    return next(
        (
            "/".join(str(getattr(key, "key", key)) for key in path)
            for path, leaf in found
            if not isinstance(leaf, Adapter) and any(role is tree.TRAIN for role in jax.tree.leaves(leaf))
        ),
        None,
    )


def plan(experiment: Experiment, base: Any, start: Start, sets: Sequence[Any], mesh: Any) -> Reference | None:
    """What computes the reference's log-probabilities before the first step, or finds them; None: none are asked for.

    Args:
        experiment: the run.
        base: as it was loaded.
        start: the run before its first step: the reference where it goes on with an adapter.
        sets: the rows, see `Data.sets`.
        mesh: of the devices that compute them.

    Raises:
        UserError: they cannot be kept.
    """
    if experiment.task.reference != "precomputed":
        return None
    module = experiment.module
    params = (
        tree.combine(start.state.trainable, start.state.member, start.frozen) if experiment.recipe.goes_on else base
    )
    if tree.FROZEN in jax.tree.leaves(start.mask):  # as the policy has what it does not train
        params = in_dtype(params, module.dtype)
    store = Store(int(experiment.train.cache_gib * GIB), cache_root() / "reference")
    found = Reference(module, params, store, mesh)
    if why := store.why_not({found.key(part): found.layout(part).nbytes for part in sets}):
        raise UserError(f"The reference's log-probabilities cannot be kept: {why}.")
    return found
