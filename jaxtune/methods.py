"""Tuning methods: functions `(params, ...) -> (params, mask)` on the tree. Nothing below knows which one ran."""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError, nearest
from jaxtune.tree import FROZEN, MEMBER, TRAIN, PyTree, flatten, match
from jaxtune.weights import LoraWeight, QuantWeight, is_weight, map_weights, merge_leaf


class Place(NamedTuple):
    """A module that a target can name.

    Attributes:
        name: the module's HF name "model.layers.3.self_attn.q_proj", or its own path with dots.
        path: its matrix in our tree.
        index: row of the stacked leaf; None: the whole leaf.
    """

    name: str
    path: str
    index: int | None


def places(params: PyTree, module: Any = None) -> list[Place]:
    """List the linear and embedding modules of a tree: by HF names for a zoo module, else by the tree's own paths."""
    if module is None:
        leaves = {path: leaf for path, leaf in _leaves(params).items() if len(leaf.shape) >= 2}
        return [Place(re.sub(r"/(kernel|embedding)$", "", path).replace("/", "."), path, None) for path in leaves]
    from jaxtune.models import names

    matrices = {p for p in _leaves(params) if p.endswith(("/kernel", "/embedding"))}
    return [Place(t.module, t.path, t.index) for t in names(module).tensors(module.spec, matrices)]


def _leaves(params: PyTree) -> dict[str, Any]:
    """Leaves by path, a polymorphic leaf as the one array it stands for."""
    return flatten(map_weights(lambda w: jax.eval_shape(merge_leaf, w) if is_weight(w) else w, params))


def _is_linear(place: Place) -> bool:
    return place.path.endswith("kernel")


def resolve_targets(target_modules: str | Sequence[str], candidates: list[Place]) -> list[Place]:
    """Choose the places that peft's `target_modules` names.

    A list matches a module's whole name or its end after a dot; a string is a regex over the whole name, except
    "all-linear": every linear module but the output head.

    Raises:
        UserError: a target matches nothing.
    """
    names = sorted({p.name.rpartition(".")[2] for p in candidates})
    if target_modules == "all-linear":
        chosen = [p for p in candidates if _is_linear(p) and p.name.rpartition(".")[2] != "lm_head"]
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


def _rows(chosen: list[Place]) -> dict[str, list[int] | None]:
    """{path: the rows of its stack that were chosen, or None for the whole leaf}."""
    rows: dict[str, list[int] | None] = {}
    for place in chosen:
        rows[place.path] = None if place.index is None else [*(rows.get(place.path) or []), place.index]
    return rows


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def full(params: PyTree) -> tuple[PyTree, PyTree]:
    """Train everything, in float32.

    Raises:
        UserError: a leaf is quantised.
    """
    if any(isinstance(w, QuantWeight) for w in jax.tree.leaves(params, is_leaf=is_weight)):
        raise UserError("A quantised parameter cannot be trained; load the base unquantised or use LoRA.")
    return jax.tree.map(_float32, params), jax.tree.map(lambda _: TRAIN, params)


def head(params: PyTree) -> tuple[PyTree, PyTree]:
    """Train the final norm and the output head over a frozen body.

    A tied head becomes a matrix of its own: the embedding below, and with it the body, stays as it was.
    """
    if "embed_tokens" not in params:
        raise UserError("The method 'head' knows jaxtune's own models; give a mask by rules for another tree.")
    params = dict(params)
    if "lm_head" not in params:
        params["lm_head"] = {"kernel": merge_leaf(params["embed_tokens"]["embedding"]).T}
    mask = match([(r"(norm|lm_head)/.*", TRAIN), (r".*", FROZEN)], params)
    return jax.tree.map(lambda p, m: _float32(p) if m is TRAIN else p, params, mask), mask


def lora(
    params: PyTree,
    key: jax.Array,
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    bias: str = "none",
    use_rslora: bool = False,
    module: Any = None,
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
        module: the zoo module, so that targets are HF's names; None: the tree's own paths, with dots.

    Raises:
        UserError: a target matches nothing, or the rank exceeds a matrix's smaller side.
    """
    rows = _rows(resolve_targets(target_modules, places(params, module)))
    scale = lora_alpha / (math.sqrt(r) if use_rslora else r)
    biases: dict[str, list[int] | None] = {}
    if bias == "lora_only":
        biases = {re.sub(r"[^/]+$", "bias", path): chosen for path, chosen in rows.items()}
    elif bias not in ("none", "all"):
        raise UserError(f"bias={bias!r} is not one of 'none', 'all', 'lora_only'.")

    def adapt(path, leaf):
        if path not in rows:
            return leaf
        *axes, k, n = jax.eval_shape(merge_leaf, leaf).shape
        if r > min(k, n):
            raise UserError(f"r={r} exceeds the smaller side of {path} ({k} x {n}); choose r <= {min(k, n)}.")
        a, b = _factors(jax.random.fold_in(key, zlib.crc32(path.encode())), path, tuple(axes), k, n, r)
        on = np.zeros(axes, np.float32)
        on[... if rows[path] is None else rows[path]] = 1.0
        if not on.all():
            # Zero factors are a fixed point of training, so rows that are not chosen need no mask.
            a, b = a * on[:, None, None], b * on[:, None, None]
        # On the host, so that `tree.count` knows which rows are adapted while the rest is abstract.
        return LoraWeight(leaf, a, b, np.float32(scale) * on, np.float32(lora_dropout) * on if lora_dropout else None)

    def role(path, leaf):
        if path in rows:
            frozen = jax.tree.map(lambda _: FROZEN, leaf)
            return LoraWeight(frozen, TRAIN, TRAIN, MEMBER, MEMBER if lora_dropout else None)
        is_bias = path.rpartition("/")[2] == "bias"
        if path in biases and biases[path] is not None and len(biases[path]) < leaf.shape[0]:
            raise UserError(f"bias='lora_only' with targets in some layers only is not supported ({path}).")
        trained = is_bias and (bias == "all" or path in biases)
        return jax.tree.map(lambda _: TRAIN if trained else FROZEN, leaf)

    new, mask = _map_paths(adapt, params), _map_paths(role, params)
    return jax.tree.map(lambda p, m: _float32(p) if m is TRAIN else p, new, mask), mask


def _map_paths(fn, params: PyTree) -> PyTree:
    """Map fn(path, leaf), a polymorphic leaf as one."""

    def call(path, leaf):
        return fn(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(call, params, is_leaf=is_weight)


def _factors(key, path: str, axes: tuple[int, ...], k: int, n: int, r: int) -> tuple[jax.Array, jax.Array]:
    """peft's initial factors: a ~ U(+-1/sqrt(k)), b = 0; for an embedding a = 0, b ~ N(0, 1)."""
    if path.endswith("embedding"):
        return jnp.zeros((*axes, k, r)), jax.random.normal(key, (*axes, r, n))
    bound = 1 / math.sqrt(k)
    return jax.random.uniform(key, (*axes, k, r), minval=-bound, maxval=bound), jnp.zeros((*axes, r, n))


def tune(
    method: str, params: PyTree, key: jax.Array, module: Any, settings: Mapping[str, Any]
) -> tuple[PyTree, PyTree]:
    """Apply the method that a config names; `settings` are its own section's."""
    return METHODS[method](params, key, module, settings)


METHODS = {
    "full": lambda params, key, module, settings: full(params),
    "head": lambda params, key, module, settings: head(params),
    "lora": lambda params, key, module, settings: lora(params, key, module=module, **settings),
}
