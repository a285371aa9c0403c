"""The models that an evaluation compares: a tuned model and its base."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.errors import UserError
from jaxtune.evaluate.kept import key_of
from jaxtune.files import hash_of
from jaxtune.hf.load import load, read_config, resolve
from jaxtune.hf.peft import grown_for, load_adapter
from jaxtune.infer.generation import prepare
from jaxtune.infer.source import Tuned, same_base
from jaxtune.methods.vocabulary import resize, untie


class System(NamedTuple):
    """One model, ready to decode.

    Attributes:
        name: "base" or "tuned"; "model" where there is nothing to compare with.
        module, params: a decoder.
        identity: a hash that changes with the weights.
    """

    name: str
    module: Any
    params: Any
    identity: str


def systems(source: Tuned, *, base: bool = True, dtype: Any = None) -> Iterator[System]:
    """Yield the base and the tuned model of a source, one after the other; of a plain model, the model alone.

    An adapter shares its base's weights, quantised if they were in its run; of two whole models only one is in memory
    at a time, if the caller keeps none.

    Args:
        source: from `infer.source.find`.
        base: False leaves the base out.
        dtype: of activations.
    """
    if source.adapter is not None:
        with same_base(source):
            module, params = load(source.model, dtype=dtype, quantization=source.quantization)
        below = base_identity(source, dtype)
        module, params = grown_for(source.adapter, module, params)  # the rows have tokens that were added
        if base:
            yield System("base", module, prepare(module, params), below)
        module, params, tuned, _ = adapted(source, module, params)
        del params
        yield System("tuned", module, prepare(module, tuned), key_of(below, identity(source.adapter)))
        return
    named = ["tuned"] if source.run else ["model"]
    folders = [source.model]
    if source.run and base:
        named, folders = ["base", "tuned"], [resolve(source.base), source.model]
    for name, folder in zip(named, folders, strict=True):
        with same_base(source) if name == "base" else nullcontext():
            module, params = load(folder, dtype=dtype)
        if (rows := read_config(source.model).get("vocab_size") or 0) > getattr(module.spec, "vocab", rows):
            module, params = resize(module, params, rows)
        yield System(name, module, prepare(module, params), identity(folder, str(dtype)))


def adapted(source: Tuned, module: Any, params: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """A source's adapter on its base: (module, the base with room for new tokens, with the adapter, config)."""
    module, params = grown_for(source.adapter, module, params)
    tuned, _, config = load_adapter(module, params, source.adapter, base=None if source.any_base else source.base)
    return module, params, tuned, config


class Pair(NamedTuple):
    """A base and what was tuned from it, both in memory, as they were trained: an adapter is not merged.

    Attributes:
        module: of both.
        base, tuned: parameters; an adapter shares its base's arrays.
        identity: a hash that changes with the weights of either.
        config: of the adapter; None of whole models.
    """

    module: Any
    base: Any
    tuned: Any
    identity: str
    config: dict[str, Any] | None = None


def pair(source: Tuned, flag: str, dtype: Any = None) -> Pair:
    """Load both models of a source.

    Args:
        source: from `infer.source.find`.
        dtype: of activations.
        flag: what asks for both, for messages.

    Raises:
        UserError: it names no base.
    """
    if source.adapter is None and source.run is None:
        raise UserError(f"{flag}: {source.model} is a whole model and names no base; give a run, or an adapter.")
    with same_base(source):
        module, base = load(
            source.model if source.adapter else resolve(source.base), dtype=dtype, quantization=source.quantization
        )
    if source.adapter is not None:
        module, base, tuned, config = adapted(source, module, base)
        base = _with_head(base, tuned)
        return Pair(module, base, tuned, key_of(base_identity(source, dtype), identity(source.adapter)), config)
    grown, tuned = load(source.model, dtype=dtype)
    folders = identity(resolve(source.base), str(dtype)), identity(source.model, str(dtype))
    return Pair(grown, _with_head(base, tuned), tuned, key_of(*folders))


def _with_head(base: Any, tuned: Any) -> Any:
    """The base with a head of its own, which is its table transposed, where tuning gave the tied model one."""
    return untie(base) if "lm_head" in tuned and "lm_head" not in base and "embed_tokens" in base else base


def base_identity(source: Tuned, dtype: Any) -> str:
    """A hash of an adapter's base, with its quantization and dtype."""
    return identity(source.model, str(dtype), *filter(None, [source.quantization]))


def identity(folder: Path, *more: Any) -> str:
    """A hash of the bytes of configs and weights."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")])
    return key_of([[file.name, hash_of(file)] for file in files], *more)
