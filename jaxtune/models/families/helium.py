"""Helium 1 (Kyutai 2025): Llama with an interleaved rope and a smaller epsilon."""

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA as NAMES
from jaxtune.models.spec import Config, DecoderSpec, uniform

__all__ = ["NAMES", "spec"]


def spec(c: Config) -> DecoderSpec:
    head_dim, eps = c.need("head_dim"), c.get("rms_norm_eps", 1e-8)
    if head_dim * c.need("num_attention_heads") != c.need("hidden_size"):  # o_proj is square there
        c.choice("head_dim", head_dim, (c.need("hidden_size") // c.need("num_attention_heads"),))
    same = {"kv_heads": c.need("num_key_value_heads"), "qkv_bias": c.get("attention_bias", False), "eps": eps}
    rope = c.rope(head_dim, theta=1e5, interleaved=True)
    b = block(c, head_dim=head_dim, rope=rope, mlp_bias=c.get("mlp_bias", False), **same)
    return decoder(c, uniform(b, c.need("num_hidden_layers")), eps=eps)
