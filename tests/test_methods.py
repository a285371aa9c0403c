"""Every method: against live peft where peft has the same, by definition where it has not."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import zoo

from jaxtune.errors import UserError
from jaxtune.hf.export import export_model
from jaxtune.hf.load import load
from jaxtune.hf.peft import export_adapter, load_adapter
from jaxtune.methods.table import (
    METHODS,
    bitfit,
    cut,
    full,
    head,
    ia3,
    lora,
    parameters,
    places,
    prompt_tuning,
    resize,
    resolve_targets,
)
from jaxtune.models.decoder import head_leaf, head_logits, split
from jaxtune.tree import FROZEN, MEMBER, TRAIN, combine, count, flatten, partition
from jaxtune.weights.adapters import DoraWeight, HiraWeight, LoraWeight, virtual_tokens
from jaxtune.weights.leaf import is_weight, merge
from jaxtune.weights.packed import QuantWeight

KEY = jax.random.key(0)


def adapters(params):
    """{path: LoraWeight or HiraWeight}."""
    return {path: w for path, w in flatten_weights(params).items() if isinstance(w, LoraWeight | HiraWeight)}


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
    "dora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "r": 2}),
    "alphas, layers, exclusion": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj"],
            "alpha_pattern": {r"layers\.0\..*": 4, "k_proj": 6},
            "layers_to_transform": [0, 2],
            "exclude_modules": ["2.self_attn.k_proj"],
        },
    ),
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


# --- LoRA's options


def test_a_row_of_lower_rank_is_that_of_a_model_of_that_rank():
    module, params = zoo.ours("llama")
    path = "segment_0/block_0/self_attn/q_proj/kernel"

    def drawn(**settings):
        return adapters(lora(params, KEY, module=module, target_modules=["q_proj"], **settings)[0])[path]

    mixed, low = drawn(r=8, rank_pattern=(("1.self_attn.q_proj", 3),)), drawn(r=3)
    assert mixed.a.shape == (3, 32, 8)
    assert np.array_equal(mixed.a[1, :, :3], low.a[1]) and not np.any(mixed.a[1, :, 3:])
    assert np.array_equal(mixed.a[0], drawn(r=8).a[0])
    np.testing.assert_allclose(mixed.scale, [1, 8 / 3, 1], rtol=1e-6)


def test_gaussian_factors():
    tuned, _ = lora({"q": {"kernel": jnp.ones((200, 300))}}, KEY, r=16, init_lora_weights="gaussian")
    a = np.asarray(tuned["q"]["kernel"].a)
    assert abs(a.std() * 16 - 1) < 0.05 and np.abs(a).max() * 16 > 3
    assert not np.any(tuned["q"]["kernel"].b)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rank_pattern": {"qproj": 2}}, "rank_pattern: 'qproj' match(es) no adapted module"),
        ({"alpha_pattern": (("(", 2.0),)}, "alpha_pattern: '(' is not a valid regular expression"),
        ({"rank_pattern": {"q_proj": 65}}, "r=65 exceeds both sides"),
        ({"layers_to_transform": (1, 7)}, "no target in layer(s) 7"),
        ({"layers_to_transform": 0, "target_modules": ".*q_proj"}, "goes with names of modules"),
        ({"exclude_modules": ("gate",)}, "exclude_modules: 'gate' match(es) none of the targets"),
        ({"exclude_modules": ".*"}, "leave no module to adapt"),
        ({"modules_to_save": ("q_proj", "k_proj")}, "nothing is left to adapt"),
        ({"modules_to_save": ("scores",)}, "modules_to_save: 'scores' matches no module"),
        ({"modules_to_save": ("layers.1.mlp",)}, "some layers of segment_0/block_0/mlp"),
        ({"trainable_token_indices": (1,), "modules_to_save": ("embed_tokens",)}, "embedding is claimed twice"),
        ({"trainable_token_indices": (96,)}, "different ids from 0 to 95"),
        ({"trainable_token_indices": ()}, "different ids from 0 to 95, at least one"),
        ({"init_lora_weights": "pisa"}, "'pisa' is not one of"),
        ({"init_lora_weights": "pissa", "target_modules": ("embed_tokens",)}, "is for linear modules"),
    ],
    ids=str,
)
def test_options_that_cannot_be(settings, words):
    assert words in refused(**({"target_modules": ["q_proj", "k_proj"]} | settings))


# --- parts of the model, by the names of live transformers


def trained_names(params, mask, module):
    roles = flatten(mask)
    return {p.name for p in parameters(params, module) if roles[p.path] is TRAIN}


def torch_names(name, kind):
    """Names of the parameters of modules of a kind: norms, embeddings."""
    return {
        f"{path}.{n}"
        for path, m in zoo.model(name).named_modules()
        if kind in type(m).__name__
        for n, _ in m.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama"])
def test_parts_by_the_names_of_transformers(name):
    module, params = zoo.ours(name)
    every = {n for n, _ in zoo.model(name).named_parameters()}
    cases = {
        "norms": torch_names(name, "Norm"),
        "embeddings": torch_names(name, "Embedding"),
        "bitfit": {n for n in every if n.endswith(".bias")},
        "regex": {n for n in every if "mlp" in n},
    }
    for method, expected in cases.items():
        settings = {"pattern": r".*\.mlp\..*"} if method == "regex" else {}
        if not expected:
            with pytest.raises(UserError, match="Nothing is left to train"):
                METHODS[method](params, KEY, module, settings)
            continue
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        tuned, mask = METHODS[method](half, KEY, module, settings)
        assert trained_names(tuned, mask, module) == expected
        masters = {x.dtype for x, role in zip(jax.tree.leaves(tuned), jax.tree.leaves(mask)) if role is TRAIN}
        assert masters == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "method, settings, layers",
    [("last_n", {"layers": 2}, {1, 2}), ("regex", {"pattern": r".*layers\.1\.self_attn.*"}, {1})],
)
def test_parts_of_a_stack_are_cut_out_of_it(method, settings, layers):
    module, params = zoo.ours("llama")
    with pytest.raises(UserError, match="split the model"):
        METHODS[method](params, KEY, module, settings)
    whole, whole_params = module, params
    for at in sorted({min(layers), max(layers) + 1} - {3}):
        whole, whole_params = split(whole, whole_params, at)
    short = cut(method, module, settings)
    assert short.spec == whole.spec
    tuned, mask = METHODS[method](whole_params, KEY, short, settings)
    expected = {n for n, _ in zoo.model("llama").named_parameters() if any(f"layers.{i}." in n for i in layers)}
    if method == "last_n":
        expected |= {"model.norm.weight"}
    else:
        expected = {n for n in expected if "self_attn" in n}
    assert trained_names(tuned, mask, short) == expected
    ids = zoo.tokens(2, 8)
    got, want = (jax.jit(lambda p, m=m: m.apply({"params": p}, ids))(p) for m, p in ((short, tuned), (module, params)))
    assert zoo.apart(got, want) < 1e-5


def test_more_layers_than_there_are():
    module, _ = zoo.ours("llama")
    with pytest.raises(UserError, match="layers=4, expected from 1 to 3"):
        cut("last_n", module, {"layers": 4})


@pytest.mark.parametrize("method, settings", [("embeddings", {}), ("lora", {"modules_to_save": ("embed_tokens",)})])
def test_what_is_quantised_cannot_be_trained(method, settings):
    module, params = zoo.ours("llama")
    table = QuantWeight.quantize(params["embed_tokens"]["embedding"])
    with pytest.raises(UserError, match="embed_tokens/embedding: a quantised parameter cannot be trained"):
        METHODS[method]({**params, "embed_tokens": {"embedding": table}}, KEY, module, settings)


def test_ia3_and_prompts_that_cannot_be():
    module, params = zoo.ours("llama")
    with pytest.raises(UserError, match="embed_tokens is no linear module"):
        ia3(params, ["embed_tokens"], (), module=module)
    with pytest.raises(UserError, match="some layers of segment_0/block_0/mlp/down_proj"):
        ia3(params, feedforward_modules=["layers.0.mlp.down_proj"], module=module)
    with pytest.raises(UserError, match="give 1 or more"):
        prompt_tuning(params, KEY, 0)


def test_decoding_does_not_merge_an_adapted_table_into_the_tied_head():
    from jaxtune import generate

    module, params = zoo.ours("qwen3")
    tuned, _ = lora(params, KEY, module=module, target_modules=["embed_tokens"], r=4)
    table = tuned["embed_tokens"]["embedding"]
    table.a = 3 * jax.random.normal(KEY, table.a.shape)
    ids = zoo.tokens(1, 8)
    logits = jax.jit(lambda p: module.apply({"params": p}, ids))(tuned)[0, -1]
    merged = jax.jit(lambda p: module.apply({"params": p}, ids))(merge(tuned))[0, -1]
    assert jnp.argmax(logits) != jnp.argmax(merged)  # the test can fail
    assert generate(module, tuned, ids.tolist(), max_new_tokens=1) == [[int(jnp.argmax(logits))]]


# --- every method goes through one step

SLOW = pytest.mark.slow
EVERY = {
    "dora": ("lora", {"use_dora": True, "r": 2, "layers_to_transform": [1]}),
    "pissa": ("lora", {"init_lora_weights": "pissa", "r": 4, "rank_pattern": {"0.self_attn.q_proj": 2}}),
    "tokens": ("lora", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 8], "r": 2}),
    "saved": ("lora", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 2}),
    "bitfit": ("bitfit", {}),
    "last_n": ("last_n", {"layers": 1}),
    "hira": ("hira", {"r": 3, "layers_to_transform": [1]}),
    "ia3": ("ia3", {}),
    "prompt": ("prompt_tuning", {"num_virtual_tokens": 2}),
}


@pytest.mark.parametrize("case", [c if c == "dora" else pytest.param(c, marks=SLOW) for c in EVERY])
def test_a_few_steps_lower_the_loss_and_move_only_what_is_trained(case, tmp_path):
    from jaxtune import causal_lm, init_state, make_train_step, optimizer
    from jaxtune.train.checkpoint import Checkpoints

    method, settings = EVERY[case]
    module = cut(method, small.decoder(attention_bias=True), settings)
    base = jax.jit(module.init_params)(KEY)
    params, mask = METHODS[method](base, KEY, module, settings)
    part, batch = partition(params, mask), small.batch()
    if prefix := virtual_tokens(params):
        batch["tokens"][..., : len(prefix)] = prefix
        batch["targets"][..., : len(prefix) - 1], batch["weights"][..., : len(prefix) - 1] = prefix[1:], 0
    tx = optimizer("adamw", lr=2e-2, weight_decay=0.1)
    step = make_train_step(causal_lm(module), tx)
    before, state, losses = [np.array(x) for x in jax.tree.leaves(part.frozen)], None, []
    state = init_state(part.trainable, part.member, tx, KEY)
    for _ in range(4):
        state, metrics = step(state, part.frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1e-3
    assert all(map(np.array_equal, jax.tree.leaves(part.frozen), before))
    assert jax.tree.structure(state.trainable) == jax.tree.structure(part.trainable)
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), state.trainable, part.trainable)
    assert all(jax.tree.leaves(moved))
    for path, w in adapters(small.whole(state, part.frozen)).items():
        start = flatten_weights(params)[path]
        off = ~np.asarray(start.a).any(-2)  # padding, and layers that are not adapted
        assert not np.asarray(w.a).swapaxes(-1, -2)[off].any() and not np.asarray(w.b)[off].any()
        if isinstance(w, DoraWeight):
            assert np.array_equal(w.magnitude[w.scale == 0], start.magnitude[start.scale == 0])

    manager = Checkpoints(tmp_path / "c", keep=1)
    manager.save(4, state, {"runs": [{"best": None, "waited": 0}]})
    manager.wait()
    found, _ = manager.restore(lambda _: jax.eval_shape(lambda s: s, state))
    manager.close()
    assert jax.tree.structure(found) == jax.tree.structure(state)
    pairs = zip(jax.tree.leaves(found.trainable), jax.tree.leaves(state.trainable), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_members_of_a_sweep_are_what_they_are_alone(settings, tmp_path):
    """Ranks, alphas and LoRA+ ratios that differ, over one base; what is taken out of the stack is written as it is."""
    from jaxtune import causal_lm, init_state, make_train_step, optimizer
    from jaxtune.train import stacked as sweep

    module, base = zoo.ours("llama")
    loss_fn, batch = causal_lm(module), small.batch()
    members = ({"r": 2, "lora_alpha": 4}, {"r": 4, "lora_alpha": 3})
    alone, states, kinds = [], [], []
    forward = jax.jit(lambda p: module.apply({"params": p}, zoo.tokens(2, 8)))
    for ratio, member in enumerate(members, 1):
        params, mask = lora(base, KEY, module=module, target_modules=["q_proj", "up_proj"], **member, **settings)
        part = partition(params, mask)
        tx = optimizer("sgd", lr=3e-3, momentum=0.0, loraplus_lr_ratio=float(ratio))
        states.append(init_state(part.trainable, part.member, tx, KEY))
        kinds.append(jax.eval_shape(lambda s: s, states[-1]))
        state, step = init_state(part.trainable, part.member, tx, KEY), make_train_step(loss_fn, tx)
        for _ in range(2):
            state, _ = step(state, part.frozen, batch)
        alone.append(state)
    stacked, step = sweep.stack(states), sweep.make_sweep_step(loss_fn, tx)
    for _ in range(2):
        stacked, _ = step(stacked, part.frozen, batch)
    for i, (member, kind, want) in enumerate(zip(members, kinds, alone, strict=True)):
        got = sweep.unstack(stacked, i, kind)
        assert small.apart(got.trainable, want.trainable) < 1e-5
        params, where = small.whole(got, part.frozen), {"base": zoo.directory("llama"), "config": member | settings}
        export_adapter(module, params, tmp_path / str(i), mask=mask, **where)
        again, _, _ = load_adapter(module, base, tmp_path / str(i))
        logits = [forward(p) for p in (again, params)]
        assert zoo.apart(*logits) < 1e-5


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


def test_a_rank_above_both_sides():
    assert "r=65 exceeds both sides of segment_0/block_0/self_attn/q_proj/kernel (32 x 64)" in refused(
        target_modules=["q_proj"], r=65
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 0}, "q_proj: r=0 and lora_alpha=8; expected at least 1, and above 0"),
        ({"rank_pattern": {"q_proj": -1}}, "r=-1"),
        ({"alpha_pattern": {"q_proj": 0}}, "lora_alpha=0"),
        ({"layers_pattern": "layers"}, "no effect without layers_to_transform"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "expected lists of ids for model.embed_tokens and lm_head"),
        ({"trainable_token_indices": {"embed_tokens": [1], "lm_head": []}}, "at least one"),
    ],
    ids=str,
)
def test_values_without_a_meaning(settings, message):
    assert message in refused(target_modules=["q_proj"], **settings)


@pytest.mark.parametrize("settings", [{"exclude_modules": ["q_proj"]}, {"feedforward_modules": ["up_proj"]}], ids=str)
def test_ia3_names_that_match_none_of_its_targets(settings):
    module, params = zoo.ours("llama")
    with pytest.raises(UserError, match="none of the targets"):
        ia3(params, module=module, **settings)


def test_token_ids_by_the_name_of_their_table():
    module, params = zoo.ours("llama")
    plain, named = ([3, 5], {"embed_tokens": [3, 5]})
    one, other = (lora(params, KEY, module=module, trainable_token_indices=ids) for ids in (plain, named))
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, one[1], other[1]))


def test_biases_by_the_names_of_other_libraries():
    leaf = jnp.ones((4, 4))
    tree = {
        "nnx": {"kernel": {"value": leaf}, "bias": {"value": leaf[0]}},
        "haiku": {"w": leaf, "b": leaf[0]},
        "other": {"kernel": leaf, "bias": leaf[0]},
    }

    def trained(mask):
        names = {"nnx/bias/value", "haiku/b", "other/bias"}
        return {path for path, role in flatten(mask).items() if role is TRAIN and path in names}

    every = trained(bitfit(tree)[1])
    assert len(every) == 3
    assert trained(lora(tree, KEY, r=2, target_modules=["nnx"], bias="all")[1]) == every
    some = trained(lora(tree, KEY, r=2, target_modules=["nnx", "haiku.w"], bias="lora_only")[1])
    assert some == every - {"other/bias"}
    adapted = lora(tree, KEY, r=2, target_modules=["nnx", "haiku.w"])[0]
    assert not adapted["haiku"]["w"].b.any() and not adapted["nnx"]["kernel"]["value"].b.any()  # no tables


def test_full_trains_no_running_statistics():
    variables = {"params": {"kernel": jnp.ones((2, 2))}, "batch_stats": {"mean": jnp.zeros(2, jnp.int32)}}
    tuned, mask = full(variables)
    assert mask == {"params": {"kernel": TRAIN}, "batch_stats": {"mean": FROZEN}}
    assert tuned["batch_stats"]["mean"].dtype == jnp.int32


@pytest.mark.parametrize("call", [METHODS.__getitem__("lora"), lambda *a: cut("lora", *a[2:])], ids=["tune", "cut"])
def test_a_misspelt_option(call):
    module, params = zoo.ours("llama")
    message = r"lora: 'lora_aplha' is not one of its options\. Did you mean 'lora_alpha'.*Options: r, lora_alpha, "
    with pytest.raises(UserError, match=message):
        lora(params, KEY, module=module, lora_aplha=4)
    with pytest.raises(UserError, match=message):
        call(params, KEY, module, {"lora_aplha": 4})
    with pytest.raises(UserError, match="full: 'r' is not one of its options"):
        METHODS["full"](params, KEY, module, {"r": 4})


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


# --- new tokens

NEW = [zoo.VOCAB, zoo.VOCAB + 1, zoo.VOCAB + 2]


@pytest.fixture(scope="module")
def enlarged():
    module, params = zoo.ours("llama")
    return resize(*resize(module, params, zoo.VOCAB + 1), zoo.VOCAB + 3)  # enlarged twice: both times count


@pytest.mark.parametrize(
    "method, settings",
    [
        ("lora", {}),
        ("lora", {"target_modules": ["q_proj", "lm_head"]}),
        ("lora", {"trainable_token_indices": [3, *NEW[:2]]}),
        ("lora", {"modules_to_save": ["lm_head"]}),
        ("norms", {}),
        ("head", {}),
        ("ia3", {}),
        ("prompt_tuning", {}),
    ],
)
def test_a_new_token_without_a_trained_row_is_refused(method, settings, enlarged):
    module, params = enlarged
    lost = NEW[2:] if "trainable_token_indices" in settings else NEW
    with pytest.raises(UserError, match=rf"resize added 3 token.*row\(s\) \[{lost[0]}.*trainable_token_indices"):
        METHODS[method](params, jax.random.key(0), module, settings)


@pytest.mark.parametrize(
    "method, settings",
    [
        ("lora", {"trainable_token_indices": [3, *NEW]}),
        ("lora", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("lora", {"modules_to_save": ["embed_tokens"]}),
        ("embeddings", {}),
        ("full", {}),
    ],
)
def test_new_tokens_with_trained_rows_pass(method, settings, enlarged):
    module, params = enlarged
    METHODS[method](params, jax.random.key(0), module, settings)


def test_the_functions_refuse_what_their_methods_do(enlarged):
    module, params = enlarged
    with pytest.raises(UserError, match="nothing trains the row"):
        head(params, module)


def test_new_tokens_are_rows_like_any_other_once_exported_and_loaded(enlarged, tmp_path):
    module, params = enlarged
    tuned, _ = lora(params, KEY, module=module, trainable_token_indices=NEW)
    export_model(module, tuned, tmp_path / "out", base=zoo.directory("llama"))
    again, params = load(tmp_path / "out")
    assert (again.spec.vocab, again.spec.new_tokens) == (zoo.VOCAB + 3, 0)
    head(params, again)
