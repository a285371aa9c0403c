"""The parts of a block. Parameters are read as polymorphic leaves and created only at initialisation."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models.attention import Segments, attend_cache, attend_source, attend_tokens
from jaxtune.models.spec import BlockSpec, NormKind
from jaxtune.weights.leaf import Array, Keys, dot, fold, gathered, grouped_dot


def gelu(x: Array) -> Array:
    """x times the normal distribution function of x (Hendrycks & Gimpel 2016, arXiv:1606.08415), as in torch.

    jax.nn.gelu uses erfc, which keeps more digits far below 0 and takes three times as long on a CPU. In
    float32, as torch: below 0 the sum leaves too few digits of bfloat16.
    """
    h = x.astype(jnp.float32)
    return (0.5 * h * (1 + jax.lax.erf(h * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class Context(NamedTuple):
    """Values shared by all blocks in one forward pass.

    Attributes:
        positions: i32[B, T], the cache slots to write; None: the first T, and the cache's earlier contents are unseen.
        segments: which tokens see one another; None: all of a row. Given as i32[B, T].
        ropes: {str(rope): ((cos, sin), factor)}: each of the first two [B, T, 1, dim/2] float32, the factor of queries
            [B, T, 1, 1] or None.
        keys: one PRNG key a row, [B], or None.
        bias: added to the scores of self-attention, f32[1 or B, H, T, S]; None: nothing.
        source: an encoder's states [B, S, D]; None: there are none, or their keys and values are in the cache.
        seen: i32[B, S], above 0 at the states that are text.
    """

    positions: Array | None
    segments: Segments | Array | None
    ropes: dict[str, tuple[tuple[Array, Array], Array | None]]
    keys: Keys
    bias: Array | None = None
    source: Array | None = None
    seen: Array | None = None


def leaf(module: nn.Module, name: str, init, shape: tuple[int, ...]) -> Any:
    """Read a parameter of any leaf type; during initialisation create it as a float32 array."""
    if module.is_initializing():
        return module.param(name, init, shape, jnp.float32)
    return gathered(module.get_variable("params", name))


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
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016), computed in float32.

    Attributes:
        axes: of x that the scale covers; the mean is over the last.
        bias: whether LayerNorm has one.
    """

    kind: NormKind
    eps: float
    axes: int = 1
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape, is_layer, is_offset = x.shape[-self.axes :], self.kind == "layer", self.kind == "offset"
        init = nn.initializers.zeros if is_offset else nn.initializers.ones
        scale = leaf(self, "scale", init, shape).astype(jnp.float32) + is_offset
        h = x.astype(jnp.float32)
        if is_layer:
            h -= h.mean(-1, keepdims=True)
        h *= jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        h = h * scale
        if is_layer and self.bias:
            h += leaf(self, "bias", nn.initializers.zeros, shape).astype(jnp.float32)
        return h.astype(x.dtype)


def rotate(x: Array, table: tuple[Array, Array], interleaved: bool = False) -> Array:
    """Rotate the first `dim` channels of x [B, T, H, C], as pairs the two halves or, if interleaved, neighbours."""
    cos, sin = (t.astype(x.dtype) for t in table)
    half = cos.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    if interleaved:
        x1, x2 = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
        turned = jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
        return jnp.concatenate([turned.reshape(*x.shape[:-1], 2 * half), rest], axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)


class Attention(nn.Module):
    spec: BlockSpec
    implementation: str
    std: float

    @nn.compact
    def __call__(self, x: Array, ctx: Context, cache: Any, layer: Array) -> tuple[Array, Any]:
        s = self.spec
        b, t, d = x.shape
        q, k, v = (checkpoint_name(y, "qkv") for y in self._qkv(x, ctx.keys))
        if s.qk_norm:
            q, k = self._normed(q, "q_norm"), self._normed(k, "k_norm")
        if s.rope is not None:
            table, heat = ctx.ropes[str(s.rope)]
            q, k = (rotate(x, table, s.rope.interleaved) for x in (q, k))
            q = q if heat is None else q * heat.astype(q.dtype)
        scores = {"scale": score_scale(s), "softcap": s.softcap, "window": s.window, "bias": ctx.bias}
        if s.sinks:
            init = nn.initializers.normal(self.std)
            scores["sinks"] = leaf(self, "sinks", init, (s.heads,)).astype(jnp.float32)
        if cache is not None:
            cache = write_cache(cache, k, v, ctx.positions, layer)
        if cache is None or ctx.positions is None:
            out = attend_tokens(
                q, k, v, segments=ctx.segments, implementation=self.implementation, causal=s.causal, **scores
            )
        else:
            out = attend_cache(q, cache["k"][layer], cache["v"][layer], ctx.positions, **scores)
        return Linear(d, s.o_bias, self.std, name="o_proj")(out.reshape(b, t, -1), ctx.keys), cache

    def _qkv(self, x: Array, keys: Keys) -> list[Array]:
        """x [B, T, D] -> q [B, T, H, C], k and v [B, T, G, C]."""
        s = self.spec
        heads = (s.heads, s.kv_heads, s.kv_heads)
        if s.fused_qkv:
            qkv = Linear(sum(heads) * s.head_dim, s.qkv_bias, self.std, name="qkv_proj")(x, keys)
            qkv = qkv.reshape(*x.shape[:2], -1, s.head_dim)
            if s.fused_qkv == "heads":
                return [qkv[:, :, i::3] for i in range(3)]
            return jnp.split(qkv, np.cumsum(heads)[:2], axis=2)
        return [
            Linear(n * s.head_dim, s.qkv_bias, self.std, name=name)(x, keys).reshape(*x.shape[:2], n, s.head_dim)
            for n, name in zip(heads, ("q_proj", "k_proj", "v_proj"), strict=True)
        ]

    def _normed(self, x: Array, name: str) -> Array:
        """Normalise q or k [B, T, H, C]."""
        s = self.spec
        if s.qk_norm == "width":
            return Norm(s.norm, s.eps, name=name)(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
        by_head = s.qk_norm == "heads"
        return Norm(s.norm, s.eps, axes=1 + by_head, bias=s.norm_bias and not by_head, name=name)(x)


def score_scale(spec: BlockSpec) -> float:
    """What multiplies q.k."""
    return spec.head_dim**-0.5 if spec.scale is None else spec.scale


class CrossAttention(nn.Module):
    """Attention over an encoder's states (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3).

    Every token sees all of the text; nothing tells positions. Keys and values are the same for all tokens, so the cache
    holds them from the first.
    """

    spec: BlockSpec
    std: float

    @nn.compact
    def __call__(self, x: Array, ctx: Context, cache: Any, layer: Array) -> tuple[Array, Any]:
        s = self.spec

        def heads(y, n, name):
            y = Linear(n * s.head_dim, s.qkv_bias, self.std, name=name)(y, ctx.keys)
            return checkpoint_name(y.reshape(*y.shape[:2], n, s.head_dim), "qkv")

        q = heads(x, s.heads, "q_proj")
        if ctx.source is not None:
            kv = {f"source_{n}": heads(ctx.source, s.kv_heads, f"{n}_proj") for n in ("k", "v")}
            if cache is not None:
                cache = cache | {n: cache[n].at[layer].set(y.astype(cache[n].dtype)) for n, y in kv.items()}
        else:
            kv = {n: cache[n][layer] for n in ("source_k", "source_v")}
        out = attend_source(q, kv["source_k"], kv["source_v"], ctx.seen, score_scale(s))
        return Linear(x.shape[-1], s.o_bias, self.std, name="o_proj")(out.reshape(*x.shape[:2], -1), ctx.keys), cache


def write_cache(cache: dict[str, Array], k: Array, v: Array, positions: Array | None, layer: Array) -> dict[str, Array]:
    """Put k, v [B, T, G, C] into slots `positions` of cache [L, B, S, G, C]; None: into the first T slots."""

    def write(slots: Array, new: Array) -> Array:
        new = new.astype(slots.dtype)
        if positions is None:
            return jax.lax.dynamic_update_slice(slots, new[None], (layer, 0, 0, 0, 0))
        b, t = new.shape[:2]
        if t == 1 and b <= 32 and jax.default_backend() == "cpu":
            # One token a row: XLA's scatter would take a tenth of a decoding step, a slice for each row almost nothing.
            for row in range(b):
                at = (layer, row, positions[row, 0], 0, 0)
                slots = jax.lax.dynamic_update_slice(slots, new[None, row : row + 1], at)
            return slots
        rows = jnp.arange(b)[:, None]
        return slots.at[layer, rows, positions].set(new)

    return cache | {"k": write(cache["k"], k), "v": write(cache["v"], v)}


class Mlp(nn.Module):
    spec: BlockSpec
    std: float
    width: int

    @nn.compact
    def __call__(self, x: Array, keys: Keys) -> Array:
        s = self.spec

        def linear(width, name):
            return checkpoint_name(Linear(width, s.mlp_bias, self.std, name=name)(x, keys), "mlp")

        act = ACTIVATIONS[s.act]
        if s.fused_gate_up:
            gate, up = jnp.split(linear(2 * self.width, "gate_up_proj"), 2, axis=-1)
            h = act(gate) * up
        else:
            h = linear(self.width, "up_proj")
            h = act(linear(self.width, "gate_proj")) * h if s.gated else act(h)
        return Linear(x.shape[-1], s.mlp_bias, self.std, name="down_proj")(h, keys)


class Experts(nn.Module):
    """Mixture of experts (Jiang et al. 2024, arXiv:2401.04088, section 2.1): a token's likeliest, weighted.

    Tokens are sorted by expert, so that each projection is one grouped product. The matrices may be polymorphic leaves
    with an axis of experts after that of the layers; the router is a plain array.

    Where the spec has `pairs` (a, most), gates g and ups u are clamped (g from above, u on both sides) and give
    (u + 1) g sigmoid(a g), as in gpt-oss.
    """

    spec: BlockSpec
    std: float

    @nn.compact
    def __call__(self, x: Array, keys: Keys) -> Array:
        s, d = self.spec, x.shape[-1]
        init = nn.initializers.normal(self.std)
        tokens = x.reshape(-1, d)
        scores = checkpoint_name(tokens @ leaf(self, "router", init, (d, s.experts)).astype(x.dtype), "mlp")
        if s.experts_bias:
            scores += leaf(self, "router_bias", nn.initializers.zeros, (s.experts,)).astype(x.dtype)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(scores.astype(jnp.float32)), s.experts_per_token)
        if s.norm_topk:
            weights /= weights.sum(-1, keepdims=True)
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=s.experts)

        def grouped(h, name, width):
            w = leaf(self, name, init, (s.experts, h.shape[-1], width))
            y = checkpoint_name(grouped_dot(h, w, sizes), "mlp")
            if s.experts_bias:
                biases = leaf(self, f"{name}_bias", nn.initializers.zeros, (s.experts, width)).astype(h.dtype)
                y += biases[chosen.reshape(-1)[order]]
            return y

        h = self._gated(grouped(tokens[order // s.experts_per_token], "gate_up_experts", 2 * s.mlp))
        h = grouped(h, "down_experts", d)[jnp.argsort(order)].reshape(*chosen.shape, d)
        out = (h * weights[..., None].astype(x.dtype)).sum(1).reshape(x.shape)
        if s.shared:
            gate = checkpoint_name(Linear(1, std=self.std, name="shared_gate")(x, keys), "mlp")
            shared = checkpoint_name(Mlp(s, self.std, s.shared, name="shared")(x, keys), "mlp")
            out += jax.nn.sigmoid(gate) * shared
        return out

    def _gated(self, gate_up: Array) -> Array:
        """[N, 2 I] -> [N, I]."""
        s = self.spec
        if s.pairs is None:
            gate, up = jnp.split(gate_up, 2, axis=-1)
            return ACTIVATIONS[s.act](gate) * up
        slope, most = s.pairs
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]
        gate, up = jnp.minimum(gate, most), jnp.clip(up, -most, most)
        return (up + 1) * gate * jax.nn.sigmoid(slope * gate)


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x), with norms and sums where the spec has them; between the two, in an
    encoder-decoder, x + cross-attention(norm x).
    """

    spec: BlockSpec
    implementation: str
    std: float

    @nn.compact
    def __call__(self, x: Array, ctx: Context, cache: Any, layer: Array) -> tuple[Array, Any]:
        s = self.spec

        def norm(y, name, places):
            return Norm(s.norm, s.eps, bias=s.norm_bias, name=name)(y) if s.norms in places else y

        def out_norm(y, name):  # its backward pass reads y; unless y is kept, the product that gave it is recomputed
            after = ("after", "around")
            return norm(checkpoint_name(y, "residual"), name, after) if s.norms in after else y

        before = norm(x, "input_norm", ("before", "around"))
        h, cache = Attention(s, self.implementation, self.std, name="self_attn")(before, ctx, cache, layer)
        h = out_norm(h, "attention_out_norm")
        x, entry = checkpoint_name(x + h * s.residual_scale, "residual"), x
        x = norm(x, "input_norm", ("sums",))
        if s.cross:
            h = norm(x, "cross_norm", ("before", "around"))
            h, cache = CrossAttention(s, self.std, name="cross_attn")(h, ctx, cache, layer)
            x = norm(checkpoint_name(x + h, "residual"), "cross_norm", ("sums",))
        if s.residual == "shared":
            h = before
        else:
            h = norm(entry if s.residual == "parallel" else x, "post_attention_norm", ("before", "around"))
        mlp = Experts(s, self.std, name="mlp") if s.experts else Mlp(s, self.std, s.mlp, name="mlp")
        h = out_norm(mlp(h, ctx.keys), "mlp_out_norm")
        return norm(x + h * s.residual_scale, "post_attention_norm", ("sums",)), cache
