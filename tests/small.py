"""A decoder of two narrow layers and batches for it: what the tests of the core train. No transformers, no torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import models
from jaxtune.methods.table import METHODS
from jaxtune.tree import combine, partition

VOCAB, T = 61, 16
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}


def decoder(**changes):
    """The Flax module; `changes` are Decoder's fields, or of the HF config."""
    fields = {k: changes.pop(k) for k in ("dtype", "attention", "most_segments", "remat", "unroll") if k in changes}
    return models.build(CONFIG | changes, **fields)


@functools.cache
def weights(seed=0):
    """Random parameters of `decoder()`, large enough for every term to matter."""
    return jax.jit(decoder().init_params)(jax.random.key(seed))


@functools.cache
def tuned(method="lora", seed=1, **settings):
    """`(partition, mask)` of a method on `weights()`; b is moved off zero, so that a has a gradient. Do not donate."""
    params, mask = METHODS[method](weights(), jax.random.key(seed), decoder(), settings)

    def move(path, x):
        is_b = path[-1] == jax.tree_util.GetAttrKey("b")
        return jnp.asarray(0.3 * np.random.default_rng(x.size).standard_normal(x.shape), jnp.float32) if is_b else x

    return partition(jax.tree_util.tree_map_with_path(move, params), mask), mask


def batch(step=0, rows=8, accum=1, length=T):
    """A random batch [A, B, T] with padding, untrained prompts and, in row 3, no trained token at all."""
    rng = np.random.default_rng([7, step])
    ids = rng.integers(0, VOCAB, (rows, length + 1), dtype=np.int32)
    ends, starts = rng.integers(length // 2, length + 1, rows), rng.integers(0, length // 3, rows)
    if rows > 3:
        starts[3] = length
    at = np.arange(length)
    real = at < ends[:, None]
    flat = {
        "tokens": np.where(real, ids[:, :-1], 0),
        "targets": np.where(real, ids[:, 1:], 0),
        "positions": np.where(real, at, 0).astype(np.int32),
        "segments": real.astype(np.int32),
        "weights": (real & (at >= starts[:, None])).astype(np.float32),
        "row": np.arange(rows, dtype=np.int32),
    }
    return {k: v.reshape(accum, rows // accum, *v.shape[1:]) for k, v in flat.items()}


def pairs(rows=8, length=T):
    """Random pairs, and judged answers, [1, B, ...]: both texts of each, with a margin, a verdict and a reference."""
    both = {k: v.reshape(1, rows, 2, length) for k, v in batch(rows=2 * rows, length=length).items() if k != "row"}
    rng = np.random.default_rng(11)
    one = np.ones((1, rows), np.float32)
    return {
        **{k: both[k] for k in ("tokens", "targets", "positions", "segments")},
        **{"answer": both["weights"], "weights": one * (np.arange(rows) != 5), "good": one * (np.arange(rows) % 3 > 0)},
        **{
            "margin": np.abs(rng.normal(size=(1, rows))).astype(np.float32),
            "row": np.arange(rows, dtype=np.int32)[None],
        },
        "reference": rng.normal(-40, 9, (1, rows, 2)).astype(np.float32),
    }


def whole(state, frozen):
    """The parameters of a state."""
    return combine(state.trainable, state.member, frozen)


def sub_jaxprs(jaxpr):
    """Yield `(jaxpr, trips)` for a jaxpr and all inside it; `trips` is the product of the scan lengths around it."""
    stack = [(jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr, 1)]
    while stack:
        here, trips = stack.pop()
        yield here, trips
        for eqn in here.eqns:
            n = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            for value in eqn.params.values():
                for inner in value if isinstance(value, list | tuple) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        stack.append((inner, trips * n))


def equations(jaxpr):
    """Yield `(equation, trips)` of a jaxpr and of all inside it."""
    for here, trips in sub_jaxprs(jaxpr):
        for eqn in here.eqns:
            yield eqn, trips


def dots(jaxpr):
    """Yield `(output shape, flops)` of every matrix product, flops times the lengths of the scans around it."""
    for eqn, trips in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            inner = int(np.prod([shape[i] for i in contracted]))
            out = eqn.outvars[0].aval.shape
            yield out, 2 * int(np.prod(out)) * inner * trips


def apart(got, want):
    """The largest difference between two trees, relative to the largest number of each expected leaf's tree."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert [g.shape for g in got] == [w.shape for w in want]
    top = max(float(jnp.abs(w).max()) for w in want)
    return (
        max(float(np.abs(np.asarray(g, np.float64) - np.asarray(w, np.float64)).max()) for g, w in zip(got, want)) / top
    )
