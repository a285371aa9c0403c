"""Seed-OSS: Llama with biases on q, k and v."""

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA as NAMES
from jaxtune.models.spec import Config, DecoderSpec, uniform

__all__ = ["NAMES", "spec"]


def spec(c: Config) -> DecoderSpec:
    c.choice("pretraining_tp", 1, (1,))
    b = block(
        c,
        head_dim=c.stated("head_dim", 128),
        rope=c.rope(c.stated("head_dim", 128)),
        kv_heads=c.need("num_key_value_heads"),
        qkv_bias=c.get("attention_bias", True),
        o_bias=c.get("attention_out_bias", False),
        mlp_bias=c.get("mlp_bias", False),
    )
    return decoder(c, uniform(b, c.need("num_hidden_layers")))
