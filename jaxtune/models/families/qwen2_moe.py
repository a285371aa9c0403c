"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): Qwen2 with experts, one of them shared by all tokens."""

import dataclasses

from jaxtune.errors import UserError
from jaxtune.models.families.llama import block, decoder
from jaxtune.models.families.mixtral import routed
from jaxtune.models.names import LLAMA, linears
from jaxtune.models.spec import Config, DecoderSpec, by_layer

EXPERTS = {
    "mlp.gate.weight": "mlp/router",
    "mlp.experts.{experts}.gate_proj.weight": "mlp/gate_up_experts[0]",
    "mlp.experts.{experts}.up_proj.weight": "mlp/gate_up_experts[1]",
    "mlp.experts.{experts}.down_proj.weight": "mlp/down_experts",
}
_SHARED = {f"mlp.shared_expert.{name}": f"mlp/shared/{name}" for name in ("gate_proj", "up_proj", "down_proj")}
NAMES = dataclasses.replace(
    LLAMA, block=LLAMA.block | EXPERTS | linears(_SHARED) | {"mlp.shared_expert_gate.weight": "mlp/shared_gate/kernel"}
)


def widths(c: Config, **shared) -> list[dict]:
    """For each layer, the fields of its feed-forward part beyond Llama's: experts, or none."""
    step, dense = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers", [])
    experts = next((k for k in ("num_local_experts", "num_experts") if c.get(k) is not None), None)  # 5's name, 4's
    if experts is None:
        raise UserError(
            f"config.json ({c.model_type}) lacks 'num_experts' or, as it is also called, 'num_local_experts'."
        )
    sparse = routed(c, experts, c.get("norm_topk_prob", False)) | shared
    sparse["mlp"] = c.need("moe_intermediate_size")
    layers = range(c.need("num_hidden_layers"))
    return [{} if i in dense or (i + 1) % step or not sparse["experts"] else sparse for i in layers]


def spec(c: Config) -> DecoderSpec:
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window", False) else None
    kinds = c.layer_types(
        [
            "sliding_attention" if window and i % 2 == 0 and i < c.get("max_window_layers", 28) else "full_attention"
            for i in range(c.need("num_hidden_layers"))
        ]
    )
    base = {"kv_heads": c.need("num_key_value_heads"), "qkv_bias": c.get("qkv_bias", True)}
    blocks = [
        block(c, **base | part, window=window if kind == "sliding_attention" else None)
        for kind, part in zip(kinds, widths(c, shared=c.need("shared_expert_intermediate_size")), strict=True)
    ]
    return decoder(c, by_layer(blocks))
