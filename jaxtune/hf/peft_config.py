"""adapter_config.json: as peft 0.21 writes it, the settings that are followed, and the config of a parameter tree."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.hf import tensors
from jaxtune.methods.adapters import TABLE, attach, hira_leaf, ia3, miss_leaf, prompt_tuning, untied_for
from jaxtune.methods.places import (
    DENSE,
    Factors,
    Place,
    in_label_head,
    is_bias,
    is_or_ends,
    is_saved,
    lora_places,
    parameters,
    places,
    renamed,
    resolve_targets,
)
from jaxtune.methods.settings import Hira, Ia3, Lora, Miss, names
from jaxtune.methods.vocabulary import untie
from jaxtune.tree import TRAIN, flatten
from jaxtune.weights.adapters import (
    DoraWeight,
    HiraWeight,
    Ia3Weight,
    LoraWeight,
    MissWeight,
    PromptWeight,
    TokensWeight,
)
from jaxtune.weights.leaf import Adapter, is_weight, weights_by_path

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
IA3_DEFAULTS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "feedforward_modules": None,
    "inference_mode": True,
    "init_ia3_weights": True,
    "modules_to_save": None,
    "peft_type": "IA3",
    "peft_version": "0.21.2",
    "revision": None,
    "target_modules": None,
    "task_type": "CAUSAL_LM",
}
HIRA_DEFAULTS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "hira_dropout": 0.0,
    "inference_mode": True,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_type": "HIRA",
    "peft_version": "0.21.2",
    "r": 32,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "task_type": "CAUSAL_LM",
}
MISS_DEFAULTS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "exclude_modules": None,
    "inference_mode": True,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "mini_r": 1,
    "miss_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "MISS",
    "peft_version": "0.21.2",
    "r": 64,
    "revision": None,
    "target_modules": None,
    "task_type": "CAUSAL_LM",
}
PROMPT_DEFAULTS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": None,
    "num_virtual_tokens": None,
    "peft_type": "PROMPT_TUNING",
    "peft_version": "0.21.2",
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "revision": None,
    "task_type": "CAUSAL_LM",
    "token_dim": None,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": None,
}

# Settings that are followed. Of the others, these do not affect a trained adapter; the rest must be off.
_FOLLOWED = {*names(Lora), *names(Ia3), "num_virtual_tokens", "fan_in_fan_out"}
_INERT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "revision", "task_type", "eva_config", "lora_ga_config", "corda_config", "loftq_config"),
    *("init_ia3_weights", "num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
}
# How A and B were initialised matters only if the base was changed with them ("pissa", "olora", "loftq", ...).
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")


# ----------------------------------------------------------------------------------------------------------------- read


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """Read adapter_config.json; fields that an older peft did not write get their defaults.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{folder} is no adapter directory: it has no adapter_config.json.")
    config = tensors.read_json(file)
    kind = config.get("peft_type", "LORA")
    if not isinstance(kind, str):
        raise UserError(f"{file}: peft_type={kind!r}, expected one of {', '.join(KINDS)}.")
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str | None):
        raise UserError(f"{file}: base_model_name_or_path={named!r}, expected a directory or a hub id.")
    defaults = KINDS[kind].defaults if kind in KINDS else DEFAULTS
    said = {k: v for k, v in config.items() if k == "task_type" or not (v is None and defaults.get(k) is not None)}
    return defaults | said  # a null task_type is a model of no class that peft knows


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """One line for each setting under which peft computes something that jaxtune does not."""
    lines, followed = [], _FOLLOWED
    if config["peft_type"] in KINDS:
        followed = _FOLLOWED | KINDS[config["peft_type"]].followed
    else:
        lines.append(f"unsupported  peft_type={config['peft_type']!r}: only {', '.join(KINDS)} are")
    for key, value in config.items():
        if key not in followed | _INERT and value not in (None, False, 0, [], {}):
            lines.append(f"unsupported  {key}={value!r}")
    if not any(config.get("init_lora_weights", True) == init for init in _HARMLESS_INITS):
        init = config["init_lora_weights"]
        lines.append(
            f"unsupported  init_lora_weights={init!r} changes the base; save the adapter with peft's "
            "path_initial_model_for_weight_conversion"
        )
    if config["peft_type"] == "PROMPT_TUNING" and config.get("modules_to_save"):
        lines.append(
            f"unsupported  modules_to_save={config['modules_to_save']!r} with peft_type={config['peft_type']!r}"
        )

    def named(v):
        return isinstance(v, list) and all(isinstance(name, str) for name in v)

    def pattern(number):
        return lambda v: isinstance(v, dict) and all(number(one) for one in v.values())

    def rank(v):
        return type(v) is int and 0 < v <= 2**20

    def alpha(v):
        return type(v) in (int, float) and math.isfinite(v)

    def whole(v):
        return type(v) is int and v >= 0

    names = ("a list of names or null", lambda v: v is None or named(v))
    choice = ("a list of names, a regex or null", lambda v: v is None or isinstance(v, str) or named(v))
    rate = ("from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1)
    checks = {
        "r": ("a whole number from 1 to 1,048,576", rank),
        "lora_alpha": ("a number", alpha),
        "lora_dropout": rate,
        "hira_dropout": rate,
        "miss_dropout": rate,
        "init_weights": ("true, false or 'gaussian'", lambda v: v in (None, True, False, "gaussian")),
        "use_dora": ("true or false", lambda v: type(v) is bool),
        "use_rslora": ("true or false", lambda v: type(v) is bool),
        "exclude_modules": choice,
        "feedforward_modules": choice,
        "layers_pattern": choice,
        "layers_to_transform": (
            "a number of a layer, a list of them or null",
            lambda v: v is None or whole(v) or (isinstance(v, list) and all(map(whole, v))),
        ),
        "bias": ("'none', 'all' or 'lora_only'", lambda v: v in ("none", "all", "lora_only")),
        "target_modules": (
            "a list of names or a regex",
            lambda v: (v and (isinstance(v, str) or named(v))) or (not v and config.get("target_parameters")),
        ),
        "target_parameters": names,
        "rank_pattern": ("an object with whole numbers above 0", pattern(rank)),
        "alpha_pattern": ("an object with numbers", pattern(alpha)),
        "modules_to_save": names,
        "trainable_token_indices": (
            "a list of token ids, or an object with such a list for the input embedding or the output head, or null",
            lambda v: (
                v is None
                or all(isinstance(i, list) and all(map(whole, i)) for i in (v.values() if isinstance(v, dict) else [v]))
            ),
        ),
        "num_virtual_tokens": ("a whole number from 1 to 1,048,576", rank),
    }
    lines += [
        f"wrong value  {k}={config[k]!r}, expected {words}"
        for k, (words, ok) in checks.items()
        if k in config and not ok(config[k])
    ]
    return lines


def chosen_by(config: Mapping[str, Any], candidates: list[Place]) -> dict[Place, Factors]:
    """The modules with low-rank factors, their ranks and scales; none in an adapter of another type.

    As in peft, one match suffices: one config serves several families.
    """
    if KINDS[config["peft_type"]].low_rank is None:
        return {}
    return lora_places(candidates, lora_settings(config, candidates), strict=False)


def lora_settings(config: Mapping[str, Any], candidates: list[Place]) -> Lora:
    """The settings of a LoraConfig (or of its like) that are followed, with the targets that this model has."""
    kind = KINDS[config["peft_type"]].low_rank
    settings = kind(**{name: config[name] for name in names(kind) if name in config}).as_lora()
    return dataclasses.replace(settings, target_modules=matching(config["target_modules"], candidates))


def matching(targets: str | list[str] | None, candidates: list[Place]) -> str | list[str]:
    """The targets that this model has; if it has none, all of them, for the error message."""
    if isinstance(targets, str) or not targets:
        return targets or []
    modules = [p.name for p in candidates if not p.parameter]
    return [t for t in targets if any(is_or_ends(name, t) for name in modules)] or targets


# --------------------------------------------------------------------------------------------------------- off the tree


def complete(module: Any, params: Any, mask: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json: the given settings, else those read off the tree, else peft's defaults."""
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in renamed(given, places(params, module)).items()}
    if given.get("target_modules", "all-linear") in ("all-linear", None):
        given.pop("target_modules", None)  # names of modules are what peft writes and every engine reads
    leaves = weights_by_path(params).values()
    for name, kind in KINDS.items():
        if any(isinstance(leaf, kind.leaf) for leaf in leaves):
            given = _with_head(module, params, mask, given)
            own = {"peft_type": name, "inference_mode": True}
            return kind.defaults | {"task_type": module.task_type} | kind.describe(module, params, mask, given) | own
    raise ValueError("The parameters hold no adapters; write them with export_model.")


def _lora_config(module: Any, params: Any, mask: Any, given: dict[str, Any]) -> dict[str, Any]:
    tree, leaves = tree_factors(module, params), weights_by_path(params)
    alphas = {
        place: _round(f.scale * (math.sqrt(f.rank) if given.get("use_rslora") else f.rank)) for place, f in tree.items()
    }
    r, rank_pattern = _majority({place: f.rank for place, f in tree.items()})
    alpha, alpha_pattern = _majority(alphas)
    saved = _trained_modules(module, params, mask)
    tokens = {path: list(leaf.ids) for path, leaf in leaves.items() if isinstance(leaf, TokensWeight)}
    if tokens.keys() - {TABLE}:
        ends = {p.path: p.name.rpartition(".")[2] for p in places(params, module) if p.path in tokens}
        ids = {ends[path]: rows for path, rows in tokens.items()}
    else:
        ids = tokens.get(TABLE)
    config = {
        "r": r,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": max(_dropout(leaf) for leaf in leaves.values()),
        "target_modules": _shortest([p.name for p in tree if not p.parameter], _modules(module, params)) or None,
        "target_parameters": _shortest_parameters(module, params, tree),
        "bias": _trained_biases(mask, tree, saved),
        "fan_in_fan_out": models.names(module).conv1d,
        "use_dora": any(isinstance(leaf, DoraWeight) for leaf in leaves.values()),
        "trainable_token_indices": ids,
        "modules_to_save": _saved(module, params, mask),
    }
    if "r" in given or "lora_alpha" in given:
        config |= {"rank_pattern": {}, "alpha_pattern": {}}
    for name in ("rank_pattern", "alpha_pattern"):
        if name in given:
            given[name] = dict(given[name] or ())
    if given.get("init_lora_weights") == "default":
        given["init_lora_weights"] = True
    return config | given


def _uniform_config(dropout: str, module: Any, params: Any, mask: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The config of a tree with one rank; `dropout` is the name of its rate."""
    tree = tree_factors(module, params)
    config = {
        "r": max(f.rank for f in tree.values()),
        dropout: max(map(_dropout, weights_by_path(params).values())),
        "target_modules": _shortest([p.name for p in tree], _modules(module, params)),
        "modules_to_save": _saved(module, params, mask),
    }
    if models.names(module).conv1d:
        config["fan_in_fan_out"] = True
    if given.get("init_weights") == "default":
        given["init_weights"] = True
    return config | given


def _ia3_config(module: Any, params: Any, mask: Any, given: dict[str, Any]) -> dict[str, Any]:
    leaves, every = weights_by_path(params), places(params, module)
    found = [p for p in every if isinstance(leaf := leaves[p.path], Ia3Weight) and is_adapted(leaf, p)]
    inputs = [p for p in found if leaves[p.path].inp is not None]
    config = {
        "target_modules": _shortest([p.name for p in found], [p.name for p in every]),
        "feedforward_modules": _shortest([p.name for p in inputs], [p.name for p in every]),
        "fan_in_fan_out": models.names(module).conv1d,
        "modules_to_save": _saved(module, params, mask),
    }
    return config | {name: value for name, value in given.items() if value is not None}  # None: the family's own


def _saved(module: Any, params: Any, mask: Any) -> list[str] | None:
    """modules_to_save of a tree."""
    trained = _shortest_saved(module, params, _trained_modules(module, params, mask))
    return [*trained_head(module, params, mask), *trained] or None


def _with_head(module: Any, params: Any, mask: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The settings given, with a trained label head in modules_to_save, if they have that."""
    saved = given.get("modules_to_save") or []
    head = [name for name in trained_head(module, params, mask) if not is_saved(name, saved)]
    return given | {"modules_to_save": [*head, *saved]} if head else given


def _prompt_config(module: Any, params: Any, mask: Any, given: dict[str, Any]) -> dict[str, Any]:
    count, width = next(w for w in weights_by_path(params).values() if isinstance(w, PromptWeight)).prompt.shape
    config = {
        "num_virtual_tokens": count,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": module.spec.segments[0].pattern[0].heads,
        "num_layers": module.spec.layers,
    }
    given.pop("init", None)  # the prompt's initial values
    return config | given


def tree_factors(module: Any, params: Any) -> dict[Place, Factors]:
    """The adapted modules of a tree, with their rank (without padding) and scale."""
    leaves, used, found = weights_by_path(params), {}, {}
    for path, leaf in leaves.items():
        if isinstance(leaf, Adapter) and (components := leaf.used()) is not None:
            used[path] = components
    for place in places(params, module):
        if place.path in used and (scale := scale_of(leaves[place.path], place)):
            columns = used[place.path][() if place.index is None else place.index]
            columns = np.flatnonzero(columns.reshape(-1, columns.shape[-1]).any(0))  # of all experts
            found[place] = Factors(int(columns[-1]) + 1 if len(columns) else 1, scale)
    return found


def scale_of(leaf: Any, place: Place) -> float:
    """The scale of one module in its leaf; 0 where it is not adapted."""
    return float(np.ravel(np.asarray(leaf.scale)[() if place.index is None else place.index])[0])  # experts have one


def is_adapted(leaf: Adapter, place: Place) -> bool:
    """Whether an adapter has an effect on one module of its stack."""
    layers = leaf.layers_adapted()
    return layers is None or bool(np.any(np.asarray(layers)[() if place.index is None else place.index]))


def trained_head(module: Any, params: Any, mask: Any) -> list[str]:
    """The modules of a label head that are trained and stored whole beside the adapters; all of them, without a mask.

    peft trains "classifier" and "score" alone: in its adapters BERT's pooler is the base's.
    """
    if not module.label_head:
        return []
    roles = flatten(mask)
    trained = [
        t.module
        for t in models.names(module).tensors(module.spec, set(weights_by_path(params)))
        if in_label_head(t.path) and roles.get(t.path, TRAIN) is TRAIN
    ]
    return [name for name in module.saved_modules if any(is_saved(other, [name]) for other in trained)]


def _trained_modules(module: Any, params: Any, mask: Any) -> dict[str, str]:
    """{module: path of its parameter} of plain modules that were trained in full, not only their biases."""
    leaves, roles = weights_by_path(params), flatten(mask)
    found = {}
    for t in models.names(module).tensors(module.spec, set(leaves)):
        if (
            roles.get(t.path) is TRAIN
            and not in_label_head(t.path)
            and not is_weight(leaves[t.path])
            and not is_bias(t.path)
        ):
            found[t.module] = t.path
    return found


def _trained_biases(mask: Any, tree: Mapping[Place, Factors], saved: Mapping[str, str]) -> str:
    """The value of `bias`: which biases were trained, besides those of modules that were trained in full."""
    trained = {path for path, role in flatten(mask).items() if role is TRAIN and path.endswith(("/bias", "_bias"))}
    trained = {path for path in trained if not (in_label_head(path) or path.startswith(f"{DENSE}/"))}
    trained -= {re.sub(r"[^/]+$", "bias", path) for path in saved.values()}
    beside = {re.sub(r"[^/]+$", "bias", place.path) for place in tree}
    return "none" if not trained else "lora_only" if trained <= beside else "all"


def _modules(module: Any, params: Any) -> list[str]:
    """All linear and embedding modules, those of a label head too, by HF's names."""
    matrices = {p for p in weights_by_path(params) if p.endswith(("/kernel", "/embedding"))}
    return [t.module for t in models.names(module).tensors(module.spec, matrices)]


def _shortest(chosen: list[str], modules: list[str]) -> list[str]:
    """Name a set of modules by their last parts, if these match no other module, else in full."""
    short = {name.rpartition(".")[2] for name in chosen}
    return sorted(short) if {m for m in modules if m.rpartition(".")[2] in short} == set(chosen) else chosen


def _shortest_parameters(module: Any, params: Any, tree: Mapping[Place, Factors]) -> list[str] | None:
    """Name adapted experts by the last three parts of their names, if no others have these, else in full; or None."""
    chosen = [p.name for p in tree if p.parameter]
    short = sorted({".".join(name.split(".")[-3:]) for name in chosen})
    every = [p.name for p in places(params, module) if p.parameter and any(is_or_ends(p.name, s) for s in short)]
    return (short if set(every) == set(chosen) else chosen) or None


def _shortest_saved(module: Any, params: Any, saved: Mapping[str, str]) -> list[str]:
    """As `_shortest`, by the ends of names that peft compares for modules_to_save."""
    short = sorted({name.rpartition(".")[2] for name in saved})
    every = {p.name.rpartition(".")[0] for p in parameters(params, module)}
    return short if {name for name in every if is_saved(name, short)} == set(saved) else list(saved)


def _majority(values: Mapping[Place, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and {module: value} of the others."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {place.name: v for place, v in values.items() if v != common}


def _dropout(leaf: Any) -> float:
    rate = getattr(leaf, "dropout", None)
    return 0.0 if rate is None else float(_round(float(np.max(rate))))


def _round(x: float) -> float | int:
    """Undo float32: 15.9999996 -> 16."""
    x = float(f"{x:.6g}")
    return int(x) if x.is_integer() else x


# ----------------------------------------------------------------------------------------------------------- the table


def _attach_lora(
    module: Any, params: Any, config: Mapping[str, Any], change: Callable[[LoraWeight, str], Adapter] | None = None
) -> tuple[Any, Any]:
    params = untied_for(config["target_modules"] or [], params, module)
    candidates, saved = places(params, module), _known(config["modules_to_save"], params, module)
    settings = dataclasses.replace(lora_settings(config, candidates), modules_to_save=saved, init_lora_weights=True)
    return attach(params, None, chosen_by(config, candidates), settings, module, change=change)


def _known(modules: list[str] | None, params: Any, module: Any) -> list[str]:
    """Those of modules_to_save that the model has: peft names the label heads of all families."""
    whole = untie(params) if module.continues else params
    known = [p.name.rpartition(".")[0] for p in parameters(whole, module)]
    return [m for m in modules or () if any(is_saved(name, [m]) for name in known)]


def _attach_ia3(module: Any, params: Any, config: Mapping[str, Any]) -> tuple[Any, Any]:
    targets = matching(config["target_modules"], places(params, module))
    inputs = config["feedforward_modules"] or ()
    if not isinstance(inputs, str):  # as peft, which ignores those that are not targets: "w2" of a Mixtral
        chosen = resolve_targets(targets, places(params, module))
        inputs = [name for name in inputs if any(is_or_ends(p.name, name) for p in chosen)]
    saved = _known(config["modules_to_save"], params, module)
    return ia3(params, targets, inputs, config["exclude_modules"], saved, module=module)


def _attach_prompt(module: Any, params: Any, config: Mapping[str, Any]) -> tuple[Any, Any]:
    return prompt_tuning(params, None, config["num_virtual_tokens"])


class Kind(NamedTuple):
    """A row: one `peft_type`. The leaf's class declares which field is stored under which key.

    Attributes:
        leaf: the class.
        defaults: of adapter_config.json.
        describe: (module, params, mask, settings given) -> the config of a tree, as far as it is not the defaults.
        attach: (module, params, config) -> (params, mask), with fresh values.
        followed: settings that are followed besides those of all types; the others must be off.
        low_rank: the class of its settings, if it chooses modules and ranks as LoRA does; it has `as_lora`.
    """

    leaf: type[Adapter]
    defaults: Mapping[str, Any]
    describe: Callable[[Any, Any, Any, dict[str, Any]], dict[str, Any]]
    attach: Callable[[Any, Any, Mapping[str, Any]], tuple[Any, Any]]
    followed: frozenset[str] = frozenset()
    low_rank: type | None = None


KINDS: dict[str, Kind] = {
    "LORA": Kind(LoraWeight, DEFAULTS, _lora_config, _attach_lora, low_rank=Lora),
    "HIRA": Kind(
        leaf=HiraWeight,
        defaults=HIRA_DEFAULTS,
        describe=partial(_uniform_config, "hira_dropout"),
        attach=partial(_attach_lora, change=hira_leaf),
        followed=frozenset(names(Hira)),
        low_rank=Hira,
    ),
    "MISS": Kind(
        leaf=MissWeight,
        defaults=MISS_DEFAULTS,
        describe=partial(_uniform_config, "miss_dropout"),
        attach=partial(_attach_lora, change=miss_leaf),
        followed=frozenset([*names(Miss), "mini_r", "init_weights"]),
        low_rank=Miss,
    ),
    "IA3": Kind(Ia3Weight, IA3_DEFAULTS, _ia3_config, _attach_ia3),
    "PROMPT_TUNING": Kind(PromptWeight, PROMPT_DEFAULTS, _prompt_config, _attach_prompt),
}
