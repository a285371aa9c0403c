"""Quantised leaves for a frozen base: NF4 with double quantisation, MXFP4, int8, fp8, stored or multiplied.

They sit under a `LoraWeight` (QLoRA, Dettmers et al. 2023, arXiv:2305.14314). A product builds the plain matrix of one
layer in x's dtype, multiplies, and drops it; the backward pass builds it again.
"""

import functools
import re
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError, nearest
from jaxtune.tree import PyTree, flatten, path_str
from jaxtune.weights import grouped
from jaxtune.weights.foreign import MatrixLayout, matrices
from jaxtune.weights.leaf import Adapter, Array, Weight, leaf_type, matmul, packed, rebuilt, weights_by_path

BLOCK = 64  # weights that share an absolute maximum
CONSTANTS = 256  # absolute maxima that share a scale


def _nf4() -> np.ndarray:
    """The 16 values of NormalFloat4: quantiles of N(0, 1) with an exact 0, scaled to [-1, 1] (section 3)."""
    quantile = NormalDist().inv_cdf
    offset = 0.9677083  # the mean of 1 - 1/32 and 1 - 1/30
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.array(sorted([*below, 0.0, *above]))
    return (values / values[-1]).astype(np.float32)


NF4 = _nf4()


def _share(size: int, most: int, even: bool = False) -> int:
    """The largest divisor of `size` that is at most `most`."""
    return next(n for n in range(min(size, most), 0, -1) if size % n == 0 and not (even and n % 2))


class Packed(Weight):
    """A frozen leaf in fewer bits than its numbers need."""

    def grouped_dot(self, rows, sizes):
        # One layer's experts are unpacked for the product, and again backward.
        def product(rows, w):
            return grouped.frozen_grouped_dot(rows, w.merge().astype(rows.dtype), sizes)

        return rebuilt(product, rows, self)


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


class Codes(Packed):
    """A packed leaf whose products build its plain matrix, one layer's at a time."""

    def dense(self, dtype: Any) -> jax.Array:
        """The plain array [*L, K, N]."""
        raise NotImplementedError

    def dot(self, x, keys, product):
        return rebuilt(lambda x, w: product(x, w.dense(x.dtype)), x, self)

    def transposed_dot(self, x, product):
        return rebuilt(lambda x, w: product(x, w.dense(x.dtype).T), x, self)

    def embed(self, ids):
        return self.dense(jnp.float32)[ids]

    def attend(self, x):
        return self.transposed_dot(x, matmul)

    def merge(self):
        return self.dense(jnp.float32)


@leaf_type
class Nf4Weight(Codes):
    """4-bit NormalFloat with double quantisation (arXiv:2305.14314, equations 4 to 6): 4.13 bits a weight.

    Blocks of 64 weights of one output column (fewer, where K is no multiple) share an absolute maximum; 256 of these
    share a scale, after subtracting their mean. They are int8 here; the paper has fp8.

    Attributes:
        codes: uint8[*L, K / 2, N]; rows 2i and 2i + 1 of the matrix in the high and the low half of a byte.
        absmax: int8[*L, K / block, N].
        scale: f32[*L, K / block, N / group].
        offset: f32[*L].
    """

    codes: jax.Array = packed("K/2 N", parameters=2)
    absmax: jax.Array = packed("K/block N")
    scale: jax.Array = packed("K/block N/group")
    offset: jax.Array = packed("")

    @classmethod
    def quantize(cls, w: jax.Array) -> "Nf4Weight":
        """Round a plain array [*L, K, N].

        Raises:
            ValueError: K is odd.
        """
        *layers, k, n = w.shape
        if k % 2:
            raise ValueError(f"NF4 packs two rows of a matrix in a byte; this one has {k}.")
        block, group = _share(k, BLOCK, even=True), _share(n, CONSTANTS)
        blocks = w.astype(jnp.float32).reshape(*layers, k // block, block, n)
        absmax = jnp.max(jnp.abs(blocks), axis=-2)
        offset = absmax.mean((-2, -1))
        centred = (absmax - offset[..., None, None]).reshape(*layers, k // block, n // group, group)
        scale = jnp.maximum(jnp.max(jnp.abs(centred), axis=-1), jnp.finfo(jnp.float32).tiny) / 127.0
        rounded = jnp.round(centred / scale[..., None]).astype(jnp.int8).reshape(absmax.shape)
        known = cls(None, rounded, scale, offset)._absmax()[..., None, :]
        unit = blocks / jnp.where(known > 0, known, 1.0)
        codes = jnp.searchsorted(jnp.asarray((NF4[1:] + NF4[:-1]) / 2), unit).astype(jnp.uint8)
        pairs = codes.reshape(*layers, k // 2, 2, n)
        return cls(pairs[..., 0, :] << 4 | pairs[..., 1, :], rounded, scale, offset)

    def _absmax(self) -> jax.Array:
        """f32[*L, K / block, N]."""
        *lead, blocks, _ = self.absmax.shape
        grouped = self.absmax.reshape(*lead, blocks, self.scale.shape[-1], -1).astype(jnp.float32)
        return (grouped * self.scale[..., None]).reshape(self.absmax.shape) + self.offset[..., None, None]

    def dense(self, dtype):
        *lead, half, n = self.codes.shape
        codes = jnp.stack([self.codes >> 4, self.codes & 15], axis=-2)
        values = jnp.asarray(NF4)[codes].reshape(*lead, self.absmax.shape[-2], -1, n)
        return (values * self._absmax()[..., None, :]).astype(dtype).reshape(*lead, 2 * half, n)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # with a sign, the 16 values of 4-bit floats
MX_BLOCK = 32  # weights that share a power of two


@leaf_type
class Mxfp4Weight(Codes):
    """4-bit floats; 32 of an output column share a power of two (OCP Microscaling Formats 1.0, section 5.3), 4.25 bits.

    Weights that were published in MXFP4, as gpt-oss's experts are, stay what they are. Blocks are shorter where K is no
    multiple of 32.

    Attributes:
        codes: uint8[*L, K / 2, N]; rows 2i and 2i + 1 of the matrix in the low and the high half of a byte.
        exponent: int8[*L, K / block, N].
    """

    codes: jax.Array = packed("K/2 N", parameters=2)
    exponent: jax.Array = packed("K/block N")

    @classmethod
    def quantize(cls, w: jax.Array) -> "Mxfp4Weight":
        """Round a plain array [*L, K, N] of an even K, as section 6.3 of the standard does."""
        *layers, k, n = w.shape
        block = _share(k, MX_BLOCK, even=True)
        blocks = w.astype(jnp.float32).reshape(*layers, k // block, block, n)
        exponent = jnp.clip(
            jnp.frexp(jnp.abs(blocks).max(-2))[1] - 3, -127, 127
        )  # the largest is from 4 to 8, at most 6
        unit = jnp.ldexp(blocks, -exponent[..., None, :])
        codes = jnp.searchsorted(jnp.asarray((E2M1[1:] + E2M1[:-1]) / 2), jnp.abs(unit)).astype(jnp.uint8)
        pairs = (codes | jnp.where(unit < 0, 8, 0).astype(jnp.uint8)).reshape(*layers, k // 2, 2, n)
        return cls(pairs[..., 1, :] << 4 | pairs[..., 0, :], exponent.astype(jnp.int8))

    def dense(self, dtype):
        *lead, half, n = self.codes.shape
        codes = jnp.stack([self.codes & 15, self.codes >> 4], axis=-2)
        values = jnp.asarray(np.concatenate([E2M1, -E2M1]))[codes].reshape(*lead, self.exponent.shape[-2], -1, n)
        scaled = jnp.ldexp(values, self.exponent[..., None, :].astype(jnp.int32))
        return scaled.astype(dtype).reshape(*lead, 2 * half, n)


@leaf_type
class Fp8Weight(QuantWeight):
    """fp8 (e4m3) whose products are in fp8 too: x is rounded as well, with one scale a row (a token).

    y = (q(x) q(w)) s_x s_w, and the gradient by x is that product with the transposed matrix. Sums are in float32. In a
    foreign model's own products the matrix is only stored in fp8.
    """

    def dot(self, x, keys, product):
        if product is not matmul:
            return super().dot(x, keys, product)
        return _fp8_dot(x, *jax.lax.stop_gradient((self.q, self.scale)))


@jax.custom_vjp
def _fp8_dot(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., K] times q [K, N] with scale f32[1, N] -> [..., N]."""
    return (_by_rows(x, q, 0) * scale[0]).astype(x.dtype)


def _by_rows(x: jax.Array, q: jax.Array, axis: int) -> jax.Array:
    """x [..., K], each row rounded to e4m3, summed over `axis` of q: f32[..., N]."""
    x = x.astype(jnp.float32)
    largest = float(jnp.finfo(q.dtype).max)
    unit = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), jnp.finfo(jnp.float32).tiny * largest) / largest
    codes = (x / unit).astype(q.dtype).reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(codes, q, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
    return y.reshape(*x.shape[:-1], -1) * unit


def _fp8_dot_forward(x, q, scale):
    return _fp8_dot(x, q, scale), (q, scale)


def _fp8_dot_backward(kept, grad):
    q, scale = kept
    return _by_rows(grad.astype(jnp.float32) * scale[0], q, 1).astype(grad.dtype), None, None


_fp8_dot.defvjp(_fp8_dot_forward, _fp8_dot_backward)


KINDS: dict[str, Callable[[jax.Array], Weight]] = {
    "nf4": Nf4Weight.quantize,
    "int8": QuantWeight.quantize,
    "fp8": lambda w: QuantWeight.quantize(w, jnp.float8_e4m3fn),
    "fp8_matmul": lambda w: Fp8Weight.quantize(w, jnp.float8_e4m3fn),
    "mxfp4": Mxfp4Weight.quantize,
}

# Linear modules and experts of jaxtune's decoders and encoders; tables, heads and routers stay as they are.
BODY = r"(encoder/)?segment_\d+/.*(kernel|_experts)"
PATTERNS = {"mxfp4": r"segment_\d+/.*_experts"}  # the kinds that by default are for less


def packs(params: PyTree, kind: str, pattern: str | None = None) -> dict[str, Callable[[jax.Array], Weight]]:
    """Return {path: quantising function} for the matrices of a tree (which may be abstract) whose paths match a regex.

    Raises:
        UserError: the kind is unknown, nothing matches, or a matrix has an odd number of rows (NF4).
    """
    if kind not in KINDS:
        raise UserError(f"quantization={kind!r} is not one of {', '.join(map(repr, KINDS))}.{nearest(kind, KINDS)}")
    pattern = PATTERNS.get(kind, BODY) if pattern is None else pattern
    leaves = {path: leaf for path, leaf in flatten(params).items() if len(leaf.shape) >= 2}
    chosen = [path for path in leaves if re.fullmatch(pattern, path)]
    if not chosen and pattern == PATTERNS.get(kind):
        raise UserError(f"quantization={kind!r} is for experts, and this model has none; use 'nf4'.")
    if not chosen:
        raise UserError(f"No matrix is named {pattern!r}; there are {', '.join(sorted(leaves)[:8])}, ...")
    for path in chosen:
        if kind in ("nf4", "mxfp4") and leaves[path].shape[-2] % 2:
            raise UserError(
                f"{path} has {leaves[path].shape[-2]} rows; {kind} packs two in a byte. Use int8, or leave it out."
            )
    return dict.fromkeys(chosen, KINDS[kind])


def quantize(
    params: PyTree, kind: str, pattern: str | None = None, layouts: Mapping[str, MatrixLayout] | None = None
) -> PyTree:
    """Quantise the matrices of a tree.

    Args:
        params: plain arrays.
        kind: "nf4", "int8", "fp8" (e4m3, for storage), "fp8_matmul" (products in fp8 too) or "mxfp4" (experts).
        pattern: regex over whole paths "a/b/kernel"; by default the body of our own models, or its experts (mxfp4).
        layouts: how the arrays of a foreign model are matrices, from `adapt(apply_fn).layouts`.

    Raises:
        UserError: as `packs`.
    """
    chosen = {path: layouts[path] for path in layouts if re.fullmatch(pattern or BODY, path)} if layouts else {}
    params, restore = matrices(params, chosen)
    pack = packs(params, kind, pattern)

    def quantized(path, leaf):
        path = path_str(path)
        return _jitted(pack[path])(leaf) if path in pack else leaf

    return restore(jax.tree_util.tree_map_with_path(quantized, params))


def rounding(params: PyTree, published: PyTree) -> float:
    """Return the relative error of packed matrices: the root mean square of the difference over that of the originals.

    Args:
        params: leaves may be adapters over packed bases.
        published: the same tree, plain.
    """
    plain, lost, all_ = weights_by_path(published), 0.0, 0.0
    for path, leaf in weights_by_path(params).items():
        base = leaf.w if isinstance(leaf, Adapter) else leaf
        if isinstance(base, Packed):
            w = plain[path].astype(jnp.float32)
            lost += float(jnp.square(base.merge() - w).sum())
            all_ += float(jnp.square(w).sum())
    return (lost / all_) ** 0.5


_jitted = functools.cache(jax.jit)
