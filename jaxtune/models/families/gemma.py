"""Gemma (arXiv:2403.08295): Llama with norms that multiply by 1 + weight, scaled embeddings and tanh-GELU."""

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import LLAMA as NAMES
from jaxtune.models.spec import BlockSpec, Config, DecoderSpec, uniform

__all__ = ["NAMES", "gemma_block", "gemma_decoder", "spec"]


def gemma_block(c: Config, **changes) -> BlockSpec:
    """The block that the three generations share."""
    c.choice("use_bidirectional_attention", False, (False,))
    bias = c.get("attention_bias", False)
    settings = {"head_dim": c.need("head_dim"), "norm": "offset", "qkv_bias": bias, "o_bias": bias}
    return block(c, **settings | {"kv_heads": c.need("num_key_value_heads")} | changes)


def gemma_decoder(c: Config, segments, **changes) -> DecoderSpec:
    """The model around them."""
    tied, scale = c.get("tie_word_embeddings", True), c.need("hidden_size") ** 0.5
    return decoder(c, segments, norm="offset", tied=tied, embed_scale=scale, scales_prompt=False, **changes)


def spec(c: Config) -> DecoderSpec:
    # Old configs say "gelu" for what was trained as tanh-GELU; transformers reads them so.
    act = c.choice("hidden_act", "gelu_pytorch_tanh", HF_ACTIVATIONS | {"gelu": "gelu_tanh"})
    return gemma_decoder(c, uniform(gemma_block(c, act=act), c.need("num_hidden_layers")))
