"""GPT-J (Wang & Komatsuzaki 2021): parallel residuals behind one LayerNorm, an interleaved rope, a head with a bias."""

import json

from jaxtune.models.classifier import older_decoder_layout
from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import NameTable, linears, norms
from jaxtune.models.spec import BlockSpec, Config, DecoderSpec, uniform

_PROJECTIONS = {f"attn.{name}": f"self_attn/{name}" for name in ("q_proj", "k_proj", "v_proj")}
_PROJECTIONS |= {"attn.out_proj": "self_attn/o_proj", "mlp.fc_in": "mlp/up_proj", "mlp.fc_out": "mlp/down_proj"}
NAMES = NameTable(
    top={"transformer.wte.weight": "embed_tokens/embedding"}
    | norms({"transformer.ln_f": "norm"})
    | linears({"lm_head": "lm_head"}),
    block=norms({"ln_1": "input_norm"}) | linears(_PROJECTIONS),
    layer="transformer.h.{}.",
    prefix="transformer.",
    ignored=r".*\.attn\.(bias|masked_bias|embed_positions)",
)
label_layout = older_decoder_layout


def spec(c: Config) -> DecoderSpec:
    c.choice("tie_word_embeddings", False, (False,))
    width, heads = c.need("n_embd"), c.need("n_head")
    norm = {"norm": "layer", "eps": c.get("layer_norm_epsilon", 1e-5)}
    block = BlockSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp=c.get("n_inner", 4 * width),
        rope=c.rope(c.stated("rotary_dim", 64), interleaved=True),
        residual="shared",
        act=c.choice("activation_function", "gelu_new", HF_ACTIVATIONS),
        gated=False,
        mlp_bias=True,
        **norm,
    )
    return DecoderSpec(
        vocab=c.need("vocab_size"),
        width=width,
        segments=uniform(block, c.need("n_layer")),
        positions=c.get("n_positions", 2048),
        tied=False,
        config=json.dumps(c.values, sort_keys=True),
        head_bias=True,
        init_std=c.get("initializer_range", 0.02),
        **norm,
    )
