"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT with positions counted from the padding token's id + 1."""

from jaxtune.models.classifier import SEQUENCE, HeadLayout
from jaxtune.models.encoder import EncoderSpec
from jaxtune.models.families.bert import encoder, linear, table
from jaxtune.models.spec import Config

NAMES = table("roberta.")


def spec(c: Config) -> EncoderSpec:
    return encoder(c, first_position=c.get("pad_token_id", 1) + 1)


def label_layout(c: Config, kind: str) -> HeadLayout:
    if kind == SEQUENCE:
        names = linear("classifier.dense", "classifier/dense") | linear("classifier.out_proj", "classifier/out")
        return HeadLayout(names, act="tanh", pooling="cls")
    return HeadLayout(linear("classifier", "classifier/out"))
