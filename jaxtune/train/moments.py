"""Moments in 8 bits or in the host's memory, and weights in bfloat16: what a full fine-tune needs to fit on one device.

Moments are quantised by blocks, each with its largest absolute value as scale (Dettmers et al. 2022, arXiv:2110.02861).
In place of that paper's table, codes stand for powers of a grid, which keeps small values apart as it does:

    signed       x = s (c / 127)^3          c in -127..127
    squares      x = s ((c + 1) / 256)^4    c in 0..255, so that no second moment becomes zero

A value goes to one of its two neighbours on the grid, each as likely as it is near. Rounded to the nearest, a moment
that decays by a thousandth a step would stay where it is: a step of the grid is 1.6% of a value next to the scale, 9%
of one of a thousandth of it (signed: 2.4%, 24%). The choice is a hash of the value's own bits, so that it needs no key.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

BLOCK = 256  # values that share a scale
SMALLEST = 4096  # entries of an array below which it is kept as it is
SQUARES = "nu"  # what optax calls second moments


class OnHost(NamedTuple):
    """An array of a state that lies in the host's memory between the steps; `parallel.shardings` knows it by name."""

    on_host: jax.Array


class Blocks(NamedTuple):
    """An array [..., K, N] in 8 bits, as B = ceil(K N / BLOCK) blocks.

    Attributes:
        codes: int8[..., B, BLOCK]; of squares uint8.
        scale: f32[..., B].
    """

    codes: jax.Array
    scale: jax.Array


def packed(x: jax.Array, *, squares: bool = False) -> Blocks:
    """Quantise f32[..., K, N]."""
    flat = x.reshape(*x.shape[:-2], -1)
    flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % BLOCK)])
    blocks = flat.reshape(*flat.shape[:-1], -1, BLOCK)
    scale = jnp.abs(blocks).max(-1)
    share = jnp.abs(blocks) / jnp.where(scale > 0, scale, 1.0)[..., None]
    root, last = (256 * jnp.sqrt(jnp.sqrt(share)) - 1, 254) if squares else (127 * jnp.cbrt(share), 126)
    below = jnp.clip(jnp.floor(root), 0, last)
    low, high = _grid(below, squares), _grid(below + 1, squares)
    code = below + (_noise(blocks) < (share - low) / (high - low))
    return Blocks(code.astype(jnp.uint8) if squares else (jnp.sign(blocks) * code).astype(jnp.int8), scale)


def _grid(code: jax.Array, squares: bool) -> jax.Array:
    return ((code + 1) / 256) ** 4 if squares else (code / 127) ** 3


def _noise(x: jax.Array) -> jax.Array:
    """From each value's bits a number in [0, 1), as the murmur hash mixes them."""
    h = jax.lax.bitcast_convert_type(x, jnp.uint32) * jnp.uint32(0x9E3779B1)
    h = (h ^ h >> 15) * jnp.uint32(0x85EBCA6B)
    return (h ^ h >> 13).astype(jnp.float32) / 2.0**32


def _zeros(x: jax.Array, *, squares: bool = False) -> Blocks:
    """`packed` of zeros, as all moments are at first: made as they are, in place of an array of zeros to quantise."""
    return jax.tree.map(
        lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(partial(packed, squares=squares), x)
    )


def unpacked(blocks: Blocks, shape: tuple[int, ...]) -> jax.Array:
    """The values f32[shape]."""
    x = _grid(blocks.codes.astype(jnp.float32), blocks.codes.dtype == jnp.uint8) * blocks.scale[..., None]
    return x.reshape(*shape[:-2], -1)[..., : shape[-2] * shape[-1]].reshape(shape)


def in_8_bits(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation, whose state lies in 8 bits between its steps, but for small arrays.

    Its large arrays are zeros at first.
    """

    def pack(state: Any, quantize: Callable[..., Blocks] = packed) -> Any:
        def one(path, x):
            return (
                x if _is_small(x) else quantize(x, squares=any(getattr(key, "name", None) == SQUARES for key in path))
            )

        return jax.tree_util.tree_map_with_path(one, state)

    def unpack(state: Any, like: Any) -> Any:
        return jax.tree.map(
            lambda x, whole: unpacked(x, whole.shape) if isinstance(x, Blocks) else x,
            state,
            like,
            is_leaf=lambda x: isinstance(x, Blocks),
        )

    def init(params):
        return pack(tx.init(params), _zeros)

    def update(updates, state, params=None):
        dtypes = jax.tree.map(lambda g: g.dtype, updates)
        updates = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        like = jax.eval_shape(tx.init, updates)
        updates, state = tx.update(updates, unpack(state, like), params)
        return jax.tree.map(lambda u, dtype: u.astype(dtype), updates, dtypes), pack(state)

    return optax.GradientTransformation(init, update)


def on_host(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation, whose state lies in the host's memory between its steps, but for small arrays."""

    def away(state: Any) -> Any:
        host = jax.memory.Space.Host
        return jax.tree.map(lambda x: x if _is_small(x) else OnHost(jax.device_put(x, host)), state)

    def back(x: Any) -> Any:
        return jax.device_put(x.on_host, jax.memory.Space.Device) if isinstance(x, OnHost) else x

    def update(updates, state, params=None):
        dtypes = jax.tree.map(lambda g: g.dtype, updates)
        updates = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        updates, state = tx.update(updates, jax.tree.map(back, state, is_leaf=_is_on_host), params)
        return jax.tree.map(lambda u, dtype: u.astype(dtype), updates, dtypes), away(state)

    return optax.GradientTransformation(lambda params: away(tx.init(params)), update)


def without_host(state: Any) -> Any:
    """A state without what lies in the host's memory."""
    return jax.tree.map(lambda x: None if _is_on_host(x) else x, state, is_leaf=_is_on_host)


def _is_on_host(x: Any) -> bool:
    return isinstance(x, OnHost)


def _is_small(x: Any) -> bool:
    return x.ndim < 2 or x.size < SMALLEST or x.dtype != jnp.float32


def state_in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation, whose state is that of parameters in float32, whatever theirs is."""

    def init(params):
        if all(p.dtype == jnp.float32 for p in jax.tree.leaves(params)):
            return tx.init(params)
        wide = jax.jit(lambda params: tx.init(jax.tree.map(lambda p: p.astype(jnp.float32), params)))
        return wide(params)  # compiled, so that there is no copy of them

    return optax.GradientTransformation(init, tx.update)


def global_norm(tree: Any) -> jax.Array:
    """The norm of all arrays together, f32[], summed in float32."""
    return jnp.sqrt(sum(jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(tree)))


def in_place(fn: Callable[[jax.Array], jax.Array], tree: Any) -> Any:
    """Apply a function that works entry by entry; to stacks of matrices in bfloat16 one layer after the other.

    XLA then writes over them. They are large: it would hold two of each.
    """

    def one(x):
        if x.dtype != jnp.bfloat16 or x.ndim < 3:
            return fn(x).astype(x.dtype)
        return jax.lax.fori_loop(0, len(x), lambda i, y: y.at[i].set(fn(y[i]).astype(x.dtype)), x)

    return jax.tree.map(one, tree)


def apply_updates(params: Any, updates: Any, key: jax.Array) -> Any:
    """Add updates to trained arrays, in float32; those in bfloat16 are then rounded at random.

    Args:
        params: the arrays.
        updates: of the same structure.
        key: of this step.
    """
    leaves, structure = jax.tree.flatten(params)
    added = [
        p.astype(jnp.float32) + u.astype(jnp.float32)
        for p, u in zip(leaves, structure.flatten_up_to(updates), strict=True)
    ]
    for i, (p, x) in enumerate(zip(leaves, added, strict=True)):
        added[i] = stochastic(x, jax.random.fold_in(key, i)) if p.dtype == jnp.bfloat16 else x.astype(p.dtype)
    return jax.tree.unflatten(structure, added)


def stochastic(x: jax.Array, key: jax.Array) -> jax.Array:
    """Round f32 to one of its two neighbours in bfloat16, each as likely as x is near to it: without a bias.

    So updates below half a unit in the last place, which rounding to the nearest would lose, act on average (Zamirai et
    al. 2020, arXiv:2010.06192).
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
