"""Cross-encoders: a score of a query and a document that are read together, by a head of one label.

binary      -y log sigmoid(s) - (1 - y) log(1 - sigmoid(s)), of each document (arXiv:1901.04085, section 3)
pairwise    log(1 + exp(s_j - s_i)) of all y_i > y_j of a query: RankNet (Burges et al. 2005, eq. 3)
listwise    -sum softmax(y) log softmax(s) over a query's documents: ListNet (Cao et al. 2007, eq. 4)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.data.labels import JOINED
from jaxtune.data.reranking import RankAssembler, RankForm
from jaxtune.models.classifier import PROBLEMS, SEQUENCE, Labels, read_labels
from jaxtune.objectives import inputs
from jaxtune.objectives.contrasts import Contrast
from jaxtune.objectives.labels import put_head
from jaxtune.objectives.packed import places
from jaxtune.objectives.preference import means
from jaxtune.objectives.reward import SCORE
from jaxtune.objectives.task import BatchShape, Task, TaskInput
from jaxtune.weights.leaf import Array, row_keys

FAR = -1e30


def binary(scores: Array, label: Array, there: Array) -> Array:
    """The mean cross-entropy over the documents of each query, f32[B]."""
    each = jax.nn.softplus(scores) - label * scores
    return (each * there).sum(-1) / jnp.maximum(there.sum(-1), 1)


def pairwise(scores: Array, label: Array, there: Array) -> Array:
    """The mean over pairs of documents of unlike labels, f32[B]; 0 where there are none."""
    better = (label[:, :, None] > label[:, None]) * there[:, :, None] * there[:, None]
    each = jax.nn.softplus(scores[:, None] - scores[:, :, None])
    return (each * better).sum((1, 2)) / jnp.maximum(better.sum((1, 2)), 1)


def listwise(scores: Array, label: Array, there: Array) -> Array:
    """The cross-entropy of both distributions over the documents of each query, f32[B]."""
    wanted = jax.nn.softmax(jnp.where(there > 0, label, FAR), axis=-1)
    found = jax.nn.log_softmax(jnp.where(there > 0, scores, FAR), axis=-1)
    return -jnp.where(there > 0, wanted * found, 0.0).sum(-1)


RANKINGS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "binary": binary,
    "pairwise": pairwise,
    "listwise": listwise,
}


def reranking(module: Any, loss: Callable[[Array, Array, Array], Array]) -> Callable[..., Any]:
    """Return `loss_fn(params, batch, key) -> ((sum, weight), {"means"})` for a `Classifier` of one label.

    `batch` is that of `data.reranking.RankAssembler`. The sum is over queries (of binary: over documents), the weight
    their number. Counted is how often the best document has the highest score, where a row has several.
    """
    per_document = loss is binary

    def loss_fn(params, batch, key):
        rows, pairs = batch["there"].shape

        def flat(x):
            return x.reshape(-1, x.shape[-1])

        number = (pairs * batch["row"][:, None] + jnp.arange(pairs)).reshape(-1)
        keys = None if key is None else row_keys(key, number)
        given = {name: flat(batch[name]) for name in ("positions", "segments", "types")}
        scores = module.apply({"params": params}, flat(inputs(batch)), **given, keys=keys, places=places(batch))
        scores = scores.reshape(rows, pairs)
        there, label = batch["there"], batch["label"][:, :pairs]
        weights = batch["weights"] * (there.sum(-1) if per_document else 1.0)
        top = jnp.where(there > 0, scores, FAR).argmax(-1)
        best = jnp.where(there > 0, label, FAR).max(-1)
        several = batch["weights"] * (there.sum(-1) > 1)
        right = jnp.take_along_axis(label, top[:, None], 1)[:, 0] >= best
        counted = {"accuracy": ((several * right).sum(), several.sum())}
        total = (weights * loss(scores, label, there)).sum()
        return (total, weights.sum()), {"means": jax.lax.stop_gradient(counted)}

    return loss_fn


def open_task(given: TaskInput) -> tuple[Any, Task]:
    """Put a head of one label on a model; one that has such a head goes on with it."""
    stored = read_labels(given.config)
    kept = stored is not None and stored.kind == SEQUENCE and len(stored.names) == 1
    labels = stored if kept else Labels(SEQUENCE, (SCORE,), PROBLEMS[2], drawn=True)
    module = put_head(given, labels)
    name, length = given.objective["ranking"], given.length(module)
    data = given.data
    form = RankForm(
        name,
        Contrast(),
        columns=dict(data["columns"]),
        cut=length if data["overlength"] == "truncate" else None,
        ignore=tuple(data["ignore"] or ()),
        joined=None if module.is_encoder else JOINED,
    )
    return module, Task(
        loss=lambda module, members: reranking(module, RANKINGS[name]),
        batch_like=batch_like,
        metrics=means,
        assembler=RankAssembler,
        form=form,
        features=False,
    )


def batch_like(shape: BatchShape) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The abstract batch of rows of two documents."""
    rows = (shape.micros, shape.rows)
    tokens = jax.ShapeDtypeStruct((*rows, 2, shape.length), jnp.int32)
    number = jax.ShapeDtypeStruct((*rows, 2), jnp.float32)
    batch = dict.fromkeys(("tokens", "positions", "segments", "types"), tokens)
    batch |= {"there": number, "label": number, "same": jax.ShapeDtypeStruct((*rows, 2), jnp.int32)}
    return batch | {
        "weights": jax.ShapeDtypeStruct(rows, jnp.float32),
        "row": jax.ShapeDtypeStruct(rows, jnp.int32),
    }
