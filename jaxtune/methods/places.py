"""The modules of a model by name, and which of them a config's targets, patterns and layers choose, as peft does."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.errors import UserError, nearest
from jaxtune.methods.settings import Lora
from jaxtune.tree import PyTree
from jaxtune.weights.foreign import MatrixLayout
from jaxtune.weights.leaf import plain, weights_by_path

DENSE = "pooled_dense"  # dense layers above the pooling of a text: {DENSE: {"0": {"kernel": [K,N], "bias": [N]}}}


class Place(NamedTuple):
    """A module that a target can name.

    Attributes:
        name: the module's HF name "model.layers.3.self_attn.q_proj", or its own path with dots.
        path: of its matrix in the parameter tree.
        index: row of the stacked leaf; None: the whole leaf.
        linear: it is multiplied, not looked up.
        old: its HF name in files and older versions of transformers, if different.
        parameter: it is no module but the matrices of a layer's experts, a parameter that `target_parameters` names:
            "model.layers.3.mlp.experts.gate_up_proj".
    """

    name: str
    path: str
    index: int | None
    linear: bool = True
    old: str | None = None
    parameter: bool = False

    @property
    def row(self) -> int | None:
        """The first number of `index`, also where a parameter's has a second one, of an expert."""
        return self.index[0] if isinstance(self.index, tuple) else self.index


class Factors(NamedTuple):
    """The rank of one adapted module, and the scale of its update."""

    rank: int
    scale: float


def places(params: PyTree, module: Any = None, layouts: Mapping[str, MatrixLayout] | None = None) -> list[Place]:
    """List the linear and embedding modules of a tree: by HF names for a zoo module, else by the tree's own paths.

    The experts of a zoo module follow, as the parameters that they are in transformers.
    """
    if layouts is not None:
        return [Place(_dotted(path), path, None, not layout.lookup) for path, layout in layouts.items()]
    leaves = weights_by_path(params)
    if module is None:
        found = [path for path, leaf in leaves.items() if len(plain(leaf).shape) >= 2]
        return [Place(_dotted(path), path, None, not re.search(r"embedding(/value)?$", path)) for path in found]
    found = [
        p
        for p in parameters(params, module)
        if p.path.endswith(("/kernel", "/embedding")) and not in_label_head(p.path)
    ]
    return [
        Place(p.name.rpartition(".")[0], p.path, p.index, p.path.endswith("kernel"), p.old and p.old.rpartition(".")[0])
        for p in found
    ] + _experts(params, module)


EXPERTS = "_experts"  # the end of a leaf's path


def _experts(params: PyTree, module: Any) -> list[Place]:
    """The matrices of each layer's experts, one place for all experts of a layer."""
    found = {}
    for p in parameters(params, module):
        if p.path.endswith(EXPERTS):
            name = p.path.rpartition("/")[2].removesuffix(EXPERTS)
            name = re.match(r".*\.experts\.", p.name)[0] + f"{name}_proj"
            found[name] = Place(name, p.path, p.row, parameter=True)
    return list(found.values())


def _dotted(path: str) -> str:
    """A leaf's module as target names write it: "body/dense/kernel" -> "body.dense"."""
    return re.sub(r"/(kernel|embedding)(/value)?$", "", path).replace("/", ".")


def parameters(params: PyTree, module: Any = None) -> list[Place]:
    """List every parameter as `places` does modules, by names such as "model.layers.3.self_attn.q_proj.weight"."""
    paths = weights_by_path(params)
    if module is None:
        return [Place(path.replace("/", "."), path, None) for path in paths]
    from jaxtune.models import names

    return [
        Place(t.name, t.path, t.index, old=t.hf if t.hf != t.name else None)
        for t in names(module).tensors(module.spec, set(paths))
    ]


def renamed(settings: Mapping[str, Any], modules: Sequence[Place]) -> dict[str, Any]:
    """The settings of a method, with old names of modules replaced by current ones."""
    settings, every = dict(settings), modules
    modules = [p for p in every if not p.parameter]
    if not any(p.old for p in modules):
        return settings

    def known(name: str, of: str) -> list[str]:
        found = [p.name for p in modules if is_or_ends(getattr(p, of) or p.name, name)]
        return list(dict.fromkeys(found))

    for key in ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"):
        value = settings.get(key)
        if isinstance(value, list | tuple):
            new = [[n] if known(n, "name") else known(n, "old") or [n] for n in value]
            settings[key] = list(dict.fromkeys(n for names in new for n in names))
        elif isinstance(value, str) and value != "all-linear":
            pattern = compiled(key, value)
            if not any(pattern.fullmatch(p.name) for p in modules):
                settings[key] = [p.name for p in modules if pattern.fullmatch(p.old or p.name)] or value
    for key in ("rank_pattern", "alpha_pattern"):
        for regex, value in dict(settings.get(key) or ()).items():
            if not any(_by_pattern({regex: True}, p.name, False) for p in every):
                hits = {re.escape(p.name): value for p in modules if _by_pattern({regex: True}, p.old or p.name, False)}
                settings[key] = {k: v for k, v in dict(settings[key]).items() if not (hits and k == regex)} | hits
    return settings


def is_bias(path: str) -> bool:
    """Whether a parameter is a bias, as Linen, NNX and Haiku name them."""
    return re.search(r"(^|/)((\w+_)?bias|b)(/value)?$", path) is not None


def is_module_bias(path: str) -> bool:
    """Whether it is the bias of a module, as peft's `bias` counts them.

    Those of experts are parameters of their own, and that of an encoder-decoder's logits is a buffer.
    """
    return is_bias(path) and not path.endswith(f"{EXPERTS}_bias") and not path.startswith("logits_bias/")


def owner(path: str) -> str:
    """The path of the module that a parameter belongs to."""
    return re.sub(r"/?[^/]+(/value)?$", "", path)


def check_names(label: str, names: str | Sequence[str] | None, chosen: Sequence[Place]) -> None:
    """Raise UserError for a name in a list that none of the chosen modules has."""
    if not isinstance(names, tuple | list):
        return
    if lost := [n for n in names if not any(is_or_ends(p.name, n) for p in chosen)]:
        raise UserError(f"{label}: {', '.join(map(repr, lost))} match(es) none of the targets.")


def in_label_head(path: str) -> bool:
    """Whether a parameter's path lies in the label head."""
    return path.startswith("classifier/")


def is_trained_whole(path: str, module: Any) -> bool:
    """Whether a parameter is trained by every method, beside what it chooses: a label head, a task's own layers."""
    return path.startswith(f"{DENSE}/") or (getattr(module, "label_head", False) and in_label_head(path))


def is_saved(name: str, modules: Sequence[str] | None) -> bool:
    """Whether modules_to_save names a module or parameter, or one that contains it; peft compares ends of names."""
    parts = name.split(".")
    return any(".".join(parts[: n + 1]).endswith(m) for n in range(len(parts)) for m in modules or ())


def resolve_targets(target_modules: str | Sequence[str], candidates: list[Place]) -> list[Place]:
    """Choose the places that peft's `target_modules` names.

    A list matches a module's whole name or its end after a dot; a string is a regex over the whole name, except
    "all-linear": every linear module but the output head.

    Raises:
        UserError: a target matches nothing.
    """
    candidates = [p for p in candidates if not p.parameter]
    names = sorted({p.name.rpartition(".")[2] for p in candidates})
    if target_modules == "all-linear":
        heads = [p for p in candidates if "lm_head" in (p.name.rpartition(".")[2], p.path.rpartition("/")[0])]
        chosen = [p for p in candidates if p.linear and p not in heads]
        if not chosen:
            raise UserError('target_modules="all-linear" found no linear module; name the targets.')
        return chosen
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as e:
            raise UserError(f"target_modules={target_modules!r} is not a valid regular expression: {e}.") from None
        chosen = [p for p in candidates if pattern.fullmatch(p.name)]
        if not chosen:
            raise UserError(
                f"target_modules={target_modules!r} matches no module; a regular expression must match the whole "
                f"name, such as {candidates[0].name!r}. Modules: {', '.join(names)}."
            )
        return chosen
    if not target_modules:
        raise UserError("target_modules is empty, which goes with target_parameters only.")
    hits = {t: [p for p in candidates if is_or_ends(p.name, t)] for t in target_modules}
    if lost := [t for t, found in hits.items() if not found]:
        raise UserError(
            f"target_modules: {', '.join(map(repr, lost))} match(es) no module.{nearest(lost[0], names)} "
            f"Modules: {', '.join(names)}."
        )
    chosen = {p for found in hits.values() for p in found}
    return [p for p in candidates if p in chosen]


def lora_places(candidates: list[Place], s: Lora, *, strict: bool = True) -> dict[Place, Factors]:
    """Choose modules, ranks and scales as peft does from a LoraConfig. A module in modules_to_save is no target.

    Args:
        candidates: every place of the model that could take an adapter.
        s: LoRA's settings.
        strict: raise for a pattern, a layer or an exclusion that matches nothing, and for a layer whose module is not
            named.

    Raises:
        UserError: no module matches, or something that is given has no effect.
    """
    target_modules = s.target_modules
    if s.modules_to_save:  # modules_to_save takes precedence
        every, candidates = candidates, [p for p in candidates if not is_saved(p.name, s.modules_to_save)]
        target_modules = beside_saved(target_modules, candidates, every)
    wanted = target_experts(s, candidates, strict=strict)
    chosen = resolve_targets(target_modules, candidates) if target_modules or not wanted else []
    ranks, alphas = dict(s.rank_pattern or ()), dict(s.alpha_pattern or ())
    for label, pattern in {"rank_pattern": ranks, "alpha_pattern": alphas}.items():
        for key in pattern:
            compiled(label, key)
    if isinstance(s.exclude_modules, str):
        compiled("exclude_modules", s.exclude_modules)
    if strict and s.layers_pattern and s.layers_to_transform is None:
        raise UserError(f"layers_pattern={s.layers_pattern!r} has no effect without layers_to_transform; give both.")
    layers = [s.layers_to_transform] if isinstance(s.layers_to_transform, int) else list(s.layers_to_transform or ())
    if layers and isinstance(target_modules, str) and target_modules != "all-linear":
        if strict:
            raise UserError(
                "layers_to_transform goes with names of modules; a regex in target_modules can name the layers itself."
            )
        layers = []  # as peft
    found = [p for p in chosen if not excluded(p.name, s.exclude_modules)]
    if strict:
        check_names("exclude_modules", s.exclude_modules, chosen)
    if layers:
        known = {p: _layer(p.name, s.layers_pattern) for p in found}
        found = [p for p in found if known[p] in layers]
        if strict and (lost := sorted(set(layers) - set(known.values()))):
            raise UserError(f"layers_to_transform: no target in layer(s) {', '.join(map(str, lost))}.")
    if strict and layers and wanted:
        raise UserError(
            "layers_to_transform does not choose among target_parameters, as in peft; name them with their layer: "
            f"{wanted[0].name!r}."
        )
    if not found and not wanted:
        raise UserError("exclude_modules and layers_to_transform leave no module to adapt.")
    found += wanted
    if strict:
        for label, pattern in {"rank_pattern": ranks, "alpha_pattern": alphas}.items():
            lost = [key for key in pattern if not any(_by_pattern({key: True}, p.name, False) for p in found)]
            if lost:
                raise UserError(
                    f"{label}: {', '.join(map(repr, lost))} match(es) no adapted module, such as {found[0].name!r}."
                )
    factors = {}
    for place in found:
        rank = _by_pattern(ranks, place.name, s.r)
        alpha = _by_pattern(alphas, place.name, s.lora_alpha)
        if rank < 1 or alpha <= 0:
            raise UserError(f"{place.name}: r={rank} and lora_alpha={alpha:g}; expected at least 1, and above 0.")
        factors[place] = Factors(rank, alpha / (math.sqrt(rank) if s.use_rslora else rank))
    return factors


def target_experts(s: Lora, candidates: list[Place], *, strict: bool = True) -> list[Place]:
    """Choose the experts' matrices that `target_parameters` names: whole names or their ends after a dot.

    `strict`: every name has to match; otherwise one suffices.

    Raises:
        UserError: a name matches no such matrices, or the settings ask for what peft does not do with parameters.
    """
    if not s.target_parameters:
        return []
    if isinstance(s.target_parameters, str):
        raise UserError(f"target_parameters={s.target_parameters!r}: expected a list of names.")
    for asked, words in (
        (s.use_dora, "use_dora=True"),
        (s.lora_dropout > 0, f"lora_dropout={s.lora_dropout:g}"),
        (s.init_lora_weights == "pissa", "init_lora_weights='pissa'"),
    ):
        if asked:
            raise UserError(f"target_parameters: experts take plain LoRA only, as in peft, not {words}.")
    known = [p for p in candidates if p.parameter]
    hits = {t: [p for p in known if is_or_ends(p.name, t)] for t in s.target_parameters}
    lost = [t for t, found in hits.items() if not found]
    if lost and (strict or len(lost) == len(hits)):
        names = sorted({re.sub(r".*\.(\w+\.experts\.)", r"\1", p.name) for p in known})
        there = f"which are {', '.join(names)}; a router stays frozen.{nearest(lost[0], names)}"
        there = there if names else "and this model has none."
        raise UserError(f"target_parameters: {lost[0]!r} names no experts' matrices, {there}")
    chosen = {p for found in hits.values() for p in found}
    return [p for p in known if p in chosen]


def beside_saved(targets: str | Sequence[str], left: list[Place], every: list[Place]) -> str | list[str]:
    """The targets, without those that match saved modules only.

    Raises:
        UserError: no target is left.
    """
    if isinstance(targets, str):
        return targets
    lost = [t for t in targets if not any(is_or_ends(p.name, t) for p in left)]
    saved = [t for t in lost if any(is_or_ends(p.name, t) for p in every)]
    if len(saved) == len(targets):
        raise UserError("modules_to_save names every module that target_modules does; nothing is left to adapt.")
    return [t for t in targets if t not in saved]


def compiled(label: str, pattern: str) -> re.Pattern:
    """A regex of a setting. Raises UserError, which names the setting, if it is none."""
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UserError(f"{label}: {pattern!r} is not a valid regular expression: {e}.") from None


def is_or_ends(name: str, target: str) -> bool:
    """Whether a target is a module's whole name, or its end after a dot."""
    return name == target or name.endswith("." + target)


def excluded(name: str, exclude: str | Sequence[str] | None) -> bool:
    """Whether a regex matches a whole name, or one of several names is it or its end."""
    if isinstance(exclude, str):
        return re.fullmatch(exclude, name) is not None
    return any(is_or_ends(name, e) for e in exclude or ())


def _layer(name: str, patterns: str | Sequence[str] | None) -> int | None:
    """The index of the layer that a module is in; `patterns` name the list of layers ("h", "layers")."""
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    found = next(filter(None, (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in patterns)), None)
    return None if found is None else int(found[1])


def _by_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)
