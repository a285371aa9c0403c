"""mBART (Liu et al. 2020, arXiv:2001.08210): BART with norms before each part and one behind the last block."""

from jaxtune.models.families.bart import NAMES as NAMES
from jaxtune.models.families.bart import describe
from jaxtune.models.spec import Config, DecoderSpec


def spec(c: Config) -> DecoderSpec:
    return describe(c, before=True)
