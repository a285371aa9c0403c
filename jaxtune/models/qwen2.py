"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama with biases on q, k, v and, if asked, a window in the upper layers."""

from jaxtune.models.llama import block, decoder
from jaxtune.models.names import LLAMA as NAMES
from jaxtune.models.spec import BlockSpec, Config, DecoderSpec, Segment, by_layer

__all__ = ["NAMES", "spec", "windowed"]


def windowed(c: Config, base: dict) -> tuple[Segment, ...]:
    """The body: `layer_types` names each layer's attention; before it existed, `max_window_layers` did."""
    layers = c.need("num_hidden_layers")
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window", False) else None
    default = [
        "sliding_attention" if window is not None and i >= c.get("max_window_layers", 28) else "full_attention"
        for i in range(layers)
    ]
    blocks: list[BlockSpec] = []
    for kind in c.get("layer_types", default):
        Config({"model_type": c.model_type, "layer_types": kind}).choice(
            "layer_types", None, ("full_attention", "sliding_attention")
        )
        blocks.append(block(c, **base, window=window if kind == "sliding_attention" else None))
    return by_layer(blocks)


def spec(c: Config) -> DecoderSpec:
    return decoder(c, windowed(c, {"qkv_bias": True}))
