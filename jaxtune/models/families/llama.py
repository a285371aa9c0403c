"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783)."""

import json

from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import LLAMA as NAMES
from jaxtune.models.spec import BlockSpec, Config, DecoderSpec, uniform

__all__ = ["NAMES", "block", "decoder", "spec"]


def block(c: Config, **changes) -> BlockSpec:
    """The block that Llama's descendants start from."""
    heads = c.need("num_attention_heads")
    head_dim = c.get("head_dim", c.need("hidden_size") // heads)
    if "rope" not in changes:
        changes["rope"] = c.rope(head_dim)
    settings = {
        "heads": heads,
        "kv_heads": c.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        "mlp": c.need("intermediate_size"),
        "eps": c.get("rms_norm_eps", 1e-6),
        "act": c.choice("hidden_act", "silu", HF_ACTIVATIONS),
    }
    return BlockSpec(**settings | changes)


def decoder(c: Config, segments, **changes) -> DecoderSpec:
    """The model around a body of segments."""
    settings = {
        "vocab": c.need("vocab_size"),
        "width": c.need("hidden_size"),
        "segments": segments,
        "positions": c.need("max_position_embeddings"),
        "tied": c.get("tie_word_embeddings", False),
        "config": json.dumps(c.values, sort_keys=True),
        "eps": c.get("rms_norm_eps", 1e-6),
        "init_std": c.get("initializer_range", 0.02),
    }
    return DecoderSpec(**settings | changes)


def spec(c: Config) -> DecoderSpec:
    c.choice("pretraining_tp", 1, (1,))
    bias = c.get("attention_bias", False)
    b = block(c, qkv_bias=bias, o_bias=bias, mlp_bias=c.get("mlp_bias", False))
    return decoder(c, uniform(b, c.need("num_hidden_layers")))
