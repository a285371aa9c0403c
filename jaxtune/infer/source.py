"""One way to open whatever holds tuned weights: a run, an adapter with its base, or a model directory."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.errors import UserError
from jaxtune.hf import tensors
from jaxtune.hf.load import load, resolve
from jaxtune.hf.peft import load_adapter, read_adapter_config


class Source(NamedTuple):
    """Where tuned weights lie.

    Attributes:
        model: directory of the model itself; with an adapter, of its base.
        base: what was tuned, as the run or the adapter names it; the model's own path where nothing says so.
        adapter: directory of a PEFT adapter, or None.
        run: the run directory, or None.
        config: the run's config.json, or None.
    """

    model: Path
    base: str
    adapter: Path | None = None
    run: Path | None = None
    config: dict[str, Any] | None = None

    @property
    def tokenizer(self) -> Path:
        """The directory to take the tokenizer from: the tuned one's own, if it has one."""
        own = self.adapter
        return own if own and (own / "tokenizer_config.json").is_file() else self.model

    @property
    def quantization(self) -> str | None:
        """How the base was quantised under the adapter of a run, which was trained on those numbers; None: not."""
        told = ((self.config or {}).get("model") or {}).get("quantization", "none")
        return None if self.adapter is None or told == "none" else told


def find(path: str | Path, base: str | Path | None = None) -> Source:
    """Find out what `path` is: a run directory, a PEFT directory, or an HF directory or hub id.

    Args:
        base: the model that an adapter is put on; default: the one that it names.

    Raises:
        UserError: it is none of these, or a run that has not written its result yet.
    """
    folder = resolve(path)
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder, base)
    config = tensors.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "tune" in config:
        named = str(base or config["model"]["path"])
        if (folder / "adapter").is_dir():
            return _adapter(folder / "adapter", named)._replace(run=folder, config=config)
        if (folder / "model").is_dir():
            return Source(folder / "model", named, run=folder, config=config)
        raise UserError(f"The run in {folder} has no result yet (adapter/ or model/); start it again to go on.")
    if "model_type" in config:
        if base is not None:
            raise UserError(f"{folder} is a whole model; a base belongs to an adapter only.")
        return Source(folder, str(path))
    raise UserError(
        f"{folder} is neither a run, nor an adapter (adapter_config.json), nor a model (config.json with model_type)."
    )


def _adapter(folder: Path, base: str | Path | None) -> Source:
    named = base or read_adapter_config(folder)["base_model_name_or_path"]
    if not named:
        raise UserError(f"{folder}/adapter_config.json does not name its base; give it with --base.")
    try:
        return Source(resolve(named), str(named), adapter=folder)
    except UserError as error:
        raise UserError(f"The base of the adapter in {folder}: {error} Give it with --base.") from None


def open_source(source: Source, *, any_base: bool = False, **settings: Any) -> tuple[Any, Any, dict[str, Any] | None]:
    """Load a source as `(module, params, adapter config)`, the last None for a whole model.

    Args:
        any_base: put the adapter also on a base of another name than its own.
        settings: as for `load`.

    Raises:
        UserError: as `load` and `load_adapter`.
    """
    module, params = load(source.model, quantization=source.quantization, **settings)
    if source.adapter is None:
        return module, params, None
    params, _, config = load_adapter(module, params, source.adapter, base=None if any_base else source.base)
    return module, params, config
