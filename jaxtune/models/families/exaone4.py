"""EXAONE 4 (arXiv:2507.11407): norms behind each part and over heads; beside windows, global layers have no rope."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.families.olmo2 import NAMES
from jaxtune.models.spec import Config, DecoderSpec, by_layer

__all__ = ["NAMES", "spec"]


def spec(c: Config) -> DecoderSpec:
    layers, eps = c.need("num_hidden_layers"), c.get("rms_norm_eps", 1e-5)
    window = c.values.get("sliding_window", 4096)  # null: no layer has one
    every = c.get("sliding_window_pattern", 4) if window else 0
    default = ["sliding_attention" if every and (i + 1) % every else "full_attention" for i in range(layers)]
    b = block(c, kv_heads=c.need("num_key_value_heads"), norms="after", qk_norm="head", eps=eps)
    kinds = {
        "sliding_attention": dataclasses.replace(b, window=window),
        "full_attention": dataclasses.replace(b, rope=None if window else b.rope),
    }
    return decoder(c, by_layer([kinds[kind] for kind in c.layer_types(default)]), eps=eps)
