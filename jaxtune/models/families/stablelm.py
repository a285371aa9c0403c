"""StableLM (arXiv:2402.17834): Llama with LayerNorm and a rope over part of each head."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA
from jaxtune.models.spec import Config, DecoderSpec, uniform

NAMES = dataclasses.replace(
    LLAMA,
    block=LLAMA.block
    | {
        "self_attn.q_layernorm.norms.{heads}.weight": "self_attn/q_norm/scale",
        "self_attn.k_layernorm.norms.{kv_heads}.weight": "self_attn/k_norm/scale",
    },
)


def spec(c: Config) -> DecoderSpec:
    head_dim = c.need("hidden_size") // c.need("num_attention_heads")
    norm = {"norm": "layer", "eps": c.get("layer_norm_eps", 1e-5)}
    b = block(
        c,
        kv_heads=c.need("num_key_value_heads"),
        head_dim=head_dim,
        rope=c.rope(head_dim, partial=0.25),
        residual="shared" if c.get("use_parallel_residual", False) else "serial",
        qk_norm="heads" if c.get("qk_layernorm", False) else "",
        qkv_bias=c.get("use_qkv_bias", False),
        **norm,
    )
    return decoder(c, uniform(b, c.need("num_hidden_layers")), **norm)
