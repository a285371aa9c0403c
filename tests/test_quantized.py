"""Quantised bases: what rounding costs, what a product keeps, and QLoRA on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import VOCAB, T, decoder, weights

from jaxtune import (
    adapt,
    causal_lm,
    cli,
    count,
    init_state,
    load,
    lora,
    make_train_step,
    merge,
    partition,
    quantize,
    tiny,
)
from jaxtune.errors import UserError
from jaxtune.tree import combine, flatten
from jaxtune.weights.leaf import dot, embed, is_weight, merge_leaf, transposed_dot
from jaxtune.weights.packed import BLOCK, KINDS, NF4, Nf4Weight, packs

# Dettmers et al. 2023, appendix E.
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_nf4_is_the_papers():
    np.testing.assert_allclose(NF4, PUBLISHED, atol=2e-6)


def nbytes(leaf):
    return leaf.size * leaf.dtype.itemsize


def matrix(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@jax.jit
def _nf4(w):
    q = Nf4Weight.quantize(w)
    return q, q._absmax(), q.merge()


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.sampled_from([(2, 1), (6, 5), (64, 16), (96, 300), (130, 7)]), st.integers(0, 3), st.floats(1e-3, 1e3))
def test_nf4_rounds_to_the_nearest_value(shape, seed, size):
    w = np.float32(size) * np.asarray(matrix(*shape, seed=seed))
    q, known, merged = _nf4(w)
    k, n = shape
    block = k // q.absmax.shape[0]
    known = np.repeat(np.asarray(known), block, 0)
    exact = np.repeat(np.abs(w.reshape(-1, block, n)).max(1), block, 0)
    spread = np.abs(exact - exact.mean()).max()
    assert block <= BLOCK and np.abs(known - exact).max() <= spread / 127 / 2 * 1.01 + 1e-6 * size
    nearest = NF4[np.abs(w[..., None] / np.where(known > 0, known, 1)[..., None] - NF4).argmin(-1)] * known
    np.testing.assert_allclose(merged, nearest, atol=1e-5 * size)


def test_nf4_takes_4_bits_and_an_eighth():
    q = jax.eval_shape(Nf4Weight.quantize, jax.ShapeDtypeStruct((2, 512, 768), jnp.float32))
    bits = 8 * sum(map(nbytes, jax.tree.leaves(q))) / (2 * 512 * 768)
    assert bits < 4.13


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp8_matmul"])
def test_products_are_those_of_the_matrix_it_stands_for(kind):
    w = KINDS[kind](matrix(64, 24))
    plain = merge_leaf(w)
    assert (
        0 < float(jnp.abs(plain - matrix(64, 24)).max()) < {"nf4": 0.6, "int8": 0.02, "fp8": 0.15, "mxfp4": 1.0}[kind]
    )
    x, y, ids = matrix(3, 5, 64), matrix(3, 5, 24), jnp.array([[0, 63], [7, 7]])

    @jax.jit
    def both(x, y, w, plain):
        return (
            (dot(x, w), x @ plain),
            (transposed_dot(y, w), y @ plain.T),
            (embed(ids, w), plain[ids]),
            (jax.grad(lambda x: jnp.vdot(dot(x, w), y))(x), y @ plain.T),
        )

    for ours, theirs in both(x, y, w, plain):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    stacked = KINDS[kind](matrix(3, 64, 24))
    np.testing.assert_allclose(jax.tree.map(lambda x: x[1], stacked).merge(), stacked.merge()[1], atol=1e-6)


def e4m3(x):
    """Each row rounded to the nearest of e4m3's 253 numbers by search, its largest entry at 448."""
    grid = np.array([(2**-9 * m) if e == 0 else 2.0 ** (e - 7) * (1 + m / 8) for e in range(16) for m in range(8)][:-1])
    grid = np.concatenate([-grid[::-1], grid])
    scale = np.abs(x).max(-1, keepdims=True) / 448
    return grid[np.abs((x / scale)[..., None] - grid).argmin(-1)] * scale


def test_products_in_fp8_round_rows_forward_and_backward():
    """y and dx are exact products of rows rounded to e4m3; a row of zeros stays one; members of a sweep as alone."""
    w, x, g = KINDS["fp8_matmul"](matrix(64, 24)), np.array(matrix(3, 5, 64)), np.array(matrix(3, 5, 24, seed=1))
    x[0, 0], x[1, 1] = 0, 1e-30
    scale = np.asarray(w.scale[0], np.float64)
    plain = np.asarray(w.q, np.float64)

    @jax.jit
    def both(x, g):
        y, back = jax.vjp(lambda x: dot(x, w), x)
        return y, back(g)[0]

    rounded = e4m3(np.where(x.any(-1, keepdims=True), x, 1).astype(np.float64)) * x.any(-1, keepdims=True)
    wanted = rounded @ plain * scale, e4m3(g * scale) @ plain.T
    for found in (both(x, g), jax.vmap(both)(x, g)):
        for got, want in zip(found, wanted, strict=True):
            # A value half-way between two numbers may go to either in float32; one of 64 moves the sum by 1/16 of it.
            off = np.abs(got - want) / np.abs(want).max()
            assert np.isfinite(got).all() and np.median(off) < 1e-6 and off.max() < 0.02
    far = np.abs(both(x, g)[0] - x @ np.asarray(w.merge()))
    assert far.max() > 1e-2  # not storage alone


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_keeps_no_plain_matrix(kind):
    def kept(w):
        _, back = jax.vjp(lambda x: dot(x, w), matrix(3, 64))
        return max((leaf.nbytes for leaf in jax.tree.leaves(back) if leaf.shape[-2:] == (64, 24)), default=0)

    assert kept(matrix(64, 24)) == 4 * 64 * 24  # a plain weight is kept: the check can fail
    assert kept(KINDS[kind](matrix(64, 24))) <= 64 * 24  # one byte a weight at most


@pytest.mark.parametrize("remat", ["none", "everything"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_backward_pass_of_a_model_keeps_no_plain_matrix(kind, settings, remat):
    """All that is kept, in bytes: the packed body's in place of the plain one's, and not one matrix more."""
    module = decoder().clone(remat=remat)
    loss_fn = causal_lm(module)

    def kept(base):
        micro = jax.tree.map(lambda x: x[0], batch())

        def back(trainable, member, frozen):
            return jax.vjp(lambda t: loss_fn(combine(t, member, frozen), micro, None)[0][0], trainable)[1]

        parts = partition(*lora(base, jax.random.key(0), r=4, module=module, **settings))
        return sum(map(nbytes, jax.tree.leaves(jax.eval_shape(back, *parts))))

    def body(tree):
        return sum(leaf.nbytes for path, leaf in flatten(tree).items() if "_proj/kernel" in path)

    packed = quantize(weights(), kind)
    matrices = [leaf for path, leaf in flatten(weights()).items() if "_proj/kernel" in path]
    smallest = min(leaf.nbytes // leaf.shape[0] for leaf in matrices)
    spared = kept(weights()) - kept(packed)
    assert spared > body(weights()) - body(packed) - smallest


def batch():
    tokens = np.random.default_rng(3).integers(0, VOCAB, (1, 4, T), dtype=np.int32)
    place = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    ones = np.ones(tokens.shape, np.float32)
    row = np.arange(4, dtype=np.int32)[None]
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, -1),
        "positions": place,
        "segments": ones.astype(np.int32),
        "weights": ones,
        "row": row,
    }


@pytest.mark.parametrize(
    "kind", ["nf4", *(pytest.param(k, marks=pytest.mark.slow) for k in ("int8", "fp8", "fp8_matmul"))]
)
def test_qlora(kind):
    """Adapters learn over a quantised base, whose logits stay near the plain one's and whose bytes stay as they are."""
    module, base = decoder(), quantize(weights(), kind)
    leaves = flatten(base)
    assert not any(path.startswith("embed_tokens") and leaf.dtype == jnp.uint8 for path, leaf in leaves.items())
    tokens = batch()["tokens"][0]
    logits = jax.jit(lambda params: module.apply({"params": params}, tokens))
    ours = logits(base)
    if kind != "fp8_matmul":  # which rounds what is multiplied as well
        np.testing.assert_allclose(ours, logits(jax.jit(merge)(base)), atol=2e-4)
    plain = logits(weights())
    near = {"nf4": 0.5, "int8": 0.03, "fp8": 0.15, "fp8_matmul": 0.2}[kind]
    assert np.abs(np.asarray(ours) - plain).mean() / np.abs(plain).mean() < near

    params, mask = lora(base, jax.random.key(0), r=4, module=module)
    assert count(params, mask) == count(*lora(weights(), jax.random.key(0), r=4, module=module))
    trainable, member, frozen = partition(params, mask)
    before = jax.tree.map(np.asarray, frozen)
    tx = optax.adam(3e-2)
    step = make_train_step(causal_lm(module), tx)
    state, losses = init_state(trainable, member, tx, jax.random.key(1)), []
    for _ in range(12):
        state, metrics = step(state, frozen, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, frozen)


def test_a_model_that_is_not_ours_is_quantised_by_its_layouts():
    def apply(params, x):
        heads = jnp.einsum("bd,dhk->bhk", x, params["heads"])
        return jnp.einsum("bhk,hkd->bd", heads, params["out"])

    params, x = {"heads": matrix(8, 2, 4), "out": matrix(2, 4, 8)}, matrix(3, 8)
    layouts = adapt(apply).layouts(params, x)
    packed = quantize(params, "nf4", ".*", layouts)
    assert is_weight(packed["out"]) and merge(packed)["out"].shape == (2, 4, 8)
    np.testing.assert_allclose(adapt(apply)(packed, x), apply(merge(packed), x), atol=1e-5)


def test_what_cannot_be_quantised_is_said():
    with pytest.raises(
        UserError, match=r"is not one of 'nf4', 'int8', 'fp8', 'fp8_matmul', 'mxfp4'\. Did you mean 'nf4'"
    ):
        packs(weights(), "nf44")
    with pytest.raises(UserError, match="No matrix is named"):
        packs(weights(), "nf4", "layers.*")
    with pytest.raises(UserError, match="is for experts, and this model has none"):
        packs(weights(), "mxfp4")
    with pytest.raises(UserError, match="has 7 rows"):
        packs({"odd": {"kernel": jnp.ones((7, 4))}}, "nf4", ".*")


def test_a_checkpoint_is_quantised_as_it_is_read():
    _, read = load(tiny.BASE, quantization="nf4")
    _, plain = load(tiny.BASE)
    whole = quantize(plain, "nf4")
    assert jax.tree.structure(read) == jax.tree.structure(whole)
    # The mean of all absolute maxima is summed in another order.
    plain_of = jax.jit(merge)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), plain_of(read), plain_of(whole))


def test_what_is_trained_is_not_quantised(capsys, tmp_path):
    argv = [
        "train",
        "--config=configs/quickstart.py",
        "--config.model.quantization=nf4",
        f"--workdir={tmp_path / 'run'}",
    ]
    assert cli.main([*argv, "--config.tune.method=full", "--dry-run"]) == 2
    assert "quantised parameter cannot be trained" in capsys.readouterr().err
    assert cli.main([*argv, "--dry-run"]) == 0
    assert "every check passed" in capsys.readouterr().out
