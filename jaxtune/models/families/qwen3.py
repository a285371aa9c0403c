"""Qwen3 (arXiv:2505.09388): Llama with RMSNorm on each head's q and k, no biases."""

import dataclasses

from jaxtune.models.families.llama import decoder
from jaxtune.models.families.qwen2 import windowed
from jaxtune.models.names import LLAMA, QK_NORMS, norms
from jaxtune.models.spec import Config, DecoderSpec

NAMES = dataclasses.replace(LLAMA, block=LLAMA.block | norms(QK_NORMS))


def spec(c: Config) -> DecoderSpec:
    bias = c.get("attention_bias", False)
    c.need("head_dim")  # where it is absent transformers takes 128, whatever the width
    return decoder(c, windowed(c, {"qk_norm": "head", "qkv_bias": bias, "o_bias": bias}))
