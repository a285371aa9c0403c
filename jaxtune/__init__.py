"""jaxtune: fine-tune pretrained transformers in JAX. The functional API, imported lazily."""

import importlib

__version__ = "0.1.0"

_API = {
    "export_adapter": "jaxtune.hf.peft",
    "export_model": "jaxtune.hf.export",
    "load": "jaxtune.hf.load",
    "load_adapter": "jaxtune.hf.peft",
}
__all__ = list(_API)


def __getattr__(name: str):
    if name not in _API:
        raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")
    return getattr(importlib.import_module(_API[name]), name)


def __dir__():
    return [*globals(), *_API]
