"""Tuning methods: functions `(params, ...) -> (params, mask)` on the tree. Training does not know which one ran.

Methods that train parts of the model are here, with the table of all methods; adapters.py has those that add weights.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxtune.errors import UserError, nearest
from jaxtune.methods.adapters import attach, hira, ia3, ia3_places, ia3_settings, lora, miss, prompt_tuning, virtual_ids
from jaxtune.methods.places import (
    DENSE,
    Place,
    compiled,
    is_bias,
    is_module_bias,
    is_saved,
    is_trained_whole,
    lora_places,
    parameters,
    places,
    renamed,
    resolve_targets,
)
from jaxtune.methods.settings import ROWS, Lora, read
from jaxtune.methods.vocabulary import resize, untie, with_new_tokens
from jaxtune.tree import FROZEN, TRAIN, PyTree, filled, match
from jaxtune.weights.leaf import in_float32, map_paths

__all__ = [
    "METHODS",
    "attach",
    "bitfit",
    "cut",
    "embeddings",
    "full",
    "head",
    "hira",
    "ia3",
    "last_n",
    "lora",
    "miss",
    "norms",
    "parameters",
    "places",
    "prompt_tuning",
    "regex",
    "resize",
    "resolve_targets",
    "tune",
    "virtual_ids",
]


# -------------------------------------------------------------------------------------------- parts of the model itself


def full(params: PyTree) -> tuple[PyTree, PyTree]:
    """Train all parameters, in float32; other collections of Flax variables (batch_stats) stay.

    Raises:
        UserError: a leaf is quantised.
    """
    everything = r"params/.*" if "params" in params else r".*"
    return in_float32(params, match([(everything, TRAIN), (r".*", FROZEN)], params))


def head(params: PyTree, module: Any = None) -> tuple[PyTree, PyTree]:
    """Train the final norm and the output head over a frozen body; for a classifier, its whole label head; where there
    are dense layers above a text's pooling, these.

    A tied head becomes a separate matrix, so that the embedding, and with it the body, stays as it was.

    Args:
        params: of a zoo model.
        module: the zoo module, which knows of rows that `resize` added; the parameters alone do not show them.

    Raises:
        UserError: the tree is not a zoo model's, a leaf is quantised, or `resize` added rows, which `head` leaves
            untrained.
    """
    if "classifier" in params:
        return in_float32(params, match([(r"classifier/.*", TRAIN), (r".*", FROZEN)], params))
    if DENSE in params:
        return in_float32(params, match([(f"{DENSE}/.*", TRAIN), (r".*", FROZEN)], params))
    if "embed_tokens" not in params:
        raise UserError("The method 'head' knows jaxtune's own models; give a mask by rules for another tree.")
    params = untie(params)
    tuned = in_float32(params, match([(r"(norm|lm_head)/.*", TRAIN), (r".*", FROZEN)], params))
    return with_new_tokens(tuned, module)


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
    """Train the embedding tables, which include a tied head."""
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
    return lambda p: (p.old or p.name).startswith(starts) or p.path.startswith("norm/")


def _regex(module: Any, settings: Mapping[str, Any]) -> Callable[[Place], bool]:
    pattern = compiled("regex", settings["pattern"])
    return lambda p: any(pattern.fullmatch(name) for name in (p.name, p.old) if name)


# (module, settings) -> which parameters are trained.
_CHOICES: dict[str, Callable[[Any, Mapping[str, Any]], Callable[[Place], bool]]] = {
    "bitfit": lambda module, settings: lambda p: is_bias(p.path),
    "norms": lambda module, settings: lambda p: re.fullmatch(r"(.*/)?\w*norm/(scale|bias)", p.path) is not None,
    "embeddings": lambda module, settings: lambda p: p.path.endswith("embedding"),
    "last_n": _last_n,
    "regex": _regex,
}


def _select(params: PyTree, choose: Callable[[Place], bool], module: Any, nothing: str) -> tuple[PyTree, PyTree]:
    """Train the parameters that `choose` picks; `nothing` explains in the error message why there may be none."""
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

    def role(path, leaf):
        return filled(leaf, TRAIN if hits[path] or is_trained_whole(path, module) else FROZEN)

    return with_new_tokens(in_float32(params, map_paths(role, params)), module)


# ---------------------------------------------------------------------------------------------------------------- edges


def _low_rank_adapts(method: str, module: Any, settings: Mapping[str, Any]) -> Callable[[Place], bool]:
    candidates = places(module.abstract_params(), module)
    settings = Lora(**renamed(vars(read(method, ROWS[method].settings, settings).as_lora()), candidates))
    chosen = {(p.path, p.index) for p in lora_places(candidates, settings)}
    every_bias, saved = settings.bias == "all", settings.modules_to_save

    def adapts(p: Place) -> bool:
        module = p.name.rpartition(".")[0]
        return (p.path, p.row) in chosen or (every_bias and is_module_bias(p.path)) or is_saved(module, saved)

    return adapts


def _ia3_adapts(module: Any, settings: Mapping[str, Any]) -> Callable[[Place], bool]:
    candidates, settings = places(module.abstract_params(), module), dict(settings)
    saved = settings.pop("modules_to_save", None)
    chosen = {
        (p.path, p.index) for p in ia3_places(candidates, **renamed(ia3_settings(module, **settings), candidates))
    }
    return lambda p: (p.path, p.index) in chosen or is_saved(p.name.rpartition(".")[0], saved)


# An adapter of a stack has scale 0 on layers that it leaves alone, so it needs no cut; but below the lowest layer that
# it adapts nothing is trained, and a cut lets the backward pass end there.
_ADAPTS = {"ia3": _ia3_adapts} | {name: partial(_low_rank_adapts, name) for name in ("lora", "hira", "miss")}


def cut(method: str, module: Any, settings: Mapping[str, Any]) -> Any:
    """Return the module, split between layers that `method` trains and layers that it does not, if that is needed.

    This comes before loading the weights, which then have the split module's tree.
    """
    read(method, ROWS[method].settings, settings)
    if method not in _CHOICES and method not in _ADAPTS:
        return module
    choose = (_CHOICES | _ADAPTS)[method](module, settings)
    chosen: dict[tuple[str, int], set[str]] = {}
    for place in parameters(module.abstract_params(), module):
        if place.index is not None:
            row = chosen.setdefault((place.path.partition("/")[0], place.row), set())
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


# -------------------------------------------------------------------------------------------------------------- by name


class Method(NamedTuple):
    """A row of the table: a method that `tune.method` can name.

    Attributes:
        name: its own.
        apply: (params, key, module, **options) -> (params, mask).
    """

    name: str
    apply: Callable[..., tuple[PyTree, PyTree]]

    def __call__(
        self, params: PyTree, key: jax.Array, module: Any, options: Mapping[str, Any]
    ) -> tuple[PyTree, PyTree]:
        """Apply it; `options` are those of its settings' class, in `settings.ROWS`.

        Raises:
            UserError: an option that it does not have.
        """
        read(self.name, ROWS[self.name].settings, options)
        return self.apply(params, key, module, **options)


def tune(
    method: str, params: PyTree, key: jax.Array, module: Any, settings: Mapping[str, Any]
) -> tuple[PyTree, PyTree]:
    """Apply the method `name`; `settings` are those of its section in the config."""
    return METHODS[method](params, key, module, settings)


METHODS = {
    name: Method(name, apply)
    for name, apply in {
        "full": lambda params, key, module: full(params),
        "head": lambda params, key, module: head(params, module),
        "lora": lambda params, key, module, **options: lora(params, key, module=module, **options),
        "hira": lambda params, key, module, **options: hira(params, key, module=module, **options),
        "miss": lambda params, key, module, **options: miss(params, key, module=module, **options),
        "bitfit": lambda params, key, module: bitfit(params, module),
        "norms": lambda params, key, module: norms(params, module),
        "embeddings": lambda params, key, module: embeddings(params, module),
        "last_n": lambda params, key, module, **options: last_n(params, module=module, **options),
        "regex": lambda params, key, module, **options: regex(params, module=module, **options),
        "ia3": lambda params, key, module, **options: ia3(params, module=module, **options),
        "prompt_tuning": lambda params, key, module, **options: prompt_tuning(params, key, module=module, **options),
    }.items()
}
