"""Every form of attention against a naive float64 oracle in numpy, forward and backward."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import zoo
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.errors import UserError
from jaxtune.models import attention, cudnn
from jaxtune.models.attention import attend_cache, attend_tokens, choose

FORMS = ["mapped", "blocks", "xla"]


@pytest.fixture(autouse=True, scope="module")
def _few_queries_at_once():
    """Sixteen, so that a block of queries has parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "ROOM", 0)
        yield


C = 8
SCALE = 0.4


class Oracle:
    """Causal attention one query at a time; and its derivative, by the textbook."""

    def __init__(self, q, k, v, segments=None, window=None, positions=None, softcap=None, sinks=None):
        self.q, self.k, self.v = (np.asarray(x, np.float64) for x in (q, k, v))
        b, t, h, _ = q.shape
        s, group = k.shape[1], h // k.shape[2]
        self.group = group
        self.p, self.slope = np.zeros((b, h, t, s)), np.ones((b, h, t, s))
        self.sunk = np.zeros((b, h, t))  # the weight of each head's sink
        for row in range(b):
            for i in range(t):
                at = i if positions is None else positions[row, i]
                sees = [j for j in range(at + 1) if window is None or j > at - window]
                if segments is not None:
                    sees = [j for j in sees if segments[row, i] == segments[row, j]]
                for head in range(h):
                    scores = self.k[row, sees, head // group] @ self.q[row, i, head] * SCALE
                    if softcap is not None:
                        scores = softcap * np.tanh(scores / softcap)
                        self.slope[row, head, i, sees] = 1 - (scores / softcap) ** 2
                    sink = -np.inf if sinks is None else float(sinks[head])
                    top = max(scores.max(), sink)
                    weights = np.exp(scores - top)
                    total = weights.sum() + np.exp(sink - top)
                    self.p[row, head, i, sees] = weights / total
                    self.sunk[row, head, i] = np.exp(sink - top) / total
        self.keys, self.values = (x.repeat(group, axis=2) for x in (self.k, self.v))

    @property
    def out(self):
        return np.einsum("bhts,bshc->bthc", self.p, self.values)

    def gradient(self, g):
        """The derivative of sum(out * g) by q, k and v."""
        g = np.asarray(g, np.float64)
        dp = np.einsum("bthc,bshc->bhts", g, self.values)
        ds = self.p * (dp - (dp * self.p).sum(-1, keepdims=True)) * SCALE * self.slope
        return self._gradient(ds, self.keys, self.q, g)

    def of_sinks(self, g):
        """The derivative by the sinks [H], whose own value is zero."""
        dp = np.einsum("bthc,bshc->bhts", np.asarray(g, np.float64), self.values)
        return -(self.sunk * (dp * self.p).sum(-1)).sum((0, 2))

    def summed(self, g):
        """The largest sum of absolute terms in each of the three, to which rounding is relative (Higham 2002, 3.5)."""
        g = np.asarray(g, np.float64)
        dp = abs(np.einsum("bthc,bshc->bhts", g, self.values))
        ds = self.p * (dp + (dp * self.p).sum(-1, keepdims=True)) * SCALE * self.slope
        return [x.max() for x in self._gradient(ds, abs(self.keys), abs(self.q), abs(g))]

    def _gradient(self, ds, keys, q, g):
        dv = np.einsum("bhts,bthc->bshc", self.p, g)
        dq = np.einsum("bhts,bshc->bthc", ds, keys)
        dk = np.einsum("bhts,bthc->bshc", ds, q)
        b, s = self.k.shape[:2]
        return dq, *(x.reshape(b, s, -1, self.group, C).sum(3) for x in (dk, dv))


def inputs(b, t, h, g, s=None, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(b, t, h, C), (b, s or t, g, C), (b, s or t, g, C), (b, t, h, C)]
    return [jax.device_put(np.asarray(2 * rng.normal(size=shape), dtype)) for shape in shapes]


@functools.cache
def oracle_of_blocks(t, packed, window):
    """One for all forms: its loops over queries take longer than their programs."""
    q, k, v, _ = inputs(2 if packed is not None else 1, t, 2, 1)
    return Oracle(q, k, v, documents(t) if packed else None, window)


def documents(t):
    """Two packed rows: lengths that start and end inside blocks, and padding at the end of the first."""
    first = np.repeat([1, 2, 3, 0], [t // 3, 1, t - t // 3 - 6, 5])
    second = np.repeat([1, 2], [t - 2, 2])
    return np.stack([first, second]).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("window", "implementation", "softcap"))
def forward_and_gradient(q, k, v, g, segments, window, implementation, softcap=None):
    settings = {"segments": segments, "window": window, "implementation": implementation, "softcap": softcap}

    def attend(q, k, v):
        return attend_tokens(q, k, v, scale=SCALE, **settings)

    out, back = jax.vjp(attend, q, k, v)
    return out, back(g)


def close(got, want):
    """Within float32's rounding of numbers of size 1 (a lone token's softmax has no gradient to be relative to)."""
    return np.abs(np.asarray(got, np.float64) - want).max() < 2e-6 * max(1.0, np.abs(want).max())


def check(oracle, g, out, gradient):
    assert close(out, oracle.out)
    for got, want, size in zip(gradient, oracle.gradient(g), oracle.summed(g), strict=True):
        assert got.shape == want.shape
        assert np.abs(np.asarray(got, np.float64) - want).max() < 6e-7 * max(1.0, size)  # ten units of float32


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "t, window, packed",
    [
        (129, None, False),
        (129, 37, True),
        (300, 37, False),
        (300, None, True),
        slow(129, None, True),
        slow(129, 37, False),
        slow(300, 37, True),
        slow(300, None, False),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_lengths_that_no_block_divides(form, t, window, packed):
    q, k, v, g = inputs(2, t, 2, 1)
    segments = documents(t) if packed else None
    check(oracle_of_blocks(t, packed, window), g, *forward_and_gradient(q, k, v, g, segments, window, form))


@pytest.mark.parametrize("form", FORMS)
def test_softcaps_of_scores(form):
    q, k, v, g = inputs(2, 140, 2, 1)  # 140: two blocks, so that masked scores are among the capped ones
    segments = documents(140)
    oracle = Oracle(q, k, v, segments, 37, softcap=3.0)
    check(oracle, g, *forward_and_gradient(q, k, v, g, segments, 37, form, softcap=3.0))
    assert not close(forward_and_gradient(q, k, v, g, segments, 37, form)[0], oracle.out)


@pytest.mark.parametrize("form", FORMS)
def test_sinks_take_their_part_of_each_softmax(form):
    """Packed rows and a window; one sink is below all scores, one above them. Decoding from a cache as well."""
    q, k, v, g = inputs(2, 140, 4, 2)
    segments, sinks = documents(140), jnp.array([-20.0, 1.0, 3.0, 20.0])
    oracle = Oracle(q, k, v, segments, 37, sinks=sinks)
    settings = {"segments": segments, "window": 37, "implementation": form, "scale": SCALE}

    @jax.jit
    def both(*x):
        out, back = jax.vjp(lambda q, k, v, sinks: attend_tokens(q, k, v, sinks=sinks, **settings), *x)
        return out, back(g)

    out, (*gradient, of_sinks) = both(q, k, v, sinks)
    check(oracle, g, out, gradient)
    want = oracle.of_sinks(g)
    assert (np.abs(of_sinks - want) < 1e-5 * np.abs(want).max()).all()
    assert not close(forward_and_gradient(q, k, v, g, segments, 37, form)[0], oracle.out)


def test_sinks_in_a_cache_and_on_a_gpu():
    q, k, v, _ = inputs(2, 3, 4, 2, s=20)
    positions, sinks = np.array([[4, 5, 6], [17, 18, 19]]), jnp.array([-20.0, 1.0, 3.0, 20.0])
    out = attend_cache(q, k, v, jnp.asarray(positions), scale=SCALE, window=7, sinks=sinks)
    assert close(out, Oracle(q, k, v, window=7, positions=positions, sinks=sinks).out)
    with pytest.raises(ValueError, match="has no sinks"):
        attend_tokens(q, q, q, segments=None, scale=1.0, window=None, implementation="cudnn", sinks=sinks)
    assert choose("auto", jnp.bfloat16, 64, "gpu", tokens=512, sinks=True) == "blocks"
    module = zoo.ours("gpt_oss")[0].clone(attention="cudnn", dtype=jnp.bfloat16)
    with pytest.raises(UserError, match="has no sinks, as this model has"):
        attention.check_cudnn(module, False, "gpu")


def test_cudnn_has_no_softcap():
    q, k, v, _ = inputs(1, 8, 1, 1)
    settings = {"segments": None, "scale": SCALE, "window": None, "softcap": 3.0}
    with pytest.raises(ValueError, match="has no softcap"):
        attend_tokens(q, k, v, implementation="cudnn", **settings)
    assert choose("auto", jnp.bfloat16, 64, "gpu", tokens=512, softcap=3.0) == "blocks"


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_grouped_heads(form, heads, groups):
    q, k, v, g = inputs(2, 17, heads, groups)
    segments = documents(17)
    check(Oracle(q, k, v, segments, 5), g, *forward_and_gradient(q, k, v, g, segments, 5, form))


@pytest.mark.slow
@pytest.mark.parametrize("t", [1, 2, 127, 128, 256, 1025])
@pytest.mark.parametrize("window", [None, 1, 128, 129, 2000])
@pytest.mark.parametrize("form", FORMS)
def test_edges_of_blocks_and_windows(form, t, window):
    q, k, v, g = inputs(1, t, 2, 1)
    check(oracle_of_blocks(t, None, window), g, *forward_and_gradient(q, k, v, g, None, window, form))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_keeps_its_type_and_softmaxes_in_float32(form):
    q, k, v, g = inputs(2, 40, 4, 2, dtype=jnp.bfloat16)
    out, gradient = forward_and_gradient(q, k, v, g, documents(40), 7, form)
    assert {out.dtype, *(x.dtype for x in gradient)} == {jnp.dtype(jnp.bfloat16)}
    oracle = Oracle(q, k, v, documents(40), 7)
    assert zoo.apart(out, oracle.out) < 0.01
    assert all(zoo.apart(got, want) < 0.02 for got, want in zip(gradient, oracle.gradient(g), strict=True))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("heads, groups, backend", [(4, 4, "cpu"), (4, 2, "cpu"), (4, 1, "cpu"), (4, 2, "gpu")])
def test_the_cache_sees_slots_up_to_each_query_and_nothing_later(monkeypatch, heads, groups, backend, window):
    """On a GPU two queries at a time, as if there were no room for more."""
    monkeypatch.setattr(attention, "ROOM", 4 * 3 * heads * 21 * 2)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    q, k, v, g = inputs(3, 5, heads, groups, s=21)
    positions = np.array([[0, 1, 2, 3, 4], [9, 10, 11, 12, 13], [16, 17, 18, 19, 20]], np.int32)

    @jax.jit
    def run(q, k, v):
        out, back = jax.vjp(lambda *x: attend_cache(*x, positions, scale=SCALE, window=window), q, k, v)
        return out, back(g)

    out, gradient = run(q, k, v)
    check(Oracle(q, k, v, None, window, positions), g, out, gradient)
    # What lies in later slots does not matter.
    beyond = np.arange(21) > positions[:, -1:]
    spoil = jnp.where(beyond[..., None, None], 1e3, 0.0)
    assert np.array_equal(run(q, k + spoil, v + spoil)[0], out)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("form", FORMS)
def test_no_segment_sees_another(form, window):
    """Outputs and gradients of one document are the same bytes whatever its neighbours hold."""
    t = 140
    q, k, v, g = inputs(2, t, 4, 2)
    segments = documents(t)
    for victim in (1, 2, 3):
        mine = (segments == victim)[..., None, None]
        if not mine.any():
            continue
        # A loss over the victim alone: only its own tokens may have a gradient.
        out, gradient = forward_and_gradient(q, k, v, g * mine, segments, window, form)
        for x in gradient:
            assert np.all(np.where(mine, 0, x) == 0)
            assert np.any(np.where(mine, x, 0) != 0)
        noise = [jnp.where(mine, x, 30.0 - 2 * x) for x in (q, k, v)]
        other_out, other_gradient = forward_and_gradient(*noise, g * mine, segments, window, form)
        assert np.array_equal(np.where(mine, out, 0), np.where(mine, other_out, 0))
        assert not np.array_equal(out, other_out)
        for x, y in zip(gradient, other_gradient, strict=True):
            assert np.array_equal(x, y)


def test_segments_are_never_silently_ignored(monkeypatch):
    q, k, v, _ = inputs(1, 8, 2, 1)
    with pytest.raises(ValueError, match="does not separate packed segments"):
        attend_tokens(q, k, v, segments=np.ones((1, 8)), scale=1.0, window=None, implementation="cudnn")
    with pytest.raises(ValueError, match="Unknown attention implementation 'flash'"):
        attend_tokens(q, k, v, segments=None, scale=1.0, window=None, implementation="flash")

    half = jnp.bfloat16
    long, short, packed = {"tokens": 4096}, {"tokens": 64, "causal": False}, {"tokens": 4096, "segmented": True}
    assert choose("auto", jnp.float32, 8, **packed) == choose("auto", half, 64, **long) == "mapped"
    assert choose("auto", jnp.float32, 8, **short) == "xla"
    assert choose("mapped", jnp.float32, 8, **short) == "mapped"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, expected in (((9, 0), "cudnn"), ((8, 0), "blocks"), ((7, 5), "blocks")):
        monkeypatch.setattr(cudnn, "capability", lambda capability=capability: capability)
        assert choose("auto", half, 64, **long) == ("blocks" if capability < (8, 0) else "cudnn")
        assert choose("auto", half, 64, **long, causal=False, segmented=True) == choose("auto", half, 64, **long)
        assert choose("auto", half, 64, **packed, most_segments=32) == expected
        assert choose("auto", half, 256, **long) == expected
        for special in (
            {**packed},  # any number of segments
            {**packed, "most_segments": 33},
            {**long, "softcap": 3.0},
            {**long, "causal": False, "window": 128},
        ):
            assert choose("auto", half, 64, **special) == "blocks"
        assert choose("auto", jnp.float32, 64, **long) == choose("auto", half, 60, **long) == "blocks"
    assert choose("auto", jnp.float32, 64, **short) == "xla"
    assert choose("mapped", half, 64, **packed) == "mapped"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose("auto", half, 64, **long) == "blocks"


@pytest.mark.parametrize(
    "fields, packed, backend, card, said",
    [
        ({}, False, "cpu", None, "this run is on cpu"),
        ({"dtype": jnp.float32}, False, "gpu", None, "has no float32"),
        ({}, True, "gpu", None, "set data.max_segments=32"),
        ({"most_segments": 33}, True, "gpu", None, "at most 32 texts"),
        ({"most_segments": 8}, True, "gpu", (8, 9), "set data.packing=False"),
        ({}, False, "gpu", (7, 5), "this card has 7.5"),
        ({"softcap": 3.0}, False, "gpu", None, "no softcap"),
        ({"head_dim": 12}, False, "gpu", None, "not this model's 12"),
        ({"head_dim": 256}, False, "gpu", (8, 0), "up to 128"),
        ({"most_segments": 8}, True, "gpu", (9, 0), None),
        ({"attention": "auto"}, True, "cpu", None, None),
    ],
)
def test_cudnn_is_refused_where_it_cannot_be(monkeypatch, fields, packed, backend, card, said):
    fields = {"attention": "cudnn", "dtype": jnp.bfloat16} | fields
    block = {"head_dim": 64} | {name: fields.pop(name) for name in ("softcap", "head_dim") if name in fields}
    module = small.decoder(**fields)
    [segment] = module.spec.segments
    pattern = tuple(dataclasses.replace(b, **block) for b in segment.pattern)
    spec = dataclasses.replace(module.spec, segments=(dataclasses.replace(segment, pattern=pattern),))
    if card is not None:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(cudnn, "capability", lambda: card)
    if said is None:
        return attention.check_cudnn(module.clone(spec=spec), packed, backend)
    with pytest.raises(UserError, match=said):
        attention.check_cudnn(module.clone(spec=spec), packed, backend)


# ------------------------------------------------------------------------------------------ cuDNN, but for its kernel


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3))
def test_layouts_of_segments(rows):
    """Lengths and offsets say where each segment lies, and no more."""
    most, width = 5, 48
    ids = np.zeros((len(rows), width), np.int32)
    for row, lengths in zip(ids, rows):
        row[: sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    found = jax.tree.map(np.asarray, cudnn.layout(jnp.asarray(ids), most))
    for i, lengths in enumerate(rows):
        rest = [-1] * (most - len(lengths))
        assert found.lengths[i].tolist() == lengths + rest
        assert found.offsets[i].tolist() == [*np.cumsum([0, *lengths[:-1]]).tolist(), *rest, -1]
    padded = cudnn.layout(jnp.asarray(ids > 0, jnp.int32), 1)
    assert padded.lengths.tolist() == [sum(lengths) for lengths in rows] and padded.offsets.shape == (len(rows), 0)


def plain_kernel(form, q, k, v, where):
    """What the kernel computes, from the layout it is given: (output, 0 in the padding; statistics)."""
    b, t = q.shape[:2]
    if not form.segments:
        ids = jnp.ones((b, t), jnp.int32)
    elif form.segments == 1:
        ids = (jnp.arange(t) < where.lengths[:, None]).astype(jnp.int32)
    else:
        starts, lengths = where.offsets[:, :-1, None], where.lengths[..., None]
        inside = (jnp.arange(t) >= starts) & (jnp.arange(t) < starts + lengths) & (lengths > 0)
        ids = (inside * jnp.arange(1, form.segments + 1)[:, None]).sum(1)
    out = attend_tokens(
        q, k, v, segments=ids, scale=form.scale, window=form.window, causal=form.causal, implementation="xla"
    )
    return out * (ids > 0)[..., None, None], jnp.zeros((b * max(1, form.segments), q.shape[2], t))


@pytest.fixture
def kernel(monkeypatch):
    """Plain arithmetic in place of the kernel, which counts how often its forward part is traced."""
    calls = []

    def forward(form, *arrays):
        calls.append(form)
        return plain_kernel(form, *arrays)

    def backward(form, q, k, v, where, out, statistics, grad):
        return jax.vjp(lambda *x: plain_kernel(form, *x, where)[0], q, k, v)[1](grad)

    monkeypatch.setattr(cudnn, "forward", forward)
    monkeypatch.setattr(cudnn, "backward", backward)
    return calls


@pytest.mark.parametrize("members", [0, 3])
@pytest.mark.parametrize(
    ("causal", "segmented", "window"),
    [(True, False, None), (True, False, 9), (False, True, None), (True, True, None), (True, True, 9)],
    ids=["causal", "causal window", "padded", "packed", "packed window"],
)
def test_cudnn_is_given_what_it_needs(kernel, members, causal, segmented, window):
    """Outputs and gradients are those of blocks, also for members of a sweep that share keys, under grouped heads."""
    t = 40
    q, k, v, g = inputs(2, t, 4, 2)
    ids = documents(t) if causal else (np.arange(t) < np.array([[t], [23]])).astype(np.int32)
    there = ids > 0 if segmented else np.ones_like(ids, bool)
    if members:
        q, v = (np.stack([x, -x, 2 * x])[:members] for x in map(np.asarray, (q, v)))

    @functools.partial(jax.jit, static_argnums=0)
    def run(form):
        segments = attention.Segments(jnp.asarray(ids), most=3 if causal else 1) if segmented else None
        settings = {"segments": segments, "scale": SCALE, "window": window, "causal": causal}

        def both(q, k, v):
            attend = functools.partial(attend_tokens, **settings, implementation=form)
            out, back = jax.vjp(attend, q, k, v)
            return out, back(g * there[..., None, None])

        return (jax.vmap(both, in_axes=(0, None, 0)) if members else both)(q, k, v)

    (out, gradient), (want, wanted) = run("cudnn"), run("blocks")
    assert close(np.where(there[..., None, None], out, 0), np.where(there[..., None, None], want, 0))
    for got, expected in zip(gradient, wanted, strict=True):
        assert np.abs(np.asarray(got) - np.asarray(expected)).max() < 1e-5 * max(1, np.abs(expected).max())


def test_statistics_are_kept_with_the_output(kernel):
    """A remat policy that keeps "attention" does not run the kernel's forward part again, but where rows are packed."""
    q, k, v, _ = inputs(2, 24, 2, 2)
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    for segments, expected in ((None, 1), (attention.Segments(jnp.asarray(documents(24)), most=3), 2)):
        settings = {"segments": segments, "scale": SCALE, "window": None, "implementation": "cudnn"}
        attend = jax.checkpoint(lambda *x, settings=settings: attend_tokens(*x, **settings).sum(), policy=policy)
        text = str(jax.make_jaxpr(jax.grad(attend, (0, 1, 2)))(q, k, v))
        assert text.count("custom_vmap_call") == 1 + expected


def test_a_trial_finds_wrong_numbers_and_missing_plans(kernel, monkeypatch):
    module = small.decoder(dtype=jnp.bfloat16, head_dim=16)
    assert attention.trial(module) is None and not kernel  # there is no GPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "capability", lambda: (9, 0))
    monkeypatch.setattr(cudnn, "_without_plan", [])
    assert attention.trial(module) is None and len(kernel) >= 3
    assert attention.trial(module.clone(attention="blocks")) is None
    good = cudnn.forward

    def leaks(form, q, k, v, where):
        """Packed rows as one text."""
        return good(form._replace(segments=0) if form.segments > 1 else form, q, k, v, where)

    cudnn._folded.cache_clear()
    monkeypatch.setattr(cudnn, "forward", leaks)
    with pytest.raises(UserError, match=r"wrong numbers on packed rows.*model\.attention=blocks"):
        attention.trial(module)

    def fails(form, *arrays):
        raise RuntimeError("No valid execution plans built.\nmore")

    monkeypatch.setattr(cudnn, "forward", fails)
    assert "No valid execution plans built.); attention is computed in blocks" in attention.trial(module)
    assert choose("auto", jnp.bfloat16, 64, "gpu", tokens=4096) == "blocks"


def test_no_square_of_a_long_row_is_in_memory():
    """Forward and backward, for one device and for members of a sweep; plain XLA has such arrays."""
    shape = jax.ShapeDtypeStruct((1, 2048, 2, C), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def arrays(form, members):
        def loss(q, k, v, segments):
            out = attend_tokens(q, k, v, segments=segments, scale=SCALE, window=None, implementation=form)
            return out.astype(jnp.float32).sum()

        grad = jax.grad(loss, (0, 1, 2))
        args = (shape, shape, shape, segments)
        if members:
            grad = jax.vmap(grad, in_axes=(0, 0, 0, None))
            args = (*(jax.ShapeDtypeStruct((members, *x.shape), x.dtype) for x in args[:3]), segments)
        return re.findall(r"\[(?:\d+,)*2048,2048\]", str(jax.make_jaxpr(grad)(*args)))

    assert arrays("xla", 0)
    for form in ("mapped", "blocks"):
        assert not arrays(form, 0) and not arrays(form, 3)


@pytest.mark.parametrize(("t", "causal", "loops"), [(64, False, False), (65, False, True), (64, True, True)])
def test_an_encoders_short_rows_need_no_loop_over_heads(t, causal, loops):
    q, k, v, _ = inputs(2, t, 4, 4)

    def auto(q, k, v):
        settings = {"segments": documents(t), "scale": SCALE, "window": None}
        return attend_tokens(q, k, v, **settings, implementation="auto", causal=causal)

    assert ("scan" in str(jax.make_jaxpr(auto)(q, k, v))) == loops
