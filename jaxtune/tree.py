"""Parameter trees: paths, rules over paths, the three-valued mask, partition and combine.

A tuning method returns `(params, mask)`: two trees of one structure, the second with a `Role` at each leaf.
No other code knows which method made them. In place of an array there may be a `Node`, whose class declares its fields.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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


class Stored(NamedTuple):
    """How a field is stored in a PEFT file.

    Attributes:
        key: of the tensor; "{}" stands for the module's full name: "{}.lora_A.weight".
        axes: those of the tensor, by the letters of `Field.axes` (1: an axis of size 1): "r K".
        table: the key in an adapter of an embedding; None: the same.
    """

    key: str
    axes: str
    table: str | None = None


@dataclasses.dataclass(frozen=True)
class Field:
    """The declaration of a field in the class of a `Node`, which masks, counts, optimizers and files read.

    Attributes:
        role: what happens to it in training.
        axes: its axes after the layer axes, by letters: "K r" is a matrix, "N" a vector, "" a number for each layer.
        parameters: how many an entry stands for: 2 in a byte of 4-bit codes, 0 if it is not a parameter.
        stored: how it is stored in a PEFT file; None: not stored.
        group: its name in metrics that separate it from the rest of its module: "lora_A".
        faster: whether LoRA+ gives it the higher rate, as it does to every vector.
    """

    role: Role
    axes: str
    parameters: int = 1
    stored: Stored | None = None
    group: str = ""
    faster: bool = False

    @property
    def ndim(self) -> int:
        """The number of its axes, without layer axes."""
        return len(self.axes.split())


class Node:
    """A pytree node in place of an array: a dataclass whose fields are declared (`weights.leaf`)."""

    @classmethod
    def fields(cls) -> dict[str, Field]:
        """The fields that hold arrays or another `Node`; the value of a field may be None in a tree."""
        return {f.name: f.metadata["field"] for f in dataclasses.fields(cls) if "field" in f.metadata}

    def layers_adapted(self) -> Any:
        """An array [*L], 0 for layers on which this node has no effect; None: it affects all."""
        return None


def is_node(x: Any) -> bool:
    """Whether `x` is a `Node`."""
    return isinstance(x, Node)


def map_fields(fn: Callable[[str, Any, Field | None], Any], tree: PyTree) -> PyTree:
    """Map `fn("a/b/c", array, field)` over the arrays of a tree; `field` is its declaration in a node, or None."""

    def inside(path, leaf, field=None):
        if not is_node(leaf):
            return jax.tree.map(lambda x: fn(path, x, field), leaf)
        own = {name: inside(f"{path}/{name}", getattr(leaf, name), f) for name, f in leaf.fields().items()}
        return dataclasses.replace(leaf, **own)

    return jax.tree_util.tree_map_with_path(lambda path, x: inside(path_str(path), x), tree, is_leaf=is_node)


class Partition(NamedTuple):
    """Three trees of one structure; each leaf is in exactly one of them, and None in the others."""

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
        UserError: a rule is not a regular expression or matches no leaf, or a leaf is matched by no rule.
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


class Beside(NamedTuple):
    """A tree of parameters, and another frozen one that a loss is given beside it, such as a teacher's."""

    params: PyTree
    other: PyTree


def without_other(params: PyTree) -> PyTree:
    """Return the tree itself, where another may lie beside it."""
    return params.params if isinstance(params, Beside) else params


def combine(trainable: PyTree, member: PyTree, frozen: PyTree) -> PyTree:
    """Undo `partition`: fill the holes of each tree from the others. What lies beside the frozen tree stays there."""
    if isinstance(frozen, Beside):
        return frozen._replace(params=combine(trainable, member, frozen.params))

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


def _group(path: str) -> str:
    """A leaf's module without its depth: "segment_0/block_0/mlp/up_proj/kernel" -> "mlp/up_proj"."""
    parts = [p for p in path.split("/") if not re.fullmatch(r"(segment|block)_\d+", p)]
    while len(parts) > 1 and parts[-1] in ("kernel", "bias", "scale", "embedding", "w", "b"):
        parts.pop()
    return "/".join(parts)


class _Part(NamedTuple):
    """An array of a tree: its path, how many parameters an entry is, and the layers that its node adapts."""

    path: str
    array: Any
    parameters: int
    adapted: Any


def _parts(path: str, leaf: Any) -> Iterator[_Part]:
    if not is_node(leaf):
        yield _Part(path, leaf, 1, None)
        return
    for name, field in leaf.fields().items():
        inner = getattr(leaf, name)
        if is_node(inner):
            yield from _parts(f"{path}/{name}", inner)
        elif inner is not None:
            yield _Part(f"{path}/{name}", inner, field.parameters, leaf.layers_adapted())


def _share(adapted: Any) -> float:
    """The share of layers that are adapted; 1 if it is unknown."""
    if adapted is None or isinstance(adapted, jax.core.Tracer | jax.ShapeDtypeStruct):
        return 1.0
    return float(np.mean(np.asarray(adapted) != 0))


def count(params: PyTree, mask: PyTree) -> Counts:
    """Count trainable and all parameters, in total and by module name.

    Works on abstract arrays too. Of a stacked LoRA factor, the rows with a scale of 0 are not adapted and not counted,
    if the scales are concrete. A quantised matrix counts as the plain one.
    """
    trainable, total = Counter(), Counter()
    roles = flatten(mask)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_node)[0]:
        group = _group(path_str(path))
        for part in _parts(path_str(path), leaf):
            role = roles[part.path]
            if role is not MEMBER:
                size = part.array.size * part.parameters
                if role is TRAIN:
                    size = round(size * _share(part.adapted))
                total[group] += size
                trainable[group] += size * (role is TRAIN)
    groups = {name: (trainable[name], n) for name, n in total.items()}
    return Counts(sum(trainable.values()), sum(total.values()), groups)
