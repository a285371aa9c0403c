"""Open anything with weights: a run, an adapter with its base, or a model, with its tokenizer."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.errors import UserError
from jaxtune.hf import tensors
from jaxtune.hf.digest import BaseFiles, recorded
from jaxtune.hf.load import load, open_module, read_config, resolve
from jaxtune.hf.peft import find_base, open_adapter, read_adapter_config
from jaxtune.hf.stops import named_ids


class Tuned(NamedTuple):
    """The location of tuned weights.

    Attributes:
        model: directory of the model itself; with an adapter, of its base.
        base: the model that was tuned, as named by the run or the adapter; for a plain model its own path.
        adapter: directory of a PEFT adapter, or None.
        run: the run directory, or None.
        config: the run's config.json, or None.
        any_base: the adapter may lie on a base of another name than its own.
    """

    model: Path
    base: str
    adapter: Path | None = None
    run: Path | None = None
    config: dict[str, Any] | None = None
    any_base: bool = False

    @property
    def tokenizer(self) -> Path:
        """The directory to take the tokenizer from: the tuned one's own, if it has one."""
        own = self.adapter
        return own if own and (own / "tokenizer_config.json").is_file() else self.model

    @property
    def quantization(self) -> str | None:
        """The quantization of the base on which a run's adapter was trained; None: not quantised."""
        value = ((self.config or {}).get("model") or {}).get("quantization", "none")
        return None if self.adapter is None or value == "none" else value


class Target(NamedTuple):
    """A language model that is ready to be used.

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


def same_base(source: Tuned) -> AbstractContextManager[None]:
    """Inside the block, load the base of a source; it is checked to be the one that the run was started with.

    Raises:
        UserError: it is another, and `source.any_base` does not allow that.
    """
    run = source.run or (source.adapter and recorded(source.adapter))
    folder = source.model if source.adapter else resolve(source.base)
    settings = (source.config or {}).get("model") or {}
    other = settings.get("tokenizer") not in (None, settings.get("path")) and Path(settings["tokenizer"]).expanduser()
    files = BaseFiles(folder, other if other and other.is_dir() else None)
    return files.same(None if source.any_base else run)


def find(
    path: str | Path, base: str | Path | None = None, *, adapter: str | Path | None = None, any_base: bool = False
) -> Tuned:
    """Find out what `path` is: a run directory, a PEFT directory, or an HF directory or hub id.

    Args:
        path: what to look at.
        base: the model that an adapter is put on; default: the one that it names.
        adapter: a PEFT directory to put on `path`; that is then a model, or a run, whose base is taken.
        any_base: accept a base of another name than the adapter's own.

    Raises:
        UserError: it is none of these, or a run that has not written its result yet.
    """
    folder = resolve(path)
    if adapter is not None:
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{path} is an adapter itself; give the model that {adapter} is put on.")
        if base is not None:
            raise UserError(f"--base={base} has no effect: {adapter} is put on {path}.")
        under = find(path)
        return find(adapter, under.base, any_base=any_base)._replace(config=under.config)
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder, base, any_base)
    config = tensors.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "tune" in config:
        named = str(base or _path(config))
        if (folder / "adapter").is_dir():
            return _adapter(folder / "adapter", named, any_base)._replace(run=folder, config=config)
        if (folder / "model").is_dir():
            if base is not None:
                raise UserError(f"The run in {folder} holds a whole model; a base belongs to an adapter only.")
            return Tuned(folder / "model", named, run=folder, config=config)
        raise UserError(f"The run in {folder} has no result yet (adapter/ or model/); run its command again to resume.")
    if "model_type" in config:
        if base is not None or any_base:
            raise UserError(f"{folder} is a whole model; a base belongs to an adapter only.")
        return Tuned(folder, str(path))
    raise UserError(
        f"{folder} is neither a run, nor an adapter (adapter_config.json), nor a model (config.json with model_type)."
    )


def _path(config: dict[str, Any]) -> Any:
    """The model.path of a run's config.json."""
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        raise UserError("config.json of the run has no model.path; the file is damaged.")
    return model["path"]


def _adapter(folder: Path, base: str | Path | None, any_base: bool) -> Tuned:
    named, model = find_base(folder, base)
    return Tuned(model, named, adapter=folder, any_base=any_base)


def open_source(source: Tuned, **settings: Any) -> tuple[Any, Any, dict[str, Any] | None]:
    """Load a source as `(module, params, adapter config)`, the last None for a whole model.

    Args:
        source: from `find`.
        settings: as for `load`.

    Raises:
        UserError: as `load` and `load_adapter`.
    """
    if source.adapter is None:
        return *load(source.model, **settings), None
    settings["dtype"] = settings.get("dtype") or jnp.float32
    module, params, _, config = open_adapter(
        source.adapter, base=source.base, any_base=source.any_base, quantization=source.quantization, **settings
    )
    return module, params, config


def load_target(source: Tuned | str | Path, dtype: Any = None, **settings: Any) -> Target:
    """Load a language model: what `find` found, or a run directory, a PEFT directory, an HF directory or hub id.

    Args:
        source: from `find`, or what `find` takes.
        dtype: of activations; default: bfloat16 on a GPU, float32 elsewhere.
        settings: other fields of `Decoder`.

    Raises:
        UserError: it is none of these, a run without result, or lacks weights or a tokenizer.
    """
    if not isinstance(source, Tuned):
        source = find(source)
    tokenizer = tokenizer_of(source)
    check_continues(source)
    tensors.index_dir(source.model)  # missing weights are named before anything is compiled
    if dtype is None:
        dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    module, params, _ = open_source(source, dtype=dtype, **settings)
    if not module.continues:
        raise UserError(f"{source.adapter} was made over a model without an output head and does not continue text.")
    return Target(module, params, tokenizer, source.model, eos_ids(tokenizer, source))


def eos_ids(tokenizer: Any, source: Tuned) -> tuple[int, ...]:
    """All tokens that end a text by the tokenizer, or by the files of the model or the adapter."""
    return named_ids(tokenizer, source.model, source.adapter)


def tokenizer_of(source: Tuned) -> Any:
    """The tokenizer of a source, with the settings of its run."""
    from jaxtune.data.tokenizer import load_tokenizer

    settings = (source.config or {}).get("model", {})
    carried = source.tokenizer != source.model or not settings.get("tokenizer")
    template = settings.get("chat_template")
    return load_tokenizer(
        str(source.tokenizer if carried else settings["tokenizer"]),
        template if template and Path(template).is_file() else None,
        ((source.config or {}).get("data") or {}).get("date"),
    )


def check_reads_one_text(folder: Path, what: str) -> None:
    """Raise UserError for an encoder-decoder, on which `what`, a command or flag, is not measured."""
    from jaxtune import models

    config = read_config(folder)
    if models.build(config).reads_source:
        raise UserError(
            f"{what} is not for encoder-decoders, which read one text and write another; {folder} is one "
            f"(model_type={config['model_type']!r})."
        )


def check_continues(source: Tuned) -> None:
    """Raise UserError for a classifier or an encoder, which predict no next token."""
    config = read_config(source.model)
    task = None if source.adapter is None else read_adapter_config(source.adapter)["task_type"]
    if task not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise UserError(f"{source.adapter} is for {task} and does not continue text.")
    if not open_module(config, source.model).continues:
        what = ", ".join(config.get("architectures") or [config["model_type"]])
        raise UserError(f"{source.model} ({what}) does not continue text; a model with a language model's head does.")
