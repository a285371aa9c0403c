"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA
from jaxtune.models.spec import Config, DecoderSpec, uniform

NAMES = dataclasses.replace(
    LLAMA,
    block={hf: path for hf, path in LLAMA.block.items() if not hf.startswith("mlp")}
    | {
        "block_sparse_moe.gate.weight": "mlp/router",
        "block_sparse_moe.experts.{experts}.w1.weight": "mlp/gate_up_experts[0]",
        "block_sparse_moe.experts.{experts}.w3.weight": "mlp/gate_up_experts[1]",
        "block_sparse_moe.experts.{experts}.w2.weight": "mlp/down_experts",
    },
    in_memory=((r"block_sparse_moe", "mlp"),),
)


def routed(c: Config, experts: str, norm_topk: bool) -> dict:
    """The fields of a block with experts beyond Llama's; `experts` is the config's key of their number."""
    c.choice("output_router_logits", False, (False,))  # would add the balance loss, which is not implemented
    return {"experts": c.need(experts), "experts_per_token": c.need("num_experts_per_tok"), "norm_topk": norm_topk}


def spec(c: Config) -> DecoderSpec:
    c.choice("router_jitter_noise", 0.0, (0.0,))
    head_dim, eps = (
        c.get("head_dim", c.need("hidden_size") // c.need("num_attention_heads")),
        c.get("rms_norm_eps", 1e-5),
    )
    b = block(
        c,
        kv_heads=c.need("num_key_value_heads"),
        rope=c.rope(head_dim, theta=1e6),
        window=c.get("sliding_window"),
        eps=eps,
        **routed(c, "num_local_experts", norm_topk=True),
    )
    return decoder(c, uniform(b, c.need("num_hidden_layers")), eps=eps)
