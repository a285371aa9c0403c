"""peft's interface on a functional model: `from jaxtune.peft import LoraConfig, get_peft_model`.

A thin layer over `jaxtune.load` and `jaxtune.methods.table`, for code that uses peft's names.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.errors import UserError, nearest
from jaxtune.hf.load import load
from jaxtune.hf.peft import export_adapter, load_adapter
from jaxtune.methods import targets
from jaxtune.methods.settings import ROWS, names
from jaxtune.methods.table import tune
from jaxtune.tree import count
from jaxtune.weights.adapters import virtual_tokens


class PeftConfig:
    """A config of peft's with the options that jaxtune supports; any other option is an error.

    Keyword args and their defaults are those of the method's settings (`jaxtune.methods.settings`); `task_type` must be
    "CAUSAL_LM", "SEQ_2_SEQ_LM" or None.
    """

    method: str
    table: Mapping[str, Any] = {}

    def __init__(self, task_type: str | None = None, **settings: Any):
        name = type(self).__name__
        own = names(ROWS[self.method].settings)
        if unknown := [key for key in settings if key not in own]:
            raise UserError(
                f"{name}: {unknown[0]!r} is not supported.{nearest(unknown[0], own)} Known: {', '.join(sorted(own))}."
            )
        if task_type not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
            raise UserError(
                f"{name}: task_type={task_type!r} is not supported; supported: 'CAUSAL_LM', 'SEQ_2_SEQ_LM'."
            )
        self.settings = settings

    def settings_for(self, module: Any) -> dict[str, Any]:
        """The settings for a model; default targets are peft's for its family.

        Raises:
            UserError: peft has none for the family.
        """
        if not self.table or "target_modules" in self.settings:
            return self.settings
        family = module.spec.hf_config["model_type"]
        if family not in self.table and self.settings.get("target_parameters"):  # as in peft, these alone
            return self.settings | {"target_modules": ()}
        if family not in self.table:
            raise UserError(
                f"{type(self).__name__}: peft has no default targets for {family!r}; give target_modules, names of "
                "modules or 'all-linear'."
            )
        return self.settings | self.defaults(self.table[family])

    @staticmethod
    def defaults(entry: Any) -> dict[str, Any]:
        return {"target_modules": entry}


class LoraConfig(PeftConfig):
    """peft's LoraConfig: `jaxtune.lora`."""

    method, table = "lora", targets.LORA


class HiraConfig(PeftConfig):
    """peft's HiraConfig: `jaxtune.hira`."""

    method, table = "hira", targets.LORA  # peft's table is LoRA's


class MissConfig(PeftConfig):
    """peft's MissConfig: `jaxtune.miss`."""

    method, table = "miss", targets.LORA


class IA3Config(PeftConfig):
    """peft's IA3Config: `jaxtune.ia3`."""

    method, table = "ia3", targets.IA3

    @staticmethod
    def defaults(entry: Any) -> dict[str, Any]:
        return dict(zip(("target_modules", "feedforward_modules"), entry, strict=True))


class PromptTuningConfig(PeftConfig):
    """peft's PromptTuningConfig: `jaxtune.prompt_tuning`."""

    method = "prompt_tuning"


@dataclasses.dataclass
class Model:
    """A loaded model: `module` is static, `params` is data, `path` is its source."""

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
        """tokens i32[B, T] -> logits f32[B, T, V]; with a soft prompt of P vectors, [B, P + T, V], as peft's."""
        if prefix := virtual_tokens(self.params):
            tokens = jnp.pad(tokens, ((0, 0), (len(prefix), 0))).at[:, : len(prefix)].set(jnp.asarray(prefix))
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


def get_peft_model(model: Model, config: PeftConfig, seed: int = 0) -> PeftModel:
    """Put new adapters on a model, as peft's function of this name does."""
    settings = config.settings_for(model.module)
    params, mask = tune(config.method, model.params, jax.random.key(seed), model.module, settings)
    return PeftModel(model.module, params, mask, model.path, settings)
