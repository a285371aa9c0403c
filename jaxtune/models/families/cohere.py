"""Cohere's Command R: parallel residuals behind one LayerNorm without a bias, interleaved ropes, scaled logits."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA, PROJECTIONS, QK_NORMS, linears, norms
from jaxtune.models.spec import BlockSpec, Config, DecoderSpec, uniform

NAMES = dataclasses.replace(LLAMA, block=norms({"input_layernorm": "input_norm"} | QK_NORMS) | linears(PROJECTIONS))


def shared_block(c: Config, head_dim: int, theta: float, **changes) -> BlockSpec:
    """The block of both generations, whose ropes have another base where a config names none."""
    bias = c.get("attention_bias", False)
    norm = {"norm": "layer", "norm_bias": False, "eps": c.get("layer_norm_eps", 1e-5), "residual": "shared"}
    settings = {"head_dim": head_dim, "rope": c.rope(head_dim, theta=theta, interleaved=True)}
    return block(c, **settings | norm | {"qkv_bias": bias, "o_bias": bias} | changes)


def shared_decoder(c: Config, segments) -> DecoderSpec:
    """The model around them."""
    norm = {"norm": "layer", "norm_bias": False, "eps": c.get("layer_norm_eps", 1e-5)}
    tied, divisor = c.get("tie_word_embeddings", True), 1 / c.stated("logit_scale", 0.0625)
    return decoder(c, segments, tied=tied, logits_divisor=divisor, **norm)


def spec(c: Config) -> DecoderSpec:
    head_dim = c.get("head_dim", c.need("hidden_size") // c.need("num_attention_heads"))
    b = shared_block(c, head_dim, 5e5, qk_norm="heads" if c.get("use_qk_norm", False) else "")
    return shared_decoder(c, uniform(b, c.need("num_hidden_layers")))
