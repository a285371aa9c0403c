"""The parts of a block. Parameters are read as polymorphic leaves and created only at initialisation."""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models.attention import attend_cache, attend_tokens
from jaxtune.models.spec import BlockSpec, Rope
from jaxtune.weights import Array, Keys, dot, fold

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class Context(NamedTuple):
    """What every block of one forward pass shares.

    Attributes:
        positions: i32[B, T], the cache slots to write; None: the first T, and what the cache held is not seen.
        segments: i32[B, T] or None.
        ropes: {str(rope): (cos, sin)}, each [B, T, 1, dim/2] float32.
        keys: one PRNG key a row, [B], or None.
    """

    positions: Array | None
    segments: Array | None
    ropes: dict[str, tuple[Array, Array]]
    keys: Keys


def leaf(module: nn.Module, name: str, init, shape: tuple[int, ...]) -> Any:
    """Read a parameter whatever its type; create it, a float32 array, only while initialising."""
    if module.is_initializing():
        return module.param(name, init, shape, jnp.float32)
    return module.get_variable("params", name)


class Linear(nn.Module):
    """y = x w + b."""

    features: int
    bias: bool = False
    std: float = 0.02

    @nn.compact
    def __call__(self, x: Array, keys: Keys = None) -> Array:
        kernel = leaf(self, "kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))
        y = dot(x, kernel, fold(keys, "/".join(self.path[-2:])))
        if self.bias:
            y += leaf(self, "bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016), computed in float32."""

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = leaf(self, "scale", nn.initializers.ones, (x.shape[-1],))
        h = x.astype(jnp.float32)
        if self.kind == "layer":
            h -= h.mean(-1, keepdims=True)
        h *= jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        h = h * scale.astype(jnp.float32)
        if self.kind == "layer":
            h += leaf(self, "bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
        return h.astype(x.dtype)


def rope_tables(rope: Rope, positions: Array) -> tuple[Array, Array]:
    """cos and sin f32[B, T, 1, dim/2] of the angles position * frequency."""
    frequencies = 1.0 / rope.theta ** (np.arange(0, rope.dim, 2) / rope.dim)
    if rope.scaling is not None:
        frequencies = _llama3(frequencies, *rope.scaling)
    angles = positions[..., None, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def _llama3(freqs: np.ndarray, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """Llama 3.1's rule: long wavelengths are stretched by `factor`, short ones kept, a ramp between."""
    wavelength = 2 * math.pi / freqs
    ramp = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - ramp) * freqs / factor + ramp * freqs


def rotate(x: Array, table: tuple[Array, Array]) -> Array:
    """Rotate the first `dim` channels of x [B, T, H, C], the two halves as pairs."""
    cos, sin = (t.astype(x.dtype) for t in table)
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)


class Attention(nn.Module):
    spec: BlockSpec
    implementation: str
    std: float

    @nn.compact
    def __call__(self, x: Array, ctx: Context, cache: Any, layer: Array) -> tuple[Array, Any]:
        s = self.spec
        b, t, d = x.shape
        sizes = [s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim]
        if s.fused_qkv:
            qkv = Linear(sum(sizes), s.qkv_bias, self.std, name="qkv_proj")(x, ctx.keys)
            q, k, v = jnp.split(qkv, np.cumsum(sizes)[:2], axis=-1)
        else:
            q, k, v = (
                Linear(n, s.qkv_bias, self.std, name=name)(x, ctx.keys)
                for n, name in zip(sizes, ("q_proj", "k_proj", "v_proj"), strict=True)
            )
        q, k, v = (checkpoint_name(y, "qkv").reshape(b, t, -1, s.head_dim) for y in (q, k, v))
        if s.qk_norm:
            q, k = Norm("rms", s.eps, name="q_norm")(q), Norm("rms", s.eps, name="k_norm")(k)
        if s.rope is not None:
            q, k = rotate(q, ctx.ropes[str(s.rope)]), rotate(k, ctx.ropes[str(s.rope)])
        scale = s.head_dim**-0.5
        if cache is not None:
            cache = write_cache(cache, k, v, ctx.positions, layer)
        if cache is None or ctx.positions is None:
            out = attend_tokens(
                q, k, v, segments=ctx.segments, scale=scale, window=s.window, implementation=self.implementation
            )
        else:
            out = attend_cache(q, cache["k"][layer], cache["v"][layer], ctx.positions, scale=scale, window=s.window)
        out = checkpoint_name(out.reshape(b, t, sizes[0]), "attention")
        return Linear(d, s.o_bias, self.std, name="o_proj")(out, ctx.keys), cache


def write_cache(cache: dict[str, Array], k: Array, v: Array, positions: Array | None, layer: Array) -> dict[str, Array]:
    """Put k, v [B, T, G, C] into slots `positions` of cache [L, B, S, G, C]; None: into the first T slots."""

    def write(slots: Array, new: Array) -> Array:
        new = new.astype(slots.dtype)
        if positions is None:
            return jax.lax.dynamic_update_slice(slots, new[None], (layer, 0, 0, 0, 0))
        b, t = new.shape[:2]
        if t == 1 and b <= 32 and jax.default_backend() == "cpu":
            # One token a row: XLA's scatter costs a tenth of a decoding step there, a slice a row nearly nothing.
            for row in range(b):
                at = (layer, row, positions[row, 0], 0, 0)
                slots = jax.lax.dynamic_update_slice(slots, new[None, row : row + 1], at)
            return slots
        rows = jnp.arange(b)[:, None]
        return slots.at[layer, rows, positions].set(new)

    return {"k": write(cache["k"], k), "v": write(cache["v"], v)}


class Mlp(nn.Module):
    spec: BlockSpec
    std: float

    @nn.compact
    def __call__(self, x: Array, keys: Keys) -> Array:
        s = self.spec
        act = ACTIVATIONS[s.act]
        h = checkpoint_name(Linear(s.mlp, s.mlp_bias, self.std, name="up_proj")(x, keys), "mlp")
        if s.gated:
            gate = checkpoint_name(Linear(s.mlp, s.mlp_bias, self.std, name="gate_proj")(x, keys), "mlp")
            h = act(gate) * h
        else:
            h = act(h)
        return Linear(x.shape[-1], s.mlp_bias, self.std, name="down_proj")(h, keys)


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    spec: BlockSpec
    implementation: str
    std: float

    @nn.compact
    def __call__(self, x: Array, ctx: Context, cache: Any, layer: Array) -> tuple[Array, Any]:
        s = self.spec
        h = Norm(s.norm, s.eps, name="input_norm")(x)
        h, cache = Attention(s, self.implementation, self.std, name="self_attn")(h, ctx, cache, layer)
        x = checkpoint_name(x + h, "residual")
        h = Norm(s.norm, s.eps, name="post_attention_norm")(x)
        return x + Mlp(s, self.std, name="mlp")(h, ctx.keys), cache
