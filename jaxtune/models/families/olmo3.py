"""OLMo 3 (arXiv:2512.13961): OLMo 2 with a window in three layers of four, which no scaling of the rope reaches."""

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.families.olmo2 import NAMES
from jaxtune.models.spec import Config, DecoderSpec, by_layer

__all__ = ["NAMES", "spec"]


def spec(c: Config) -> DecoderSpec:
    heads, layers = c.need("num_attention_heads"), c.need("num_hidden_layers")
    bias, eps = c.get("attention_bias", False), c.get("rms_norm_eps", 1e-5)
    # transformers gives `rope_theta` to the layers that see all, whatever it is, and the others their default.
    ropes = c.ropes(c.get("head_dim", c.need("hidden_size") // heads), 5e5, 5e5, "")
    windows = {"full_attention": None, "sliding_attention": c.stated("sliding_window", 4096)}
    default = ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(layers)]
    same = {"norms": "after", "qk_norm": "width", "qkv_bias": bias, "o_bias": bias, "eps": eps}
    blocks = [block(c, rope=ropes[kind], window=windows[kind], **same) for kind in c.layer_types(default)]
    return decoder(c, by_layer(blocks), eps=eps)
