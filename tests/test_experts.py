"""Adapters on experts, and experts in few bits: factors ride grouped products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import zoo

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.hf.load import load
from jaxtune.methods.adapters import lora
from jaxtune.methods.places import places
from jaxtune.methods.table import cut
from jaxtune.models.layers import Experts
from jaxtune.objectives.causal_lm import causal_lm
from jaxtune.train.optim import optimizer
from jaxtune.train.stacked import make_sweep_step, stack, unstack
from jaxtune.train.step import init_state, make_train_step
from jaxtune.tree import TRAIN, combine, count, flatten, partition
from jaxtune.weights.leaf import merge, weights_by_path
from jaxtune.weights.packed import Packed, quantize

BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
T = 24


def tuned(name, base=None, **settings):
    module, params = zoo.ours(name)
    return module, lora(params if base is None else base, jax.random.key(0), module=module, **settings)


def batch(rows=2):
    tokens = zoo.tokens(rows, T)
    places = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens[None],
        "targets": np.roll(tokens, -1, -1)[None],
        "positions": places[None],
        "segments": np.ones((1, rows, T), np.int32),
        "weights": np.ones((1, rows, T), np.float32),
        "row": np.arange(rows, dtype=np.int32)[None],
    }


def products(jaxpr):
    """The shapes of all products in a jaxpr that somebody reads."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "ragged_dot_general", "ragged_dot"):
            yield eqn.outvars[0].aval.shape
        for value in eqn.params.values():
            for item in value if isinstance(value, list | tuple) else [value]:
                item = getattr(item, "jaxpr", item)
                if hasattr(item, "eqns"):
                    yield from products(item)


def test_no_gradient_of_a_matrix_is_built():
    """The products of a backward pass: none is as wide as the experts' matrices, unless these are trained."""
    module, (params, mask) = tuned("mixtral", r=2, target_parameters=BOTH)
    trainable, member, frozen = partition(params, mask)
    micro = jax.tree.map(lambda x: x[0], batch())

    def found(loss, at):
        return {tuple(sorted(s)) for s in products(jax.make_jaxpr(jax.grad(loss))(at).jaxpr)}

    ours = found(lambda t: causal_lm(module)(combine(t, member, frozen), micro, None)[0][0], trainable)
    e, k, i = 5, 32, 48
    dense = {(e, k, 2 * i), (e, k, i)}
    assert {(2, e, k), (2, e, 2 * i), (2, e, i)} <= ours and not dense & ours
    plain = zoo.ours("mixtral")[1]
    assert dense <= found(lambda p: causal_lm(module)(p, micro, None)[0][0], plain)  # the check can fail


def test_what_is_adapted_counted_and_cut():
    module, (params, mask) = tuned("mixtral", r=2, target_modules=("q_proj",), target_parameters=("1." + BOTH[0],))
    counts = count(params, mask)
    e, k, i = 5, 32, 48
    assert counts.groups["mlp/gate_up_experts"][0] == e * 2 * (k + 2 * i)  # one layer of three
    assert counts.groups["mlp/down_experts"][0] == counts.groups["mlp/router"][0] == 0
    settings = {"target_modules": (), "target_parameters": ("1." + BOTH[0],)}
    assert [s.repeats for s in cut("lora", module, settings).spec.segments] == [1, 2]
    names = [p.name for p in places(params, module) if p.parameter]
    assert names[:2] == ["model.layers.0." + name for name in BOTH]


def test_biases_of_targets_are_not_those_of_experts():
    settings = {"target_modules": ("q_proj",), "target_parameters": (BOTH[0],), "bias": "lora_only"}
    _, mask = tuned("gpt_oss", r=2, **settings)[1]
    trained = {path for path, role in flatten(mask).items() if role is TRAIN and path.endswith("bias")}
    assert {path.split("/", 2)[2] for path in trained} == {"self_attn/q_proj/bias"}


def test_members_of_a_sweep_are_what_each_is_alone():
    """Other rates and scales over one base; a rank of one layer below the others'."""
    module, (params, mask) = tuned("mixtral", r=2, target_parameters=BOTH, rank_pattern=(("1.*gate_up_proj", 1),))
    part = partition(params, mask)
    loss, tx = causal_lm(module), optimizer("sgd", lr=0.02, momentum=0.0)

    def start(rate, scale):
        member = jax.tree.map(lambda x: x * np.float32(scale), part.member)
        state = init_state(part.trainable, member, tx, jax.random.key(0))
        hyper = state.opt_state.hyperparams | {"lr": jnp.float32(rate)}
        return state._replace(opt_state=state.opt_state._replace(hyperparams=hyper))

    alone, step = [start(0.02, 1), start(0.01, 2)], make_train_step(loss, tx)
    together, sweep_step = stack(alone), make_sweep_step(loss, tx)
    losses = []
    for _ in range(3):
        alone, metrics = zip(*(step(state, part.frozen, batch()) for state in alone))
        together, _ = sweep_step(together, part.frozen, batch())
        losses.append(float(metrics[0]["loss"]))
    assert losses[-1] < losses[0]
    for i, state in enumerate(alone):
        assert small.apart(unstack(together, i, state).trainable, state.trainable) < 1e-5


@functools.partial(jax.jit, static_argnums=0)
def logits(module, params, tokens):
    return module.apply({"params": params}, tokens)


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("experts", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_qlora_over_experts_in_few_bits(kind, experts):
    """Read a layer at a time as they would be at once; what they stand for is what is multiplied; adapters learn."""
    module, base = load(zoo.directory("mixtral"), quantization=kind)
    packed = {path for path, leaf in weights_by_path(base).items() if isinstance(leaf, Packed)}
    ends = {path.rpartition("/")[2] for path in packed}
    assert ends == {"kernel", "gate_up_experts", "down_experts"} and not any("router" in path for path in packed)
    whole = quantize(zoo.ours("mixtral")[1], kind)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merge(base), merge(whole))
    tokens = batch()["tokens"][0]
    assert zoo.apart(logits(module, base, tokens), logits(module, merge(base), tokens)) < 1e-4

    more = {"target_parameters": BOTH} if experts else {}
    params, mask = lora(base, jax.random.key(0), r=2, module=module, **more)
    trainable, member, frozen = partition(params, mask)
    before, tx = jax.tree.map(np.asarray, frozen), optax.adam(1e-2)
    step, state, losses = (
        make_train_step(causal_lm(module), tx),
        init_state(trainable, member, tx, jax.random.key(1)),
        [],
    )
    for _ in range(6):
        state, metrics = step(state, frozen, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, frozen)


def test_the_backward_pass_keeps_experts_packed():
    module, base = zoo.ours("mixtral")
    block = module.spec.segments[0].pattern[0]
    experts = Experts(block, 0.02)

    def kept(params):
        params = jax.tree.map(lambda x: x[0], params["segment_0"]["block_0"]["mlp"])
        _, back = jax.vjp(lambda x: experts.apply({"params": params}, x, None), jnp.ones((1, 8, 32)))
        shapes = {(5, 32, 96), (5, 48, 32)}
        return max((x.nbytes for x in jax.tree.leaves(back) if tuple(x.shape) in shapes), default=0)

    assert kept(base) == 4 * 5 * 32 * 96  # a plain matrix is kept: the check can fail
    assert kept(quantize(base, "int8")) <= 5 * 32 * 96


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint as gpt-oss is published: experts in MXFP4; and what transformers says these stand for."""
    import json

    import torch
    from safetensors.numpy import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = tmp_path_factory.mktemp("mxfp4")
    model, rng = zoo.build("gpt_oss", intermediate_size=64), np.random.default_rng(0)
    model.save_pretrained(folder)
    stored, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        e, k, n = stored.pop(name).shape
        stored[f"{name}_blocks"] = rng.integers(0, 256, (e, n, k // 32, 16), dtype=np.uint8)
        stored[f"{name}_scales"] = rng.integers(120, 126, (e, n, k // 32), dtype=np.uint8)
        pair = (torch.from_numpy(stored[f"{name}_{part}"]) for part in ("blocks", "scales"))
        meant[name] = convert_moe_packed_tensors(*pair).float()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert not model.load_state_dict(meant, strict=False).unexpected_keys
    return folder, model, meant


def test_experts_in_mxfp4_are_read_as_transformers_reads_them(published):
    folder, model, meant = published
    tokens = zoo.tokens(2, T)
    module, plain = load(folder)
    assert zoo.apart(logits(module, plain, tokens), zoo.torch_logits(model, tokens)) < 1e-4
    _, kept = load(folder, quantization="mxfp4")
    leaf = kept["segment_1"]["block_0"]["mlp"]["gate_up_experts"]
    want = meant["model.layers.1.mlp.experts.gate_up_proj"].numpy()
    np.testing.assert_array_equal(leaf.merge()[0], want)  # to the bit
    assert not isinstance(kept["segment_1"]["block_0"]["self_attn"]["q_proj"]["kernel"], Packed)
    assert sum(x.nbytes for x in jax.tree.leaves(leaf)) == want.size * 17 / 32
    assert zoo.apart(logits(module, kept, tokens), zoo.torch_logits(model, tokens)) < 1e-4
    assert "quantization_config" not in module.spec.hf_config


def test_mixtral_8x7b_in_nf4_takes_under_28_gib():
    """Its published shapes; nothing is allocated."""
    published = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    published |= {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000}
    module = models.build(zoo.config("mixtral").to_dict() | published | {"head_dim": None})
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), module.abstract_params())
    assert sum(x.size for x in jax.tree.leaves(plain)) == 46_702_792_704
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda p: quantize(p, "nf4"), plain)))
    assert held < 23 * 2**30


REFUSED = {
    "a router": (
        {"target_parameters": ("mlp.gate.weight",)},
        "names no experts' .* router stays frozen",
    ),
    "a slip": ({"target_parameters": ("experts.gate_up",)}, "Did you mean 'mlp.experts.gate_up_proj'"),
    "dora": ({"target_parameters": BOTH, "use_dora": True}, "plain LoRA only, as in peft, not use_dora=True"),
    "dropout": ({"target_parameters": BOTH, "lora_dropout": 0.1}, "not lora_dropout=0.1"),
    "pissa": ({"target_parameters": BOTH, "init_lora_weights": "pissa"}, "not init_lora_weights='pissa'"),
    "layers": (
        {"target_parameters": BOTH, "layers_to_transform": (0,)},
        "name them with their layer: 'model.layers",
    ),
    "text": ({"target_parameters": BOTH[0]}, "expected a list of names"),
    "nothing": ({"target_modules": ()}, "target_modules is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_experts_do_not_take_is_said(case):
    settings, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        tuned("mixtral", **settings)


def test_a_model_without_experts_says_so():
    with pytest.raises(UserError, match="and this model has none"):
        tuned("llama", target_parameters=BOTH)
