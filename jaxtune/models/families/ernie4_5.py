"""ERNIE 4.5, dense (Baidu 2025): Llama with an interleaved rope and, where the config asks, a bias everywhere."""

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA as NAMES
from jaxtune.models.spec import Config, DecoderSpec, uniform

__all__ = ["NAMES", "spec"]


def spec(c: Config) -> DecoderSpec:
    bias, eps = c.get("use_bias", False), c.get("rms_norm_eps", 1e-5)
    default = c.need("hidden_size") // c.need("num_attention_heads") if "head_dim" in c.values else 128
    head_dim = c.get("head_dim", default)  # null: what divides the width; absent: 128
    same = {"kv_heads": c.need("num_key_value_heads"), "qkv_bias": bias, "o_bias": bias, "mlp_bias": bias, "eps": eps}
    b = block(c, head_dim=head_dim, rope=c.rope(head_dim, theta=5e5, interleaved=True), **same)
    return decoder(c, uniform(b, c.need("num_hidden_layers")), eps=eps, tied=c.get("tie_word_embeddings", True))
