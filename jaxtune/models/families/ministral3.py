"""Ministral 3: Mistral under YaRN, whose queries grow with their position (as Llama 4's; arXiv:2501.19399)."""

import dataclasses

from jaxtune.models.families.llama import block, decoder
from jaxtune.models.names import LLAMA as NAMES
from jaxtune.models.rope import Rope
from jaxtune.models.spec import Config, DecoderSpec, uniform

__all__ = ["NAMES", "spec"]


def _rope(c: Config, head_dim: int) -> Rope:
    rule = Config(c.need("rope_parameters") | {"model_type": c.model_type})
    kind = rule.choice("rope_type", rule.get("type", "default"), ("yarn",))
    beta, length = rule.need("llama_4_scaling_beta"), rule.need("original_max_position_embeddings")
    # transformers passes over the second.
    left = ("llama_4_scaling_beta", "max_position_embeddings", "model_type", "type")
    parameters = {key: value for key, value in rule.values.items() if key not in left} | {"rope_type": kind}
    return dataclasses.replace(c.rope(head_dim, parameters=parameters), heat=(float(beta), length))


def spec(c: Config) -> DecoderSpec:
    head_dim, eps = c.stated("head_dim", 128), c.get("rms_norm_eps", 1e-5)
    b = block(
        c,
        head_dim=head_dim,
        kv_heads=c.stated("num_key_value_heads", 8),
        rope=_rope(c, head_dim),
        window=c.get("sliding_window"),
        eps=eps,
    )
    return decoder(c, uniform(b, c.need("num_hidden_layers")), eps=eps)
