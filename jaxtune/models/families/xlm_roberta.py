"""XLM-RoBERTa (Conneau et al. 2020, arXiv:1911.02116): RoBERTa over a hundred languages."""

from jaxtune.models.families.roberta import NAMES, label_layout, spec

__all__ = ["NAMES", "label_layout", "spec"]
