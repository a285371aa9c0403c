"""What changes a model's program but not its numbers: what the backward pass keeps, unrolling, cutting in two."""

import copy
import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
import zoo
from jax.extend.core import jaxprs_in_params
from test_encoders import ZOO as ENCODERS
from test_models import FIRST, T, logits, slow

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.models.decoder import REMAT, Decoder, split
from jaxtune.models.layers import ACTIVATIONS
from jaxtune.models.spec import Segment
from jaxtune.tree import flatten
from jaxtune.weights.leaf import row_keys


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(module, params, ids, keys=None):
    def loss(p):
        scores = module.apply({"params": p}, ids, keys=keys)
        return -jnp.mean(jax.nn.log_softmax(scores)[:, :-1].max(-1)), scores

    (_, scores), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return scores, gradient


def same(got, want, tolerance=1e-5):
    assert zoo.apart(got[0], want[0]) < tolerance
    got, want = flatten(got[1]), flatten(want[1])
    assert got.keys() == want.keys()
    assert all(zoo.apart(got[k], want[k]) < tolerance for k in want)


@functools.cache
def plain(name):
    module, params = zoo.ours(name)
    return loss_and_gradient(module, params, zoo.tokens(2, 12))


@pytest.mark.parametrize(
    "settings", [*({"remat": r} for r in (*REMAT, "offload")), {"unroll": 2}, slow({"unroll": 99})], ids=str
)
@pytest.mark.parametrize("name", ["llama", slow("qwen2-upper-windows")])
def test_remat_and_unroll_change_no_number(name, settings):
    module, params = zoo.ours(name)
    same(loss_and_gradient(module.clone(**settings), params, zoo.tokens(2, 12)), plain(name))


@pytest.mark.parametrize("policy", [name for name, kept in REMAT.items() if kept is not None])
def test_remat_recomputes_what_its_policy_does_not_keep(policy):
    """Products in the whole program: 7 a layer kept, and computed again where they are not."""
    counts = {}
    for remat in ("none", policy):
        module, params = zoo.ours("llama")
        step = functools.partial(loss_and_gradient, module.clone(remat=remat, attention="xla"))
        counts[remat] = count_equations(jax.make_jaxpr(step)(params, zoo.tokens(2, 12)), "dot_general")
    assert counts[policy] > counts["none"]


# Norms before, after and around; two patterns; experts; an encoder's two forms.
TOLD_APART = ("llama", "olmo2", "gemma2", "qwen2_moe", "qwen2-mixed-windows", "bert", "modernbert")


@pytest.mark.parametrize(
    "name, attention",
    [("bert", "xla"), *((n, "mapped") for n in TOLD_APART), *(slow(n, "mapped") for n in FIRST if n not in TOLD_APART)],
)
def test_no_product_is_computed_twice_unless_asked(name, attention):
    """Keeping the products (the default on a CPU) leaves none to compute again, wherever a family has its norms."""
    family, values = ENCODERS[name] if name in ENCODERS else zoo.ZOO[name]
    config = transformers.AutoConfig.for_model(family, **copy.deepcopy(values)).to_dict()
    counts = {}
    for remat in ("none", "everything"):
        module = models.build(config, remat=remat, attention=attention)
        params = zoo.with_lora(zoo.random_like(module.abstract_params()), jax.random.key(0))

        def loss(params, ids, module=module):
            return module.apply({"params": params}, ids).sum()

        program = jax.make_jaxpr(jax.grad(loss))(params, zoo.tokens(2, 12))
        counts[remat] = count_equations(program.jaxpr, "dot_general")
    assert counts["none"] == counts["everything"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_is_torchs(dtype):
    import torch

    x = np.linspace(-4, 4, 257, dtype=np.float32)
    want = torch.nn.functional.gelu(torch.tensor(x).to(getattr(torch, dtype))).float().numpy()
    got = np.asarray(ACTIVATIONS["gelu"](jnp.asarray(x, dtype)), np.float32)
    np.testing.assert_allclose(got, want, rtol={"float32": 1e-5, "bfloat16": 2**-7}[dtype], atol=1e-6)


def noisy_llama():
    module, params = zoo.ours("llama")
    return module, zoo.with_lora(params, jax.random.key(0), dropout=0.3), row_keys(jax.random.key(1), jnp.arange(2))


@pytest.mark.slow
@pytest.mark.parametrize("policy", REMAT)
def test_remat_draws_the_same_noise_again(policy):
    module, params, keys = noisy_llama()
    want = loss_and_gradient(module, params, zoo.tokens(2, 12), keys)
    same(loss_and_gradient(module.clone(remat=policy), params, zoo.tokens(2, 12), keys), want, 1e-4)


def test_split_leaves_every_layer_its_noise():
    module, params, keys = noisy_llama()
    ids = zoo.tokens(2, 12)
    want = logits(module, params, ids, keys=keys)
    assert zoo.apart(logits(*split(module, params, 1), ids, keys=keys), want) < 1e-5
    assert zoo.apart(logits(module, params, ids, keys=row_keys(jax.random.key(2), jnp.arange(2))), want) > 1e-2


@pytest.mark.parametrize("name, at", [("llama", 1), ("llama", 2), ("qwen2-upper-windows", 2)])
def test_split_changes_no_number(name, at):
    module, params = zoo.ours(name)
    cut, parts = split(module, params, at)
    assert len(cut.spec.segments) == len(module.spec.segments) + 1
    assert cut.spec.layers == module.spec.layers
    ids = zoo.tokens(2, T)
    assert zoo.apart(logits(cut, parts, ids), logits(module, params, ids)) < 1e-6


def two_patterns():
    """2 x (window, global) + 1 window: the shape of gemma3's body, which no family here has yet."""
    spec = zoo.ours("mistral")[0].spec
    local = spec.segments[0].pattern[0]
    whole = dataclasses.replace(local, window=None)
    return Decoder(dataclasses.replace(spec, segments=(Segment((local, whole), 2), Segment((local,), 1))))


def test_patterns_of_several_blocks_equal_the_same_layers_one_by_one():
    module = two_patterns()
    params = zoo.random_like(module.abstract_params())
    (pattern, _), last = module.spec.segments[0].pattern, module.spec.segments[1]
    blocks = [(pair, j) for pair in range(2) for j in range(2)]
    flat = {k: v for k, v in params.items() if not k.startswith("segment")}
    for i, (pair, j) in enumerate(blocks):
        one = jax.tree.map(operator.itemgetter(slice(pair, pair + 1)), params["segment_0"][f"block_{j}"])
        flat[f"segment_{i}"] = {"block_0": one}
    flat["segment_4"] = params["segment_1"]
    singles = tuple(Segment((module.spec.segments[0].pattern[j],), 1) for _, j in blocks)
    one_by_one = Decoder(dataclasses.replace(module.spec, segments=(*singles, last)))
    ids = zoo.tokens(2, T)
    want = logits(module, params, ids)
    assert zoo.apart(logits(one_by_one, flat, ids), want) < 1e-5
    assert zoo.apart(logits(*split(module, params, 2), ids), want) < 1e-6
    assert pattern.window == 6


@pytest.mark.parametrize("at", [1, 3])
def test_a_split_inside_a_pattern_is_refused(at):
    module = two_patterns()
    with pytest.raises(UserError, match=f"Layer {at} lies inside a pattern of 2 blocks"):
        split(module, module.abstract_params(), at)


def test_a_split_at_an_edge_that_exists_changes_nothing():
    module = two_patterns()
    params = module.abstract_params()
    for at in (0, 4, 5):
        cut, parts = split(module, params, at)
        assert cut.spec == module.spec
        assert flatten(parts).keys() == flatten(params).keys()


def count_equations(jaxpr, name=None):
    """Equations of a program, those inside scans and calls included; with `name`, of that primitive alone."""
    total = 0
    for equation in jaxpr.eqns:
        total += name is None or equation.primitive.name == name
        total += sum(count_equations(sub, name) for sub in jaxprs_in_params(equation.params))
    return total


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_program_does_not_grow_with_depth(name):
    depth = "n_layer" if name == "gpt2" else "num_hidden_layers"
    sizes = []
    for n in (4, 64):
        module = models.build(zoo.config(name, **{depth: n}).to_dict(), remat="dots")
        params = module.abstract_params()
        assert module.spec.layers == n
        step = functools.partial(loss_and_gradient, module)
        sizes.append(count_equations(jax.make_jaxpr(step)(params, zoo.tokens(1, 8))))
    assert sizes[0] == sizes[1] > 100
