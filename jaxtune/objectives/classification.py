"""Labels for sequences and for tokens: losses as in transformers' classes, and the counts for metrics.

Losses and counts are sums, so that micro-batches, devices and evaluation batches add up to the same numbers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.models.classifier import PROBLEMS, TOKEN
from jaxtune.objectives import inputs
from jaxtune.objectives.packed import places
from jaxtune.weights.leaf import Array, row_keys

SINGLE, MULTI, REGRESSION = PROBLEMS


def classification(module: Any, class_weights: Sequence[float] | None = None) -> Callable[..., Any]:
    """Return `loss_fn(params, batch, key) -> ((sum, weight), counts)` for a `Classifier`.

    `batch` holds tokens, positions, segments (and types, of pairs of texts) i32[B, T] and row i32[B]; for a label each
    token also targets i32[B, T] and weights f32[B, T]; else label f32[B, n] (the label's id, n = 1; or 0 and 1 for each
    label; or the values) and weights f32[B]. With packing they are [R, T], and of sequences there is `place` i32[B].
    Entries of weight 0 are ignored. `key` None switches dropout off.

    For one label a row or a token, the sum is of cross-entropies in nats and the weight counts labels, each times its
    class's weight (as torch's CrossEntropyLoss). For several labels a row it is of binary cross-entropies, for values
    of squared errors, and the weight is the number of terms. `counts` are what `metrics` reads.

    Args:
        module: a `Classifier`.
        class_weights: one for each label; with several labels a row, it multiplies where the label is present (torch's
            pos_weight).
    """
    labels = module.labels
    scales = None if class_weights is None else jnp.asarray(class_weights, jnp.float32)
    entities = entity_tables(labels.names) if labels.kind == TOKEN else None

    def loss_fn(params, batch, key):
        keys = None if key is None else row_keys(key, batch["row"])
        given = inputs(batch), batch["positions"], batch["segments"]
        more = {"types": batch.get("types"), "places": places(batch)}
        logits = module.apply({"params": params}, *given, keys=keys, **more)
        weights = batch["weights"]
        if labels.problem == REGRESSION:
            errors = jnp.square(logits - batch["label"]) * weights[:, None]
            return (errors.sum(), weights.sum() * logits.shape[-1]), {"rows": weights.sum()}
        if labels.problem == MULTI:
            return _several(logits, batch["label"], weights, scales)
        targets = batch["targets"] if labels.kind == TOKEN else batch["label"][:, 0].astype(jnp.int32)
        counts = _confusion(jax.nn.one_hot(logits.argmax(-1), logits.shape[-1]), targets, weights)
        if entities is not None:
            counts["entities"] = entity_counts(entities, logits.argmax(-1), targets, weights)
        scaled = weights if scales is None else weights * scales[targets]
        nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return ((nats * scaled).sum(), scaled.sum()), counts

    return loss_fn


def _several(logits: Array, wanted: Array, weights: Array, scales: Array | None) -> Any:
    """Several labels a row, each a binary classification: logits, wanted [B, C], weights [B]."""
    positive = jax.nn.softplus(-logits) * wanted * (1.0 if scales is None else scales)
    nats = (positive + jax.nn.softplus(logits) * (1 - wanted)) * weights[:, None]
    predicted, true = (logits > 0) * weights[:, None], wanted * weights[:, None]
    right = (((logits > 0) == (wanted > 0.5)).all(-1) * weights).sum()
    hits = (predicted * wanted).sum(0)
    counts = {"hits": hits, "said": predicted.sum(0), "there": true.sum(0), "right": right, "rows": weights.sum()}
    return (nats.sum(), weights.sum() * logits.shape[-1]), counts


def _confusion(predicted: Array, targets: Array, weights: Array) -> dict[str, Array]:
    """For each label true positives, predictions and occurrences; predicted [..., C] one-hot, targets i32[...]."""
    axes = tuple(range(predicted.ndim - 1))
    predicted, true = predicted * weights[..., None], jax.nn.one_hot(targets, predicted.shape[-1]) * weights[..., None]
    hits = (predicted * true).sum(axes)
    return {
        "hits": hits,
        "said": predicted.sum(axes),
        "there": true.sum(axes),
        "right": hits.sum(),
        "rows": weights.sum(),
    }


def metrics(counts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The metrics of an evaluation, from counts summed over the rows.

    accuracy: the share of correct sequences or tokens (with several labels: correct in all of them). macro_f1: the mean
    over labels that occur or are predicted of F1 = 2 hits / (predictions + occurrences), as in scikit-learn. entity_f1,
    entity_precision, entity_recall: of whole entities, correct only with all tokens and the type correct, as conlleval
    counts (Tjong Kim Sang & De Meulder 2003).
    """
    values = {"eval/rows": int(counts["rows"])}
    if "hits" in counts:
        values["eval/accuracy"] = float(counts["right"] / max(counts["rows"], 1))
        both = counts["said"] + counts["there"]
        values["eval/macro_f1"] = float(np.mean(2 * counts["hits"][both > 0] / both[both > 0])) if both.any() else 0.0
    if "entities" in counts:
        right, predicted, true = map(float, counts["entities"])
        values["eval/entity_f1"] = 2 * right / max(predicted + true, 1)
        values["eval/entity_precision"], values["eval/entity_recall"] = right / max(predicted, 1), right / max(true, 1)
    return values


# ------------------------------------------------------------------------------------------------------- entities

OUT, BEGIN, INSIDE, END, SINGLE_TOKEN = range(5)
_PREFIXES = {"B": BEGIN, "I": INSIDE, "E": END, "L": END, "S": SINGLE_TOKEN, "U": SINGLE_TOKEN}


def entity_tables(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """(prefix, type) i32[C] of labels such as B-person, I-person and O; None if labels are not such tags."""
    found = [re.fullmatch(r"([BIELSU])-(.+)", name) for name in names]
    if not any(found) or any(m is None and name != "O" for m, name in zip(found, names)):
        return None
    types = {t: i for i, t in enumerate(sorted({m[2] for m in found if m}))}
    prefix = np.array([_PREFIXES[m[1]] if m else OUT for m in found], np.int32)
    return prefix, np.array([types[m[2]] if m else -1 for m in found], np.int32)


def entity_counts(tables: tuple[np.ndarray, np.ndarray], predicted: Array, true: Array, weights: Array) -> Array:
    """(correct, predicted, true) entities f32[3] of tags predicted, true i32[B, T], where weights f32[B, T] > 0."""
    counted = weights > 0
    # Tags are on the first token of each word: moved to the front, followed by O, they are the tags of the words.
    order = jnp.argsort(~counted, axis=1, stable=True)
    counted = jnp.take_along_axis(counted, order, axis=1)

    def spans(tags):
        tags = jnp.take_along_axis(tags, order, axis=1)
        prefix = jnp.where(counted, jnp.asarray(tables[0])[tags], OUT)
        kind = jnp.where(counted, jnp.asarray(tables[1])[tags], -1)
        before, after = (
            (jnp.roll(prefix, by, 1).at[:, edge].set(OUT), jnp.roll(kind, by, 1).at[:, edge].set(-1))
            for by, edge in ((1, 0), (-1, -1))
        )
        inside = prefix != OUT
        own = (prefix == BEGIN) | (prefix == SINGLE_TOKEN)
        follows = (before[0] == BEGIN) | (before[0] == INSIDE)
        starts = inside & (own | ~follows | (before[1] != kind))
        goes_on = (after[0] == INSIDE) | (after[0] == END)
        ends = inside & ((prefix == END) | (prefix == SINGLE_TOKEN) | ~goes_on | (after[1] != kind))
        at = jnp.where(ends, jnp.arange(tags.shape[1]), tags.shape[1])
        return starts, kind, jax.lax.cummin(at, axis=1, reverse=True)

    (a, kind_a, end_a), (b, kind_b, end_b) = spans(predicted), spans(true)
    right = a & b & (kind_a == kind_b) & (end_a == end_b)
    return jnp.stack([x.sum() for x in (right, a, b)]).astype(jnp.float32)
