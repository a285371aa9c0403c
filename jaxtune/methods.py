"""Tuning methods: functions `(params, ...) -> (params, mask)` on the tree. Nothing below knows which one ran."""

import dataclasses
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError, nearest
from jaxtune.foreign import Layout, matrices
from jaxtune.tree import FROZEN, MEMBER, TRAIN, PyTree, flatten, match, path_str
from jaxtune.weights import (
    Adapter,
    DoraWeight,
    Ia3Weight,
    LoraWeight,
    PromptWeight,
    TokensWeight,
    column_norm,
    is_weight,
    map_weights,
    merge_leaf,
    table_rows,
)

Pattern = Mapping[str, Any] | Sequence[tuple[str, Any]]


class Place(NamedTuple):
    """A module that a target can name.

    Attributes:
        name: the module's HF name "model.layers.3.self_attn.q_proj", or its own path with dots.
        path: its matrix in our tree.
        index: row of the stacked leaf; None: the whole leaf.
        linear: it is multiplied, not looked up.
    """

    name: str
    path: str
    index: int | None
    linear: bool = True


class Factors(NamedTuple):
    """What one adapted module has: rank, and the scale of its update."""

    rank: int
    scale: float


def places(params: PyTree, module: Any = None, layouts: Mapping[str, Layout] | None = None) -> list[Place]:
    """List the linear and embedding modules of a tree: by HF names for a zoo module, else by the tree's own paths."""
    if layouts is not None:
        return [Place(_dotted(path), path, None, not layout.lookup) for path, layout in layouts.items()]
    leaves = _leaves(params)
    if module is None:
        found = [path for path, leaf in leaves.items() if len(leaf.shape) >= 2]
        return [Place(_dotted(path), path, None, path.endswith("kernel")) for path in found]
    found = [
        p
        for p in parameters(params, module)
        if p.path.endswith(("/kernel", "/embedding")) and not in_label_head(p.path)
    ]
    return [Place(p.name.rpartition(".")[0], p.path, p.index, p.path.endswith("kernel")) for p in found]


def _dotted(path: str) -> str:
    """A leaf's module as target names write it: "body/dense/kernel" -> "body.dense"."""
    return re.sub(r"/(kernel|embedding)(/value)?$", "", path).replace("/", ".")


def parameters(params: PyTree, module: Any = None) -> list[Place]:
    """List every parameter as `places` does modules, by names such as "model.layers.3.self_attn.q_proj.weight"."""
    paths = _leaves(params)
    if module is None:
        return [Place(path.replace("/", "."), path, None) for path in paths]
    from jaxtune.models import names

    return [Place(t.hf, t.path, t.index) for t in names(module).tensors(module.spec, set(paths))]


def _leaves(params: PyTree) -> dict[str, Any]:
    """Leaves by path, a polymorphic leaf as the one array it stands for."""
    return flatten(map_weights(lambda w: jax.eval_shape(merge_leaf, w) if is_weight(w) else w, params))


def in_label_head(path: str) -> bool:
    return path.startswith("classifier/")


def resolve_targets(target_modules: str | Sequence[str], candidates: list[Place]) -> list[Place]:
    """Choose the places that peft's `target_modules` names.

    A list matches a module's whole name or its end after a dot; a string is a regex over the whole name, except
    "all-linear": every linear module but the output head.

    Raises:
        UserError: a target matches nothing.
    """
    names = sorted({p.name.rpartition(".")[2] for p in candidates})
    if target_modules == "all-linear":
        # The head by its own name, or by its place: GPT-NeoX's is "embed_out".
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
    hits = {t: [p for p in candidates if p.name == t or p.name.endswith("." + t)] for t in target_modules}
    if lost := [t for t, found in hits.items() if not found]:
        raise UserError(
            f"target_modules: {', '.join(map(repr, lost))} match(es) no module.{nearest(lost[0], names)} "
            f"Modules: {', '.join(names)}."
        )
    chosen = {p for found in hits.values() for p in found}
    return [p for p in candidates if p in chosen]


def adapted(
    candidates: list[Place],
    *,
    r: int,
    lora_alpha: float,
    target_modules: str | Sequence[str],
    use_rslora: bool = False,
    rank_pattern: Pattern = (),
    alpha_pattern: Pattern = (),
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    strict: bool = True,
) -> dict[Place, Factors]:
    """Choose modules, ranks and scales as peft does from the LoraConfig fields of these names.

    Args:
        strict: a pattern, a layer or an exclusion that matches nothing is an error, as is a layer without a name.

    Raises:
        UserError: no module matches, or something that is given has no effect.
    """
    chosen = resolve_targets(target_modules, candidates)
    ranks, alphas = dict(rank_pattern or ()), dict(alpha_pattern or ())
    for label, pattern in {"rank_pattern": ranks, "alpha_pattern": alphas}.items():
        for key in pattern:
            _compiled(label, key)
    if isinstance(exclude_modules, str):
        _compiled("exclude_modules", exclude_modules)
    layers = [layers_to_transform] if isinstance(layers_to_transform, int) else list(layers_to_transform or ())
    if layers and isinstance(target_modules, str) and target_modules != "all-linear":
        if strict:
            raise UserError(
                "layers_to_transform goes with names of modules; a regex in target_modules can name the layers itself."
            )
        layers = []  # as peft
    found = [p for p in chosen if not _excluded(p.name, exclude_modules)]
    if strict and isinstance(exclude_modules, tuple | list):
        lost = [e for e in exclude_modules if not any(_is_or_ends(p.name, e) for p in chosen)]
        if lost:
            raise UserError(f"exclude_modules: {', '.join(map(repr, lost))} match(es) none of the targets.")
    if layers:
        known = {p: _layer(p.name, layers_pattern) for p in found}
        found = [p for p in found if known[p] in layers]
        if strict and (lost := sorted(set(layers) - set(known.values()))):
            raise UserError(f"layers_to_transform: no target in layer(s) {', '.join(map(str, lost))}.")
    if not found:
        raise UserError("exclude_modules and layers_to_transform leave no module to adapt.")
    if strict:
        for label, pattern in {"rank_pattern": ranks, "alpha_pattern": alphas}.items():
            lost = [key for key in pattern if not any(_by_pattern({key: True}, p.name, False) for p in found)]
            if lost:
                raise UserError(
                    f"{label}: {', '.join(map(repr, lost))} match(es) no adapted module, such as {found[0].name!r}."
                )
    factors = {}
    for place in found:
        rank = _by_pattern(ranks, place.name, r)
        alpha = _by_pattern(alphas, place.name, lora_alpha)
        factors[place] = Factors(rank, alpha / (math.sqrt(rank) if use_rslora else rank))
    return factors


def _compiled(label: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UserError(f"{label}: {pattern!r} is not a valid regular expression: {e}.") from None


def _is_or_ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _excluded(name: str, exclude: str | Sequence[str] | None) -> bool:
    if isinstance(exclude, str):
        return re.fullmatch(exclude, name) is not None
    return any(_is_or_ends(name, e) for e in exclude or ())


def _layer(name: str, patterns: str | Sequence[str] | None) -> int | None:
    """The number of the layer that a module is in; `patterns` name the list of layers ("h", "layers")."""
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    found = next(filter(None, (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in patterns)), None)
    return None if found is None else int(found[1])


def _by_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _rows(chosen: Sequence[Place]) -> dict[str, list[int] | None]:
    """{path: the rows of its stack that were chosen, or None for the whole leaf}."""
    rows: dict[str, list[int] | None] = {}
    for place in chosen:
        rows[place.path] = None if place.index is None else [*(rows.get(place.path) or []), place.index]
    return rows


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _masters(params: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """What is trained, in float32.

    Raises:
        UserError: something quantised, or nothing, would be trained.
    """
    roles = flatten_weights(mask)
    for path, leaf in flatten_weights(params).items():
        if is_weight(leaf) and not isinstance(leaf, Adapter) and TRAIN in jax.tree.leaves(roles[path]):
            raise UserError(f"{path}: a quantised parameter cannot be trained; load the base unquantised or use LoRA.")
    if TRAIN not in jax.tree.leaves(mask):
        raise UserError("Nothing is left to train: no parameter was chosen.")
    return jax.tree.map(lambda p, m: _float32(p) if m is TRAIN else p, params, mask), mask


# ------------------------------------------------------------------------------------------ parts of the model itself


def full(params: PyTree) -> tuple[PyTree, PyTree]:
    """Train everything, in float32.

    Raises:
        UserError: a leaf is quantised.
    """
    return _masters(params, jax.tree.map(lambda _: TRAIN, params))


def head(params: PyTree, module: Any = None) -> tuple[PyTree, PyTree]:
    """Train the final norm and the output head over a frozen body; of a classifier all of its label head.

    A tied head becomes a matrix of its own: the embedding below, and with it the body, stays as it was.

    Args:
        module: the zoo module, which knows of rows that `resize` added; the parameters alone do not show them.

    Raises:
        UserError: another tree than of a zoo model, a leaf is quantised, or `resize` added rows, which stay untrained.
    """
    if "classifier" in params:
        return _masters(params, match([(r"classifier/.*", TRAIN), (r".*", FROZEN)], params))
    if "embed_tokens" not in params:
        raise UserError("The method 'head' knows jaxtune's own models; give a mask by rules for another tree.")
    params = untie(params)
    tuned = _masters(params, match([(r"(norm|lm_head)/.*", TRAIN), (r".*", FROZEN)], params))
    return _with_new_tokens(tuned, module)


def untie(params: PyTree) -> PyTree:
    """Give a tied output head a matrix of its own, the transposed embedding."""
    if "lm_head" in params:
        return params
    return {**params, "lm_head": {"kernel": merge_leaf(params["embed_tokens"]["embedding"]).T}}


def bitfit(params: PyTree, module: Any = None) -> tuple[PyTree, PyTree]:
    """Train every bias (Ben Zaken et al. 2022, arXiv:2106.10199).

    Raises:
        UserError: the model has none.
    """
    return _select(params, _CHOICES["bitfit"](module, {}), module, "bitfit trains biases, and the model has none")


def norms(params: PyTree, module: Any = None) -> tuple[PyTree, PyTree]:
    """Train the scales and biases of all norms."""
    return _select(params, _CHOICES["norms"](module, {}), module, "the model has no leaf named as a norm's")


def embeddings(params: PyTree, module: Any = None) -> tuple[PyTree, PyTree]:
    """Train the embedding tables; a tied head is one of them."""
    return _select(params, _CHOICES["embeddings"](module, {}), module, "the model has no leaf named 'embedding'")


def regex(params: PyTree, pattern: str, module: Any = None) -> tuple[PyTree, PyTree]:
    """Train the parameters whose whole HF name (of a foreign tree: path with dots) a regex matches.

    Raises:
        UserError: it matches nothing, or some layers of a stacked leaf; `cut` splits the model there.
    """
    names = [p.name for p in parameters(params, module)]
    hint = f"{pattern!r} must match a whole name, such as {names[0]!r}.{nearest(pattern, names)}"
    return _select(params, _CHOICES["regex"](module, {"pattern": pattern}), module, hint)


def last_n(params: PyTree, layers: int, module: Any) -> tuple[PyTree, PyTree]:
    """Train the last `layers` blocks and the final norm.

    Raises:
        UserError: the model has fewer, or it is not split there; `cut` does that.
    """
    return _select(params, _CHOICES["last_n"](module, {"layers": layers}), module, "")


def _last_n(module: Any, settings: Mapping[str, Any]) -> Callable[[Place], bool]:
    from jaxtune.models import names

    layers, total, prefix = settings["layers"], module.spec.layers, names(module).layer
    if not 0 < layers <= total:
        raise UserError(f"last_n: layers={layers}, expected from 1 to {total}, the layers of this model.")
    starts = tuple(prefix.format(i) for i in range(total - layers, total))
    return lambda p: p.name.startswith(starts) or p.path.startswith("norm/")


def _regex(module: Any, settings: Mapping[str, Any]) -> Callable[[Place], bool]:
    pattern = _compiled("regex", settings["pattern"])
    return lambda p: pattern.fullmatch(p.name) is not None


# (module, settings) -> which parameters are trained.
_CHOICES: dict[str, Callable[[Any, Mapping[str, Any]], Callable[[Place], bool]]] = {
    "bitfit": lambda module, settings: lambda p: p.path.endswith("/bias"),
    "norms": lambda module, settings: lambda p: re.fullmatch(r"(.*/)?\w*norm/(scale|bias)", p.path) is not None,
    "embeddings": lambda module, settings: lambda p: p.path.endswith("embedding"),
    "last_n": _last_n,
    "regex": _regex,
}


def _select(params: PyTree, choose: Callable[[Place], bool], module: Any, nothing: str) -> tuple[PyTree, PyTree]:
    """Train the parameters that `choose` picks; `nothing` says why there may be none."""
    total, hits = Counter(), Counter()
    for place in parameters(params, module):
        total[place.path] += 1
        hits[place.path] += choose(place)
    if not any(hits.values()):
        raise UserError(f"Nothing is left to train: {nothing}" + "." * (not nothing.endswith("?")))
    if mixed := [path for path, n in hits.items() if 0 < n < total[path]]:
        raise UserError(
            f"Some layers of the stacked parameter {mixed[0]} would be trained, others not; split the model at their "
            "edges first: module, params = jaxtune.split(module, params, at=LAYER)."
        )

    labelled = hasattr(module, "labels")

    def role(path, leaf):
        return _all(leaf, TRAIN if hits[path] or (labelled and in_label_head(path)) else FROZEN)

    return _with_new_tokens(_masters(params, _map_paths(role, params)), module)


def _lora_adapts(module: Any, settings: Mapping[str, Any]) -> Callable[[Place], bool]:
    chosen = {(p.path, p.index) for p in _lora_places(places(module.abstract_params(), module), **settings)}
    every_bias, saved = settings.get("bias") == "all", settings.get("modules_to_save")
    return lambda p: (
        (p.path, p.index) in chosen
        or (every_bias and p.path.endswith("/bias"))
        or is_saved(p.name.rpartition(".")[0], saved)
    )


def _ia3_adapts(module: Any, settings: Mapping[str, Any]) -> Callable[[Place], bool]:
    chosen = {(p.path, p.index) for p in _ia3_places(places(module.abstract_params(), module), **settings)}
    return lambda p: (p.path, p.index) in chosen


# An adapter of a stack leaves layers alone where its scale is 0, so that it needs no cut; but below the lowest layer
# that it adapts nothing is trained, and the backward pass ends there.
_ADAPTS = {"lora": _lora_adapts, "ia3": _ia3_adapts}


def cut(method: str, module: Any, settings: Mapping[str, Any]) -> Any:
    """Return the module split between layers that `method` trains and layers that it does not; mostly, as it is.

    To be done before the weights are loaded: what is loaded then has the split module's tree.
    """
    if method not in _CHOICES and method not in _ADAPTS:
        return module
    choose = (_CHOICES | _ADAPTS)[method](module, settings)
    chosen: dict[tuple[str, int], set[str]] = {}
    for place in parameters(module.abstract_params(), module):
        if place.index is not None:
            row = chosen.setdefault((place.path.partition("/")[0], place.index), set())
            if choose(place):
                row.add(place.path)
    first = 0
    edges = []
    for i, segment in enumerate(module.spec.segments):
        rows = [chosen[f"segment_{i}", n] for n in range(segment.repeats)]
        edges += [first + n * len(segment.pattern) for n in range(1, len(rows)) if rows[n] != rows[n - 1]]
        first += segment.layers
        if method in _ADAPTS and any(rows):
            edges = edges[: not rows[0]]
            break
    for at in edges:
        module = _split_module(module, at)
    return module


def _split_module(module: Any, at: int) -> Any:
    from jaxtune.models.decoder import split

    found = []
    jax.eval_shape(lambda p: found.append(split(module, p, at)[0]), module.abstract_params())
    return found[0]


# ------------------------------------------------------------------------------------------------- low-rank adapters


def lora(
    params: PyTree,
    key: jax.Array,
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    bias: str = "none",
    use_rslora: bool = False,
    use_dora: bool = False,
    init_lora_weights: bool | str = True,
    rank_pattern: Pattern = (),
    alpha_pattern: Pattern = (),
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    trainable_token_indices: Sequence[int] | None = None,
    module: Any = None,
    layouts: Mapping[str, Layout] | None = None,
) -> tuple[PyTree, PyTree]:
    """Low-rank adaptation (arXiv:2106.09685), with the names and defaults of peft's LoraConfig.

    Args:
        params: any tree; leaves of targets become `LoraWeight`.
        key: draws `a`, one stream a leaf, whatever the other targets.
        r, lora_alpha: rank, and the numerator of the scale alpha / r.
        lora_dropout: rate on the input of `a`.
        target_modules: names, a regex over whole names, or "all-linear"; see `resolve_targets`.
        bias: "none", "all" biases of the model, or "lora_only" those of targets are trained too.
        use_rslora: scale alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).
        use_dora: leaves become `DoraWeight` (arXiv:2402.09353).
        init_lora_weights: True or "default": a ~ U(+-1/sqrt(K)), b = 0; "gaussian": a ~ N(0, 1/r^2), b = 0; "pissa":
            the base's largest singular vectors (Meng et al. 2024, arXiv:2404.02948, eq. 2-3), minus what they began as.
        rank_pattern, alpha_pattern: pairs (regex over the end of a name, value), or a mapping; the first match wins.
        layers_to_transform: numbers of the layers to adapt; `layers_pattern` names their list where it is ambiguous.
        exclude_modules: names or a regex; these win over the targets.
        modules_to_save: ends of names of modules that are trained whole. A tied head or embedding named here is untied.
        trainable_token_indices: rows of the token embedding that are trained, absolute values; a tied head follows.
        module: the zoo module, so that targets are HF's names; None: the tree's own paths, with dots.
        layouts: how the arrays of a model that is not ours are matrices, from `adapt(apply_fn).layouts`.

    Raises:
        UserError: a target matches nothing, the rank exceeds a matrix's smaller side, two options claim one leaf, or a
            row that `resize` added is not trained.
    """
    candidates = places(params, module, layouts)
    chosen = _lora_places(
        candidates,
        r=r,
        lora_alpha=lora_alpha,
        target_modules=target_modules,
        use_rslora=use_rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
        exclude_modules=exclude_modules,
        modules_to_save=modules_to_save,
    )
    tuned = attach(
        params,
        key,
        chosen,
        lora_dropout=lora_dropout,
        bias=bias,
        use_dora=use_dora,
        init_lora_weights=init_lora_weights,
        modules_to_save=modules_to_save,
        trainable_token_indices=trainable_token_indices,
        module=module,
        layouts=layouts,
    )
    return _with_new_tokens(tuned, module)


def _lora_places(
    candidates: list[Place],
    *,
    target_modules: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] | None = None,
    r: int = 8,
    lora_alpha: float = 8,
    use_rslora: bool = False,
    rank_pattern: Pattern = (),
    alpha_pattern: Pattern = (),
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    **_: Any,
) -> dict[Place, Factors]:
    """`adapted` from the arguments of `lora`."""
    if target_modules == "all-linear" and modules_to_save:
        candidates = [p for p in candidates if not is_saved(p.name, modules_to_save)]
    return adapted(
        candidates,
        r=r,
        lora_alpha=lora_alpha,
        target_modules=target_modules,
        use_rslora=use_rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
        exclude_modules=exclude_modules,
    )


def attach(
    params: PyTree,
    key: jax.Array,
    chosen: Mapping[Place, Factors],
    *,
    lora_dropout: float = 0.0,
    bias: str = "none",
    use_dora: bool = False,
    init_lora_weights: bool | str = True,
    modules_to_save: Sequence[str] | None = None,
    trainable_token_indices: Sequence[int] | None = None,
    module: Any = None,
    layouts: Mapping[str, Layout] | None = None,
) -> tuple[PyTree, PyTree]:
    """`lora` on modules that are chosen already."""
    rows = _rows(list(chosen))
    if bias not in ("none", "all", "lora_only"):
        raise UserError(f"bias={bias!r} is not one of 'none', 'all', 'lora_only'.")
    if init_lora_weights not in _INITS:
        raise UserError(f"init_lora_weights={init_lora_weights!r} is not one of {', '.join(map(repr, _INITS))}.")
    biases: dict[str, list[int] | None] = {}
    if bias == "lora_only":
        biases = {re.sub(r"[^/]+$", "bias", path): chosen for path, chosen in rows.items()}
    labelled = hasattr(module, "labels")  # a label head is trained whole beside the adapters
    params, saved = _to_save(params, modules_to_save, module)
    table = _token_table(params, trainable_token_indices, saved.keys() | rows.keys())
    for path in rows:
        if path in saved:
            raise UserError(f"{path} is claimed twice: by target_modules and by modules_to_save; leave one out.")
    params, restore = matrices(params, {path: layouts[path] for path in rows} if layouts else {})

    def adapt(path, leaf):
        if path == table:
            return TokensWeight(leaf, leaf_rows(leaf, trainable_token_indices), tuple(trainable_token_indices))
        if path not in rows:
            return leaf
        factors = {place: f for place, f in chosen.items() if place.path == path}
        return _lora_leaf(key, path, leaf, factors, lora_dropout, use_dora, init_lora_weights)

    def role(path, leaf):
        if path == table:
            return TokensWeight(_all(leaf, FROZEN), TRAIN, tuple(trainable_token_indices))
        if path in rows:
            start = MEMBER if init_lora_weights == "pissa" else None
            fields = (_all(leaf, FROZEN), TRAIN, TRAIN, MEMBER, MEMBER if lora_dropout else None, start, start)
            return DoraWeight(*fields, TRAIN) if use_dora else LoraWeight(*fields)
        if path in saved:
            return _all(leaf, TRAIN)
        is_bias = path.rpartition("/")[2] == "bias"
        if path in biases and biases[path] is not None and len(biases[path]) < leaf.shape[0]:
            raise UserError(f"bias='lora_only' with targets in some layers only is not supported ({path}).")
        trained = (is_bias and (bias == "all" or path in biases)) or (labelled and in_label_head(path))
        return _all(leaf, TRAIN if trained else FROZEN)

    new, mask = _map_paths(adapt, params), _map_paths(role, params)
    new, mask = _masters(new, mask)
    return restore(new), restore(mask)


def _all(leaf: Any, role: Any) -> Any:
    return jax.tree.map(lambda _: role, leaf)


def resize(module: Any, params: PyTree, vocab: int) -> tuple[Any, PyTree]:
    """Give a zoo model room for new tokens: `vocab` rows in its table, and outputs of an untied head.

    New rows are the mean of the old; train them with `lora(trainable_token_indices=...)`, which a tied head follows.
    The module counts them (`spec.new_tokens`), and a method that is given it and leaves one of them untrained refuses.
    A file has no place for that mark: what was exported and loaded again has rows like any other, trained or not.

    Raises:
        UserError: the table would shrink, or is adapted or quantised.
    """
    table, head = params["embed_tokens"]["embedding"], params.get("lm_head", {}).get("kernel")
    if vocab < module.spec.vocab or is_weight(table) or is_weight(head):
        raise UserError(f"resize: {vocab} rows, expected at least {module.spec.vocab}, of a table not yet adapted.")

    def grow(leaf, axis):
        mean = leaf.astype(jnp.float32).mean(axis, keepdims=True).astype(leaf.dtype)
        return jnp.concatenate([leaf, jnp.repeat(mean, vocab - leaf.shape[axis], axis)], axis)

    params = {**params, "embed_tokens": {"embedding": grow(table, 0)}}
    if head is not None:
        params["lm_head"] = {**params["lm_head"], "kernel": grow(head, 1)}
    config = json.dumps(module.spec.hf_config | {"vocab_size": vocab})
    new = module.spec.new_tokens + vocab - module.spec.vocab
    return module.clone(spec=dataclasses.replace(module.spec, vocab=vocab, config=config, new_tokens=new)), params


def _with_new_tokens(tuned: tuple[PyTree, PyTree], module: Any) -> tuple[PyTree, PyTree]:
    """What a method returns, if it trains the rows that `resize` gave the module's table.

    Raises:
        UserError: some of them would stay the mean of the others.
    """
    spec = getattr(module, "spec", None)
    if not getattr(spec, "new_tokens", 0):
        return tuned
    role = tuned[1]["embed_tokens"]["embedding"]
    new, rows = range(spec.vocab - spec.new_tokens, spec.vocab), ()
    if isinstance(role, TokensWeight):
        rows = role.ids
    elif not isinstance(role, PromptWeight) and TRAIN in jax.tree.leaves(role):
        rows = new
    if lost := sorted(set(new) - set(rows)):
        raise UserError(
            f"resize added {spec.new_tokens} token(s) to the table, and nothing trains the row(s) {lost[:8]}"
            f"{' and more' * (len(lost) > 8)}: they would stay the mean of the others. Give lora "
            f"trainable_token_indices with all of {new.start} to {new.stop - 1}, or modules_to_save=['embed_tokens']."
        )
    return tuned


def leaf_rows(table: Any, ids: Sequence[int]) -> jax.Array:
    """Rows f32[n, D] of a table."""
    return merge_leaf(table)[jnp.asarray(ids)].astype(jnp.float32)


def is_saved(name: str, modules: Sequence[str] | None) -> bool:
    """Whether a module or parameter is, or lies in, one that modules_to_save names; peft compares ends of names."""
    parts = name.split(".")
    return any(".".join(parts[: n + 1]).endswith(m) for n in range(len(parts)) for m in modules or ())


def _to_save(params: PyTree, modules: Sequence[str] | None, module: Any) -> tuple[PyTree, dict[str, None]]:
    """The tree, untied where that is needed, and the paths that modules_to_save names."""
    if not modules:
        return params, {}
    if isinstance(modules, str):
        raise UserError(f"modules_to_save={modules!r}: expected a list of names.")
    tied = hasattr(module, "head") and "lm_head" not in params
    if tied and {"embed_tokens/embedding", "lm_head/kernel"} & _to_save(untie(params), modules, module)[1].keys():
        params = untie(params)
    named = [(p, p.name.rpartition(".")[0]) for p in parameters(params, module)]
    names = sorted({owner.rpartition(".")[2] for _, owner in named})
    for m in modules:
        if not any(is_saved(owner, [m]) for _, owner in named):
            raise UserError(
                f"modules_to_save: {m!r} matches no module.{nearest(m, names)} Modules: {', '.join(names)}."
            )
    total, hits = Counter(p.path for p, _ in named), Counter(p.path for p, owner in named if is_saved(owner, modules))
    if mixed := [path for path, n in hits.items() if n < total[path]]:
        raise UserError(
            f"modules_to_save names some layers of {mixed[0]} only; that is not supported: name all of them."
        )
    return params, dict.fromkeys(hits)


def _token_table(params: PyTree, ids: Sequence[int] | None, claimed: set[str]) -> str | None:
    """The path of the token embedding, where rows of it are to be trained."""
    if ids is None:
        return None
    path = "embed_tokens/embedding"
    if path not in _leaves(params):
        raise UserError("trainable_token_indices knows jaxtune's own models, which have embed_tokens/embedding.")
    if path in claimed:
        raise UserError(
            f"{path} is claimed twice: by trainable_token_indices and by target_modules or modules_to_save."
        )
    size = table_rows(flatten_weights(params)[path])
    ids = list(ids)
    if not ids or len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) >= size:
        raise UserError(f"trainable_token_indices={ids}: expected different ids from 0 to {size - 1}, at least one.")
    return path


def flatten_weights(params: PyTree) -> dict[str, Any]:
    """Leaves by path, a polymorphic leaf as one."""
    return {path_str(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)[0]}


def _lora_leaf(
    key: jax.Array,
    path: str,
    leaf: Any,
    factors: Mapping[Place, Factors],
    dropout: float,
    use_dora: bool,
    init: bool | str,
) -> LoraWeight:
    """Wrap one leaf; `factors` of its places. Rows of lower rank, and rows not chosen, are padded with zeros."""
    *axes, k, n = jax.eval_shape(merge_leaf, leaf).shape
    ranks, scale = np.zeros(axes, int), np.zeros(axes, np.float32)
    for place, (rank, s) in factors.items():
        if rank > min(k, n):
            raise UserError(f"r={rank} exceeds the smaller side of {path} ({k} x {n}); choose r <= {min(k, n)}.")
        at = ... if place.index is None else place.index
        ranks[at], scale[at] = rank, s
    is_table, most = not place.linear, int(ranks.max())
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    if init == "pissa":
        if is_table:
            raise UserError(f"init_lora_weights='pissa' is for linear modules; {path} is an embedding.")
        u, s, v = jnp.linalg.svd(merge_leaf(leaf).astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(s / np.where(scale, scale, 1)[..., None])
        full_a, full_b = u * root[..., None, :], root[..., None] * v
    # Drawn at its own rank, a row is what it would be in a model of that rank.
    parts = {}
    for rank in sorted(set(ranks.ravel()) - {0}):
        rank = int(rank)
        if init == "pissa":
            parts[rank] = full_a[..., :rank], full_b[..., :rank, :]
        else:
            parts[rank] = _factors(key, is_table, tuple(axes), k, n, rank, init)
    a, b = jnp.zeros((*axes, k, most)), jnp.zeros((*axes, most, n))
    for rank, (own_a, own_b) in parts.items():
        here, pad = (ranks == rank)[..., None, None], [(0, 0)] * len(axes)
        a = jnp.where(here, jnp.pad(own_a, [*pad, (0, 0), (0, most - rank)]), a)
        b = jnp.where(here, jnp.pad(own_b, [*pad, (0, most - rank), (0, 0)]), b)
    # Scales on the host, so that `tree.count` knows which rows are adapted while the rest is abstract.
    rate = np.float32(dropout) * (ranks > 0).astype(np.float32) if dropout else None
    start = (jnp.copy(a), jnp.copy(b)) if init == "pissa" else (None, None)
    fields = (leaf, a, b, scale, rate, *start)
    return DoraWeight(*fields, column_norm(leaf) * (ranks > 0)[..., None]) if use_dora else LoraWeight(*fields)


_INITS = (True, "default", "gaussian", "pissa")


def _map_paths(fn, params: PyTree) -> PyTree:
    """Map fn(path, leaf), a polymorphic leaf as one."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_str(path), leaf), params, is_leaf=is_weight)


def _factors(
    key, is_table: bool, axes: tuple[int, ...], k: int, n: int, r: int, init: bool | str
) -> tuple[jax.Array, jax.Array]:
    """peft's initial factors: a ~ U(+-1/sqrt(k)) or N(0, 1/r^2), b = 0; for an embedding a = 0, b ~ N(0, 1)."""
    if is_table:
        return jnp.zeros((*axes, k, r)), jax.random.normal(key, (*axes, r, n))
    if init == "gaussian":
        return jax.random.normal(key, (*axes, k, r)) / r, jnp.zeros((*axes, r, n))
    bound = 1 / math.sqrt(k)
    return jax.random.uniform(key, (*axes, k, r), minval=-bound, maxval=bound), jnp.zeros((*axes, r, n))


# ------------------------------------------------------------------------------------------------------------- others


IA3_TARGETS = ("k_proj", "v_proj", "down_proj")  # of Llama's family


def ia3(
    params: PyTree,
    target_modules: str | Sequence[str] = IA3_TARGETS,
    feedforward_modules: str | Sequence[str] = ("down_proj",),
    exclude_modules: str | Sequence[str] | None = None,
    module: Any = None,
) -> tuple[PyTree, PyTree]:
    """(IA)^3 (arXiv:2205.05638), with the names of peft's IA3Config: a vector scales what a module gives or takes.

    Args:
        target_modules: as in `lora`; the default is that of Llama's family.
        feedforward_modules: those of the targets whose input is scaled; of the others it is the output.

    Raises:
        UserError: a target matches nothing or is an embedding.
    """
    _no_label_head("ia3", params)
    chosen = _ia3_places(places(params, module), target_modules, exclude_modules)
    rows, leaves = _rows(chosen), flatten_weights(params)
    inputs = {p.path: set() for p in chosen}
    for p in chosen:
        if not p.linear:
            raise UserError(f"target_modules: {p.name} is no linear module; (IA)^3 scales linear modules only.")
        inputs[p.path].add(_excluded(p.name, feedforward_modules))
    if mixed := [path for path, kinds in inputs.items() if len(kinds) > 1]:
        raise UserError(f"feedforward_modules names some layers of {mixed[0]} only; name all of them.")

    def adapt(path, leaf):
        if path not in rows:
            return leaf
        *axes, k, n = jax.eval_shape(merge_leaf, leaf).shape
        scale = np.zeros(axes, np.float32)
        scale[... if rows[path] is None else rows[path]] = 1.0
        if inputs[path] == {True}:
            return Ia3Weight(leaf, scale, inp=jnp.ones((*axes, k)))
        return Ia3Weight(leaf, scale, out=jnp.ones((*axes, n)), bias=leaves.get(re.sub(r"[^/]+$", "bias", path)))

    def role(path, leaf):
        if not isinstance(leaf, Ia3Weight):
            return _all(leaf, FROZEN)
        # The bias is the module's own: it is counted and frozen there.
        roles = {"scale": MEMBER, "out": TRAIN, "inp": TRAIN, "bias": MEMBER}
        there = {name: role for name, role in roles.items() if getattr(leaf, name) is not None}
        return Ia3Weight(_all(leaf.w, FROZEN), **there)

    new = _map_paths(adapt, params)
    return _with_new_tokens(_masters(new, _map_paths(role, new)), module)


def _ia3_places(
    candidates: list[Place],
    target_modules: str | Sequence[str] = IA3_TARGETS,
    exclude_modules: str | Sequence[str] | None = None,
    feedforward_modules: Any = None,
) -> list[Place]:
    chosen = [p for p in resolve_targets(target_modules, candidates) if not _excluded(p.name, exclude_modules)]
    if not chosen:
        raise UserError("exclude_modules leaves no module to adapt.")
    return chosen


def _no_label_head(method: str, params: PyTree) -> None:
    if "classifier" in params:
        raise UserError(f"The method {method!r} is for language models; for a label head use lora, head, bitfit, ...")


def prompt_tuning(
    params: PyTree, key: jax.Array, num_virtual_tokens: int = 20, init: str = "vocab", module: Any = None
) -> tuple[PyTree, PyTree]:
    """Prompt tuning (arXiv:2104.08691): vectors before each row are all that is trained.

    `weights.virtual_tokens(params)` are the ids to put before a row; `generate` does so itself.

    Args:
        init: "vocab", rows of the table drawn at random, or "random", N(0, 1) as peft's RANDOM.

    Raises:
        UserError: another tree than of a zoo model, or no virtual token.
    """
    _no_label_head("prompt_tuning", params)
    if "embed_tokens" not in params:
        raise UserError("Prompt tuning knows jaxtune's own models, which have embed_tokens/embedding.")
    if num_virtual_tokens < 1:
        raise UserError(f"num_virtual_tokens={num_virtual_tokens}: nothing is left to train; give 1 or more.")
    table = params["embed_tokens"]["embedding"]
    size, width = jax.eval_shape(merge_leaf, table).shape
    if init == "vocab":
        prompt = leaf_rows(table, jax.random.randint(key, (num_virtual_tokens,), 0, size))
    elif init == "random":
        prompt = jax.random.normal(key, (num_virtual_tokens, width))
    else:
        raise UserError(f"init={init!r} is not one of 'vocab', 'random'.")
    new = {**params, "embed_tokens": {"embedding": PromptWeight(table, prompt)}}
    mask = jax.tree.map(lambda _: FROZEN, params)
    mask = {**mask, "embed_tokens": {"embedding": PromptWeight(_all(table, FROZEN), TRAIN)}}
    return _with_new_tokens(_masters(new, mask), module)


def virtual_ids(module: Any, settings: Mapping[str, Any]) -> list[int]:
    """The ids before each row that a method of these settings asks for; see `weights.PromptWeight`."""
    return [module.spec.vocab + i for i in range(settings.get("num_virtual_tokens", 0))]


def tune(
    method: str, params: PyTree, key: jax.Array, module: Any, settings: Mapping[str, Any]
) -> tuple[PyTree, PyTree]:
    """Apply the method that a config names; `settings` are its own section's."""
    return METHODS[method](params, key, module, settings)


METHODS = {
    "full": lambda params, key, module, settings: full(params),
    "head": lambda params, key, module, settings: head(params, module),
    "lora": lambda params, key, module, settings: lora(params, key, module=module, **settings),
    "bitfit": lambda params, key, module, settings: bitfit(params, module),
    "norms": lambda params, key, module, settings: norms(params, module),
    "embeddings": lambda params, key, module, settings: embeddings(params, module),
    "last_n": lambda params, key, module, settings: last_n(params, module=module, **settings),
    "regex": lambda params, key, module, settings: regex(params, module=module, **settings),
    "ia3": lambda params, key, module, settings: ia3(params, module=module, **settings),
    "prompt_tuning": lambda params, key, module, settings: prompt_tuning(params, key, module=module, **settings),
}
