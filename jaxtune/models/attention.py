"""Causal attention over one row of segments, three ways, and over a key-value cache.

B rows, T tokens, S cache slots, H query heads, G key-value heads, C channels a head.
Every form takes the same mask: causal, same segment, and at most `window` tokens back.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
NEG = float(jnp.finfo(jnp.float32).min)


def choose(name: str, packed: bool, dtype, head_dim: int) -> str:
    """Resolve "auto" for the backend at hand: mapped on CPU, cuDNN on GPU where it applies, plain XLA elsewhere."""
    if name != "auto":
        return name
    backend = jax.default_backend()
    if backend == "cpu":
        return "mapped"
    fits = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if backend == "gpu" and fits and not packed else "xla"


def attend_tokens(
    q: Array, k: Array, v: Array, *, segments: Array | None, scale: float, window: int | None, implementation: str
) -> Array:
    """Attention of T tokens over themselves.

    Args:
        q: [B, T, H, C]. k, v: [B, T, G, C]; H is a multiple of G.
        segments: i32[B, T], tokens see their own segment only; None: one segment a row, padding on the right.
        scale: multiplies q.k.
        window: how many tokens back a token sees, itself included; None: all.
        implementation: "mapped", "xla", "cudnn" or "auto".

    Returns:
        [B, T, H, C] in q's dtype.

    Raises:
        ValueError: the implementation is unknown, or cannot honour segments.
    """
    name = choose(implementation, segments is not None, q.dtype, q.shape[-1])
    if name == "mapped":
        return _mapped(q, k, v, segments, scale, window)
    if name == "xla":
        return _masked(q, k, v, _token_mask(q.shape[1], segments, window), scale)
    if name == "cudnn":
        if segments is not None:
            raise ValueError("attention='cudnn' does not separate packed segments; use 'xla', 'mapped' or 'auto'.")
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, scale=scale, local_window_size=local, implementation="cudnn"
        )
    raise ValueError(f"Unknown attention implementation {name!r}.")


def attend_cache(q: Array, k: Array, v: Array, positions: Array, *, scale: float, window: int | None) -> Array:
    """Attention of q [B, T, H, C] at `positions` i32[B, T] over cache slots k, v [B, S, G, C].

    Slot s holds the token at position s, so a query sees the slots up to its own position.
    """
    slots = jnp.arange(k.shape[1])
    mask = slots <= positions[..., None]
    if window is not None:
        mask &= slots > positions[..., None] - window
    return _masked(q, k, v, mask, scale)


def _token_mask(t: int, segments: Array | None, window: int | None) -> Array:
    """bool[B or 1, T, T]."""
    i = jnp.arange(t)
    mask = i[:, None] >= i
    if window is not None:
        mask &= i[:, None] - i < window
    if segments is None:
        return mask[None]
    return mask & (segments[:, :, None] == segments[:, None, :])


def _masked(q, k, v, mask, scale):
    """Plain attention; the softmax in float32. mask: bool[B or 1, T, S]."""
    b, t, h, c = q.shape
    g = k.shape[2]
    q = q.reshape(b, t, g, h // g, c)
    scores = jnp.einsum("btgnc,bsgc->bgnts", q, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, NEG), axis=-1).astype(v.dtype)
    weights = checkpoint_name(weights, "scores")
    return jnp.einsum("bgnts,bsgc->btgnc", weights, v).reshape(b, t, h, c)


def _blocks(t: int, window: int | None) -> list[tuple[int, int, int]]:
    """Query blocks (start, stop, first key): the causal half, and what the window has passed, is never computed."""
    size = max(128, math.ceil(t / 8))
    blocks = []
    for start in range(0, t, size):
        first = 0 if window is None else max(0, start - window + 1)
        blocks.append((start, min(start + size, t), first))
    return blocks


def _mapped(q, k, v, segments, scale, window):
    """A loop over (row, key-value head): scores of one head at a time stay in cache, and are recomputed backward.

    On a CPU this is about twice as fast as one batched product over all heads.
    """
    b, t, h, c = q.shape
    g = k.shape[2]
    i = jnp.arange(t)
    segs = jnp.zeros((b, t), jnp.int32) if segments is None else segments

    @jax.checkpoint
    def one(args):
        q, k, v, seg = args  # [N, T, C], [T, C], [T, C], [T]
        outs = []
        for start, stop, first in _blocks(t, window):
            rows, cols = slice(start, stop), slice(first, stop)
            mask = i[rows, None] >= i[cols]
            if window is not None:
                mask &= i[rows, None] - i[cols] < window
            if segments is not None:
                mask &= seg[rows, None] == seg[cols]
            # Products of plain matrices: with the group's axis kept, their gradients are transposed by copying.
            heads, size = q.shape[0], stop - start
            flat = q[:, rows].reshape(heads * size, -1)
            scores = jnp.dot(flat, k[cols].T, preferred_element_type=jnp.float32).reshape(heads, size, -1)
            weights = jax.nn.softmax(jnp.where(mask, scores * scale, NEG), axis=-1).astype(v.dtype)
            outs.append((weights.reshape(heads * size, -1) @ v[cols]).reshape(heads, size, -1))
        return jnp.concatenate(outs, axis=1)

    qs = q.reshape(b, t, g, h // g, c).transpose(0, 2, 3, 1, 4).reshape(b * g, h // g, t, c)
    flat = functools.partial(jnp.reshape, shape=(b * g, t, c))
    qkv = (qs, flat(k.transpose(0, 2, 1, 3)), flat(v.transpose(0, 2, 1, 3)))
    out = jax.lax.map(one, (*(checkpoint_name(x, "heads") for x in qkv), jnp.repeat(segs, g, axis=0)))
    return out.reshape(b, g, h // g, t, c).transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)
