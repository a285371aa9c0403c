"""Parameter trees: paths, rules over paths, the three-valued mask, partition and combine.

A tuning method returns `(params, mask)`: two trees of one structure, the second with a `Role` at each leaf.
Nothing below knows which method made them.
"""

import re
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune.errors import UserError, nearest

PyTree = Any


class Role(Enum):
    """What happens to a leaf during training."""

    TRAIN = "train"  # differentiated, optimised, saved
    MEMBER = "member"  # not differentiated, but each member of a sweep has its own: LoRA scale, dropout rate
    FROZEN = "frozen"  # shared, never copied, donated, returned or saved


TRAIN, MEMBER, FROZEN = Role.TRAIN, Role.MEMBER, Role.FROZEN


class Partition(NamedTuple):
    """Three trees of one structure; a leaf sits in exactly one of them, the others hold None there."""

    trainable: PyTree
    member: PyTree
    frozen: PyTree


def path_str(path: Sequence[Any]) -> str:
    """Return a key path as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: PyTree) -> dict[str, Any]:
    """Return `{"a/b/c": leaf}` in the tree's own order."""
    return {path_str(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def match(rules: Sequence[tuple[str, Any]], tree: PyTree) -> PyTree:
    """Return a tree of `tree`'s structure whose leaves are the values of the rules.

    A rule is `(regex, value)`; the regex must match the whole path "a/b/c"; the first that does wins.

    Raises:
        UserError: a rule is no regular expression or matches no leaf, or a leaf is matched by no rule.
    """
    compiled = [(_compile(pattern), value) for pattern, value in rules]
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    paths = [path_str(path) for path, _ in leaves]
    for pattern, _ in compiled:
        if not any(pattern.fullmatch(path) for path in paths):
            raise UserError(
                f"The rule {pattern.pattern!r} matches none of the {len(paths)} parameters."
                f"{nearest(pattern.pattern, paths)} A rule must match the whole path, such as {paths[0]!r}."
            )
    values = []
    for path in paths:
        for pattern, value in compiled:
            if pattern.fullmatch(path):
                values.append(value)
                break
        else:
            raise UserError(f"No rule covers the parameter {path!r}; end the rules with ('.*', value).")
    return jax.tree.unflatten(structure, values)


def _compile(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UserError(f"The rule {pattern!r} is not a regular expression: {e}.") from None


def partition(params: PyTree, mask: PyTree) -> Partition:
    """Split `params` by `mask` into trees with None holes, before any differentiation.

    Raises:
        ValueError: the structures differ.
        UserError: nothing is left to train.
    """
    if jax.tree.structure(params) != jax.tree.structure(mask):
        raise ValueError("The mask's structure is not that of the parameters.")
    if TRAIN not in jax.tree.leaves(mask):
        raise UserError("Nothing is left to train: the mask marks no parameter as trainable.")
    return Partition(*(jax.tree.map(lambda p, m, r=role: p if m is r else None, params, mask) for role in Role))


def combine(trainable: PyTree, member: PyTree, frozen: PyTree) -> PyTree:
    """Undo `partition`: fill the holes of each tree from the others."""

    def pick(*leaves):
        return next((leaf for leaf in leaves if leaf is not None), None)

    return jax.tree.map(pick, trainable, member, frozen, is_leaf=lambda x: x is None)


def filled(tree: PyTree, value: Any) -> PyTree:
    """Return a tree of `tree`'s structure with one value at each leaf."""
    return jax.tree.map(lambda _: value, tree)


def split_stack(tree: PyTree, at: int) -> tuple[PyTree, PyTree]:
    """Split every leaf of a stacked tree (leading layer axis of length n) into its first `at` and last n - at rows."""
    return jax.tree.map(lambda x: x[:at], tree), jax.tree.map(lambda x: x[at:], tree)


class Counts(NamedTuple):
    """Numbers of parameters; LoRA scales and dropout rates are settings, not parameters, and are not counted."""

    trainable: int
    all: int
    groups: dict[str, tuple[int, int]]  # module name -> (trainable, all)

    def __str__(self) -> str:
        """The line peft prints."""
        share = 100 * self.trainable / self.all
        return f"trainable params: {self.trainable:,d} || all params: {self.all:,d} || trainable%: {share:.4f}"


_LEAF_FIELDS = {
    *("kernel", "bias", "scale", "embedding", "w", "a", "b", "dropout"),
    *("a0", "b0", "magnitude", "rows", "prompt"),
    *("q", "codes", "absmax", "offset"),
}


def _group(path: str) -> str:
    """A leaf's module without its depth: "segment_0/block_0/mlp/up_proj/kernel/a" -> "mlp/up_proj"."""
    parts = [p for p in path.split("/") if not re.fullmatch(r"(segment|block)_\d+", p)]
    while len(parts) > 1 and parts[-1] in _LEAF_FIELDS:
        parts.pop()
    return "/".join(parts)


def _per_entry(path: str, leaves: dict[str, Any]) -> int:
    """Parameters in an entry: 2 in a byte of 4-bit codes, 0 in what says how to read the codes."""
    owner, _, field = path.rpartition("/")
    if f"{owner}/codes" in leaves:
        return 2 if field == "codes" else 0
    return 0 if field == "scale" and f"{owner}/q" in leaves else 1


def _adapted(scale: Any) -> float:
    """The share of layers whose scale is not 0."""
    known = not isinstance(scale, jax.core.Tracer | jax.ShapeDtypeStruct)
    return float(np.mean(np.asarray(scale) != 0)) if known else 1.0


def count(params: PyTree, mask: PyTree) -> Counts:
    """Count trainable and all parameters, in total and by module name.

    Works on abstract arrays too. Of a stacked LoRA factor, the rows with a scale of 0 are not adapted and not counted,
    as long as the scales are known. A quantised matrix counts as what it stands for.
    """
    trainable, total = Counter(), Counter()
    leaves, roles = flatten(params), flatten(mask)
    for path, leaf in leaves.items():
        if roles[path] is not MEMBER:
            group, scale = _group(path), path.rpartition("/")[0] + "/scale"
            size = leaf.size * _per_entry(path, leaves)
            if roles[path] is TRAIN and roles.get(scale) is MEMBER:
                size = round(size * _adapted(leaves[scale]))
            total[group] += size
            trainable[group] += size * (roles[path] is TRAIN)
    groups = {name: (trainable[name], n) for name, n in total.items()}
    return Counts(sum(trainable.values()), sum(total.values()), groups)
