"""gpt-oss (arXiv:2508.10925): experts with biases and clamped gates, a sink a head, a window in every other layer."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.families.mixtral import routed
from jaxtune.models.names import LLAMA
from jaxtune.models.spec import Config, DecoderSpec, by_layer

NAMES = dataclasses.replace(
    LLAMA,
    block={hf: path for hf, path in LLAMA.block.items() if not hf.startswith("mlp")}
    | {
        "self_attn.sinks": "self_attn/sinks",
        "mlp.router.weight": "mlp/router",
        "mlp.router.bias": "mlp/router_bias",
        "mlp.experts.gate_up_proj": "mlp/gate_up_experts",
        "mlp.experts.gate_up_proj_bias": "mlp/gate_up_experts_bias",
        "mlp.experts.down_proj": "mlp/down_experts",
        "mlp.experts.down_proj_bias": "mlp/down_experts_bias",
    },
)
_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}


def spec(c: Config) -> DecoderSpec:
    head_dim, eps, layers = c.stated("head_dim", 64), c.get("rms_norm_eps", 1e-5), c.need("num_hidden_layers")
    kinds = c.layer_types([("sliding_attention", "full_attention")[i % 2] for i in range(layers)])
    absent = c.get("rope_scaling") is None and c.get("rope_parameters") is None
    yarn = _YARN | {"original_max_position_embeddings": 4096} if absent else None
    bias = c.get("attention_bias", True)
    b = block(
        c,
        head_dim=head_dim,
        kv_heads=c.need("num_key_value_heads"),
        rope=c.rope(head_dim, theta=150000.0, parameters=yarn),
        eps=eps,
        qkv_bias=bias,
        o_bias=bias,
        sinks=True,
        experts_bias=True,
        pairs=(c.get("swiglu_alpha", 1.702), c.get("swiglu_limit", 7.0)),
        **routed(c, "num_local_experts", norm_topk=True),
    )
    window = dataclasses.replace(b, window=c.stated("sliding_window", 128))
    return decoder(c, by_layer([window if kind == "sliding_attention" else b for kind in kinds]), eps=eps)
