"""Next-token prediction: pretraining text, supervised fine-tuning, chat."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxtune.models.decoder import head_leaf, head_logits
from jaxtune.objectives import inputs
from jaxtune.objectives.token_nats import cross_entropy
from jaxtune.weights.leaf import row_keys


def causal_lm(module: Any, *, packed: bool = False, z_loss: float = 0.0, members: int = 1) -> Callable[..., Any]:
    """Return `loss_fn(params, batch, key) -> ((sum, weight), aux)` for a decoder.

    `batch` holds tokens, targets, positions, segments i32[B, T], weights f32[B, T] and row i32[B]. `key` None switches
    dropout off. The sum is of nats over trained tokens, the weight their number.

    Args:
        packed: rows hold several documents, told apart by `segments`; otherwise attention is causal over the row, and
            padding lies on the right where nothing looks at it.
        z_loss: see `cross_entropy`.
        members: how many are vmapped over it, which share the room for logits.
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
        # A token that is not predicted may be none of the vocabulary's: a virtual one.
        targets = jnp.where(batch["weights"] > 0, batch["targets"], 0)
        project = functools.partial(head_logits, spec=module.spec)
        total = cross_entropy(project, head_leaf(params), x, targets, batch["weights"], z_loss=z_loss, members=members)
        return (total, batch["weights"].sum()), {}

    return loss_fn
