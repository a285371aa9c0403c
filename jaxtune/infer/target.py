"""What a command is pointed at, loaded: a run, an adapter or a model, with its tokenizer and the tokens that end it."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.errors import UserError
from jaxtune.hf import tensors
from jaxtune.hf.stops import named_ids
from jaxtune.infer.source import Source, find, open_source


class Target(NamedTuple):
    """A model that is ready to be used.

    Attributes:
        module, params: as from `load`; params hold the adapter, unmerged.
        tokenizer: a fast transformers tokenizer, with the run's own chat template if it was given one.
        folder: the directory of the model itself (of an adapter's base).
        eos_ids: the tokens that end a text.
    """

    module: Any
    params: Any
    tokenizer: Any
    folder: Path
    eos_ids: tuple[int, ...]


def load_target(path: str | Path, adapter: str | Path | None = None, dtype: Any = None, **settings: Any) -> Target:
    """Load a run directory, a PEFT directory, or an HF directory or hub id.

    Args:
        path: the target; with `adapter`, the model or the run whose base it is put on.
        adapter: a PEFT directory.
        dtype: of activations; default: bfloat16 on a GPU, float32 elsewhere.
        settings: `Decoder`'s other fields.

    Raises:
        UserError: it is none of these, a run without result, or lacks weights or a tokenizer.
    """
    source = find(path)
    if adapter is not None:
        if source.adapter is not None and source.run is None:
            raise UserError(f"{path} is an adapter itself; give the model that {adapter} is put on.")
        source = find(adapter, source.base)._replace(config=source.config)
    tokenizer = tokenizer_of(source)
    check_continues(source)
    tensors.index_dir(source.model)  # missing weights are named before anything is compiled
    if dtype is None:
        dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    module, params, _ = open_source(source, dtype=dtype, **settings)
    return Target(module, params, tokenizer, source.model, eos_ids(tokenizer, source))


def eos_ids(tokenizer: Any, source: Source) -> tuple[int, ...]:
    """The tokens that end a text, as the tokenizer and the files of the model and the adapter name them together."""
    return named_ids(tokenizer, source.model, source.adapter)


def tokenizer_of(source: Source) -> Any:
    """The tokenizer of a source, with what its run was told about it."""
    from jaxtune.data.tokenize import load_tokenizer

    told = (source.config or {}).get("model", {})
    carried = source.tokenizer != source.model or not told.get("tokenizer")
    template = told.get("chat_template")
    return load_tokenizer(
        str(source.tokenizer if carried else told["tokenizer"]),
        template if template and Path(template).is_file() else None,
    )


def check_continues(source: Source) -> None:
    """Raise UserError for a classifier or an encoder, which give no next token."""
    from jaxtune.models import build
    from jaxtune.models.decoder import Decoder

    config = tensors.read_json(source.model / "config.json")
    kind = ((source.config or {}).get("objective") or {}).get("name", "causal_lm")
    if kind != "causal_lm" or not isinstance(build(config), Decoder):
        what = ", ".join(config.get("architectures") or [config["model_type"]])
        raise UserError(f"{source.model} ({what}) does not continue text; a model with a language model's head does.")
