"""An encoder-decoder: a `Decoder` whose blocks also attend to the states of an `Encoder` that reads another text.

The parameters are the decoder's, with the encoder's below `encoder`; both read one table of tokens:

    embed_tokens/embedding [V,D]
    encoder/segment_0/block_0/self_attn/q_proj/kernel [n,D,H*C] ...    encoder/norm/scale [D]
    segment_0/block_0/cross_attn/q_proj/kernel [n,D,H*C] ...           beside the decoder's others
    (relative_bias/embedding, encoder/relative_bias/embedding [buckets,H])
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtune.errors import UserError
from jaxtune.models.decoder import Decoder
from jaxtune.models.encoder import Encoder
from jaxtune.models.layers import Block, Context
from jaxtune.models.names import NameTable
from jaxtune.weights.leaf import Array, Keys, fold


class Seq2Seq(Decoder):
    """A model that writes a target after reading a source.

    `module.apply({"params": params}, tokens, source=(tokens, segments))` gives logits of the target's tokens. A target
    begins with `spec.start`.
    """

    reads_source = True
    auto_class = "AutoModelForSeq2SeqLM"
    task_type = "SEQ_2_SEQ_LM"

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        cache: Any = None,
        keys: Keys = None,
        source: tuple[Array, Array] | None = None,
    ) -> Any:
        """tokens i32[B, T] -> logits f32[B, T, V]; with a cache `(logits, cache)`. Arguments as in `hidden`."""
        out = self.hidden(tokens, positions, segments, cache, keys, source)
        if cache is None:
            return self.head(out)
        return self.head(out[0]), out[1]

    @nn.nowrap
    def without_head(self) -> Any:
        raise UserError(
            "An encoder-decoder without its output head is not supported; give a checkpoint or an adapter of the whole "
            "model (...ForConditionalGeneration)."
        )

    def slots(self, cache: Any) -> int:
        return super().slots(cache["blocks"])

    def init_cache(self, batch: int, slots: int, source: int = 0) -> Any:
        """Zeros for `slots` positions of the target and `source` tokens of the source."""

        def held(repeats, block):
            wide = {"k": slots, "v": slots, "source_k": source, "source_v": source}
            lead, rest = (repeats, batch), (block.kv_heads, block.head_dim)
            return {name: jnp.zeros((*lead, width, *rest), self.dtype) for name, width in wide.items()}

        blocks = tuple(tuple(held(s.repeats, b) for b in s.pattern) for s in self.spec.segments)
        return {"blocks": blocks, "seen": jnp.zeros((batch, source), jnp.int32)}

    def _over_source(
        self,
        x: Array,
        positions: Array,
        context: Context,
        cache: Any,
        source: tuple[Array, Array] | None,
        table: Any,
    ) -> tuple[Array, Any]:
        """Run the decoder's blocks over the encoder's states, which are computed if `source` is given."""
        states, seen = None, None if cache is None else cache["seen"]
        if source is not None:
            tokens, seen = source
            fields = {name: getattr(self, name) for name in ("dtype", "attention", "remat", "unroll")}
            encoder = Encoder(self.spec.encoder, **fields, name="encoder")
            states = encoder.hidden(tokens, segments=seen, keys=fold(context.keys, "encoder"), table=table)
        context = context._replace(source=states, seen=seen)
        x, blocks = self.run(Block, x, positions, context, None if cache is None else cache["blocks"])
        return x, None if cache is None else {"blocks": blocks, "seen": seen}

    def drawn(self, entries: Mapping[str, Any], table: NameTable, key: Array | None) -> dict[str, Array]:
        """A bias of the logits that a checkpoint lacks is 0."""
        lost = [path for hf, path in table.top.items() if path == "logits_bias/bias" and hf not in entries]
        return {path: jnp.zeros((1, self.spec.vocab)) for path in lost if self.spec.logits_bias}

    def init_params(self, key: Array) -> Any:
        """Random float32 parameters, as for pretraining."""
        tokens = jnp.zeros((1, 2), jnp.int32)
        return self.init(key, tokens, source=(tokens, tokens + 1), method="hidden")["params"]
