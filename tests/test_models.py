"""Parity with live transformers models, and everything that must not change it."""

import copy
import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.hf.export import export_model
from jaxtune.hf.load import load
from jaxtune.hf.peft import load_adapter, tree_factors
from jaxtune.methods.table import places
from jaxtune.models import layers
from jaxtune.models.layers import Experts
from jaxtune.models.spec import Segment
from jaxtune.objectives.causal_lm import causal_lm
from jaxtune.tree import combine, flatten, partition

# The first shape of each family.
FIRST = list({family: name for name, (family, _) in reversed(zoo.ZOO.items())}.values())[::-1]
TOLERANCE = 1e-4  # of the largest logit; never to be relaxed
T = 24


@functools.partial(jax.jit, static_argnums=0)
def logits(module, params, ids, positions=None, segments=None, keys=None):
    return module.apply({"params": params}, ids, positions, segments, keys=keys)


@functools.partial(jax.jit, static_argnums=0)
def logits_and_hidden(module, params, ids):
    x = module.apply({"params": params}, ids, method="hidden")
    return module.apply({"params": params}, x, method="head"), x


@functools.cache
def reference(name):
    return zoo.torch_logits(zoo.model(name), zoo.tokens(2, T))


# --- transformers

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def one_of_each(*default, among=tuple(zoo.ZOO)):
    """Parametrise over the zoo: some by default, all when the slow tests run."""
    return pytest.mark.parametrize("name", [n if n in default else slow(n) for n in among])


def up_to(module, params, layer):
    """The parameters with every layer from `layer` on adding nothing to the residual stream."""
    params, first = dict(params), 0
    for i, segment in enumerate(module.spec.segments):
        numbers = first + np.arange(segment.repeats) * len(segment.pattern)

        def still(path, x, numbers=numbers):
            on = numbers + int(path[0].key.removeprefix("block_")) < layer
            adds = any(re.match("(o|down)_(proj|experts)", part.key) for part in path)
            return np.where(on.reshape(-1, *[1] * (x.ndim - 1)), x, 0) if adds else x  # no program a shape

        params[f"segment_{i}"] = jax.tree_util.tree_map_with_path(still, params[f"segment_{i}"])
        first += segment.layers
    return params


@pytest.mark.parity("load", "logits")
@one_of_each(
    *(
        set(FIRST)
        - {
            "mixtral",
            "qwen3_moe",
            "qwen2",
            "arcee",
            "cohere",
            "glm",
            "olmo3",
            "opt",
            "phi",
            "seed_oss",
            "helium",
            "ernie4_5",
            "vaultgemma",
        }
    ),
    *("llama-mha-biases", "llama-mqa-rope3", "qwen2-upper-windows", "qwen2-yarn"),
)
def test_logits_and_every_hidden_state_equal_transformers(name):
    import torch

    module, params = zoo.ours(name)
    ids = zoo.tokens(2, T)
    got = logits_and_hidden(module, params, ids)[0]
    assert got.dtype == jnp.float32
    assert zoo.apart(got, reference(name)) < TOLERANCE
    torch_model = zoo.model(name)
    last = (".norm", ".ln_f", ".final_layer_norm", ".final_layernorm")
    norm = next(m for n, m in torch_model.named_modules() if n.endswith(last))
    with torch.no_grad():
        states = torch_model(torch.tensor(ids, dtype=torch.long), output_hidden_states=True).hidden_states
        want = [norm(x).numpy() for x in states[:-1]] + [states[-1].numpy()]  # the last is normalised
    assert len(want) == module.spec.layers + 1
    for layer, state in enumerate(want):
        here = logits_and_hidden(module, up_to(module, params, layer), ids)[1]
        assert zoo.apart(here, state) < TOLERANCE, layer


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


def named(params, name, change):
    """The named arrays changed."""
    return jax.tree_util.tree_map_with_path(lambda p, x: change(x) if p[-1].key == name else x, params)


def scales(params, change):
    """Every norm's weight changed."""
    return jax.tree_util.tree_map_with_path(lambda p, x: change(x) if p[-1].key == "scale" else x, params)


def two_norms(params):
    """The first norm of each block a second time, for the feed-forward part."""
    blocks = {k: v | {"post_attention_norm": v["input_norm"]} for k, v in params["segment_0"].items()}
    return params | {"segment_0": blocks}


MUTATIONS = {
    "eps": ("llama", lambda m, p: (change(m, eps=1e-6), p)),
    "exact gelu": ("gpt2", lambda m, p: (change(m, act="gelu"), p)),
    "rope theta": ("llama", lambda m, p: (rope(m, theta=20000.0), p)),
    "rope scaling": ("llama-mqa-rope3", lambda m, p: (rope(m, kind="default", rule=()), p)),
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
    "no norm offset": ("gemma2", lambda m, p: (m, scales(p, lambda x: x - 1))),
    "no q_norm offset": ("gemma3", lambda m, p: (m, unit(p, "q_norm"))),
    "halves in place of neighbours": ("cohere", lambda m, p: (rope(m, interleaved=False), p)),
    "halves in place of neighbours, half a head": ("glm4", lambda m, p: (rope(m, interleaved=False), p)),
    "queries of one size": ("ministral3", lambda m, p: (rope(m, heat=None), p)),
    "relu": ("arcee", lambda m, p: (change(m, act="relu"), p)),
    "two norms in place of one": ("phi", lambda m, p: (change(m, residual="serial"), two_norms(p))),
    "first position of opt": ("opt", lambda m, p: (m.clone(spec=dataclasses.replace(m.spec, first_position=1)), p)),
    "no head bias": ("gptj", lambda m, p: (m, without(p, "lm_head"))),
    "no q_norm bias": ("phi-qk-norm", lambda m, p: (m, without(p, "q_norm"))),
    "no norm behind attention": ("glm4", lambda m, p: (m, unit(p, "attention_out_norm"))),
    "halves in place of neighbours in helium": ("helium", lambda m, p: (rope(m, interleaved=False), p)),
    "halves in place of neighbours in ernie4_5": ("ernie4_5", lambda m, p: (rope(m, interleaved=False), p)),
    "a rope beside windows": (
        "exaone4",
        lambda m, p: (change(m, rope=next(b.rope for b in m.spec.segments[0].pattern if b.rope)), p),
    ),
    "no q_norm in olmoe": ("olmoe", lambda m, p: (m, unit(p, "q_norm"))),
    "no sinks": ("gpt_oss", lambda m, p: (change(m, sinks=False), p)),
    "sinks of other heads": ("gpt_oss", lambda m, p: (m, named(p, "sinks", lambda x: x[..., ::-1]))),
    "no bias of the router": ("gpt_oss", lambda m, p: (m, named(p, "router_bias", jnp.zeros_like))),
    "no bias of gates": ("gpt_oss", lambda m, p: (m, named(p, "gate_up_experts_bias", jnp.zeros_like))),
    "no bias of experts": ("gpt_oss", lambda m, p: (m, named(p, "down_experts_bias", jnp.zeros_like))),
    "halves in place of pairs": ("gpt_oss", lambda m, p: (change(m, pairs=None), p)),
    "no scale of each head's q": ("cohere-qk-norm", lambda m, p: (m, unit(p, "q_norm"))),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_tolerance_sees_each_defect(mutation):
    name, mutate = MUTATIONS[mutation]
    module, params = mutate(*zoo.ours(name))
    difference = zoo.apart(logits(module, params, zoo.tokens(2, T)), reference(name))
    assert difference > 1.5 * TOLERANCE


def whole(**changes):
    """`rope_parameters` changed."""
    return {"rope_parameters": changes}


# What the models of the zoo would compute with one setting read wrongly: (model, changes of its config).
MISREADINGS = {
    "attention softcap": ("gemma2", {"attn_logit_softcapping": None}),
    "final softcap": ("gemma2", {"final_logit_softcapping": None}),
    "query scale": ("gemma2", {"query_pre_attn_scalar": 16}),
    "eps of gemma2": ("gemma2", {"rms_norm_eps": 2e-5}),
    "window of gemma2": ("gemma2", {"sliding_window": 7}),
    "pattern of gemma2": ("gemma2", {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"]}),
    "exact gelu in gemma": ("gemma", {"hidden_act": "silu"}),
    "exact gelu in gemma2": ("gemma2", {"hidden_activation": "gelu"}),
    "local base": ("gemma3", whole(sliding_attention={"rope_type": "default", "rope_theta": 1000000.0})),
    "global base": ("gemma3", whole(full_attention={"rope_type": "default", "rope_theta": 10000.0})),
    "pattern of gemma3": ("gemma3", {"sliding_window_pattern": 4}),
    "short factors": ("phi3", {"original_max_position_embeddings": 32}),
    "longrope temperature": ("phi3", whole(**zoo.LONGROPE, attention_factor=1.0)),
    "eps of olmo2": ("olmo2", {"rms_norm_eps": 2e-5}),
    "a rope in every layer": ("smollm3", {"no_rope_layers": [1] * 5}),
    "no rope in another layer": ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}),
    "embedding multiplier": ("granite", {"embedding_multiplier": 1.0}),
    "residual multiplier": ("granite", {"residual_multiplier": 1.0}),
    "attention multiplier": ("granite", {"attention_multiplier": 8**-0.5}),
    "logits divisor": ("granite", {"logits_scaling": 1.0}),
    "exact gelu in starcoder2": ("starcoder2", {"hidden_act": "gelu"}),
    "eps of starcoder2": ("starcoder2", {"norm_epsilon": 2e-4}),
    "window of starcoder2": ("starcoder2", {"sliding_window": 5}),
    "rotated part": ("stablelm", {"partial_rotary_factor": 0.5}),
    "eps of stablelm": ("stablelm", {"layer_norm_eps": 2e-4}),
    "eps of qk norms": ("stablelm-qk-norm", {"layer_norm_eps": 2e-4}),
    "experts' weights": ("qwen2_moe", {"norm_topk_prob": True}),
    "another number of experts": ("mixtral", {"num_experts_per_tok": 3}),
    "serial residual": ("gpt_neox", {"use_parallel_residual": False}),
    "rotated part of gpt_neox": ("gpt_neox", {"rotary_pct": 0.25}),
    "tanh gelu": ("gpt_neox", {"hidden_act": "gelu_new"}),
    "eps of gpt_neox": ("gpt_neox", {"layer_norm_eps": 2e-4}),
    "window of olmo3": ("olmo3", {"sliding_window": 7}),
    "pattern of olmo3": ("olmo3", {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]}),
    "local base of olmo3": (
        "olmo3-mha-biases",
        whole(**zoo.GEMMA3_ROPES | {"sliding_attention": {"rope_type": "default", "rope_theta": 1e5}}),
    ),
    "experts' weights in olmoe": ("olmoe", {"norm_topk_prob": True}),
    "window of exaone4": ("exaone4", {"sliding_window": 7}),
    "pattern of exaone4": (
        "exaone4",
        {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"]},
    ),
    "slope of gpt_oss": ("gpt_oss", {"swiglu_alpha": 1.6}),
    "clamp of gpt_oss": ("gpt_oss", {"swiglu_limit": 1.6}),
    "window of gpt_oss": ("gpt_oss", {"sliding_window": 7}),
    "pattern of gpt_oss": ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}),
    "query scale of vaultgemma": ("vaultgemma", {"query_pre_attn_scalar": 16}),
    "eps of seed_oss": ("seed_oss", {"rms_norm_eps": 2e-5}),
    "gelu in arcee": ("arcee", {"hidden_act": "relu"}),
    "heat": ("ministral3", whole(**zoo.MINISTRAL3["rope_parameters"] | {"llama_4_scaling_beta": 0.0})),
    "heat's rate": ("ministral3", whole(**zoo.MINISTRAL3["rope_parameters"] | {"llama_4_scaling_beta": 0.41})),
    "logit scale": ("cohere", {"logit_scale": 0.26}),
    "eps of cohere": ("cohere", {"layer_norm_eps": 2e-4}),
    "window of cohere2": ("cohere2", {"sliding_window": 7}),
    "a rope in every layer of cohere2": ("cohere2", {"layer_types": ["sliding_attention"] * 5}),
    "rotated part of glm": ("glm", zoo.rope("default", partial_rotary_factor=1.0)),
    "eps of glm4": ("glm4", {"rms_norm_eps": 2e-5}),
    "rotated part of phi": ("phi", zoo.rope("default", partial_rotary_factor=0.25)),
    "exact gelu in phi": ("phi", {"hidden_act": "gelu"}),
    "gelu in opt": ("opt", {"activation_function": "gelu"}),
    "rotated part of gptj": ("gptj", {"rotary_dim": 8}),
    "exact gelu in gptj": ("gptj", {"activation_function": "gelu"}),
    "linear": ("llama-linear", zoo.rope("linear", factor=4.1)),
    "dynamic": ("llama-dynamic", zoo.rope("dynamic", factor=2.1)),
    "dynamic's length": ("llama-dynamic", {"max_position_embeddings": 18}),
    "llama3's ramp": ("llama-mqa-rope3", whole(**zoo.LLAMA3_ROPE | {"high_freq_factor": 3.0})),
    "yarn's temperature": ("qwen2-yarn", whole(**zoo.ZOO["qwen2-yarn"][1]["rope_parameters"], attention_factor=1.0)),
    "yarn's range": ("qwen2-yarn", whole(**zoo.ZOO["qwen2-yarn"][1]["rope_parameters"] | {"beta_fast": 32.0})),
    "yarn's rounding": (
        "qwen3-yarn-mscale",
        whole(**zoo.ZOO["qwen3-yarn-mscale"][1]["rope_parameters"] | {"truncate": True}),
    ),
    "yarn's mscale": (
        "qwen3-yarn-mscale",
        whole(**zoo.ZOO["qwen3-yarn-mscale"][1]["rope_parameters"] | {"mscale": 1.0}),
    ),
}


@pytest.mark.parametrize("case", MISREADINGS)
def test_the_tolerance_sees_each_misreading(case):
    name, changes = MISREADINGS[case]
    misread = zoo.build(name, **changes)
    misread.load_state_dict(zoo.model(name).state_dict())
    assert zoo.apart(zoo.torch_logits(misread, zoo.tokens(2, T)), reference(name)) > 1.5 * TOLERANCE


def test_the_tolerance_sees_a_missing_embedding_scale():
    misread = zoo.build("gemma2")
    misread.model.embed_tokens.embed_scale.fill_(1.0)
    assert zoo.apart(zoo.torch_logits(misread, zoo.tokens(2, T)), reference("gemma2")) > 1.5 * TOLERANCE


def test_stories260k_equals_transformers_and_tells_its_story(assets):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets / "models" / "stories260k"
    module, params = load(folder)
    ids = zoo.tokens(2, 64, vocab=512)
    torch_model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    assert zoo.apart(logits(module, params, ids), zoo.torch_logits(torch_model, ids)) < TOLERANCE

    told = greedy(module, params, jnp.ones((1, 1), jnp.int32), 256)[0]
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


@functools.partial(jax.jit, static_argnums=(0, 3))
def greedy(module, params, prompts, n):
    """The n likeliest tokens after prompts [B, T], by the cache: [B, n]."""
    b, t = prompts.shape

    def step(carry, position):
        scores, cache = carry
        token = scores.argmax(-1).astype(jnp.int32)[:, None]
        scores, cache = module.apply({"params": params}, token, jnp.full((b, 1), position), cache=cache)
        return (scores[:, 0], cache), token[:, 0]

    scores, cache = module.apply({"params": params}, prompts, cache=module.init_cache(b, t + n))
    return jax.lax.scan(step, (scores[:, -1], cache), jnp.arange(t, t + n))[1].T


# --- padding, packing, cache

few = pytest.mark.parametrize("name", ["llama", "qwen2-upper-windows", slow("gpt2"), slow("mistral")])
# Each family, and what else is special about attention.
SPECIAL = (
    *FIRST,
    "qwen2-upper-windows",
    "gemma2-mqa",
    "phi3-short-partial",
    "smollm3-windows-biases",
    "stablelm-parallel",
)
DEPENDS_ON_LENGTH = ("phi3",)  # its ropes are those of a row's longest document


@one_of_each("llama", "gemma2", among=SPECIAL)
def test_padded_rows_and_packed_documents_equal_separate_runs_of_transformers(name):
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
        want = zoo.torch_logits(zoo.model(name), document)
        n = document.shape[1]
        assert zoo.apart(got[:, start : start + n], want) < TOLERANCE
        if name not in DEPENDS_ON_LENGTH:
            padded = logits(
                module, params, np.pad(document, ((0, 0), (0, 28 - n))), positions * 0 + np.arange(28), positions * 0
            )
            assert zoo.apart(padded[:, :n], want) < TOLERANCE
    # The check can fail: in one segment the second document sees the first.
    leaking = logits(module, params, packed, positions, segments * 0)
    assert zoo.apart(leaking[:, starts[1] : starts[3]], got[:, starts[1] : starts[3]]) > 1e-3


@pytest.mark.parity("generate")
@one_of_each("gemma2", among=SPECIAL)
def test_32_greedy_tokens_with_the_cache_equal_transformers(name):
    module, params = zoo.ours(name)
    prompts = zoo.tokens(2, 20)
    told = np.concatenate([prompts, greedy(module, params, prompts, 32)], axis=1)
    # One pass over all of it: each token is the likeliest after those before it.
    assert np.array_equal(zoo.torch_logits(zoo.model(name), told)[:, 19:-1].argmax(-1), told[:, 20:])


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


def test_bfloat16_activations_stay_close_and_logits_are_float32():
    module, params = zoo.ours("qwen2-upper-windows")
    got = logits(module.clone(dtype=jnp.bfloat16), params, zoo.tokens(2, T))
    assert got.dtype == jnp.float32
    assert 1e-5 < zoo.apart(got, reference("qwen2-upper-windows")) < 0.05


# --- configs

PUBLISHED = {
    "gemma_2b": 2_506_172_416,
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b_it": 999_885_952,
    "gpt2": 124_439_808,
    "llama2_7b": 6_738_415_616,
    "llama2_70b": 68_976_648_192,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistral_7b_v03": 7_248_023_552,
    "olmo2_7b": 7_298_617_344,
    "phi-3_5": 3_821_079_552,
    "phi-4": 3_836_021_760,
    "qwen2_0_5b": 494_032_768,
    "qwen2moe": 14_315_784_192,
    "qwen2.5_3b": 3_085_938_688,
    "qwen3_0.6b": 596_049_920,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "stablelm": 2_795_443_200,
    "starcoder2": 7_173_923_840,
    "tinyllama_1b_chat_v1.0": 1_100_048_384,
}


@one_of_each(
    *(
        "gemma_2b",
        "gemma2_2b",
        "gemma3_1b_it",
        "gpt2",
        "llama3_1_8b",
        "mistral_7b_v03",
        "Mixtral-8x7B-v0.1",
        "olmo2_7b",
    ),
    *("phi-4", "qwen2_0_5b", "qwen2moe", "qwen3_0.6b", "stablelm", "starcoder2"),
    among=PUBLISHED,
)
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
        shape = t.part(shapes[t.path])
        assert t.hf not in ours
        ours[t.hf] = shape[::-1] if t.transpose else shape
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert sum(p.numel() for p in theirs.parameters()) == PUBLISHED[name]
    if not module.spec.segments[0].pattern[0].experts:  # transformers keeps experts stacked in memory, not on disk
        want = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
        if module.spec.tied:
            want.pop("lm_head.weight")
        assert ours == want


def test_the_body_of_gemma3_1b_is_two_segments(assets):
    """26 layers: 4 x (5 local, 1 global) and 2 local."""
    config = json.loads((assets / "hf-configs" / "gemma3_1b_it" / "config.json").read_text())
    first, last = models.build(config).spec.segments
    assert [b.window for b in first.pattern] == [512] * 5 + [None]
    assert [b.rope.theta for b in first.pattern] == [1e4] * 5 + [1e6]
    assert (first.repeats, last) == (4, Segment(first.pattern[:1], 2))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_names_are_a_bijection(name):
    """Every place of every leaf has one name, and every name one place."""
    module = models.build(zoo.config(name).to_dict())
    shapes = {path: leaf.shape for path, leaf in flatten(module.abstract_params()).items()}
    taken = {path: np.zeros(shape, int) for path, shape in shapes.items()}
    found = list(models.names(module).tensors(module.spec, set(shapes)))
    for t in found:
        t.within(taken[t.path])[...] += 1
    assert all((count == 1).all() for count in taken.values())
    assert len({t.hf for t in found}) == len(found)


@one_of_each("gemma3", "phi3", "gpt_neox", "qwen2_moe", "stablelm-qk-norm", among=(*FIRST, "stablelm-qk-norm"))
def test_a_model_written_again_is_the_same_bytes(name, tmp_path):
    from safetensors.numpy import load_file

    module, params = zoo.ours(name)
    export_model(module, params, tmp_path / "out", base=zoo.directory(name))
    got, want = (load_file(f / "model.safetensors") for f in (tmp_path / "out", zoo.directory(name)))
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[k], want[k]) for k in want)


# --- adapters


@pytest.mark.filterwarnings("ignore")  # peft warns of torch's future
@pytest.mark.parametrize("name", ["gemma2"])
def test_lora_gradients_of_the_loss_equal_peft(name, tmp_path):
    """The loss through the final softcap; all families are in test_families.py."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "target_modules": "all-linear"}
    theirs = get_peft_model(copy.deepcopy(zoo.model(name)), LoraConfig(**settings))
    factors = {key: p for key, p in theirs.named_parameters() if p.requires_grad}
    for p in factors.values():
        p.data = 0.3 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    ids = zoo.tokens(2, T)
    scores = theirs(torch.tensor(ids, dtype=torch.long)).logits[:, :-1].reshape(-1, zoo.VOCAB)
    torch.nn.functional.cross_entropy(scores, torch.tensor(ids[:, 1:], dtype=torch.long).reshape(-1)).backward()

    module, params = zoo.ours(name)
    params, mask, _ = load_adapter(module, params, tmp_path)
    assert len(factors) == 2 * len(tree_factors(module, params))
    trainable, member, frozen = partition(params, mask)
    positions = np.broadcast_to(np.arange(T), ids.shape)
    weights = np.float32(positions < T - 1)
    batch = {
        "tokens": ids,
        "targets": np.roll(ids, -1, 1),
        "positions": positions,
        "segments": None,
        "weights": weights,
    }

    @jax.jit
    @jax.grad
    def gradient(trainable):
        (total, weight), _ = causal_lm(module)(combine(trainable, member, frozen), batch, None)
        return total / weight

    ours = gradient(trainable)
    ours = {path: leaf for path, leaf in flatten(ours).items() if leaf is not None}
    for place in places(params, module):
        for field, key in (("a", "lora_A"), ("b", "lora_B")):
            want = factors.get(f"base_model.model.{place.name}.{key}.default.weight")
            if want is not None:
                assert zoo.apart(ours[f"{place.path}/{field}"][place.index].T, want.grad.numpy()) < TOLERANCE


@pytest.mark.slow
def test_gradients_of_experts_equal_transformers():
    import torch

    module, params = zoo.ours("mixtral")
    torch_model, ids = copy.deepcopy(zoo.model("mixtral")), zoo.tokens(2, T)
    torch_model(torch.tensor(ids, dtype=torch.long)).logits.square().sum().backward()

    def loss(params):
        return jnp.square(module.apply({"params": params}, ids)).sum()

    ours = jax.jit(jax.grad(loss))(params)["segment_0"]["block_0"]["mlp"]
    for i, layer in enumerate(torch_model.model.layers):
        experts, router = layer.mlp.experts, layer.mlp.gate
        assert zoo.apart(ours["gate_up_experts"][i].swapaxes(1, 2), experts.gate_up_proj.grad) < TOLERANCE
        assert zoo.apart(ours["down_experts"][i].swapaxes(1, 2), experts.down_proj.grad) < TOLERANCE
        assert zoo.apart(ours["router"][i].T, router.weight.grad) < TOLERANCE


@pytest.mark.slow
def test_experts_under_vmap_equal_each_run_alone():
    """As in a sweep: many members over one base."""
    module, params = zoo.ours("mixtral")
    params = jax.tree.map(lambda x: x[:1], params["segment_0"]["block_0"]["mlp"])
    experts = Experts(module.spec.segments[0].pattern[0], 0.02)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 8, 32)), jnp.float32)

    def loss(x, params):
        params = jax.tree.map(lambda p: p[0], params)
        return jnp.square(experts.apply({"params": params}, x, None)).sum()

    slopes = jax.jit(jax.grad(loss, argnums=(0, 1)))
    together = jax.vmap(slopes, in_axes=(0, None))(x, params)
    for i, row in enumerate(x):
        alone = slopes(row, params)
        got = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        assert all(zoo.apart(a, b) < 1e-5 for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(alone), strict=True))


def spec_of(config):
    spec = models.family(config).spec(models.Config(config))
    return dataclasses.replace(spec, config="")


@pytest.mark.parametrize("name", [*FIRST, "qwen2-upper-windows"])
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
    assert dict(want.segments[0].pattern[0].rope.rule)["factor"] == 8.0
    assert spec_of(old) == want
    assert spec_of(older) == want


def test_layer_types_written_before_they_existed():
    config = zoo.config("qwen2-upper-windows").to_dict()
    old = {k: v for k, v in config.items() if k != "layer_types"}
    assert [s.repeats for s in spec_of(old).segments] == [1, 2]
    assert spec_of(old) == spec_of(config)


BAD = {
    "family": ({"model_type": "lama"}, "model_type='lama' is not supported.*Did you mean 'llama'"),
    "no family": ({"model_type": None}, "model_type=None is not supported; supported: arcee, cohere"),
    "rope type": (
        {"rope_parameters": {"rope_type": "proportional"}},
        "rope type 'proportional' is not supported; supported: 'default'",
    ),
    "rope key": ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "factr": 2}}, "linear': 'factr' is not"),
    "rope part": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    "rope rule": ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "lacks 'low_freq_factor'"),
    "activation": ({"hidden_act": "swiglu"}, "hidden_act='swiglu' is not supported; supported: 'silu'"),
    "text for a number": ({"hidden_size": "64"}, "hidden_size='64', expected a whole number above 0"),
    "no heads": (
        {"num_attention_heads": 0, "head_dim": None},
        "num_attention_heads=0, expected a whole number",
    ),
    "missing": ({"hidden_size": None}, "lacks 'hidden_size'"),
    "tensor parallel": ({"pretraining_tp": 2}, "pretraining_tp=2 is not supported"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantised .*'gptq'"),
}


@pytest.mark.parametrize("case", BAD)
def test_unsupported_configs_are_refused_by_name(case):
    changes, message = BAD[case]
    with pytest.raises(UserError, match=message):
        models.build(zoo.config("llama").to_dict() | changes)


# Of transformers' own default configs: the nearest architecture that is named, and what is missing.
UNSUPPORTED = {
    "umt5": ("", "relative positions"),
    "pegasus": ("", ""),
    "deepseek_v3": ("mixtral", "latent attention, a router by groups"),
    "qwen3_next": ("qwen3", "linear attention"),
    "qwen3_5_text": ("qwen3", "linear attention"),
    "mamba": ("", "state-space or convolution layers"),
    "lfm2": ("", "state-space or convolution layers"),
    "deberta": ("bert", ""),
    "llava": ("", "images or sound beside text"),
    "falcon": ("", ""),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_an_unsupported_family_is_told_the_nearest_and_what_is_missing(family):
    from transformers import AutoConfig

    near, missing = UNSUPPORTED[family]
    with pytest.raises(UserError) as error:
        models.family(AutoConfig.for_model(family).to_dict())
    assert (f"nearest supported architecture is '{near}" in str(error.value)) == bool(near)
    assert str(error.value).endswith(f"not implemented: {missing}.") == bool(missing)


BAD_IN_FAMILY = {
    "gemma": ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
    "gemma2": ({"hidden_activation": "quick_gelu"}, "hidden_activation='quick_gelu' is not supported"),
    "gemma3": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
    "phi3": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope type='linear' is not supported"),
    "phi3-window": ({"rope_parameters": zoo.LONGROPE}, "'short_factor' lists 4 numbers, expected 8"),
    "phi3-short-partial": ({"lm_head_bias": True}, "lm_head_bias=True is not supported"),
    "smollm3": ({"no_rope_layers": [1, 0]}, "no_rope_layers lists 2 layers, num_hidden_layers is 5"),
    "smollm3-list": ({"layer_types": ["sliding_attention"] * 5}, "use_sliding_window is off"),
    "mixtral": ({"output_router_logits": True}, "output_router_logits=True is not supported"),
    "starcoder2": ({"norm_type": "rms_norm"}, "norm_type='rms_norm' is not supported"),
    "gpt_neox": ({"hidden_act": "gelu_fast"}, "hidden_act='gelu_fast' is not supported"),
    "olmo3": ({"sliding_window": None}, "lacks 'sliding_window'"),
    "olmo3-mqa": (
        {"rope_parameters": {"rope_type": "default"}},
        "rope_parameters has 'rope_type', expected a rule for",
    ),
    "opt": ({"do_layer_norm_before": False}, "do_layer_norm_before=False is not supported"),
    "opt-untied": ({"word_embed_proj_dim": 16}, "word_embed_proj_dim=16 is not supported"),
    "ministral3": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear' is not supported"),
    "ministral3-mscale": (zoo.rope("yarn", factor=2.0, **zoo.YARN), "lacks 'llama_4_scaling_beta'"),
    "cohere2": ({"sliding_window": None}, "lacks 'sliding_window'"),
    "phi": ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
    "gptj": ({"rotary_dim": None}, "lacks 'rotary_dim'"),
    "arcee": ({"hidden_act": "xielu"}, "hidden_act='xielu' is not supported"),
    "helium": ({"head_dim": 16}, "head_dim=16 is not supported; supported: 8"),
    "olmoe": ({"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
    "exaone4": ({"sliding_window_pattern": "LLLG"}, "sliding_window_pattern='LLLG', expected a whole number"),
    "seed_oss": ({"pretraining_tp": 2}, "pretraining_tp=2 is not supported"),
    "gpt_oss": ({"output_router_logits": True}, "output_router_logits=True is not supported"),
}


@pytest.mark.parametrize("name", BAD_IN_FAMILY)
def test_what_a_family_does_not_support_is_refused_by_name(name):
    changes, message = BAD_IN_FAMILY[name]
    with pytest.raises(UserError, match=message):
        models.build(zoo.config(name).to_dict() | changes)


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
