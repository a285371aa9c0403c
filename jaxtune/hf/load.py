"""HF model directories in: config.json and safetensors -> (module, params)."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.hf import tensors
from jaxtune.models.names import NameTable, Tensor
from jaxtune.tree import flatten


def resolve(path_or_id: str | Path) -> Path:
    """Return the directory of a model: a local path, or a hub id that is downloaded (or already cached).

    Raises:
        UserError: neither exists.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    text = str(path_or_id)
    if path.exists():
        raise UserError(f"model.path={text!r} is a file; give the directory that holds config.json.")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise UserError(
            f"The model directory {text!r} does not exist (looked in {Path.cwd()}); a hub id has the form 'owner/name'."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HFValidationError, OSError) as e:  # OSError: every answer of the hub, and having no network
        raise UserError(f"{text!r} is neither a directory nor a model that the hub gives: {e}") from None


def read_config(folder: Path) -> dict:
    """Read config.json."""
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder} is no model directory: it has no config.json.")
    return tensors.read_json(file)


def load(path_or_id: str | Path, dtype: Any = None, param_dtype: Any = None, **settings: Any) -> tuple[Any, Any]:
    """Load a pretrained model.

    Args:
        path_or_id: a directory with config.json and safetensors, or a hub id.
        dtype: of activations; default float32.
        param_dtype: of parameters; default: as stored in the checkpoint.
        settings: `Decoder`'s other fields (attention, remat, unroll).

    Returns:
        `(module, params)`: `module.apply({"params": params}, tokens)` gives logits f32[B, T, V].

    Raises:
        UserError: the family or a setting is not supported, the weights are absent, pickled or cut short, or tensors
            are missing, extra or misshapen (all named at once).
    """
    folder = resolve(path_or_id)
    module = models.build(read_config(folder), dtype=dtype or jnp.float32, **settings)
    entries = tensors.index_dir(folder)
    wanted = module.abstract_params()
    places = plan(models.names(module), module, wanted, entries, folder)
    return module, read_tree(wanted, places, param_dtype)


def plan(
    table: NameTable, module: Any, wanted: Any, entries: dict[str, tensors.Entry], folder: Path
) -> list[tuple[Tensor, tensors.Entry]]:
    """Pair every tensor the tree wants with its entry; raise one error that lists all that does not fit."""
    shapes = {path: leaf.shape for path, leaf in flatten(wanted).items()}
    if not any(name.startswith(table.prefix) for name in entries):
        entries = {name if name in table.top else table.prefix + name: e for name, e in entries.items()}
    problems, places, used = [], [], set()
    for tensor in table.tensors(module.spec, set(shapes)):
        shape = shapes[tensor.path][0 if tensor.index is None else 1 :]
        expected = shape[::-1] if tensor.transpose else shape
        used.add(tensor.hf)
        if tensor.hf not in entries:
            problems.append(f"missing    {tensor.hf} {list(expected)}")
        elif entries[tensor.hf].shape != expected:
            problems.append(f"misshapen  {tensor.hf} {list(entries[tensor.hf].shape)}, expected {list(expected)}")
        elif not jnp.issubdtype(entries[tensor.hf].dtype, jnp.floating):
            problems.append(f"quantised  {tensor.hf} {entries[tensor.hf].dtype}, expected floating point")
        else:
            places.append((tensor, entries[tensor.hf]))
    tied = {"lm_head.weight"} if module.spec.tied else set()
    extra = [n for n in entries if n not in used | tied and not table.is_ignored(n)]
    problems += [f"extra      {name} {list(entries[name].shape)}" for name in extra]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"The weights in {folder} are not those its config.json describes:\n  {shown}")
    return places


def read_tree(wanted: Any, places: list[tuple[Tensor, tensors.Entry]], dtype: Any = None) -> Any:
    """Read planned tensors into a tree of `wanted`'s structure, one stacked leaf after another."""
    by_path: dict[str, list[tuple[Tensor, tensors.Entry]]] = {}
    for tensor, entry in places:
        by_path.setdefault(tensor.path, []).append((tensor, entry))
    leaves = {}
    for path, leaf in flatten(wanted).items():
        parts = by_path[path]
        stored = functools.reduce(np.promote_types, (entry.dtype for _, entry in parts))
        host = np.empty(leaf.shape, dtype or stored)
        jobs = []
        for tensor, entry in parts:
            target = host if tensor.index is None else host[tensor.index]
            jobs.append((entry, target.T if tensor.transpose else target))
        tensors.read_all(jobs)
        leaves[path] = jnp.asarray(host)
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves.values())
