"""A kind of adapter that jaxtune has never heard of, declared here alone: what all others get, it gets.

Its leaf declares its fields, its method puts it into a tree, and one row says how a PEFT directory names it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from safetensors.numpy import load_file

from jaxtune.errors import UserError
from jaxtune.hf import peft_config
from jaxtune.hf.peft import export_adapter, load_adapter
from jaxtune.methods.adapters import adapters_only
from jaxtune.methods.settings import ROWS, Row
from jaxtune.methods.table import METHODS, Method, tune
from jaxtune.objectives.causal_lm import causal_lm
from jaxtune.train import watch
from jaxtune.train.checkpoint import Checkpoints
from jaxtune.train.optim import decay_mask, optimizer
from jaxtune.train.stacked import make_sweep_step, stack, unstack
from jaxtune.train.step import init_state, make_train_step
from jaxtune.tree import FROZEN, MEMBER, TRAIN, Stored, count, map_fields, partition
from jaxtune.weights.leaf import (
    Adapter,
    Array,
    base,
    dot,
    leaf_type,
    map_paths,
    merge,
    merge_leaf,
    plain,
    trained,
)
from jaxtune.weights.leaf import setting as setting_


@leaf_type
class OuterWeight(Adapter):
    """y = x w + scale * (x core) gate: a matrix and a vector.

    Attributes:
        w: the base, [*L, K, N].
        core: [*L, K, 1].
        gate: [*L, N].
        scale: f32[*L].
    """

    w: Any = base()
    core: Array = trained("K q", group="core", stored=Stored("{}.outer_core.weight", "q K"))
    gate: Array = trained("N", stored=Stored("{}.outer_gate", "1 N"))
    scale: Array = setting_()

    def dot(self, x, keys, product):
        scale = self.scale.astype(x.dtype)
        return dot(x, self.w, product=product) + scale * product(x, self.core.astype(x.dtype)) * self.gate.astype(
            x.dtype
        )

    def merge(self):
        return merge_leaf(self.w) + self.scale[..., None, None] * self.core * self.gate[..., None, :]


TARGETS = ("q_proj", "up_proj")


def outer(params, scale=0.5, first=0):
    """Adapt q_proj and up_proj from layer `first` on: `(params, mask)`."""

    def adapt(path, leaf):
        if path.split("/")[-2] not in TARGETS:
            return leaf
        rng = np.random.default_rng(len(path))
        layers, k, n = plain(leaf).shape
        core, gate = rng.standard_normal((layers, k, 1)), rng.standard_normal((layers, n))
        on = (np.arange(layers) >= first).astype(np.float32)
        return OuterWeight(leaf, *(jnp.asarray(0.3 * x, jnp.float32) for x in (core, gate)), scale * on)

    return adapters_only(map_paths(adapt, params))


@pytest.fixture(scope="module")
def tuned():
    params, mask = outer(small.weights())
    return partition(params, mask), params, mask


def up(tree):
    return tree["segment_0"]["block_0"]["mlp"]["up_proj"]["kernel"]


def test_its_mask_is_what_its_class_declares(tuned):
    _, _, mask = tuned
    assert up(mask) == OuterWeight(FROZEN, TRAIN, TRAIN, MEMBER)
    assert mask["norm"]["scale"] is FROZEN


def test_its_parameters_are_counted():
    plain_params = small.weights()
    everything = sum(x.size for x in jax.tree.leaves(plain_params))
    sizes = [up(plain_params).shape, plain_params["segment_0"]["block_0"]["self_attn"]["q_proj"]["kernel"].shape]
    for first, share in ((0, 1.0), (1, 0.5)):  # of two layers
        counts = count(*outer(plain_params, first=first))
        assert counts.trainable == share * sum(layers * (k + n) for layers, k, n in sizes)
        assert counts.all == everything + counts.trainable
        assert counts.groups["mlp/up_proj"][0] == share * (sizes[0][0] * (sizes[0][1] + sizes[0][2]))


def test_optimizers_tell_its_matrix_from_its_vector(tuned):
    part, _, _ = tuned
    decayed = up(decay_mask(part.trainable))
    assert (decayed.core, decayed.gate) == (True, False)
    ones = jax.tree.map(jnp.ones_like, part.trainable)
    tx = optimizer("sgd", lr=1.0, momentum=0.0, loraplus_lr_ratio=4.0)
    faster = up(tx.update(ones, tx.init(ones), ones)[0])
    assert (float(faster.core.mean()), float(faster.gate.mean())) == (-1.0, -4.0)
    muon = optimizer("muon", lr=1.0)
    update = up(jax.jit(lambda g: muon.update(g, muon.init(g), g)[0])(part.trainable)).core
    # A single column that is made orthogonal has length 1, as Newton-Schulz has it (0.68 to 1.13): in each layer.
    lengths = jnp.linalg.norm(update, axis=(1, 2)) / (0.2 * update.shape[1] ** 0.5)
    assert ((lengths > 0.68) & (lengths < 1.13)).all()


def test_metrics_tell_what_it_wants_told(tuned):
    groups = map_fields(lambda path, array, field: watch.group(path, field), tuned[0].trainable)
    assert set(jax.tree.leaves(groups)) == {"attention", "attention/core", "mlp", "mlp/core"}


@pytest.mark.parametrize("method, group", [("outer", "core"), ("hira", "hira_B"), ("miss", "miss_block")])
def test_it_trains_and_sweeps_and_comes_back_from_a_checkpoint(method, group, tuned, tmp_path):
    """Members of a stacked step are what each is alone; and a state that was saved is the same."""
    part = tuned[0]
    if method in METHODS:
        settings = {"r": 2, "target_modules": TARGETS}
        part = partition(*tune(method, small.weights(), jax.random.key(0), small.decoder(), settings))
    loss, tx, batch = causal_lm(small.decoder()), optimizer("adamw", lr=3e-2), small.batch(rows=2)
    rates = (3e-2, 1e-3)

    def start(rate):
        state = init_state(part.trainable, part.member, tx, jax.random.key(0))
        hyper = state.opt_state.hyperparams | {"lr": jnp.float32(rate)}
        return state._replace(opt_state=state.opt_state._replace(hyperparams=hyper))

    alone, step = [start(rate) for rate in rates], make_train_step(loss, tx, group=watch.group)
    together, sweep_step = stack(alone), make_sweep_step(loss, tx)
    losses = []
    for _ in range(3):
        alone, metrics = zip(*(step(state, part.frozen, batch) for state in alone))
        together, _ = sweep_step(together, part.frozen, batch)
        losses.append(float(metrics[0]["loss"]))
    assert losses[-1] < losses[0]
    assert float(metrics[0][f"grad_norm/mlp/{group}"]) > 0
    for i, state in enumerate(alone):
        assert small.apart(unstack(together, i, state).trainable, state.trainable) < 1e-5

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, say=print)
    counters = {"runs": [{"best": None, "waited": 0}]}
    checkpoints.save(3, alone[0], counters)
    checkpoints.wait()
    found, _ = checkpoints.restore(lambda _: start(0.0))
    checkpoints.close()
    assert jax.tree.structure(found) == jax.tree.structure(alone[0])
    assert all(map(np.array_equal, jax.tree.leaves(found.trainable), jax.tree.leaves(alone[0].trainable)))


def test_merged_it_computes_the_same(tuned):
    _, params, _ = tuned
    module, tokens = small.decoder(), small.batch(rows=2)["tokens"][0]
    logits = jax.jit(lambda p: module.apply({"params": p}, tokens))
    assert small.apart(logits(merge(params)), logits(params)) < 1e-5
    assert small.apart(logits(small.weights()), logits(params)) > 1e-3


DEFAULTS = {"base_model_name_or_path": None, "layers": None, "peft_type": None, "task_type": "CAUSAL_LM", "scale": 1.0}
ROW = peft_config.Kind(
    leaf=OuterWeight,
    defaults=DEFAULTS,
    describe=lambda module, params, mask, given: {"scale": float(up(params).scale.max()), "layers": given["first"]},
    attach=lambda module, params, config: outer(params, config["scale"], config["layers"]),
    followed=frozenset(["scale", "layers"]),
)


def test_a_row_of_the_table_is_its_method(monkeypatch):
    """Its options are checked as those of any other, and a config's method by its name is it."""

    @dataclasses.dataclass(frozen=True)
    class Outer:
        scale: float = 0.5
        first: int = 0

    monkeypatch.setitem(ROWS, "outer", Row(Outer, 1e-3, adapter=True))
    monkeypatch.setitem(METHODS, "outer", Method("outer", lambda params, key, module, **given: outer(params, **given)))
    params, mask = tune("outer", small.weights(), None, small.decoder(), {"first": 1})
    assert np.array_equal(up(params).scale, [0.0, 0.5])
    assert up(mask).gate is TRAIN
    with pytest.raises(UserError, match=r"outer: 'fist' is not one of its options\. Did you mean 'first'"):
        tune("outer", small.weights(), None, small.decoder(), {"fist": 1})


@pytest.mark.parametrize("first", [0, 1])
def test_its_peft_directory_goes_out_and_comes_in(first, tmp_path, monkeypatch):
    monkeypatch.setitem(peft_config.KINDS, "OUTER", ROW)
    module, base_params = small.decoder(), small.weights()
    params, mask = outer(base_params, scale=0.7, first=first)
    params = jax.tree.map(lambda x, role: x + 0.1 if role is TRAIN else x, params, mask)
    export_adapter(module, params, tmp_path / "a", base="some/base", config={"first": first}, mask=mask)

    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    layers = range(first, 2)
    names = [f"base_model.model.model.layers.{i}.{m}" for i in layers for m in ("self_attn.q_proj", "mlp.up_proj")]
    assert tensors.keys() == {f"{name}.{end}" for name in names for end in ("outer_core.weight", "outer_gate")}
    core = tensors[f"{names[-1]}.outer_core.weight"]
    assert np.array_equal(core, np.asarray(up(params).core)[1].T)
    assert tensors[f"{names[-1]}.outer_gate"].shape == (1, up(params).gate.shape[1])

    again, its_mask, config = load_adapter(module, base_params, tmp_path / "a")
    assert config["peft_type"] == "OUTER"
    assert its_mask == mask
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for got, want in zip(jax.tree.leaves(up(again)), jax.tree.leaves(up(params)), strict=True):
        assert np.array_equal(np.asarray(got)[first:], np.asarray(want)[first:])
    monkeypatch.delitem(peft_config.KINDS, "OUTER")
    with pytest.raises(UserError, match="peft_type='OUTER': only LORA, HIRA, MISS, IA3, PROMPT_TUNING are"):
        load_adapter(module, base_params, tmp_path / "a")


def test_a_field_that_is_not_declared_is_an_error():
    with pytest.raises(TypeError, match=r"Forgetful\.more: declare it"):

        @leaf_type
        class Forgetful(Adapter):
            w: Any = base()
            more: Array = None
