"""Model families: `model_type` in config.json -> the module that describes it."""

import importlib
from typing import Any

from jaxtune.errors import UserError, nearest
from jaxtune.models.names import NameTable
from jaxtune.models.spec import Config

FAMILIES = {name: f"jaxtune.models.{name}" for name in ("gpt2", "llama", "mistral", "qwen2", "qwen3")}


def family(config: dict) -> Any:
    """Return the module of the config's family: `spec(Config) -> DecoderSpec` and `NAMES`.

    Raises:
        UserError: the family is not supported.
    """
    name = config.get("model_type")
    if name not in FAMILIES:
        raise UserError(
            f"config.json: model_type={name!r} is not supported; supported: {', '.join(FAMILIES)}."
            f"{nearest(str(name), FAMILIES)}"
        )
    return importlib.import_module(FAMILIES[name])


def build(config: dict, **settings: Any) -> Any:
    """Return the Flax module that an HF config describes, without parameters. `settings` are `Decoder`'s fields."""
    from jaxtune.models.decoder import Decoder

    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise UserError(
            f"config.json: the weights are quantised (quantization_config, {method!r}), which is not supported; "
            "give the model they were made from."
        )

    return Decoder(family(config).spec(Config(config)), **settings)


def names(module: Any) -> NameTable:
    """The name table of a module's family."""
    return family(module.spec.hf_config).NAMES
