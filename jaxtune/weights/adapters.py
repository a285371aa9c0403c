"""The leaf types of the methods: each is a frozen base and the trained fields beside it.

`jaxtune.methods` puts them into a tree; what a leaf type is, and how a model calls it, is in `jaxtune.weights.leaf`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxtune.errors import UserError
from jaxtune.tree import Stored
from jaxtune.weights import grouped
from jaxtune.weights.leaf import (
    Adapter,
    Array,
    attend,
    base,
    column_norm,
    dot,
    drop,
    embed,
    fixed,
    frozen_grouped_dot,
    is_weight,
    leaf_type,
    matmul,
    merge_leaf,
    plain,
    setting,
    table_rows,
    trained,
    transposed_dot,
)


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

    def grouped_dot(self, rows, sizes):
        a, b = self.factors()
        b = b * self.scale[:, None, None]  # of each expert
        low = checkpoint_name(grouped.grouped_dot(rows, a.astype(rows.dtype), sizes), "low")
        return frozen_grouped_dot(rows, self.w, sizes) + grouped.grouped_dot(low, b.astype(low.dtype), sizes)

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

    def merge_beside(self, module):
        if self.bias is None:
            return {}
        bias = (module["bias"].astype(jnp.float32) * self._vector(self.out)).astype(module["bias"].dtype)
        return {"bias": bias, "kernel": dataclasses.replace(self, bias=None)}


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

    def check_merge(self):
        raise UserError(
            "A soft prompt cannot be merged: no row of the model's table is the prompt. Write the adapter alone."
        )


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


def virtual_tokens(params: Any) -> list[int]:
    """The ids of a tree's soft prompt, to be put before each row; [] if it has none."""
    prompts = [w for w in jax.tree.leaves(params, is_leaf=is_weight) if isinstance(w, PromptWeight)]
    return [table_rows(w.w) + i for w in prompts for i in range(w.prompt.shape[0])]


def _not_padding(a: Array, b: Array) -> np.ndarray:
    """bool[*L, r]: the components of a product [*L, K, r] [*L, r, N] that are not zero on both sides."""
    return np.any(np.asarray(a) != 0, -2) | np.any(np.asarray(b) != 0, -1)
