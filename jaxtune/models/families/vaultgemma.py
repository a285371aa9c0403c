"""VaultGemma (arXiv:2510.15001): Gemma 2 without the norms behind each part."""

import dataclasses

from jaxtune.models.families import gemma2
from jaxtune.models.names import LLAMA, PROJECTIONS, linears, norms
from jaxtune.models.spec import Config, DecoderSpec, Segment

_NORMS = {"input_layernorm": "input_norm", "pre_feedforward_layernorm": "post_attention_norm"}
NAMES = dataclasses.replace(LLAMA, block=norms(_NORMS) | linears(PROJECTIONS))


def spec(c: Config) -> DecoderSpec:
    around = gemma2.spec(c)
    segments = (
        Segment(tuple(dataclasses.replace(b, norms="before") for b in s.pattern), s.repeats) for s in around.segments
    )
    return dataclasses.replace(around, segments=tuple(segments))
