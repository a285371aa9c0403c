"""Directories of sentence-transformers in and out: how a model's hidden states become the vector of a text.

modules.json                          the modules in order: Transformer, Pooling, maybe Dense ones, maybe Normalize
1_Pooling/config.json                 the pooling
2_Dense/                              config.json and model.safetensors of a dense layer
sentence_bert_config.json             the most tokens of a text
config_sentence_transformers.json     prompts by name, which stand before a text
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxtune.errors import UserError
from jaxtune.hf import tensors
from jaxtune.hf.tensors import read_json
from jaxtune.methods.places import DENSE

MODULES = "modules.json"
DOCUMENT = ("document", "passage", "corpus")  # names of the prompt of documents, the first of which counts
THEIRS = {"cls": "cls", "mean": "mean", "last": "lasttoken"}
_FLAGS = {
    **{"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"},
    **{"mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens"},
    **{"weightedmean": "pooling_mode_weightedmean_tokens", "lasttoken": "pooling_mode_lasttoken"},
}


_ACTIVATIONS = {
    **{"identity": "torch.nn.modules.linear.Identity", "tanh": "torch.nn.modules.activation.Tanh"},
    **{"relu": "torch.nn.modules.activation.ReLU", "gelu": "torch.nn.modules.activation.GELU"},
    **{"silu": "torch.nn.modules.activation.SiLU", "sigmoid": "torch.nn.modules.activation.Sigmoid"},
}


@dataclass(frozen=True)
class Dense:
    """A dense layer above the pooling.

    Attributes:
        inputs, outputs: channels.
        activation: what follows it, one of "identity", "tanh", "relu", "gelu", "silu" and "sigmoid".
        bias: whether it has one.
    """

    inputs: int
    outputs: int
    activation: str = "identity"
    bias: bool = True

    def draw(self, seed: Any) -> dict[str, np.ndarray]:
        """New parameters: orthonormal columns, so that a square layer leaves all cosines as they are."""
        normal = np.random.default_rng(seed).standard_normal((max(self.inputs, self.outputs),) * 2)
        kernel = np.linalg.qr(normal)[0][: self.inputs, : self.outputs].astype(np.float32)
        return {"kernel": kernel} | ({"bias": np.zeros(self.outputs, np.float32)} if self.bias else {})


@dataclass(frozen=True)
class Pooled:
    """How vectors are made of hidden states.

    Attributes:
        pooling: "mean", "cls" or "last".
        dense: the layers above it, in order.
        normalize: vectors are divided by their lengths.
        prompts: name -> what stands before a text; "query" and "document" are used in training.
        default: the name of the prompt of texts for which none is named; None: they have none.
        max_length: the most tokens of a text; None: the model's positions.
    """

    pooling: str
    normalize: bool = True
    prompts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    max_length: int | None = None
    dense: tuple[Dense, ...] = ()
    default: str | None = None

    def width(self, module: Any) -> int:
        """The channels of a vector."""
        return self.dense[-1].outputs if self.dense else module.spec.width

    def write(self, folder: Path, width: int, params: Mapping[str, Any]) -> None:
        """Put the files of sentence-transformers beside those of a model of so many channels; the dense layers' numbers
        are in `params`."""
        kinds = ["Transformer", "Pooling", *["Dense"] * len(self.dense), *(["Normalize"] if self.normalize else [])]
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
        for module in modules:
            (folder / module["path"]).mkdir(exist_ok=True)
        files = {MODULES: modules, "1_Pooling/config.json": pooling}
        for i, layer in enumerate(self.dense):
            files[f"{i + 2}_Dense/config.json"] = {
                **{"in_features": layer.inputs, "out_features": layer.outputs, "bias": layer.bias},
                "activation_function": _ACTIVATIONS[layer.activation],
            }
            own = {name: np.asarray(x, np.float32) for name, x in params[DENSE][str(i)].items()}
            arrays = {"linear.weight": np.ascontiguousarray(own["kernel"].T)}
            arrays |= {"linear.bias": own["bias"]} if layer.bias else {}
            tensors.write(folder / f"{i + 2}_Dense", arrays, shard_bytes=2**63)
        files |= {
            "sentence_bert_config.json": {"max_seq_length": self.max_length, "do_lower_case": False},
            "config_sentence_transformers.json": {
                "prompts": dict(self.prompts),
                "default_prompt_name": self.default,
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
    known = ["Transformer", "Pooling", *["Dense"] * kinds.count("Dense"), *["Normalize"] * ("Normalize" in kinds)]
    if kinds != known or modules[0].get("path"):
        shown = ", ".join(kinds)
        raise UserError(
            f"{folder / MODULES}: the modules are {shown}; expected Transformer (in the directory itself), Pooling, "
            "maybe Dense layers, and maybe Normalize. Others are not supported."
        )
    named = [f"{i}_{kind}" for i, kind in enumerate(kinds) if kind in ("Pooling", "Dense")]
    if wrong := [(m.get("path"), name) for m, name in zip(modules[1:], named) if m.get("path") != name]:
        raise UserError(f"{folder / MODULES} names the folder {wrong[0][0]!r}; expected {wrong[0][1]!r}.")
    config = read_json(folder / named[0] / "config.json")
    prompts, default = _prompts(folder)
    return Pooled(
        _pooling(folder, config),
        "Normalize" in kinds,
        MappingProxyType(prompts),
        read_max_length(folder),
        tuple(_dense(folder / name) for name in named[1:]),
        default,
    )


def _dense(folder: Path) -> Dense:
    """A dense layer, as its directory describes it.

    Raises:
        UserError: it has a residual sum, or an activation that is not supported.
    """
    config = read_json(folder / "config.json")
    asked = config.get("activation_function", _ACTIVATIONS["tanh"])
    found = next((ours for ours, theirs in _ACTIVATIONS.items() if theirs == asked), None)
    if found is None or config.get("use_residual"):
        what = "a residual sum" if config.get("use_residual") else f"the activation {asked}"
        known = ", ".join(name.rpartition(".")[2] for name in _ACTIVATIONS.values())
        raise UserError(f"{folder}/config.json: a dense layer with {what}; supported: {known}, without a residual sum.")
    try:
        return Dense(int(config["in_features"]), int(config["out_features"]), found, bool(config.get("bias", True)))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder}/config.json: in_features and out_features are not two numbers.") from None


def read_dense(folder: Path, pooled: Pooled) -> dict[str, Any]:
    """The parameters of a directory's dense layers, {DENSE: {"0": {"kernel": f32[K,N], "bias": f32[N]}}}; {}: it has
    none.

    Raises:
        UserError: they are not there, pickled, or of another shape than their config says.
    """
    found = {}
    for i, layer in enumerate(pooled.dense):
        where = folder / f"{i + 2}_Dense"
        if not (where / "model.safetensors").is_file():
            raise UserError(
                f"{where} holds no model.safetensors (pickle is never read). Write the directory again where you trust "
                f"it: SentenceTransformer('{folder}').save_pretrained('{folder}-safetensors')"
            )
        entries = tensors.index_dir(where)
        wanted = {"linear.weight": (layer.outputs, layer.inputs)} | (
            {"linear.bias": (layer.outputs,)} if layer.bias else {}
        )
        shapes = {name: entry.shape for name, entry in entries.items()}
        if shapes != wanted:
            raise UserError(f"{where}/model.safetensors holds {shapes}; its config.json describes {wanted}.")
        arrays = {name: np.empty(shape, np.float32) for name, shape in wanted.items()}
        tensors.read_all([(entries[name], array) for name, array in arrays.items()])
        bias = {"bias": arrays["linear.bias"]} if layer.bias else {}
        found[str(i)] = {"kernel": np.ascontiguousarray(arrays["linear.weight"].T)} | bias
    return {DENSE: found} if found else {}


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


def _prompts(folder: Path) -> tuple[dict[str, str], str | None]:
    """The prompts by name, that of documents under one name, and the name of the one that is the default."""
    file = folder / "config_sentence_transformers.json"
    config = read_json(file) if file.is_file() else {}
    found = {str(name): str(text) for name, text in (config.get("prompts") or {}).items() if text}
    of_documents = next((found[name] for name in DOCUMENT if name in found), None)
    default = config.get("default_prompt_name")
    return found if of_documents is None else found | {DOCUMENT[0]: of_documents}, default if default in found else None


def read_max_length(folder: Path) -> int | None:
    """The most tokens of a text that a directory of sentence-transformers names; None: it names none.

    Recent versions of it name them in the tokenizer's file alone.
    """
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        found = read_json(folder / name).get(key) if (folder / name).is_file() else None
        if isinstance(found, int) and 0 < found < 10**6:  # a tokenizer without a limit has one of 10^30
            return found
    return None
