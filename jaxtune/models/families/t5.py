"""T5 and FLAN-T5, v1.0 and v1.1 (arXiv:1910.10683, arXiv:2210.11416): biases of scores by distance, no scale on q.k."""

import json

from jaxtune.errors import UserError
from jaxtune.models.encoder import EncoderBlockSpec, EncoderSpec
from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import NameTable, linears, norms
from jaxtune.models.spec import BlockSpec, Config, DecoderSpec, Relative, uniform

POSITIONS = 2**20  # distances have no end


def _attention(hf: str, ours: str) -> dict[str, str]:
    return linears({f"{hf}.{name}": f"{ours}/{name}_proj" for name in "qkvo"})


def _mlp(hf: str, gated: bool) -> dict[str, str]:
    ups = {"wi_0": "gate_proj", "wi_1": "up_proj"} if gated else {"wi": "up_proj"}
    return linears({f"{hf}.{theirs}": f"mlp/{ours}" for theirs, ours in (ups | {"wo": "down_proj"}).items()})


def table(gated: bool) -> NameTable:
    """The names of the two versions, which differ in the feed-forward part."""
    first, relative = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias/embedding"
    encoder = NameTable(
        top=norms({"encoder.final_layer_norm": "norm"}) | {first.format("encoder"): relative},
        block=norms({"layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "mlp_norm"})
        | _attention("layer.0.SelfAttention", "self_attn")
        | _mlp("layer.1.DenseReluDense", gated),
        layer="encoder.block.{}.",
        prefix="",
    )
    places = {"layer.0": "input_norm", "layer.1": "cross_norm", "layer.2": "post_attention_norm"}
    return NameTable(
        top={"shared.weight": "embed_tokens/embedding"}
        | norms({"decoder.final_layer_norm": "norm"})
        | {first.format("decoder"): relative, "lm_head.weight": "lm_head/kernel"},
        block=norms({f"{hf}.layer_norm": ours for hf, ours in places.items()})
        | _attention("layer.0.SelfAttention", "self_attn")
        | _attention("layer.1.EncDecAttention", "cross_attn")
        | _mlp("layer.2.DenseReluDense", gated),
        layer="decoder.block.{}.",
        prefix="",
        # The shared table again, and a bias that the first version's files hold and no version reads.
        ignored=r"(en|de)coder\.embed_tokens\.weight|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_\w+\.weight",
        encoder=encoder,
    )


NAMES = table(gated=True)


def names(spec: DecoderSpec) -> NameTable:
    """The names of a model."""
    return table(spec.segments[0].pattern[0].gated)


def _relative(c: Config) -> Relative:
    buckets, distance = c.get("relative_attention_num_buckets", 32), c.get("relative_attention_max_distance", 128)
    if buckets < 4 or distance <= buckets // 2:
        raise UserError(
            f"config.json ({c.model_type}): relative_attention_num_buckets={buckets} and "
            f"relative_attention_max_distance={distance}, expected 4 or more and a distance above half of them."
        )
    return Relative(buckets, distance)


def describe(c: Config, scaled: bool, feed_forward: str) -> DecoderSpec:
    """T5's and mT5's model.

    Args:
        c: its config.
        scaled: whether states are divided by the root of their width before the head.
        feed_forward: the default of feed_forward_proj.
    """
    act = c.get("feed_forward_proj", feed_forward)
    gated = act.startswith("gated-")
    act = c.choice("feed_forward_proj", feed_forward, [*HF_ACTIVATIONS, *(f"gated-{a}" for a in HF_ACTIVATIONS)])
    act = "gelu_new" if act == "gated-gelu" else act.removeprefix("gated-")
    c.choice("is_encoder_decoder", True, (True,))
    heads, width, layers = c.need("num_heads"), c.need("d_model"), c.need("num_layers")
    parts = {
        **{"heads": heads, "kv_heads": heads, "head_dim": c.need("d_kv"), "mlp": c.need("d_ff"), "rope": None},
        **{"norm": "rms", "eps": c.get("layer_norm_epsilon", 1e-6), "scale": 1.0},
        **{"act": HF_ACTIVATIONS[act], "gated": gated},
    }
    shared = {
        **{"vocab": c.need("vocab_size"), "width": width, "positions": POSITIONS, "norm": "rms", "eps": parts["eps"]},
        **{"relative": _relative(c), "init_std": c.get("initializer_factor", 1.0) * width**-0.5},
    }
    no_bias = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), False)
    config = json.dumps(c.values | {"scale_decoder_outputs": scaled}, sort_keys=True)
    encoder = EncoderSpec(
        segments=uniform(EncoderBlockSpec(**parts, **no_bias, post_norm=False), layers),
        config="",
        learned_positions=False,
        embed_norm=False,
        last_norm=True,
        **shared,
    )
    return DecoderSpec(
        segments=uniform(BlockSpec(**parts, cross=True), c.get("num_decoder_layers", layers)),
        tied=c.get("tie_word_embeddings", True),
        config=config,
        logits_divisor=width**0.5 if scaled else 1.0,
        encoder=encoder,
        start=c.get("decoder_start_token_id", c.get("pad_token_id", 0)),
        **shared,
    )


def spec(c: Config) -> DecoderSpec:
    return describe(c, c.get("scale_decoder_outputs", c.get("tie_word_embeddings", True)), "relu")
