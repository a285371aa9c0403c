"""Attention over one row of segments, causal or in both directions, three ways, and over a key-value cache.

B rows, T tokens, S cache slots, H query heads, G key-value heads, C channels a head.
Every form takes the same mask: causal (or not), same segment, and less than `window` tokens away.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
NEG = float(jnp.finfo(jnp.float32).min)
SHORT = 64  # tokens; MiniLM's attention, 32 rows of 16, 24, 48 on two cores: 3, 6, 20 ms by XLA, 11, 15, 36 mapped


def is_short(tokens: int, causal: bool) -> bool:
    """Whether rows are an encoder's and so short that a loop over heads costs more than scores that leave the cache."""
    return not causal and tokens <= SHORT


def choose(name: str, special: bool, dtype, head_dim: int, backend: str | None = None, *, short: bool = False) -> str:
    """Resolve "auto" for a backend (the one at hand): mapped on CPU, cuDNN on GPU where it applies, else plain XLA.

    cuDNN has neither segments nor softcaps: `special`. On a CPU plain XLA also where rows are `short`.
    """
    if name != "auto":
        return name
    backend = backend or jax.default_backend()
    if backend == "cpu":
        return "xla" if short else "mapped"
    fits = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if backend == "gpu" and fits and not special else "xla"


def attend_tokens(
    q: Array,
    k: Array,
    v: Array,
    *,
    segments: Array | None,
    scale: float,
    window: int | None,
    implementation: str,
    causal: bool = True,
    softcap: float | None = None,
) -> Array:
    """Attention of T tokens over themselves.

    Args:
        q: queries [B, T, H, C].
        k: keys [B, T, G, C]; H is a multiple of G.
        v: values [B, T, G, C].
        segments: i32[B, T], tokens see their own segment only; None: one segment a row, with padding on the right,
            which a causal row never sees.
        scale: multiplies q.k.
        window: how many tokens back a token sees, itself included; None: all.
        implementation: "mapped", "xla", "cudnn" or "auto".
        causal: whether a token sees only earlier ones; otherwise it sees as far ahead as back.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118, section 2); None: they stay.

    Returns:
        [B, T, H, C] in q's dtype. What a remat policy has to keep is tagged "attention" (`checkpoint_name`).

    Raises:
        ValueError: the implementation is unknown, or cannot honour segments or a softcap.
    """
    plain = segments is None and softcap is None
    name = choose(implementation, not plain, q.dtype, q.shape[-1], short=is_short(q.shape[1], causal))
    if name == "mapped":
        return _mapped(q, k, v, segments, scale, window, causal, softcap)
    if name == "xla":
        mask = _token_mask(q.shape[1], segments, window, causal)
        return checkpoint_name(_by_head(q, k, v, mask, scale, softcap), "attention")
    if name == "cudnn":
        if softcap is not None:
            raise ValueError("attention='cudnn' has no softcap on scores; use 'xla', 'mapped' or 'auto'.")
        if segments is not None:
            raise ValueError("attention='cudnn' does not separate packed segments; use 'xla', 'mapped' or 'auto'.")
        local = None if window is None else (window - 1, 0 if causal else window - 1)
        out = jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, local_window_size=local, implementation="cudnn"
        )
        return checkpoint_name(out, "attention")
    raise ValueError(f"Unknown attention implementation {name!r}.")


def attend_cache(
    q: Array, k: Array, v: Array, positions: Array, *, scale: float, window: int | None, softcap: float | None = None
) -> Array:
    """Attention of q [B, T, H, C] at `positions` i32[B, T] over cache slots k, v [B, S, G, C].

    Slot s holds the token at position s, so a query sees the slots up to its own position.
    """
    slots = jnp.arange(k.shape[1])
    mask = slots <= positions[..., None]
    if window is not None:
        mask &= slots > positions[..., None] - window
    if q.shape[1] > 1 and jax.default_backend() == "cpu":
        return _row_by_row(q, k, v, mask, scale, softcap)
    return _masked(q, k, v, mask, scale, softcap)


def _row_by_row(q, k, v, mask, scale, softcap):
    """`_masked` in a loop over rows, whose scores stay in cache; one product of all rows took four times as long."""

    def one(row):
        return _masked(*(x[None] for x in row), scale, softcap)[0]

    return jax.lax.map(one, (q, k, v, mask))


def _token_mask(t: int, segments: Array | None, window: int | None, causal: bool) -> Array:
    """bool[B or 1, T, T]."""
    i = np.arange(t)
    mask = jnp.asarray(_near(i[:, None], i, window, causal))
    if segments is None:
        return mask[None]
    return mask & (segments[:, :, None] == segments[:, None, :])


def _near(rows: np.ndarray, cols: np.ndarray, window: int | None, causal: bool) -> np.ndarray:
    """Whether queries `rows` see keys `cols` by their places alone."""
    mask = rows >= cols if causal else np.ones(np.broadcast_shapes(rows.shape, cols.shape), bool)
    return mask if window is None else mask & (abs(rows - cols) < window)


def _masked(q, k, v, mask, scale, softcap):
    """Plain attention; mask: bool[B or 1, T, S]."""
    b, t, h, c = q.shape
    g = k.shape[2]
    q = q.reshape(b, t, g, h // g, c)
    scores = jnp.einsum("btgnc,bsgc->bgnts", q, k, preferred_element_type=jnp.float32) * scale
    return jnp.einsum("bgnts,bsgc->btgnc", _softmax(scores, mask, softcap, v.dtype), v).reshape(b, t, h, c)


def _by_head(q, k, v, mask, scale, softcap):
    """`_masked` with the heads laid first, once for both passes: XLA's products on a CPU would copy in each."""
    b, t, h, c = q.shape
    g = k.shape[2]
    q = q.reshape(b, t, g, h // g, c).transpose(0, 2, 3, 1, 4)
    q, k, v = (checkpoint_name(x, "heads") for x in (q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)))
    scores = jnp.einsum("bgntc,bgsc->bgnts", q, k, preferred_element_type=jnp.float32) * scale
    out = jnp.einsum("bgnts,bgsc->bgntc", _softmax(scores, mask, softcap, v.dtype), v)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)


def _softmax(scores, mask, softcap, dtype):
    """Weights in float32, then `dtype`, of scores [B, G, H/G, T, S]."""
    scores = checkpoint_name(scores, "scores")
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jax.nn.softmax(jnp.where(mask[:, None, None], scores, NEG), axis=-1).astype(dtype)


class _Block(NamedTuple):
    """Queries `start` to `stop`, which see keys from `first` to `last` at most."""

    start: int
    stop: int
    first: int
    last: int


def _blocks(t: int, form: "_Form") -> list[_Block]:
    """Blocks of queries: what causality or the window hides as a whole is never computed."""
    size = max(128, math.ceil(t / 8))
    blocks = []
    for start in range(0, t, size):
        stop = min(start + size, t)
        reach = t if form.window is None else form.window - 1
        last = stop if form.causal else min(stop + reach, t)
        blocks.append(_Block(start, stop, max(0, start - reach), last))
    return blocks


def _mapped(q, k, v, segments, scale, window, causal, softcap):
    """A loop over (row, key-value head): the scores of a block stay in cache and are computed again backward.

    FlashAttention-2's equations (Dao 2023, arXiv:2307.08691, algorithms 1 and 2) with whole rows of scores: the
    backward pass takes the weights from the scores and what the forward pass kept of each row, its maximum and sum.
    """
    b, t, h, c = q.shape
    g = k.shape[2]
    segs = jnp.zeros((b, t), jnp.int32) if segments is None else segments
    qs = q.reshape(b, t, g, h // g, c).transpose(0, 2, 3, 1, 4).reshape(b * g, h // g, t, c)
    flat = functools.partial(jnp.reshape, shape=(b * g, t, c))
    qkv = (qs, flat(k.transpose(0, 2, 1, 3)), flat(v.transpose(0, 2, 1, 3)))
    form = _Form(segments is not None, window, causal, scale, softcap)
    out = _heads(form, *(checkpoint_name(x, "heads") for x in qkv), jnp.repeat(segs, g, axis=0))
    return out.reshape(b, g, h // g, t, c).transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)


class _Form(NamedTuple):
    """What a query sees, and how scores are made."""

    segmented: bool
    window: int | None
    causal: bool
    scale: float
    softcap: float | None

    def mask(self, block: _Block, segments: Array) -> Array:
        """bool[stop - start, last - first]."""
        start, stop, first, last = block
        mask = jnp.asarray(_near(np.arange(start, stop)[:, None], np.arange(first, last), self.window, self.causal))
        return mask & (segments[start:stop, None] == segments[first:last]) if self.segmented else mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _heads(form: _Form, q: Array, k: Array, v: Array, segments: Array) -> Array:
    """q [M, N, T, C], k, v [M, T, C], segments i32[M, T] -> [M, N, T, C]: N query heads share a key-value head."""
    return _heads_forward(form, q, k, v, segments)[0]


def _heads_forward(form, q, k, v, segments):
    def one(args):
        q, k, v, seg = args
        n, t, c = q.shape
        outs, tops, totals = [], [], []
        for block in _blocks(t, form):
            start, stop, first, last = block
            scores, _ = _scores(form, q, k, seg, block)
            top = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            out = jnp.dot(weights.astype(v.dtype), v[first:last], preferred_element_type=jnp.float32) / total
            outs.append(out.astype(v.dtype).reshape(n, stop - start, c))
            tops.append(top.reshape(n, stop - start))
            totals.append(total.reshape(n, stop - start))
        return tuple(jnp.concatenate(parts, axis=1) for parts in (outs, tops, totals))

    out, *softmax = jax.lax.map(one, (q, k, v, segments))
    return checkpoint_name(out, "attention"), (q, k, v, segments, *(checkpoint_name(x, "scores") for x in softmax))


def _heads_backward(form, kept, grad):
    def one(args):
        q, k, v, seg, top, total, grad = args
        n, t, c = q.shape
        dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        # Transposed: XLA's fast product on a CPU takes a large right side as it lies, not a large left side transposed.
        dq, dk, dv = [], jnp.zeros((c, t), jnp.float32), jnp.zeros((c, t), jnp.float32)
        for block in _blocks(t, form):
            start, stop, first, last = block
            size = n * (stop - start)
            rows, cols = slice(start, stop), slice(first, last)
            scores, slope = _scores(form, q, k, seg, block)
            # Not exp(scores - log of the sum): that difference has lost the last digits of large scores.
            weights = jnp.exp(scores - top[:, rows].reshape(size, 1)) / total[:, rows].reshape(size, 1)
            g = grad[:, rows].reshape(size, c)
            dv = dv.at[:, cols].add(dot(g.T, weights.astype(v.dtype)))
            dweights = dot(g, v[cols].T)
            # FlashAttention takes the inner product of `out` and `grad` here, which leaves rounding where the gradient
            # is exactly 0: at a query that sees one key.
            inner = (weights * dweights).sum(-1, keepdims=True)
            ds = weights * (dweights - inner) * slope
            ds = ds.astype(q.dtype)
            dq.append(dot(ds, k[cols]).astype(q.dtype).reshape(n, stop - start, c))
            dk = dk.at[:, cols].add(dot(q[:, rows].reshape(size, c).T, ds))
        return jnp.concatenate(dq, axis=1), dk.T.astype(k.dtype), dv.T.astype(v.dtype)

    return *jax.lax.map(one, (*kept, grad)), None


def _scores(form, q, k, segments, block):
    """Masked scores of a block, f32[N * rows, columns], and their slope by q.k.

    Plain matrices, whose products need no copies.
    """
    n, _, c = q.shape
    start, stop, first, last = block
    flat = q[:, start:stop].reshape(n * (stop - start), c)
    scores = jnp.dot(flat, k[first:last].T, preferred_element_type=jnp.float32) * form.scale
    slope = form.scale
    if form.softcap is not None:
        squashed = jnp.tanh(scores / form.softcap)
        scores, slope = form.softcap * squashed, form.scale * (1 - jnp.square(squashed))
    seen = jnp.tile(form.mask(block, segments), (n, 1))
    return jnp.where(seen, scores, NEG), slope


_heads.defvjp(_heads_forward, _heads_backward)
