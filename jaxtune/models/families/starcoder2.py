"""StarCoder2 (arXiv:2402.19173): Llama with LayerNorm, biases and a plain feed-forward part with tanh-GELU."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import LLAMA, linears
from jaxtune.models.spec import Config, DecoderSpec, uniform

_MLP = {"mlp.c_fc": "mlp/up_proj", "mlp.c_proj": "mlp/down_proj"}
NAMES = dataclasses.replace(
    LLAMA, block={hf: path for hf, path in LLAMA.block.items() if not hf.startswith("mlp")} | linears(_MLP)
)


def spec(c: Config) -> DecoderSpec:
    c.choice("norm_type", "layer_norm", ("layer_norm",))
    c.choice("mlp_type", "default", ("default",))
    bias, norm = c.get("use_bias", True), {"norm": "layer", "eps": c.get("norm_epsilon", 1e-5)}
    b = block(
        c,
        kv_heads=c.need("num_key_value_heads"),
        act=c.choice("hidden_act", "gelu_pytorch_tanh", HF_ACTIVATIONS),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        window=c.get("sliding_window"),
        **norm,
    )
    tied, std = c.get("tie_word_embeddings", True), c.get("initializer_range", 0.018042)
    return decoder(c, uniform(b, c.need("num_hidden_layers")), tied=tied, init_std=std, **norm)
