"""Attention over one row of segments, causal or in both directions, four ways, and over a key-value cache.

B rows, T tokens, S cache slots, H query heads, G key-value heads, C channels a head.
Every form takes the same mask: causal (or not), same segment, and less than `window` tokens away.
"""

import functools
import math
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxtune.errors import UserError
from jaxtune.models import cudnn

Array = jax.Array
NEG = float(jnp.finfo(jnp.float32).min)
BRANCH = 2**16  # see `sees`
SMALL = 256  # tokens: on an accelerator, the scores of a row so short are no larger than those of a block
SHORT = 64  # tokens; MiniLM's attention, 32 rows of 16, 24, 48 on two cores: 3, 6, 20 ms by XLA, 11, 15, 36 mapped


def is_short(tokens: int, causal: bool) -> bool:
    """Whether rows are an encoder's and so short that a loop over heads costs more than scores that leave the cache."""
    return not causal and tokens <= SHORT


def choose(
    name: str,
    dtype: Any,
    head_dim: int,
    backend: str | None = None,
    *,
    tokens: int,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    segmented: bool = False,
    most_segments: int = 0,
    sinks: bool = False,
) -> str:
    """Resolve "auto" for a backend, so that no [T, T] of a long row is ever in memory.

    On a GPU cuDNN where it applies, else blocks; on a CPU one head after the other; plain XLA where rows are short.

    Args:
        name: "auto", or what is returned as it is.
        dtype: of queries, keys and values.
        head_dim: channels a head.
        backend: default: the one at hand.
        tokens: of a row.
        causal: see `attend_tokens`.
        window: see `attend_tokens`.
        softcap: see `attend_tokens`.
        segmented: rows are packed (causal) or padded, as segments tell.
        most_segments: of a packed row, where that is known.
        sinks: whether heads have them, see `attend_tokens`.
    """
    if name != "auto":
        return name
    backend = backend or jax.default_backend()
    if backend == "cpu":
        return "xla" if is_short(tokens, causal) else "mapped"
    form = cudnn_form(1.0, causal, window, segmented, most_segments)
    if backend == "gpu" and softcap is None and not sinks and form is not None and cudnn.takes(dtype, head_dim, form):
        return "cudnn"
    return "xla" if tokens <= SMALL else "blocks"


def check_cudnn(module: Any, packed: bool, backend: str) -> None:
    """Raise UserError if `module` asks for an attention, cuDNN's or another, that cannot be; nothing is compiled.

    Args:
        module: the model.
        packed: whether its rows hold several texts.
        backend: to run on, or to plan for; the card itself is asked only where there is one.
    """
    if getattr(module.spec, "relative", None) is not None and module.attention not in ("auto", "xla"):
        raise UserError(
            f"model.attention={module.attention}: this model adds a bias to scores by distance, which plain XLA alone "
            "does here. Leave the setting out."
        )
    if module.attention != "cudnn":
        return
    card = cudnn.capability() if jax.default_backend() == "gpu" else (9, 0)
    for block in {b for s in module.spec.segments for b in s.pattern}:
        if why := _no_cudnn(block, module.dtype, packed, module.most_segments, backend, card):
            raise UserError(
                f"model.attention=cudnn: cuDNN's attention {why}. model.attention=auto takes the best that can be."
            )


def _no_cudnn(block: Any, dtype: Any, several: bool, segments: int, backend: str, card: tuple[int, int]) -> str | None:
    """Why the kernel cannot compute a block's attention, and what to do; None: it can."""
    heads, most = 256 if card >= (9, 0) else 128, cudnn.MOST_SEGMENTS
    if backend != "gpu":
        return f"runs on a GPU, and this run is on {backend}"
    if card < (8, 0):
        return f"needs compute capability 8.0, and this card has {card[0]}.{card[1]}"
    if dtype == jnp.float32:
        return "has no float32; set model.dtype=bfloat16"
    if block.softcap is not None:
        return "has no softcap on scores, as this model has"
    if block.sinks:
        return "has no sinks, as this model has"
    if block.head_dim % 8 or block.head_dim > heads:
        return f"takes heads of a multiple of 8 up to {heads} channels, not this model's {block.head_dim}"
    if block.window is not None and not block.causal:
        return "has no window in both directions, as this encoder has"
    if several and not block.causal:
        return "takes one text a row of an encoder; set data.packing=False"
    if several and card < (9, 0):
        return "separates packed rows from compute capability 9.0 on; set data.packing=False"
    if several and not 1 <= segments <= most:
        return f"separates packed rows of at most {most} texts; set data.max_segments={most}"
    return None


def cudnn_form(
    scale: float, causal: bool, window: int | None, segmented: bool, most_segments: int
) -> cudnn.Form | None:
    """cuDNN's parameters; None: the number of segments in a packed row is unknown, or it is packed and not causal."""
    if segmented and (most_segments < 1 if causal else most_segments > 1):
        return None
    segments = max(2, most_segments) if segmented and causal else int(segmented)
    return cudnn.Form(scale, causal, window, segments)


@flax.struct.dataclass
class Segments:
    """Which tokens belong together, and what is computed of that once a batch, not once a layer.

    Attributes:
        ids: i32[B, T].
        layout: as cuDNN takes it; None: that is not used.
        most: of a packed row; 0: not known.
    """

    ids: Array
    layout: cudnn.Layout | None = None
    most: int = flax.struct.field(pytree_node=False, default=0)


def segments_of(ids: Array, causal: bool, most: int) -> Segments:
    """The segments i32[B, T] of packed (causal) or padded rows, laid for cuDNN."""
    form = cudnn_form(1.0, causal, None, True, most)
    return Segments(ids, cudnn.layout(ids, form.segments), most)


def attend_tokens(
    q: Array,
    k: Array,
    v: Array,
    *,
    segments: Array | Segments | None,
    scale: float,
    window: int | None,
    implementation: str,
    causal: bool = True,
    softcap: float | None = None,
    sinks: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """Attention of T tokens over themselves.

    Args:
        q: queries [B, T, H, C].
        k: keys [B, T, G, C]; H is a multiple of G.
        v: values [B, T, G, C].
        segments: i32[B, T], tokens see their own segment only; None: one segment a row, with padding on the right,
            which a causal row never sees.
        scale: multiplies q.k.
        window: how many tokens back a token sees, itself included; None: all.
        implementation: "mapped", "blocks", "xla", "cudnn" or "auto".
        causal: whether a token sees only earlier ones; otherwise it sees as far ahead as back.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118, section 2); None: they stay.
        sinks: f32[H], a score of each head that stands beside those of the keys and has no value (gpt-oss,
            arXiv:2508.10925, section 2.2); None: none.
        bias: f32[1 or B, H, T, T], added to the scores, which then exist as a whole, by plain XLA alone; None: none.

    Returns:
        [B, T, H, C] in q's dtype. What a remat policy has to keep is tagged "attention" (`checkpoint_name`).

    Raises:
        ValueError: the implementation is unknown, or cannot honour segments, a window or a softcap.
    """
    known = segments if segments is None or isinstance(segments, Segments) else Segments(segments)
    ids, most = (None, 0) if known is None else (known.ids, known.most)
    rows = {"causal": causal, "window": window, "segmented": ids is not None, "most_segments": most}
    more = {"softcap": softcap, "sinks": sinks is not None}
    name = choose(implementation, q.dtype, q.shape[-1], tokens=q.shape[1], **rows, **more)
    name = name if bias is None else "xla"
    if name == "mapped":
        return _fused(q, k, v, ids, scale, window, causal, softcap, sinks, together=False)
    if name == "blocks":
        return _fused(q, k, v, ids, scale, window, causal, softcap, sinks, together=True)
    if name == "xla":
        mask = _token_mask(q.shape[1], ids, window, causal)
        return checkpoint_name(_by_head(q, k, v, mask, scale, softcap, sinks, bias), "attention")
    if name == "cudnn":
        form = cudnn_form(scale, causal, window, ids is not None, most)
        if softcap is not None:
            raise ValueError("attention='cudnn' has no softcap on scores; use 'blocks' or 'auto'.")
        if sinks is not None:
            raise ValueError("attention='cudnn' has no sinks; use 'blocks' or 'auto'.")
        if window is not None and not causal:
            raise ValueError("attention='cudnn' has no window in both directions; use 'blocks' or 'auto'.")
        if form is None:
            raise ValueError(
                "attention='cudnn' does not separate packed segments of any number; set data.max_segments, or use "
                "'blocks' or 'auto'."
            )
        where = None if ids is None else known.layout or cudnn.layout(ids, form.segments)
        return cudnn.attend(q, k, v, where, form)
    raise ValueError(f"Unknown attention implementation {name!r}.")


def trial(module: Any) -> str | None:
    """On a GPU, try the kernel that `module` would use once, on its heads; elsewhere do nothing.

    Returns:
        None where all is well or no kernel is used; a sentence where attention is computed in another way.

    Raises:
        UserError: the kernel's numbers are wrong.
    """
    if jax.default_backend() != "gpu" or module.attention not in ("auto", "cudnn"):
        return None
    block = module.spec.segments[0].pattern[0]
    if block.sinks:
        return None

    def plain(q, k, v, segments, form):
        known = None if segments is None else Segments(segments, most=form.segments)
        rows = {"scale": form.scale, "window": form.window, "causal": form.causal}
        return attend_tokens(q, k, v, segments=known, **rows, implementation="xla")

    with jax.default_matmul_precision("highest"):
        return cudnn.trial(plain, block.head_dim, 2 * block.heads // block.kv_heads, 2, module.dtype)


def attend_cache(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """Attention of q [B, T, H, C] at `positions` i32[B, T] over cache slots k, v [B, S, G, C].

    Slot s holds the token at position s, so a query sees the slots up to its own position.
    """
    if q.shape[1] == 1 or bias is not None:
        return _masked(q, k, v, _slot_mask(positions, k.shape[1], window), scale, softcap, sinks, bias)
    if jax.default_backend() == "cpu":
        return _row_by_row(q, k, v, _slot_mask(positions, k.shape[1], window), scale, softcap, sinks)
    return _by_queries(q, k, v, positions, scale, window, softcap, sinks)


def _slot_mask(positions: Array, slots: int, window: int | None) -> Array:
    """bool[B, T, S] of queries at `positions` i32[B, T]."""
    places = jnp.arange(slots)
    mask = places <= positions[..., None]
    return mask if window is None else mask & (places > positions[..., None] - window)


def attend_source(q: Array, k: Array, v: Array, seen: Array, scale: float) -> Array:
    """Attention of q [B, T, H, C] over keys and values [B, S, G, C] where `seen` i32[B, S] is above 0."""
    return checkpoint_name(_by_head(q, k, v, (seen > 0)[:, None], scale, None, None), "attention")


def _row_by_row(q, k, v, mask, scale, softcap, sinks):
    """`_masked` in a loop over rows, whose scores stay in cache; one product of all rows took four times as long."""

    def one(row):
        return _masked(*(x[None] for x in row), scale, softcap, sinks)[0]

    return jax.lax.map(one, (q, k, v, mask))


def _by_queries(q, k, v, positions, scale, window, softcap, sinks):
    """`_masked` in a loop over as many queries of all rows and heads as have scores of `ROOM` bytes: no [T, S]."""
    b, t, h, _ = q.shape
    parts = math.ceil(t / max(1, ROOM // (4 * b * h * k.shape[1])))
    size = math.ceil(t / parts)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, parts * size - t)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, parts, size, *x.shape[2:]), 1, 0)

    def some(args):
        q, positions = args
        return _masked(q, k, v, _slot_mask(positions, k.shape[1], window), scale, softcap, sinks)

    out = jax.lax.map(some, (cut(q), cut(positions)))
    return jnp.moveaxis(out, 0, 1).reshape(b, parts * size, h, -1)[:, :t]


def _token_mask(t: int, segments: Array | None, window: int | None, causal: bool) -> Array:
    """bool[B or 1, T, T]."""
    i = np.arange(t)
    mask = jnp.asarray(_near(i[:, None], i, window, causal))
    if segments is None:
        return mask[None]
    return mask & sees(segments[:, :, None], segments[:, None, :])


def sees(query: Array, key: Array) -> Array:
    """Whether a token of one segment sees those of another: its own, and that of a branch the trunk it grew from.

    Branch n of segment s is called s + n * BRANCH: two answers to one prompt both see it, and not each other.
    """
    return (query == key) | (query % BRANCH == key)


def _near(rows: np.ndarray, cols: np.ndarray, window: int | None, causal: bool) -> np.ndarray:
    """Whether queries `rows` see keys `cols` by their places alone."""
    mask = rows >= cols if causal else np.ones(np.broadcast_shapes(rows.shape, cols.shape), bool)
    return mask if window is None else mask & (abs(rows - cols) < window)


def _masked(q, k, v, mask, scale, softcap, sinks, bias=None):
    """Plain attention; mask: bool[B or 1, T, S], bias: f32[B or 1, H, T, S]."""
    b, t, h, c = q.shape
    g = k.shape[2]
    q = q.reshape(b, t, g, h // g, c)
    scores = jnp.einsum("btgnc,bsgc->bgnts", q, k, preferred_element_type=jnp.float32) * scale
    return jnp.einsum("bgnts,bsgc->btgnc", _softmax(scores, mask, softcap, sinks, v.dtype, bias), v).reshape(b, t, h, c)


def _by_head(q, k, v, mask, scale, softcap, sinks, bias=None):
    """`_masked` with the heads laid first, once for both passes: XLA's products on a CPU would copy in each."""
    b, t, h, c = q.shape
    g = k.shape[2]
    q = q.reshape(b, t, g, h // g, c).transpose(0, 2, 3, 1, 4)
    q, k, v = (checkpoint_name(x, "heads") for x in (q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)))
    scores = jnp.einsum("bgntc,bgsc->bgnts", q, k, preferred_element_type=jnp.float32) * scale
    out = jnp.einsum("bgnts,bgsc->bgntc", _softmax(scores, mask, softcap, sinks, v.dtype, bias), v)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)


def _softmax(scores, mask, softcap, sinks, dtype, bias=None):
    """Weights in float32, then `dtype`, of scores [B, G, H/G, T, S]; with sinks [H] they do not sum to 1."""
    scores = checkpoint_name(scores, "scores")
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += bias.reshape(bias.shape[0], *scores.shape[1:3], *bias.shape[2:])
    scores = jnp.where(mask[:, None, None], scores, NEG)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.reshape(*scores.shape[1:3], 1, 1), (*scores.shape[:-1], 1))
        return jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1].astype(dtype)
    return jax.nn.softmax(scores, axis=-1).astype(dtype)


class _Block(NamedTuple):
    """Queries `start` to `stop`, which see keys from `first` to `last` at most."""

    start: int
    stop: int
    first: int
    last: int


def _blocks(t: int, form: "_Form") -> list[_Block]:
    """Blocks of queries: what causality or the window hides as a whole is never computed."""
    size = max(128, math.ceil(t / 8))
    blocks = []
    for start in range(0, t, size):
        stop = min(start + size, t)
        reach = t if form.window is None else form.window - 1
        last = stop if form.causal else min(stop + reach, t)
        blocks.append(_Block(start, stop, max(0, start - reach), last))
    return blocks


ROOM = 2**28  # bytes of float32 scores that exist at once where all heads are computed together


def _fused(q, k, v, segments, scale, window, causal, softcap, sinks, *, together: bool):
    """Attention whose scores exist for a block of queries at a time, and are computed again backward.

    FlashAttention-2's equations (Dao 2023, arXiv:2307.08691, algorithms 1 and 2) with whole rows of scores: the
    backward pass takes the weights from the scores and what the forward pass kept of each row, its maximum and sum.

    With `together` all rows and heads are computed at once, a few queries at a time, as a GPU likes it; else one (row,
    key-value head) after the other, whose scores stay in a CPU's cache.
    """
    b, t, h, c = q.shape
    g = k.shape[2]
    segs = jnp.zeros((b, t), jnp.int32) if segments is None else segments
    qs = q.reshape(b, t, g, h // g, c).transpose(0, 2, 3, 1, 4).reshape(b * g, h // g, t, c)
    flat = functools.partial(jnp.reshape, shape=(b * g, t, c))
    qkv = (qs, flat(k.transpose(0, 2, 1, 3)), flat(v.transpose(0, 2, 1, 3)))
    queries = min(max(ROOM // (4 * b * h * t) // 16 * 16, 16), 512) if together else None
    form = _Form(segments is not None, window, causal, scale, softcap, queries)
    if sinks is not None:
        sinks = jnp.tile(sinks.reshape(g, h // g), (b, 1))
    out = _heads(form, *(checkpoint_name(x, "heads") for x in qkv), jnp.repeat(segs, g, axis=0), sinks)
    return out.reshape(b, g, h // g, t, c).transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)


class _Form(NamedTuple):
    """What a query sees, and how scores are made.

    Attributes:
        queries: how many of all rows and heads are computed at once; None: see `_fused`.
    """

    segmented: bool
    window: int | None
    causal: bool
    scale: float
    softcap: float | None
    queries: int | None

    def each(self, one, q, *args):
        """`one` of every (row, key-value head), and the places of tokens [T]."""
        places = np.arange(q.shape[2])
        if self.queries is None:
            return jax.lax.map(lambda args: one(places, *args), (q, *args))
        # Masks are made of places and segments alone: but for the barrier, what differentiates the scan over layers
        # would take them for known beforehand, and keep those of all parts.
        places, q, *args = jax.lax.optimization_barrier((jnp.asarray(places), q, *args))
        return jax.vmap(functools.partial(one, places))(q, *args)

    def pieces(self, block: _Block) -> int | None:
        """How many parts a block's queries are computed in; None: all at once."""
        size = block.stop - block.start
        return None if self.queries is None or size <= self.queries else math.ceil(size / self.queries)

    def scores(self, q: Array, k: Array, segments: Array, rows: Array, own: Array, block: _Block) -> tuple[Array, Any]:
        """Masked scores f32[n * r, s] of queries [n, r, C] at places `rows`, of segments `own` [r]; their slope by q.k.

        Plain matrices, whose products need no copies.
        """
        n, r, c = q.shape
        keys = np.arange(block.first, block.last)
        scores = jnp.dot(q.reshape(n * r, c), k.T, preferred_element_type=jnp.float32) * self.scale
        slope = self.scale
        if self.softcap is not None:
            squashed = jnp.tanh(scores / self.softcap)
            scores, slope = self.softcap * squashed, self.scale * (1 - jnp.square(squashed))
        mask = jnp.asarray(_near(rows[:, None], keys, self.window, self.causal))
        if self.segmented:
            mask &= sees(own[:, None], segments[block.first : block.last])
        return jnp.where(jnp.tile(mask, (n, 1)), scores, NEG), slope


def _parts(x: Array, block: _Block, pieces: int, axis: int = 0, fill: Any = 0) -> Array:
    """The block's queries along `axis`, padded with `fill` and cut: [pieces, ..., queries, ...]."""
    x = jax.lax.slice_in_dim(x, block.start, block.stop, axis=axis)
    size = math.ceil((block.stop - block.start) / pieces)
    padding = [(0, size * pieces - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, padding, constant_values=fill)
    x = x.reshape(*x.shape[:axis], pieces, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _whole(x: Array, block: _Block, axis: int) -> Array:
    """`_parts` undone: [pieces, ..., queries, ...] -> the block's queries along `axis`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, block.stop - block.start, axis=axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _heads(form: _Form, q: Array, k: Array, v: Array, segments: Array, sinks: Array | None) -> Array:
    """q [M, N, T, C], k, v [M, T, C], segments i32[M, T], sinks f32[M, N] -> [M, N, T, C]: N query heads share a
    key-value head.
    """
    return _heads_forward(form, q, k, v, segments, sinks)[0]


def _sinks_of(sinks: tuple[Array, ...], rows: int) -> Array | None:
    """f32[n * rows, 1]: the sinks [n] of heads, if there are any, for each of their queries."""
    return jnp.repeat(sinks[0], rows)[:, None] if sinks else None


def _heads_forward(form, q, k, v, segments, sinks):
    extra = () if sinks is None else (sinks,)

    def one(places, q, k, v, seg, *sinks):
        t = q.shape[1]
        parts = []
        for block in _blocks(t, form):
            ks, vs = k[block.first : block.last], v[block.first : block.last]

            def some(args, block=block, ks=ks, vs=vs):
                q, rows, own = args
                shape = q.shape[:2]
                scores, _ = form.scores(q, ks, seg, rows, own, block)
                top = scores.max(-1, keepdims=True)
                if (sink := _sinks_of(sinks, shape[1])) is not None:
                    top = jnp.maximum(top, sink)
                weights = jnp.exp(scores - top)
                total = weights.sum(-1, keepdims=True)
                if sink is not None:
                    total += jnp.exp(sink - top)
                out = jnp.dot(weights.astype(vs.dtype), vs, preferred_element_type=jnp.float32) / total
                return out.astype(vs.dtype).reshape(*shape, -1), top.reshape(shape), total.reshape(shape)

            pieces = form.pieces(block)
            if pieces is None:
                here = slice(block.start, block.stop)
                parts.append(some((q[:, here], places[here], seg[here])))
            else:
                args = _parts(q, block, pieces, 1), _parts(places, block, pieces), _parts(seg, block, pieces)
                parts.append([_whole(x, block, 1) for x in jax.lax.map(some, args)])
        return tuple(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))

    out, *softmax = form.each(one, q, k, v, segments, *extra)
    softmax = (checkpoint_name(x, "attention") for x in softmax)
    return checkpoint_name(out, "attention"), ((q, k, v, segments, *softmax), extra)


def _heads_backward(form, kept, grad):
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    kept, extra = kept

    def one(places, q, k, v, seg, top, total, grad, *sinks):
        t, c = k.shape
        # Transposed: XLA's fast product on a CPU takes a large right side as it lies, not a large left side transposed.
        dq, dk, dv = [], jnp.zeros((c, t), jnp.float32), jnp.zeros((c, t), jnp.float32)
        dsinks = [jnp.zeros_like(x) for x in sinks]
        for block in _blocks(t, form):
            cols = slice(block.first, block.last)
            ks, vs = k[cols], v[cols]

            def some(args, block=block, ks=ks, vs=vs):
                q, rows, own, top, total, g = args
                size = q.shape[0] * q.shape[1]
                scores, slope = form.scores(q, ks, seg, rows, own, block)
                # Not exp(scores - log of the sum): that difference has lost the last digits of large scores.
                weights = jnp.exp(scores - top.reshape(size, 1)) / total.reshape(size, 1)
                g = g.reshape(size, c)
                dweights = dot(g, vs.T)
                # FlashAttention takes the inner product of `out` and `grad` here, which leaves rounding where the
                # gradient is exactly 0: at a query that sees one key.
                inner = (weights * dweights).sum(-1, keepdims=True)
                ds = (weights * (dweights - inner) * slope).astype(q.dtype)
                own_dq = dot(ds, ks).astype(q.dtype).reshape(q.shape)
                of_keys = dot(q.reshape(size, c).T, ds), dot(g.T, weights.astype(vs.dtype))
                if (sink := _sinks_of(sinks, q.shape[1])) is None:
                    return own_dq, *of_keys
                weight = jnp.exp(sink - top.reshape(size, 1)) / total.reshape(size, 1)
                return own_dq, *of_keys, -(weight * inner).reshape(q.shape[:2]).sum(1)

            pieces = form.pieces(block)
            if pieces is None:
                here = slice(block.start, block.stop)
                of = (q[:, here], places[here], seg[here], top[:, here], total[:, here], grad[:, here])
                of_q, of_k, of_v, *of_sinks = some(of)
            else:
                of = (
                    *(_parts(q, block, pieces, 1), _parts(places, block, pieces), _parts(seg, block, pieces)),
                    *(_parts(top, block, pieces, 1, fill=-NEG), _parts(total, block, pieces, 1, fill=1)),
                    _parts(grad, block, pieces, 1),
                )

                def add(sums, args, some=some):
                    of_q, *of_kv = some(args)
                    return jax.tree.map(jnp.add, sums, tuple(of_kv)), of_q

                none = jnp.zeros((c, block.last - block.first), jnp.float32)
                start = (none, none, *map(jnp.zeros_like, sinks))
                (of_k, of_v, *of_sinks), of_q = jax.lax.scan(add, start, of)
                of_q = _whole(of_q, block, 1)
            dq.append(of_q)
            dk, dv = dk.at[:, cols].add(of_k), dv.at[:, cols].add(of_v)
            dsinks = [x + own for x, own in zip(dsinks, of_sinks, strict=True)]
        return jnp.concatenate(dq, axis=1), dk.T.astype(k.dtype), dv.T.astype(v.dtype), *dsinks

    dq, dk, dv, *dsinks = form.each(one, *kept, grad, *extra)
    return dq, dk, dv, None, dsinks[0] if dsinks else None


_heads.defvjp(_heads_forward, _heads_backward)
