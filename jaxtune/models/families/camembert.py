"""CamemBERT (Martin et al. 2020, arXiv:1911.03894): RoBERTa in French."""

from jaxtune.models.families.roberta import NAMES, label_layout, spec

__all__ = ["NAMES", "label_layout", "spec"]
