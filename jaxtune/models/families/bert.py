"""BERT (Devlin et al. 2019, arXiv:1810.04805): learned positions and types, norms after the residual sums."""

import json

from jaxtune.models.classifier import SEQUENCE, HeadLayout
from jaxtune.models.encoder import EncoderBlockSpec, EncoderSpec
from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import NameTable
from jaxtune.models.spec import Config, uniform

__all__ = ["NAMES", "encoder", "label_layout", "linear", "norm", "spec", "table"]


def linear(hf: str, ours: str) -> dict[str, str]:
    """The names of a linear module's weight and bias: HF's -> jaxtune's."""
    return {f"{hf}.weight": f"{ours}/kernel", f"{hf}.bias": f"{ours}/bias"}


def norm(hf: str, ours: str) -> dict[str, str]:
    """The names of a norm's scale and bias: HF's -> jaxtune's."""
    return {f"{hf}.weight": f"{ours}/scale", f"{hf}.bias": f"{ours}/bias"}


def table(prefix: str) -> NameTable:
    """The names of BERT and RoBERTa, which differ in their prefix."""
    return NameTable(
        top={
            f"{prefix}embeddings.word_embeddings.weight": "embed_tokens/embedding",
            f"{prefix}embeddings.position_embeddings.weight": "embed_positions/embedding",
            f"{prefix}embeddings.token_type_embeddings.weight": "embed_types/embedding",
        }
        | norm(f"{prefix}embeddings.LayerNorm", "embed_norm"),
        block=linear("attention.self.query", "self_attn/q_proj")
        | linear("attention.self.key", "self_attn/k_proj")
        | linear("attention.self.value", "self_attn/v_proj")
        | linear("attention.output.dense", "self_attn/o_proj")
        | norm("attention.output.LayerNorm", "attn_norm")
        | linear("intermediate.dense", "mlp/up_proj")
        | linear("output.dense", "mlp/down_proj")
        | norm("output.LayerNorm", "mlp_norm"),
        layer=f"{prefix}encoder.layer.{{}}.",
        prefix=prefix,
        # Pretraining heads, and a buffer.
        ignored=rf"{prefix}pooler\..*|cls\..*|lm_head\..*|{prefix}embeddings\.position_ids",
        # TensorFlow's names, in the oldest checkpoints.
        renamed={".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"},
    )


NAMES = table("bert.")


def encoder(c: Config, first_position: int = 0) -> EncoderSpec:
    """The model of BERT's and RoBERTa's configs."""
    c.choice("position_embedding_type", "absolute", ("absolute",))
    c.choice("is_decoder", False, (False,))
    c.choice("add_cross_attention", False, (False,))
    width, heads, eps = c.need("hidden_size"), c.need("num_attention_heads"), c.get("layer_norm_eps", 1e-12)
    block = EncoderBlockSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp=c.need("intermediate_size"),
        rope=None,
        eps=eps,
        act=c.choice("hidden_act", "gelu", HF_ACTIVATIONS),
    )
    return EncoderSpec(
        vocab=c.need("vocab_size"),
        width=width,
        segments=uniform(block, c.need("num_hidden_layers")),
        positions=c.get("max_position_embeddings", 512) - first_position,
        config=json.dumps(c.values, sort_keys=True),
        first_position=first_position,
        types=c.get("type_vocab_size", 2),
        eps=eps,
        init_std=c.get("initializer_range", 0.02),
    )


def spec(c: Config) -> EncoderSpec:
    return encoder(c)


def label_layout(c: Config, kind: str) -> HeadLayout:
    out = linear("classifier", "classifier/out")
    if kind == SEQUENCE:
        return HeadLayout(linear("bert.pooler.dense", "classifier/dense") | out, act="tanh", pooling="cls")
    return HeadLayout(out)
