"""OPT (arXiv:2205.01068): LayerNorm before each part, learned positions that begin at row 2, biases, ReLU."""

import json

from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import NameTable, linears, norms
from jaxtune.models.spec import BlockSpec, Config, DecoderSpec, uniform

_PROJECTIONS = {f"self_attn.{name}": f"self_attn/{name}" for name in ("q_proj", "k_proj", "v_proj")}
_PROJECTIONS |= {"self_attn.out_proj": "self_attn/o_proj", "fc1": "mlp/up_proj", "fc2": "mlp/down_proj"}
NAMES = NameTable(
    top={
        "model.decoder.embed_tokens.weight": "embed_tokens/embedding",
        "model.decoder.embed_positions.weight": "embed_positions/embedding",
    }
    | norms({"model.decoder.final_layer_norm": "norm"})
    | {"lm_head.weight": "lm_head/kernel"},
    block=norms({"self_attn_layer_norm": "input_norm", "final_layer_norm": "post_attention_norm"})
    | linears(_PROJECTIONS),
    layer="model.decoder.layers.{}.",
    prefix="model.",
)


def spec(c: Config) -> DecoderSpec:
    # What the 350M model has differently: norms behind the sums, and narrower embeddings.
    c.choice("do_layer_norm_before", True, (True,))
    c.choice("_remove_final_layer_norm", False, (False,))
    c.choice("layer_norm_elementwise_affine", True, (True,))
    width, heads = c.need("hidden_size"), c.need("num_attention_heads")
    c.choice("word_embed_proj_dim", width, (width,))
    norm = {"norm": "layer", "eps": 1e-5}
    block = BlockSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp=c.need("ffn_dim"),
        rope=None,
        act=c.choice("activation_function", "relu", HF_ACTIVATIONS),
        gated=False,
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), c.get("enable_bias", True)),
        **norm,
    )
    return DecoderSpec(
        vocab=c.need("vocab_size"),
        width=width,
        segments=uniform(block, c.need("num_hidden_layers")),
        positions=c.get("max_position_embeddings", 2048),
        tied=c.get("tie_word_embeddings", True),
        config=json.dumps(c.values, sort_keys=True),
        learned_positions=True,
        first_position=2,
        init_std=c.get("init_std", 0.02),
        **norm,
    )
