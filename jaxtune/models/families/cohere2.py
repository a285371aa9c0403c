"""Cohere 2, Command A (arXiv:2504.00698): three layers with a window and a rope, then one with neither."""

import dataclasses

from jaxtune.models.families.cohere import NAMES, shared_block, shared_decoder
from jaxtune.models.spec import Config, DecoderSpec, by_layer

__all__ = ["NAMES", "spec"]


def spec(c: Config) -> DecoderSpec:
    every, window = c.get("sliding_window_pattern", 4), c.stated("sliding_window", 4096)
    default = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(c.need("num_hidden_layers"))]
    local = shared_block(c, c.need("hidden_size") // c.need("num_attention_heads"), 1e4, window=window)
    whole = dataclasses.replace(local, rope=None, window=None)
    kinds = c.layer_types(default)
    return shared_decoder(c, by_layer([local if kind == "sliding_attention" else whole for kind in kinds]))
