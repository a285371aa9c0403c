"""GLM-4 (arXiv:2406.12793): Llama with biases on q, k, v, an interleaved rope over half a head, fused gate, up."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA, NORMS, linears, norms
from jaxtune.models.spec import Config, DecoderSpec, uniform

FUSED = {f"self_attn.{name}": f"self_attn/{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
FUSED |= {f"mlp.{name}": f"mlp/{name}" for name in ("gate_up_proj", "down_proj")}
NAMES = dataclasses.replace(LLAMA, block=norms(NORMS) | linears(FUSED))


def glm(c: Config, **changes) -> DecoderSpec:
    """The model of both generations."""
    head_dim, eps = c.stated("head_dim", 128), c.get("rms_norm_eps", 1.5625e-7)
    b = block(
        c,
        head_dim=head_dim,
        kv_heads=c.stated("num_key_value_heads", 2),
        rope=c.rope(head_dim, partial=0.5, interleaved=True),
        qkv_bias=c.get("attention_bias", True),
        fused_gate_up=True,
        eps=eps,
        **changes,
    )
    return decoder(c, uniform(b, c.need("num_hidden_layers")), eps=eps)


def spec(c: Config) -> DecoderSpec:
    return glm(c)
