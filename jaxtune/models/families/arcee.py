"""Arcee's AFM: Llama with a plain feed-forward part whose activation is ReLU squared (arXiv:2109.08668)."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import LLAMA, PROJECTIONS, linears
from jaxtune.models.spec import Config, DecoderSpec, uniform

_GATE = linears({"mlp.gate_proj": PROJECTIONS["mlp.gate_proj"]})
NAMES = dataclasses.replace(LLAMA, block={hf: path for hf, path in LLAMA.block.items() if hf not in _GATE})


def spec(c: Config) -> DecoderSpec:
    bias, eps = c.get("attention_bias", False), c.get("rms_norm_eps", 1e-5)
    act = c.choice("hidden_act", "relu2", HF_ACTIVATIONS)
    mlp = {"act": act, "gated": False, "mlp_bias": c.get("mlp_bias", False)}
    b = block(c, qkv_bias=bias, o_bias=bias, eps=eps, **mlp)
    return decoder(c, uniform(b, c.need("num_hidden_layers")), eps=eps)
