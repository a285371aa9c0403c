"""Chunked cross-entropy against the naive one; what it never holds; the next-token objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxtune.models.decoder import head_logits
from jaxtune.objectives.causal_lm import causal_lm
from jaxtune.objectives.cross_entropy import chunk_size, cross_entropy
from jaxtune.weights.leaf import LoraWeight, QuantWeight

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

    argnum = 1 if trained == "body" else 0
    args = (head, x, targets, weights)
    assert largest(jax.value_and_grad(loss, argnums=argnum), *args) <= 256 * v  # one chunk
    assert largest(jax.value_and_grad(dense, argnums=argnum), *args) >= b * t * v  # the check sees logits


def test_chunks_are_bounded_in_tokens_and_in_bytes():
    assert chunk_size(10**6, 512) == 1024
    assert chunk_size(10**6, 128_000) == 256
    assert chunk_size(20, 512) == 128
    for vocab in (512, 32_000, 256_000):
        assert chunk_size(10**6, vocab) * vocab <= max(2**24, 256 * vocab)


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
