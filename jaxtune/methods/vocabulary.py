"""The embedding and the output head: adding rows for new tokens, and untying a tied head."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.errors import UserError
from jaxtune.tree import TRAIN, PyTree
from jaxtune.weights.adapters import PromptWeight, TokensWeight
from jaxtune.weights.leaf import is_weight, merge_leaf


def untie(params: PyTree) -> PyTree:
    """Replace a tied output head by a separate matrix, the transposed embedding."""
    if "lm_head" in params:
        return params
    return {**params, "lm_head": {"kernel": merge_leaf(params["embed_tokens"]["embedding"]).T}}


def resize(module: Any, params: PyTree, vocab: int) -> tuple[Any, PyTree]:
    """Add rows for new tokens to a zoo model: `vocab` rows in its embedding, and outputs of an untied head.

    New rows are the mean of the old; train them with `lora(trainable_token_indices=...)`, which a tied head follows.
    The module counts them (`spec.new_tokens`); a method that gets the module raises if it leaves one of them untrained.
    Files do not store that count: after export and loading they are rows like any other, trained or not.

    Raises:
        UserError: the table would shrink, or is adapted or quantised.
    """
    table, head = params["embed_tokens"]["embedding"], params.get("lm_head", {}).get("kernel")
    if vocab < module.spec.vocab or is_weight(table) or is_weight(head):
        raise UserError(f"resize: {vocab} rows, expected at least {module.spec.vocab}, of a table not yet adapted.")

    def grow(leaf, axis):
        mean = leaf.astype(jnp.float32).mean(axis, keepdims=True).astype(leaf.dtype)
        return jnp.concatenate([leaf, jnp.repeat(mean, vocab - leaf.shape[axis], axis)], axis)

    params = {**params, "embed_tokens": {"embedding": grow(table, 0)}}
    if "logits_bias" in params:
        bias = params["logits_bias"]["bias"]
        params["logits_bias"] = {"bias": jnp.pad(bias, ((0, 0), (0, vocab - bias.shape[1])))}
    if head is not None:
        params["lm_head"] = {name: grow(leaf, leaf.ndim - 1) for name, leaf in params["lm_head"].items()}
    return with_rows(module, vocab), params


def with_rows(module: Any, vocab: int) -> Any:
    """The module that `resize` returns; with fewer rows, the one before it."""
    config = json.dumps(module.spec.hf_config | {"vocab_size": vocab})
    new = module.spec.new_tokens + vocab - module.spec.vocab
    return module.clone(spec=dataclasses.replace(module.spec, vocab=vocab, config=config, new_tokens=new))


def with_new_tokens(tuned: tuple[PyTree, PyTree], module: Any) -> tuple[PyTree, PyTree]:
    """Return `tuned`, a method's result, if it trains the rows that `resize` added.

    Raises:
        UserError: some of them would stay the mean of the others.
    """
    spec = getattr(module, "spec", None)
    if not getattr(spec, "new_tokens", 0):
        return tuned
    role = tuned[1]["embed_tokens"]["embedding"]
    new, rows = range(spec.vocab - spec.new_tokens, spec.vocab), ()
    if isinstance(role, TokensWeight):
        rows = role.ids
    elif not isinstance(role, PromptWeight) and TRAIN in jax.tree.leaves(role):
        rows = new
    if lost := sorted(set(new) - set(rows)):
        raise UserError(
            f"resize added {spec.new_tokens} token(s) to the table, and nothing trains the row(s) {lost[:8]}"
            f"{' and more' * (len(lost) > 8)}: they would stay the mean of the others. Give lora "
            f"trainable_token_indices with all of {new.start} to {new.stop - 1}, or modules_to_save=['embed_tokens']."
        )
    return tuned
