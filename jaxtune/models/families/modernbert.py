"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): rotary positions, gated layers, two of three layers local."""

import json

from jaxtune.models.classifier import SEQUENCE, HeadLayout
from jaxtune.models.encoder import EncoderBlockSpec, EncoderSpec
from jaxtune.models.families.bert import linear, norm
from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import NameTable
from jaxtune.models.rope import Rope
from jaxtune.models.spec import BlockSpec, Config, Segment, by_layer

NAMES = NameTable(
    top={"model.embeddings.tok_embeddings.weight": "embed_tokens/embedding"}
    | norm("model.embeddings.norm", "embed_norm")
    | norm("model.final_norm", "norm"),
    block=norm("attn_norm", "attn_norm")
    | linear("attn.Wqkv", "self_attn/qkv_proj")
    | linear("attn.Wo", "self_attn/o_proj")
    | norm("mlp_norm", "mlp_norm")
    | linear("mlp.Wi", "mlp/gate_up_proj")
    | linear("mlp.Wo", "mlp/down_proj"),
    layer="model.layers.{}.",
    prefix="model.",
    ignored=r"head\..*|decoder\..*",  # the head of pretraining
)
THETA = {"full_attention": ("global_rope_theta", 160_000.0), "sliding_attention": ("local_rope_theta", 10_000.0)}


def spec(c: Config) -> EncoderSpec:
    width, heads, eps = c.need("hidden_size"), c.need("num_attention_heads"), c.get("norm_eps", 1e-5)
    bias = c.get("norm_bias", False)
    blocks = [
        EncoderBlockSpec(
            heads=heads,
            kv_heads=heads,
            head_dim=width // heads,
            mlp=c.need("intermediate_size"),
            rope=_rope(c, kind, width // heads),
            eps=eps,
            act=c.choice("hidden_activation", "gelu", HF_ACTIVATIONS),
            gated=True,
            fused_qkv="blocks",
            fused_gate_up=True,
            qkv_bias=c.get("attention_bias", False),
            o_bias=c.get("attention_bias", False),
            mlp_bias=c.get("mlp_bias", False),
            # `local_attention` is the whole width; a token sees half of it on each side.
            window=c.get("local_attention", 128) // 2 + 1 if kind == "sliding_attention" else None,
            post_norm=False,
            attn_norm=i > 0,
            norm_bias=bias,
        )
        for i, kind in enumerate(_kinds(c))
    ]
    return EncoderSpec(
        vocab=c.need("vocab_size"),
        width=width,
        segments=_segments(blocks),
        positions=c.get("max_position_embeddings", 8192),
        config=json.dumps(c.values, sort_keys=True),
        learned_positions=False,
        last_norm=True,
        eps=eps,
        norm_bias=bias,
        init_std=c.get("initializer_range", 0.02),
    )


def _kinds(c: Config) -> list[str]:
    """Each layer's attention; before `layer_types` existed, every n-th layer was global."""
    layers, every = c.need("num_hidden_layers"), c.get("global_attn_every_n_layers", 3)
    return c.layer_types(["sliding_attention" if i % every else "full_attention" for i in range(layers)])


def _rope(c: Config, kind: str, dim: int) -> Rope:
    old, default = THETA[kind]
    given = c.get("rope_parameters", {}).get(kind) or c.get("rope_scaling") or {}
    theta = {"rope_theta": c.get(old, default)}
    return Config({"model_type": f"{c.model_type}, {kind}", "rope_parameters": theta | given}).rope(dim)


def _segments(blocks: list[BlockSpec]) -> tuple[Segment, ...]:
    """The first block, which has no norm, is its own segment; after it a pattern of three layers repeats."""
    rest, period = blocks[1:], 3
    repeats = len(rest) // period
    if repeats < 2 or any(rest[i] != rest[i % period] for i in range(repeats * period)):
        return by_layer(blocks)
    return Segment((blocks[0],), 1), Segment(tuple(rest[:period]), repeats), *by_layer(rest[repeats * period :])


def label_layout(c: Config, kind: str) -> HeadLayout:
    dense, last = linear("head.dense", "classifier/dense"), linear("classifier", "classifier/out")
    return HeadLayout(
        dense | norm("head.norm", "classifier/norm") | last,
        act=c.choice("classifier_activation", "gelu", HF_ACTIVATIONS),
        norm=True,
        pooling=c.choice("classifier_pooling", "cls", ("cls", "mean")) if kind == SEQUENCE else None,
        dense_bias=c.get("classifier_bias", False),
    )
