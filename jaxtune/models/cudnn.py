"""cuDNN's fused attention behind one function: rows of one text, padded rows and packed rows, forward and backward.

Rows of one text and padded rows (an encoder's, whose segments mark padding) need compute capability 8.0;
packed rows, given by the lengths and offsets of their segments, need 9.0. If the softmax's statistics are small they
have the output's name, so that a remat policy that keeps the output keeps both, and the forward kernel runs once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from jaxtune.errors import UserError

Array = jax.Array
MOST_SEGMENTS = 32  # of a packed row: the statistics are f32[B * segments, H, T]


class Form(NamedTuple):
    """The static parameters of the kernel.

    Attributes:
        causal: whether a token sees only earlier ones.
        window: how many tokens back it sees, itself included; None: all.
        segments: segments of a packed row at most; 1: rows are padded; 0: no row has padding.
    """

    scale: float
    causal: bool
    window: int | None
    segments: int


class Layout(NamedTuple):
    """The places of the segments in rows.

    Attributes:
        lengths: i32[B, M], -1 where a row has fewer segments; for padded rows i32[B].
        offsets: the first token of each, i32[B, M + 1], likewise -1; for padded rows i32[B, 0].
    """

    lengths: Array
    offsets: Array


def layout(segments: Array, most: int) -> Layout:
    """The layout of rows for the kernel.

    Args:
        segments: i32[B, T], numbered from 1 in order; 0 is padding, at the end.
        most: segments of a row at most; 1: rows are padded.
    """
    if most == 1:
        lengths = (segments > 0).sum(1, dtype=jnp.int32)
        return Layout(lengths, jnp.zeros((len(segments), 0), jnp.int32))
    here = segments[:, None] == jnp.arange(1, most + 1)[:, None]  # [B, M, T]
    lengths = here.sum(-1, dtype=jnp.int32)
    starts = jnp.where(lengths > 0, here.argmax(-1), -1).astype(jnp.int32)
    return Layout(jnp.where(lengths > 0, lengths, -1), jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1))


def capability() -> tuple[int, int]:
    """The compute capability of the first GPU; without a GPU (when planning for one) (8, 0)."""
    found = [d for d in jax.local_devices() if d.platform == "gpu"]
    major, _, minor = str(getattr(found[0], "compute_capability", "8.0") if found else "8.0").partition(".")
    return int(major), int(minor or 0)


def takes(dtype: Any, head_dim: int, form: Form) -> bool:
    """Whether the kernel supports such rows on this machine's GPU."""
    hopper = capability() >= (9, 0)
    return (
        not _without_plan
        and capability() >= (8, 0)
        and dtype in (jnp.bfloat16, jnp.float16)
        and head_dim % 8 == 0
        and head_dim <= (256 if hopper else 128)
        and (form.causal or form.window is None)
        and (form.segments <= 1 or (hopper and form.segments <= MOST_SEGMENTS))
    )


def attend(q: Array, k: Array, v: Array, where: Layout | None, form: Form) -> Array:
    """Attention of q [B, T, H, C] over k, v [B, T, G, C] -> [B, T, H, C]; `where`: None if no row has padding.

    The output is 0 in the padding.
    """
    heads, groups = q.shape[2], k.shape[2]
    if form.segments > 1 and heads != groups:
        # jax up to 0.11.0 scales offsets of keys by the queries' heads (fixed by pull request 39521).
        k, v = (jnp.repeat(x, heads // groups, axis=2) for x in (k, v))
    if where is None:
        where = Layout(jnp.zeros((len(q), 0), jnp.int32), jnp.zeros((len(q), 0), jnp.int32))
    return _attend(form, q, k, v, where)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(form: Form, q: Array, k: Array, v: Array, where: Layout) -> Array:
    return _folded(forward, form)(q, k, v, where)[0]


def _attend_forward(form, q, k, v, where):
    out, statistics = _folded(forward, form)(q, k, v, where)
    out = checkpoint_name(out, "attention")
    # For packed rows they are as large as a layer's activations: the backward pass runs the kernel again.
    statistics = None if form.segments > 1 else checkpoint_name(statistics, "attention")
    return out, (q, k, v, where, out, statistics)


def _attend_backward(form, kept, grad):
    q, k, v, where, out, statistics = kept
    if statistics is None:
        _, statistics = _folded(forward, form)(q, k, v, where)
    return *_folded(backward, form)(q, k, v, where, out, statistics, grad), None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.lru_cache(maxsize=64)
def _folded(kernel: Any, form: Form) -> Any:
    """`kernel(form, ...)` with a batching rule that treats members of a sweep as rows: jax has none for packed rows."""

    @custom_vmap
    def run(*arrays):
        return kernel(form, *arrays)

    @run.def_vmap
    def rule(size, batched, *arrays):
        def fold(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        out = run(*jax.tree.map(fold, arrays, tuple(batched)))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out), jax.tree.map(lambda x: True, out)

    return run


def forward(form: Form, q: Array, k: Array, v: Array, where: Layout) -> tuple[Array, Array]:
    """The kernel: (output [B, T, H, C], statistics f32[B * M, H, T])."""
    kernel = _fused()._dot_product_attention_fwd_p_wrapper
    return tuple(kernel.bind(*_operands(form, q, k, v, where), **_settings(form), is_training=True))


def backward(
    form: Form, q: Array, k: Array, v: Array, where: Layout, out: Array, statistics: Array, grad: Array
) -> tuple[Array, ...]:
    """The kernel of the backward pass: the gradients by q, k and v."""
    operands = (*_operands(form, q, k, v, where), statistics, out, grad)
    return tuple(_fused()._dot_product_attention_bwd_p_wrapper.bind(*operands, **_settings(form)))[:3]


def _fused() -> Any:
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _operands(form: Form, q: Array, k: Array, v: Array, where: Layout) -> tuple[Array, ...]:
    """Query, key, value, bias, lengths and offsets of queries and keys, page tables; zeros [0] for unused ones."""
    none = jnp.zeros(0, q.dtype)
    lengths = where.lengths if form.segments else none
    offsets = where.offsets if form.segments > 1 else none
    return q, k, v, none, lengths, lengths, offsets, offsets, none, none


def _settings(form: Form) -> dict[str, Any]:
    fused = _fused()
    masks = fused.MaskType
    padded = masks.PADDING_CAUSAL if form.causal else masks.PADDING
    return {
        "scale": form.scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": padded if form.segments else (masks.CAUSAL if form.causal else masks.NO_MASK),
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": form.window,
    }


# ------------------------------------------------------------------------------------------------- a trial at the start

_without_plan: list[str] = []  # the kernel's error if it could not run; it is then not used
_PARTS = ("sum of outputs", "gradient by q", "gradient by k", "gradient by v")
NEAR = 2e-2  # of outputs and gradients of size 1 in bfloat16


def trial(reference: Any, head_dim: int, heads: int, groups: int, dtype: Any = jnp.bfloat16) -> str | None:
    """Run the kernel once on rows of one text, padded rows and packed rows, and compare it with `reference` in float32.

    Args:
        reference: (q, k, v, segments or None, form) -> the same attention without the kernel.
        head_dim: channels of a head, as in the model to run.
        heads: of queries.
        groups: heads of keys and values.
        dtype: of activations.

    Returns:
        None if the kernel works; else a sentence: it cannot run here, and is not used.

    Raises:
        UserError: its results are wrong, or one segment sees another.
    """
    t = 128
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (jax.random.normal(key, (2, t, n, head_dim)) for key, n in zip(keys, (heads, groups, groups, heads)))
    place = jnp.arange(t)
    packed = jnp.stack([jnp.where(place < 50, 1, 2), jnp.where(place < 100, 1 + place // 30, 0)])
    padded = jnp.stack([jnp.ones(t, jnp.int32), (place < 77).astype(jnp.int32)])
    for name, segments, form in (
        ("rows of one text", None, Form(head_dim**-0.5, True, None, 0)),
        ("padded rows", padded, Form(head_dim**-0.5, False, None, 1)),
        ("packed rows", packed, Form(head_dim**-0.5, True, None, 4)),
    ):
        if not takes(dtype, head_dim, form):
            continue
        there = jnp.ones((2, t)) if segments is None else segments > 0
        weights = (g * there[..., None, None]).astype(jnp.float32)

        def value(attend, *inputs, weights=weights):
            return (attend(*inputs).astype(jnp.float32) * weights).sum()

        where = None if segments is None else layout(segments, form.segments)
        try:
            kernel = functools.partial(value, lambda *x, where=where, form=form: attend(*x, where, form))
            half = (x.astype(dtype) for x in (q, k, v))
            found = jax.device_get(jax.jit(jax.value_and_grad(kernel, (0, 1, 2)))(*half))
        except Exception as error:  # any error: there is another implementation
            _without_plan.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}")
            return f"cuDNN's attention cannot run here ({_without_plan[-1]}); attention is computed in blocks."
        plain = functools.partial(value, lambda *x, segments=segments, form=form: reference(*x, segments, form))
        wanted = jax.device_get(jax.jit(jax.value_and_grad(plain, (0, 1, 2)))(q, k, v))
        for part, got, want in zip(_PARTS, jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            apart = np.abs(np.asarray(got, np.float64) - want).max() / max(1.0, np.abs(want).max())
            if not apart < NEAR:
                raise UserError(
                    f"cuDNN's attention gives wrong numbers on {name} here: the {part} is {apart:.2g} from plain "
                    f"arithmetic (jax {jax.__version__}, compute capability {'.'.join(map(str, capability()))}). Use "
                    "the CUDA libraries that this jax was made for, or set model.attention=blocks."
                )
    return None
