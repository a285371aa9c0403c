"""Gemma 2 (arXiv:2408.00118): norms around each part, softcaps, every other layer with a window."""

import dataclasses

from jaxtune.models.families.gemma import gemma_block, gemma_decoder
from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import LLAMA, PROJECTIONS, linears, norms
from jaxtune.models.spec import Config, DecoderSpec, by_layer

NORMS_AROUND = {
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "attention_out_norm",
    "pre_feedforward_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "mlp_out_norm",
}
NAMES = dataclasses.replace(LLAMA, block=norms(NORMS_AROUND) | linears(PROJECTIONS))


def around(c: Config) -> dict:
    """The fields of blocks of Gemma 2 and 3 beyond Gemma's."""
    act = c.choice("hidden_activation", "gelu_pytorch_tanh", HF_ACTIVATIONS)
    return {"norms": "around", "act": act, "scale": c.get("query_pre_attn_scalar", 256) ** -0.5}


def spec(c: Config) -> DecoderSpec:
    # An explicit null means none; an absent key means the default.
    window, softcap = c.values.get("sliding_window", 4096), c.values.get("attn_logit_softcapping", 50.0)
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(c.need("num_hidden_layers"))]
    blocks = [
        gemma_block(c, **around(c), softcap=softcap, window=window if kind == "sliding_attention" else None)
        for kind in c.layer_types(default)
    ]
    return gemma_decoder(c, by_layer(blocks), logits_softcap=c.values.get("final_logit_softcapping", 30.0))
