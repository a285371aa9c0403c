"""Polymorphic weights: pytree nodes that sit where a plain array sat.

A model calls `dot`, `embed` and `attend` on whatever it finds; the type of the leaf decides what happens. So there is
one model, whichever method tunes it:

        x [B,T,K] ----------------- w [K,N] (array or QuantWeight, frozen) ---- + --- y [B,T,N]
             \\                                                                 /
              dropout -- a [K,r] -- [B,T,r] -- b [r,N] ------------- * scale --

All fields carry the leading layer axes `*L` of the stacked segment, so that `scan` slices them together.
"""

import dataclasses
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array
Keys = Array | None  # one PRNG key a row, [B]; None: no dropout


class Weight:
    """What a leaf type provides. `w` stands for a plain array or another `Weight`."""

    def dot(self, x: Array, keys: Keys = None) -> Array:
        """x [..., K] -> [..., N]."""
        raise NotImplementedError

    def embed(self, ids: Array) -> Array:
        """ids i32[...] -> rows [..., D] of a table [V, D]."""
        raise NotImplementedError

    def attend(self, x: Array) -> Array:
        """x [..., D] -> [..., V] against a table [V, D]: the tied output head."""
        raise NotImplementedError

    def merge(self) -> Array:
        """The plain array [*L, K, N] that this leaf stands for, computed in float32, in the base's dtype."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LoraWeight(Weight):
    """Low-rank adaptation, y = x w + scale * dropout(x) a b (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    Attributes:
        w: the base, [*L, K, N], an array or a QuantWeight.
        a: [*L, K, r].
        b: [*L, r, N], zeros at initialisation, so that step 0 is the base model.
        scale: f32[*L], alpha / r (or alpha / sqrt(r)); 0 marks a layer that is not adapted.
        dropout: f32[*L], the rate; None compiles no dropout at all.
    """

    w: Any
    a: Array
    b: Array
    scale: Array
    dropout: Array | None = None

    def dot(self, x, keys=None):
        h = x if keys is None or self.dropout is None else drop(x, self.dropout, keys)
        low = checkpoint_name(matmul(h, self.a.astype(x.dtype)), "lora")
        delta = matmul(low, self.b.astype(x.dtype))
        return dot(x, self.w) + delta * self.scale.astype(x.dtype)

    def embed(self, ids):
        base = embed(ids, self.w)
        delta = self.a[ids].astype(base.dtype) @ self.b.astype(base.dtype)
        return base + delta * self.scale.astype(base.dtype)

    def attend(self, x):
        # peft's tied head multiplies by the base table alone; the same numbers need the same choice.
        return attend(x, self.w)

    def merge(self):
        base = merge_leaf(self.w)
        delta = jnp.einsum("...kr,...rn->...kn", self.a.astype(jnp.float32), self.b.astype(jnp.float32))
        return (base.astype(jnp.float32) + delta * self.scale[..., None, None]).astype(base.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class QuantWeight(Weight):
    """int8 with one scale for each output column (absolute maximum).

    Attributes:
        q: int8[*L, K, N].
        scale: f32[*L, 1, N].
    """

    q: Array
    scale: Array

    @classmethod
    def quantize(cls, w: Array) -> "QuantWeight":
        """Round a plain array [*L, K, N] to int8; the error is at most half a scale for each entry."""
        w = w.astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(w), axis=-2, keepdims=True), jnp.finfo(jnp.float32).tiny) / 127.0
        return cls(jnp.round(w / scale).astype(jnp.int8), scale)

    def dot(self, x, keys=None):
        return matmul(x, self.q.astype(x.dtype)) * self.scale[..., 0, :].astype(x.dtype)

    def embed(self, ids):
        return self.q[ids].astype(jnp.float32) * self.scale[0]

    def attend(self, x):
        return (x * self.scale[0].astype(x.dtype)) @ self.q.T.astype(x.dtype)

    def merge(self):
        return self.q.astype(jnp.float32) * self.scale


def is_weight(x: Any) -> bool:
    """Whether `x` is a polymorphic leaf rather than a plain array."""
    return isinstance(x, Weight)


def dot(x: Array, w: Array | Weight, keys: Keys = None) -> Array:
    """x [..., K] times w [K, N] in x's dtype -> [..., N]. `keys` [B], one a row of x, switch dropout on."""
    return w.dot(x, keys) if is_weight(w) else matmul(x, w.astype(x.dtype))


def matmul(x: Array, w: Array) -> Array:
    """x [..., K] times w [K, N], as one matrix product.

    With the leading axes kept, XLA's CPU backend transposes both operands of the weight's gradient, which costs several
    times the product itself.
    """
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def embed(ids: Array, w: Array | Weight) -> Array:
    """Rows of the table w [V, D] for ids i32[...] -> [..., D]."""
    return w.embed(ids) if is_weight(w) else w[ids]


def attend(x: Array, w: Array | Weight) -> Array:
    """x [..., D] times the transposed table w [V, D] -> [..., V]."""
    return w.attend(x) if is_weight(w) else x @ w.astype(x.dtype).T


def merge_leaf(w: Array | Weight) -> Array:
    """The plain array a leaf stands for."""
    return w.merge() if is_weight(w) else w


def merge(params: Any) -> Any:
    """Return `params` with every polymorphic leaf replaced by the plain array it stands for."""
    return jax.tree.map(merge_leaf, params, is_leaf=is_weight)


def map_weights(fn: Callable[[Any], Any], params: Any) -> Any:
    """Map over leaves, taking each polymorphic leaf as one."""
    return jax.tree.map(fn, params, is_leaf=is_weight)


def row_keys(key: Array, row: Array) -> Array:
    """One key for each global row: key, row i32[B] -> keys [B]. However rows are split, each draws the same noise."""
    return jax.vmap(partial(jax.random.fold_in, key))(row)


def fold(keys: Keys, site: int | Array | str) -> Keys:
    """Derive keys [B] for one place in the model: a layer number or a module's name."""
    if keys is None:
        return None
    data = zlib.crc32(site.encode()) if isinstance(site, str) else site
    return jax.vmap(lambda k: jax.random.fold_in(k, data))(keys)


def drop(x: Array, rate: Array | float, keys: Array) -> Array:
    """Inverted dropout (Srivastava et al. 2014) of x [B, ...] with one key a row."""
    keep = 1.0 - rate
    mask = checkpoint_name(jax.vmap(lambda k: jax.random.bernoulli(k, keep, x.shape[1:]))(keys), "dropout")
    # A rate of 1 would divide by zero; every entry is dropped then, whatever the divisor.
    return jnp.where(mask, x / jnp.maximum(keep, 1e-6).astype(x.dtype), 0).astype(x.dtype)
