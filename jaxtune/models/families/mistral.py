"""Mistral (arXiv:2310.06825): Llama with a sliding window."""

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA as NAMES
from jaxtune.models.spec import Config, DecoderSpec, by_layer

__all__ = ["NAMES", "spec"]


def spec(c: Config) -> DecoderSpec:
    # MistralConfig's own default; an explicit null means no window.
    window = c.values.get("sliding_window", 4096)
    # With layer_types transformers builds Ministral, whose layers may differ in their window.
    kinds = c.layer_types(["sliding_attention"] * c.need("num_hidden_layers"))
    blocks = [
        block(c, kv_heads=c.need("num_key_value_heads"), window=window if kind == "sliding_attention" else None)
        for kind in kinds
    ]
    return decoder(c, by_layer(blocks))
