"""The train step: the same gradients however a batch is split, whoever the oracle, and nothing computed in vain."""

import functools
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxtune.methods.table import METHODS
from jaxtune.objectives.causal_lm import causal_lm
from jaxtune.train.optim import optimizer
from jaxtune.train.parallel import lying
from jaxtune.train.step import init_state, make_eval_step, make_train_step
from jaxtune.tree import partition

TESTS = Path(__file__).parent


@functools.cache
def loss_fn():
    return causal_lm(small.decoder())


def fresh(part, tx, key=0):
    """A state of its own: the step donates it, and the tests share their weights."""
    return jax.tree.map(jnp.array, init_state(part.trainable, part.member, tx, jax.random.key(key)))


# --- devices and micro-batches


@contextmanager
def started(out, *arguments):
    """A process with eight simulated devices; it runs beside the tests that do not need its result."""
    env = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    command = [sys.executable, str(TESTS / "eight_devices.py"), str(out), *arguments]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory):
    out = tmp_path_factory.mktemp("eight") / "found.npz"
    with started(out) as process:
        yield process, out


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """What eight devices compute in meshes of every shape."""
    out = tmp_path_factory.mktemp("meshes") / "found.npz"
    with started(out, "meshes") as process:
        said, _ = process.communicate()
        assert process.returncode == 0, said
    return np.load(out)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """What a process takes to read 2 GB for its devices."""
    out = tmp_path_factory.mktemp("memory") / "found.npz"
    with started(out, "memory") as process:
        said, _ = process.communicate()
        assert process.returncode == 0, said
    return np.load(out)


@pytest.fixture(scope="module")
def eight(process):
    """What eight devices compute."""
    process, out = process
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return np.load(out)


@functools.cache
def one_device(accum, method="lora", packed=False):
    """[sum, weight, *gradients] of the batch on one device, in `accum` micro-batches, dropout on."""
    return [np.asarray(x) for x in jax.tree.leaves(eight_devices.gradients(None, accum, method, packed))]


@functools.cache
def fifty_losses():
    return eight_devices.losses(None)


def assert_same(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    assert got[1] == want[1]
    for g, w in zip(got[2:], want[2:], strict=True):
        assert np.abs(w).max() > 0
        assert small.apart(g, w) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("accum", [8, 2])
def test_gradients_do_not_depend_on_micro_batches(accum):
    assert_same(one_device(accum), one_device(1))


@pytest.mark.parametrize("name", ["8 devices", "4 devices 2x4"])
def test_gradients_do_not_depend_on_devices(eight, name):
    want = one_device(1)
    assert_same([eight[f"{name}/{i}"] for i in range(len(want))], want)


@pytest.mark.parametrize("name", eight_devices.ANSWERS)
def test_other_losses_do_not_depend_on_devices(eight, name):
    want = [np.asarray(x) for x in jax.tree.leaves(eight_devices.answers(None, name))]
    assert_same([eight[f"{name}/{i}"] for i in range(len(want))], want)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "method"), eight_devices.MESHED, ids=str)
def test_gradients_do_not_depend_on_the_mesh(meshes, shape, method):
    want = one_device(1, method)
    assert_same([meshes[f"{shape}/{method}/{i}"] for i in range(len(want))], want)


@pytest.mark.slow
def test_other_steps_do_not_depend_on_the_mesh(meshes):
    """Micro-batches, packed rows, losses over answers and vectors, and the members of a sweep."""
    wanted = {"micro-batches": one_device(1), "packed": one_device(1, packed=True)}
    for name in eight_devices.ANSWERS:
        wanted[name] = [np.asarray(x) for x in jax.tree.leaves(eight_devices.answers(None, name))]
    for name, want in wanted.items():
        assert_same([meshes[f"{name}/{i}"] for i in range(len(want))], want)
    np.testing.assert_allclose(meshes["members"], eight_devices.members(None), rtol=1e-5)


def test_fifty_losses_do_not_depend_on_devices(eight):
    np.testing.assert_allclose(eight["losses"], fifty_losses(), rtol=1e-5)
    assert fifty_losses()[0] != fifty_losses()[1]


@pytest.mark.slow
def test_fifty_losses_do_not_depend_on_micro_batches():
    np.testing.assert_allclose(eight_devices.losses(None, accum=2), fifty_losses(), rtol=1e-5)


@pytest.mark.parametrize("method", eight_devices.METHODS)
def test_losses_are_those_of_pmap_with_optax_that_freezes(eight, method):
    ours, oracle = eight[f"ours/{method}"], eight[f"pmap/{method}"]
    np.testing.assert_allclose(ours, oracle, rtol=1e-5)
    assert len(set(np.round(oracle, 4))) > 4


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_are_read_to_where_they_lie(eight, quantization):
    assert eight[f"loaded/{quantization}"].max() <= (1e-6 if quantization == "nf4" else 0)  # means, in another order


@pytest.mark.slow
def test_a_model_without_room_on_one_device_is_used_over_all(meshes):
    np.testing.assert_allclose(meshes["used/eight/0"], meshes["used/one/0"], rtol=1e-5)
    assert np.array_equal(meshes["used/eight/1"], meshes["used/one/1"])


@pytest.mark.parametrize("split", [False, True])
def test_what_a_lora_step_sends(eight, split, monkeypatch):
    """Over a replicated base one sum of the gradients; over a split one each matrix, forward and backward, besides."""
    monkeypatch.syspath_prepend(str(TESTS.parent / "benchmarks"))
    from scale import collectives

    part, _ = small.tuned(r=2)
    sent = collectives(str(eight["program/lora/2" if split else "program/lora/0"]))
    [summed] = [c for c in sent if c.kind == "all-reduce"]
    assert summed.times == 1
    assert summed.bytes == 4 * (sum(x.size for x in jax.tree.leaves(part.trainable)) + 2)  # loss and weight
    gathered = [c for c in sent if c.kind == "all-gather"]
    assert len(gathered) + 1 == len(sent)
    parts = [p for p in lying(part.frozen, {"fsdp": 8} if split else {}) if "fsdp" in p[2]]
    passes = [2 if path.startswith("segment") else 1 for path, _, _ in parts]  # the table is gathered once
    assert sum(c.times for c in gathered) == sum(4 if n == 2 else 1 for n in passes)  # of two layers
    assert sum(c.times * c.bytes for c in gathered) == sum(
        n * 4 * p[1].size for n, p in zip(passes, parts, strict=True)
    )


def test_weights_are_read_once_for_all_devices(eight):
    found = {name: int(eight[f"reading/{name}"]) for name in ("read", "parameters", "layer", "tensor", "above")}
    assert found["read"] == found["parameters"] > 2e8
    assert found["above"] < found["layer"] + found["tensor"] + 64 * 2**20  # and programs that are compiled


@pytest.mark.slow
def test_a_host_holds_a_layer_and_a_tensor_of_two_gigabytes(memory):
    assert memory["read"] == memory["parameters"] > 2e9
    # One tensor more: a device's own copy, as it is turned, which on a CPU lies in the host's memory; and programs.
    assert memory["above"] <= memory["layer"] + 2 * memory["tensor"] + 64 * 2**20


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_goes_on_from_its_checkpoint_on_other_devices(eight, method):
    """4 devices, then 1, then 8, in other meshes: the losses of a run on one that was not interrupted."""
    whole = fifty_losses()[: eight_devices.ORACLE_STEPS] if method == "lora" else eight[f"pmap/{method}"]
    np.testing.assert_allclose(eight[f"elastic/{method}"], whole, rtol=1e-5)


def test_dropout_is_on_and_another_step_draws_another_mask():
    part, _ = small.tuned(r=2, lora_dropout=0.5)
    loss = jax.jit(lambda key: loss_fn()(small.combine(*part), flat(small.batch()), key)[0][0])
    key = jax.random.key(0)
    values = [float(loss(jax.random.fold_in(key, i))) for i in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def flat(batch):
    return {k: v[0] for k, v in batch.items()}


# --- members of a sweep


MEMBERS = (
    {"lr": 1e-3, "seed": 1, "lora_alpha": 8.0, "lora_dropout": 0.1, "weight_decay": 0.0},
    {"lr": 3e-3, "seed": 2, "lora_alpha": 2.0, "lora_dropout": 0.4, "weight_decay": 0.5},
)


def member(i):
    m = MEMBERS[i]
    part, _ = small.tuned(seed=m["seed"], r=2, lora_alpha=m["lora_alpha"], lora_dropout=m["lora_dropout"])
    tx = optimizer("adamw", lr=m["lr"], weight_decay=m["weight_decay"], grad_clip=0.5)
    return fresh(part, tx, key=m["seed"]), part.frozen, tx


@pytest.mark.slow
def test_two_members_under_vmap_equal_their_solo_runs():
    steps = 8
    states, (frozen, _), (tx, _) = zip(*map(member, range(2)))
    solo = make_train_step(loss_fn(), tx)
    together = jax.jit(jax.vmap(make_train_step(loss_fn(), tx, jit=False), in_axes=(0, None, None)))
    stack = jax.tree.map(lambda *x: jnp.stack(x), *states)
    both = np.zeros((steps, 2))
    for i in range(steps):
        stack, metrics = together(stack, frozen, small.batch(i))
        both[i] = metrics["loss"]
    assert together._cache_size() == 1
    for k in range(2):
        state, frozen, _ = member(k)
        alone = np.zeros(steps)
        for i in range(steps):
            state, metrics = solo(state, frozen, small.batch(i))
            alone[i] = metrics["loss"]
        np.testing.assert_allclose(both[:, k], alone, rtol=1e-5)
    assert solo._cache_size() == 1  # rate, decay, scale, dropout and seed are arrays: one program for both
    assert np.abs(both[:, 0] - both[:, 1]).min() > 1e-4


# --- live peft


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_fifty_losses_equal_those_of_live_peft(name):
    import torch
    import zoo
    from test_methods import live

    from jaxtune.methods.table import lora, places
    from jaxtune.tree import flatten

    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    module, params = zoo.ours(name)
    params, mask = lora(params, jax.random.key(3), module=module, **settings)
    part = partition(params, mask)
    tx = optimizer("adamw", lr=1e-3, weight_decay=0.1, grad_clip=1.0)
    step, state = make_train_step(causal_lm(module), tx), fresh(part, tx)

    theirs, given, by_path = live(name, settings).eval(), flatten(params), {}
    for place in places(params, module):
        if f"{place.path}/a" in given:
            by_path[place.name] = given[f"{place.path}/a"][place.index]
    with torch.no_grad():
        for layer_name, p in theirs.named_parameters():
            if ".lora_A." in layer_name:
                p.copy_(
                    torch.tensor(np.array(by_path.pop(layer_name.split("base_model.model.")[1].split(".lora_A")[0])).T)
                )
    assert not by_path  # every factor went over
    trained = [p for p in theirs.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    ours, want = np.zeros(50), np.zeros(50)
    for i in range(50):
        batch = small.batch(i % 5, rows=4)
        state, metrics = step(state, part.frozen, batch)
        ours[i] = metrics["loss"]
        labels = np.where(batch["weights"] > 0, batch["targets"], -100)[0].astype(np.int64)
        logits = theirs(torch.tensor(batch["tokens"][0].astype(np.int64))).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        want[i] = loss.item()
    np.testing.assert_allclose(ours, want, rtol=1e-4)
    assert want[45] < 0.99 * want[0]  # the same batch


# --- what a step costs


def abstract(layers, method="lora"):
    """`(step, state, frozen, batch, forward)`: a wide decoder as shapes only."""
    module = small.decoder(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=layers,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    fn = causal_lm(module)
    tx = optimizer("adamw", lr=1e-3)
    holder = []

    def build():
        params, mask = METHODS[method](module.init_params(jax.random.key(0)), jax.random.key(1), module, {})
        part = partition(params, mask)
        holder.append(jax.tree.structure(part))
        return init_state(part.trainable, part.member, tx, jax.random.key(0)), part.frozen

    state, frozen = jax.eval_shape(build)
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in small.batch(rows=3, length=120).items()}

    def forward(state, frozen, batch):
        return fn(small.whole(state, frozen), flat(batch), None)[0]

    return make_train_step(fn, tx, jit=False), state, frozen, batch, forward


def products(fn, *args):
    """`(flops, shapes of the results)` of all matrix products of a program."""
    found = list(small.dots(jax.make_jaxpr(fn)(*args)))
    return sum(flops for _, flops in found), {tuple(sorted(shape)) for shape, _ in found}


def test_a_lora_step_builds_no_gradient_of_a_frozen_matrix():
    step, state, frozen, batch, forward = abstract(layers=3)
    once, _ = products(forward, state, frozen, batch)
    flops, shapes = products(step, state, frozen, batch)
    tokens = 3 * 120
    assert once > 2 * tokens * 3 * (2 * 256 * 256 + 3 * 256 * 640)  # the scan's length is counted
    assert 1.9 < flops / once <= 2.3
    matrices = {tuple(sorted(x.shape[-2:])) for x in jax.tree.leaves(frozen) if x.ndim > 1 and x.shape[-2] > 3}
    assert len(matrices) == 4
    assert not shapes & matrices

    # The check can fail: full training builds them, and pays for them.
    step, state, frozen, batch, _ = abstract(layers=3, method="full")
    flops, shapes = products(step, state, frozen, batch)
    assert flops / once > 2.7
    assert len(shapes & matrices) >= 4


def test_the_program_does_not_grow_with_depth():
    def lines(layers):
        step, state, frozen, batch, _ = abstract(layers)
        return len(jax.jit(step).lower(state, frozen, batch).as_text().splitlines())

    assert lines(4) == lines(64)


def test_frozen_is_neither_donated_nor_copied_and_one_program_serves_all_steps():
    part, _ = small.tuned(r=2)
    tx = optimizer("adamw", lr=1e-3)
    step, state = make_train_step(loss_fn(), tx), fresh(part, tx)
    where = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(part.frozen)]
    for i in range(3):
        before = state
        state, _ = step(state, part.frozen, small.batch(i))
        moved = jax.tree.leaves((before.trainable, before.opt_state))
        assert all(x.is_deleted() for x in moved)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(part.frozen)] == where
    values = {"lr": jnp.float32(0.1), "weight_decay": jnp.float32(0.1)}
    changed = state.opt_state._replace(hyperparams=state.opt_state.hyperparams | values)
    state, _ = step(state._replace(opt_state=changed), part.frozen, small.batch(3))
    assert step._cache_size() == 1
    assert int(state.step) == 4
    program = jax.make_jaxpr(step)(state, part.frozen, small.batch())
    frozen = {x.shape for x in jax.tree.leaves(part.frozen) if x.size > 64}
    assert not frozen & {v.aval.shape for v in program.jaxpr.outvars}


# --- metrics, evaluation, precision


def test_metrics_and_evaluation_are_those_of_the_loss():
    """Loss over trained tokens only, over micro-batches too; the norm before clipping; evaluation without dropout."""
    part, _ = small.tuned(r=2, lora_dropout=0.3)
    tx = optimizer("sgd", lr=0.5, momentum=0.0, grad_clip=1e-3)
    batch = small.batch(accum=2)
    total, weight, grads = jax.tree.map(np.asarray, whole_gradients(part, batch))
    state, metrics = make_train_step(loss_fn(), tx)(fresh(part, tx), part.frozen, batch)
    assert float(metrics["weight"]) == batch["weights"].sum() == weight
    assert float(metrics["loss"]) == pytest.approx(total / weight, rel=1e-6)
    norm = np.sqrt(sum(np.square(g / weight).sum() for g in jax.tree.leaves(grads)))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    step = np.sqrt(
        sum(np.square(a - b).sum() for a, b in zip(*map(jax.tree.leaves, (state.trainable, part.trainable))))
    )
    assert step == pytest.approx(0.5e-3, rel=1e-2)  # lr times the clipped norm

    evaluate = make_eval_step(loss_fn())
    *sums, _ = evaluate(part.trainable, part.member, part.frozen, batch)
    sums = [float(x) for x in sums]
    plain = exact_loss(part)
    assert sums == pytest.approx([float(x) for x in plain], rel=1e-5)
    assert sums[0] != pytest.approx(float(total), rel=1e-4)


def exact_loss(part):
    """(sum, weight) of the batch without dropout."""
    return jax.jit(lambda p: loss_fn()(p, flat(small.batch()), None)[0])(small.combine(*part))


def whole_gradients(part, batch):
    from jaxtune.train.step import value_and_grad

    return jax.jit(value_and_grad(loss_fn()))(*part, batch, jax.random.fold_in(jax.random.key(0), 0))


def test_a_batch_without_trained_tokens_moves_nothing():
    part, _ = small.tuned(r=2)
    tx = optimizer("sgd", lr=1.0)
    batch = small.batch()
    empty = batch | {"weights": batch["weights"] * 0}
    state, metrics = make_train_step(loss_fn(), tx)(fresh(part, tx), part.frozen, empty)
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0.0
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state.trainable, part.trainable))))


def test_bfloat16_activations_over_float32_trainables():
    part, _ = small.tuned(r=2)
    tx = optimizer("adamw", lr=1e-3)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), part.frozen)
    step = make_train_step(causal_lm(small.decoder(dtype=jnp.bfloat16)), tx)
    state, metrics = step(fresh(part, tx), half, small.batch())
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32
    exact = exact_loss(part)
    assert float(metrics["loss"]) == pytest.approx(float(exact[0] / exact[1]), rel=0.02)
