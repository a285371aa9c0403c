"""mT5 (Xue et al. 2021, arXiv:2010.11934): T5 v1.1 over 101 languages."""

from jaxtune.models.families.t5 import NAMES as NAMES
from jaxtune.models.families.t5 import describe
from jaxtune.models.families.t5 import names as names
from jaxtune.models.spec import Config, DecoderSpec


def spec(c: Config) -> DecoderSpec:
    return describe(c, scaled=False, feed_forward="gated-gelu")
