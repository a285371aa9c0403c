import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import zoo

from jaxtune.tree import FROZEN, MEMBER, TRAIN, combine, flatten, match, partition
from jaxtune.weights.adapters import DoraWeight, Ia3Weight, LoraWeight, TokensWeight
from jaxtune.weights.leaf import attend, dot, drop, embed, fold, merge, row_keys
from jaxtune.weights.packed import QuantWeight

B, T, K, N, R = 3, 5, 8, 6, 2
RULES = [(".*/(a|b|magnitude)", TRAIN), (".*/(scale|dropout)", MEMBER), (".*", FROZEN)]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def lora(*lead, k=K, n=N, scale=0.7, dropout=None, quantised=False):
    w = normal(0, *lead, k, n)
    rate = None if dropout is None else jnp.full(lead, dropout)
    return LoraWeight(
        QuantWeight.quantize(w) if quantised else w,
        normal(1, *lead, k, R),
        normal(2, *lead, R, n),
        jnp.full(lead, scale, jnp.float32),
        rate,
    )


def base_of(weight):
    """The plain base in float64, by the definition of int8 with a scale for each column."""
    w = weight.w
    if isinstance(w, QuantWeight):
        return np.asarray(w.q, np.float64) * np.asarray(w.scale, np.float64)
    return np.asarray(w, np.float64)


def dense(weight):
    """w + scale a b in float64."""
    a, b, scale = (np.asarray(x, np.float64) for x in (weight.a, weight.b, weight.scale))
    return base_of(weight) + scale[..., None, None] * (a @ b)


both_bases = pytest.mark.parametrize("quantised", [False, True], ids=["plain", "int8"])


# --- closed forms


@both_bases
def test_dot_is_the_dense_product(quantised):
    weight, x = lora(quantised=quantised), normal(3, B, T, K)
    assert zoo.apart(dot(x, weight), np.asarray(x, np.float64) @ dense(weight)) < 1e-6


@both_bases
def test_merge_is_the_dense_matrix(quantised):
    weight = lora(4, quantised=quantised)
    merged = merge({"q": {"kernel": weight, "bias": jnp.ones(3)}})
    assert zoo.apart(merged["q"]["kernel"], dense(weight)) < 1e-6
    assert np.array_equal(merged["q"]["bias"], np.ones(3))


@both_bases
def test_embed_is_the_rows_of_the_dense_table(quantised):
    table, ids = lora(k=11, quantised=quantised), np.array([[0, 10, 3], [3, 3, 7]])
    assert zoo.apart(embed(ids, table), dense(table)[ids]) < 1e-6


@both_bases
def test_the_tied_head_uses_the_base_table_alone_as_peft_does(quantised):
    table, x = lora(k=11, quantised=quantised), normal(3, B, T, N)
    assert zoo.apart(attend(x, table), np.asarray(x, np.float64) @ base_of(table).T) < 1e-6


def test_quantisation_rounds_to_half_a_step_of_each_column():
    w = normal(0, 4, K, N) * np.logspace(-3, 3, N, dtype=np.float32)
    weight = QuantWeight.quantize(w.at[:, :, 0].set(0.0))
    error = np.abs(weight.merge() - w.at[:, :, 0].set(0.0))
    step = np.abs(w).max(axis=1, keepdims=True) / 127
    assert weight.q.dtype == jnp.int8
    assert weight.scale.shape == (4, 1, N)
    assert np.all(error <= step / 2 * 1.001)
    assert np.all(error[:, :, 0] == 0)
    assert error.max() > step.max() / 4  # it does round


@both_bases
def test_a_stack_is_sliced_field_by_field_under_scan(quantised):
    stack = lora(3, k=K, n=K, quantised=quantised)
    stack.scale = jnp.asarray([0.7, 0.0, -2.0])
    x = normal(3, B, T, K)
    y, _ = jax.lax.scan(lambda x, w: (dot(x, w), None), x, stack)
    want = np.asarray(x, np.float64)
    for matrix in dense(stack):
        want = want @ matrix
    assert zoo.apart(y, want) < 1e-5


@pytest.mark.parametrize("dropout", [None, 0.25])
@both_bases
def test_bfloat16_activations_keep_their_type(quantised, dropout):
    """float32 factors, scale and rate must not promote the carry of the scan."""
    stack = lora(3, k=K, n=K, quantised=quantised, dropout=dropout)
    keys = row_keys(jax.random.key(0), jnp.arange(B))
    x = normal(3, B, T, K).astype(jnp.bfloat16)
    y, _ = jax.lax.scan(lambda x, w: (dot(x, w, keys), None), x, stack)
    assert y.dtype == jnp.bfloat16

    one = jax.tree.map(lambda s: s[0], stack)
    assert zoo.apart(dot(x, one), np.asarray(x, np.float64) @ dense(one)) < 0.02
    assert attend(x, one).dtype == jnp.bfloat16


def test_merge_keeps_the_type_of_the_base():
    weight = lora()
    weight.w = weight.w.astype(jnp.bfloat16)
    weight.a = weight.a.astype(jnp.bfloat16)
    assert weight.merge().dtype == jnp.bfloat16
    # Added up in float32 and rounded once: within half a unit in the last of 8 bits.
    want = dense(weight)
    assert np.all(np.abs(np.asarray(weight.merge(), np.float64) - want) <= 2**-8 * np.abs(want) + 1e-6)


# --- gradients


@both_bases
def test_gradients_exist_for_a_and_b_alone_and_equal_the_closed_form(quantised):
    params = {"q": lora(quantised=quantised)}
    x, g = normal(3, B, T, K), normal(4, B, T, N)
    trainable, member, frozen = partition(params, match(RULES, params))
    gradient = jax.grad(lambda t: jnp.sum(dot(x, combine(t, member, frozen)["q"]) * g))(trainable)
    assert list(flatten(gradient)) == ["q/a", "q/b"]

    flat_x, flat_g = np.asarray(x, np.float64).reshape(-1, K), np.asarray(g, np.float64).reshape(-1, N)
    a, b = np.asarray(params["q"].a, np.float64), np.asarray(params["q"].b, np.float64)
    assert zoo.apart(gradient["q"].a, 0.7 * flat_x.T @ (flat_g @ b.T)) < 1e-6
    assert zoo.apart(gradient["q"].b, 0.7 * (flat_x @ a).T @ flat_g) < 1e-6


@both_bases
def test_the_gradient_of_the_input_goes_through_base_and_factors(quantised):
    weight, x, g = lora(quantised=quantised), normal(3, B, T, K), normal(4, B, T, N)
    gradient = jax.grad(lambda x: jnp.sum(dot(x, weight) * g))(x)
    assert zoo.apart(gradient, np.asarray(g, np.float64) @ dense(weight).T) < 1e-6


def test_no_product_has_the_shape_of_a_dense_gradient():
    """Prime sizes: a [K, N] result could only be a dW or a product a b."""
    k, n, params = 53, 47, {"q": lora(k=53, n=47)}
    trainable, member, frozen = partition(params, match(RULES, params))
    x = normal(3, B, T, k)
    step = jax.grad(lambda t: jnp.sum(dot(x, combine(t, member, frozen)["q"]) ** 2))
    products = [e for e in jax.make_jaxpr(step)(trainable).eqns if e.primitive.name == "dot_general"]
    assert products
    assert not {(k, n), (n, k)} & {e.outvars[0].aval.shape for e in products}


# --- dropout


@jax.jit
def noisy(x, weight, key, rows):
    return dot(x, weight, row_keys(key, rows))


noise = jax.jit(drop)


@pytest.mark.slow
def test_masks_follow_the_global_row_however_rows_are_split():
    weight, x, rows = lora(dropout=0.5), normal(3, 6, T, K), jnp.asarray([4, 0, 9, 2, 7, 1])
    key = jax.random.key(3)
    whole = noisy(x, weight, key, rows)
    for size in (1, 3):
        parts = [noisy(x[i : i + size], weight, key, rows[i : i + size]) for i in range(0, 6, size)]
        assert np.allclose(jnp.concatenate(parts), whole, atol=1e-5)
    order = jnp.asarray([5, 3, 1, 0, 2, 4])
    assert np.allclose(noisy(x[order], weight, key, rows[order]), whole[order], atol=1e-5)
    assert not np.allclose(noisy(x, weight, key, rows + 1), whole, atol=1e-2)
    assert not np.allclose(noisy(x, weight, jax.random.key(4), rows), whole, atol=1e-2)


def test_rows_layers_and_modules_draw_apart():
    x = jnp.ones((2, 64, 64))
    keys = row_keys(jax.random.key(0), jnp.arange(2))
    sites = [keys, *(fold(keys, site) for site in (0, 1, "q_proj", "v_proj"))]
    masks = [np.asarray(row != 0) for site in sites for row in noise(x, 0.5, site)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert 0.45 < np.mean(one == other) < 0.55


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    x = jnp.full((4, 100, 100), 3.0)
    y = noise(x, jnp.float32(rate), row_keys(jax.random.key(1), jnp.arange(4)))
    assert np.mean(y == 0) == pytest.approx(rate, abs=5 * np.sqrt(rate * (1 - rate) / x.size))
    kept = np.asarray(y[y != 0])
    assert np.allclose(kept, 3.0 / (1 - rate) if rate < 1 else 0)


def test_dropout_touches_the_adapter_path_only():
    weight, x = lora(dropout=1.0), normal(3, B, T, K)
    keys = row_keys(jax.random.key(0), jnp.arange(B))
    assert np.array_equal(dot(x, weight, keys), dot(x, weight.w))
    assert not np.allclose(dot(x, weight), dot(x, weight.w))


@pytest.mark.parametrize("dropout", [None, 0.0])
def test_without_dropout_the_compiled_program_draws_no_random_bits(dropout):
    """None compiles no dropout at all; a rate is data, also a rate of 0, and does."""

    def forward(x, stack, key):
        keys = row_keys(key, jnp.arange(B))
        return jax.lax.scan(lambda x, w: (dot(x, w, fold(keys, "q_proj")), None), x, stack)[0]

    args = normal(3, B, T, K), lora(3, k=K, n=K, dropout=dropout), jax.random.key(0)
    assert ("random_bits" in str(jax.make_jaxpr(forward)(*args))) == (dropout is not None)
    # Threefry's rotations are what folding keys and drawing bits compile to.
    assert ("shift-left" in jax.jit(forward).lower(*args).compile().as_text()) == (dropout is not None)


def test_a_model_gives_each_global_row_its_own_noise():
    module, params = zoo.ours("llama")
    params = zoo.with_lora(params, jax.random.key(0), dropout=0.5)
    key, ids = jax.random.key(5), zoo.tokens(4, 8)

    @jax.jit
    def forward(ids, rows):
        return module.apply({"params": params}, ids, keys=row_keys(key, rows))

    rows, order = jnp.asarray([7, 0, 3, 4]), np.array([2, 0, 3, 1])
    whole = forward(ids, rows)
    assert zoo.apart(forward(ids[order], rows[order]), whole[order]) < 1e-5
    assert zoo.apart(forward(ids, rows[order]), whole) > 1e-2


# --- DoRA


def dora(*lead, **settings):
    w = lora(*lead, **settings)
    return DoraWeight(w.w, w.a, w.b, w.scale, w.dropout, magnitude=jnp.abs(normal(5, *lead, w.b.shape[-1])) + 0.5)


def dora_dense(weight):
    """Equation 5 of the paper in float64."""
    v = dense(weight)
    return v * (np.asarray(weight.magnitude, np.float64) / np.linalg.norm(v, axis=-2))[..., None, :]


@both_bases
def test_dora_is_its_equation(quantised):
    weight, x, ids = dora(quantised=quantised), normal(3, B, T, K), np.array([[0, 7], [3, 3]])
    assert zoo.apart(dot(x, weight), np.asarray(x, np.float64) @ dora_dense(weight)) < 1e-5
    assert zoo.apart(embed(ids, weight), dora_dense(weight)[ids]) < 1e-5
    stack = dora(4, quantised=quantised)
    assert zoo.apart(stack.merge(), dora_dense(stack)) < 1e-6


@both_bases
def test_gradients_of_dora_take_the_norm_as_a_constant(quantised):
    params = {"q": dora(quantised=quantised)}
    x, g = normal(3, B, T, K), normal(4, B, T, N)
    trainable, member, frozen = partition(params, match(RULES, params))
    gradient = jax.grad(lambda t: jnp.sum(dot(x, combine(t, member, frozen)["q"]) * g))(trainable)
    a, b, m = (np.asarray(getattr(params["q"], f), np.float64) for f in ("a", "b", "magnitude"))
    norm = np.linalg.norm(dense(params["q"]), axis=0)
    flat_x, flat_g = np.asarray(x, np.float64).reshape(-1, K), np.asarray(g, np.float64).reshape(-1, N)
    through = flat_g * m / norm
    assert zoo.apart(gradient["q"].a, 0.7 * flat_x.T @ (through @ b.T)) < 1e-5
    assert zoo.apart(gradient["q"].b, 0.7 * (flat_x @ a).T @ through) < 1e-5
    assert zoo.apart(gradient["q"].magnitude, (flat_g * (flat_x @ dense(params["q"]))).sum(0) / norm) < 1e-5


def test_layers_that_dora_leaves_out_are_the_base_and_stay():
    weight, x = dora(scale=0.0), normal(3, B, T, K)
    assert np.array_equal(dot(x, weight), dot(x, weight.w))
    assert np.array_equal(weight.merge(), weight.w)
    gradient = jax.grad(lambda w: jnp.square(dot(x, w)).sum())(weight)
    assert not np.any(gradient.magnitude)


def test_a_step_of_dora_costs_little_more_than_one_of_lora():
    """Prime sizes: a product of shape [K, N] could only be w + s a b or a gradient of it."""
    k, n, tokens = 211, 223, normal(3, 4, 128, 211)

    def cost(weight):
        params = {"q": weight}
        trainable, member, frozen = partition(params, match(RULES, params))
        step = jax.grad(lambda t, x: jnp.square(dot(x, combine(t, member, frozen)["q"])).sum(), argnums=(0, 1))
        found = list(small.dots(jax.make_jaxpr(step)(trainable, tokens)))
        assert not {(k, n), (n, k)} & {shape for shape, _ in found}
        return sum(flops for _, flops in found)

    ratio = cost(dora(k=k, n=n)) / cost(lora(k=k, n=n))
    assert 1 < ratio <= 1.25


# --- other leaves


def test_trained_rows_stand_in_the_table_and_in_the_tied_head():
    rows = TokensWeight(normal(0, 11, N), normal(1, 2, N), (7, 3))
    table = np.array(rows.w)
    table[[7, 3]] = rows.rows
    ids, x = np.array([[0, 7, 3], [10, 3, 1]]), normal(3, B, T, N)
    assert np.array_equal(embed(ids, rows), table[ids])
    assert np.array_equal(rows.merge(), table)
    assert zoo.apart(attend(x, rows), np.asarray(x, np.float64) @ table.T) < 1e-6


def test_merged_ia3_scales_the_bias_too():
    w, bias, out = normal(0, 2, K, N), normal(1, 2, N), normal(2, 2, N)
    tree = {"k": {"kernel": Ia3Weight(w, jnp.array([1.0, 0.0]), out=out, bias=bias), "bias": bias}}
    merged, x = merge(tree)["k"], normal(3, B, T, K)
    for layer, vector in ((0, out[0]), (1, 1.0)):
        y = dot(x, jax.tree.map(lambda leaf, i=layer: leaf[i], tree["k"]["kernel"])) + bias[layer]
        assert zoo.apart(y, (np.asarray(x, np.float64) @ w[layer] + bias[layer]) * vector) < 1e-5
        assert zoo.apart(dot(x, merged["kernel"][layer]) + merged["bias"][layer], y) < 1e-5
