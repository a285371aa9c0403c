"""Phi-3 and Phi-4 (arXiv:2404.14219): Llama with fused q, k, v and fused gate, up."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA, NORMS, linears, norms
from jaxtune.models.spec import Config, DecoderSpec, uniform

_FUSED = {
    "self_attn.qkv_proj": "self_attn/qkv_proj",
    "self_attn.o_proj": "self_attn/o_proj",
    "mlp.gate_up_proj": "mlp/gate_up_proj",
    "mlp.down_proj": "mlp/down_proj",
}
NAMES = dataclasses.replace(LLAMA, block=norms(NORMS) | linears(_FUSED))
# "su" and "yarn" are what old configs of this family call longrope.
_ROPES = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}


def spec(c: Config) -> DecoderSpec:
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        c.choice(key, False, (False,))
    rule = dict(c.get("rope_scaling") or c.get("rope_parameters") or {})
    kind = rule.pop("type", "default")
    kind = Config(c.values | {"rope type": rule.pop("rope_type", kind)}).choice("rope type", None, _ROPES)
    if kind == "longrope":
        c.need("original_max_position_embeddings")  # where it is absent transformers takes 4096, whatever the rule says
    head_dim = c.get("head_dim", c.need("hidden_size") // c.need("num_attention_heads"))
    rope = c.rope(head_dim, partial=1.0, parameters=rule | {"rope_type": kind})
    eps = c.get("rms_norm_eps", 1e-5)
    b = block(c, rope=rope, eps=eps, fused_qkv="blocks", fused_gate_up=True, window=c.get("sliding_window"))
    return decoder(c, uniform(b, c.need("num_hidden_layers")), eps=eps)
