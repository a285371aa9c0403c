"""The tokens at which generation stops, and those that a tuned model was taught to end its turns with."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError
from jaxtune.hf import tensors
from jaxtune.reading import is_inside, not_copied

FILE = "generation_config.json"


def _ids(value: Any, where: str | Path) -> set[int]:
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if wrong := [i for i in ids if type(i) is not int]:
        raise UserError(f"{where}: eos_token_id={wrong[0]!r}, expected a whole number or a list of them.")
    return set(ids)


def ids_by_file(folder: Path) -> list[set[int]]:
    """The tokens that end a text by each file of a directory that may name some, the first to be believed first.

    Raises:
        UserError: they are no ids.
    """
    files = [folder / name for name in (FILE, "config.json") if (folder / name).is_file()]
    return [_ids(tensors.read_json(file).get("eos_token_id"), file) for file in files]


def stop_ids(folder: Path) -> set[int]:
    """The tokens at which transformers and vLLM stop a model of this directory, as its files say."""
    return next(iter(ids_by_file(folder)), set())


def named_ids(tokenizer: Any, *folders: Path | None) -> tuple[int, ...]:
    """All tokens that end a text by the tokenizer or by any file of the directories."""
    found = _ids(tokenizer.eos_token_id, "the tokenizer")
    for folder in filter(None, folders):
        found |= set().union(*ids_by_file(folder))
    return tuple(sorted(found))


def write_generation_config(base: Path, folder: Path, ends: Collection[int] = ()) -> list[str]:
    """Write the generation config of `base` to `folder`, with the tokens that end a trained turn among its stops.

    Without `ends` that `base` does not know, its file is copied, if it has one. Returns a sentence on one that is a
    link to elsewhere, of which nothing but its stops is read.
    """
    known, path = stop_ids(base), base / FILE
    away = path.is_file() and not is_inside(path, base)
    there, notes = path.is_file() and not away, [not_copied(path)] if away else []
    if set(ends) <= known and not there:
        return notes
    config = tensors.read_json(path) if there else {}
    if not there and (base / "config.json").is_file():
        base_config = tensors.read_json(base / "config.json")
        kept = ("bos_token_id", "pad_token_id")
        config = {name: base_config[name] for name in kept if base_config.get(name) is not None}
    if not set(ends) <= known:
        config["eos_token_id"] = sorted(known | set(ends))
    (folder / FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return notes


def added_line(tokenizer: Any, base: Path, ends: Collection[int]) -> list[str]:
    """A sentence on the tokens that end trained turns and at which `base` does not stop."""
    missing, known = sorted(set(ends) - stop_ids(base)), sorted(stop_ids(base))
    if not missing:
        return []

    def named(ids: Collection[int]) -> str:
        return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in ids) or "no token"

    return [
        f"Trained turns end with {named(missing)}, and the model stops at {named(known)}: generation_config.json of "
        "the result has both, and jaxtune generate and eval stop at both."
    ]
