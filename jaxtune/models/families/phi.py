"""Phi-1, 1.5 and 2 (arXiv:2306.11644): parallel residuals behind one LayerNorm, biases everywhere, the head's too."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.layers import HF_ACTIVATIONS
from jaxtune.models.names import LLAMA, linears, norms
from jaxtune.models.spec import Config, DecoderSpec, uniform

_PROJECTIONS = {f"self_attn.{name}": f"self_attn/{name}" for name in ("q_proj", "k_proj", "v_proj")}
_PROJECTIONS |= {"self_attn.dense": "self_attn/o_proj", "mlp.fc1": "mlp/up_proj", "mlp.fc2": "mlp/down_proj"}
_NORMS = {f"self_attn.{x}_layernorm": f"self_attn/{x}_norm" for x in "qk"} | {"input_layernorm": "input_norm"}
NAMES = dataclasses.replace(
    LLAMA,
    top={"model.embed_tokens.weight": "embed_tokens/embedding"}
    | norms({"model.final_layernorm": "norm"})
    | linears({"lm_head": "lm_head"}),
    block=norms(_NORMS) | linears(_PROJECTIONS),
)


def spec(c: Config) -> DecoderSpec:
    c.choice("tie_word_embeddings", False, (False,))
    head_dim = c.get("head_dim", c.need("hidden_size") // c.need("num_attention_heads"))
    norm = {"norm": "layer", "eps": c.get("layer_norm_eps", 1e-5)}
    b = block(
        c,
        rope=c.rope(head_dim, partial=0.5),
        residual="shared",
        act=c.choice("hidden_act", "gelu_new", HF_ACTIVATIONS),
        gated=False,
        qk_norm="head" if c.get("qk_layernorm", False) else "",
        **norm,
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True),
    )
    return decoder(c, uniform(b, c.need("num_hidden_layers")), head_bias=True, **norm)
