"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, one fused qkv, Conv1D matrices."""

import json

from jaxtune.models.classifier import older_decoder_layout
from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import NameTable, linears, norms
from jaxtune.models.spec import BlockSpec, Config, DecoderSpec, uniform

NAMES = NameTable(
    top={
        "transformer.wte.weight": "embed_tokens/embedding",
        "transformer.wpe.weight": "embed_positions/embedding",
    }
    | norms({"transformer.ln_f": "norm"})
    | {"lm_head.weight": "lm_head/kernel"},
    block=norms({"ln_1": "input_norm", "ln_2": "post_attention_norm"})
    | linears(
        {
            "attn.c_attn": "self_attn/qkv_proj",
            "attn.c_proj": "self_attn/o_proj",
            "mlp.c_fc": "mlp/up_proj",
            "mlp.c_proj": "mlp/down_proj",
        }
    ),
    layer="transformer.h.{}.",
    prefix="transformer.",
    conv1d=True,
    ignored=r".*\.attn\.(bias|masked_bias)",
)
label_layout = older_decoder_layout


def spec(c: Config) -> DecoderSpec:
    width, heads = c.need("n_embd"), c.need("n_head")
    eps = c.get("layer_norm_epsilon", 1e-5)
    c.choice("scale_attn_weights", True, (True,))
    c.choice("scale_attn_by_inverse_layer_idx", False, (False,))
    block = BlockSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp=c.get("n_inner", 4 * width),
        rope=None,
        norm="layer",
        eps=eps,
        act=c.choice("activation_function", "gelu_new", HF_ACTIVATIONS),
        gated=False,
        fused_qkv="blocks",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    )
    return DecoderSpec(
        vocab=c.need("vocab_size"),
        width=width,
        segments=uniform(block, c.need("n_layer")),
        positions=c.get("n_positions", 1024),
        tied=c.get("tie_word_embeddings", True),
        config=json.dumps(c.values, sort_keys=True),
        learned_positions=True,
        norm="layer",
        eps=eps,
        init_std=c.get("initializer_range", 0.02),
    )
