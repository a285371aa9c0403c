"""OLMoE (arXiv:2409.02060): Llama with norms over all of q and of k, and a mixture of experts."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.families.mixtral import routed
from jaxtune.models.families.qwen2_moe import EXPERTS
from jaxtune.models.names import LLAMA, QK_NORMS, norms
from jaxtune.models.spec import Config, DecoderSpec, uniform

_DENSE = {hf: path for hf, path in LLAMA.block.items() if not hf.startswith("mlp")}
NAMES = dataclasses.replace(LLAMA, block=_DENSE | norms(QK_NORMS) | EXPERTS)


def spec(c: Config) -> DecoderSpec:
    c.choice("clip_qkv", None, (None,))
    bias, eps = c.get("attention_bias", False), c.get("rms_norm_eps", 1e-5)
    experts = next((k for k in ("num_local_experts", "num_experts") if c.get(k) is not None), "num_experts")
    part = routed(c, experts, c.get("norm_topk_prob", False))
    b = block(c, qk_norm="width", qkv_bias=bias, o_bias=bias, eps=eps, **part)
    return decoder(c, uniform(b, c.need("num_hidden_layers")), eps=eps)
