"""Cross-entropy from hidden states, a chunk of tokens at a time: the logits [B,T,V] never exist.

The gradient is made in the forward pass, chunk by chunk, so nothing is computed twice, and positions of weight 0 are
moved to the end and skipped. The head's gradient is computed only where the head is trained.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.weights.leaf import Array


def chunk_size(tokens: int, vocab: int, lanes: int = 1, backend: str | None = None) -> int:
    """Tokens in a chunk: large enough for a matmul near peak, small enough that its float32 logits stay modest.

    `lanes` copies of the loop run side by side under `vmap` and share both.
    """
    budget, most = (2**24, 1024) if (backend or jax.default_backend()) == "cpu" else (2**28, 8192)
    size = min(most, max(256, budget // vocab)) // lanes
    return min(max(size, 32), max(128, tokens))


def cross_entropy(
    project: Callable[[Any, Array], Array],
    head: Any,
    x: Array,
    targets: Array,
    weights: Array,
    *,
    chunk: int | None = None,
    z_loss: float = 0.0,
    lanes: int = 1,
) -> Array:
    """Return the weighted sum of -log softmax(project(head, x))[target] + z_loss * logsumexp^2, f32[].

    Args:
        project: `(head, x [n, D]) -> logits f32[n, V]`.
        head: the output head, a tree of possibly polymorphic leaves.
        x: hidden states [B, T, D].
        targets: i32[B, T].
        weights: f32[B, T]; 0 where there is nothing to predict.
        chunk: tokens at a time; default by `chunk_size`.
        z_loss: weight of the squared log-normaliser (PaLM, arXiv:2204.02311, section 5).
        lanes: see `chunk_size`.
    """
    leaves, structure = jax.tree.flatten(head)
    n = math.prod(targets.shape)
    vocab = jax.eval_shape(project, head, x[:1, 0]).shape[-1]
    size = min(chunk or chunk_size(n, vocab, lanes), n)

    def logits(leaves, xc):
        return project(jax.tree.unflatten(structure, leaves), xc)

    return _summed(logits, z_loss, size, leaves, x.reshape(n, -1), targets.reshape(n), weights.reshape(n))


def _nats(logits: Array, targets: Array, weights: Array, z_loss: float) -> tuple[Array, Array]:
    """Return the weighted sum over a chunk, and its gradient by the logits [n, V].

    The gradient is written down, not derived: in one pass over the logits instead of one for each operation.
    """
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    total = jnp.sum(weights * (lse - picked + z_loss * jnp.square(lse)))
    hit = targets[:, None] == jnp.arange(logits.shape[-1])
    softmax = jnp.exp(logits - lse[:, None])
    return total, weights[:, None] * (softmax * (1 + 2 * z_loss * lse)[:, None] - hit)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _summed(logits, z_loss, size, leaves, x, targets, weights):
    return _run(logits, z_loss, size, leaves, x, targets, weights, [False] * len(leaves), False)[0]


def _run(logits, z_loss, size, leaves, x, targets, weights, leaf_wanted, x_wanted):
    """Loop over the chunks that have weight; return (sum, gradients of the wanted leaves, gradient of x or None)."""
    n = x.shape[0]
    order = jnp.argsort(weights == 0, stable=True)
    order = jnp.pad(order, (0, -n % size), constant_values=n)  # out of range: weight 0, and dropped when written
    active = (jnp.sum(weights != 0) + size - 1) // size
    wanted = [leaf for leaf, w in zip(leaves, leaf_wanted, strict=True) if w]

    def at(array, rows, fill=0):
        return jnp.take(array, rows, axis=0, mode="fill", fill_value=fill)

    def body(i, carry):
        total, grads, dx = carry
        rows = jax.lax.dynamic_slice_in_dim(order, i * size, size)

        def f(wanted, xc):
            rest = iter(wanted)
            return logits([next(rest) if w else leaf for leaf, w in zip(leaves, leaf_wanted, strict=True)], xc)

        outputs, pull = jax.vjp(f, wanted, at(x, rows))
        value, slope = _nats(outputs, at(targets, rows), at(weights, rows), z_loss)
        if x_wanted:
            dw, dxc = pull(slope.astype(outputs.dtype))
            grads = [g + d.astype(g.dtype) for g, d in zip(grads, dw, strict=True)]
            dx = dx.at[rows].set(dxc, mode="drop", unique_indices=True)
        return total + value, grads, dx

    start = (jnp.float32(0), [jnp.zeros(w.shape, jnp.float32) for w in wanted], jnp.zeros_like(x) if x_wanted else None)
    return jax.lax.fori_loop(0, active, body, start)


def _forward(logits, z_loss, size, leaves, x, targets, weights):
    leaf_wanted = [leaf.perturbed for leaf in leaves]
    values = [leaf.value for leaf in leaves]
    out, grads, dx = _run(
        logits,
        z_loss,
        size,
        values,
        x.value,
        targets.value,
        weights.value,
        leaf_wanted,
        x.perturbed or any(leaf_wanted),
    )
    rest = iter(grads)
    kept = [next(rest).astype(v.dtype) if w else None for v, w in zip(values, leaf_wanted, strict=True)]
    return out, (kept, dx)


def _backward(logits, z_loss, size, residuals, g):
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        g = jnp.zeros(g.shape, g.dtype)
    grads, dx = residuals
    scaled = [None if d is None else (d * g).astype(d.dtype) for d in grads]
    return scaled, None if dx is None else (dx * g.astype(dx.dtype)), None, None


_summed.defvjp(_forward, _backward, symbolic_zeros=True)
