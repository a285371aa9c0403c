"""Parity with live transformers models, and everything that must not change it."""

import dataclasses
import functools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from jax.extend.core import jaxprs_in_params

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.hf.load import load
from jaxtune.models import layers
from jaxtune.models.decoder import REMAT, Decoder, split
from jaxtune.models.spec import Segment
from jaxtune.tree import flatten
from jaxtune.weights import row_keys

TOLERANCE = 1e-4  # of the largest logit; never to be relaxed
T = 24


@functools.partial(jax.jit, static_argnums=0)
def logits(module, params, ids, positions=None, segments=None, keys=None):
    return module.apply({"params": params}, ids, positions, segments, keys=keys)


@functools.cache
def reference(name):
    return zoo.torch_logits(zoo.model(name), zoo.tokens(2, T))


# --- transformers

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
default = {"llama", "llama-mha-biases", "llama-mqa-rope3", "mistral", "qwen2-upper-windows", "qwen3", "gpt2"}
every_model = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in default else pytest.mark.slow) for n in zoo.ZOO]
)


@every_model
def test_logits_equal_transformers(name):
    module, params = zoo.ours(name)
    got = logits(module, params, zoo.tokens(2, T))
    assert got.dtype == jnp.float32
    assert zoo.apart(got, reference(name)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("form", ["mapped", "xla"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_every_attention_equals_transformers(name, form):
    module, params = zoo.ours(name)
    assert zoo.apart(logits(module.clone(attention=form), params, zoo.tokens(2, T)), reference(name)) < TOLERANCE


def change(module, **changes):
    """The module with every block changed, and the fields of the spec where they exist there."""
    spec = module.spec
    segments = tuple(
        Segment(tuple(dataclasses.replace(b, **changes) for b in s.pattern), s.repeats) for s in spec.segments
    )
    top = {k: v for k, v in changes.items() if k in ("eps",)}
    return module.clone(spec=dataclasses.replace(spec, segments=segments, **top))


def rope(module, **changes):
    return change(module, rope=dataclasses.replace(module.spec.segments[0].pattern[0].rope, **changes))


def without(params, *names):
    """Zero the named biases."""
    return jax.tree_util.tree_map_with_path(
        lambda p, x: jnp.zeros_like(x) if p[-1].key == "bias" and p[-2].key in names else x, params
    )


def unit(params, name):
    """Set the named norm to ones."""
    return jax.tree_util.tree_map_with_path(lambda p, x: jnp.ones_like(x) if p[-2].key == name else x, params)


MUTATIONS = {
    "eps": ("llama", lambda m, p: (change(m, eps=1e-6), p)),
    "exact gelu": ("gpt2", lambda m, p: (change(m, act="gelu"), p)),
    "rope theta": ("llama", lambda m, p: (rope(m, theta=20000.0), p)),
    "rope scaling": ("llama-mqa-rope3", lambda m, p: (rope(m, scaling=None), p)),
    "llama3 ramp": ("llama-mqa-rope3", lambda m, p: (rope(m, scaling=(8.0, 1.0, 3.0, 128)), p)),
    "no window": ("mistral", lambda m, p: (change(m, window=None), p)),
    "window + 1": ("mistral", lambda m, p: (change(m, window=7), p)),
    "window below": ("qwen2-upper-windows", lambda m, p: (change(m, window=6), p)),
    "no q_norm": ("qwen3", lambda m, p: (m, unit(p, "q_norm"))),
    "no k_norm": ("qwen3", lambda m, p: (m, unit(p, "k_norm"))),
    "no v bias": ("qwen2-upper-windows", lambda m, p: (m, without(p, "v_proj"))),
    "no q bias": ("llama-mha-biases", lambda m, p: (m, without(p, "q_proj"))),
    "no o bias": ("llama-mha-biases", lambda m, p: (m, without(p, "o_proj"))),
    "no gate bias": ("llama-mha-biases", lambda m, p: (m, without(p, "gate_proj"))),
    "no norm bias": ("gpt2", lambda m, p: (m, without(p, "post_attention_norm"))),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_tolerance_sees_each_defect(mutation):
    name, mutate = MUTATIONS[mutation]
    module, params = mutate(*zoo.ours(name))
    difference = zoo.apart(logits(module, params, zoo.tokens(2, T)), reference(name))
    assert difference > 1.5 * TOLERANCE


def test_stories260k_equals_transformers_and_tells_its_story(assets):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets / "models" / "stories260k"
    module, params = load(folder)
    ids = zoo.tokens(2, 64, vocab=512)
    torch_model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    assert zoo.apart(logits(module, params, ids), zoo.torch_logits(torch_model, ids)) < TOLERANCE

    told = greedy(module, params, first=1, n=256)
    text = AutoTokenizer.from_pretrained(folder).decode(told, skip_special_tokens=True)
    assert text.strip()[: len(STORY)] == STORY


# github.com/karpathy/llama2.c, doc/stories260K.md: temperature 0.
STORY = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, \
red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with \
your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." \
Her mom said, "Don't worry, Lily. We can help you."""


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def greedy(module, params, first, n):
    """The n likeliest tokens after one, by the cache."""

    def step(carry, position):
        token, cache = carry
        scores, cache = module.apply({"params": params}, token, jnp.full((1, 1), position), cache=cache)
        token = scores.argmax(-1).astype(jnp.int32)
        return (token, cache), token[0, 0]

    start = jnp.full((1, 1), first, jnp.int32), module.init_cache(1, n)
    return jax.lax.scan(step, start, jnp.arange(n))[1]


# --- packing, cache

few = pytest.mark.parametrize("name", ["llama", "qwen2-upper-windows", slow("gpt2"), slow("mistral")])


@few
def test_packed_documents_equal_separate_runs(name):
    module, params = zoo.ours(name)
    sizes = [9, 1, 13]
    documents = [zoo.tokens(1, n, seed=n) for n in sizes]
    pad = np.zeros((1, 5), np.int32)
    packed = np.concatenate([*documents, pad], axis=1)
    positions = np.concatenate([np.arange(n) for n in sizes] + [pad[0]])[None]
    segments = np.repeat([1, 2, 3, 0], [*sizes, 5])[None]
    got = logits(module, params, packed, positions, segments)
    starts = np.cumsum([0, *sizes])
    for start, document in zip(starts, documents, strict=False):
        # One length, so that one program serves all: what lies to the right is never seen.
        alone = logits(module, params, np.pad(document, ((0, 0), (0, 15 - document.shape[1]))))
        n = document.shape[1]
        assert zoo.apart(got[:, start : start + n], alone[:, :n]) < 1e-5
    # The check can fail: without segments the second document sees the first.
    leaking = logits(module, params, packed, positions)
    assert zoo.apart(leaking[:, starts[1] : starts[3]], got[:, starts[1] : starts[3]]) > 1e-3


@few
def test_decoding_with_a_cache_equals_the_full_forward(name):
    """Prompts of unequal length: the rows stand at different positions."""
    module, params = zoo.ours(name)
    ids, lengths = zoo.tokens(2, 16), np.array([5, 3])
    full = logits(module, params, ids)

    @jax.jit
    def run(params, tokens, positions, cache):
        return module.apply({"params": params}, tokens, positions, cache=cache)

    prompt = np.where(np.arange(5) < lengths[:, None], ids[:, :5], 0)
    got, cache = run(params, prompt, np.broadcast_to(np.arange(5), (2, 5)), module.init_cache(2, 16))
    for row, n in enumerate(lengths):
        assert zoo.apart(got[row, :n], full[row, :n]) < 1e-5
    for i in range(11):
        at = (lengths + i)[:, None]
        got, cache = run(params, np.take_along_axis(ids, at, axis=1), at, cache)
        assert zoo.apart(got[:, 0], full[np.arange(2), at[:, 0]]) < 1e-5


@few
def test_a_prompt_without_positions_fills_the_cache_from_its_start(name):
    module, params = zoo.ours(name)
    ids = zoo.tokens(2, 12)
    full = logits(module, params, ids)

    @jax.jit
    def run(params, ids):
        prompt, cache = module.apply({"params": params}, ids[:, :11], cache=module.init_cache(2, 12))
        return prompt, module.apply({"params": params}, ids[:, 11:], jnp.full((2, 1), 11), cache=cache)[0]

    prompt, last = run(params, ids)
    assert zoo.apart(prompt, full[:, :11]) < 1e-5
    assert zoo.apart(last, full[:, 11:]) < 1e-5


# --- what changes the program but not the numbers


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


@pytest.mark.parametrize("settings", [*({"remat": r} for r in REMAT), {"unroll": 2}, slow({"unroll": 99})], ids=str)
@pytest.mark.parametrize("name", ["llama", slow("qwen2-upper-windows")])
def test_remat_and_unroll_change_no_number(name, settings):
    module, params = zoo.ours(name)
    same(loss_and_gradient(module.clone(**settings), params, zoo.tokens(2, 12)), plain(name))


@pytest.mark.parametrize("policy", REMAT)
def test_remat_recomputes_what_its_policy_does_not_keep(policy):
    """Products in the whole program: 7 a layer kept, and computed again where they are not."""
    counts = {}
    for remat in ("none", policy):
        module, params = zoo.ours("llama")
        step = functools.partial(loss_and_gradient, module.clone(remat=remat, attention="xla"))
        counts[remat] = count_equations(jax.make_jaxpr(step)(params, zoo.tokens(2, 12)), "dot_general")
    assert counts[policy] > counts["none"]


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


def test_bfloat16_activations_stay_close_and_logits_are_float32():
    module, params = zoo.ours("qwen2-upper-windows")
    got = logits(module.clone(dtype=jnp.bfloat16), params, zoo.tokens(2, T))
    assert got.dtype == jnp.float32
    assert 1e-5 < zoo.apart(got, reference("qwen2-upper-windows")) < 0.05


# --- configs

PUBLISHED = {
    "gpt2": 124_439_808,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "mistral_7b_v03": 7_248_023_552,
    "qwen2_0_5b": 494_032_768,
    "qwen2.5_3b": 3_085_938_688,
    "qwen3_0.6b": 596_049_920,
    "smollm2_135m": 134_515_008,
    "tinyllama_1b_chat_v1.0": 1_100_048_384,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size_and_names(assets, name):
    """Names and shapes against transformers' own module, nothing allocated; the counts are those on the model cards."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = assets / "hf-configs" / name
    module = models.build(json.loads((folder / "config.json").read_text()))
    shapes = {path: leaf.shape for path, leaf in flatten(module.abstract_params()).items()}
    assert sum(map(np.prod, shapes.values())) == PUBLISHED[name]

    ours = {}
    for t in models.names(module).tensors(module.spec, set(shapes)):
        shape = shapes[t.path][0 if t.index is None else 1 :]
        assert t.hf not in ours
        ours[t.hf] = shape[::-1] if t.transpose else shape
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    want = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    if module.spec.tied:
        want.pop("lm_head.weight")
    assert ours == want


def spec_of(config):
    spec = models.family(config).spec(models.Config(config))
    return dataclasses.replace(spec, config="")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-upper-windows", "qwen3", "gpt2"])
def test_an_absent_key_means_what_it_means_to_transformers_or_is_refused(name):
    """Remove each key in turn: transformers' default, or an error that names the key; never another model."""
    from transformers import AutoConfig

    config = zoo.config(name).to_dict()
    refused = 0
    for key in config:
        if key == "model_type":
            continue
        rest = {k: v for k, v in config.items() if k != key}
        try:
            got = spec_of(rest)
        except UserError as e:
            assert repr(key) in str(e)
            refused += 1
            continue
        theirs = AutoConfig.for_model(**rest).to_dict()
        assert got == spec_of(theirs), key
    assert 3 <= refused < len(config) / 2


def test_the_older_spelling_of_rope_means_the_same():
    new = zoo.config("llama-mqa-rope3").to_dict()
    rule = dict(new.pop("rope_parameters"))
    old = new | {"rope_theta": rule.pop("rope_theta"), "rope_scaling": rule}
    older = old | {"rope_scaling": {"type": rule["rope_type"], **{k: v for k, v in rule.items() if k != "rope_type"}}}
    want = spec_of(new | {"rope_parameters": rule | {"rope_theta": old["rope_theta"]}})
    assert want.segments[0].pattern[0].rope.scaling == (8.0, 1.0, 4.0, 128)
    assert spec_of(old) == want
    assert spec_of(older) == want


def test_layer_types_written_before_they_existed():
    config = zoo.config("qwen2-upper-windows").to_dict()
    old = {k: v for k, v in config.items() if k != "layer_types"}
    assert [s.repeats for s in spec_of(old).segments] == [1, 2]
    assert spec_of(old) == spec_of(config)


BAD = {
    "family": ({"model_type": "lama"}, "model_type='lama' is not supported.*Did you mean 'llama'"),
    "no family": ({"model_type": None}, "model_type=None is not supported; supported: gpt2, llama"),
    "rope type": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
    "rope rule": ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "lacks 'low_freq_factor'"),
    "activation": ({"hidden_act": "swiglu"}, "hidden_act='swiglu' is not supported; supported: 'silu'"),
    "missing": ({"hidden_size": None}, "lacks 'hidden_size'"),
    "tensor parallel": ({"pretraining_tp": 2}, "pretraining_tp=2 is not supported"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantised .*'gptq'"),
}


@pytest.mark.parametrize("case", BAD)
def test_unsupported_configs_are_refused_by_name(case):
    changes, message = BAD[case]
    with pytest.raises(UserError, match=message):
        models.build(zoo.config("llama").to_dict() | changes)


def test_unsupported_layer_types_are_refused_by_name():
    config = zoo.config("qwen2").to_dict()
    with pytest.raises(UserError, match="layer_types='chunked_attention' is not supported"):
        models.build(config | {"layer_types": ["chunked_attention"] * 3})
    with pytest.raises(UserError, match="layer_types lists 2 layers, num_hidden_layers is 3"):
        models.build(config | {"layer_types": ["full_attention"] * 2})


@pytest.mark.parametrize("hf, ours", layers.HF_ACTIVATIONS.items())
def test_activations_equal_transformers(hf, ours):
    import torch
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 101, dtype=np.float32)
    assert zoo.apart(layers.ACTIVATIONS[ours](x), ACT2FN[hf](torch.tensor(x)).numpy()) < 1e-6
