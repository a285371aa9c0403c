"""peft's front door: `from jaxtune.peft import LoraConfig, get_peft_model`, on a functional model.

A thin shell over `jaxtune.load` and `jaxtune.lora`, for code that is written against peft's names.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxtune.errors import UserError, nearest
from jaxtune.hf.load import load
from jaxtune.hf.peft import export_adapter, load_adapter
from jaxtune.methods import lora
from jaxtune.tree import count


class LoraConfig:
    """peft's LoraConfig, as far as jaxtune knows it; an option it does not know is an error, never ignored.

    Args as `jaxtune.lora`'s; `task_type` must be "CAUSAL_LM" or None.
    """

    def __init__(
        self,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
        bias: str = "none",
        use_rslora: bool = False,
        task_type: str | None = None,
        **unknown: Any,
    ):
        if unknown:
            known = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "task_type")
            name = next(iter(unknown))
            raise UserError(f"LoraConfig: {name!r} is not supported.{nearest(name, known)} Known: {', '.join(known)}.")
        if task_type not in (None, "CAUSAL_LM"):
            raise UserError(f"LoraConfig: task_type={task_type!r} is not supported; supported: 'CAUSAL_LM'.")
        self.settings = {
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "target_modules": target_modules,
            "bias": bias,
            "use_rslora": use_rslora,
        }


@dataclasses.dataclass
class Model:
    """A loaded model: `module` is static, `params` is data, `path` is where it came from."""

    module: Any
    params: Any
    path: str

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **settings: Any) -> "Model":
        """Load an HF directory or hub id; `settings` as for `jaxtune.load`."""
        return cls(*load(path_or_id, **settings), str(path_or_id))


AutoModelForCausalLM = Model


@dataclasses.dataclass
class PeftModel:
    """A model with adapters: `params` and `mask` go into `jaxtune.partition` and the train step."""

    module: Any
    params: Any
    mask: Any
    path: str
    config: dict[str, Any]

    def __call__(self, tokens: jax.Array, **inputs: Any) -> jax.Array:
        """tokens i32[B, T] -> logits f32[B, T, V]."""
        return self.module.apply({"params": self.params}, tokens, **inputs)

    def print_trainable_parameters(self) -> None:
        """Print the line that peft prints."""
        print(count(self.params, self.mask))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a PEFT directory; it must not exist."""
        export_adapter(self.module, self.params, folder, base=self.path, config=self.config, mask=self.mask)

    @classmethod
    def from_pretrained(cls, model: Model, folder: str | Path) -> "PeftModel":
        """Load a PEFT directory onto its base."""
        params, mask, config = load_adapter(model.module, model.params, folder, base=model.path)
        return cls(model.module, params, mask, model.path, config)


def get_peft_model(model: Model, config: LoraConfig, seed: int = 0) -> PeftModel:
    """Put fresh adapters on a model, as peft's function of this name does."""
    params, mask = lora(model.params, jax.random.key(seed), module=model.module, **config.settings)
    return PeftModel(model.module, params, mask, model.path, config.settings)
