"""Full, head and LoRA: against live peft where peft has the same, by definition where it has not."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from small import quick_compiles  # noqa: F401

from jaxtune.errors import UserError
from jaxtune.methods import full, head, lora, places, resolve_targets
from jaxtune.models.decoder import head_leaf, head_logits
from jaxtune.tree import FROZEN, MEMBER, TRAIN, combine, count, flatten, partition
from jaxtune.weights import LoraWeight, QuantWeight, is_weight

KEY = jax.random.key(0)


def adapters(params):
    """{path: LoraWeight}."""
    return {path: w for path, w in flatten_weights(params).items() if isinstance(w, LoraWeight)}


def flatten_weights(params):
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)[0]
    return {"/".join(k.key for k in path): leaf for path, leaf in leaves}


def roles(mask):
    """{path: Role}."""
    return flatten(mask)


# --- live peft

CASES = {
    "list": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "whole names": ("llama", {"target_modules": ["model.layers.1.self_attn.q_proj", "down_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear", "r": 4, "lora_alpha": 16}),
    "regex": ("llama", {"target_modules": r".*layers\.[02]\.(mlp\.up|self_attn\.k)_proj", "r": 2}),
    "head and embedding": ("llama", {"target_modules": ["lm_head", "embed_tokens"], "r": 2}),
    "rslora": ("llama", {"target_modules": ["o_proj"], "use_rslora": True, "r": 4, "lora_alpha": 3}),
    "bias all": ("llama-mha-biases", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": ("llama-mha-biases", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "gpt2 all-linear": ("gpt2", {"target_modules": "all-linear"}),
    "gpt2 fused": ("gpt2", {"target_modules": ["c_attn"], "r": 3, "bias": "lora_only"}),
    "gpt2 bias all": ("gpt2", {"target_modules": ["c_proj"], "bias": "all"}),
}


def live(name, settings):
    """peft's model for a LoraConfig."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a bias, and corrects fan_in_fan_out
        config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        return peft.get_peft_model(copy.deepcopy(zoo.model(name)), config)


@pytest.mark.parametrize("case", CASES)
def test_the_line_and_the_scales_are_those_of_peft(case, capsys):
    from peft.tuners.lora import LoraLayer

    name, settings = CASES[case]
    module, params = zoo.ours(name)
    theirs = live(name, settings)
    theirs.print_trainable_parameters()
    line = capsys.readouterr().out.strip()
    params, mask = lora(params, KEY, module=module, **settings)
    assert str(count(params, mask)) == line

    scales = {
        layer_name.removeprefix("base_model.model."): layer.scaling["default"]
        for layer_name, layer in theirs.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert scales
    ours = {}
    for place in places(params, module):
        if (weight := adapters(params).get(place.path)) is not None:
            scale = float(weight.scale if place.index is None else weight.scale[place.index])
            if scale:
                ours[place.name] = scale
    assert ours == pytest.approx(scales)


# --- LoRA by its definition


def test_what_is_trained_what_varies_and_what_stays():
    module, params = zoo.ours("llama")
    tuned, mask = lora(params, KEY, module=module, target_modules=("q_proj",), lora_dropout=0.1)
    path = "segment_0/block_0/self_attn/q_proj/kernel"
    assert list(adapters(tuned)) == [path]
    found = roles(mask)
    assert {k: found.pop(f"{path}/{k}") for k in ("w", "a", "b", "scale", "dropout")} == {
        "w": FROZEN,
        "a": TRAIN,
        "b": TRAIN,
        "scale": MEMBER,
        "dropout": MEMBER,
    }
    assert set(found.values()) == {FROZEN}
    weight = adapters(tuned)[path]
    assert weight.w is flatten(params)[path]
    assert {x.dtype for x in (weight.a, weight.b, weight.scale, weight.dropout)} == {jnp.dtype("float32")}
    assert weight.scale.shape == weight.dropout.shape == (3,)
    np.testing.assert_allclose(weight.dropout, 0.1)


def test_no_dropout_compiles_none():
    module, params = zoo.ours("llama")
    tuned, _ = lora(params, KEY, module=module)
    assert all(w.dropout is None for w in adapters(tuned).values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_step_zero_is_the_base(name):
    module, params = zoo.ours(name)
    targets = {"llama": ["q_proj", "down_proj", "embed_tokens", "lm_head"], "gpt2": ["c_attn", "c_fc", "wte"]}[name]
    tuned, _ = lora(params, KEY, module=module, target_modules=targets, lora_alpha=100)
    assert adapters(tuned)
    apply = jax.jit(lambda p: module.apply({"params": p}, zoo.tokens(2, 8)))
    assert np.array_equal(apply(tuned), apply(params))


def test_factors_are_drawn_as_peft_draws_them():
    """a ~ U(+-1/sqrt(in)), whatever r and out; b = 0. Embedding: a = 0, b ~ N(0, 1)."""
    shapes = {"wide": (4, 64, 256), "flat": (128, 32)}
    params = {k: {"kernel": jnp.ones(s)} for k, s in shapes.items()} | {"table": {"embedding": jnp.ones((500, 64))}}
    tuned, _ = lora(params, KEY, r=16, target_modules=["wide", "flat", "table"])
    for name, (*lead, k, n) in shapes.items():
        weight, bound = tuned[name]["kernel"], k**-0.5
        assert weight.a.shape == (*lead, k, 16)
        assert not np.any(weight.b)
        assert weight.b.shape == (*lead, 16, n)
        a = np.asarray(weight.a, np.float64) / bound
        assert np.abs(a).max() <= 1
        assert np.abs(a).max() > 0.98
        spread = 3 / np.sqrt(a.size)
        assert abs(a.mean()) < spread
        assert abs(a.var() - 1 / 3) < spread  # uniform: 1/3; normal cut at 1 would be 0.29, uniform(0, 1) 1/12
        assert np.abs(np.histogram(a, 4, (-1, 1))[0] / a.size - 0.25).max() < spread
    a, b = tuned["table"]["embedding"].a, np.asarray(tuned["table"]["embedding"].b)
    assert not np.any(a)
    assert abs(b.std() - 1) < 0.1
    assert np.abs(b).max() > 2.5


def test_each_leaf_and_layer_has_a_stream_of_its_own():
    module, params = zoo.ours("llama")
    both, _ = lora(params, KEY, module=module, target_modules=["q_proj", "o_proj"])
    one, _ = lora(params, KEY, module=module, target_modules=["q_proj"])
    other, _ = lora(params, jax.random.key(1), module=module, target_modules=["q_proj"])
    q, o = (adapters(both)[f"segment_0/block_0/self_attn/{n}/kernel"].a for n in ("q_proj", "o_proj"))
    assert np.array_equal(q, next(iter(adapters(one).values())).a)  # other targets change nothing
    assert not np.array_equal(q, next(iter(adapters(other).values())).a)
    assert not np.array_equal(q[0], q[1])
    assert not np.array_equal(q.ravel()[:16], o.ravel()[:16])


def test_rows_of_a_stack_that_are_not_chosen_stay_where_they_are():
    module, params = zoo.ours("llama")
    tuned, mask = lora(params, KEY, module=module, target_modules=["layers.1.self_attn.q_proj"], lora_alpha=64)
    part = partition(tuned, mask)

    def loss(trainable):
        logits = module.apply({"params": combine(trainable, part.member, part.frozen)}, zoo.tokens(2, 8))
        return jnp.square(logits).sum()

    # Two steps of descent: after the first b is not zero, so a gradient of a would show.
    step = jax.jit(lambda t: jax.tree.map(lambda p, g: p - 1e-4 * jnp.sign(g), t, jax.grad(loss)(t)))
    after = adapters(combine(step(step(part.trainable)), part.member, part.frozen))[
        "segment_0/block_0/self_attn/q_proj/kernel"
    ]
    assert np.asarray(after.a).any(axis=(1, 2)).tolist() == [False, True, False]
    assert np.asarray(after.b).any(axis=(1, 2)).tolist() == [False, True, False]
    assert np.asarray(after.scale).tolist() == [0.0, 8.0, 0.0]


def test_a_quantised_base_can_be_adapted():
    base = {"q": {"kernel": QuantWeight.quantize(jax.random.normal(KEY, (2, 8, 6)))}}
    tuned, mask = lora(base, KEY, r=2)
    part = partition(tuned, mask)
    assert [x.shape for x in jax.tree.leaves(part.trainable)] == [(2, 8, 2), (2, 2, 6)]
    assert {x.dtype for x in jax.tree.leaves(part.frozen)} == {jnp.dtype("int8"), jnp.dtype("float32")}


def test_any_functional_model_names_targets_by_its_own_paths():
    tree = {"encoder": {"proj": {"kernel": jnp.ones((8, 8))}}, "decoder": {"proj": {"kernel": jnp.ones((8, 8))}}}
    tuned, _ = lora(tree, KEY, r=2, target_modules="encoder.*")
    assert list(adapters(tuned)) == ["encoder/proj/kernel"]
    tuned, _ = lora(tree, KEY, r=2, target_modules=["proj"])
    assert len(adapters(tuned)) == 2


# --- full and head


def test_full_trains_everything_in_float32():
    _, params = zoo.ours("gpt2")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tuned, mask = full(half)
    assert set(roles(mask).values()) == {TRAIN}
    assert {x.dtype for x in jax.tree.leaves(tuned)} == {jnp.dtype("float32")}
    with pytest.raises(UserError, match="quantised parameter cannot be trained"):
        full({"q": QuantWeight.quantize(jnp.ones((4, 4)))})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_head_trains_the_norm_and_the_head_over_an_unchanged_body(name):
    module, params = zoo.ours(name)
    tuned, mask = head(params)
    trained = {path for path, role in roles(mask).items() if role is TRAIN}
    norm = {"norm/scale", "norm/bias"} if name == "gpt2" else {"norm/scale"}
    assert trained == {"lm_head/kernel"} | norm
    assert tuned["lm_head"]["kernel"].shape == (32, zoo.VOCAB)
    ids = zoo.tokens(2, 8)
    hidden = jax.jit(lambda p: module.apply({"params": p}, ids, method="hidden"))
    body = {k: v for k, v in tuned.items() if k != "lm_head"}
    before = hidden(params)
    assert np.array_equal(hidden(body), before)  # whatever the head learns, the residual stream below it is the same
    logits, moved = head_logits(head_leaf(params), before), jax.tree.map(lambda x: x + 1.0, tuned["lm_head"])
    np.testing.assert_allclose(head_logits(head_leaf(tuned), before), logits, rtol=1e-5, atol=1e-4)
    assert not np.allclose(head_logits(head_leaf(tuned | {"lm_head": moved}), before), logits)
    assert params.keys() == zoo.ours(name)[1].keys()  # the tree that was given is not changed
    assert module.spec.tied == ("lm_head" not in params)


def test_head_of_another_tree():
    with pytest.raises(UserError, match="knows jaxtune's own models"):
        head({"w": jnp.ones((4, 4))})


# --- what is refused


def refused(**settings):
    module, params = zoo.ours("llama")
    with pytest.raises(UserError) as caught:
        lora(params, KEY, module=module, **settings)
    return str(caught.value)


def test_targets_that_match_nothing():
    text = refused(target_modules=["qproj"])
    assert "'qproj'" in text
    assert "Did you mean 'q_proj'" in text
    assert "Modules: down_proj, embed_tokens, gate_proj" in text


def test_one_target_of_a_list_that_matches_nothing():
    text = refused(target_modules=["q_proj", "query"])
    assert "'query'" in text
    assert "'q_proj' match" not in text


@pytest.mark.parametrize("regex", ["q_proj", r"model\.layers\.9\..*"])
def test_a_regex_that_matches_no_whole_name(regex):
    text = refused(target_modules=regex)
    assert repr(regex) in text
    assert "such as 'model.embed_tokens'" in text


def test_a_malformed_regex():
    assert "not a valid regular expression" in refused(target_modules="(q_proj")


def test_a_rank_above_the_smaller_side():
    assert "r=40 exceeds the smaller side of segment_0/block_0/self_attn/q_proj/kernel (32 x 64)" in refused(
        target_modules=["q_proj"], r=40
    )


def test_an_unknown_bias():
    assert "bias='some' is not one of" in refused(bias="some")


def test_biases_of_some_layers_only():
    module, params = zoo.ours("llama-mha-biases")
    with pytest.raises(UserError, match="some layers only"):
        lora(params, KEY, module=module, target_modules=["layers.0.self_attn.q_proj"], bias="lora_only")


def test_all_linear_where_nothing_is_linear():
    with pytest.raises(UserError, match="found no linear module"):
        resolve_targets("all-linear", places({"table": {"embedding": jnp.ones((4, 4))}}))


def test_places_sees_through_an_adapter():
    module, params = zoo.ours("llama")
    tuned, _ = lora(params, KEY, module=module, target_modules=["q_proj"])
    assert places(tuned, module) == places(params, module)
    assert len(places(params, module)) == 3 * 7 + 2
