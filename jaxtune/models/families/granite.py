"""Granite 3: Llama with multipliers on embeddings, scores, residuals and logits (arXiv:2412.11385)."""

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA as NAMES
from jaxtune.models.spec import Config, DecoderSpec, uniform

__all__ = ["NAMES", "spec"]


def spec(c: Config) -> DecoderSpec:
    bias = c.get("attention_bias", False)
    b = block(
        c,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=c.get("mlp_bias", False),
        scale=float(c.get("attention_multiplier", 1.0)),
        residual_scale=float(c.get("residual_multiplier", 1.0)),
    )
    return decoder(
        c,
        uniform(b, c.need("num_hidden_layers")),
        embed_scale=float(c.get("embedding_multiplier", 1.0)),
        logits_divisor=float(c.get("logits_scaling", 1.0)),
    )
