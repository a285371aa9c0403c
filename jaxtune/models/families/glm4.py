"""GLM-4-0414, dense: GLM-4 with norms around each part."""

import dataclasses

from jaxtune.models.families.glm import FUSED, glm
from jaxtune.models.names import LLAMA, NORMS, linears, norms
from jaxtune.models.spec import Config, DecoderSpec

_OUT = {"post_self_attn_layernorm": "attention_out_norm", "post_mlp_layernorm": "mlp_out_norm"}
NAMES = dataclasses.replace(LLAMA, block=norms(NORMS | _OUT) | linears(FUSED))


def spec(c: Config) -> DecoderSpec:
    return glm(c, norms="around")
