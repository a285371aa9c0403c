"""Directories of sentence-transformers in and out: how a model's hidden states become the vector of a text.

modules.json                          the modules in order: Transformer, Pooling, maybe Normalize
1_Pooling/config.json                 the pooling
sentence_bert_config.json             the most tokens of a text
config_sentence_transformers.json     prompts by name, which stand before a text
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxtune.errors import UserError
from jaxtune.hf.tensors import read_json

MODULES = "modules.json"
THEIRS = {"cls": "cls", "mean": "mean", "last": "lasttoken"}
_FLAGS = {
    **{"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"},
    **{"mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens"},
    **{"weightedmean": "pooling_mode_weightedmean_tokens", "lasttoken": "pooling_mode_lasttoken"},
}


@dataclass(frozen=True)
class Pooled:
    """How vectors are made of hidden states.

    Attributes:
        pooling: "mean", "cls" or "last".
        normalize: vectors are divided by their lengths.
        prompts: name -> what stands before a text; "query" and "document" are used in training.
        max_length: the most tokens of a text; None: the model's positions.
    """

    pooling: str
    normalize: bool = True
    prompts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    max_length: int | None = None

    def write(self, folder: Path, width: int) -> None:
        """Put the files of sentence-transformers beside those of the model."""
        kinds = ["Transformer", "Pooling", *(["Normalize"] if self.normalize else [])]
        modules = [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(kinds)
        ]
        pooling = {"word_embedding_dimension": width}
        pooling |= {flag: name == THEIRS[self.pooling] for name, flag in _FLAGS.items()} | {"include_prompt": True}
        (folder / "1_Pooling").mkdir(exist_ok=True)
        if self.normalize:
            (folder / "2_Normalize").mkdir(exist_ok=True)
        files = {
            MODULES: modules,
            "1_Pooling/config.json": pooling,
            "sentence_bert_config.json": {"max_seq_length": self.max_length, "do_lower_case": False},
            "config_sentence_transformers.json": {
                "prompts": dict(self.prompts),
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            },
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_pooled(folder: Path) -> Pooled | None:
    """How the vectors of a directory are made; None: it is no directory of sentence-transformers.

    Raises:
        UserError: it has a module or a pooling that is not supported.
    """
    if not (folder / MODULES).is_file():
        return None
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / MODULES} is no JSON: {error}.") from None
    if not isinstance(modules, list):
        raise UserError(f"{folder / MODULES} holds no list of modules.")
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules if isinstance(m, dict)]
    known = ("Transformer", "Pooling", "Normalize")
    if kinds not in (list(known), list(known[:2])) or modules[0].get("path"):
        shown = ", ".join(kinds)
        raise UserError(
            f"{folder / MODULES}: the modules are {shown}; expected Transformer (in the directory itself), Pooling and "
            "maybe Normalize. Others, such as Dense, are not supported."
        )
    config = read_json(folder / str(modules[1].get("path")) / "config.json")
    return Pooled(
        _pooling(folder, config),
        "Normalize" in kinds,
        MappingProxyType(_prompts(folder)),
        read_max_length(folder),
    )


def _pooling(folder: Path, config: Mapping[str, Any]) -> str:
    asked = config.get("pooling_mode") or [name for name, flag in _FLAGS.items() if config.get(flag)] or ["mean"]
    asked = [asked] if isinstance(asked, str) else list(asked)
    found = next((ours for ours, theirs in THEIRS.items() if asked == [theirs]), None)
    if found is None or config.get("include_prompt") is False:
        what = "+".join(map(str, asked)) + ("" if config.get("include_prompt", True) else ", prompts left out")
        raise UserError(
            f"{folder}/1_Pooling/config.json: the pooling is {what}; supported: {', '.join(THEIRS.values())}, one of "
            "them, over the prompt too."
        )
    return found


def _prompts(folder: Path) -> dict[str, str]:
    file = folder / "config_sentence_transformers.json"
    prompts = read_json(file).get("prompts") if file.is_file() else None
    return {str(name): str(text) for name, text in (prompts or {}).items() if text}


def read_max_length(folder: Path) -> int | None:
    """The most tokens of a text that a directory of sentence-transformers names; None: it names none."""
    file = folder / "sentence_bert_config.json"
    found = read_json(file).get("max_seq_length") if file.is_file() else None
    return found if isinstance(found, int) and found > 0 else None
