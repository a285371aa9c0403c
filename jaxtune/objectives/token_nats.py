"""Nats a token from hidden states, a chunk of tokens at a time: the logits [B,T,V] never exist.

    nats_i = logsumexp(l_i) - l_i[target_i] + z_loss * logsumexp(l_i)^2,    l_i = project(head, x_i)

Any loss over log-probabilities is a function of these; cross-entropy is their weighted sum, and `token_loss` that of
any other function of a token's logits. Every gradient is one loop over the chunks, `_run`, which sums slope_i * d
nats_i. When it runs depends on when the slopes are known:

    cross_entropy, token_loss   the weights are the slopes     in the forward pass, nothing is computed twice
    token_nats, frozen head     row i of x has slope_i alone   in the forward pass with slopes of 1; rows are scaled
    token_nats, trained head    the cotangent is the slopes    in the backward pass, which makes the logits again

Positions that are left out are moved to the end and skipped. No gradient is computed for frozen leaves.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.weights.leaf import Array

Project = Callable[[Any, Array], Array]  # (head, x [n, D]) -> logits f32[n, V]


def chunk_size(tokens: int, vocab: int, members: int = 1, backend: str | None = None) -> int:
    """Tokens in a chunk: large enough for a matmul near peak, small enough that its float32 logits stay modest.

    `members` copies of the loop run side by side under `vmap` and share both.
    """
    budget, most = (2**24, 1024) if (backend or jax.default_backend()) == "cpu" else (2**28, 8192)
    size = min(most, max(256, budget // vocab)) // members
    return min(max(size, 32), max(128, tokens))


def token_nats(
    project: Project,
    head: Any,
    x: Array,
    targets: Array,
    where: Array | None = None,
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
    members: int = 1,
    also: Callable[[Array, Array], Any] | None = None,
) -> Any:
    """Return -log softmax(project(head, x))[target] + z_loss * logsumexp^2 of each token, f32[B, T].

    Differentiable by `head` and `x`.

    Args:
        project: `(head, x [n, D]) -> logits f32[n, V]`, each row by itself.
        head: the output head, a tree of possibly polymorphic leaves.
        x: hidden states [B, T, D].
        targets: i32[B, T].
        where: [B, T], bool or weights; tokens of 0 are skipped, and 0 in the result. None: every token.
        z_loss: weight of the squared log-normaliser (PaLM, arXiv:2204.02311, section 5).
        chunk: tokens at a time; default by `chunk_size`.
        members: see `chunk_size`.
        also: `(logits f32[n, V], targets i32[n]) -> tree of arrays [n, ...]`, more values from the logits of each
            token; no gradient goes through it.

    Returns:
        f32[B, T]; with `also`, `(f32[B, T], tree of [B, T, ...])`.
    """
    where = jnp.ones(targets.shape, bool) if where is None else where
    loop, arrays = _prepared(project, head, x, targets, where, z_loss, chunk, members, also)
    found = jax.tree.map(lambda v: v.reshape(*targets.shape, *v.shape[1:]), _nats(loop, *arrays))
    return found[0] if also is None else found


def cross_entropy(
    project: Project,
    head: Any,
    x: Array,
    targets: Array,
    weights: Array,
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
    members: int = 1,
) -> Array:
    """Return the weighted sum of `token_nats`, f32[], with the gradient made in the forward pass.

    Args:
        project: as in `token_nats`.
        head: as in `token_nats`.
        x: hidden states [B, T, D].
        targets: i32[B, T].
        weights: f32[B, T]; 0 where there is nothing to predict. They are data: no gradient goes to them.
        z_loss: as in `token_nats`.
        chunk: as in `token_nats`.
        members: as in `token_nats`.
    """
    loop, arrays = _prepared(project, head, x, targets, weights, z_loss, chunk, members, None)
    return _summed(loop, *arrays, Given())[0]


def token_loss(
    project: Project,
    head: Any,
    x: Array,
    targets: Array,
    weights: Array,
    score: Callable[..., tuple[Array, Any]],
    given: "Given",
    *,
    chunk: int | None = None,
    members: int = 1,
) -> tuple[Array, Any]:
    """Return the weighted sum of any function of each token's logits, with the gradient made in the forward pass.

    Args:
        project: as in `token_nats`.
        head: as in `token_nats`.
        x: hidden states [B, T, D].
        targets: i32[B, T].
        weights: as in `cross_entropy`.
        score: `(logits f32[n, V], targets i32[n], given) -> (f32[n], tree of f32[n])`: a value each token, and what
            else is counted of it; `given` has its tokens' own rows. It must be finite where all that is given is 0.
        given: what `score` is told beside the logits; no gradient goes to it.
        chunk: as in `token_nats`.
        members: as in `token_nats`.

    Returns:
        (f32[], tree of f32[]): weighted sums of both; the gradient is of the first.
    """
    loop, arrays = _prepared(project, head, x, targets, weights, 0.0, chunk, members, None)
    n = math.prod(targets.shape)
    flat = given._replace(tokens=jax.tree.map(lambda a: a.reshape(n, *a.shape[targets.ndim :]), given.tokens))
    return _summed(loop._replace(score=score), *arrays, flat)


class Given(NamedTuple):
    """What a score is told beside the logits.

    Attributes:
        tokens: a tree of arrays [B, T, ...], a row for each token.
        shared: any tree of arrays.
    """

    tokens: Any = ()
    shared: Any = ()


class _Loop(NamedTuple):
    """The static part of a pass over the chunks."""

    logits: Callable[[list[Any], Array], Array]
    size: int
    z_loss: float
    also: Callable[[Array, Array], Any] | None
    score: Callable[..., tuple[Array, Any]] | None = None


def _prepared(project, head, x, targets, weights, z_loss, chunk, members, also) -> tuple[_Loop, tuple]:
    """The loop, and its arrays with one token axis."""
    leaves, structure = jax.tree.flatten(head)
    n = math.prod(targets.shape)
    vocab = jax.eval_shape(project, head, jax.ShapeDtypeStruct((1, x.shape[-1]), x.dtype)).shape[-1]
    size = min(chunk or chunk_size(n, vocab, members), n)

    def logits(leaves, xc):
        return project(jax.tree.unflatten(structure, leaves), xc)

    arrays = (leaves, x.reshape(n, -1), targets.reshape(n), weights.reshape(n))
    return _Loop(logits, size, z_loss, also), arrays


# -------------------------------------------------------------------------------------------------------- the one loop


class _Found(NamedTuple):
    """The results of a pass over the chunks; None: not requested."""

    total: Array | None  # f32[], the sum of slope * nats
    counts: Any  # the sums of slope * what else a score counts
    values: Any  # (nats f32[n], what else `also` gives [n, ...])
    grads: list[Array | None]  # of the sum, float32, by each leaf that is wanted
    dx: Array | None  # of the sum, by x


def _run(
    loop: _Loop, leaves, x, targets, weights, slopes, given=None, *, values=False, wanted=(), x_wanted=False
) -> _Found:
    """Go over the chunks that have weight.

    Args:
        loop: how logits are made, and how many tokens at a time.
        leaves: of the head.
        x: hidden states [n, D].
        targets: i32[n].
        weights: [n]; tokens of weight 0 are left out.
        given: what the loop's score is told, [n, ...] each token; None: there is no score.
        slopes: f32[n], by which each token's gradient is multiplied.
        values: return nats a token rather than their sum.
        wanted: for each leaf, whether to make its gradient.
        x_wanted: whether to make the gradient of x.
    """
    n, size = x.shape[0], loop.size
    wanted = wanted or [False] * len(leaves)
    count = jnp.sum(weights != 0)
    order = jnp.argsort(weights == 0, stable=True)
    # Tokens without weight and the padding of the last chunk are out of range: read as 0, and dropped when written.
    order = jnp.pad(jnp.where(jnp.arange(n) < count, order, n), (0, -n % size), constant_values=n)
    active = (count + size - 1) // size

    def at(array, rows, fill=0):
        return jnp.take(array, rows, axis=0, mode="fill", fill_value=fill)

    def put(array, rows, value):
        return array.at[rows].set(value, mode="drop", unique_indices=True)

    def chunk(rows, leaves_wanted, xc):
        """Logits of a chunk, as a function of what is differentiated."""
        own = iter(leaves_wanted)
        xc = xc[0] if x_wanted else at(x, rows)
        return loop.logits([next(own) if w else leaf for leaf, w in zip(leaves, wanted, strict=True)], xc)

    def body(i, found):
        rows = jax.lax.dynamic_slice_in_dim(order, i * size, size)
        inputs = [leaf for leaf, w in zip(leaves, wanted, strict=True) if w], [at(x, rows)] * x_wanted
        outputs, pull = jax.vjp(functools.partial(chunk, rows), *inputs)
        target, slope = at(targets, rows), at(slopes, rows)
        total, counts, each, grads, dx = found
        if loop.score is None:
            nats, gradient = _nats_of(outputs, target, slope, loop.z_loss)
        else:
            nats, pull_score, told = jax.vjp(
                functools.partial(_scored, loop, target, _rows_of(given, at, rows)), outputs, has_aux=True
            )
            (gradient,) = pull_score(slope)
            counts = jax.tree.map(lambda sum_, one: sum_ + jnp.sum(slope * one), counts, told)
        if values:
            here = (nats, *(() if loop.also is None else (loop.also(outputs, target),)))
            each = jax.tree.map(lambda a, v: put(a, rows, v), each, here)
        else:
            total += jnp.sum(slope * nats)
        if x_wanted or any(wanted):
            dw, dxc = pull(gradient.astype(outputs.dtype))
            grads = [g + d.astype(g.dtype) for g, d in zip(grads, dw, strict=True)]
            dx = put(dx, rows, dxc[0]) if x_wanted else None
        return _Found(total, counts, each, grads, dx)

    start = _Found(
        None if values else jnp.float32(0),
        _no_counts(loop, leaves, x, targets, given),
        _zeros(loop, leaves, x, targets) if values else None,
        [jnp.zeros(leaf.shape, jnp.float32) for leaf, w in zip(leaves, wanted, strict=True) if w],
        jnp.zeros_like(x) if x_wanted else None,
    )
    found = jax.lax.fori_loop(0, active, body, start)
    made = iter(found.grads)
    grads = [next(made).astype(leaf.dtype) if w else None for leaf, w in zip(leaves, wanted, strict=True)]
    return found._replace(grads=grads)


def _rows_of(given: Given, at: Callable[..., Array], rows: Array) -> Given:
    return given._replace(tokens=jax.tree.map(lambda a: at(a, rows), given.tokens))


def _scored(loop: _Loop, targets: Array, given: Given, logits: Array) -> tuple[Array, Any]:
    return loop.score(logits, targets, given)


def _no_counts(loop: _Loop, leaves, x, targets, given: Given) -> Any:
    """Zeros for what a score counts."""
    if loop.score is None:
        return ()

    def one(leaves, x, targets, given):
        return loop.score(loop.logits(leaves, x), targets, given)[1]

    first = given._replace(tokens=jax.tree.map(lambda a: a[:1], given.tokens))
    return jax.tree.map(lambda s: jnp.float32(0), jax.eval_shape(one, leaves, x[:1], targets[:1], first))


def _nats_of(logits: Array, targets: Array, slope: Array, z_loss: float) -> tuple[Array, Array]:
    """Return nats [n] of a chunk, and the gradient of their sum, each times its slope, by the logits [n, V].

    The gradient is written out, so that it takes one pass over the logits instead of one for each operation.
    """
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    nats = lse - picked + z_loss * jnp.square(lse)
    hit = targets[:, None] == jnp.arange(logits.shape[-1])
    softmax = jnp.exp(logits - lse[:, None])
    return nats, slope[:, None] * (softmax * (1 + 2 * z_loss * lse)[:, None] - hit)


def _zeros(loop: _Loop, leaves, x, targets) -> tuple:
    """Zeros for each token: nats, and what `also` gives."""

    def one(leaves, x, targets):
        logits = loop.logits(leaves, x)
        return (logits[:, 0], *(() if loop.also is None else (loop.also(logits, targets),)))

    shapes = jax.eval_shape(one, leaves, x[:1], targets[:1])
    return jax.tree.map(lambda s: jnp.zeros((len(targets), *s.shape[1:]), s.dtype), shapes)


# --------------------------------------------------------------------------------------------------- the weights known


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(loop: _Loop, leaves, x, targets, weights, given) -> tuple[Array, Any]:
    found = _run(loop, leaves, x, targets, weights, weights, given)
    return found.total, found.counts


def _summed_forward(loop, *primals):
    *primals, given = primals
    (leaves, x, targets, weights), wanted, x_wanted = _asked(*primals)
    given = jax.tree.map(lambda leaf: leaf.value, given)
    found = _run(loop, leaves, x, targets, weights, weights, given, wanted=wanted, x_wanted=x_wanted)
    return (found.total, found.counts), (found.grads, found.dx)


def _summed_backward(loop, made, cotangents):
    grads, dx = made
    g = _dense(cotangents[0])
    scaled = [None if d is None else (d * g).astype(d.dtype) for d in grads]
    return scaled, None if dx is None else dx * g.astype(dx.dtype), None, None, None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)

# --------------------------------------------------------------------------------------------------- a value each token


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nats(loop: _Loop, leaves, x, targets, weights) -> tuple:
    return _run(loop, leaves, x, targets, weights, _ones(weights), values=True).values


def _nats_forward(loop, *primals):
    (leaves, x, targets, weights), wanted, x_wanted = _asked(*primals)
    if any(wanted):
        trained, rest = ([leaf if w is which else None for leaf, w in zip(leaves, wanted)] for which in (True, False))
        again = trained, rest, x if x_wanted else None, None if x_wanted else x, targets, weights
        return _nats(loop, leaves, x, targets, weights), (None, again)
    found = _run(loop, leaves, x, targets, weights, _ones(weights), values=True, x_wanted=x_wanted)
    return found.values, (found.dx, None)


def _nats_backward(loop, kept, cotangents):
    by_row, again = kept
    g = _dense(cotangents[0])
    if again is None:
        return None, None if by_row is None else (by_row * g[:, None]).astype(by_row.dtype), None, None
    trained, rest, x, x_rest, targets, weights = again
    leaves = [b if a is None else a for a, b in zip(trained, rest, strict=True)]
    wanted, x_wanted = [a is not None for a in trained], x is not None
    x = x if x_wanted else x_rest
    found = _run(loop, leaves, x, targets, weights, g, wanted=wanted, x_wanted=x_wanted)
    return found.grads, found.dx, None, None


_nats.defvjp(_nats_forward, _nats_backward, symbolic_zeros=True)


def _asked(leaves, x, targets, weights) -> tuple[tuple, list[bool], bool]:
    """The values of the primals, which leaves need a gradient, and whether x does."""
    values = [leaf.value for leaf in leaves], x.value, targets.value, weights.value
    return values, [leaf.perturbed for leaf in leaves], x.perturbed


def _ones(weights: Array) -> Array:
    return jnp.ones(weights.shape, jnp.float32)


def _dense(g: Any) -> Array:
    return jnp.zeros(g.shape, g.dtype) if isinstance(g, jax.custom_derivatives.SymbolicZero) else g
