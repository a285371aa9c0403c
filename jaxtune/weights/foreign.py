"""Polymorphic leaves in foreign models: `adapt(apply_fn)` accepts LoRA and quantised weights in the parameters.

A functional model is traced with plain arrays to a jaxpr, and `rewrite.evaluate` runs that with each polymorphic leaf
in place of its array. An operation that cannot be rewritten is an error that names it and its place.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError
from jaxtune.tree import PyTree, path_str
from jaxtune.weights.leaf import Keys, ShapedWeight, is_weight, map_paths
from jaxtune.weights.rewrite import Axis, Rider, Scope, evaluate, ride


class MatrixLayout(NamedTuple):
    """The axes of a foreign array as a matrix: layers, inputs and outputs.

    Attributes:
        layers, inputs, outputs: axes of the array, each once.
        lookup: the rows are looked up (an embedding), not multiplied.
    """

    layers: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    lookup: bool = False


class Adapted:
    """What `adapt` returns: the model's function, with polymorphic leaves in its first argument."""

    def __init__(self, apply_fn: Callable, strict: bool):
        functools.update_wrapper(self, apply_fn, updated=())
        self._apply, self._strict = apply_fn, strict

    def __call__(self, params: PyTree, *args, keys: Keys = None, **kwargs):
        """Call the model.

        Args:
            params: its parameters, where any leaf may be a `Weight`.
            *args: the model's; a value that is not an array is passed on unchanged.
            keys: one key for each row of the batch, [B], for LoRA's dropout (see `row_keys`); None: no dropout.
            **kwargs: as `args`.

        Raises:
            UserError: an operation over an adapted weight cannot be rewritten; the weight and the line are named.
        """
        flat, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)
        riders = [ride(leaf, path_str(path)) if is_weight(leaf) else leaf for path, leaf in flat]
        scope = Scope(keys, self._strict)
        return self._run(scope, structure, riders, args, kwargs)

    def _run(self, scope: Scope, structure, riders: list, args: tuple, kwargs: Mapping):
        arrays, rebuild = _split(args, kwargs)

        def traced(leaves, arrays):
            args, kwargs = rebuild(arrays)
            return self._apply(jax.tree.unflatten(structure, leaves), *args, **kwargs)

        plain = [jax.ShapeDtypeStruct(r.shape, r.dtype) if isinstance(r, Rider) else r for r in riders]
        closed, shapes = jax.make_jaxpr(traced, return_shape=True)(plain, arrays)
        out = evaluate(scope, closed.jaxpr, closed.consts, [*riders, *arrays])
        if lost := [value.path for value in out if isinstance(value, Rider)]:
            raise UserError(
                f"adapt: the model returns its adapted weight {lost[0]!r}; leave it out of the targets, or use "
                "adapt(..., strict=False), which returns the merged weight."
            )
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    def layouts(self, params: PyTree, *args, **kwargs) -> dict[str, MatrixLayout]:
        """Find which parameters the model uses as matrices, and their axes; nothing is computed.

        A kernel [D, heads, channels] of Flax's attention sums over axis 0; one of a convolution, over all but the last.

        Args:
            params: plain arrays, or `jax.ShapeDtypeStruct`s.
            *args: the model's.
            **kwargs: the model's.

        Returns:
            {path: layout} of every parameter that only products and lookups use.
        """
        flat, structure = jax.tree_util.tree_flatten_with_path(params)
        shapes = {path_str(path): leaf.shape for path, leaf in flat}
        uses: dict[str, set[tuple[str, frozenset[int], frozenset[int]]]] = {}

        def probe(rider, kind, inside, batch):
            left = [part for dim in rider.dims for part in dim]
            used = {name: frozenset(part.index for part in parts) for name, parts in (("in", inside), ("b", batch))}
            whole = all(part in inside for part in left if part.index in used["in"])
            layers = frozenset(range(len(shapes[rider.path]))) - {part.index for part in left} | used["b"]
            uses.setdefault(rider.path, set()).add((kind if whole else "other", used["in"], layers))

        arrays, rebuild = _split(args, kwargs)

        def call(leaves, arrays):
            riders = [
                Rider(leaf, tuple((Axis("L", i, 1, n),) for i, n in enumerate(leaf.shape)), leaf.dtype, path)
                if len(leaf.shape) >= 2
                else leaf
                for path, leaf in zip(shapes, leaves)
            ]
            return self._run(Scope(None, False, probe), structure, riders, *rebuild(arrays))

        jax.eval_shape(call, [leaf for _, leaf in flat], arrays)
        found = {path: _layout(len(shapes[path]), seen) for path, seen in uses.items()}
        return {path: found[path] for path in shapes if found.get(path)}


def _layout(ndim: int, uses: set) -> MatrixLayout | None:
    """The layout that fits all uses of a parameter: the same axes summed over, or exactly the others (a tied head)."""
    if any(kind == "other" for kind, _, _ in uses):
        return None
    # A lookup tells which axis is the rows; without a lookup, the first axes are.
    kind, inputs, layers = sorted(uses, key=lambda use: (use[0], sorted(use[1])))[0]
    outputs = frozenset(range(ndim)) - inputs - layers
    if any(group != layers or used not in (inputs, outputs) for _, used, group in uses):
        return None
    return MatrixLayout(tuple(sorted(layers)), tuple(sorted(inputs)), tuple(sorted(outputs)), kind == "lookup")


def _split(args: tuple, kwargs: Mapping) -> tuple[list, Callable[[list], tuple[tuple, dict]]]:
    """The arrays among a call's arguments, and a function that rebuilds the arguments from arrays."""
    leaves, structure = jax.tree.flatten((args, dict(kwargs)))

    def rebuild(arrays):
        given = iter(arrays)
        return jax.tree.unflatten(structure, [next(given) if _is_array(leaf) else leaf for leaf in leaves])

    return [leaf for leaf in leaves if _is_array(leaf)], rebuild


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def adapt(apply_fn: Callable, *, strict: bool = True) -> Adapted:
    """Let a functional model of any library carry `LoraWeight`, `QuantWeight` and the other leaves.

    The result computes the same as `apply_fn(merge(params), ...)`, in activation space: gradients for the factors only,
    and no merged weight in memory.

    Args:
        apply_fn: `(params, *args, **kwargs) -> outputs`: `module.apply` of Flax Linen or Haiku, a function around
            `nnx.merge`, or any other.
        strict: raise where a weight meets an operation that has no rule; False: build the merged weight there.
    """
    return Adapted(apply_fn, strict)


def matrices(params: PyTree, layouts: Mapping[str, MatrixLayout]) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Reshape foreign parameters to the matrices [*L, K, N] that tuning methods expect.

    Returns:
        The tree, and the inverse function; it wraps a leaf that a method made polymorphic in a `ShapedWeight`.
    """

    def lay(path, leaf):
        layout = layouts.get(path_str(path))
        if layout is None:
            return leaf
        order = (*layout.layers, *layout.inputs, *layout.outputs)
        sizes = [leaf.shape[axis] for axis in layout.layers]
        k = math.prod(leaf.shape[axis] for axis in layout.inputs)
        return jnp.transpose(leaf, order).reshape(*sizes, k, -1)

    shapes = {path_str(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def undo(path, leaf):
        layout = layouts.get(path)
        if layout is None:
            return leaf
        shaped = ShapedWeight(leaf, *layout[:3], shapes[path])
        return shaped if is_weight(leaf) else shaped.restore(leaf) if hasattr(leaf, "shape") else leaf

    return jax.tree_util.tree_map_with_path(lay, params), functools.partial(map_paths, undo)
