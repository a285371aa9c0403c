"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama with biases on q, k, v and, if asked, a window in the upper layers."""

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA as NAMES
from jaxtune.models.spec import Config, DecoderSpec, Segment, by_layer

__all__ = ["NAMES", "spec", "windowed"]


def windowed(c: Config, base: dict) -> tuple[Segment, ...]:
    """The body: `layer_types` names each layer's attention; before it existed, `max_window_layers` did."""
    layers = c.need("num_hidden_layers")
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window", False) else None
    default = [
        "sliding_attention" if window is not None and i >= c.get("max_window_layers", 28) else "full_attention"
        for i in range(layers)
    ]
    heads = c.need("num_key_value_heads")
    return by_layer(
        [
            block(c, **base, kv_heads=heads, window=window if kind == "sliding_attention" else None)
            for kind in c.layer_types(default)
        ]
    )


def spec(c: Config) -> DecoderSpec:
    return decoder(c, windowed(c, {"qkv_bias": True}))
