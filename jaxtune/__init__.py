"""jaxtune: fine-tune pretrained transformers in JAX. The functional API, imported lazily."""

import importlib

from jaxtune import moved  # noqa: F401  (old names of modules)

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
    "LoraWeight": "jaxtune.weights.adapters",
    "DoraWeight": "jaxtune.weights.adapters",
    "HiraWeight": "jaxtune.weights.adapters",
    "MissWeight": "jaxtune.weights.adapters",
    "Ia3Weight": "jaxtune.weights.adapters",
    "PromptWeight": "jaxtune.weights.adapters",
    "TokensWeight": "jaxtune.weights.adapters",
    "QuantWeight": "jaxtune.weights.packed",
    "ShapedWeight": "jaxtune.weights.leaf",
    "adapt": "jaxtune.weights.foreign",
    "Nf4Weight": "jaxtune.weights.packed",
    "quantize": "jaxtune.weights.packed",
    "dot": "jaxtune.weights.leaf",
    "embed": "jaxtune.weights.leaf",
    "attend": "jaxtune.weights.leaf",
    "merge": "jaxtune.weights.leaf",
    "full": "jaxtune.methods.table",
    "head": "jaxtune.methods.table",
    "lora": "jaxtune.methods.adapters",
    "hira": "jaxtune.methods.adapters",
    "miss": "jaxtune.methods.adapters",
    "ia3": "jaxtune.methods.adapters",
    "prompt_tuning": "jaxtune.methods.adapters",
    "bitfit": "jaxtune.methods.table",
    "norms": "jaxtune.methods.table",
    "embeddings": "jaxtune.methods.table",
    "last_n": "jaxtune.methods.table",
    "regex": "jaxtune.methods.table",
    "resize": "jaxtune.methods.vocabulary",
    "virtual_tokens": "jaxtune.weights.adapters",
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
    "cross_entropy": "jaxtune.objectives.token_nats",
    "optimizer": "jaxtune.train.optim",
    "schedule": "jaxtune.train.optim",
    "TrainState": "jaxtune.train.step",
    "init_state": "jaxtune.train.step",
    "make_train_step": "jaxtune.train.step",
    "make_eval_step": "jaxtune.train.step",
    "value_and_grad": "jaxtune.train.step",
    "make_mesh": "jaxtune.train.parallel",
    "replicate": "jaxtune.train.parallel",
    "shard_batch": "jaxtune.train.parallel",
    "generate": "jaxtune.infer.generation",
    "generate_text": "jaxtune.infer.generation",
}
__all__ = list(_API)


def __getattr__(name: str):
    if name not in _API:
        raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")
    return getattr(importlib.import_module(_API[name]), name)


def __dir__():
    return [*globals(), *_API]
