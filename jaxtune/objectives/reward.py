"""Reward models: a text's score, learnt from pairs of a better and a worse answer (Bradley & Terry 1952; Ouyang et al.
2022, arXiv:2203.02155, eq. 1).

    loss = -log sigmoid(r_chosen - r_rejected - margin) + centering * (r_chosen + r_rejected)^2

The margin is the pair's own (Touvron et al. 2023, arXiv:2307.09288, eq. 2), 0 where the data has none. The second term
keeps scores around 0, which the first leaves open (Eisenstein et al. 2023, arXiv:2312.09244, eq. 4).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.data.pairs import PairAssembler
from jaxtune.data.preferences import PairForm
from jaxtune.models.classifier import PROBLEMS, SEQUENCE, Labels, read_labels
from jaxtune.objectives import inputs
from jaxtune.objectives.labels import put_head
from jaxtune.objectives.preference import means, of_pairs, pairs_like, weighted
from jaxtune.objectives.task import Task, TaskInput
from jaxtune.weights.leaf import row_keys

SCORE = "score"  # what the one label is called where the model has no name for it


def reward(module: Any, centering: float = 0.0) -> Callable[..., Any]:
    """Return `loss_fn(params, batch, key) -> ((sum, weight), {"means"})` for a `Classifier` of one label.

    `batch` is that of `data.PairAssembler`, a pair a row. The sum is over pairs, and the weight their number; the means
    are those of `preference`, of scores in place of implicit rewards.

    Args:
        module: the model.
        centering: weight of the squared sum of both scores.
    """

    def loss_fn(params, batch, key):
        weights = batch["weights"]
        given = {name: _texts(batch[name]) for name in ("positions", "segments")}
        keys = None if key is None else row_keys(key, jnp.repeat(batch["row"], 2))
        scores = module.apply({"params": params}, _texts(inputs(batch)), **given, keys=keys).reshape(-1, 2)
        apart = scores[:, 0] - scores[:, 1]
        each = jax.nn.softplus(batch["margin"] - apart) + centering * jnp.square(scores.sum(-1))
        return weighted(each, weights, of_pairs(apart, scores))

    return loss_fn


def _texts(pairs: jax.Array) -> jax.Array:
    """[B, 2, ...] -> [2B, ...]: the two texts of each pair as rows."""
    return pairs.reshape(-1, *pairs.shape[2:])


def open_task(given: TaskInput) -> tuple[Any, Task]:
    """Put a head of one label on a model.

    A model that has one, of regression, goes on with it.
    """
    stored = read_labels(given.config)
    kept = stored is not None and (stored.kind, stored.problem, len(stored.names)) == (SEQUENCE, PROBLEMS[2], 1)
    labels = stored if kept else Labels(SEQUENCE, (SCORE,), PROBLEMS[2], drawn=True)
    module = put_head(given, labels, ends=True)
    return module, Task(
        loss=lambda module, members: reward(module, given.objective["centering"]),
        batch_like=functools.partial(pairs_like, PairAssembler, False),
        metrics=means,
        assembler=PairAssembler,
        form=PairForm.of(given.data, margins=True),
    )
