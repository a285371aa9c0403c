"""Gemma 3, text (arXiv:2503.19786): five layers with a window and their own rope base, then one without; q/k norms."""

import dataclasses

from jaxtune.models.families.gemma import gemma_block, gemma_decoder
from jaxtune.models.families.gemma2 import NAMES as GEMMA2
from jaxtune.models.families.gemma2 import around
from jaxtune.models.names import QK_NORMS, norms
from jaxtune.models.spec import Config, DecoderSpec, by_layer

NAMES = dataclasses.replace(GEMMA2, block=GEMMA2.block | norms(QK_NORMS))


def spec(c: Config) -> DecoderSpec:
    c.choice("attn_logit_softcapping", None, (None,))  # transformers reads it and does nothing with it
    ropes = c.ropes(c.need("head_dim"), 1e6, 1e4, "rope_local_base_freq")
    kinds, every = ("sliding_attention", "full_attention"), c.get("sliding_window_pattern", 6)
    default = [kinds[(i + 1) % every == 0] for i in range(c.need("num_hidden_layers"))]
    windows = {"full_attention": None, "sliding_attention": c.values.get("sliding_window", 4096)}
    blocks = [
        gemma_block(c, **around(c), qk_norm="head", rope=ropes[kind], window=windows[kind])
        for kind in c.layer_types(default)
    ]
    return gemma_decoder(c, by_layer(blocks), logits_softcap=c.get("final_logit_softcapping"))
