"""Next-token prediction: pretraining text, supervised fine-tuning, chat."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import models
from jaxtune.data.batches import Assembler
from jaxtune.errors import UserError
from jaxtune.models.classifier import read_labels
from jaxtune.models.decoder import head_leaf, head_logits
from jaxtune.objectives import inputs
from jaxtune.objectives.task import BatchShape, Task, TaskInput
from jaxtune.objectives.token_nats import chunk_size, cross_entropy
from jaxtune.weights.leaf import row_keys


def causal_lm(module: Any, *, packed: bool = False, z_loss: float = 0.0, members: int = 1) -> Callable[..., Any]:
    """Return `loss_fn(params, batch, key) -> ((sum, weight), aux)` for a decoder.

    `batch` holds tokens, targets, positions, segments i32[B, T], weights f32[B, T] and row i32[B]. `key` None switches
    dropout off. The sum is of nats over trained tokens, the weight their number.

    Args:
        module: a decoder.
        packed: rows hold several documents, which `segments` number; otherwise attention is causal over the row, and
            padding lies on the right where no token sees it.
        z_loss: see `cross_entropy`.
        members: how many runs of a sweep the loss is vmapped over; they share the memory for logits.
    """

    def loss_fn(params, batch, key):
        keys = None if key is None else row_keys(key, batch["row"])
        x = module.apply(
            {"params": params},
            inputs(batch),
            batch["positions"],
            batch["segments"] if packed else None,
            keys=keys,
            method="hidden",
        )
        # A token that is not predicted may lie outside the vocabulary: a virtual one.
        targets = jnp.where(batch["weights"] > 0, batch["targets"], 0)
        project = functools.partial(head_logits, spec=module.spec)
        total = cross_entropy(project, head_leaf(params), x, targets, batch["weights"], z_loss=z_loss, members=members)
        return (total, batch["weights"].sum()), {}

    return loss_fn


def open_task(given: TaskInput) -> tuple[Any, Task]:
    """Open the task on a model.

    Raises:
        UserError: the model does not continue text.
    """
    module = open_decoder("causal_lm", given)
    return module, causal_lm_task(module, packed=given.data["packing"], z_loss=given.objective["z_loss"])


def open_decoder(task: str, given: TaskInput) -> Any:
    """Return the module of a task that continues text.

    Raises:
        UserError: the model does not continue text.
    """
    module = models.build(dict(given.config), **given.fields)
    kind = given.config["model_type"]
    if module.reads_source:
        raise UserError(
            f"objective.name={task} needs a decoder alone, and the model in model.path (model_type={kind!r}) is an "
            "encoder-decoder, which reads one text and writes another: set objective.name=seq2seq."
        )
    if not module.continues:
        what = "has a label head" if read_labels(given.config) else f"(model_type={kind!r}) is an encoder"
        raise UserError(
            f"objective.name={task} needs a model that continues text, and the one in model.path {what}: set "
            "objective.name to sequence_classification or token_classification."
        )
    return module


def causal_lm_task(module: Any, *, packed: bool = False, z_loss: float = 0.0) -> Task:
    """Return the task of a decoder; `packed` and `z_loss` as for `causal_lm`."""
    vocab = module.spec.vocab
    return Task(
        loss=lambda module, members: causal_lm(module, packed=packed, z_loss=z_loss, members=members),
        batch_like=batch_like,
        metrics=metrics,
        assembler=Assembler,
        chunk=lambda tokens, members, backend: min(tokens, chunk_size(tokens, vocab, members, backend)),
        continues=True,
    )


def batch_like(shape: BatchShape) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract batch of a step."""
    rows = (shape.micros, shape.rows)
    tokens = jax.ShapeDtypeStruct((*rows, shape.length), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segments"), tokens)
    return batch | {
        "weights": jax.ShapeDtypeStruct(tokens.shape, jnp.float32),
        "row": jax.ShapeDtypeStruct(rows, jnp.int32),
    }


def metrics(loss: float, weight: float, aux: Any) -> dict[str, float]:
    """The metrics of an evaluation: the perplexity, and the number of predicted tokens."""
    return {"eval/perplexity": math.exp(min(loss, 700.0)), "eval/tokens": int(weight)}
