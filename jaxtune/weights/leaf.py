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
from jaxtune.tree import FROZEN, MEMBER, TRAIN, Field, Node, Stored, filled, path_str

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

    def embed(self, ids: Array) -> Array:
        """ids i32[...] -> rows [..., D] of a table [V, D]."""
        raise NotImplementedError

    def attend(self, x: Array) -> Array:
        """x [..., D] -> [..., V] against a table [V, D]: the tied output head."""
        raise NotImplementedError

    def merge(self) -> Array:
        """The plain array [*L, K, N] that this leaf stands for, computed in float32, in the base's dtype."""
        raise NotImplementedError


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
class LoraWeight(Adapter):
    """Low-rank adaptation, y = x w + scale * dropout(x) a b (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    Layers of lower rank than `r` have zeros in the surplus columns of `a` and rows of `b`, a fixed point of
    training.

    Attributes:
        w: the base, [*L, K, N], an array or a QuantWeight.
        a: [*L, K, r].
        b: [*L, r, N], zeros at initialisation, so that step 0 is the base model.
        scale: f32[*L], alpha / r (or alpha / sqrt(r)); 0 marks a layer that is not adapted.
        dropout: f32[*L], the rate; None compiles no dropout at all.
        a0, b0: the initial `a` and `b` if their product is not zero (PiSSA); it is subtracted, so that step 0 is
            the base model and `w` need not change. None: nothing.
    """

    w: Any = base()
    a: Array = trained("K r", group="lora_A", stored=Stored("{}.lora_A.weight", "r K", "{}.lora_embedding_A"))
    b: Array = trained(
        "r N", group="lora_B", faster=True, stored=Stored("{}.lora_B.weight", "N r", "{}.lora_embedding_B")
    )
    scale: Array = setting()
    dropout: Array | None = setting(default=None)
    a0: Array | None = setting("K r", default=None)
    b0: Array | None = setting("r N", default=None)

    def used(self):
        return _not_padding(self.a, self.b)

    def factors(self) -> tuple[Array, Array]:
        """`a` [*L, K, R] and `b` [*L, R, N] whose product is the update, before the scale."""
        if self.a0 is None:
            return self.a, self.b
        return jnp.concatenate([self.a, self.a0], axis=-1), jnp.concatenate([self.b, -self.b0], axis=-2)

    def dot(self, x, keys, product):
        h = x if keys is None or self.dropout is None else drop(x, self.dropout, keys)
        a, b = self.factors()
        return dot(x, self.w, product=product) + self._update(product(h, a.astype(x.dtype)), b)

    def transposed_dot(self, x, product):
        a, b = self.factors()
        return transposed_dot(x, self.w, product) + self._update(product(x, b.T.astype(x.dtype)), a.T)

    def _update(self, low: Array, up: Array) -> Array:
        """scale * low up. The scale multiplies the narrow factor of width r, forward and backward, not the output."""
        low = checkpoint_name(low, "low")
        return matmul(low * self.scale.astype(low.dtype), up.astype(low.dtype))

    def embed(self, ids):
        base = embed(ids, self.w)
        a, b = self.factors()
        delta = a[ids].astype(base.dtype) @ b.astype(base.dtype)
        return base + delta * self.scale.astype(base.dtype)

    def attend(self, x):
        # In peft a tied head multiplies by the base table only; this gives the same results.
        return attend(x, self.w)

    def merge(self):
        return self._dense().astype(plain(self.w).dtype)

    def _dense(self) -> Array:
        a, b = (f.astype(jnp.float32) for f in self.factors())
        delta = jnp.einsum("...kr,...rn->...kn", a, b)
        return merge_leaf(self.w).astype(jnp.float32) + delta * self.scale[..., None, None]


@leaf_type
class DoraWeight(LoraWeight):
    """Weight-decomposed LoRA, y = x V * m / ||V||, V = w + scale a b (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    The norm of each column of V counts as a constant in the gradient (their eq. 11). Dropout acts on the low-rank path
    only.

    Attributes:
        magnitude: m, f32[*L, N], the column norms of `w` at initialisation. Where `scale` is 0 it has no effect.
    """

    magnitude: Array = trained("N", default=None, stored=Stored("{}.lora_magnitude_vector", "N"))

    def dot(self, x, keys, product):
        y = super().dot(x, keys, product)
        return y * self._gain(y.dtype)

    def transposed_dot(self, x, product):
        return super().transposed_dot(x * self._gain(x.dtype), product)

    def embed(self, ids):
        base = super().embed(ids)
        return base * self._gain(base.dtype)

    def _gain(self, dtype) -> Array:
        """m / ||w + scale a b|| of one layer, [N], from products of rank r: the dense sum is never built."""
        w, a, b, scale = jax.lax.stop_gradient((self.w, *self.factors(), self.scale))
        cross = dot(a.T.astype(dtype), w).astype(jnp.float32)  # [R, N]
        square = (
            jnp.square(merge_leaf(w).astype(jnp.float32)).sum(0)
            + 2 * scale * (cross * b).sum(0)
            + scale**2 * (((a.T @ a) @ b) * b).sum(0)
        )
        norm = jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))
        return jnp.where(scale != 0, self.magnitude / norm, 1.0).astype(dtype)

    def _dense(self):
        dense = super()._dense()
        gain = jnp.where(self.scale[..., None] != 0, self.magnitude / column_norm(dense), 1.0)
        return dense * gain[..., None, :]


class DenseUpdate(Adapter):
    """An adapter that can be written as an update of its base `w`, entry by entry."""

    def _delta(self) -> Array:
        """The update f32[*L, K, N]."""
        raise NotImplementedError

    def transposed_dot(self, x, product):
        return transposed_dot(x, self.w, product) + product(x, self._delta().T.astype(x.dtype))

    def merge(self):
        return (merge_leaf(self.w).astype(jnp.float32) + self._delta()).astype(plain(self.w).dtype)


@leaf_type
class HiraWeight(DenseUpdate):
    """High-rank adaptation by a Hadamard product, y = x w + dropout(x) (w * a b) (Huang et al. 2025, HiRA, ICLR).

    Attributes:
        w: the base, [*L, K, N], an array or a QuantWeight; a product builds one layer's update, as wide as `w`.
        a: [*L, K, r].
        b: [*L, r, N], zeros at initialisation, so that step 0 is the base model.
        scale: f32[*L], 1; 0 marks a layer that is not adapted.
        dropout: f32[*L], the rate; None compiles no dropout at all.
    """

    w: Any = base()
    a: Array = trained("K r", group="hira_A", stored=Stored("{}.hira_A", "r K"))
    b: Array = trained("r N", group="hira_B", faster=True, stored=Stored("{}.hira_B", "N r"))
    scale: Array = setting()
    dropout: Array | None = setting(default=None)

    def used(self):
        return _not_padding(self.a, self.b)

    def dot(self, x, keys, product):
        h = x if keys is None or self.dropout is None else drop(x, self.dropout, keys)
        # The backward pass builds the update again: kept, it would be a second copy of the base.
        update = jax.checkpoint(lambda h, leaf: product(h, leaf._delta().astype(h.dtype)))
        return dot(x, self.w, product=product) + update(h, self)

    def _delta(self) -> Array:
        """scale * w * a b, f32[*L, K, N]."""
        low = self.a.astype(jnp.float32) * self.scale[..., None, None]
        w = jax.lax.stop_gradient(merge_leaf(self.w)).astype(jnp.float32)
        return w * jnp.einsum("...kr,...rn->...kn", low, self.b.astype(jnp.float32))


@leaf_type
class MissWeight(DenseUpdate):
    """Matrix shard sharing, y = x w + scale * s d, s the sum of dropout(x)'s shards of r numbers (arXiv:2409.15371).

    The last shard is filled up with zeros. So the update of row k of `w` is row k mod r of `d`.

    Attributes:
        w: the base, [*L, K, N].
        d: [*L, r, N], zeros at initialisation, so that step 0 is the base model.
        scale: f32[*L], 1; 0 marks a layer that is not adapted.
        dropout: f32[*L], the rate; None compiles no dropout at all.
    """

    w: Any = base()
    d: Array = trained("r N", group="miss_block", stored=Stored("{}.miss_block", "r N"))
    scale: Array = setting()
    dropout: Array | None = setting(default=None)

    def used(self):
        return np.ones(self.d.shape[:-1], bool)

    def dot(self, x, keys, product):
        h = x if keys is None or self.dropout is None else drop(x, self.dropout, keys)
        r = self.d.shape[-2]
        h = jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(0, -h.shape[-1] % r)])
        shards = h.reshape(*h.shape[:-1], -1, r).sum(-2) * self.scale.astype(x.dtype)
        return dot(x, self.w, product=product) + matmul(shards, self.d.astype(x.dtype))

    def _delta(self) -> Array:
        """The update f32[*L, K, N]."""
        d = self.d.astype(jnp.float32) * self.scale[..., None, None]
        return d[..., np.arange(plain(self.w).shape[-2]) % d.shape[-2], :]


@leaf_type
class Ia3Weight(Adapter):
    """Rescaled activations, (IA)^3 (Liu et al. 2022, arXiv:2205.05638, section 3.3), in peft's form.

    It has one of the vectors: y = (x w) * out, or y = (x * inp) w in a feed-forward module.

    Attributes:
        w: the base, [*L, K, N].
        scale: f32[*L], 1; 0 marks a layer that is not adapted.
        out: [*L, N], ones at initialisation, or None.
        inp: [*L, K], ones at initialisation, or None.
        bias: [*L, N], the module's bias, which `out` scales as well; the module itself adds it unscaled, and it is
            counted and frozen there. None: no bias.
    """

    w: Any = base()
    scale: Array = setting()
    out: Array | None = trained("N", default=None, stored=Stored("{}.ia3_l", "N 1"))
    inp: Array | None = trained("K", default=None, stored=Stored("{}.ia3_l", "1 K"))
    bias: Array | None = setting("N", default=None)

    def _vector(self, vector: Array) -> Array:
        return jnp.where(self.scale[..., None] != 0, vector, 1.0)

    def dot(self, x, keys, product):
        if self.inp is not None:
            return dot(x * self._vector(self.inp).astype(x.dtype), self.w, product=product)
        y = dot(x, self.w, product=product)
        out = self._vector(self.out).astype(y.dtype)
        return y * out if self.bias is None else y * out + self.bias.astype(y.dtype) * (out - 1)

    def transposed_dot(self, x, product):
        if self.inp is not None:
            y = transposed_dot(x, self.w, product)
            return y * self._vector(self.inp).astype(y.dtype)
        return transposed_dot(x * self._vector(self.out).astype(x.dtype), self.w, product)

    def merge(self):
        base = merge_leaf(self.w)
        vector = self._vector(self.out)[..., None, :] if self.inp is None else self._vector(self.inp)[..., None]
        return (base.astype(jnp.float32) * vector).astype(base.dtype)


@leaf_type
class PromptWeight(Adapter):
    """An embedding table with a soft prompt (Lester et al. 2021, arXiv:2104.08691).

    Virtual token i has id V + i: the caller puts these ids before a row, and the model needs no change.

    Attributes:
        w: the table, [V, D].
        prompt: [P, D].
    """

    w: Any = base()
    prompt: Array = trained("P N", stored=Stored("prompt_embeddings", "P N"))

    def embed(self, ids):
        rows = table_rows(self.w)
        base = embed(jnp.minimum(ids, rows - 1), self.w)
        virtual = self.prompt[jnp.maximum(ids - rows, 0)].astype(base.dtype)
        return jnp.where((ids >= rows)[..., None], virtual, base)

    def attend(self, x):
        return attend(x, self.w)

    def merge(self):
        return merge_leaf(self.w)


@leaf_type
class TokensWeight(Adapter):
    """An embedding table with some trained rows (peft's trainable tokens), which a tied head also uses.

    Attributes:
        w: the table, [V, D].
        rows: [n, D], which replace the table's own.
        ids: which rows these are.
    """

    w: Any = base()
    rows: Array = trained("n N", stored=Stored("{}.token_adapter.trainable_tokens_delta", "n N"))
    ids: tuple[int, ...] = fixed()

    def embed(self, ids):
        base = embed(ids, self.w)
        hits = ids[..., None] == jnp.asarray(self.ids)
        own = self.rows[jnp.argmax(hits, axis=-1)].astype(base.dtype)
        return jnp.where(hits.any(-1, keepdims=True), own, base)

    def attend(self, x):
        return attend(x, self.w).at[..., jnp.asarray(self.ids)].set(x @ self.rows.astype(x.dtype).T)

    def merge(self):
        base = merge_leaf(self.w)
        return base.at[jnp.asarray(self.ids)].set(self.rows.astype(base.dtype))


@leaf_type
class HeadTokensWeight(TokensWeight):
    """An output head with some trained columns, which peft calls trained rows of its matrix.

    Attributes:
        w: the head, [D, V].
        rows: [n, D], which replace the head's own columns.
        ids: which columns these are.
    """

    w: Any = base()
    rows: Array = trained("n K", stored=Stored("{}.token_adapter.trainable_tokens_delta", "n K"))
    ids: tuple[int, ...] = fixed()

    def dot(self, x, keys, product):
        own = product(x, self.rows.T.astype(x.dtype))
        return dot(x, self.w, product=product).at[..., jnp.asarray(self.ids)].set(own)

    def merge(self):
        base = merge_leaf(self.w)
        return base.at[:, jnp.asarray(self.ids)].set(self.rows.T.astype(base.dtype))


class Packed(Weight):
    """A frozen leaf in fewer bits than its numbers need."""


@leaf_type
class QuantWeight(Packed):
    """int8 or fp8 with one scale for each output column (absolute maximum).

    Attributes:
        q: int8 or float8 [*L, K, N].
        scale: f32[*L, 1, N].
    """

    q: Array = packed("K N", parameters=1)
    scale: Array = packed("1 N")

    @classmethod
    def quantize(cls, w: Array, dtype: Any = jnp.int8) -> "QuantWeight":
        """Round a plain array [*L, K, N]; the error of int8 is at most half a scale for each entry."""
        w, whole = w.astype(jnp.float32), jnp.issubdtype(dtype, jnp.integer)
        largest = float((jnp.iinfo if whole else jnp.finfo)(dtype).max)
        scale = jnp.maximum(jnp.max(jnp.abs(w), axis=-2, keepdims=True), jnp.finfo(jnp.float32).tiny) / largest
        unit = w / scale
        return cls((jnp.round(unit) if whole else unit).astype(dtype), scale)

    def dot(self, x, keys, product):
        y = rebuilt(lambda x, w: product(x, w.q.astype(x.dtype)), x, self)
        return y * self.scale[..., 0, :].astype(y.dtype)

    def transposed_dot(self, x, product):
        return rebuilt(lambda x, w: product(x, w.q.T.astype(x.dtype)), x * self.scale[0].astype(x.dtype), self)

    def embed(self, ids):
        return self.q[ids].astype(jnp.float32) * self.scale[0]

    def attend(self, x):
        return self.transposed_dot(x, matmul)

    def merge(self):
        return self.q.astype(jnp.float32) * self.scale


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


@partial(jax.tree_util.register_dataclass, data_fields=["part"], meta_fields=["axis", "over"])
@dataclasses.dataclass(frozen=True)
class Sharded:
    """A device's part of an array within `shard_map`. A layer gathers it when it reads its parameters.

    Attributes:
        part: the part.
        axis: which is split, counted from the last, -1; so layer axes may come and go.
        over: the mesh's axis.
    """

    part: Array
    axis: int
    over: str

    def whole(self) -> Array:
        """The array. Its gradient is summed over the devices, and each gets its part."""
        return jax.lax.all_gather(self.part, self.over, axis=self.part.ndim + self.axis, tiled=True)


def is_sharded(x: Any) -> bool:
    """Whether `x` is a part of an array."""
    return isinstance(x, Sharded)


def gathered(tree: Any) -> Any:
    """Return a tree whose `Sharded` arrays are whole."""
    return jax.tree.map(lambda x: x.whole() if is_sharded(x) else x, tree, is_leaf=is_sharded)


def _not_padding(a: Array, b: Array) -> np.ndarray:
    """bool[*L, r]: the components of a product [*L, K, r] [*L, r, N] that are not zero on both sides."""
    return np.any(np.asarray(a) != 0, -2) | np.any(np.asarray(b) != 0, -1)


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
    return map_weights(merge_leaf, scale_biases(params))


def scale_biases(params: Any) -> Any:
    """Prepare for merging leaf by leaf: multiply each bias that an `Ia3Weight` scales."""
    if not isinstance(params, Mapping):
        if isinstance(params, PromptWeight):
            raise UserError(
                "A soft prompt cannot be merged: no row of the model's table is the prompt. Write the adapter alone."
            )
        return params
    out = {name: scale_biases(child) for name, child in params.items()}
    kernel = out.get("kernel")
    if isinstance(kernel, Ia3Weight) and kernel.bias is not None:
        bias = out["bias"]
        out["bias"] = (bias.astype(jnp.float32) * kernel._vector(kernel.out)).astype(bias.dtype)
        out["kernel"] = dataclasses.replace(kernel, bias=None)
    return out


def column_norm(w: Array | Weight) -> Array:
    """Euclidean norms f32[*L, N] of the columns of [*L, K, N]."""
    return jnp.sqrt(jnp.square(merge_leaf(w).astype(jnp.float32)).sum(-2))


def table_rows(w: Array | Weight) -> int:
    """V of a table [V, D]."""
    return plain(w).shape[0]


def virtual_tokens(params: Any) -> list[int]:
    """The ids of a tree's soft prompt, to be put before each row; [] if it has none."""
    prompts = [w for w in jax.tree.leaves(params, is_leaf=is_weight) if isinstance(w, PromptWeight)]
    return [table_rows(w.w) + i for w in prompts for i in range(w.prompt.shape[0])]


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
