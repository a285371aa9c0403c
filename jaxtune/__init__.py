"""jaxtune: fine-tune pretrained transformers in JAX. The functional API, imported lazily."""

import importlib

__version__ = "0.1.0"

_API = {
    "TRAIN": "jaxtune.tree",
    "MEMBER": "jaxtune.tree",
    "FROZEN": "jaxtune.tree",
    "Role": "jaxtune.tree",
    "match": "jaxtune.tree",
    "partition": "jaxtune.tree",
    "combine": "jaxtune.tree",
    "split_stack": "jaxtune.tree",
    "count": "jaxtune.tree",
    "LoraWeight": "jaxtune.weights",
    "DoraWeight": "jaxtune.weights",
    "Ia3Weight": "jaxtune.weights",
    "PromptWeight": "jaxtune.weights",
    "TokensWeight": "jaxtune.weights",
    "QuantWeight": "jaxtune.weights",
    "ShapedWeight": "jaxtune.weights",
    "adapt": "jaxtune.foreign",
    "Nf4Weight": "jaxtune.quantized",
    "quantize": "jaxtune.quantized",
    "dot": "jaxtune.weights",
    "embed": "jaxtune.weights",
    "attend": "jaxtune.weights",
    "merge": "jaxtune.weights",
    "full": "jaxtune.methods",
    "head": "jaxtune.methods",
    "lora": "jaxtune.adapters",
    "ia3": "jaxtune.adapters",
    "prompt_tuning": "jaxtune.adapters",
    "bitfit": "jaxtune.methods",
    "norms": "jaxtune.methods",
    "embeddings": "jaxtune.methods",
    "last_n": "jaxtune.methods",
    "regex": "jaxtune.methods",
    "resize": "jaxtune.vocabulary",
    "virtual_tokens": "jaxtune.weights",
    "load": "jaxtune.hf.load",
    "export_adapter": "jaxtune.hf.peft",
    "load_adapter": "jaxtune.hf.peft",
    "export_model": "jaxtune.hf.export",
    "export_gguf": "jaxtune.hf.gguf",
    "split": "jaxtune.models.decoder",
    "causal_lm": "jaxtune.objectives.causal_lm",
    "with_labels": "jaxtune.models.classifier",
    "Labels": "jaxtune.models.classifier",
    "classification": "jaxtune.objectives.classification",
    "cross_entropy": "jaxtune.objectives.cross_entropy",
    "optimizer": "jaxtune.optim",
    "schedule": "jaxtune.optim",
    "TrainState": "jaxtune.step",
    "init_state": "jaxtune.step",
    "make_train_step": "jaxtune.step",
    "make_eval_step": "jaxtune.step",
    "value_and_grad": "jaxtune.step",
    "make_mesh": "jaxtune.parallel",
    "replicate": "jaxtune.parallel",
    "shard_batch": "jaxtune.parallel",
    "generate": "jaxtune.generation",
    "generate_text": "jaxtune.generation",
}
__all__ = list(_API)


def __getattr__(name: str):
    if name not in _API:
        raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")
    return getattr(importlib.import_module(_API[name]), name)


def __dir__():
    return [*globals(), *_API]
