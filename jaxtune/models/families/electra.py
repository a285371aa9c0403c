"""ELECTRA (Clark et al. 2020, arXiv:2003.10555): BERT as a discriminator, with narrower embeddings if asked."""

import dataclasses

from jaxtune.models.classifier import SEQUENCE, HeadLayout
from jaxtune.models.encoder import EncoderSpec
from jaxtune.models.families.bert import encoder, linear, table
from jaxtune.models.spec import Config

_BERT = table("electra.")
NAMES = dataclasses.replace(
    _BERT,
    top=_BERT.top | linear("electra.embeddings_project", "embed_project"),
    # The heads of pretraining, and a buffer.
    ignored=r"(discriminator|generator)_\w+\..*|electra\.embeddings\.position_ids",
)


def spec(c: Config) -> EncoderSpec:
    return dataclasses.replace(encoder(c), embed_width=c.stated("embedding_size", 128))


def label_layout(c: Config, kind: str) -> HeadLayout:
    if kind == SEQUENCE:
        names = linear("classifier.dense", "classifier/dense") | linear("classifier.out_proj", "classifier/out")
        return HeadLayout(names, act="gelu", pooling="cls")
    return HeadLayout(linear("classifier", "classifier/out"))
