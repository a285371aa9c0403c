"""One decoder for every causal family: an embedding, segments of stacked blocks under `scan`, a norm, a head.

The parameters are a plain nested dict:

    embed_tokens/embedding [V,D]        (embed_positions/embedding [P,D])
    segment_0/block_0/self_attn/q_proj/kernel [n,D,H*C] ...    n = repeats of the segment, on axis 0
    norm/scale [D]
    lm_head/kernel [D,V] (bias [V])     absent when the head is tied to the embedding
"""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtune.errors import UserError
from jaxtune.models.body import DEPTHS, Body
from jaxtune.models.body import REMAT as REMAT
from jaxtune.models.layers import Block, Context, Norm, leaf
from jaxtune.models.names import NameTable
from jaxtune.models.spec import DecoderSpec
from jaxtune.tree import split_stack
from jaxtune.weights.leaf import Array, Keys, attend, dot, embed


class Decoder(Body):
    """A causal language model.

    `module.apply({"params": params}, tokens, ...)` gives logits; `method="hidden"` stops before the head and
    `method="head"` is the rest. Leaves of `params` may be polymorphic (`jaxtune.weights`). The attributes are `Body`'s.
    """

    spec: DecoderSpec

    continues = True
    is_encoder = False
    auto_class = "AutoModelForCausalLM"
    task_type = "CAUSAL_LM"

    def names(self, table: NameTable) -> NameTable:
        return table

    @nn.nowrap  # it is called on an unbound module
    def without_head(self) -> "HeadlessDecoder":
        """The same decoder as one that gives hidden states."""
        fields = {name: getattr(self, name) for name in BODY_FIELDS}
        return HeadlessDecoder(**fields | {"spec": dataclasses.replace(self.spec, tied=True)})

    @nn.compact
    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        cache: Any = None,
        keys: Keys = None,
        source: tuple[Array, Array] | None = None,
    ) -> Any:
        """tokens i32[B, T] -> the normalised residual stream [B, T, D] (and the new cache, when one is given).

        Args:
            tokens: i32[B, T].
            positions: i32[B, T]; default 0..T-1.
            segments: i32[B, T], packed documents; None: one document a row, padding on the right.
            cache: from `init_cache`. `positions` are then the slots to write, all below its size, and tokens also see
                all slots below theirs; without positions the tokens are the first ones and see each other only. A rope
                that depends on the text's length uses the cache's size instead, so that it stays the same.
            keys: one PRNG key a row, [B]; None switches every dropout off.
            source: of an encoder-decoder, the encoder's tokens i32[B, S], and segments i32[B, S], 1 at text and 0 at
                padding; None: what is needed of them is in the cache.
        """
        spec = self.spec
        slots = positions
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
        table = None if self.start else self.table("embed_tokens", spec.vocab)
        x = tokens.astype(self.dtype) if self.start else self._embedded(tokens, positions, table)
        if spec.embed_norm and not self.start:
            x = Norm(spec.norm, spec.eps, bias=spec.norm_bias, name="embed_norm")(x)
        self.sow(DEPTHS, "embedded", x)
        context = Context(slots, segments, {}, keys, self._bias(tokens, slots, cache))
        if spec.encoder is None:
            x, cache = self.run(Block, x, positions, context, cache)
        else:
            x, cache = self._over_source(x, positions, context, cache, source, table)
        if self.stop is not None:
            return x
        if spec.last_norm:
            x = Norm(spec.norm, spec.eps, bias=spec.norm_bias, name="norm")(x)
        if self.is_initializing() and not spec.tied:
            self._head_kernel()
        if self.is_initializing() and spec.logits_bias:
            LogitsBias(spec.vocab, name="logits_bias")()
        return x if cache is None else (x, cache)

    def head(self, x: Array) -> Array:
        """Hidden states [..., D] -> logits f32[..., V]."""
        return head_logits(head_leaf(self.variables["params"]), x, self.spec)

    def __call__(self, tokens: Array, positions=None, segments=None, cache=None, keys=None) -> Any:
        """tokens i32[B, T] -> logits f32[B, T, V]; with a cache `(logits, cache)`. Arguments as in `hidden`."""
        out = self.hidden(tokens, positions, segments, cache, keys)
        if cache is None:
            return self.head(out)
        return self.head(out[0]), out[1]

    def slots(self, cache: Any) -> int:
        """The slots of a cache."""
        return jax.tree.leaves(cache)[0].shape[2]

    def init_cache(self, batch: int, slots: int) -> Any:
        """Zeros for `slots` positions: a tuple over segments and pattern of {k, v} [n, B, S, G, C]."""
        return tuple(
            tuple(
                {n: jnp.zeros((s.repeats, batch, slots, b.kv_heads, b.head_dim), self.dtype) for n in ("k", "v")}
                for b in s.pattern
            )
            for s in self.spec.segments
        )

    def _bias(self, tokens: Array, slots: Array | None, cache: Any) -> Array | None:
        if cache is None or slots is None:
            return self.bias(tokens.shape[1])
        return self.bias(self.slots(cache), slots)

    def _embedded(self, tokens: Array, positions: Array, table: Any) -> Array:
        spec = self.spec
        scale = spec.embed_scale
        if not spec.scales_prompt:
            scale = jnp.where(tokens < spec.vocab, scale, 1.0).astype(self.dtype)[..., None]
        x = embed(tokens, table).astype(self.dtype) * scale
        if spec.learned_positions:
            table = self.table("embed_positions", spec.first_position + spec.positions)
            x += embed(positions + spec.first_position, table).astype(self.dtype)
        return x

    def _head_kernel(self) -> Any:
        spec = self.spec
        return Kernel(spec.width, spec.vocab, spec.init_std, spec.head_bias, name="lm_head")()


class Kernel(nn.Module):
    width: int
    features: int
    std: float
    bias: bool

    @nn.compact
    def __call__(self):
        if self.bias:
            leaf(self, "bias", nn.initializers.zeros, (self.features,))
        return leaf(self, "kernel", nn.initializers.normal(self.std), (self.width, self.features))


class LogitsBias(nn.Module):
    vocab: int

    @nn.compact
    def __call__(self):
        return leaf(self, "bias", nn.initializers.zeros, (1, self.vocab))


def head_leaf(params: Any) -> dict[str, Any]:
    """The output head in a tree: `{"kernel": [D,V]}` or, if tied, `{"embedding": [V,D]}`, maybe with `"bias"`, [V] or
    [1,V].
    """
    head = params["lm_head"] if "lm_head" in params else {"embedding": params["embed_tokens"]["embedding"]}
    return head | params.get("logits_bias", {})


def head_logits(head: dict[str, Any], x: Array, spec: DecoderSpec | None = None) -> Array:
    """x [..., D] -> logits f32[..., V]; with `spec`, scaled and capped as its model has them."""
    logits = (dot(x, head["kernel"]) if "kernel" in head else attend(x, head["embedding"])).astype(jnp.float32)
    if "bias" in head:
        logits += head["bias"].astype(jnp.float32)
    if spec is None:
        return logits
    if spec.logits_divisor != 1.0:
        logits /= spec.logits_divisor
    return logits if spec.logits_softcap is None else spec.logits_softcap * jnp.tanh(logits / spec.logits_softcap)


def split(module: Decoder, params: Any, at: int) -> tuple[Decoder, Any]:
    """Cut the segment that holds layer `at` in two, so that rules can treat layers below and above differently.

    The model computes the same; the tree has one more segment. `at` must fall between two repeats of a pattern.
    """
    segments, out = [], {k: v for k, v in params.items() if not k.startswith("segment_")}
    first = 0
    for i, segment in enumerate(module.spec.segments):
        tree = params[f"segment_{i}"]
        parts = [(segment, tree)]
        if 0 < at - first < segment.layers:
            inside, remainder = divmod(at - first, len(segment.pattern))
            if remainder:
                raise UserError(
                    f"Layer {at} lies inside a pattern of {len(segment.pattern)} blocks; split at its edge."
                )
            low, high = split_stack(tree, inside)
            parts = [
                (dataclasses.replace(segment, repeats=inside), low),
                (dataclasses.replace(segment, repeats=segment.repeats - inside), high),
            ]
        for part, subtree in parts:
            out[f"segment_{len(segments)}"] = subtree
            segments.append(part)
        first += segment.layers
    spec = dataclasses.replace(module.spec, segments=tuple(segments))
    return module.clone(spec=spec), out


class HeadlessDecoder(Decoder):
    """A decoder whose result is its hidden states: a checkpoint's output head is not read."""

    continues = False
    auto_class = "AutoModel"
    task_type = "FEATURE_EXTRACTION"

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        """tokens i32[B, T] -> hidden states [B, T, D]. Arguments as in `hidden`."""
        return self.hidden(*inputs, **more)

    def names(self, table: NameTable) -> NameTable:
        top = {hf: path for hf, path in table.top.items() if not path.startswith("lm_head/")}
        heads = "|".join(re.escape(hf) for hf in table.top.keys() - top.keys())
        return dataclasses.replace(table, top=top, bare=True, ignored=f"{table.ignored}|{heads}")


BODY_FIELDS = ("spec", "dtype", "attention", "most_segments", "remat", "unroll", "start", "stop")
