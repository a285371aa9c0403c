"""PEFT LoRA directories in and out: adapter_config.json and adapter_model.safetensors, as peft 0.21 writes them.

peft is lax where it loads: tensors that are missing, too many, or for another base pass with a warning or none.
Here each is an error, and one message names them all.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import models
from jaxtune.card import model_card
from jaxtune.errors import UserError
from jaxtune.files import atomic_dir
from jaxtune.hf import tensors
from jaxtune.hf.export import copy_tokenizer, plain, public_name, weights_by_path
from jaxtune.methods import Place, lora, places, resolve_targets
from jaxtune.tree import TRAIN, flatten, path_str
from jaxtune.weights import LoraWeight, is_weight

# adapter_config.json of LoraConfig(task_type="CAUSAL_LM"), saved.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
# Settings that we follow. Of the others, these say nothing about a trained adapter; the rest must be off.
_FOLLOWED = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("bias", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights"),
}
_INERT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "revision", "task_type", "eva_config", "lora_ga_config", "corda_config", "loftq_config"),
}
# How A and B began matters only where the base was changed with them ("pissa", "olora", "loftq", ...).
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model."


class Factors(NamedTuple):
    """What one adapted module has: rank, and the scale of its update."""

    rank: int
    scale: float


# ------------------------------------------------------------------------------------------------------- the config


def adapted(config: Mapping[str, Any], candidates: list[Place]) -> dict[Place, Factors]:
    """Choose modules, ranks and scales as peft does from a LoraConfig's fields.

    Raises:
        UserError: no module matches.
    """
    targets = config["target_modules"]
    if not isinstance(targets, str):
        # One config often serves several families: peft, too, wants one match only.
        targets = [t for t in targets if any(_is_or_ends(p.name, t) for p in candidates)] or targets
    found = {}
    for place in resolve_targets(targets, candidates):
        if _excluded(place.name, config["exclude_modules"]) or not _layer_chosen(place.name, config):
            continue
        rank = _by_pattern(config["rank_pattern"], place.name, config["r"])
        alpha = _by_pattern(config["alpha_pattern"], place.name, config["lora_alpha"])
        found[place] = Factors(rank, alpha / (math.sqrt(rank) if config["use_rslora"] else rank))
    if not found:
        raise UserError("adapter_config.json: exclude_modules and layers_to_transform leave no module to adapt.")
    return found


def _is_or_ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _excluded(name: str, exclude: str | list[str] | None) -> bool:
    if isinstance(exclude, str):
        return re.fullmatch(exclude, name) is not None
    return any(_is_or_ends(name, e) for e in exclude or ())


def _layer_chosen(name: str, config: Mapping[str, Any]) -> bool:
    """Whether `layers_to_transform` keeps a module; peft reads it where targets are names, not a regex."""
    chosen, patterns = config["layers_to_transform"], config["layers_pattern"]
    if chosen is None or chosen == [] or isinstance(config["target_modules"], str):
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    match = next(filter(None, (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in patterns)), None)
    return match is not None and int(match[1]) in ([chosen] if isinstance(chosen, int) else chosen)


def _by_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """One line for each setting that would make another model than we compute."""
    lines = []
    if config["peft_type"] != "LORA":
        lines.append(f"unsupported  peft_type={config['peft_type']!r}: only LORA is")
    for key, value in config.items():
        if key not in _FOLLOWED | _INERT and value not in (None, False, [], {}):
            lines.append(f"unsupported  {key}={value!r}")
    if (init := config["init_lora_weights"]) not in _HARMLESS_INITS:
        lines.append(
            f"unsupported  init_lora_weights={init!r} changes the base; save the adapter with peft's "
            "path_initial_model_for_weight_conversion"
        )
    checks = {
        "r": ("a whole number above 0", lambda v: type(v) is int and v > 0),
        "lora_alpha": ("a number", lambda v: type(v) in (int, float)),
        "lora_dropout": ("from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1),
        "bias": ("'none', 'all' or 'lora_only'", lambda v: v in ("none", "all", "lora_only")),
        "target_modules": ("a list of names or a regex", lambda v: isinstance(v, str | list) and len(v) > 0),
        "rank_pattern": ("an object", lambda v: isinstance(v, dict)),
        "alpha_pattern": ("an object", lambda v: isinstance(v, dict)),
    }
    lines += [
        f"wrong value  {k}={config[k]!r}, expected {words}" for k, (words, ok) in checks.items() if not ok(config[k])
    ]
    return lines


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """Read adapter_config.json; fields that its peft did not know yet get their defaults.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{folder} is no adapter directory: it has no adapter_config.json.")
    config = tensors.read_json(file)
    given = {k: v for k, v in config.items() if not (v is None and DEFAULTS.get(k) is not None)}
    return DEFAULTS | given


# -------------------------------------------------------------------------------------------------- where tensors lie


class Spot(NamedTuple):
    """One tensor of an adapter: its place in our tree, and its shape in the file (the transpose of ours)."""

    path: str
    index: int | None
    field: str  # of the LoraWeight, "a" or "b"; "" where the leaf is a bias
    shape: tuple[int, ...]


def _spots(module: Any, params: Any, chosen: Mapping[Place, Factors], bias: str) -> dict[str, Spot]:
    """Every tensor that peft stores for `chosen` and `bias`, by its key in the file."""
    shapes = {path: plain(leaf).shape for path, leaf in weights_by_path(params).items()}
    spots = {}
    for place, (rank, _) in chosen.items():
        k, n = shapes[place.path][-2:]
        is_table = place.path.endswith("embedding")
        a, b = ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A.weight", "lora_B.weight")
        spots[f"{_PREFIX}{place.name}.{a}"] = Spot(place.path, place.index, "a", (rank, k))
        spots[f"{_PREFIX}{place.name}.{b}"] = Spot(place.path, place.index, "b", (n, rank))
    if bias != "none":
        names = {place.name for place in chosen}
        for t in models.names(module).tensors(module.spec, {p for p in shapes if p.endswith("/bias")}):
            shape = shapes[t.path][t.index is not None :]
            if t.module in names:
                spots[f"{_PREFIX}{t.module}.base_layer.bias"] = Spot(t.path, t.index, "", shape)
            elif bias == "all":
                spots[f"{_PREFIX}{t.hf}"] = Spot(t.path, t.index, "", shape)
    return spots


# --------------------------------------------------------------------------------------------------------------- in


def load_adapter(
    module: Any, params: Any, folder: str | Path, *, base: str | Path | None = None
) -> tuple[Any, Any, dict[str, Any]]:
    """Put a PEFT LoRA adapter on a zoo model.

    Args:
        module, params: the base.
        folder: holds adapter_config.json and adapter_model.safetensors.
        base: what `module` was loaded from, to be compared with the adapter's own base; None: names may differ.

    Returns:
        `(params, mask, config)`: as from `methods.lora`, ready to train on; `config` is adapter_config.json.

    Raises:
        UserError: one message that lists every tensor missing, extra or misshapen, every setting that is not
            supported, and a base of another name.
    """
    folder = Path(folder).expanduser()
    config = read_adapter_config(folder)
    entries = _index(folder)
    problems = _other_base(config["base_model_name_or_path"], base)
    refused = _unsupported(config)
    chosen: dict[Place, Factors] = {}
    if not refused:
        try:
            chosen = adapted(config, places(params, module))
        except UserError as error:
            refused.append(f"wrong base   {error}")
    if refused:
        raise _misfit(folder, problems + refused)
    spots = _spots(module, params, chosen, config["bias"])
    entries = _modern_keys(entries, spots)
    problems += _compare(spots, entries)
    if problems:
        raise _misfit(folder, problems)

    names = tuple(place.name for place in chosen)
    rank = max(factors.rank for factors in chosen.values())
    params, mask = lora(
        params,
        jax.random.key(0),
        r=rank,
        lora_dropout=config["lora_dropout"],
        target_modules=names,
        bias=config["bias"],
        module=module,
    )
    return _fill(params, chosen, spots, entries), mask, config


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
    return [f"other base   the adapter was made for {theirs!r}, this is {str(ours)!r}"]


def _misfit(folder: Path, problems: list[str]) -> UserError:
    shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
    return UserError(f"The adapter in {folder} does not fit this model:\n  " + "\n  ".join(shown))


def _modern_keys(entries: dict[str, tensors.Entry], spots: Mapping[str, Spot]) -> dict[str, tensors.Entry]:
    """Old peft stored the bias of an adapted module without `base_layer`."""
    old = {key.replace(".base_layer.bias", ".bias"): key for key, spot in spots.items() if not spot.field}
    return {key if key in spots else old.get(key, key): entry for key, entry in entries.items()}


def _compare(spots: Mapping[str, Spot], entries: Mapping[str, tensors.Entry]) -> list[str]:
    lines = [f"missing      {key} {list(spot.shape)}" for key, spot in spots.items() if key not in entries]
    lines += [f"extra        {key} {list(entry.shape)}" for key, entry in entries.items() if key not in spots]
    return lines + [
        f"misshapen    {key} {list(entries[key].shape)}, expected {list(spot.shape)}"
        for key, spot in spots.items()
        if key in entries and entries[key].shape != spot.shape
    ]


def _fill(params: Any, chosen: Mapping[Place, Factors], spots: Mapping[str, Spot], entries: Mapping) -> Any:
    """Read the tensors into the leaves. A rank below the leaf's is filled up with zeros, which training keeps."""
    scales: dict[str, np.ndarray] = {}
    arrays: dict[tuple[str, str], np.ndarray] = {}
    leaves = weights_by_path(params)
    for place, factors in chosen.items():
        scale = scales.setdefault(place.path, np.zeros(leaves[place.path].scale.shape, np.float32))
        scale[() if place.index is None else place.index] = factors.scale
    jobs = []
    for key, spot in spots.items():
        leaf = leaves[spot.path]
        shape = (getattr(leaf, spot.field) if spot.field else leaf).shape
        host = arrays.setdefault((spot.path, spot.field), np.zeros(shape, np.float32))
        target = (host if spot.index is None else host[spot.index]).T
        jobs.append((entries[key], target[tuple(slice(n) for n in spot.shape)]))
    tensors.read_all(jobs)

    def put(path, leaf):
        path = path_str(path)
        if path in scales:
            a, b = (jnp.asarray(arrays[path, field]) for field in "ab")
            return LoraWeight(leaf.w, a, b, jnp.asarray(scales[path]), leaf.dropout)
        return jnp.asarray(arrays[path, ""]) if (path, "") in arrays else leaf

    return jax.tree_util.tree_map_with_path(put, params, is_leaf=is_weight)


# -------------------------------------------------------------------------------------------------------------- out


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
    overwrite: bool = False,
) -> list[str]:
    """Write the adapters of a zoo model as a PEFT directory, atomically.

    Args:
        module, params: a model whose adapted leaves are `LoraWeight`.
        out: must not exist, unless `overwrite`.
        base: directory or hub id of the model that was tuned; a directory also gives the tokenizer.
        config: fields of peft's LoraConfig, those of `methods.lora` or those that `load_adapter` returned. What is left
            out is read off the tree.
        mask: as `methods.lora` returned it; says whether biases were trained, where `config` does not.
        facts: label -> value for the model card; see `jaxtune.card.run_facts`.
        tokenizer: directory of the tokenizer, if it is not in `base`.
        chat_template: Jinja text, if it is not the tokenizer's own.

    Returns:
        Sentences that the user should read, such as a tokenizer that was not found.

    Raises:
        UserError: `out` exists, or the disk is full.
        ValueError: the tree has no adapters, is not what `config` says, or holds more that was trained than an adapter
            can carry.
    """
    out = Path(out).expanduser()
    config = _complete(module, params, mask, config or {})
    if refused := _unsupported(config):
        raise ValueError("config: " + "; ".join(refused))
    chosen = adapted(config, places(params, module))
    _check_tree(module, params, mask, chosen, config["bias"])
    config |= {"base_model_name_or_path": public_name(base)}
    arrays = _arrays(params, _spots(module, params, chosen, config["bias"]))
    with atomic_dir(out, overwrite=overwrite) as folder:
        tensors.write(folder, arrays, "adapter_model", shard_bytes=2**63)  # peft reads one file
        text = json.dumps(dict(sorted(config.items())), indent=2, ensure_ascii=False) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        notes = copy_tokenizer(Path(tokenizer or base).expanduser(), folder, chat_template)
        card = model_card(name=out.name, base=public_name(base), adapter=True, facts=facts, notes=notes)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return notes


def tree_factors(module: Any, params: Any) -> dict[Place, Factors]:
    """The adapted modules of a tree, with the rank of their leaf and their scale; scale 0 is not adapted."""
    leaves, found = weights_by_path(params), {}
    for place in places(params, module):
        if isinstance(leaf := leaves[place.path], LoraWeight):
            scale = float(np.asarray(leaf.scale)[() if place.index is None else place.index])
            if scale:
                found[place] = Factors(leaf.a.shape[-1], scale)
    return found


def _complete(module: Any, params: Any, mask: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json: what is given, over what the tree shows, over peft's defaults."""
    tree = tree_factors(module, params)
    if not tree:
        raise ValueError("The parameters hold no adapters; write them with export_model.")
    alphas = {
        place: _round(f.scale * (math.sqrt(f.rank) if given.get("use_rslora") else f.rank)) for place, f in tree.items()
    }
    r, rank_pattern = _majority({place: f.rank for place, f in tree.items()})
    alpha, alpha_pattern = _majority(alphas)
    config = DEFAULTS | {
        "r": r,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": max(_dropout(leaf) for leaf in weights_by_path(params).values()),
        "target_modules": _shortest([p.name for p in tree], [p.name for p in places(params, module)]),
        "bias": _trained_biases(mask, tree),
        "fan_in_fan_out": models.names(module).conv1d,
    }
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    if "r" in given or "lora_alpha" in given:
        config |= {"rank_pattern": {}, "alpha_pattern": {}}
    if given.get("target_modules") == "all-linear":
        given.pop("target_modules")  # the names are what peft, too, writes, and every engine reads
    return config | given | {"peft_type": "LORA", "inference_mode": True}


def _round(x: float) -> float | int:
    """Undo float32: 15.9999996 -> 16."""
    x = float(f"{x:.6g}")
    return int(x) if x.is_integer() else x


def _dropout(leaf: Any) -> float:
    rate = leaf.dropout if isinstance(leaf, LoraWeight) else None
    return 0.0 if rate is None else float(_round(float(np.max(rate))))


def _majority(values: Mapping[Place, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and {module: value} of those that differ."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {place.name: v for place, v in values.items() if v != common}


def _shortest(chosen: list[str], modules: list[str]) -> list[str]:
    """Name a set of modules by their last parts if these name no other module, else in full."""
    short = {name.rpartition(".")[2] for name in chosen}
    return sorted(short) if {m for m in modules if m.rpartition(".")[2] in short} == set(chosen) else chosen


def _trained_biases(mask: Any, tree: Mapping[Place, Factors]) -> str:
    trained = {path for path, role in flatten(mask).items() if role is TRAIN and path.endswith("/bias")}
    beside = {re.sub(r"[^/]+$", "bias", place.path) for place in tree}
    return "none" if not trained else "lora_only" if trained <= beside else "all"


def _check_tree(module: Any, params: Any, mask: Any, chosen: Mapping[Place, Factors], bias: str) -> None:
    """Raise ValueError unless peft, reading the config, will compute what the tree does."""
    tree = tree_factors(module, params)
    if differing := {p.name for p in tree.keys() ^ chosen.keys()}:
        raise ValueError(f"config and parameters differ in which modules are adapted: {sorted(differing)}.")
    leaves = weights_by_path(params)
    for place, (rank, scale) in chosen.items():
        held, row = leaves[place.path], () if place.index is None else place.index
        if not math.isclose(scale, tree[place].scale, rel_tol=1e-5):
            raise ValueError(f"{place.name}: the config's scale is {scale}, the parameters' {tree[place].scale}.")
        if rank > tree[place].rank or np.any(np.asarray(held.a)[row][..., rank:]):
            raise ValueError(f"{place.name}: the config's rank is {rank}, the parameters' {tree[place].rank}.")
    carried = {spot.path for spot in _spots(module, params, chosen, bias).values()}
    stray = [
        path
        for path, role in flatten(mask).items()
        if role is TRAIN and path not in carried and path.rpartition("/")[0] not in carried
    ]
    if stray:
        raise ValueError(f"An adapter cannot carry {', '.join(stray[:5])}, which were trained; use export_model.")


def _arrays(params: Any, spots: Mapping[str, Spot]) -> dict[str, np.ndarray]:
    """The tensors of an adapter, float32, by their keys."""
    leaves, host = weights_by_path(params), {}
    arrays = {}
    for key, spot in spots.items():
        if (spot.path, spot.field) not in host:
            leaf = leaves[spot.path]
            host[spot.path, spot.field] = np.asarray(getattr(leaf, spot.field) if spot.field else leaf, np.float32)
        array = host[spot.path, spot.field]
        array = (array if spot.index is None else array[spot.index]).T
        arrays[key] = array[tuple(slice(n) for n in spot.shape)]
    return arrays
