"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): half of BERT's layers, no token types."""

import json

from jaxtune.models.classifier import SEQUENCE, HeadLayout
from jaxtune.models.encoder import EncoderBlockSpec, EncoderSpec
from jaxtune.models.families.bert import linear, norm
from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import NameTable
from jaxtune.models.spec import Config, uniform

NAMES = NameTable(
    top={
        "distilbert.embeddings.word_embeddings.weight": "embed_tokens/embedding",
        "distilbert.embeddings.position_embeddings.weight": "embed_positions/embedding",
    }
    | norm("distilbert.embeddings.LayerNorm", "embed_norm"),
    block=linear("attention.q_lin", "self_attn/q_proj")
    | linear("attention.k_lin", "self_attn/k_proj")
    | linear("attention.v_lin", "self_attn/v_proj")
    | linear("attention.out_lin", "self_attn/o_proj")
    | norm("sa_layer_norm", "attn_norm")
    | linear("ffn.lin1", "mlp/up_proj")
    | linear("ffn.lin2", "mlp/down_proj")
    | norm("output_layer_norm", "mlp_norm"),
    layer="distilbert.transformer.layer.{}.",
    prefix="distilbert.",
    ignored=r"vocab_\w+\..*",  # the head of pretraining
)


def spec(c: Config) -> EncoderSpec:
    width, heads = c.need("dim"), c.need("n_heads")
    block = EncoderBlockSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp=c.need("hidden_dim"),
        rope=None,
        act=c.choice("activation", "gelu", HF_ACTIVATIONS),
    )
    return EncoderSpec(
        vocab=c.need("vocab_size"),
        width=width,
        segments=uniform(block, c.need("n_layers")),
        positions=c.get("max_position_embeddings", 512),
        config=json.dumps(c.values, sort_keys=True),
        init_std=c.get("initializer_range", 0.02),
    )


def label_layout(c: Config, kind: str) -> HeadLayout:
    out = linear("classifier", "classifier/out")
    if kind == SEQUENCE:
        return HeadLayout(linear("pre_classifier", "classifier/dense") | out, act="relu", pooling="cls")
    return HeadLayout(out)
