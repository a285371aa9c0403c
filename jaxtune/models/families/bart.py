"""BART (Lewis et al. 2020, arXiv:1910.13461): learned positions, norms behind the sums, a bias of the logits."""

import json

from jaxtune.models.encoder import EncoderBlockSpec, EncoderSpec
from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import NameTable, linears, norms
from jaxtune.models.spec import BlockSpec, Config, DecoderSpec, uniform


def _attention(hf: str, ours: str) -> dict[str, str]:
    names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "out_proj": "o_proj"}
    return linears({f"{hf}.{theirs}": f"{ours}/{name}" for theirs, name in names.items()})


def _top(part: str) -> dict[str, str]:
    return {f"model.{part}.embed_positions.weight": "embed_positions/embedding"} | norms(
        {f"model.{part}.layernorm_embedding": "embed_norm", f"model.{part}.layer_norm": "norm"}
    )


_MLP = linears({"fc1": "mlp/up_proj", "fc2": "mlp/down_proj"})
NAMES = NameTable(
    top={"model.shared.weight": "embed_tokens/embedding"}
    | _top("decoder")
    | {"final_logits_bias": "logits_bias/bias", "lm_head.weight": "lm_head/kernel"},
    block=norms({"self_attn_layer_norm": "input_norm", "encoder_attn_layer_norm": "cross_norm"})
    | norms({"final_layer_norm": "post_attention_norm"})
    | _attention("self_attn", "self_attn")
    | _attention("encoder_attn", "cross_attn")
    | _MLP,
    layer="model.decoder.layers.{}.",
    prefix="model.",
    ignored=r"(model\.)?(en|de)coder\.(embed_tokens\.weight|version)",
    encoder=NameTable(
        top=_top("encoder"),
        block=norms({"self_attn_layer_norm": "attn_norm", "final_layer_norm": "mlp_norm"})
        | _attention("self_attn", "self_attn")
        | _MLP,
        layer="model.encoder.layers.{}.",
        prefix="model.",
    ),
)


def describe(c: Config, before: bool) -> DecoderSpec:
    """The model of BART and mBART; `before`: norms precede each part, and one follows the last block."""
    c.choice("is_encoder_decoder", True, (True,))
    width = c.need("d_model")
    act, biases = c.choice("activation_function", "gelu", HF_ACTIVATIONS), ("qkv_bias", "o_bias", "mlp_bias")
    shared = {
        **{"vocab": c.need("vocab_size"), "width": width, "norm": "layer", "eps": 1e-5, "last_norm": before},
        **{"positions": c.get("max_position_embeddings", 1024), "learned_positions": True, "first_position": 2},
        **{"embed_norm": True, "embed_scale": width**0.5 if c.get("scale_embedding", False) else 1.0},
        "init_std": c.get("init_std", 0.02),
    }

    def parts(of: str) -> dict:
        heads = c.need(f"{of}_attention_heads")
        sizes = {"heads": heads, "kv_heads": heads, "head_dim": width // heads, "mlp": c.need(f"{of}_ffn_dim")}
        return sizes | {"rope": None, "norm": "layer", "eps": 1e-5, "act": act, "gated": False}

    block = BlockSpec(
        **parts("decoder"), **dict.fromkeys(biases, True), cross=True, norms="before" if before else "sums"
    )
    return DecoderSpec(
        segments=uniform(block, c.need("decoder_layers")),
        tied=c.get("tie_word_embeddings", True),
        says_tied=True,
        config=json.dumps(c.values, sort_keys=True),
        logits_bias=True,
        encoder=EncoderSpec(
            segments=uniform(EncoderBlockSpec(**parts("encoder"), post_norm=not before), c.need("encoder_layers")),
            config="",
            **shared,
        ),
        start=c.get("decoder_start_token_id", 2),
        **shared,
    )


def spec(c: Config) -> DecoderSpec:
    return describe(c, before=False)
