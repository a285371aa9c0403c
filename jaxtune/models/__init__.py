"""Model families: `model_type` in config.json -> the module that describes it."""

import importlib
from typing import Any

from jaxtune.errors import UserError, nearest
from jaxtune.models.names import NameTable
from jaxtune.models.spec import Config

_NAMES = (
    *("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"),
    *("bert", "roberta", "distilbert", "modernbert", "vit"),
)
FAMILIES = {name: f"jaxtune.models.families.{name}" for name in _NAMES}


def family(config: dict) -> Any:
    """Return the module of the config's family: `spec(Config) -> DecoderSpec or EncoderSpec` and `NAMES`.

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
    """Return the Flax module that an HF config describes, without parameters; `settings` are fields of `Decoder`."""
    from jaxtune.models.classifier import read_labels, with_labels
    from jaxtune.models.decoder import Decoder
    from jaxtune.models.encoder import Encoder, EncoderSpec

    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise UserError(
            f"config.json: the weights are quantised (quantization_config, {method!r}), which is not supported; "
            "give the model they were made from."
        )

    described = family(config)
    try:
        spec = described.spec(Config(config))
    except (TypeError, ValueError, ArithmeticError) as error:  # text for a number, a list for a text, a size of 0
        raise UserError(f"config.json ({config['model_type']}): a value of a wrong type or size: {error}.") from error
    kind = getattr(described, "MODULE", Encoder if isinstance(spec, EncoderSpec) else Decoder)
    body = kind(spec, **settings)
    labels = read_labels(config)
    return body if labels is None else with_labels(body, labels)


def auto_class(module: Any) -> str:
    """The class of transformers that loads what a module exports."""
    if hasattr(module, "labels"):
        return f"AutoModelFor{module.labels.kind}"
    return "AutoModelForCausalLM" if hasattr(module, "head") else "AutoModel"


def task_type(module: Any) -> str:
    """What peft calls a module's task."""
    from jaxtune.models.classifier import TASK_TYPES

    return TASK_TYPES[module.labels.kind] if hasattr(module, "labels") else "CAUSAL_LM"


def names(module: Any) -> NameTable:
    """The name table of a module's family, and of its label head where it has one."""
    table = family(module.spec.hf_config).NAMES
    return module.names(table) if hasattr(module, "labels") else table
