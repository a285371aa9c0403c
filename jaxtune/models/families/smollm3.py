"""SmolLM3: Llama without a position embedding in every fourth layer (arXiv:2501.18795)."""

import dataclasses

from jaxtune.errors import UserError
from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA as NAMES
from jaxtune.models.spec import Config, DecoderSpec, by_layer

__all__ = ["NAMES", "spec"]


def spec(c: Config) -> DecoderSpec:
    layers, bias = c.need("num_hidden_layers"), c.get("attention_bias", False)
    interval = c.get("no_rope_layer_interval", 4)
    roped = c.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(layers)])  # 1: with rope
    if len(roped) != layers:
        raise UserError(
            f"config.json (smollm3): no_rope_layers lists {len(roped)} layers, num_hidden_layers is {layers}."
        )
    window = c.get("sliding_window") if c.get("use_sliding_window", False) else None
    kinds = c.layer_types(["sliding_attention" if window and not r else "full_attention" for r in roped])
    if window is None and "sliding_attention" in kinds:
        raise UserError(
            "config.json (smollm3): layer_types has 'sliding_attention', but use_sliding_window is off or "
            "sliding_window is absent."
        )
    base = block(
        c,
        kv_heads=c.need("num_key_value_heads"),
        rope=c.rope(c.get("head_dim", c.need("hidden_size") // c.need("num_attention_heads")), theta=2e6),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=c.get("mlp_bias", False),
    )
    blocks = [
        dataclasses.replace(base, rope=base.rope if r else None, window=window if kind == "sliding_attention" else None)
        for r, kind in zip(roped, kinds, strict=True)
    ]
    return decoder(c, by_layer(blocks), tied=c.get("tie_word_embeddings", True))
