"""Text to text with an encoder-decoder: the decoder predicts each token of a target from the source and those before.

The decoder's inputs are the targets behind the token that targets begin with, `spec.start`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import models
from jaxtune.data.seq2seq import Seq2SeqAssembler, Seq2SeqForm
from jaxtune.errors import UserError
from jaxtune.models.decoder import head_leaf, head_logits
from jaxtune.objectives.causal_lm import metrics
from jaxtune.objectives.task import BatchShape, Task, TaskInput
from jaxtune.objectives.token_nats import chunk_size, cross_entropy
from jaxtune.weights.leaf import Array, row_keys

LENGTH = 512  # the default of data.max_length


def shifted(targets: Array, start: int) -> Array:
    """The decoder's inputs i32[B, T] for targets i32[B, T]: `start`, then all targets but the last."""
    return jnp.concatenate([jnp.full_like(targets[:, :1], start), targets[:, :-1]], axis=1)


def seq2seq(module: Any, *, z_loss: float = 0.0, members: int = 1) -> Callable[..., Any]:
    """Return `loss_fn(params, batch, key) -> ((sum, weight), aux)` for an encoder-decoder.

    `batch` is that of `data.seq2seq.Seq2SeqAssembler`. `key` None switches dropout off. The sum is of nats over the
    targets' tokens, the weight their number.

    Args:
        module: an encoder-decoder.
        z_loss: see `cross_entropy`.
        members: how many runs of a sweep the loss is vmapped over; they share the memory for logits.
    """

    def loss_fn(params, batch, key):
        keys = None if key is None else row_keys(key, batch["row"])
        tokens, source = shifted(batch["targets"], module.spec.start), (batch["source"], batch["segments"])
        x = module.apply({"params": params}, tokens, keys=keys, source=source, method="hidden")
        project = functools.partial(head_logits, spec=module.spec)
        given = x, batch["targets"], batch["weights"]
        total = cross_entropy(project, head_leaf(params), *given, z_loss=z_loss, members=members)
        return (total, batch["weights"].sum()), {}

    return loss_fn


def open_task(given: TaskInput) -> tuple[Any, Task]:
    """Open the task on a model.

    Raises:
        UserError: it is no encoder-decoder, or data.overlength=split, which would part targets from their sources.
    """
    module, data = models.build(dict(given.config), **given.fields), given.data
    if not module.reads_source:
        raise UserError(
            "objective.name=seq2seq needs an encoder-decoder (T5, mT5, ...), and the one in model.path "
            f"(model_type={given.config['model_type']!r}) is {'an encoder' if module.is_encoder else 'a decoder'} "
            f"alone{'.' if module.is_encoder else ': set objective.name=causal_lm.'}"
        )
    if data["overlength"] == "split":
        raise UserError(
            "data.overlength=split: a target belongs to its whole source; set data.overlength to drop or truncate."
        )
    length, target, vocab = given.length(module, LENGTH), data["max_target_length"], module.spec.vocab
    if target > module.spec.positions:
        raise UserError(
            f"data.max_target_length={target} exceeds the {module.spec.positions} positions that the model knows; "
            "lower it."
        )
    form = Seq2SeqForm(
        columns=dict(data["columns"]),
        format=data["format"],
        template=data["template"],
        ignore=tuple(data["ignore"] or ()),
        longest=length,
        target=target,
        cuts=data["overlength"] == "truncate",
    )
    return module, Task(
        loss=lambda module, members: seq2seq(module, z_loss=given.objective["z_loss"], members=members),
        batch_like=functools.partial(batch_like, target),
        metrics=metrics,
        assembler=Seq2SeqAssembler,
        form=form,
        chunk=lambda tokens, members, backend: min(tokens, chunk_size(tokens, vocab, members, backend)),
        continues=True,
        features=False,
        length=LENGTH,
    )


def batch_like(target: int, shape: BatchShape) -> dict[str, jax.ShapeDtypeStruct]:
    """The abstract batch of a step with targets of `target` tokens."""
    rows = (shape.micros, shape.rows)
    source, targets = (jax.ShapeDtypeStruct((*rows, n), jnp.int32) for n in (shape.length, target))
    return {
        **{"source": source, "segments": source, "targets": targets},
        "weights": jax.ShapeDtypeStruct(targets.shape, jnp.float32),
        "row": jax.ShapeDtypeStruct(rows, jnp.int32),
    }
