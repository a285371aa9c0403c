"""PEFT directories in and out: adapter_config.json and adapter_model.safetensors, as peft 0.21 writes them.

LoRA and its relatives, HiRA, MiSS, (IA)^3 and prompt tuning.

peft is lax when it loads: tensors that are missing, surplus, or for another base pass with a warning or none.
Here each is an error, and one message names them all.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.files import atomic_dir
from jaxtune.hf import load as hf
from jaxtune.hf import tensors
from jaxtune.hf.card import model_card
from jaxtune.hf.digest import BaseFiles, carry_record, recorded
from jaxtune.hf.export import copy_tokenizer, inputs, public_name
from jaxtune.hf.peft_config import (
    DEFAULTS,
    HIRA_DEFAULTS,
    IA3_DEFAULTS,
    KINDS,
    MISS_DEFAULTS,
    PROMPT_DEFAULTS,
    chosen_by,
    complete,
    is_adapted,
    read_adapter_config,
    tree_factors,
    unsupported,
)
from jaxtune.hf.stops import stop_ids, write_generation_config
from jaxtune.methods.adapters import HEAD, TABLE, tokens_of
from jaxtune.methods.places import DENSE, Place, in_label_head, is_module_bias, is_saved, parameters, places, renamed
from jaxtune.methods.vocabulary import resize
from jaxtune.models.body import Body
from jaxtune.models.classifier import PROBLEMS, TASK_TYPES, TOKEN, Labels, read_labels, with_labels
from jaxtune.models.names import NameTable
from jaxtune.tree import FROZEN, TRAIN, flatten, path_str
from jaxtune.weights.adapters import DoraWeight, LoraWeight, TokensWeight
from jaxtune.weights.leaf import Adapter, map_paths, map_weights, merge_leaf, plain, weights_by_path

__all__ = [
    "DEFAULTS",
    "HIRA_DEFAULTS",
    "IA3_DEFAULTS",
    "MISS_DEFAULTS",
    "PROMPT_DEFAULTS",
    "export_adapter",
    "load_adapter",
    "read_adapter_config",
    "tree_factors",
]

_PREFIX = "base_model.model."


# ---------------------------------------------------------------------------------------------------- where tensors lie


class Spot(NamedTuple):
    """One tensor of an adapter: its place in the parameter tree, and how it lies in the file."""

    path: str
    index: int | None
    field: str  # of the adapted leaf, "a"; "" where the leaf is a plain array
    shape: tuple[int, ...]  # of one matrix
    turn: bool = True  # whether a matrix in the file is the transpose of the one in the tree
    experts: int = 0  # whose matrices lie side by side in the file; 0: one matrix
    outer: bool = True  # whether its first axis is [experts, rank]; else its second one is [rank, experts]

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in the file."""
        if not self.experts:
            return self.shape
        rows, columns = self.shape
        return (self.experts * rows, columns) if self.outer else (rows, columns * self.experts)


TABLES = (TABLE, HEAD)
_TABLES = ("", ".base_layer", ".token_adapter.base_layer")  # where peft puts an embedding table next to its adapter


def _spots(module: Any, params: Any, config: Mapping[str, Any], whole_head: bool = False) -> dict[str, Spot]:
    """Every tensor that peft stores for a tree with adapters, by its key in the file.

    If `resize` added rows to the model's embedding, the tables are included.

    `whole_head`: include parts of a label head that modules_to_save does not name.
    """
    leaves = weights_by_path(params)
    chosen = chosen_by(config, places(params, module))
    spots, adapted = {}, []
    for place in places(params, module):
        if isinstance(leaves[place.path], Adapter) and is_adapted(leaves[place.path], place):
            adapted.append(place)
    for place in adapted:
        rank = chosen[place].rank if place in chosen else None
        spots |= _adapter_spots(leaves[place.path], place, _wrapped(place, adapted), rank)
    bias, saved = config.get("bias", "none"), config.get("modules_to_save")
    names = {place.name for place in chosen}
    for t in models.names(module).tensors(module.spec, set(leaves)):
        shape = _hf_shape(t, leaves[t.path])
        if is_saved(t.module, saved) or (whole_head and in_label_head(t.path)):
            spots[f"{_PREFIX}{t.name}"] = Spot(t.path, t.index, "", shape, turn=t.transpose)
        elif t.path in TABLES and getattr(module.spec, "new_tokens", 0):
            leaf = leaves[t.path]
            middle = _TABLES[2 if isinstance(leaf, TokensWeight) else isinstance(leaf, LoraWeight)]
            field = "w" if isinstance(leaf, Adapter) else ""
            spots[f"{_PREFIX}{t.module}{middle}.weight"] = Spot(t.path, t.index, field, shape, turn=t.transpose)
        elif t.path.endswith("/bias") and t.module in names and bias != "none":
            spots[f"{_PREFIX}{t.module}.base_layer.bias"] = Spot(t.path, t.index, "", shape)
        elif is_module_bias(t.path) and bias == "all":
            spots[f"{_PREFIX}{t.name}"] = Spot(t.path, t.index, "", shape, turn=t.transpose)
    return spots


def _wrapped(place: Place, adapted: list[Place]) -> str:
    """The name of the module that has a place's adapter in peft.

    Of several parameters of one module, the first one's wrapper lies within that of the second.
    """
    if not place.parameter:
        return place.name
    owner = place.name.rpartition(".")[0]
    beside = [p for p in adapted if p.parameter and p.name.rpartition(".")[0] == owner]
    return owner + ".base_layer" * (len(beside) - 1 - beside.index(place))


def _adapter_spots(leaf: Adapter, place: Place, module: str, rank: int | None) -> dict[str, Spot]:
    """The tensors of the adapter of a `module`, as its class declares them; `rank` cuts off a stack's padding.

    Those of experts are written as one: [E r, K] and [N, r E].
    """
    k, n = plain(leaf).shape[-2:]
    spots = {}
    for name, field in leaf.fields().items():
        array, stored = getattr(leaf, name), field.stored
        if stored is None or array is None:
            continue
        own, axes = field.axes.split(), stored.axes.split()
        sizes = dict(zip(own, array.shape[array.ndim - len(own) :])) | {"K": k, "N": n, "1": 1}
        sizes |= {} if rank is None else {"r": rank}
        key = stored.key if place.linear or stored.table is None else stored.table
        shape, turn = tuple(sizes[axis] for axis in axes), len(own) == 2 and axes == own[::-1]
        experts = array.shape[array.ndim - len(own) - 1] if place.parameter else 0
        spots[key.format(f"{_PREFIX}{module}")] = Spot(
            place.path, place.index, name, shape, turn, experts, axes[0] == "r"
        )
    return spots


def _view(host: np.ndarray, spot: Spot) -> np.ndarray:
    """The part of a leaf's field that is one tensor of the file, in the file's layout; of experts with an axis more."""
    array = host if spot.index is None else host[spot.index]
    if spot.experts:
        matrices = array.swapaxes(1, 2)[:, : spot.shape[0], : spot.shape[1]]
        return matrices if spot.outer else np.moveaxis(matrices, 0, 2)
    if array.ndim == 1:
        return array.reshape(spot.shape)
    return (array.T if spot.turn else array)[tuple(slice(n) for n in spot.shape)]


def _hf_shape(t: Any, leaf: Any) -> tuple[int, ...]:
    shape = t.part(plain(leaf).shape)
    return shape[::-1] if t.transpose else shape


# ------------------------------------------------------------------------------------------------------------------- in


def load_adapter(
    module: Any,
    params: Any,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    drawn: Collection[str] | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """Put a PEFT adapter on a zoo model; `jaxtune.load(folder)` opens the adapter and its base at once.

    Args:
        module: the base, a zoo module.
        params: its parameters.
        folder: holds adapter_config.json and adapter_model.safetensors.
        base: what `module` was loaded from, to be compared with the adapter's own base; None: names may differ.
        drawn: paths of the label head's parameters that the base lacks and the adapter has to bring; None: all, for a
            new head.

    Returns:
        `(params, mask, config)`: as from `methods.lora`, ready to train on; `config` is adapter_config.json.

    Raises:
        UserError: one message that lists every tensor missing, extra or misshapen, every setting that is not
            supported, and a base of another name.
    """
    folder = Path(folder).expanduser()
    config, entries = read_adapter_config(folder), _index(folder)
    problems = _other_base(config["base_model_name_or_path"], base)
    refused = unsupported(config) or _beyond(config, entries)
    if not refused:
        config = renamed(config, places(params, module))
    if not refused:
        try:
            params, mask = KINDS[config["peft_type"]].attach(_as_loaded(module), params, config)
        except UserError as error:
            refused.append(f"wrong base   {error}")
    if refused:
        raise _misfit(folder, problems + refused)
    mask = _frozen_head(module, params, mask, config)
    spots = _spots(module, params, config, whole_head=module.new_head)
    entries = _modern_keys(module, params, entries, spots)
    if drawn is not None:
        spots = {
            key: spot
            for key, spot in spots.items()
            if key in entries or not in_label_head(spot.path) or spot.path in drawn
        }
    spots = {key: spot for key, spot in spots.items() if key in entries or spot.path not in TABLES or spot.field != "w"}
    entries, other = _without_tables(module, params, entries, spots)
    problems += other + _compare(spots, entries)
    if problems:
        raise _misfit(folder, problems)
    return _fill(params, spots, entries), mask, config


def open_adapter(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    any_base: bool = False,
    quantization: str | None = None,
    param_dtype: Any = None,
    **settings: Any,
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Load an adapter and the base under it.

    A label head that the base lacks is initialised at random before the adapter fills it. Rows of the embedding for
    tokens that were added with the adapter are appended.

    Args:
        folder: a PEFT directory.
        base: directory or hub id of its base; None: the one that it names.
        any_base: accept a base of another name than the adapter's own.
        quantization: as for `jaxtune.load`.
        param_dtype: as for `jaxtune.load`.
        settings: as for `jaxtune.load`.

    Returns:
        `(module, params, mask, config)`: the module, and what `load_adapter` returns.

    Raises:
        UserError: the base is not found, or as `load` and `load_adapter`.
    """
    folder = Path(folder).expanduser()
    config, entries = read_adapter_config(folder), _index(folder)
    named, where = find_base(folder, base)
    values = hf.read_config(where)
    module, drawn = hf.open_module(values, where, **settings), None
    if module.continues and _is_of_body(config, entries, models.names(module)):
        module = module.without_head()
    labels = _labels(folder, config, entries, module)
    if labels is not None:
        stored = read_labels(values)
        same = stored is not None and dataclasses.replace(stored, pooling=labels.pooling) == labels
        own = tensors.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        padding = {name: own[name] for name in ("pad_token_id",) if own.get(name) is not None}  # finds the last token
        module = models.build({**values, **padding, "architectures": None}, **settings)
        module = with_labels(module, dataclasses.replace(labels, drawn=not same))
        drawn = module.drawn(tensors.index_dir(where), models.names(module), jax.random.key(0)).keys()
    with BaseFiles(where).same(None if any_base else recorded(folder)):
        params = hf.read_params(module, where, param_dtype, key=jax.random.key(0), quantization=quantization)
    module, params = grown_for(folder, module, params)
    compared = None if any_base else named
    params, mask, config = load_adapter(module, params, folder, base=compared, drawn=drawn)
    return module, params, mask, config


def _is_of_body(config: Mapping[str, Any], entries: Mapping[str, tensors.Entry], table: NameTable) -> bool:
    """Whether an adapter was made over a decoder's bare body: its names then lack what the family puts before them."""
    layers = table.layer.partition("{")[0]
    whole, bare = (any(e.startswith(_PREFIX + n) for e in entries) for n in (layers, layers.removeprefix(table.prefix)))
    return bare if whole != bare else config["task_type"] == Body.task_type


def find_base(folder: Path, base: str | Path | None = None) -> tuple[str, Path]:
    """The name of an adapter's base, and its directory; `base` takes precedence over the one that the adapter names.

    Raises:
        UserError: it names no base, or the base is not found.
    """
    named = base or read_adapter_config(folder)["base_model_name_or_path"]
    if not named or not isinstance(named, str | Path):
        raise UserError(f"{folder}/adapter_config.json does not name its base; give it with --base=MODEL.")
    try:
        return str(named), hf.resolve(named)
    except UserError as error:
        raise UserError(f"The base of the adapter in {folder}: {error} Give it with --base=MODEL.") from None


def _labels(folder: Path, config: Mapping[str, Any], entries: Mapping[str, tensors.Entry], body: Any) -> Labels | None:
    """The labels of an adapter: as in its directory, else unnamed, one for each output; None: no label head.

    Raises:
        UserError: the adapter is for a label head, and holds none.
    """
    kind = next((k for k, task in TASK_TYPES.items() if task and task == config["task_type"]), None)
    if (folder / "config.json").is_file():
        labels = read_labels(tensors.read_json(folder / "config.json"))
        if labels is not None:
            return labels
    own = body.labels if body.label_head else None
    if kind is None or (own is not None and own.kind == kind):
        return own
    plain_body = body if own is None else body.body
    table = with_labels(plain_body, Labels(kind, ("LABEL_0", "LABEL_1"))).layout.names
    out = [f"{_PREFIX}{hf}" for hf, path in table.items() if path == "classifier/out/kernel"]
    if out[0] not in entries:
        raise UserError(f"{folder} is an adapter for {config['task_type']}, and neither it nor its base has the head.")
    count = entries[out[0]].shape[0]
    problem = PROBLEMS[2] if count == 1 and kind != TOKEN else PROBLEMS[0]
    return Labels(kind, tuple(f"LABEL_{i}" for i in range(count)), problem)


def grown_for(folder: Path, module: Any, params: Any) -> tuple[Any, Any]:
    """The base, with rows for tokens that were added before the adapter was trained, as many as its file has."""
    rows = rows_in(folder, module)
    return resize(module, params, rows) if rows > module.spec.vocab else (module, params)


def rows_in(folder: Path, module: Any) -> int:
    """The rows of the table of tokens in an adapter's file; 0 where there is none."""
    entries = _index(folder)
    named = [t.module for t in models.names(module).tensors(module.spec) if t.path == TABLE]
    keys = [f"{_PREFIX}{name}{middle}.weight" for name in named for middle in _TABLES]
    return max((entries[key].shape[0] for key in keys if key in entries and entries[key].shape), default=0)


def _as_loaded(module: Any) -> Any:
    """The module without its record of new tokens: how they were trained is the adapter's matter."""
    if not getattr(module.spec, "new_tokens", 0):
        return module
    return module.clone(spec=dataclasses.replace(module.spec, new_tokens=0))


def _beyond(config: Mapping[str, Any], entries: Mapping[str, tensors.Entry]) -> list[str]:
    """A line for each rank in the config that no tensor of the file has: no memory is allocated for it."""
    largest = max((max(entry.shape, default=1) for entry in entries.values()), default=1)
    ranks = {f"rank_pattern={{{key!r}: {rank}}}": rank for key, rank in (config.get("rank_pattern") or {}).items()}
    if not ranks:  # else nothing may have the common one
        ranks = {f"{name}={config[name]}": config[name] for name in ("r", "num_virtual_tokens") if config.get(name)}
    return [
        f"misshapen    {setting}, and the longest side of a tensor in the file is {largest}"
        for setting, rank in ranks.items()
        if rank > largest
    ]


def _frozen_head(module: Any, params: Any, mask: Any, config: Mapping[str, Any]) -> Any:
    """The mask of a loaded adapter: parts of a label head that it does not store stay as in the base."""
    if not module.label_head:
        return mask
    tensors_ = models.names(module).tensors(module.spec, set(weights_by_path(params)))
    kept = {t.path for t in tensors_ if in_label_head(t.path) and not is_saved(t.module, config["modules_to_save"])}
    return jax.tree_util.tree_map_with_path(lambda p, role: FROZEN if path_str(p) in kept else role, mask)


def _index(folder: Path) -> dict[str, tensors.Entry]:
    if not (folder / "adapter_model.safetensors").exists() and (folder / "adapter_model.bin").exists():
        raise UserError(
            f"{folder} holds its adapter as pickle (adapter_model.bin), which can run code when loaded and is never "
            "read. Convert it where you trust it: load it with peft and call save_pretrained."
        )
    return tensors.index_dir(folder, "adapter_model")


def _other_base(theirs: str | None, ours: str | Path | None) -> list[str]:
    """A line if the adapter names another base: neither the same folder nor the same last part of the name."""
    if not theirs or ours is None:
        return []
    names = [public_name(theirs), public_name(ours)]
    if Path(names[0]).resolve() == Path(names[1]).resolve() or Path(names[0]).name == Path(names[1]).name:
        return []
    return [
        f"other base   the adapter was made for {theirs!r}, this is {str(ours)!r}; where that is the same model under "
        "another name, give --allow-other-base (in Python, base=None)"
    ]


def _misfit(folder: Path, problems: list[str]) -> UserError:
    shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
    return UserError(f"The adapter in {folder} does not fit this model:\n  " + "\n  ".join(shown))


def _modern_keys(
    module: Any, params: Any, entries: dict[str, tensors.Entry], spots: Mapping[str, Spot]
) -> dict[str, tensors.Entry]:
    """Entries by current keys: older files name some modules differently, and their biases lack `base_layer`."""
    named = {p.old.rpartition(".")[0]: p.name.rpartition(".")[0] for p in parameters(params, module) if p.old}
    bias = {key.replace(".base_layer.bias", ".bias"): key for key, spot in spots.items() if not spot.field}

    def modern(key: str) -> str:
        if key in spots:
            return key
        stem = key.removeprefix(_PREFIX)
        while stem and stem not in named:
            stem = stem.rpartition(".")[0]
        if stem:
            key = key.replace(stem, named[stem], 1)
        return bias.get(key, key)

    return {modern(key): entry for key, entry in entries.items()}


def _without_tables(
    module: Any, params: Any, entries: Mapping[str, tensors.Entry], spots: Mapping[str, Spot]
) -> tuple[dict[str, tensors.Entry], list[str]]:
    """Drop tables that peft saves next to adapters and after `resize_token_embeddings`; a line for each that differs.

    They are the base's embedding and head, under various names, and second copies of trained tensors.
    """
    leaves, rest, problems = weights_by_path(params), dict(entries), []
    for t in models.names(module).tensors(module.spec):
        if t.path not in TABLES:
            continue
        path = t.path if t.path in leaves else TABLE  # a tied head is the embedding
        stem, leaf = f"{_PREFIX}{t.module}", leaves.get(path)
        if leaf is None:
            continue
        if t.path not in leaves:
            if isinstance(leaf, TokensWeight):
                rest.pop(f"{stem}.token_adapter.trainable_tokens_delta", None)
            if getattr(module.spec, "new_tokens", 0):  # the table itself is read from the file
                for middle in _TABLES:
                    rest.pop(f"{stem}{middle}.weight", None)
        if f"{stem}.weight" in spots:
            rest.pop(f"{stem}.modules_to_save.weight", None)
            rest.pop(f"{stem}.original_module.weight", None)
        base = getattr(leaf, "w", leaf)
        shape = plain(base).shape if path == TABLE else plain(base).shape[::-1]
        for key in (f"{stem}{middle}.weight" for middle in _TABLES):
            if key not in rest or key in spots or rest[key].shape != shape:
                continue
            if isinstance(plain(base), jax.core.Tracer):  # only shapes are needed
                rest.pop(key)
                continue
            array = np.asarray(merge_leaf(base), np.float32)
            found = np.empty(shape, np.float32)
            tensors.read_all([(rest.pop(key), found)])
            found = found.astype(plain(base).dtype).astype(np.float32)
            if not np.array_equal(found, array if path == TABLE else array.T):
                problems.append(f"other base   {key} is not this model's own")
    return rest, problems


def _compare(spots: Mapping[str, Spot], entries: Mapping[str, tensors.Entry]) -> list[str]:
    lines = [f"missing      {key} {list(spot.stored)}" for key, spot in spots.items() if key not in entries]
    lines += [f"extra        {key} {list(entry.shape)}" for key, entry in entries.items() if key not in spots]
    return lines + [
        f"misshapen    {key} {list(entries[key].shape)}, expected {list(spot.stored)}"
        for key, spot in spots.items()
        if key in entries and entries[key].shape != spot.stored
    ]


def _fill(params: Any, spots: Mapping[str, Spot], entries: Mapping) -> Any:
    """Read the tensors into the leaves. Padding of lower ranks is not in the file: it is zero, and stays so."""
    arrays: dict[str, dict[str, np.ndarray]] = {}
    leaves = weights_by_path(params)
    jobs, together = [], []
    for key, spot in spots.items():
        leaf = leaves[spot.path]
        shape = (getattr(leaf, spot.field) if spot.field else leaf).shape
        host = arrays.setdefault(spot.path, {}).setdefault(spot.field, np.zeros(shape, np.float32))
        view = _view(host, spot)
        jobs.append((entries[key], np.empty(spot.stored, np.float32) if spot.experts else view))
        together += [(view, jobs[-1][1])] * bool(spot.experts)
    tensors.read_all(jobs)
    for view, read in together:
        view[...] = read.reshape(view.shape)
    for key, spot in spots.items():
        if not np.isfinite(_view(arrays[spot.path][spot.field], spot)).all():
            raise UserError(f"{entries[key].file}: the tensor {key!r} has numbers that are not finite; it is damaged.")

    def put(path, leaf):
        fields = {field: jax.device_put(array) for field, array in arrays.get(path, {}).items()}
        if "w" in fields:  # an embedding of the base, not an adapter
            fields["w"] = fields["w"].astype(leaf.w.dtype)
        return fields[""] if "" in fields else dataclasses.replace(leaf, **fields) if fields else leaf

    return map_paths(put, params)


# ------------------------------------------------------------------------------------------------------------------ out


def export_adapter(
    module: Any,
    params: Any,
    out: str | Path,
    *,
    base: str | Path,
    config: Mapping[str, Any] | None = None,
    mask: Any = None,
    facts: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    chat_template: str | None = None,
    ends: Collection[int] = (),
    base_folder: str | Path | None = None,
    overwrite: bool = False,
    bake: bool = False,
    record: Path | None = None,
    vectors: Any = None,
) -> list[str]:
    """Write the adapters of a zoo model as a PEFT directory, atomically.

    Args:
        module: a zoo module.
        params: its parameters, with leaves of `lora`, `hira`, `miss`, `ia3` or `prompt_tuning`.
        out: must not exist, unless `overwrite`.
        base: directory or hub id of the model that was tuned; a directory also gives the tokenizer.
        config: fields of peft's config, those given to the method or those that `load_adapter` returned. What is left
            out is read off the tree.
        mask: as `jaxtune.lora` returned it; tells whether biases were trained, where `config` does not.
        facts: label -> value for the model card; see `jaxtune.report.card.run_facts`.
        tokenizer: directory of the tokenizer, if it is not in `base`.
        chat_template: Jinja text, if it is not the tokenizer's own.
        ends: tokens that end a trained turn; where the base does not stop at them, a generation_config.json does.
        base_folder: the base's directory, if `base` is a hub id.
        overwrite: replace a directory that is there.
        bake: multiply the scales into B and pad all ranks to the largest, for engines that ignore rank and alpha
            patterns.
        record: directory of what was tuned (a run or an adapter), whose record of its base is carried along.
        vectors: as for `export_model`.

    Returns:
        Sentences that the user should read, such as a tokenizer that was not found.

    Raises:
        UserError: `out` exists, or the disk is full.
        ValueError: the tree has no adapters, is not what `config` says, or holds more that was trained than an adapter
            can carry.
    """
    out = Path(out).expanduser()
    params, config = _without_start(params, dict(config or {}))
    config = complete(module, params, mask, config)
    if refused := unsupported(config):
        raise ValueError("config: " + "; ".join(refused))
    _check_tree(module, params, mask, config)
    config |= {"base_model_name_or_path": public_name(base)}
    arrays, notes = _arrays(params, _spots(module, params, config)), []
    if bake:
        arrays, config = _baked(arrays, config, places(params, module))
        notes = _refused_by_vllm(config)
    if config.get("target_parameters"):
        notes.append(
            "Experts are adapted: vLLM leaves such factors out without a word, baked or not. Serve the merged model, "
            "which `jaxtune export` writes without --adapter."
        )
    with atomic_dir(out, overwrite=overwrite) as folder:
        tensors.write(folder, arrays, "adapter_model", shard_bytes=2**63)  # peft reads one file
        text = json.dumps(dict(sorted(config.items())), indent=2, ensure_ascii=False) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        labels = module.label_config
        if labels:  # the names of the labels, which an adapter's own config has no place for
            text = json.dumps(labels, indent=2, ensure_ascii=False) + "\n"
            (folder / "config.json").write_text(text, encoding="utf-8")
        notes += copy_tokenizer(Path(tokenizer or base).expanduser(), folder, chat_template)
        stops_of = Path(base_folder or base).expanduser()
        if record is not None:
            carry_record(record, folder)
        if vectors is not None:
            vectors.write(folder, module.spec.width, params)
        elif not set(ends) <= stop_ids(stops_of):
            notes += write_generation_config(stops_of, folder, ends)
        card = model_card(
            name=out.name,
            base=public_name(base),
            adapter=config["peft_type"].lower(),
            facts=facts,
            notes=notes,
            auto=module.auto_class,
            config=labels,
            vectors=vectors is not None,
            **inputs(module, folder),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return notes


def _without_start(params: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Turn LoRA factors with their initial values (PiSSA) into factors of twice the rank over the original base."""
    folded = False

    def fold(leaf):
        nonlocal folded
        if not isinstance(leaf, LoraWeight) or leaf.a0 is None:
            return leaf
        folded = True
        a, b = (np.asarray(f, np.float32) for f in leaf.factors())
        # Columns that pad a lower rank go to the end.
        order = np.argsort(~(a.any(-2) | b.any(-1)), axis=-1, kind="stable")
        a, b = np.take_along_axis(a, order[..., None, :], -1), np.take_along_axis(b, order[..., None], -2)
        return dataclasses.replace(leaf, a=a, b=b, a0=None, b0=None)

    params = map_weights(fold, params)
    if not folded:
        return params, given
    times = {"r": 2, "lora_alpha": math.sqrt(2) if given.get("use_rslora") else 2}
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        if name in given:
            given[name] *= times[name]
        given[pattern] = {key: value * times[name] for key, value in dict(given.get(pattern) or ()).items()}
    return params, given | {"init_lora_weights": True}


def _check_tree(module: Any, params: Any, mask: Any, config: Mapping[str, Any]) -> None:
    """Raise ValueError unless peft, given the config, computes the same as the tree."""
    tree, leaves = tree_factors(module, params), weights_by_path(params)
    chosen = chosen_by(config, places(params, module))
    if differing := {p.name for p in tree.keys() ^ chosen.keys()}:
        raise ValueError(f"config and parameters differ in which modules are adapted: {sorted(differing)}.")
    for place, (rank, scale) in chosen.items():
        held = leaves[place.path]
        if not math.isclose(scale, tree[place].scale, rel_tol=1e-5):
            raise ValueError(f"{place.name}: the config's scale is {scale}, the parameters' {tree[place].scale}.")
        if rank > held.used().shape[-1] or rank < tree[place].rank:
            raise ValueError(f"{place.name}: the config's rank is {rank}, the parameters' {tree[place].rank}.")
        if config.get("use_dora", False) != isinstance(held, DoraWeight):
            raise ValueError(f"{place.name}: the config's use_dora is {config.get('use_dora')}, the parameters differ.")
    ids = {path: leaf.ids for path, leaf in leaves.items() if isinstance(leaf, TokensWeight)}
    if ids != tokens_of(config.get("trainable_token_indices") or None, params, module):
        raise ValueError(f"config and parameters differ in trainable_token_indices; the parameters' are {ids}.")
    carried = {spot.path for spot in _spots(module, params, config).values()}
    stray = [
        path
        for path, role in flatten(mask).items()
        if role is TRAIN
        and path not in carried
        and path.rpartition("/")[0] not in carried
        and not path.startswith(f"{DENSE}/")  # these have files of their own
    ]
    if stray:
        raise ValueError(f"An adapter cannot carry {', '.join(stray[:5])}, which were trained; use export_model.")


def _arrays(params: Any, spots: Mapping[str, Spot]) -> dict[str, np.ndarray]:
    """The tensors of an adapter, float32, by their keys."""
    leaves, host = weights_by_path(params), {}
    for spot in spots.values():
        if (spot.path, spot.field) not in host:
            leaf = leaves[spot.path]
            host[spot.path, spot.field] = np.asarray(getattr(leaf, spot.field) if spot.field else leaf, np.float32)
    return {key: _view(host[spot.path, spot.field], spot).reshape(spot.stored) for key, spot in spots.items()}


def _baked(
    arrays: dict[str, np.ndarray], config: dict[str, Any], candidates: list[Place]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The same update with one rank and a scale of 1 throughout, for engines that read only `r`."""
    if config["peft_type"] != "LORA":
        raise UserError(f"bake is for LoRA; this is {config['peft_type']}.")
    chosen = chosen_by(config, candidates)
    most, out = max(f.rank for f in chosen.values()), dict(arrays)
    for place, (rank, scale) in chosen.items():
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            module = f"{_PREFIX}{_wrapped(place, list(chosen))}"
            a, b = f"{module}.{a}", f"{module}.{b}"
            if a in arrays:
                k, n = arrays[a].shape[1], arrays[b].shape[0]
                low = arrays[a].reshape(-1, rank, k)  # [E, r, K], one expert where there is none
                up = np.float32(scale) * arrays[b].reshape(n, rank, -1)  # [N, r, E]
                out[a] = np.pad(low, ((0, 0), (0, most - rank), (0, 0))).reshape(-1, k)
                out[b] = np.pad(up, ((0, 0), (0, most - rank), (0, 0))).reshape(n, -1)
    flat = {"r": most, "lora_alpha": most, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return out, config | flat


def _refused_by_vllm(config: Mapping[str, Any]) -> list[str]:
    """A sentence, if vLLM will not load the adapter."""
    reasons = {
        "use_dora": "DoRA",
        "modules_to_save": "modules_to_save",
        "trainable_token_indices": "trained tokens",
    }
    found = [words for key, words in reasons.items() if config[key]]
    found += [f"bias={config['bias']!r}"] if config["bias"] != "none" else []
    return [f"vLLM refuses this adapter: it has {', '.join(found)}. Merge it instead."] if found else []
