"""Schedules by their closed forms; each optimizer against optax by hand; what varies between sweep members."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import small

from jaxtune.errors import UserError
from jaxtune.train.optim import decay_mask, optimizer, schedule
from jaxtune.weights.adapters import DoraWeight, Ia3Weight, LoraWeight

STEPS = 40


def values(**settings):
    return np.array([float(schedule(steps=STEPS, **settings)(i)) for i in range(STEPS)])


def test_warmup_rises_evenly_and_reaches_the_peak():
    rates = values(name="constant", warmup=4)
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75] + [1.0] * (STEPS - 3), rtol=1e-6)


def test_warmup_below_one_is_a_share_of_the_steps():
    assert np.array_equal(values(warmup=0.1), values(warmup=4))
    assert values(warmup=0.0)[0] == 1.0
    assert values(warmup=0.01)[0] == 1.0  # one step of warmup is that step at the peak


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_decays_follow_their_formulas(floor):
    share = [max(0, i - 8) / 32 for i in range(STEPS)]
    rise = [min(1.0, (i + 1) / 8) for i in range(STEPS)]
    linear = [r * (floor + (1 - floor) * (1 - s)) for r, s in zip(rise, share)]
    cosine = [r * (floor + (1 - floor) * (1 + math.cos(math.pi * s)) / 2) for r, s in zip(rise, share)]
    settings = {"warmup": 8, "min_lr_ratio": floor}
    np.testing.assert_allclose(values(name="linear", **settings), linear, rtol=1e-5)
    np.testing.assert_allclose(values(name="cosine", **settings), cosine, rtol=1e-5, atol=1e-7)


def test_no_step_is_wasted_and_the_end_is_the_floor():
    for name in ("linear", "cosine"):
        assert (values(name=name, warmup=3) > 0).all()
        assert float(schedule(name, steps=STEPS, min_lr_ratio=0.1)(STEPS)) == pytest.approx(0.1)


def test_the_linear_schedule_is_that_of_transformers():
    import torch
    from transformers import get_linear_schedule_with_warmup

    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(sgd, 0, STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append(theirs.get_last_lr()[0])
        sgd.step()
        theirs.step()
    np.testing.assert_allclose(values(name="linear"), rates, rtol=1e-5)


def test_only_matrices_decay():
    """A stack of norms [L, D] or of biases has two axes and still is no matrix."""
    part, _ = small.tuned("full")
    mask = {
        "/".join(k.key for k in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(decay_mask(part.trainable))[0]
    }
    decayed = {name.rpartition("/")[2] for name, yes in mask.items() if yes}
    assert decayed == {"kernel", "embedding"}
    assert not any(yes for name, yes in mask.items() if "norm" in name)
    biases = {"proj": {"bias": jnp.ones((2, 4)), "kernel": jnp.ones((2, 4, 4))}}
    assert decay_mask(biases) == {"proj": {"bias": False, "kernel": True}}
    lora, _ = small.tuned("lora")
    assert all(jax.tree.leaves(decay_mask(lora.trainable)))


PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "norm": {"scale": jnp.array([[2.0, 4.0]])}}
GRADS = {"kernel": jnp.array([[0.1, -3.0], [2.0, 0.7]]), "norm": {"scale": jnp.array([[1.0, -0.5]])}}
MASK = {"kernel": True, "norm": {"scale": False}}
ORACLES = {
    "adamw": lambda: optax.adamw(0.1, 0.8, 0.95, 1e-3, weight_decay=0.2, mask=MASK),
    "lion": lambda: optax.lion(0.1, 0.8, 0.95, weight_decay=0.2, mask=MASK),
    "sgd": lambda: optax.chain(
        optax.trace(0.7), optax.add_decayed_weights(0.2, MASK), optax.scale_by_learning_rate(0.1)
    ),
}


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("name", ORACLES)
def test_three_steps_equal_optax(name, clip):
    tx = optimizer(name, lr=0.1, weight_decay=0.2, grad_clip=clip, b1=0.8, b2=0.95, eps=1e-3, momentum=0.7)
    oracle = ORACLES[name]()
    ours, theirs = (PARAMS, tx.init(PARAMS)), (PARAMS, oracle.init(PARAMS))
    for i in range(3):
        grads = jax.tree.map(lambda g, i=i: g * (1 + i), GRADS)
        updates, state = tx.update(grads, ours[1], ours[0])
        ours = optax.apply_updates(ours[0], updates), state
        if clip:
            norm = math.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads)))
            grads = jax.tree.map(lambda g, norm=norm: g * clip / norm, grads)
        updates, state = oracle.update(grads, theirs[1], theirs[0])
        theirs = optax.apply_updates(theirs[0], updates), state
    assert small.apart(ours[0], theirs[0]) < 1e-6


def test_sgd_by_hand():
    """v = m v + g; w = w - lr (v + d w): without optax."""
    w, v = 2.0, 0.0
    tx = optimizer("sgd", lr=0.1, weight_decay=0.5, momentum=0.9)
    params = {"kernel": jnp.full((1, 1), w)}
    state = tx.init(params)
    for g in (1.0, -0.3, 0.8):
        v = 0.9 * v + g
        w -= 0.1 * (v + 0.5 * w)
        updates, state = tx.update({"kernel": jnp.full((1, 1), g)}, state, params)
        params = optax.apply_updates(params, updates)
    assert float(params["kernel"][0, 0]) == pytest.approx(w, rel=1e-6)


def test_the_shape_multiplies_the_rate():
    shape = schedule("linear", steps=4)
    tx = optimizer("sgd", lr=0.5, shape=shape, momentum=0.0)
    params, state, moved = PARAMS, tx.init(PARAMS), []
    for _ in range(4):
        updates, state = tx.update(GRADS, state, params)
        moved.append(float(updates["kernel"][0, 0] / -GRADS["kernel"][0, 0]))
    np.testing.assert_allclose(moved, [0.5, 0.375, 0.25, 0.125], rtol=1e-5)


def test_rate_and_decay_are_arrays_of_the_state():
    tx = optimizer("adamw", lr=0.1, weight_decay=0.2)
    state = tx.init(PARAMS)
    expected = {"lr": 0.1, "weight_decay": 0.2, "loraplus_lr_ratio": 1.0}
    assert {k: float(v) for k, v in state.hyperparams.items()} == pytest.approx(expected)
    assert all(isinstance(v, jax.Array) for v in state.hyperparams.values())
    # Another value in the state is another run; nothing of the first is left in the transformation.
    other_values = {"lr": jnp.float32(0.3), "weight_decay": jnp.float32(0.0)}
    changed = state._replace(hyperparams=state.hyperparams | other_values)
    got, _ = tx.update(GRADS, changed, PARAMS)
    other = optimizer("adamw", lr=0.3, weight_decay=0.0)
    want, _ = other.update(GRADS, other.init(PARAMS), PARAMS)
    assert small.apart(got, want) < 1e-6


def test_unknown_optimizer():
    with pytest.raises(UserError, match=r"'adam' is not supported; supported: adamw, sgd, lion, muon, adafactor"):
        optimizer("adam", lr=1.0)


def test_loraplus_is_that_of_peft():
    """peft's groups, and its parameters after two steps of AdamW on the same gradients."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    theirs = get_peft_model(layers, LoraConfig(target_modules=["0", "1"], r=2, use_dora=True, bias="all"))
    fields = ("bias", "lora_A", "lora_B", "magnitude")
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    named = {(i, f): next(p for n, p in trained.items() if f".{i}." in n and f in n) for i in "01" for f in fields}
    assert len(named) == len(trained)
    start = {place: jnp.asarray(p.detach().numpy().T) for place, p in named.items()}
    ours = {
        i: {
            "bias": start[i, "bias"],
            "kernel": DoraWeight(None, start[i, "lora_A"], start[i, "lora_B"], None, magnitude=start[i, "magnitude"]),
        }
        for i in "01"
    }
    settings = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "eps": 1e-8}
    tx, adam = optimizer("adamw", **settings), create_loraplus_optimizer(theirs, torch.optim.AdamW, **settings)
    state = tx.init(ours)
    assert float(state.hyperparams["loraplus_lr_ratio"]) == 16.0
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        grads = {name: rng.standard_normal(p.shape).astype(np.float32) for name, p in named.items()}
        for name, p in named.items():
            p.grad = torch.tensor(grads[name])
        adam.step()
        flat = jax.tree.unflatten(jax.tree.structure(ours), [jnp.asarray(g.T) for g in grads.values()])
        updates, state = tx.update(flat, state, ours)
        ours = optax.apply_updates(ours, updates)
    for got, want in zip(jax.tree.leaves(ours), named.values(), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy().T, rtol=1e-5, atol=1e-6)


def test_loraplus_leaves_matrices_called_b_and_embeddings_alone():
    ones = jnp.ones((2, 2))
    params = {"dict": {"w": ones, "b": ones}, "q": {"kernel": LoraWeight(None, ones, ones, None)}}
    params["table"] = {"embedding": LoraWeight(None, ones, ones, None)}
    tx = optimizer("sgd", lr=1.0, momentum=0.0, loraplus_lr_ratio=4.0)
    updates, _ = tx.update(params, tx.init(params), params)
    assert [float(u[0, 0]) for u in jax.tree.leaves(updates["q"])] == [-1.0, -4.0]
    assert {float(u[0, 0]) for u in jax.tree.leaves([updates["dict"], updates["table"]])} == {-1.0}


def test_vectors_are_not_decayed():
    weight = DoraWeight(None, jnp.ones((2, 3, 1)), jnp.ones((2, 1, 3)), None, magnitude=jnp.ones((2, 3)))
    mask = decay_mask({"q": {"kernel": weight}, "k": {"kernel": Ia3Weight(None, None, out=jnp.ones((2, 3)))}})
    assert jax.tree.leaves(mask["q"]) == [True, True, False]
    assert jax.tree.leaves(mask["k"]) == [False]


# --- by matrix


def stacked_params(rng):
    """Two layers: a matrix, its LoRA factors, norms; and a table of its own."""
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "segment_0": {
            "up": {"kernel": draw(2, 6, 4)},
            "down": {"kernel": LoraWeight(None, draw(2, 4, 3), draw(2, 3, 6), None)},
            "norm": {"scale": draw(2, 6)},
        },
        "embed_tokens": {"embedding": draw(7, 6)},
    }


def two_steps(tx, params, grads):
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_an_optimizer_by_matrix_sees_each_layer_alone(name):
    """A stack is updated as its layers would be, each in a tree of its own: no layer axis is taken for a matrix's."""
    rng = np.random.default_rng(3)
    params, grads = stacked_params(rng), [stacked_params(rng) for _ in range(2)]
    tx = optimizer(name, lr=0.1, weight_decay=0.1)
    got = jax.jit(lambda p, g: two_steps(tx, p, g))(params, grads)["segment_0"]
    for layer in (0, 1):
        alone = jax.tree.map(lambda x, layer=layer: x[layer], (params["segment_0"], [g["segment_0"] for g in grads]))
        want = jax.jit(lambda p, g: two_steps(tx, p, g))(*alone)
        assert small.apart(jax.tree.map(lambda x, layer=layer: x[layer], got), want) < 1e-5


def test_muon_is_that_of_optax():
    """Of one matrix and one vector, whose updates optax scales and gives Adam's."""
    rng = np.random.default_rng(4)
    params, *grads = [
        {"kernel": jnp.asarray(rng.standard_normal((6, 4)), jnp.float32), "bias": jnp.asarray(rng.standard_normal(4))}
        for _ in range(3)
    ]
    ours = two_steps(optimizer("muon", lr=0.1), params, grads)
    theirs = two_steps(optax.contrib.muon(0.1, consistent_rms=0.2, nesterov=True, adam_b2=0.999), params, grads)
    assert small.apart(ours["kernel"], theirs["kernel"]) < 1e-5
    adam = two_steps(optax.adam(0.1), params, grads)
    assert small.apart(ours["bias"], adam["bias"]) < 1e-5


def test_adafactor_is_that_of_optax():
    rng = np.random.default_rng(5)
    params, *grads = [{"kernel": jnp.asarray(rng.standard_normal((130, 129)), jnp.float32)} for _ in range(3)]
    theirs = two_steps(optax.adafactor(0.1, multiply_by_parameter_scale=False), params, grads)
    assert small.apart(two_steps(optimizer("adafactor", lr=0.1), params, grads), theirs) < 1e-5
    held = jax.tree.leaves(optimizer("adafactor", lr=0.1).init(params))
    assert sum(x.size for x in held) < 2000  # rows and columns, not 16,770 entries


def test_a_setting_of_no_optimizer_is_refused():
    with pytest.raises(UserError, match=r"'beta1' is a setting of no optimizer.* Known: b1, b2, eps, momentum"):
        optimizer("adamw", lr=1.0, beta1=0.9)
