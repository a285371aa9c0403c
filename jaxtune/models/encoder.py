"""One bidirectional encoder: embeddings and their norm, segments of stacked blocks under `scan`, maybe a last norm.

The parameters are a plain nested dict:

    embed_tokens/embedding [V,D]        (embed_positions/embedding [P,D], embed_types/embedding [S,D])
    embed_norm/scale, bias [D]          (embed_project/kernel [E,D], bias [D] where the tables are E wide)
    segment_0/block_0/self_attn/q_proj/kernel [n,D,H*C] ...    n = repeats of the segment, on axis 0
    norm/scale [D]                      where blocks normalise what they read
"""

import dataclasses
import json
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune.models.body import DEPTHS, Body
from jaxtune.models.layers import Attention, Context, Linear, Mlp, Norm
from jaxtune.models.spec import BlockSpec, Relative, Segment
from jaxtune.weights.leaf import Array, Keys, embed


@dataclasses.dataclass(frozen=True)
class EncoderBlockSpec(BlockSpec):
    """One block that sees both directions; the defaults are BERT's.

    Attributes:
        post_norm: norms follow each residual sum, as in the first transformer; otherwise they precede each part.
        attn_norm: whether a norm belongs to the attention at all (the first block of ModernBERT has none).
        norm_bias: whether norms have a bias.
    """

    norm: Literal["rms", "layer"] = "layer"
    eps: float = 1e-12
    act: str = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    o_bias: bool = True
    mlp_bias: bool = True
    causal: bool = False
    post_norm: bool = True
    attn_norm: bool = True
    norm_bias: bool = True


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """A bidirectional model without a head.

    Attributes:
        vocab: rows of the embedding table.
        width: D, channels of the residual stream.
        segments: the body, lowest first.
        positions: tokens of the longest sequence.
        config: the HF config.json, as text (so that the spec stays hashable).
        learned_positions: whether a table of position embeddings is added to the tokens'.
        first_position: row of that table for a sequence's first token.
        types: rows of the table of segment types; 0: there is none.
        embed_width: channels of the tables; a matrix leads to the residual stream's. None: there are as many.
        last_norm: whether a norm follows the last block.
        tied: an encoder has no output head to tie.
        embed_norm: whether a norm follows the embeddings.
        embed_scale: multiplies the tokens' embeddings.
        relative: the bias of scores by distance; None: there is none.
    """

    vocab: int
    width: int
    segments: tuple[Segment, ...]
    positions: int
    config: str
    learned_positions: bool = True
    first_position: int = 0
    types: int = 0
    embed_width: int | None = None
    last_norm: bool = False
    norm: Literal["rms", "layer"] = "layer"
    eps: float = 1e-12
    norm_bias: bool = True
    init_std: float = 0.02
    tied: bool = False
    embed_norm: bool = True
    embed_scale: float = 1.0
    relative: Relative | None = None

    @property
    def layers(self) -> int:
        return sum(s.layers for s in self.segments)

    @property
    def hf_config(self) -> dict:
        return json.loads(self.config)


class EncoderBlock(nn.Module):
    """Attention and feed-forward part, each with its residual sum and norm."""

    spec: EncoderBlockSpec
    implementation: str
    std: float

    @nn.compact
    def __call__(self, x: Array, ctx: Context, cache: None, layer: Array) -> tuple[Array, None]:
        s = self.spec

        def attention(h):
            return Attention(s, self.implementation, self.std, name="self_attn")(h, ctx, cache, layer)[0]

        def mlp(h):
            return Mlp(s, self.std, s.mlp, name="mlp")(h, ctx.keys)

        def norm(name, h):
            return Norm(s.norm, s.eps, bias=s.norm_bias, name=name)(h)

        # A norm's backward pass reads its input; unless the sums are kept, the products before them are recomputed.
        if s.post_norm:
            x = norm("attn_norm", checkpoint_name(x + attention(x), "residual"))
            return norm("mlp_norm", checkpoint_name(x + mlp(x), "residual")), cache
        x = checkpoint_name(x + attention(norm("attn_norm", x) if s.attn_norm else x), "residual")
        return x + mlp(norm("mlp_norm", x)), cache


class Encoder(Body):
    """A bidirectional model: `module.apply({"params": params}, tokens, ...)` gives the last hidden states.

    Leaves of `params` may be polymorphic (`jaxtune.weights.leaf`). The attributes are `Body`'s.
    """

    spec: EncoderSpec

    @nn.compact
    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        keys: Keys = None,
        types: Array | None = None,
        table: Any = None,
    ) -> Array:
        """tokens i32[B, T] -> the last hidden states [B, T, D].

        Args:
            tokens: i32[B, T].
            positions: i32[B, T], counted from 0 in each row; default 0..T-1.
            segments: i32[B, T]: tokens see those of their own number only, so text (1) does not see padding (0), and
                packed texts do not see each other; None: all is one text.
            keys: one PRNG key a row, [B]; None switches every dropout off.
            types: i32[B, T], BERT's token types; default 0.
            table: of the tokens, where a decoder shares its own.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
        x = tokens.astype(self.dtype) if self.start else self._embedded(tokens, positions, types, keys, table)
        self.sow(DEPTHS, "embedded", x)
        return self.blocks(x, positions, segments, keys)

    def blocks(self, x: Array, positions: Array, segments: Array | None, keys: Keys) -> Array:
        """Embeddings [B, T, D] -> the last hidden states [B, T, D]."""
        spec = self.spec
        x, _ = self.run(EncoderBlock, x, positions, Context(None, segments, {}, keys, self.bias(x.shape[1])))
        if not spec.last_norm or self.stop is not None:
            return x
        return Norm(spec.norm, spec.eps, bias=spec.norm_bias, name="norm")(x)

    def __call__(self, tokens: Array, positions=None, segments=None, keys=None, types=None) -> Array:
        """The same as `hidden`."""
        return self.hidden(tokens, positions, segments, keys, types)

    def _embedded(self, tokens: Array, positions: Array, types: Array | None, keys: Keys, table: Any = None) -> Array:
        spec = self.spec
        x = embed(tokens, self.table("embed_tokens", spec.vocab) if table is None else table).astype(self.dtype)
        x = x if spec.embed_scale == 1.0 else x * spec.embed_scale
        if spec.learned_positions:
            table = self.table("embed_positions", spec.first_position + spec.positions)
            x += embed(positions + spec.first_position, table).astype(self.dtype)
        if spec.types:
            table = self.table("embed_types", spec.types)
            x += embed(jnp.zeros_like(tokens) if types is None else types, table).astype(self.dtype)
        if spec.embed_norm:
            x = Norm(spec.norm, spec.eps, bias=spec.norm_bias, name="embed_norm")(x)
        if spec.embed_width in (None, spec.width):
            return x
        return Linear(spec.width, True, spec.init_std, name="embed_project")(x, keys)
