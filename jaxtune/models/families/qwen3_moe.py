"""Qwen3-MoE (arXiv:2505.09388): Qwen3 with a mixture of experts."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.families.qwen2_moe import EXPERTS, widths
from jaxtune.models.families.qwen3 import NAMES as QWEN3
from jaxtune.models.spec import Config, DecoderSpec, by_layer

NAMES = dataclasses.replace(QWEN3, block=QWEN3.block | EXPERTS)


def spec(c: Config) -> DecoderSpec:
    bias = c.get("attention_bias", False)
    window = c.get("sliding_window", 4096) if c.get("use_sliding_window", False) else None
    base = {"kv_heads": c.need("num_key_value_heads"), "qk_norm": "head", "window": window}
    base |= {"qkv_bias": bias, "o_bias": bias}
    return decoder(c, by_layer([block(c, **base | part) for part in widths(c)]))
