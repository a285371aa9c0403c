"""OLMo 2 (arXiv:2501.00656): Llama with norms after each part, and over all of q and of k."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA, PROJECTIONS, QK_NORMS, linears, norms
from jaxtune.models.spec import Config, DecoderSpec, uniform

_AFTER = {"post_attention_layernorm": "attention_out_norm", "post_feedforward_layernorm": "mlp_out_norm"}
NAMES = dataclasses.replace(LLAMA, block=norms(_AFTER | QK_NORMS) | linears(PROJECTIONS))


def spec(c: Config) -> DecoderSpec:
    bias, eps = c.get("attention_bias", False), c.get("rms_norm_eps", 1e-5)
    b = block(c, norms="after", qk_norm="width", qkv_bias=bias, o_bias=bias, eps=eps)
    return decoder(c, uniform(b, c.need("num_hidden_layers")), eps=eps)
