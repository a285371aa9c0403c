"""Polymorphic weights: pytree nodes in place of plain arrays.

A model calls `dot`, `embed` and `attend` on whatever it finds; the type of the leaf decides what happens. So there is
one model, whichever method tunes it:

        x [B,T,K] ----------------- w [K,N] (array or QuantWeight, frozen) ---- + --- y [B,T,N]
             \\                                                                 /
              dropout -- a [K,r] -- [B,T,r] -- b [r,N] ------------- * scale --

All fields carry the leading layer axes `*L` of the stacked segment, so that `scan` slices them together.

A class declares each of its fields, and no other code knows them by name: masks, counts, optimizers, sweeps and PEFT
files read the declarations. A new kind of adapter is a class, and a method that puts it into a tree:

    @leaf_type
    class GateWeight(Adapter):
        w: Any = base()
        gate: Array = trained("N", stored=Stored("{}.gate", "N"))
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxtune.errors import UserError
from jaxtune.tree import FROZEN, MEMBER, TRAIN, Field, Node, filled, path_str
from jaxtune.weights import grouped

Array = jax.Array
Keys = Array | None  # one PRNG key a row, [B]; None: no dropout
Product = Callable[[Array, Array], Array]  # x [..., K] and w [K, M] -> [..., M], linear in both


def leaf_type(cls: type) -> type:
    """Make a class a pytree node, with its annotated fields.

    Raises:
        TypeError: a field is not declared (`base`, `trained`, `setting`, `packed`, `fixed`).
    """
    cls = dataclasses.dataclass(cls)
    for f in dataclasses.fields(cls):
        if "field" not in f.metadata and not f.metadata.get("static"):
            raise TypeError(f"{cls.__name__}.{f.name}: declare it with base, trained, setting, packed or fixed.")
    return jax.tree_util.register_dataclass(cls)


def _declared(field: Field, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"field": field})


def base() -> Any:
    """Declare the base of an adapter: an array [*L, K, N], or another leaf. It is frozen."""
    return _declared(Field(FROZEN, "K N"))


def trained(axes: str, default: Any = dataclasses.MISSING, **more: Any) -> Any:
    """Declare a trained field; `axes` and `more` are fields of `Field`. A `default` of None: it is optional."""
    return _declared(Field(TRAIN, axes, **more), default)


def setting(axes: str = "", default: Any = dataclasses.MISSING) -> Any:
    """Declare a value that is not trained, is no parameter, and may differ between members of a sweep."""
    return _declared(Field(MEMBER, axes, parameters=0), default)


def packed(axes: str, parameters: int = 0) -> Any:
    """Declare a part of a frozen matrix; `parameters` in an entry."""
    return _declared(Field(FROZEN, axes, parameters=parameters))


def fixed() -> Any:
    """Declare a static field, which is part of a compiled program's key."""
    return dataclasses.field(metadata={"static": True})


class Weight(Node):
    """The interface of a leaf type. `w` is a plain array or another `Weight`."""

    def dot(self, x: Array, keys: Keys, product: Product) -> Array:
        """x [..., K] -> [..., N]; `product(x, w)` multiplies x by any w [K, M], as the model does."""
        raise NotImplementedError

    def transposed_dot(self, x: Array, product: Product) -> Array:
        """x [..., N] -> [..., K], times the transposed matrix that `merge` gives."""
        raise NotImplementedError

    def grouped_dot(self, rows: Array, sizes: Array) -> Array:
        """rows [N, K] -> [N, M] by matrices [E, K, M] of experts; see `grouped.grouped_dot`."""
        raise NotImplementedError

    def embed(self, ids: Array) -> Array:
        """ids i32[...] -> rows [..., D] of a table [V, D]."""
        raise NotImplementedError

    def attend(self, x: Array) -> Array:
        """x [..., D] -> [..., V] against a table [V, D]: the tied output head."""
        raise NotImplementedError

    def merge(self) -> Array:
        """The plain array [*L, K, N] that this leaf stands for, computed in float32, in the base's dtype."""
        raise NotImplementedError

    def merge_beside(self, module: Mapping[str, Any]) -> Mapping[str, Any]:
        """What else merging changes in the module whose kernel this leaf is, and the leaf that is left to merge."""
        return {}

    def check_merge(self) -> None:
        """Raise a `UserError` if no plain array can stand for this leaf."""


class Adapter(Weight):
    """A leaf with trained fields beside a frozen base, the field `w` of subclasses.

    One that can skip layers of a stack has a setting `scale` f32[*L], which is 0 for them.
    """

    def mask(self) -> "Adapter":
        """The leaf's mask: the role of each field that is not None."""
        return dataclasses.replace(self, **{n: filled(getattr(self, n), f.role) for n, f in self.fields().items()})

    def layers_adapted(self):
        return getattr(self, "scale", None)

    def used(self) -> np.ndarray | None:
        """bool[*L, r]: which components of a low-rank update are more than padding; None: it has no rank."""
        return None


@leaf_type
class ShapedWeight(Weight):
    """A leaf of a foreign model, whose array is a matrix in another shape; `jaxtune.adapt` unwraps it.

    Attributes:
        leaf: the leaf of the matrix [*L, K, N].
        layers, inputs, outputs: the array's axes that make *L, K and N, each in order.
        shape: the array's.
    """

    leaf: Any = base()
    layers: tuple[int, ...] = fixed()
    inputs: tuple[int, ...] = fixed()
    outputs: tuple[int, ...] = fixed()
    shape: tuple[int, ...] = fixed()

    def restore(self, matrix: Array) -> Array:
        """The foreign array of a matrix [*L, K, N]."""
        order = (*self.layers, *self.inputs, *self.outputs)
        return jnp.transpose(matrix.reshape([self.shape[axis] for axis in order]), np.argsort(order))

    def merge(self):
        return self.restore(merge_leaf(self.leaf))


@partial(jax.tree_util.register_dataclass, data_fields=["part"], meta_fields=["axis", "over", "beside"])
@dataclasses.dataclass(frozen=True)
class Sharded:
    """A device's part of an array within `shard_map`. A layer gathers it when it reads its parameters.

    Attributes:
        part: the part.
        axis: which is split, counted from the last, -1; so layer axes may come and go.
        over: the mesh's axis.
        beside: (another axis of the array, counted likewise, the mesh's axis over which XLA splits it); None: there is
            none.
    """

    part: Array
    axis: int
    over: str
    beside: tuple[int, str] | None = None

    def whole(self) -> Array:
        """The array. Its gradient is summed over the devices, and each gets its part."""

        def gather(part):
            return jax.lax.all_gather(part, self.over, axis=part.ndim + self.axis, tiled=True)

        if self.beside is None:
            return gather(self.part)
        # Left to itself, XLA's partitioner gathers the part along that axis, too, before it gathers along this one.
        axis, over = self.beside
        spec = jax.sharding.PartitionSpec(*[None] * (self.part.ndim + axis), over)
        return jax.shard_map(gather, in_specs=spec, out_specs=spec, axis_names={over}, check_vma=False)(self.part)


def is_sharded(x: Any) -> bool:
    """Whether `x` is a part of an array."""
    return isinstance(x, Sharded)


def gathered(tree: Any) -> Any:
    """Return a tree whose `Sharded` arrays are whole."""
    return jax.tree.map(lambda x: x.whole() if is_sharded(x) else x, tree, is_leaf=is_sharded)


def is_weight(x: Any) -> bool:
    """Whether `x` is a polymorphic leaf rather than a plain array."""
    return isinstance(x, Weight)


def rebuilt(product: Callable[[Array, Any], Array], x: Array, w: Weight) -> Array:
    """A product with a frozen packed weight; the backward pass keeps the packed form and unpacks it again."""
    return jax.checkpoint(product)(x, jax.lax.stop_gradient(w))


def matmul(x: Array, w: Array) -> Array:
    """x [..., K] times w [K, N], as one matrix product.

    With the leading axes kept, XLA's CPU backend transposes both operands of the weight's gradient, which costs several
    times the product itself.
    """
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def dot(x: Array, w: Array | Weight, keys: Keys = None, product: Product = matmul) -> Array:
    """x [..., K] times w [K, N] in x's dtype -> [..., N]. `keys` [B], one a row of x, switch dropout on."""
    return w.dot(x, keys, product) if is_weight(w) else product(x, w.astype(x.dtype))


def grouped_dot(rows: Array, w: Array | Weight, sizes: Array) -> Array:
    """rows [N, K] times w [E, K, M] in the rows' dtype -> [N, M]: the first sizes[0] rows by w[0], and so on."""
    return w.grouped_dot(rows, sizes) if is_weight(w) else grouped.grouped_dot(rows, w.astype(rows.dtype), sizes)


def frozen_grouped_dot(rows: Array, w: Array | Weight, sizes: Array) -> Array:
    """`grouped_dot` by the frozen base of an adapter."""
    return w.grouped_dot(rows, sizes) if is_weight(w) else grouped.frozen_grouped_dot(rows, w.astype(rows.dtype), sizes)


def transposed_dot(x: Array, w: Array | Weight, product: Product = matmul) -> Array:
    """x [..., N] times the transpose of w [K, N] -> [..., K]."""
    return w.transposed_dot(x, product) if is_weight(w) else product(x, w.astype(x.dtype).T)


def embed(ids: Array, w: Array | Weight) -> Array:
    """Rows of the table w [V, D] for ids i32[...] -> [..., D]."""
    return w.embed(ids) if is_weight(w) else w[ids]


def attend(x: Array, w: Array | Weight) -> Array:
    """x [..., D] times the transposed table w [V, D] -> [..., V]."""
    return w.attend(x) if is_weight(w) else x @ w.astype(x.dtype).T


def merge_leaf(w: Array | Weight) -> Array:
    """The plain array that a leaf represents."""
    return w.merge() if is_weight(w) else w


def plain(w: Array | Weight) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the array that a leaf represents; nothing is computed."""
    if isinstance(w, jax.Array | jax.ShapeDtypeStruct):  # most leaves; tracing costs a thousand times as much
        return jax.ShapeDtypeStruct(w.shape, w.dtype)
    return jax.eval_shape(merge_leaf, w)


def merge(params: Any) -> Any:
    """Return `params` with every polymorphic leaf replaced by the plain array that it represents.

    Raises:
        UserError: a soft prompt, which no plain model can hold.
    """
    return map_weights(merge_leaf, mergeable(params))


def mergeable(params: Any) -> Any:
    """Prepare for merging leaf by leaf: a leaf that changes more of its module than itself does so here."""
    if is_weight(params):
        params.check_merge()
    if not isinstance(params, Mapping):
        return params
    out = {name: mergeable(child) for name, child in params.items()}
    kernel = out.get("kernel")
    return {**out, **kernel.merge_beside(out)} if is_weight(kernel) else out


def column_norm(w: Array | Weight) -> Array:
    """Euclidean norms f32[*L, N] of the columns of [*L, K, N]."""
    return jnp.sqrt(jnp.square(merge_leaf(w).astype(jnp.float32)).sum(-2))


def table_rows(w: Array | Weight) -> int:
    """V of a table [V, D]."""
    return plain(w).shape[0]


def map_weights(fn: Callable[[Any], Any], params: Any) -> Any:
    """Map over leaves; a polymorphic leaf counts as one."""
    return jax.tree.map(fn, params, is_leaf=is_weight)


def map_paths(fn: Callable[[str, Any], Any], params: Any) -> Any:
    """Map fn("a/b/c", leaf), a polymorphic leaf as one."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_str(path), leaf), params, is_leaf=is_weight)


def weights_by_path(params: Any) -> dict[str, Any]:
    """Leaves by path "a/b/c", a polymorphic leaf as one."""
    return {path_str(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)[0]}


def in_float32(params: Any, mask: Any) -> tuple[Any, Any]:
    """Return `(params, mask)` with trained parameters cast to float32.

    Raises:
        UserError: a quantised parameter, or none, would be trained.
    """
    roles = weights_by_path(mask)
    for path, leaf in weights_by_path(params).items():
        if is_weight(leaf) and not isinstance(leaf, Adapter) and TRAIN in jax.tree.leaves(roles[path]):
            raise UserError(f"{path}: a quantised parameter cannot be trained; load the base unquantised or use LoRA.")
    if TRAIN not in jax.tree.leaves(mask):
        raise UserError("Nothing is left to train: no parameter was chosen.")
    return jax.tree.map(lambda p, m: p.astype(jnp.float32) if m is TRAIN else p, params, mask), mask


def row_keys(key: Array, row: Array) -> Array:
    """One key for each global row: key, row i32[B] -> keys [B]. A row's noise does not depend on how rows are split."""
    return jax.vmap(partial(jax.random.fold_in, key))(row)


def fold(keys: Keys, site: int | Array | str) -> Keys:
    """Derive keys [B] for one place in the model: a layer's index or a module's name."""
    if keys is None:
        return None
    data = zlib.crc32(site.encode()) if isinstance(site, str) else site
    return jax.vmap(lambda k: jax.random.fold_in(k, data))(keys)


def drop(x: Array, rate: Array | float, keys: Array) -> Array:
    """Inverted dropout (Srivastava et al. 2014) of x [B, ...] with one key a row."""
    keep = 1.0 - rate
    mask = checkpoint_name(jax.vmap(lambda k: jax.random.bernoulli(k, keep, x.shape[1:]))(keys), "dropout")
    # A rate of 1 would divide by zero; every entry is dropped then, whatever the divisor.
    return jnp.where(mask, x / jnp.maximum(keep, 1e-6).astype(x.dtype), 0).astype(x.dtype)
