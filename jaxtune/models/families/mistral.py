"""Mistral (arXiv:2310.06825): Llama with a sliding window."""

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA as NAMES
from jaxtune.models.spec import Config, DecoderSpec, uniform

__all__ = ["NAMES", "spec"]


def spec(c: Config) -> DecoderSpec:
    # MistralConfig's own default; an explicit null means no window.
    window = c.values.get("sliding_window", 4096)
    b = block(c, kv_heads=c.need("num_key_value_heads"), window=window)
    return decoder(c, uniform(b, c.need("num_hidden_layers")))
