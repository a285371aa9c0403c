"""Adapters over a frozen model: LoRA and its relatives, (IA)^3, a soft prompt. `(params, ...) -> (params, mask)`."""

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError, nearest
from jaxtune.methods.places import (
    EXPERTS,
    Factors,
    Place,
    check_names,
    compiled,
    excluded,
    in_label_head,
    is_module_bias,
    is_or_ends,
    is_saved,
    is_trained_whole,
    lora_places,
    owner,
    parameters,
    places,
    renamed,
    resolve_targets,
)
from jaxtune.methods.settings import Hira, Lora, Miss, PromptTuning, read
from jaxtune.methods.targets import IA3
from jaxtune.methods.vocabulary import untie, with_new_tokens
from jaxtune.tree import FROZEN, TRAIN, PyTree, filled
from jaxtune.weights.adapters import (
    DoraWeight,
    HeadTokensWeight,
    HiraWeight,
    Ia3Weight,
    LoraWeight,
    MissWeight,
    PromptWeight,
    TokensWeight,
)
from jaxtune.weights.foreign import MatrixLayout, matrices
from jaxtune.weights.leaf import (
    Adapter,
    column_norm,
    in_float32,
    map_paths,
    merge_leaf,
    plain,
    table_rows,
    weights_by_path,
)

_INITS = (True, "default", "gaussian", "pissa")
TABLE, HEAD = "embed_tokens/embedding", "lm_head/kernel"

# ------------------------------------------------------------------------------------------------- low-rank adapters


def lora(
    params: PyTree,
    key: jax.Array,
    *,
    module: Any = None,
    layouts: Mapping[str, MatrixLayout] | None = None,
    **options: Any,
) -> tuple[PyTree, PyTree]:
    """Low-rank adaptation (arXiv:2106.09685), with the names and defaults of peft's LoraConfig.

    Args:
        params: any tree; leaves of targets become `LoraWeight`.
        key: draws `a`; each leaf has its own stream, which does not depend on the other targets.
        module: the zoo module, so that targets are HF's names; None: the tree's own paths, with dots.
        layouts: how the arrays of a foreign model are matrices, from `adapt(apply_fn).layouts`.
        options: r=8, lora_alpha=8, target_modules="all-linear", ...: the attributes of `settings.Lora`.

    Raises:
        UserError: an unknown option, a target that matches nothing, a rank that exceeds both sides of a
            matrix, two options that claim one leaf, or a row that `resize` added is not trained.
    """
    return _low_rank(params, key, read("lora", Lora, options), module, layouts)


def hira(
    params: PyTree,
    key: jax.Array,
    *,
    module: Any = None,
    layouts: Mapping[str, MatrixLayout] | None = None,
    **options: Any,
) -> tuple[PyTree, PyTree]:
    """HiRA (Huang et al. 2025, ICLR): the update is the base times a low-rank matrix, entry by entry.

    Args:
        params: any tree; leaves of targets become `HiraWeight`.
        key: as in `lora`.
        module: as in `lora`.
        layouts: as in `lora`.
        options: r=32, target_modules="all-linear", ...: the attributes of `settings.Hira`.

    Raises:
        UserError: as `lora`, or a target is an embedding.
    """
    settings = read("hira", Hira, options)
    if settings.init_weights not in (True, "default", "gaussian"):
        raise UserError(f"init_weights={settings.init_weights!r} is not one of True, 'default', 'gaussian'.")
    return _low_rank(params, key, settings.as_lora(), module, layouts, hira_leaf)


def hira_leaf(leaf: LoraWeight, path: str) -> HiraWeight:
    """HiRA's leaf with the factors of LoRA's."""
    return HiraWeight(leaf.w, leaf.a, leaf.b, leaf.scale, leaf.dropout)


def miss(
    params: PyTree,
    key: jax.Array,
    *,
    module: Any = None,
    layouts: Mapping[str, MatrixLayout] | None = None,
    **options: Any,
) -> tuple[PyTree, PyTree]:
    """MiSS (arXiv:2409.15371): shards of a module's input share one small matrix.

    Args:
        params: any tree; leaves of targets become `MissWeight`.
        key: not used; the matrix starts at zero.
        module: as in `lora`.
        layouts: as in `lora`.
        options: r=64, target_modules="all-linear", ...: the attributes of `settings.Miss`.

    Raises:
        UserError: as `lora`, or a target is an embedding, `r` exceeds its inputs, or the family has Conv1D modules.
    """
    settings = read("miss", Miss, options).as_lora()
    if module is not None and _conv1d(module):
        raise UserError("MiSS does not know this family's Conv1D modules in peft, which could not read the adapter.")
    return _low_rank(params, key, settings, module, layouts, miss_leaf)


def _conv1d(module: Any) -> bool:
    """Whether transformers' modules of this family are Conv1D."""
    from jaxtune import models

    return models.names(module).conv1d


def miss_leaf(leaf: LoraWeight, path: str) -> MissWeight:
    """MiSS's leaf with the rank and the zeros of LoRA's."""
    r, k = leaf.b.shape[-2], plain(leaf.w).shape[-2]
    if r > k:
        raise UserError(f"r={r} exceeds the {k} inputs of {path}; choose r <= {k}.")
    return MissWeight(leaf.w, leaf.b, leaf.scale, leaf.dropout)


def _low_rank(
    params: PyTree,
    key: jax.Array,
    settings: Lora,
    module: Any,
    layouts: Mapping[str, MatrixLayout] | None,
    change: Callable[[LoraWeight, str], Adapter] | None = None,
) -> tuple[PyTree, PyTree]:
    """Put low-rank leaves on the modules that `settings` choose; `change` makes LoRA's leaf another method's."""
    params = untied_for(settings.target_modules, params, module)
    candidates = places(params, module, layouts)
    settings = Lora(**renamed(vars(settings), candidates))
    chosen = lora_places(candidates, settings)
    leaves = weights_by_path(params)
    for place, factors in chosen.items():
        k, n = plain(leaves[place.path]).shape[-2:] if not layouts else (math.inf, math.inf)
        if factors.rank > max(k, n):
            raise UserError(
                f"r={factors.rank} exceeds both sides of {place.path} ({k} x {n}); choose r <= {min(k, n)}."
            )
    return with_new_tokens(attach(params, key, chosen, settings, module, layouts, change), module)


def untied_for(targets: str | Sequence[str], params: PyTree, module: Any) -> PyTree:
    """The tree, with a tied head untied if a target names the head."""
    if targets == "all-linear" or not getattr(module, "continues", False) or "lm_head" in params:
        return params
    head = _head(module)
    names = [name.rpartition(".")[0] for name in (head.name, head.hf)]
    if isinstance(targets, str):
        named = any(re.fullmatch(compiled("target_modules", targets), name) for name in names)
    else:
        named = any(is_or_ends(name, t) for name in names for t in targets)
    return untie(params) if named else params


def _head(module: Any) -> Any:
    """The name of a decoder's output head, also of a tied one."""
    from jaxtune import models

    return next(models.names(module).tensors(module.spec, {HEAD}))


def attach(
    params: PyTree,
    key: jax.Array | None,
    chosen: Mapping[Place, Factors],
    settings: Lora,
    module: Any = None,
    layouts: Mapping[str, MatrixLayout] | None = None,
    change: Callable[[LoraWeight, str], Adapter] | None = None,
) -> tuple[PyTree, PyTree]:
    """`lora` on modules that have been chosen; `change` makes its leaves those of a method for linear modules.

    Without a key nothing is drawn: what is trained is zero, to be filled from a file.
    """
    if change is not None and (tables := [p.name for p in chosen if not p.linear]):
        raise UserError(f"target_modules: {tables[0]} is no linear module; this method adapts linear modules only.")
    bias, init = settings.bias, settings.init_lora_weights
    rows = _rows(list(chosen))
    if bias not in ("none", "all", "lora_only"):
        raise UserError(f"bias={bias!r} is not one of 'none', 'all', 'lora_only'.")
    if init not in _INITS:
        raise UserError(f"init_lora_weights={init!r} is not one of {', '.join(map(repr, _INITS))}.")
    beside = {owner(p): at for p, at in rows.items() if bias == "lora_only" and not p.endswith(EXPERTS)}
    params, saved = _to_save(params, settings.modules_to_save, module)
    params, tokens = _to_train_tokens(params, settings.trainable_token_indices, saved.keys() | rows.keys(), module)
    params, restore = matrices(params, {path: layouts[path] for path in rows} if layouts else {})

    def adapt(path, leaf):
        if path in tokens:
            ids, width = tokens[path], plain(leaf).shape[path != HEAD]
            kind, drawn = (HeadTokensWeight, _columns) if path == HEAD else (TokensWeight, leaf_rows)
            return kind(leaf, zeros(len(ids), width) if key is None else drawn(leaf, np.array(ids)), ids)
        if path not in rows:
            return leaf
        factors = {place: f for place, f in chosen.items() if place.path == path}
        new = _lora_leaf(key, path, leaf, factors, settings)
        return new if change is None else change(new, path)

    def role(path, leaf):
        if path in tokens or path in rows:
            return leaf.mask()
        if path in saved:
            return filled(leaf, TRAIN)
        own = is_module_bias(path) and owner(path) in beside
        if own and (layers := beside[owner(path)]) is not None and len(layers) < leaf.shape[0]:
            raise UserError(f"bias='lora_only' with targets in some layers only is not supported ({path}).")
        trained = own or (is_module_bias(path) and bias == "all") or is_trained_whole(path, module)
        return filled(leaf, TRAIN if trained else FROZEN)

    new = map_paths(adapt, params)
    new, mask = in_float32(new, map_paths(role, new))
    return restore(new), restore(mask)


def _rows(chosen: Sequence[Place]) -> dict[str, list[int] | None]:
    """{path: the rows of its stack that were chosen, or None for the whole leaf}."""
    rows: dict[str, list[int] | None] = {}
    for place in chosen:
        rows[place.path] = None if place.index is None else [*(rows.get(place.path) or []), place.index]
    return rows


def _to_save(params: PyTree, modules: Sequence[str] | None, module: Any) -> tuple[PyTree, dict[str, None]]:
    """The tree, with the head untied if needed, and the paths of the parameters in modules_to_save."""
    if not modules:
        return params, {}
    if isinstance(modules, str):
        raise UserError(f"modules_to_save={modules!r}: expected a list of names.")
    tied = getattr(module, "continues", False) and "lm_head" not in params
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


def tokens_of(
    given: Sequence[int] | Mapping[str, Sequence[int]] | None, params: PyTree, module: Any
) -> dict[str, tuple[int, ...]]:
    """{path: ids} of the embedding and the output head, from trainable_token_indices: ids or {module's name: ids}.

    As in peft: a tied head follows the embedding, unless it is given other ids.

    Raises:
        UserError: a name is of another module.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return {TABLE: tuple(given)}
    if wrong := [key for key, ids in given.items() if not isinstance(ids, Sequence) or isinstance(ids, str)]:
        raise UserError(f"trainable_token_indices: {wrong[0]} has {given[wrong[0]]!r}; expected a list of ids.")
    named = {p.name: p.path for p in places(params, module) if p.path in (TABLE, HEAD)}
    if getattr(module, "continues", False) and "lm_head" not in params:
        named[_head(module).module] = HEAD
    found = {path: tuple(ids) for key, ids in given.items() for name, path in named.items() if is_or_ends(name, key)}
    if not given or len(found) < len(given):
        known = " and ".join(named) or "a token embedding"
        raise UserError(f"trainable_token_indices={dict(given)}: expected lists of ids for {known}.")
    if "lm_head" not in params and found.get(HEAD) == found.get(TABLE):
        del found[HEAD]
    return found


def _to_train_tokens(
    params: PyTree, given: Sequence[int] | Mapping[str, Sequence[int]] | None, claimed: set[str], module: Any
) -> tuple[PyTree, dict[str, tuple[int, ...]]]:
    """The tree, with the head untied if it trains tokens of its own, and `tokens_of` it."""
    tokens = tokens_of(given, params, module)
    if tokens and TABLE not in weights_by_path(params):
        raise UserError("trainable_token_indices knows jaxtune's own models, which have embed_tokens/embedding.")
    for path, ids in tokens.items():
        if path in claimed:
            raise UserError(
                f"{path} is claimed twice: by trainable_token_indices and by target_modules or modules_to_save."
            )
        size = table_rows(params["embed_tokens"]["embedding"])
        if not ids or len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) >= size:
            raise UserError(
                f"trainable_token_indices={list(ids)}: expected different ids from 0 to {size - 1}, at least one."
            )
    if HEAD not in tokens:
        return params, tokens
    if "bias" in params.get("lm_head", {}):
        raise UserError("trainable_token_indices: the output head has a bias, which peft drops where it trains rows.")
    return untie(params), tokens


def zeros(*shape: int) -> jax.Array:
    """float32 zeros; `jnp.zeros` compiles a program for each shape."""
    return jax.device_put(np.zeros(shape, np.float32))


def _ones(*shape: int) -> jax.Array:
    return jax.device_put(np.ones(shape, np.float32))


@jax.jit
def leaf_rows(table: Any, ids: Any) -> jax.Array:
    """Rows f32[n, D] of a table."""
    return merge_leaf(table)[jnp.asarray(ids)].astype(jnp.float32)


@jax.jit
def _columns(head: Any, ids: Any) -> jax.Array:
    """Columns of an output head, as rows f32[n, D]."""
    return merge_leaf(head).T[ids].astype(jnp.float32)


def _lora_leaf(
    key: jax.Array | None, path: str, leaf: Any, factors: Mapping[Place, Factors], settings: Lora
) -> LoraWeight:
    """Wrap one leaf; `factors` of its places. Rows of lower rank, and rows not chosen, are padded with zeros."""
    *axes, k, n = plain(leaf).shape
    init, dropout = settings.init_lora_weights, settings.lora_dropout
    ranks, scale = np.zeros(axes, int), np.zeros(axes, np.float32)
    for place, (rank, s) in factors.items():
        if init == "pissa" and rank > min(k, n):
            raise UserError(
                f"r={rank} exceeds the smaller side of {path} ({k} x {n}), which has no more singular vectors; "
                f"choose r <= {min(k, n)}, or leave it out of target_modules."
            )
        at = ... if place.index is None else place.index
        ranks[at], scale[at] = rank, s
    is_table, most = not place.linear, int(ranks.max())
    # Scales on the host, so that `tree.count` knows which rows are adapted while the rest is abstract.
    rate = np.float32(dropout) * (ranks > 0).astype(np.float32) if dropout else None
    if key is None:
        fields = (leaf, zeros(*axes, k, most), zeros(*axes, most, n), scale, rate)
        return DoraWeight(*fields, magnitude=zeros(*axes, n)) if settings.use_dora else LoraWeight(*fields)
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    if init == "pissa":
        if is_table:
            raise UserError(f"init_lora_weights='pissa' is for linear modules; {path} is an embedding.")
        u, s, v = jnp.linalg.svd(merge_leaf(leaf).astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(s / np.where(scale, scale, 1)[..., None])
        full_a, full_b = u * root[..., None, :], root[..., None] * v
    # Drawn at its own rank, a layer's factors equal those in a model of that rank.
    parts = {}
    for rank in sorted(set(ranks.ravel()) - {0}):
        rank = int(rank)
        if init == "pissa":
            parts[rank] = full_a[..., :rank], full_b[..., :rank, :]
        else:
            parts[rank] = _factors(key, is_table, tuple(axes), k, n, rank, init)
    if (ranks == most).all():  # nothing to pad; each operation below would be a program for each shape
        a, b = parts[most]
    else:
        a, b = zeros(*axes, k, most), zeros(*axes, most, n)
        for rank, (own_a, own_b) in parts.items():
            here, pad = (ranks == rank)[..., None, None], [(0, 0)] * len(axes)
            a = jnp.where(here, jnp.pad(own_a, [*pad, (0, 0), (0, most - rank)]), a)
            b = jnp.where(here, jnp.pad(own_b, [*pad, (0, most - rank), (0, 0)]), b)
    start = (jnp.copy(a), jnp.copy(b)) if init == "pissa" else (None, None)
    fields = (leaf, a, b, scale, rate, *start)
    return DoraWeight(*fields, column_norm(leaf) * (ranks > 0)[..., None]) if settings.use_dora else LoraWeight(*fields)


def _factors(
    key, is_table: bool, axes: tuple[int, ...], k: int, n: int, r: int, init: bool | str
) -> tuple[jax.Array, jax.Array]:
    """peft's initial factors: a ~ U(+-1/sqrt(k)) or N(0, 1/r^2), b = 0; for an embedding a = 0, b ~ N(0, 1)."""
    if is_table:
        return zeros(*axes, k, r), jax.random.normal(key, (*axes, r, n))
    if init == "gaussian":
        return jax.random.normal(key, (*axes, k, r)) / r, zeros(*axes, r, n)
    bound = 1 / math.sqrt(k)
    return jax.random.uniform(key, (*axes, k, r), minval=-bound, maxval=bound), zeros(*axes, r, n)


# ------------------------------------------------------------------------------------------- vectors, a soft prompt


def ia3(
    params: PyTree,
    target_modules: str | Sequence[str] | None = None,
    feedforward_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
    module: Any = None,
) -> tuple[PyTree, PyTree]:
    """(IA)^3 (arXiv:2205.05638), with the names of peft's IA3Config: a vector scales a module's output or input.

    Args:
        params: of a model; leaves may be quantised.
        target_modules: as in `lora`; None: peft's default for the model's family, or Llama's for a family without one.
        feedforward_modules: the targets whose input is scaled; of the others it is the output. None: peft's default
            with the default targets, else those of Llama's that are among the targets.
        exclude_modules: as in `lora`.
        modules_to_save: as in `lora`.
        module: as in `lora`; a label head is trained whole.

    Raises:
        UserError: a target, an exclusion or a feed-forward module matches nothing, or a target is an embedding.
    """
    params, saved = _to_save(params, modules_to_save, module)
    candidates = [p for p in places(params, module) if p.path not in saved]
    named = {
        "target_modules": target_modules,
        "exclude_modules": exclude_modules,
        "feedforward_modules": feedforward_modules,
    }
    named = renamed(ia3_settings(module, **named), candidates)
    chosen, feedforward_modules = ia3_places(candidates, **named), named["feedforward_modules"]
    rows, leaves = _rows(chosen), weights_by_path(params)
    inputs = {p.path: set() for p in chosen}
    for p in chosen:
        if not p.linear:
            raise UserError(f"target_modules: {p.name} is no linear module; (IA)^3 scales linear modules only.")
        inputs[p.path].add(excluded(p.name, feedforward_modules))
    if mixed := [path for path, kinds in inputs.items() if len(kinds) > 1]:
        raise UserError(f"feedforward_modules names some layers of {mixed[0]} only; name all of them.")

    def adapt(path, leaf):
        if path not in rows:
            return leaf
        *axes, k, n = plain(leaf).shape
        scale = np.zeros(axes, np.float32)
        scale[... if rows[path] is None else rows[path]] = 1.0
        if inputs[path] == {True}:
            return Ia3Weight(leaf, scale, inp=_ones(*axes, k))
        return Ia3Weight(leaf, scale, out=_ones(*axes, n), bias=leaves.get(re.sub(r"[^/]+$", "bias", path)))

    head = filter(in_label_head, leaves) if getattr(module, "label_head", False) else ()
    return with_new_tokens(adapters_only(map_paths(adapt, params), {*saved, *head}), module)


def adapters_only(params: PyTree, whole: Set[str] = frozenset()) -> tuple[PyTree, PyTree]:
    """`(params, mask)` of a tree in which only adapters are trained, a task's own layers, and the parameters with the
    paths `whole`.
    """

    def role(path, leaf):
        if isinstance(leaf, Adapter):
            return leaf.mask()
        return filled(leaf, TRAIN if path in whole or is_trained_whole(path, None) else FROZEN)

    return in_float32(params, map_paths(role, params))


def ia3_settings(
    module: Any,
    target_modules: str | Sequence[str] | None = None,
    feedforward_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """The settings of `ia3` on a model, with the defaults for its family."""
    family = module.spec.hf_config["model_type"] if hasattr(module, "spec") else "llama"
    targets, inputs = IA3.get(family, IA3["llama"])
    if feedforward_modules is None:
        feedforward_modules = inputs if target_modules is None else IA3["llama"][1]
    return {
        "target_modules": targets if target_modules is None else target_modules,
        "feedforward_modules": feedforward_modules,
        "exclude_modules": exclude_modules,
    }


def ia3_places(
    candidates: list[Place],
    target_modules: str | Sequence[str],
    feedforward_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
) -> list[Place]:
    """Choose the modules that (IA)^3 scales, as peft does from an IA3Config."""
    targets = resolve_targets(target_modules, candidates)
    check_names("exclude_modules", exclude_modules, targets)
    chosen = [p for p in targets if not excluded(p.name, exclude_modules)]
    if tuple(feedforward_modules) != IA3["llama"][1]:
        check_names("feedforward_modules", feedforward_modules, chosen)
    if not chosen:
        raise UserError("exclude_modules leaves no module to adapt.")
    return chosen


def prompt_tuning(
    params: PyTree,
    key: jax.Array | None,
    num_virtual_tokens: int = PromptTuning.num_virtual_tokens,
    init: str = PromptTuning.init,
    module: Any = None,
) -> tuple[PyTree, PyTree]:
    """Prompt tuning (arXiv:2104.08691): only vectors put before each row are trained.

    `weights.virtual_tokens(params)` are the ids to put before a row; `generate` does so itself.

    Args:
        params: of a zoo model.
        key: draws the vectors; None: they are zero, to be filled from a file.
        num_virtual_tokens: how many vectors.
        init: "vocab", rows of the table drawn at random, or "random", N(0, 1) as peft's RANDOM.
        module: the zoo module, for families that scale their embeddings, and for added tokens.

    Raises:
        UserError: the tree is not a zoo model's, or there is no virtual token.
    """
    if "classifier" in params:
        raise UserError("Prompt tuning is for language models; for a label head use lora, ia3, head, bitfit, ...")
    if "embed_tokens" not in params:
        raise UserError("Prompt tuning knows jaxtune's own models, which have embed_tokens/embedding.")
    if num_virtual_tokens < 1:
        raise UserError(f"num_virtual_tokens={num_virtual_tokens}: nothing is left to train; give 1 or more.")
    table = params["embed_tokens"]["embedding"]
    size, width = plain(table).shape
    if key is None:
        prompt = zeros(num_virtual_tokens, width)
    elif init == "vocab":
        prompt = leaf_rows(table, jax.random.randint(key, (num_virtual_tokens,), 0, size))
        if not getattr(getattr(module, "spec", None), "scales_prompt", True):
            prompt *= module.spec.embed_scale  # the vectors replace the output of the embedding module, which scales
    elif init == "random":
        prompt = jax.random.normal(key, (num_virtual_tokens, width))
    else:
        raise UserError(f"init={init!r} is not one of 'vocab', 'random'.")
    new = {**params, "embed_tokens": {"embedding": PromptWeight(table, prompt)}}
    return with_new_tokens(adapters_only(new), module)


def virtual_ids(module: Any, settings: Mapping[str, Any]) -> list[int]:
    """The ids that a method with these settings puts before each row; see `weights.PromptWeight`.

    Raises:
        UserError: the model is an encoder-decoder, which reads no soft prompt.
    """
    if "num_virtual_tokens" in settings and module.reads_source:
        raise UserError("tune.method=prompt_tuning is for decoders; for an encoder-decoder use lora, ia3, head, ...")
    return [module.spec.vocab + i for i in range(settings.get("num_virtual_tokens", 0))]
