"""`adapt`: models of other libraries with polymorphic leaves, against the same model with merged weights."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxtune
from jaxtune import FROZEN, TRAIN, LoraWeight, QuantWeight, ShapedWeight, adapt, combine, lora, merge, partition
from jaxtune.errors import UserError
from jaxtune.weights.foreign import Axis, MatrixLayout, Rider
from jaxtune.weights.leaf import is_weight, map_weights, plain, row_keys
from jaxtune.weights.rewrite import reshape


class Model(NamedTuple):
    apply: Callable
    params: Any
    args: tuple
    targets: str
    layouts: dict[str, tuple]  # some that must be found


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(12)(nn.gelu(nn.Dense(20)(x))), None


class Transformer(nn.Module):
    """Scan, remat, heads as axes, a lookup, a tied head, a convolution along the text."""

    @nn.compact
    def __call__(self, ids, train=False):
        table = nn.Embed(11, 12)
        x = nn.Conv(12, (3,), strides=1)(table(ids))
        body = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return table.attend(body()(x, None)[0])


class Cnn(nn.Module):
    """Strides, running statistics, a flattened head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(6, (3, 3), (2, 2))(x)))
        x = nn.Conv(5, (2, 3), padding="VALID")(x)
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


class Rows(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(7, 12, rngs=rngs), nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def _plain(params, x, index):
    """A stack by index and by slice, heads by reshape, a transposed kernel, an einsum, a loop and a branch."""
    for layer in range(2):
        x = jnp.tanh(x @ params["stack"][layer])
    x = x @ params["stack"][index]
    heads = jnp.einsum("bd,dhk->bhk", x, params["heads"].reshape(6, 2, 5))
    x = jnp.einsum("bhk,khd->bd", heads, params["out"].reshape(2, 5, 6).transpose(1, 0, 2))
    x = jax.lax.fori_loop(0, 2, lambda _, y: jnp.tanh(y @ params["loop"].T), x)
    return jax.lax.cond(index > 0, lambda y: y @ params["branch"].astype(jnp.float32), lambda y: y, x)


def _ensemble(params, x):
    return jax.vmap(lambda w, v: jnp.tanh(x @ w) @ v)(params["first"], params["second"])


def _tree(shapes):
    rng = np.random.default_rng(0)
    return {n: jax.device_put(np.float32(0.4 * rng.standard_normal(s))) for n, s in shapes.items()}


def _models() -> dict[str, Callable[[], Model]]:
    key = jax.random.key(0)

    def transformer():
        ids = jax.random.randint(key, (2, 5), 0, 11)
        attention = "params/ScanCheckpointBlock_0/MultiHeadDotProductAttention_0"
        layouts = {
            f"{attention}/query/kernel": ((0,), (1,), (2, 3), False),
            f"{attention}/out/kernel": ((0,), (1, 2), (3,), False),
            "params/Embed_0/embedding": ((), (0,), (1,), True),
            "params/Conv_0/kernel": ((), (0, 1), (2,), False),
        }
        model = Transformer()
        return Model(model.apply, jax.jit(model.init)(key, ids), (ids,), ".*", layouts)

    def cnn():
        x, model = jax.random.normal(key, (3, 9, 8, 2)), Cnn()
        layouts = {"params/Conv_0/kernel": ((), (0, 1, 2), (3,), False)}
        return Model(model.apply, jax.jit(model.init)(key, x), (x,), ".*", layouts)

    def nnx_rows():
        graph, state = nnx.split(Rows(nnx.Rngs(0)))
        x = jax.random.normal(key, (4, 7))
        return Model(lambda state, x: nnx.merge(graph, state)(x), state, (x,), ".*up", {})

    def plain():
        shapes = {"stack": (3, 6, 6), "heads": (6, 10), "out": (10, 6), "loop": (6, 6), "branch": (6, 6)}
        layouts = {"stack": ((0,), (1,), (2,), False), "out": ((), (0,), (1,), False), "loop": ((), (1,), (0,), False)}
        return Model(_plain, _tree(shapes), (jax.random.normal(key, (4, 6)), jnp.array(2)), ".*", layouts)

    def ensemble():
        shapes = {"first": (3, 6, 7), "second": (3, 7, 5)}
        layouts = {"first": ((), (1,), (0, 2), False), "second": ((0,), (1,), (2,), False)}
        return Model(_ensemble, _tree(shapes), (jax.random.normal(key, (4, 6)),), ".*", layouts)

    return {f.__name__: f for f in (transformer, cnn, nnx_rows, plain, ensemble)}


MODELS = _models()


def _random(params, mask):
    """Trained leaves as after some training: no factor is 0."""
    rng = np.random.default_rng(9)
    moved = lambda p: jax.device_put(np.asarray(p) + np.float32(0.1 * rng.standard_normal(p.shape)))  # noqa: E731
    return jax.tree.map(lambda p, m: moved(p) if m is TRAIN else p, params, mask)


def _quantized(params):
    """The base under LoRA in int8."""

    def quantized(leaf):
        if isinstance(leaf, ShapedWeight):
            return ShapedWeight(quantized(leaf.leaf), leaf.layers, leaf.inputs, leaf.outputs, leaf.shape)
        if not isinstance(leaf, LoraWeight):
            return leaf
        return LoraWeight(QuantWeight.quantize(leaf.w), leaf.a, leaf.b, leaf.scale, leaf.dropout)

    return map_weights(quantized, params)


def _close(ours, theirs, tolerance=2e-5):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * float(np.abs(np.asarray(other)).max()))


@pytest.mark.parametrize("base", ["plain", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_merged_weights(name, base):
    model = MODELS[name]()
    ours, base_fn = adapt(model.apply), jax.jit(model.apply)
    merged = jax.jit(lambda params: model.apply(merge(params), *model.args))
    call = ours if name == "nnx_rows" else jax.jit(ours)  # one outside jit, where each operation is a program
    layouts = ours.layouts(model.params, *model.args)
    for path, layout in model.layouts.items():
        assert layouts[path] == MatrixLayout(*layout)
    params, mask = lora(model.params, jax.random.key(1), r=2, target_modules=model.targets, layouts=layouts)
    plain_out = base_fn(model.params, *model.args)
    _close(call(params, *model.args), plain_out)  # b is 0: the base model
    params = _random(params, mask)
    if base == "int8":
        params = jax.jit(_quantized)(params)
        _close(jax.jit(ours)(params, *model.args), merged(params))
        dense = {plain(w.leaf if isinstance(w, ShapedWeight) else w).size for w in _weights(params)}
        built = _products(jax.make_jaxpr(ours)(params, *model.args).jaxpr)
        assert built and not built & dense
        return
    trainable, member, frozen = partition(params, mask)

    def loss(apply, prepare):
        def call(trainable):
            out = apply(prepare(combine(trainable, member, frozen)), *model.args)
            return jnp.vdot(out, jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

        return jax.jit(jax.value_and_grad(call, has_aux=True))

    (_, out), grads = loss(ours, lambda p: p)(trainable)
    (_, want), wanted = loss(model.apply, merge)(trainable)
    assert np.abs(np.asarray(want) - plain_out).max() > 0.1  # the factors matter
    _close(out, want)
    _close(grads, wanted, 5e-5)
    dense = {w.leaf.w.size if isinstance(w, ShapedWeight) else w.w.size for w in _weights(params)}
    built = _products(jax.make_jaxpr(loss(ours, lambda p: p))(trainable).jaxpr)
    assert built and not built & dense
    assert _products(jax.make_jaxpr(loss(model.apply, merge))(trainable).jaxpr) & dense  # the check can fail


QUICK = ("cnn", "plain")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_dora_gives_the_outputs_of_merged_weights(name):
    model = MODELS[name]()
    ours = adapt(model.apply)
    layouts = ours.layouts(model.params, *model.args)
    settings = {"r": 2, "use_dora": True, "target_modules": model.targets, "layouts": layouts}
    params, mask = lora(model.params, jax.random.key(1), **settings)
    base, call = jax.jit(model.apply)(model.params, *model.args), jax.jit(ours)
    _close(call(params, *model.args), base)
    params = _random(params, mask)
    want = jax.jit(lambda params: model.apply(merge(params), *model.args))(params)
    assert np.abs(np.asarray(want) - base).max() > 0.1
    _close(call(params, *model.args), want)


def _weights(params):
    return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(leaf)]


def _products(jaxpr) -> set[int]:
    """Sizes of what the products of a program give."""
    from jax.extend.core import jaxprs_in_params

    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.add(math.prod(eqn.outvars[0].aval.shape))
        for inner in jaxprs_in_params(eqn.params):
            found |= _products(inner)
    return found


# ------------------------------------------------------------------------------------------------- what it refuses


def _dense(params, x):
    return x @ params["dense"]["kernel"]


KERNEL = {"dense": {"kernel": jnp.eye(4)}}


def _adapted(params, **settings):
    return lora(params, jax.random.key(0), r=2, target_modules=".*", **settings)[0]


REFUSED = {
    "mul": lambda p, x: x @ (2 * p["dense"]["kernel"]),
    "reduce_max": lambda p, x: x @ p["dense"]["kernel"] / p["dense"]["kernel"].max(),
    "custom_jvp_call": lambda p, x: x @ jax.nn.relu(p["dense"]["kernel"]),
    "slice": lambda p, x: x[:, :2] @ p["dense"]["kernel"][:2],
    "scan": lambda p, x: jax.lax.scan(lambda c, row: (c, c @ row), x, p["dense"]["kernel"])[1],
    "dot_general": lambda p, x: p["dense"]["kernel"] @ p["dense"]["kernel"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_without_a_rule_is_named_with_its_place(name):
    x = jnp.ones((3, 4))
    params = _adapted(KERNEL)
    with pytest.raises(UserError) as error:
        adapt(REFUSED[name])(params, x)
    message = str(error.value)
    assert repr(name) in message and "test_foreign.py" in message and "'dense/kernel' [4x4]" in message
    lax = adapt(REFUSED[name], strict=False)
    _close(lax(params, x), REFUSED[name](merge(params), x))


def test_a_weight_that_is_returned_is_refused():
    with pytest.raises(UserError, match="returns its adapted weight 'dense/kernel'"):
        adapt(lambda p: p["dense"]["kernel"].T)(_adapted(KERNEL))


def test_a_convolution_in_groups_is_refused():
    model = nn.Conv(4, (3,), feature_group_count=2)
    x = jnp.ones((1, 5, 4))
    params = model.init(jax.random.key(0), x)
    layouts = adapt(model.apply).layouts(params, x)
    assert layouts == {}
    with pytest.raises(UserError, match="in groups"):
        adapt(model.apply)(_adapted(params), x)


def test_heads_as_axes_need_layouts():
    model = nn.DenseGeneral((2, 3))
    x = jnp.ones((1, 4))
    params = model.init(jax.random.key(0), x)
    with pytest.raises(UserError, match=r"layouts=adapt\(apply_fn\)\.layouts"):
        adapt(model.apply)(_adapted(params), x)


def test_parameters_that_are_no_matrices_have_no_layout():
    def apply(params, x):
        return (x + params["positions"]) @ params["kernel"] @ params["kernel"][:, ::-1]

    shapes = {"positions": (1, 3, 4), "kernel": (4, 4)}
    assert adapt(apply).layouts(_tree(shapes), jnp.ones((2, 3, 4))) == {}
    with pytest.raises(UserError, match="found no linear module"):
        lora(_tree(shapes), jax.random.key(0), layouts={})


# ------------------------------------------------------------------------------------------------- inside the product


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_views_follow_transposes_and_reshapes(data):
    """The dimensions of a rider lay the leaf out as the same operations lay an array."""
    k, n = data.draw(st.sampled_from([(4, 6), (12, 1), (1, 5), (8, 9)]))
    array = np.arange(k * n).reshape(k, n)
    parts = [(Axis("K", 0, 1, k),) if k > 1 else (), (Axis("N", 0, 1, n),) if n > 1 else ()]
    rider = Rider(jnp.asarray(array), tuple(parts), jnp.int32, "w")
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(array.ndim)))
            array, dims = array.transpose(order), tuple(rider.dims[i] for i in order)
        else:
            shape = data.draw(st.sampled_from(_shapes(array.size)))
            array, dims = array.reshape(shape), reshape(rider.dims, shape)
            if dims is None:
                return  # across the parts: refused
        rider = rider.at(dims)
        assert rider.shape == array.shape
        ordered = [*rider.parts("K"), *rider.parts("N")]
        seen = np.arange(k * n).reshape([part.size for part in ordered])
        seen = seen.transpose([ordered.index(part) for dim in rider.dims for part in dim])
        np.testing.assert_array_equal(seen.reshape(rider.shape), array)


def _shapes(n: int) -> list[tuple[int, ...]]:
    """The shapes of 1 to 3 dimensions with n entries."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    pairs = [(a, b) for a in divisors for b in divisors if n % (a * b) == 0]
    return [(n,), *((a, n // a) for a in divisors), *((a, b, n // (a * b)) for a, b in pairs)]


def test_lookups_out_of_range_stay_as_the_model_has_them():
    params = _adapted({"table": {"embedding": jnp.arange(12.0).reshape(4, 3)}})
    ids = jnp.array([[0, 3], [-1, 9]])
    for apply in (lambda p, i: p["table"]["embedding"][i], lambda p, i: jnp.take(p["table"]["embedding"], i, axis=0)):
        np.testing.assert_array_equal(adapt(apply)(params, ids), apply(merge(params), ids))


def test_dropout_is_by_row():
    apply = adapt(lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["stack"])[0])
    stack = {"stack": jax.random.normal(jax.random.key(0), (3, 4, 4))}
    params, mask = lora(stack, jax.random.key(1), r=2, lora_dropout=0.5, target_modules=".*")
    params = _random(params, mask)
    x = jnp.ones((4, 4))
    keys = row_keys(jax.random.key(2), jnp.arange(4))
    out = apply(params, x, keys=keys)
    assert len({tuple(row) for row in np.asarray(out).tolist()}) == 4
    halves = [apply(params, x[i : i + 2], keys=keys[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(out, jnp.concatenate(halves), atol=1e-6)
    np.testing.assert_array_equal(apply(params, x), apply(params, x, keys=None))
    with pytest.raises(UserError, match="rows of the batch"):
        apply(params, x, keys=keys[:3])


def test_running_statistics_are_frozen_and_returned():
    model = Cnn()
    x = jax.random.normal(jax.random.key(0), (3, 9, 8, 2))
    variables = model.init(jax.random.key(0), x)
    ours = adapt(model.apply)
    params, mask = lora(variables, jax.random.key(1), r=2, layouts=ours.layouts(variables, x))
    assert all(role is FROZEN for role in jax.tree.leaves(mask["batch_stats"]))
    params = _random(params, mask)
    out, changed = ours(params, x, train=True, mutable=["batch_stats"])
    want, wanted = model.apply(merge(params), x, train=True, mutable=["batch_stats"])
    _close((out, changed), (want, wanted))


def test_members_of_a_sweep_are_the_runs_alone():
    model = MODELS["nnx_rows"]()
    ours = adapt(model.apply)
    layouts = ours.layouts(model.params, *model.args)
    tuned = [lora(model.params, jax.random.key(k), r=2, target_modules=".*", layouts=layouts) for k in (1, 2)]
    runs = [partition(_random(*one), one[1]) for one in tuned]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[run[:2] for run in runs])
    out = jax.vmap(lambda own: ours(combine(*own, runs[0].frozen), *model.args))(stacked)
    for one, run in zip(out, runs):
        _close(one, ours(combine(*run), *model.args))
    assert float(jnp.abs(out[0] - out[1]).max()) > 1e-3


def test_it_is_in_the_api():
    assert jaxtune.adapt is adapt
