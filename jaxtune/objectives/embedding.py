"""Embeddings: a vector of each text, learnt by comparing texts of a batch with one another. The losses, and the task.

    text -> hidden states [T, D] -- pooling -- [D] (-- dense layers) (-- divided by its length)      `Pooled`
    a row      = S texts, and what is known of them                                                `Vectors`

All are f32[] over the whole batch of a step, whatever the micro-batches and devices it lies on (`OverVectors`).
cos(a, b) is the cosine; t the temperature; N the rows.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune import models
from jaxtune.data.embeddings import TextsAssembler, TextsForm
from jaxtune.errors import UserError
from jaxtune.hf.vectors import Dense, Pooled, read_dense, read_pooled
from jaxtune.methods.places import DENSE
from jaxtune.models.classifier import Places, affine, pool, seeing
from jaxtune.models.decoder import Decoder
from jaxtune.objectives import OverVectors, inputs
from jaxtune.objectives.contrasts import CLASS, CONTRASTS, NOTHING, SCORES
from jaxtune.objectives.packed import places
from jaxtune.objectives.task import OBJECTIVE, BatchShape, Task, TaskInput
from jaxtune.weights.leaf import Array, row_keys

ACTIVATIONS = {  # of dense layers, as torch computes them
    **{"identity": lambda x: x, "tanh": jnp.tanh, "relu": jax.nn.relu, "silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid},
    "gelu": partial(jax.nn.gelu, approximate=False),
}
FAR = -1e30  # the logit of what is no candidate


class Vectors(NamedTuple):
    """The texts of a batch.

    Attributes:
        texts: f32[N, S, D].
        there: f32[N, S], 0 for texts that a row lacks.
        label: f32[N, L], what is known of each row; see `contrasts`.
        weights: f32[N], 0 for rows that are missing.
        same: i32[N, S], a hash of each text: texts of one hash are no negatives of each other.
    """

    texts: Array
    there: Array
    label: Array
    weights: Array
    same: Array


@dataclasses.dataclass(frozen=True)
class Told:
    """The numbers that losses are told; each may be an array.

    Attributes:
        temperature: t.
        margin: how far apart unlike texts are wanted.
    """

    temperature: float | Array = 0.05
    margin: float | Array = 0.0


def unit(x: Array) -> Array:
    """Vectors divided by their lengths; the zero vector stays, with a gradient of 0."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def cosines(a: Array, b: Array) -> Array:
    """cos of each vector of a with the one of b at its place."""
    return (unit(a) * unit(b)).sum(-1)


def infonce(v: Vectors, told: Told, symmetric: bool = False) -> Array:
    """InfoNCE with in-batch negatives (van den Oord et al. 2018, arXiv:1807.03748, eq. 4; Henderson et al. 2017,
    arXiv:1705.00652, eq. 4): -log exp(cos(q_i, d_i) / t) / sum_j exp(cos(q_i, d_j) / t), over all other positives and
    all hard negatives of the batch, but for those that belong to it as well: texts that are its own positive, or that
    of a row with the same query. Symmetric: and of q_i among all q_j for d_i, the mean of both (Gunther et al. 2023,
    arXiv:2310.19923, section 4.2).
    """
    queries, documents = unit(v.texts[:, 0]), unit(v.texts[:, 1:])
    n, s = documents.shape[:2]
    flat = documents.swapaxes(0, 1).reshape(s * n, -1)  # all positives first
    at = jnp.arange(n)
    there = ((v.there[:, 1:] * v.weights[:, None]) > 0).T.reshape(-1)
    asked = v.same[:, 0] == v.same[:, 0][:, None]  # [row, other row]: the same query
    alike = v.same[:, 1:].T.reshape(-1) == v.same[:, 1][:, None]
    alike |= jnp.pad(asked, ((0, 0), (0, (s - 1) * n)))
    open_ = (there & ~alike) | (at[:, None] == jnp.arange(s * n))
    every = jnp.einsum("nd,md->nm", queries, flat, precision=jax.lax.Precision.HIGHEST) / told.temperature
    own = every[at, at]
    loss = jax.nn.logsumexp(jnp.where(open_, every, FAR), axis=1) - own
    if symmetric:
        other = ~alike[:, :n] & (v.weights > 0)
        back = jnp.where(other | jnp.eye(n, dtype=bool), every[:, :n].T, FAR)
        loss = 0.5 * (loss + jax.nn.logsumexp(back, axis=1) - own)
    return mean(loss, v.weights)


def mean(each: Array, weights: Array) -> Array:
    """The mean of losses f32[N] over the rows that are there."""
    return (each * weights).sum() / jnp.maximum(weights.sum(), 1)


def _ranked(scores: Array, label: Array, weights: Array) -> Array:
    """log(1 + sum over y_i > y_j of exp(s_j - s_i)), which CoSENT and AnglE share."""
    apart = scores[:, None] - scores[None, :]  # s_j - s_i at [j, i]
    wrong = (label[:, None] < label[None, :]) & (weights[:, None] * weights[None, :] > 0)
    return jax.nn.logsumexp(jnp.append(jnp.where(wrong, apart, FAR).reshape(-1), 0.0))


def cosent(v: Vectors, told: Told) -> Array:
    """log(1 + sum over y_i > y_j of exp((cos_j - cos_i) / t)) (Su 2022, CoSENT, kexue.fm/archives/8847; Huang et al.
    2024, doi:10.1109/TASLP.2024.3402087, eq. 6).
    """
    return _ranked(cosines(v.texts[:, 0], v.texts[:, 1]) / told.temperature, v.label[:, 0], v.weights)


def angle(v: Vectors, told: Told) -> Array:
    """CoSENT of the difference of angles in complex space, a vector's halves being real and imaginary parts (Li & Li
    2023, AnglE, arXiv:2309.12871, eq. 4 to 7).
    """
    (a, b), (c, d) = (jnp.split(unit(v.texts[:, i]), 2, axis=-1) for i in range(2))
    both = (a * c + b * d + b * c - a * d).sum(-1)
    return _ranked(jnp.abs(both) / told.temperature, v.label[:, 0], v.weights)


def cosine_mse(v: Vectors, told: Told) -> Array:
    """(cos(a, b) - y)^2 (Reimers & Gurevych 2019, Sentence-BERT, arXiv:1908.10084, section 3)."""
    return mean(jnp.square(cosines(v.texts[:, 0], v.texts[:, 1]) - v.label[:, 0]), v.weights)


def _distance(a: Array, b: Array) -> Array:
    square = jnp.square(a - b).sum(-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def triplet(v: Vectors, told: Told) -> Array:
    """max(0, |a - p| - |a - n| + margin) (Schroff et al. 2015, arXiv:1503.03832, eq. 3, of distances)."""
    a, p, n = (v.texts[:, i] for i in range(3))
    return mean(jax.nn.relu(_distance(a, p) - _distance(a, n) + told.margin), v.weights)


def contrastive(v: Vectors, told: Told) -> Array:
    """(y d^2 + (1 - y) max(0, margin - d)^2) / 2, d = 1 - cos (Hadsell et al. 2006, doi:10.1109/CVPR.2006.100,
    eq. 4).
    """
    d, y = 1 - cosines(v.texts[:, 0], v.texts[:, 1]), v.label[:, 0]
    return mean(0.5 * (y * jnp.square(d) + (1 - y) * jnp.square(jax.nn.relu(told.margin - d))), v.weights)


def batch_hard(v: Vectors, told: Told) -> Array:
    """Triplets of each text with the farthest of its class and the nearest of another (Hermans et al. 2017,
    arXiv:1703.07737, eq. 5).
    """
    x, there = v.texts[:, 0], v.weights > 0
    dots = jnp.einsum("nd,md->nm", x, x, precision=jax.lax.Precision.HIGHEST)
    length = jnp.diagonal(dots)
    square = jnp.maximum(length[None] - 2 * dots + length[:, None], 0.0)
    far = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    alike = (v.label[:, None] == v.label[None]).all(-1)
    both = there[:, None] & there[None]
    farthest = jnp.where(alike & both & ~jnp.eye(len(x), dtype=bool), far, 0.0).max(1)
    most = jnp.where(both, far, 0.0).max(1, keepdims=True)
    nearest = jnp.where(both, far + jnp.where(alike, most, 0.0), jnp.inf).min(1)
    nearest = jnp.where(there, nearest, 0.0)
    return mean(jax.nn.relu(farthest - nearest + told.margin), v.weights)


def _scores(v: Vectors) -> Array:
    """Dot products of the first text with all others, f32[N, S - 1]."""
    return (v.texts[:, :1] * v.texts[:, 1:]).sum(-1)


def margin_mse(v: Vectors, told: Told) -> Array:
    """((s_p - s_n) - (z_p - z_n))^2, s dot products and z a teacher's scores, or their differences (Hofstätter et al.
    2020, arXiv:2010.02666, eq. 3).
    """
    scores = _scores(v)
    label = v.label[:, : scores.shape[1]]  # as wide as the longest list of all rows
    wanted = label if label.shape[1] < scores.shape[1] else label[:, :1] - label[:, 1:]
    apart = jnp.square(scores[:, :1] - scores[:, 1:] - wanted)
    weights = v.there[:, 2:] * v.weights[:, None]
    return (apart * weights).sum() / jnp.maximum(weights.sum(), 1)


def kl(v: Vectors, told: Told) -> Array:
    """t^2 KL(softmax(z / t) || softmax(s / t)) of a teacher's scores z and dot products s (Hinton et al. 2015,
    arXiv:1503.02531, section 2; Lin et al. 2021, doi:10.18653/v1/2021.repl4nlp-1.17).
    """
    there = v.there[:, 1:] > 0
    ours, theirs = (
        jax.nn.log_softmax(jnp.where(there, x / told.temperature, FAR), axis=-1)
        for x in (_scores(v), v.label[:, : there.shape[1]])
    )
    each = jnp.where(there, jnp.exp(theirs) * (theirs - ours), 0.0).sum(-1)
    return mean(each, v.weights) * told.temperature**2


LOSSES: dict[str, Callable[[Vectors, Told], Array]] = {
    "infonce": infonce,
    "cosent": cosent,
    "angle": angle,
    "cosine_mse": cosine_mse,
    "triplet": triplet,
    "contrastive": contrastive,
    "batch_hard": batch_hard,
    "margin_mse": margin_mse,
    "kl": kl,
}


def matryoshka(loss: Callable[..., Array], widths: Sequence[int]) -> Callable[..., Array]:
    """The sum of a loss over the first channels of vectors, for each width, divided by their lengths (Kusupati et al.
    2022, arXiv:2205.13147, eq. 1, with weights of 1).
    """

    def summed(v: Vectors, told: Told) -> Array:
        return sum(loss(v._replace(texts=unit(v.texts[..., :width])), told) for width in widths)

    return summed


KL_TEMPERATURE = 0.3  # of vectors as distributions


def adaptive(loss: Callable[..., Array]) -> Callable[..., Array]:
    """The loss of a model's vectors and the mean loss of those that its lower layers give, f32[N, S, L, D], the last
    layer's last; and t KL(softmax(v_L / t) || softmax(v_l / t)) of each lower one from the last, which gets no gradient
    of it (Li et al. 2024, 2D Matryoshka, arXiv:2402.14776, eq. 4 to 7, with weights of 1 and all layers in each step).
    """

    def summed(v: Vectors, told: Told) -> Array:
        last, lower = v.texts[..., -1, :], jnp.moveaxis(v.texts[..., :-1, :], 2, 0)
        each = jax.vmap(lambda texts: loss(v._replace(texts=texts), told))(lower)
        ours, theirs = (jax.nn.log_softmax(x / KL_TEMPERATURE) for x in (lower, jax.lax.stop_gradient(last)))
        apart = (jnp.exp(theirs) * (theirs - ours)).sum(-1).sum(0)
        there = v.there * v.weights[:, None]
        apart = (apart * there).sum() / jnp.maximum(there.sum(), 1)
        return loss(v._replace(texts=last), told) + each.mean() + KL_TEMPERATURE * apart

    return summed


# ------------------------------------------------------------------------------------------ from a batch to vectors


def vector(module: Any, pooled: Pooled, params: Any, tokens: Array, positions, segments, keys=None, places=None):
    """tokens i32[B, T], padded on the right where `segments` is 0 -> a vector of each text, f32[B, D].

    With `places` rows hold several texts, numbered from 1 by `segments`, and vectors are f32[N, D].
    """
    module, seen = seeing(module, segments, places)
    x = module.apply({"params": params}, tokens, positions, seen, keys=keys, method="hidden")
    return above(pooled, params, x, segments, places)


def vector_of_each_layer(module: Any, pooled: Pooled, params: Any, tokens, positions, segments, keys=None, places=None):
    """`vector` by the states below the first block, and behind each: f32[B, L, D]."""
    module, seen = seeing(module, segments, places)
    depths = module.depths(params, tokens, positions, seen, keys=keys)
    return jnp.stack([above(pooled, params, x, segments, places) for x in depths], axis=1)


def above(pooled: Pooled, params: Any, x: Array, segments: Array, places: Places | None = None) -> Array:
    """Hidden states [B, T, D] -> a vector of each text, f32[B, D], or of those in their places."""
    x = pool(x, segments, pooled.pooling, places).astype(jnp.float32)
    for i, layer in enumerate(pooled.dense):
        x = ACTIVATIONS[layer.activation](affine(x, params[DENSE][str(i)]))
    return unit(x) if pooled.normalize else x


def embedding(module: Any, pooled: Pooled, loss: Callable[[Vectors, Told], Array], layers: bool = False) -> OverVectors:
    """The loss over batches as `data.TextsAssembler` lays them; params["objective"] holds the fields of `Told`.

    layers: it is of vectors by all layers (`adaptive`).
    """
    one = vector_of_each_layer if layers else vector

    def vectors(params, batch, key):
        rows, texts = batch["there"].shape

        def flat(x):
            return x.reshape(-1, x.shape[-1])

        number = (texts * batch["row"][:, None] + jnp.arange(texts)).reshape(-1)
        given = (flat(inputs(batch)), flat(batch["positions"]), flat(batch["segments"]))
        keys = None if key is None else row_keys(key, number[: len(given[0])])
        found = one(module, pooled, params, *given, keys, places(batch))
        return found.reshape(rows, texts, *found.shape[1:])

    def over(params, every, batch):
        v = Vectors(every, *(batch[name] for name in ("there", "label", "weights", "same")))
        told = Told(**params.get(OBJECTIVE, {}))
        total = v.weights.sum()
        means = {}
        if every.shape[1] > 1:
            last = every[..., -1, :] if layers else every
            near = cosines(last[:, 0], last[:, 1])
            means["cosine"] = ((near * v.weights).sum(), total)
        return (loss(v, told) * total, total), {"means": jax.lax.stop_gradient(means)}

    return OverVectors(vectors, over)


# ---------------------------------------------------------------------------------------------------- the task


def open_body(given: TaskInput) -> Any:
    """The model of a config.json without any head."""
    config = {**given.config, "architectures": None}
    module = models.build(config, **given.fields)
    if module.reads_source:
        raise UserError(
            "objective.name=embedding needs an encoder or a decoder alone, and the model in model.path is an "
            "encoder-decoder."
        )
    if hasattr(module.spec, "patch"):
        raise UserError("objective.name=embedding reads texts, and the model in model.path reads images.")
    return module.without_head() if isinstance(module, Decoder) else module


def chosen_pooling(given: TaskInput, module: Any) -> Pooled:
    """How the model's vectors are made: as its directory says, unless the run's config says otherwise.

    Raises:
        UserError: the config asks for prefixes, and the model has others.
    """
    o = given.objective
    own = read_pooled(given.folder) if given.folder is not None else None
    pooled = own or Pooled("mean" if module.is_encoder else "last")
    if o["pooling"] != "auto":
        pooled = dataclasses.replace(pooled, pooling=o["pooling"])
    if o["normalize"] != "auto":
        pooled = dataclasses.replace(pooled, normalize=o["normalize"] == "on")
    for name in ("query", "document"):
        asked, has = o[f"{name}_prefix"], pooled.prompts.get(name)
        if asked is not None and has and asked != has:
            raise UserError(
                f"objective.{name}_prefix={asked!r}: the model in model.path has a prompt of its own for this, {has!r} "
                "(config_sentence_transformers.json), and was trained with it. Leave the setting out to use that one."
            )
        if asked is not None:
            pooled = dataclasses.replace(pooled, prompts={**pooled.prompts, name: asked})
    if (wide := o["dense"]) is not None:
        if pooled.dense:
            raise UserError(
                f"objective.dense={wide}: the model in model.path has a dense layer of {pooled.dense[-1].outputs} "
                "channels already, which is trained. Leave the setting out."
            )
        pooled = dataclasses.replace(pooled, dense=(Dense(module.spec.width, wide),))
    return dataclasses.replace(pooled, max_length=given.length(module, pooled.max_length))


def own_layers(given: TaskInput, pooled: Pooled) -> Callable[[int], dict[str, Any]] | None:
    """The parameters of the dense layers, by the run's seed: as the model's directory has them, else drawn."""
    if not pooled.dense:
        return None
    if given.objective["dense"] is None:
        read = read_dense(given.folder, pooled)
        return lambda seed: read
    return lambda seed: {DENSE: {str(i): layer.draw([seed, i]) for i, layer in enumerate(pooled.dense)}}


def open_task(given: TaskInput) -> tuple[Any, Task]:
    """Open the task on a model.

    Raises:
        UserError: the model reads no text, or a Matryoshka width exceeds its own.
    """
    module, o = open_body(given), given.objective
    name = o["contrast"]
    contrast, loss = CONTRASTS[name], LOSSES[name]
    pooled = chosen_pooling(given, module)
    if contrast.symmetric:
        loss = partial(loss, symmetric=o["symmetric"])
    width = pooled.width(module)
    if name == "angle" and width % 2:
        raise UserError(f"objective.contrast=angle halves vectors, and the model's have {width} channels.")
    if widths := o["matryoshka"]:
        if (most := max(widths)) > width:
            raise UserError(
                f"objective.matryoshka names a width of {most}, and the model's vectors have {width} channels; name "
                "widths up to that."
            )
        loss = matryoshka(loss, sorted(widths, reverse=True))
    values = {"temperature": o["temperature"]} if contrast.temperature is not None else {}
    values |= {"margin": o["margin"]} if contrast.margin is not None else {}
    if layers := o["adaptive_layers"]:
        loss = adaptive(loss)
    form = TextsForm.of(given.data, name, contrast, pooled.prompts, pooled.max_length)
    return module, Task(
        loss=lambda module, members: embedding(module, pooled, loss, layers),
        batch_like=partial(texts_like, contrast),
        metrics=means,
        assembler=TextsAssembler,
        form=form,
        features=False,
        values=values,
        layers=own_layers(given, pooled),
        length=pooled.max_length,
        result=pooled,
    )


def texts_like(contrast: Any, shape: BatchShape) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract batch of rows with as many texts as the loss needs at least."""
    rows, texts = (shape.micros, shape.rows), contrast.least
    wide = {NOTHING: 0, CLASS: 2, SCORES: texts - 1}.get(contrast.label, 1)
    batch = dict.fromkeys(
        ("tokens", "positions", "segments"), jax.ShapeDtypeStruct((*rows, texts, shape.length), jnp.int32)
    )
    batch |= {"there": jax.ShapeDtypeStruct((*rows, texts), jnp.float32)}
    batch |= {"same": jax.ShapeDtypeStruct((*rows, texts), jnp.int32)}
    batch |= {"label": jax.ShapeDtypeStruct((*rows, wide), jnp.float32)}
    batch |= {"weights": jax.ShapeDtypeStruct(rows, jnp.float32), "row": jax.ShapeDtypeStruct(rows, jnp.int32)}
    return batch


def means(loss: float, weight: float, aux: Mapping[str, Any]) -> dict[str, float]:
    """What an evaluation logs beside the loss."""
    found = {f"eval/{name}": float(total / count) for name, (total, count) in aux["means"].items() if count}
    return found | {"eval/rows": int(weight)}
