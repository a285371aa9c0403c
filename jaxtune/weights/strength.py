"""How strongly a tuned model differs from its base: its weights on the line from the base's through its own.

    W(s) = W_base + s (W_tuned - W_base)

This is WiSE-FT (Wortsman et al. 2021, arXiv:2109.01903, eq. 2). Of LoRA it is the adapter's scale times s, so that one
number is what differs. A DoRA leaf with another scale would still have its trained magnitudes, so with s = 0 it would
not be the base; it is merged, and moves on the same line, as whatever else was trained does.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxtune.errors import UserError
from jaxtune.weights.adapters import LoraWeight, PromptWeight
from jaxtune.weights.leaf import map_paths, map_weights, merge_leaf, plain, weights_by_path


def off_the_scale(base: Any, tuned: Any) -> dict[str, Any]:
    """The base's arrays of all that tuning changed otherwise than by LoRA: path -> array; without any, s is a scale.

    Args:
        base: parameters.
        tuned: parameters. Arrays that both share are known to be unchanged.

    Raises:
        UserError: what was tuned is a soft prompt, or a table with other rows, of which there is no half.
    """
    own, found = weights_by_path(base), {}
    for path, leaf in weights_by_path(tuned).items():
        below = own.get(path)
        if below is leaf or type(leaf) is LoraWeight:
            continue
        if isinstance(leaf, PromptWeight):
            raise UserError("A soft prompt has no strength between the base and itself: it is there, or not.")
        below = None if below is None else merge_leaf(below)
        if below is None or below.shape != plain(leaf).shape:
            raise UserError(f"{path} has another shape than in the base, so there is nothing between the two.")
        found[path] = below
    return found


def at_strength(tuned: Any, below: dict[str, Any], strength: Any) -> Any:
    """The parameters at a strength: 0 is the base, 1 the tuned model.

    Args:
        tuned: the tuned model's parameters.
        below: what `off_the_scale` returned.
        strength: a number, or f32[].
    """

    def moved(path, leaf):
        if path in below:
            base, whole = (merge_leaf(x).astype(jnp.float32) for x in (below[path], leaf))
            return (base + strength * (whole - base)).astype(below[path].dtype)
        return dataclasses.replace(leaf, scale=leaf.scale * strength) if type(leaf) is LoraWeight else leaf

    return map_paths(moved, tuned)


def folded(params: Any, strength: float) -> Any:
    """LoRA leaves of this strength by their `b`, whose scale stays what an adapter's config says of it."""

    def fold(leaf):
        if type(leaf) is not LoraWeight:
            return leaf
        return dataclasses.replace(leaf, b=leaf.b * strength, b0=None if leaf.b0 is None else leaf.b0 * strength)

    return map_weights(fold, params)
