"""Moments in 8 bits and weights in bfloat16: against closed forms, and the same optimizer in float32."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.train.moments import BLOCK, Blocks, apply_updates, in_8_bits, packed, stochastic, unpacked
from jaxtune.train.optim import optimizer
from jaxtune.train.optimizers import OPTIMIZERS
from jaxtune.train.step import init_state


@partial(jax.jit, static_argnums=1)
def there_and_back(x, squares):
    return unpacked(packed(x, squares=squares), x.shape)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from((1, 255, 600)), st.integers(0, 99), st.booleans(), st.floats(1e-12, 1e6))
def test_a_moment_in_8_bits_goes_to_a_neighbour_on_its_grid(width, seed, squares, size):
    """u = (x / s)^(1/p) moves by 1/n at most, so |dx| <= s p (u + 1/n)^(p-1) / n."""
    x = np.random.default_rng(seed).standard_normal((3, 1, width)).astype(np.float32) ** 3 * np.float32(size)
    x = np.abs(x) if squares else x
    got = there_and_back(x, squares)
    n, p = (256, 4) if squares else (127, 3)
    blocks = np.pad(x, [(0, 0), (0, 0), (0, -width % BLOCK)]).reshape(3, 1, -1, BLOCK)
    s = np.repeat(np.abs(blocks).max(-1), BLOCK, axis=-1)[..., :width]
    u = (np.abs(x) / np.where(s > 0, s, 1)) ** (1 / p)
    floor = np.where(squares, s / n**p, 0)  # no second moment becomes zero
    assert (np.abs(np.asarray(got) - x) <= s * p * (u + 1.01 / n) ** (p - 1) * 1.01 / n + floor + 1e-30).all()
    assert not squares or (np.asarray(got)[s > 0] > 0).all()


def test_zeros_stay_zeros():
    for squares in (False, True):
        assert not np.any(there_and_back(np.zeros((2, 300), np.float32), squares))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_starts_from_its_own_state_in_8_bits(name):
    row, params = OPTIMIZERS[name], {"kernel": jnp.ones((64, 80))}
    tx = row.build(**row.settings)
    got, like = in_8_bits(tx).init(params), tx.init(params)
    found = jax.tree.map(
        lambda x, whole: unpacked(x, whole.shape) if isinstance(x, Blocks) else x,
        *(got, like),
        is_leaf=lambda x: isinstance(x, Blocks),
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, found, like))


@pytest.mark.parametrize("squares", [False, True])
def test_a_moment_in_8_bits_has_no_bias(squares):
    x = np.random.default_rng(0).uniform(0.3, 0.31, (1, 64 * BLOCK)).astype(np.float32)
    x[0, ::BLOCK] = 1.0  # the scale of each block
    error = (np.asarray(there_and_back(x, squares)) - x)[x < 1]
    step = np.abs(error).max()
    assert step > 0.002 and abs(error.mean()) < 4 * step / error.size**0.5


def test_rounding_at_random_has_no_bias_and_takes_neighbours_alone():
    x = jnp.float32(1 + 0.3 * 2**-7)  # bfloat16 has 7 bits behind the point
    draws = stochastic(jnp.full(20_000, x), jax.random.key(0)).astype(jnp.float32)
    assert set(np.unique(draws)) == {1.0, 1 + 2**-7}
    assert abs(float(draws.mean() - x)) < 4 * 2**-7 * (0.3 * 0.7 / 20_000) ** 0.5
    exact = jnp.asarray([0.0, -1.5, jnp.inf, -jnp.inf, jnp.nan, 3.4e38, -1e-40])
    got = stochastic(exact, jax.random.key(1)).astype(jnp.float32)
    assert jnp.array_equal(got[:4], exact[:4]) and jnp.isnan(got[4])


def test_updates_too_small_for_bfloat16_act_on_average():
    p = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    for i in range(64):
        p = apply_updates(p, {"w": jnp.full((64, 64), 2.0**-12)}, jax.random.key(i))
    assert float(p["w"].astype(jnp.float32).mean()) == pytest.approx(1 + 64 * 2.0**-12, abs=1e-3)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon"])
def test_in_8_bits_an_optimizer_goes_where_it_goes_in_float32(name):
    """A least-squares problem: both end near its solution; what is kept of the state is a quarter."""
    rng = np.random.default_rng(0)
    a = jnp.asarray(rng.standard_normal((96, 80)), jnp.float32)
    target = a @ jnp.asarray(rng.standard_normal((80, 64)), jnp.float32)
    loss = lambda p: jnp.mean((a @ p["kernel"] - target) ** 2)  # noqa: E731
    lr = {"sgd": 0.3, "lion": 0.02, "muon": 0.1}.get(name, 0.1)
    found, sizes = {}, {}
    for kind in ("float32", "8bit"):
        tx = optimizer(name, lr=lr, state=kind, shape=lambda step: jnp.maximum(1 - step / 150, 0.0))
        p = {"kernel": jnp.zeros((80, 64))}
        state = tx.init(p)
        sizes[kind] = sum(x.nbytes for x in jax.tree.leaves(state) if x.size > 100)

        @jax.jit
        def step(p, state, tx=tx):
            updates, state = tx.update(jax.grad(loss)(p), state, p)
            return optax.apply_updates(p, updates), state

        for _ in range(150):
            p, state = step(p, state)
        found[kind] = float(loss(p))
    assert found["8bit"] < max(2 * found["float32"], 0.01 * float(loss({"kernel": jnp.zeros((80, 64))})))
    assert sizes["8bit"] < 0.26 * sizes["float32"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_in_the_hosts_memory_change_nothing(name):
    """The same weights after three steps; the moments of matrices come back to the host's memory."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    start = {"kernel": draw(3, 80, 64), "scale": draw(3, 64), "embedding": draw(300, 64)}
    gradients = jax.tree.map(lambda x: draw(3, *x.shape), start)
    found = {}
    for kind in ("float32", "host"):
        tx = optimizer(name, lr=0.1, state=kind, grad_clip=1.0)
        p, state = jax.tree.map(jnp.copy, start), tx.init(start)

        @partial(jax.jit, donate_argnums=(0, 1))  # as the step does
        def step(p, state, grads, tx=tx):
            updates, state = tx.update(grads, state, p)
            return optax.apply_updates(p, updates), state

        for i in range(3):
            p, state = step(p, state, jax.tree.map(lambda g, i=i: g[i], gradients))
        found[kind] = p
        places = {x.ndim: x.sharding.memory_kind for x in jax.tree.leaves(state) if x.size >= 4096}
        assert set(places.values()) == {"pinned_host" if kind == "host" else jax.devices()[0].default_memory().kind}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), found["host"], found["float32"])


def test_moments_of_bfloat16_weights_are_in_float32():
    tx = optimizer("adamw", lr=1e-3)
    state = init_state({"w": jnp.ones((8, 8), jnp.bfloat16)}, {}, tx, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim == 2} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kept", ["8bit", "host"])
def test_a_run_in_fewer_bits_or_on_the_host_learns(tmp_path, kept):
    from jaxtune import tiny
    from jaxtune.cli import main

    settings = {
        "model.path": tiny.BASE,
        "data.train": tiny.TRAIN,
        "data.max_length": 96,
        "tune.method": "full",
        "optim.lr": 1e-3,
        "optim.state": kept,
        "optim.weights": "bfloat16",
        "train.steps": 6,
        "train.batch_size": 4,
        "log.every": 1,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    assert main(["train", *flags, f"--workdir={tmp_path}/run"]) == 0
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < 0.8 * losses[0]
