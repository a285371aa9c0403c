"""GPT-NeoX and Pythia (arXiv:2204.06745): parallel residuals, LayerNorm, one qkv interleaved by head."""

from jaxtune.models.classifier import older_decoder_layout
from jaxtune.models.families.llama import block, decoder
from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import NORMS, NameTable, linears, norms
from jaxtune.models.spec import Config, DecoderSpec, uniform

NAMES = NameTable(
    top={"gpt_neox.embed_in.weight": "embed_tokens/embedding"}
    | norms({"gpt_neox.final_layer_norm": "norm"})
    | {"embed_out.weight": "lm_head/kernel"},
    block=norms(NORMS)
    | linears(
        {
            "attention.query_key_value": "self_attn/qkv_proj",
            "attention.dense": "self_attn/o_proj",
            "mlp.dense_h_to_4h": "mlp/up_proj",
            "mlp.dense_4h_to_h": "mlp/down_proj",
        }
    ),
    layer="gpt_neox.layers.{}.",
    prefix="gpt_neox.",
    in_memory=(("^embed_out", "lm_head"),),
    ignored=r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)
label_layout = older_decoder_layout


def spec(c: Config) -> DecoderSpec:
    heads, bias = c.need("num_attention_heads"), c.get("attention_bias", True)
    head_dim = c.need("hidden_size") // heads
    norm = {"norm": "layer", "eps": c.get("layer_norm_eps", 1e-5)}
    b = block(
        c,
        kv_heads=heads,
        head_dim=head_dim,
        rope=c.rope(head_dim, partial=0.25, keys=("rotary_emb_base", "rotary_pct")),
        residual="parallel" if c.get("use_parallel_residual", True) else "serial",
        act=c.choice("hidden_act", "gelu", HF_ACTIVATIONS),
        gated=False,
        fused_qkv="heads",
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        **norm,
    )
    return decoder(c, uniform(b, c.need("num_hidden_layers")), **norm)
