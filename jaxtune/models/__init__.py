"""Model families: `model_type` in config.json -> the module that describes it."""

import difflib
import importlib
import re
from typing import Any

from jaxtune.errors import UserError
from jaxtune.models.names import NameTable
from jaxtune.models.spec import Config

_NAMES = (
    *("arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2"),
    *("gpt_neox", "gpt_oss", "gptj", "granite", "helium", "llama", "ministral3", "mistral", "mixtral"),
    *("olmo2", "olmo3", "olmoe"),
    *("opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm"),
    *("starcoder2", "vaultgemma", "t5", "mt5", "bart", "mbart"),
    *("bert", "roberta", "camembert", "xlm-roberta", "electra", "distilbert", "modernbert", "vit"),
)
FAMILIES = {name: f"jaxtune.models.families.{name.replace('-', '_')}" for name in _NAMES}


def family(config: dict) -> Any:
    """Return the module of the config's family: `spec(Config) -> DecoderSpec or EncoderSpec` and `NAMES`.

    Raises:
        UserError: the family is not supported.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"config.json: model_type={name!r} is not supported; supported: {', '.join(FAMILIES)}."
            f"{_nearest_architecture(str(name), config)}{_missing(config)}"
        )
    return importlib.import_module(FAMILIES[name])


def _nearest_architecture(name: str, config: dict) -> str:
    """A hint on the supported architecture of the same line (Llama 2, 3, ...) or with the same parts, or on a slip."""
    parts, stem = set(re.split(r"[-_]", name)), re.match(r"[a-z]*", name)[0]
    line = [f for f in FAMILIES if f in parts] or [f for f in FAMILIES if stem and re.match(r"[a-z]*", f)[0] == stem]
    if line:
        return f" The nearest supported architecture is {difflib.get_close_matches(name, line, n=1, cutoff=0)[0]!r}."
    if slip := difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.85):
        return f" Did you mean {slip[0]!r}?"
    like = next((family for family, keys in _LIKE.items() if any(map(re.compile(keys).fullmatch, config))), None)
    return f" The nearest supported architecture is {like!r}." if like else ""


# A family -> keys of a config.json that its like have. The first that applies.
_LIKE = {
    "mixtral": r"(num_(local_)?|n_routed_)experts",
    "llama": r"rms_norm_eps",
    "bert": r"type_vocab_size",
    "gpt2": r"n_embd|n_layer",
}
# Keys of a config.json -> what a model with one of them has and no family here. A key counts unless null, 0 or false.
_PARTS = {
    r"(q|kv)_lora_rank": "latent attention",
    r"linear_(key|value)_head_dim|linear_conv_kernel_dim|linear_attn_config": "linear attention",
    r"(mamba|ssm)_\w+|conv_L_cache|time_step_rank": "state-space or convolution layers",
    r"alibi": "ALiBi positions",
    r"relative_attention(_num_buckets)?": "relative positions",
    r"vision_config|audio_config": "images or sound beside text",
    r"topk_method|n_group|routed_scaling_factor": "a router by groups",
    r"attention_chunk_size": "attention within chunks",
    r"num_kv_shared_layers": "layers that share keys and values",
}


def _missing(config: dict) -> str:
    """What the config asks for that no supported architecture has."""
    text = config.get("text_config")
    keys = [k for part in (config, text if isinstance(text, dict) else {}) for k, v in part.items() if v]
    found = [what for pattern, what in _PARTS.items() if any(map(re.compile(pattern).fullmatch, keys))]
    return f" The model also has what is not implemented: {', '.join(found)}." if found else ""


def build(config: dict, **settings: Any) -> Any:
    """Return the Flax module that an HF config describes, without parameters; `settings` are fields of `Decoder`."""
    from jaxtune.models.classifier import read_labels, with_labels
    from jaxtune.models.decoder import Decoder
    from jaxtune.models.encoder import Encoder, EncoderSpec
    from jaxtune.models.seq2seq import Seq2Seq

    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        if method == "mxfp4":  # experts, which are read as the numbers that they stand for
            return build({key: value for key, value in config.items() if key != "quantization_config"}, **settings)
        raise UserError(
            f"config.json: the weights are quantised (quantization_config, {method!r}), which is not supported; "
            "give the model that was quantised."
        )

    described = family(config)
    read = Config(config)
    try:
        spec = described.spec(read)
        if not isinstance(spec, EncoderSpec):
            read.get("is_encoder_decoder")
            read.refuse_unread()
        _check_heads(read, spec)
        labels = read_labels(config)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:  # text for a list, ...
        raise UserError(
            f"config.json ({config['model_type']}): a value of a wrong type or size: {type(error).__name__}: {error}."
        ) from error
    written = Decoder if getattr(spec, "encoder", None) is None else Seq2Seq
    kind = getattr(described, "MODULE", Encoder if isinstance(spec, EncoderSpec) else written)
    body = kind(spec, **settings)
    return body if labels is None else with_labels(body, labels)


def _check_heads(config: Config, spec: Any) -> None:
    """Raise UserError if the heads do not divide what they share, or cannot be rotated."""
    for block in {block for segment in spec.segments for block in segment.pattern}:
        if config.values.get("head_dim") is None and "d_kv" not in config.values and spec.width % block.heads:
            raise UserError(
                f"config.json ({config.model_type}): {block.heads} heads do not divide the width of {spec.width}."
            )
        if block.heads % block.kv_heads:
            raise UserError(
                f"config.json ({config.model_type}): {block.kv_heads} key and value heads do not divide "
                f"{block.heads} heads."
            )
        if block.rope is not None and (block.rope.dim % 2 or block.rope.dim > block.head_dim):
            raise UserError(
                f"config.json ({config.model_type}): positions rotate {block.rope.dim} of the {block.head_dim} "
                f"channels of a head, expected an even number up to {block.head_dim}."
            )


def names(module: Any) -> NameTable:
    """The name table of a module's family, with its label head's names if it has one."""
    described = family(module.spec.hf_config)
    return module.names(described.names(module.spec) if hasattr(described, "names") else described.NAMES)
