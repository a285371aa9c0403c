"""Whole models out: an HF directory that transformers, vLLM and jaxtune load."""

import dataclasses
import json
import re
import shutil
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import models
from jaxtune.files import atomic_dir, require_space
from jaxtune.hf import tensors
from jaxtune.hf.card import model_card
from jaxtune.hf.stops import write_generation_config
from jaxtune.models.names import Tensor
from jaxtune.reading import is_inside, not_copied
from jaxtune.train.processes import on_host
from jaxtune.weights.adapters import LoraWeight
from jaxtune.weights.leaf import Adapter, merge_leaf, mergeable, plain, weights_by_path

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
    "preprocessor_config.json",
)


def export_model(
    module: Any,
    params: Any,
    out: str | Path,
    *,
    base: str | Path,
    dtype: Any = None,
    tokenizer: str | Path | None = None,
    chat_template: str | None = None,
    tuned_from: str | None = None,
    facts: Mapping[str, Any] | None = None,
    ends: Collection[int] = (),
    overwrite: bool = False,
    shard_bytes: int = 5 * 10**9,
    vectors: Any = None,
) -> list[str]:
    """Merge adapters and write the model as an HF directory, atomically.

    Adapters are merged in float32 and every tensor is cast once. A tied output head stays tied, except where that would
    change the model: a LoRA on the embedding does not reach the tied head, so the head becomes a matrix of its own.

    Args:
        module: the zoo module; `module.spec.hf_config` is what config.json starts from.
        params: its parameters; leaves may be polymorphic.
        out: must not exist, unless `overwrite`.
        base: directory of the model that was tuned. Gives the dtypes, the generation config and the tokenizer.
        dtype: of all tensors, "float32", "bfloat16" or "float16"; default: each as in `base`, else as in `params`.
        tokenizer: directory of the tokenizer, if it is not in `base`.
        chat_template: Jinja text, if it is not the tokenizer's own.
        tuned_from: what the model card names as base; default: `base`.
        facts: label -> value for the model card; see `jaxtune.report.card.run_facts`.
        ends: tokens that end a trained turn; they are added to the generation config.
        overwrite: replace a directory that is there.
        shard_bytes: size above which the weights are split over several files.
        vectors: how vectors are made of the hidden states (`jaxtune.hf.vectors.Pooled`): the directory is then one of
            sentence-transformers; None: it is not.

    Returns:
        Sentences that the user should read: a head that was untied, a tokenizer that was not found.

    Raises:
        UserError: `out` exists, the disk is full, or there is a soft prompt, which no plain model holds.
    """
    base, out = Path(base).expanduser(), Path(out).expanduser()
    params, notes = whole(module, params)
    made = _tensors(module, params, base, dtype)
    with atomic_dir(out, overwrite=overwrite) as folder:
        require_space(folder, sum(tensor.nbytes for tensor in made.values()))
        tensors.write(folder, made, shard_bytes=shard_bytes)
        dtypes = [tensor.dtype for tensor in made.values()]
        tied = "lm_head" not in params or module.spec.says_tied if module.continues else None
        config = _config(module.spec.hf_config, tied, dtypes)
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        notes += write_generation_config(base, folder, ends)
        notes += copy_tokenizer(Path(tokenizer or base), folder, chat_template)
        if vectors is not None:
            vectors.write(folder, module.spec.width, params)
        card = model_card(
            name=out.name,
            base=tuned_from or public_name(base),
            adapter=None,
            facts=facts,
            notes=notes,
            auto=module.auto_class,
            vectors=vectors is not None,
            **inputs(module, folder),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return notes


def follow_export(
    module: Any, params: Any, *, base: str | Path, dtype: Any = None, shard_bytes: int = 5 * 10**9
) -> None:
    """What a process does while another writes `export_model`: it gives its parts of each tensor, in the same order."""
    made = _tensors(module, whole(module, params)[0], Path(base).expanduser(), dtype)
    for file in tensors.files(made, shard_bytes):
        for tensor in file.values():
            tensor.make()


def _tensors(module: Any, params: Any, base: Path, dtype: Any) -> dict[str, tensors.Made]:
    """What is written of the tree that `whole` returned, made one at a time."""
    leaves = weights_by_path(params)
    wanted = list(models.names(module).tensors(module.spec, set(leaves)))
    dtypes = dtypes_of(wanted, leaves, models.names(module).prefix, base, dtype)

    def made(tensor):
        shape, kept = tensor.part(plain(leaves[tensor.path]).shape), dtypes[tensor.hf]
        return tensors.Made(kept, shape[::-1] if tensor.transpose else shape, partial(hf_tensor, tensor, leaves, kept))

    return {tensor.hf: made(tensor) for tensor in wanted}


def whole(module: Any, params: Any) -> tuple[Any, list[str]]:
    """The tree that a whole model is written from, leaf by leaf, and sentences for the user on it.

    Raises:
        UserError: there is a soft prompt, which no plain model holds.
    """
    params, notes = mergeable(params), []
    if module.continues and (untied_head := _head_to_untie(params)) is not None:
        params = {**params, "lm_head": {"kernel": untied_head}}
        notes.append(
            "The output head was tied to the embedding and is now a matrix of its own: the embedding was adapted."
        )
    elif module.spec.tied and "lm_head" in params:
        notes.append("The output head was tied to the embedding and is now a matrix of its own: it was trained.")
    return params, notes + list(getattr(module, "notes", []))


def _head_to_untie(params: Any) -> jax.Array | None:
    """The base table, transposed [D, V], where the tied embedding is adapted; else None."""
    table = params["embed_tokens"]["embedding"]
    if "lm_head" in params or not isinstance(table, LoraWeight):
        return None
    return merge_leaf(table.w).T


def hf_tensor(tensor: Tensor, leaves: Mapping[str, Any], dtype: np.dtype) -> np.ndarray:
    """One HF tensor. One layer at a time is merged, so no second copy of the model is made in float32."""
    leaf = leaves[tensor.path]
    if tensor.index is not None:
        leaf = jax.tree.map(lambda x: x[tensor.index], leaf)
    if isinstance(leaf, Adapter):
        leaf = dataclasses.replace(leaf, w=merge_leaf(leaf.w).astype(jnp.float32))  # merged in float32, cast once
    array = tensor._replace(index=None).within(on_host(merge_leaf(leaf))).astype(dtype)
    return array.T if tensor.transpose else array


def dtypes_of(
    wanted: list[Tensor], leaves: Mapping[str, Any], prefix: str, base: Path, dtype: Any
) -> dict[str, np.dtype]:
    """The dtype of each HF tensor."""
    if dtype is not None:
        return {t.hf: np.dtype(jnp.dtype(dtype)) for t in wanted}
    stored = {}
    if any(base.glob("model*.safetensors*")):
        stored = {name: entry.dtype for name, entry in tensors.index_dir(base).items()}
        stored |= {prefix + name: dtype for name, dtype in stored.items() if not name.startswith(prefix)}
    # For a head that the base lacks. Old checkpoints of BERT also hold a buffer of integers.
    floats = [dtype for dtype in stored.values() if jnp.issubdtype(dtype, jnp.floating)]
    new = max(floats, key=floats.count) if floats else None
    return {t.hf: stored.get(t.hf, new) or plain(leaves[t.path]).dtype for t in wanted}


def _config(base: Mapping[str, Any], tied: bool | None, dtypes: list[np.dtype]) -> dict[str, Any]:
    """config.json: the base's, with the values that the export changed. `tied`: None if there is no output head."""
    name = max(dtypes, key=dtypes.count).name
    config = {k: v for k, v in base.items() if k not in ("dtype", "torch_dtype")}
    if tied is not None:
        config["tie_word_embeddings"] = tied
    # transformers 4 reads torch_dtype, 5 either.
    return config | {"torch_dtype" if "torch_dtype" in base else "dtype": name}


def copy_tokenizer(source: Path, folder: Path, chat_template: str | None = None) -> list[str]:
    """Copy tokenizer and chat templates; return sentences on a tokenizer that is not there, and links not followed."""
    notes = []
    for file in (*map(source.joinpath, TOKENIZER_FILES), *sorted(source.glob("additional_chat_templates/*"))):
        if not file.is_file():
            continue
        if not is_inside(file, source):
            notes.append(not_copied(file))
            continue
        there = folder / file.relative_to(source)
        there.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, there)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    if not has_tokenizer(source):
        notes.append(f"No tokenizer was copied: {Path(public_name(source)).name} has none.")
    return notes


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES[:-2])


def inputs(module: Any, folder: Path) -> dict[str, Any]:
    """What the code that loads a result of `module` is told of its inputs; see `card.loading`."""
    prepares = (folder / "preprocessor_config.json").is_file()
    spec = module.spec
    return {
        "tokenizer": prepares if hasattr(spec, "patch") else has_tokenizer(folder),
        "rows": spec.vocab if getattr(spec, "new_tokens", 0) else None,
    }


def public_name(base: str | Path) -> str:
    """The name of a model for others: its hub id, also for a folder of the hub's cache, else an absolute path."""
    path = Path(base).expanduser()
    if not path.exists():
        return str(base)
    path = path.absolute()
    if found := re.search(r"/models--([^/]+)/snapshots/", f"{path}/"):
        return found[1].replace("--", "/", 1)
    return str(path)
