"""Chunked cross-entropy against the naive one; what it never holds; the next-token objective."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxtune.models.decoder import head_logits
from jaxtune.objectives.causal_lm import causal_lm
from jaxtune.objectives.token_nats import chunk_size, cross_entropy, token_nats
from jaxtune.weights.adapters import LoraWeight
from jaxtune.weights.packed import Nf4Weight, QuantWeight

B, T, D, V = 3, 7, 8, 29
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((B, T, D)), jnp.float32)
TARGETS = jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32)
WEIGHTS = jnp.asarray(RNG.integers(0, 2, (B, T)) * RNG.uniform(0.5, 2.0, (B, T)), jnp.float32)
TABLE = jnp.asarray(RNG.standard_normal((V, D)), jnp.float32)


def heads():
    w, a, b = TABLE.T, RNG.standard_normal((D, 2)), RNG.standard_normal((2, V))
    adapter = LoraWeight(w, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.float32(0.7))
    return {"plain": {"kernel": w}, "tied": {"embedding": TABLE}, "lora": {"kernel": adapter}}


HEADS = heads()


def naive(head, x, targets, weights, z_loss=0.0):
    """Every logit at once, and JAX's own derivative."""
    logits = head_logits(head, x)
    # The shift cancels. Its own derivative compares logits with their maximum, which XLA may compute twice, unequally.
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    lse = jnp.log(jnp.exp(logits - top).sum(-1)) + top[..., 0]
    picked = (logits * jax.nn.one_hot(targets, V)).sum(-1)
    return (weights * (lse - picked + z_loss * lse**2)).sum()


def ours(head, x, targets, weights, z_loss=0.0, chunk=4):
    return cross_entropy(head_logits, head, x, targets, weights, z_loss=z_loss, chunk=chunk)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def both_gradients(fn, head, x, targets, weights, z_loss, chunk):
    settings = {"z_loss": z_loss} | ({"chunk": chunk} if chunk else {})
    return jax.value_and_grad(lambda h, x: fn(h, x, targets, weights, **settings), argnums=(0, 1))(head, x)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_value_and_gradients_equal_the_naive_ones(kind, z_loss):
    want, grads = both_gradients(naive, HEADS[kind], X, TARGETS, WEIGHTS, z_loss, None)
    for chunk in (5,) if z_loss else (1, 5, 64):
        value, got = both_gradients(ours, HEADS[kind], X, TARGETS, WEIGHTS, z_loss, chunk)
        assert float(value) == pytest.approx(float(want), rel=1e-6)
        assert small.apart(got[1], grads[1]) < 1e-6
        assert small.apart(got[0], grads[0]) < 1e-6


def test_the_outer_derivative_scales_the_gradient():
    grad, want = (
        jax.jit(jax.grad(lambda x, fn=fn: 3.0 * fn(HEADS["plain"], x, TARGETS, WEIGHTS) ** 2))(X)
        for fn in (ours, naive)
    )
    assert small.apart(grad, want) < 1e-5


def test_nothing_to_predict_is_zero_without_nan():
    value, grads = both_gradients(ours, HEADS["lora"], X, TARGETS, jnp.zeros_like(WEIGHTS), 0.0, 4)
    assert float(value) == 0.0
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads))


def test_members_under_vmap():
    stack = jax.tree.map(lambda w: jnp.stack([w, -w, 2 * w]), HEADS["lora"])
    xs, masks = jnp.stack([X, 2 * X, X + 1]), jnp.stack([WEIGHTS, WEIGHTS * 0, WEIGHTS + 1])  # chunks: some, none, all

    def grads(fn):
        return jax.vmap(lambda h, x, w: jax.value_and_grad(lambda h, x: fn(h, x, TARGETS, w), argnums=(0, 1))(h, x))

    got, want = (jax.jit(grads(fn))(stack, xs, masks) for fn in (ours, naive))
    assert small.apart(got[0], want[0]) < 1e-6
    for g, w in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1])):
        assert small.apart(g, w) < 1e-5
    assert float(got[0][1]) == 0.0


def test_micro_batches_under_scan():
    xs, masks = jnp.stack([X, 2 * X]), jnp.stack([WEIGHTS, WEIGHTS + 1])

    def total(fn, head):
        return jax.lax.scan(lambda s, m: (s + fn(head, m[0], TARGETS, m[1]), None), 0.0, (xs, masks))[0]

    got, want = (jax.jit(jax.value_and_grad(functools.partial(total, fn)))(HEADS["lora"]) for fn in (ours, naive))
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-6)
    assert small.apart(got[1], want[1]) < 1e-5


def test_a_frozen_head_has_no_gradient_built():
    """Only what is asked for is computed: x alone, or one factor of an adapter over an int8 base."""
    kernel = HEADS["plain"]["kernel"]

    def made(argnum):
        loss = jax.grad(lambda k, x: ours({"kernel": k}, x, TARGETS, WEIGHTS), argnums=argnum)
        return {frozenset(shape) for shape, _ in small.dots(jax.make_jaxpr(loss)(kernel, X))}

    assert frozenset((D, V)) not in made(1)
    assert frozenset((D, V)) in made(0)

    adapter = HEADS["lora"]["kernel"]
    frozen = QuantWeight.quantize(adapter.w)

    def loss(b, fn, w):
        return fn({"kernel": LoraWeight(w, adapter.a, b, adapter.scale)}, X, TARGETS, WEIGHTS)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    got, want = grad(adapter.b, ours, frozen), grad(adapter.b, naive, frozen.merge())
    assert np.isfinite(want).all()
    assert np.isfinite(got).all()
    assert small.apart(got, want) < 1e-5


@pytest.mark.parametrize("trained", [0, 1, 4, 5, 21])
def test_chunks_without_weight_are_skipped(trained):
    """Tokens that are scored come in ceil(trained / chunk) chunks, wherever they stand in the batch."""
    ran = []

    def project(head, x):
        jax.debug.callback(lambda: ran.append(1))
        return head_logits(head, x)

    weights = np.zeros(B * T, np.float32)
    weights[RNG.permutation(B * T)[:trained]] = 1.0
    weights = jnp.asarray(weights.reshape(B, T))

    @jax.jit
    def run(x, weights):
        return jax.value_and_grad(lambda x: cross_entropy(project, HEADS["plain"], x, TARGETS, weights, chunk=4))(x)

    value, grad = jax.block_until_ready(run(X, weights))
    jax.effects_barrier()
    assert len(ran) == -(-trained // 4)
    assert float(value) == pytest.approx(float(naive(HEADS["plain"], X, TARGETS, weights)), rel=1e-6, abs=1e-6)
    assert np.array_equal(np.any(np.asarray(grad) != 0, axis=-1), np.asarray(weights) > 0)


def largest(fn, *args):
    """Elements of the largest array in a program, inputs aside."""
    sizes = [0]
    for eqn, _ in small.equations(jax.make_jaxpr(fn)(*args)):
        sizes += [int(np.prod(v.aval.shape)) for v in eqn.outvars if hasattr(v.aval, "shape")]
    return max(sizes)


@pytest.mark.parametrize("trained", ["body", "head"])
def test_no_logits_of_the_whole_batch_at_128k(trained):
    b, t, d, v = 4, 1024, 8, 128_000
    shape = jax.ShapeDtypeStruct
    head, x = shape((d, v), jnp.float32), shape((b, t, d), jnp.float32)
    targets, weights = shape((b, t), jnp.int32), shape((b, t), jnp.float32)

    def loss(head, x, targets, weights):
        return cross_entropy(head_logits, {"kernel": head}, x, targets, weights)

    def dense(head, x, targets, weights):
        logits = x @ head
        return (
            weights * (jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0])
        ).sum()

    def each(head, x, targets, weights):
        return jnp.square(token_nats(head_logits, {"kernel": head}, x, targets, weights)).sum()

    argnum = 1 if trained == "body" else 0
    args = (head, x, targets, weights)
    assert largest(jax.value_and_grad(loss, argnums=argnum), *args) <= 256 * v  # one chunk
    assert largest(jax.value_and_grad(each, argnums=argnum), *args) <= 256 * v
    assert largest(jax.value_and_grad(dense, argnums=argnum), *args) >= b * t * v  # the check sees logits


def test_chunks_are_bounded_in_tokens_and_in_bytes():
    assert chunk_size(10**6, 512) == 1024
    assert chunk_size(10**6, 128_000) == 256
    assert chunk_size(20, 512) == 128
    for vocab in (512, 32_000, 256_000):
        assert chunk_size(10**6, vocab) * vocab <= max(2**24, 256 * vocab)


# --- a value each token


def naive_nats(head, x, targets, where, z_loss=0.0):
    """As `naive`: [B, T]."""
    logits = head_logits(head, x)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    lse = jnp.log(jnp.exp(logits - top).sum(-1)) + top[..., 0]
    picked = (logits * jax.nn.one_hot(targets, V)).sum(-1)
    return jnp.where(where != 0, lse - picked + z_loss * lse**2, 0.0)


def our_nats(head, x, targets, where, z_loss=0.0):
    return token_nats(head_logits, head, x, targets, where, z_loss=z_loss, chunk=4)


def crooked(nats):
    """A function of nats whose slopes are of both signs, differ by token, and mix tokens and rows."""
    rows = nats.sum(-1)
    return jax.nn.softplus(rows[0] - rows[1] + 0.3 * rows[2]) + jnp.sin(nats).sum() + 1e-2 * jnp.square(nats.sum())


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_any_function_of_nats_has_exact_gradients(kind, z_loss):
    def both(fn):
        def value(head, x):
            return crooked(fn(head, x, TARGETS, WEIGHTS, z_loss))

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(HEADS[kind], X)

    (value, got), (want, grads) = both(our_nats), both(naive_nats)
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(grads), strict=True):
        assert small.apart(g, w) < 1e-5
    alone = jax.jit(jax.grad(lambda x: crooked(our_nats(HEADS[kind], x, TARGETS, WEIGHTS, z_loss))))(X)
    assert small.apart(alone, grads[1]) < 1e-5  # the path of a frozen head


@pytest.mark.parametrize("pack", [QuantWeight.quantize, lambda w: Nf4Weight.quantize(w)], ids=["int8", "nf4"])
def test_nats_through_an_adapter_over_a_quantised_head(pack):
    adapter, base = HEADS["lora"]["kernel"], pack(TABLE.T)

    def grad(fn, w):
        def value(b, x):
            return crooked(fn({"kernel": LoraWeight(w, adapter.a, b, adapter.scale)}, x, TARGETS, WEIGHTS))

        return jax.jit(jax.grad(value, argnums=(0, 1)))(adapter.b, X)

    for g, w in zip(grad(our_nats, base), grad(naive_nats, base.merge()), strict=True):
        assert small.apart(g, w) < 1e-5


def test_nats_are_zero_where_nothing_is_asked():
    nats = np.asarray(jax.jit(our_nats)(HEADS["plain"], X, TARGETS, WEIGHTS))
    assert np.array_equal(nats == 0, np.asarray(WEIGHTS) == 0)
    assert small.apart(nats, naive_nats(HEADS["plain"], X, TARGETS, WEIGHTS)) < 1e-6
    none, grad = jax.jit(jax.value_and_grad(lambda x: crooked(our_nats(HEADS["plain"], x, TARGETS, WEIGHTS * 0))))(X)
    assert float(none) == pytest.approx(float(np.log(2)))
    assert not np.any(grad)
    every = token_nats(head_logits, HEADS["plain"], X, TARGETS)
    assert small.apart(every, naive_nats(HEADS["plain"], X, TARGETS, jnp.ones_like(WEIGHTS))) < 1e-6


def test_cross_entropy_is_the_weighted_sum_of_nats():
    def summed(head, x):
        return (WEIGHTS * token_nats(head_logits, head, x, TARGETS, WEIGHTS, z_loss=0.1, chunk=4)).sum()

    def at_once(head, x):
        return cross_entropy(head_logits, head, x, TARGETS, WEIGHTS, z_loss=0.1, chunk=4)

    got, want = (jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(HEADS["lora"], X) for fn in (summed, at_once))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert small.apart(g, w) < 1e-6


@pytest.mark.parametrize("shared", [True, False], ids=["one batch", "batches"])
def test_nats_of_members_under_vmap(shared):
    stack = jax.tree.map(lambda w: jnp.stack([w, -w, 2 * w]), HEADS["lora"])
    xs = jnp.stack([X, 2 * X, X + 1])
    masks = WEIGHTS if shared else jnp.stack([WEIGHTS, WEIGHTS * 0, WEIGHTS + 1])

    def grads(fn):
        def one(head, x, where):
            return jax.value_and_grad(lambda h, x: crooked(fn(h, x, TARGETS, where)), argnums=(0, 1))(head, x)

        return jax.jit(jax.vmap(one, in_axes=(0, 0, None if shared else 0)))(stack, xs, masks)

    for g, w in zip(jax.tree.leaves(grads(our_nats)), jax.tree.leaves(grads(naive_nats)), strict=True):
        assert small.apart(g, w) < 2e-5


def test_what_else_is_read_off_the_logits():
    def also(logits, targets):
        return {"likeliest": logits.argmax(-1) == targets, "mean": logits.mean(-1), "two": logits[:, :2]}

    @jax.jit
    def run(x):
        nats, more = token_nats(head_logits, HEADS["plain"], x, TARGETS, WEIGHTS, chunk=4, also=also)
        return crooked(nats), more

    (_, more), grad = jax.jit(jax.value_and_grad(run, has_aux=True))(X)
    logits, there = np.asarray(head_logits(HEADS["plain"], X)), np.asarray(WEIGHTS) != 0
    assert np.array_equal(more["likeliest"], (logits.argmax(-1) == np.asarray(TARGETS)) & there)
    assert small.apart(more["mean"], np.where(there, logits.mean(-1), 0)) < 1e-6
    assert more["two"].shape == (B, T, 2)
    want = jax.jit(jax.grad(lambda x: crooked(our_nats(HEADS["plain"], x, TARGETS, WEIGHTS))))(X)
    assert np.array_equal(grad, want)


@pytest.mark.parametrize(
    ("asked", "at_once", "each"), [((), 1, 1), ((1,), 2, 2), ((0,), 2, 3), ((0, 1), 3, 4)], ids=str
)
def test_logits_are_made_once_more_only_for_a_trained_head(asked, at_once, each):
    """Products of a chunk: the logits, and the gradient by what is asked for (0: the head, 1: hidden states)."""

    def products(fn):
        def value(head, x, weights):
            return jnp.square(fn(head_logits, {"kernel": head}, x, TARGETS, weights, chunk=4)).sum()

        made = jax.grad(value, argnums=asked) if asked else value
        text = jax.jit(made).lower(TABLE.T, X, WEIGHTS).compile().as_text()
        return len(re.findall(r" dot\(", text))

    assert (products(cross_entropy), products(token_nats)) == (at_once, each)


# --- causal_lm


def flat(batch):
    return {k: v[0] for k, v in batch.items()}


def test_causal_lm_is_the_mean_of_torch_cross_entropy():
    import torch

    batch, module, params = flat(small.batch(rows=4)), small.decoder(), small.weights()
    (total, weight), aux = jax.jit(lambda p: causal_lm(module)(p, batch, None))(params)
    logits = np.array(jax.jit(lambda p: module.apply({"params": p}, batch["tokens"]))(params))
    labels = np.where(batch["weights"] > 0, batch["targets"], -100).astype(np.int64)
    want = torch.nn.functional.cross_entropy(torch.tensor(logits).flatten(0, 1), torch.tensor(labels).flatten())
    assert float(total / weight) == pytest.approx(float(want), rel=1e-5)
    assert float(weight) == batch["weights"].sum()
    assert total.dtype == jnp.float32
    assert aux == {}


def test_packed_rows_need_segments():
    """Two documents in a row cost what they cost apart, if the loss is told of them."""
    batch, module, params = flat(small.batch(rows=2)), small.decoder(), small.weights()
    half = small.T // 2
    packed = batch | {
        "segments": np.repeat([[1, 2]], half, axis=1).repeat(2, axis=0).astype(np.int32),
        "positions": np.tile(np.arange(half, dtype=np.int32), (2, 2)),
        "weights": np.ones((2, small.T), np.float32),
    }
    apart = {k: v.reshape(4, half) if v.ndim == 2 else np.arange(4, dtype=np.int32) for k, v in packed.items()}
    whole = jax.jit(lambda p, b: causal_lm(module, packed=True)(p, b, None)[0][0])(params, packed)
    leaking = jax.jit(lambda p, b: causal_lm(module)(p, b, None)[0][0])
    assert float(whole) == pytest.approx(float(leaking(params, apart)), rel=1e-5)
    assert float(leaking(params, packed)) != pytest.approx(float(whole), rel=1e-3)
