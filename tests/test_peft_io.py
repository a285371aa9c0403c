"""PEFT adapters in and out, against live peft on the live transformers model."""

import copy
import dataclasses
import functools
import gc
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import zoo
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.errors import UserError
from jaxtune.hf.export import weights_by_path
from jaxtune.hf.peft import (
    DEFAULTS,
    HIRA_DEFAULTS,
    IA3_DEFAULTS,
    MISS_DEFAULTS,
    PROMPT_DEFAULTS,
    _arrays,
    _spots,
    load_adapter,
    open_adapter,
)
from jaxtune.hf.peft_config import complete
from jaxtune.methods.table import METHODS, full, lora, places
from jaxtune.tree import TRAIN, combine, count, flatten, partition
from jaxtune.weights.adapters import DoraWeight, HiraWeight, LoraWeight, MissWeight, virtual_tokens
from jaxtune.weights.leaf import is_weight, map_weights, merge

TOKENS = zoo.tokens(2, 12)


@pytest.fixture(autouse=True)
def quiet_peft():
    """peft warns of what it corrects by itself (fan_in_fan_out), and torch of its own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft  # noqa: F401

        yield


def shake(params, mask, seed=0):
    """Stand in for training: move every trainable leaf."""
    rng = np.random.default_rng(seed)

    def move(leaf, role):
        if role is not TRAIN:
            return leaf
        by = np.float32(0.2) * rng.standard_normal(leaf.shape).astype(leaf.dtype)
        return jax.device_put(np.asarray(leaf) + by)  # by NumPy: nothing to compile for each shape

    def still(leaf, original):
        if isinstance(leaf, MissWeight):
            return dataclasses.replace(leaf, d=leaf.d * leaf.scale[:, None, None])
        if not isinstance(leaf, LoraWeight | HiraWeight):
            return leaf
        # What is zero on both sides of the product has no gradient: layers not adapted, columns beyond a lower rank.
        a, b, scale = (np.asarray(x) for x in (original.a, original.b, original.scale))
        on = (a.any(-2) | b.any(-1)) & (scale != 0)[..., None]
        still = {"a": np.asarray(leaf.a) * on[..., None, :], "b": np.asarray(leaf.b) * on[..., None]}
        if isinstance(leaf, DoraWeight):
            still["magnitude"] = np.asarray(leaf.magnitude) * (scale != 0)[..., None]
        return dataclasses.replace(leaf, **jax.device_put(still))

    return jax.tree.map(still, jax.tree.map(move, params, mask), params, is_leaf=is_weight)


def tuned(name, **settings):
    """A zoo model with trained adapters: (module, params, mask)."""
    module, params = zoo.ours(name)
    params, mask = lora(params, jax.random.key(0), module=module, **settings)
    return module, shake(params, mask), mask


@functools.partial(jax.jit, static_argnums=0)
def _apply(module, params):
    return module.apply({"params": params}, TOKENS)


def our_logits(module, params):
    return np.asarray(_apply(module, params))


def peft_model(name, folder, **settings):
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(zoo.model(name)), str(folder), **settings).eval()


def peft_adapter(name, folder, seed=0, kind="LoraConfig", **settings):
    """An adapter that live peft made and saved; returns its logits."""
    import peft
    import torch

    torch.manual_seed(seed)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(copy.deepcopy(zoo.model(name)), config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
            known = ("lora_", "modules_to_save", "trainable_tokens", "ia3_l", "prompt_encoder", "hira_", "miss_")
            assert p.requires_grad == (any(k in key for k in known) or (key.endswith("bias") and p.requires_grad))
    model.peft_config["default"].base_model_name_or_path = str(zoo.directory(name))
    model.save_pretrained(folder)
    return zoo.torch_logits(model, TOKENS)


def rewrite(folder, change=None, **config):
    """Edit an adapter: `change` edits its tensors in place, `config` its adapter_config.json."""
    tensors = load_file(folder / "adapter_model.safetensors")
    if change:
        change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A good adapter for the zoo's "llama", to be spoiled."""
    module, params, mask = tuned("llama", r=2, target_modules=["q_proj", "v_proj"])
    out = tmp_path / "adapter"
    jaxtune.export_adapter(module, params, out, base=zoo.directory("llama"), mask=mask)
    return out


def refused(folder, name="llama", **settings) -> str:
    """The message with which an adapter is refused."""
    with pytest.raises(UserError) as error:
        load_adapter(*zoo.ours(name), folder, **settings)
    return str(error.value)


def test_defaults_are_pefts():
    import peft

    kinds = {
        "LoraConfig": DEFAULTS,
        "HiraConfig": HIRA_DEFAULTS,
        "IA3Config": IA3_DEFAULTS,
        "MissConfig": MISS_DEFAULTS,
        "PromptTuningConfig": PROMPT_DEFAULTS,
    }
    for kind, ours in kinds.items():
        theirs = getattr(peft, kind)(task_type="CAUSAL_LM").to_dict() | {"inference_mode": True}
        assert json.loads(json.dumps(theirs, default=str)) | {"peft_version": None} == ours | {"peft_version": None}


EXPERTS = ("mlp.experts.gate_up_proj", "experts.down_proj")
OUT = {
    "all-linear": ("llama", {"r": 4}),
    "list": ("llama", {"target_modules": ("q_proj", "v_proj"), "lora_alpha": 12, "r": 3}),
    "regex, some layers": ("llama", {"target_modules": r".*layers\.[02]\.mlp\.(up|down)_proj", "r": 2}),
    "rslora": ("qwen2", {"use_rslora": True, "lora_alpha": 16, "r": 4}),
    "bias of targets": ("qwen2", {"bias": "lora_only", "target_modules": ("q_proj", "o_proj")}),
    "all biases": ("llama-mha-biases", {"bias": "all", "target_modules": ("k_proj",)}),
    "embedding, tied head": ("qwen3", {"target_modules": ("embed_tokens", "q_proj"), "r": 4}),
    "untied head": ("llama", {"target_modules": ("lm_head",), "r": 4}),
    "several segments": ("qwen2-mixed-windows", {"r": 2}),
    "gpt2 all-linear": ("gpt2", {"r": 4, "lora_alpha": 16}),
    "gpt2 fused qkv and embeddings": ("gpt2", {"target_modules": ("c_attn", "wte", "wpe"), "r": 4}),
    "gpt2 biases": ("gpt2", {"bias": "all", "target_modules": ("mlp.c_proj",)}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "rank_pattern": (("layers.1.self_attn.q_proj", 2), ("down_proj", 3)),
            "alpha_pattern": ((r"layers\.[01]\..*", 32.0),),
            "layers_to_transform": (0, 1),
            "exclude_modules": ("0.mlp.up_proj",),
        },
    ),
    "dora": (
        "qwen2",
        {"use_dora": True, "target_modules": ("q_proj", "up_proj"), "r": 3, "layers_to_transform": (0, 2)},
    ),
    "dora, fused and embedding": ("gpt2", {"use_dora": True, "target_modules": ("c_attn", "wte"), "r": 2}),
    "tied head saved": ("qwen3", {"target_modules": ("q_proj",), "modules_to_save": ("lm_head", "model.norm")}),
    "tied embedding saved": ("qwen3", {"target_modules": ("q_proj",), "modules_to_save": ("embed_tokens",)}),
    "norms saved": ("gpt2", {"target_modules": ("c_attn",), "modules_to_save": ("ln_f", "ln_1")}),
    "tokens, tied head": ("qwen3", {"target_modules": ("q_proj",), "trainable_token_indices": (7, 3, 90)}),
    "tokens": ("llama", {"target_modules": ("q_proj",), "trainable_token_indices": (1, 9)}),
    "experts beside linear modules": (
        "mixtral",
        {"target_parameters": EXPERTS, "r": 3, "rank_pattern": (("down_proj", 2), ("1.mlp.experts.gate_up_proj", 1))},
    ),
    "experts alone": ("qwen3_moe-sparse-step", {"target_modules": (), "target_parameters": EXPERTS[1:]}),
}


# Of what came with LoRA's relatives, all else is slow.
QUICK = {("patterns", True), ("dora", True), ("tokens, tied head", True), ("experts beside linear modules", True)}
LATER = list(OUT)[list(OUT).index("patterns") :]
BOTH = [
    pytest.param(case, given, marks=[pytest.mark.slow] if case in LATER and (case, given) not in QUICK else [])
    for case in OUT
    for given in (True, False)
]


@pytest.mark.parametrize("case, given", BOTH)
def test_peft_loads_ours_with_our_logits(case, given, tmp_path):
    name, settings = OUT[case]
    module, params, mask = tuned(name, **settings)
    out = tmp_path / "adapter"
    rslora = {"use_rslora": True} if "use_rslora" in settings else {}
    config = settings if given else rslora
    jaxtune.export_adapter(module, params, out, base=zoo.directory(name), config=config, mask=mask)
    expected = our_logits(module, params)
    assert zoo.apart(our_logits(*zoo.ours(name)), expected) > 0.01  # the adapter matters
    model = peft_model(name, out)
    assert zoo.apart(zoo.torch_logits(model, TOKENS), expected) < 1e-4
    # peft is silent about tensors it does not know: compare what it would save itself.
    from peft import get_peft_model_state_dict

    theirs = get_peft_model_state_dict(model, save_embedding_layers=False)
    ours = load_file(out / "adapter_model.safetensors")
    assert {k: tuple(v.shape) for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}
    assert {v.dtype for v in ours.values()} == {np.dtype(np.float32)}
    # And back again, to the bit.
    module, base = zoo.ours(name)
    again, mask_again, _ = jaxtune.load_adapter(module, base, out, base=zoo.directory(name))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert mask_again == mask


IN = {
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "r": 4,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 3},
            "alpha_pattern": {r"layers\.[01]\..*": 32},
        },
    ),
    "patterns, rslora": ("qwen2", {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True}),
    "layers and exclusion": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj"],
            "layers_to_transform": [0, 2],
            "exclude_modules": ["2.self_attn.k_proj"],
        },
    ),
    "a target of another family": ("llama", {"target_modules": ["q_proj", "query_key_value"]}),
    "biases": ("qwen2", {"target_modules": "all-linear", "bias": "lora_only"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "wte"], "bias": "all", "fan_in_fan_out": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "rank_pattern": {"q_proj": 2}}),
    "saved": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    "tokens": ("qwen3", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2, 40]}),
    "tokens as an object": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [7, 2, 1]}},
    ),
    "tokens of a tied head": (
        "qwen3",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [7]}},
    ),
    "tokens of one tied to them": (
        "qwen3",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [5, 2]}},
    ),
    "tokens of the head alone": (
        "qwen3",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7]}},
    ),
    "in both lists": (
        "llama",
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["embed_tokens"]},
    ),
    "a rank above a side": ("llama", {"target_modules": ["k_proj"], "r": 40, "lora_alpha": 40}),
    "head of a tied model": ("qwen3", {"target_modules": ["q_proj", "lm_head"]}),
    "head of gpt_neox": ("gpt_neox", {"target_modules": ["query_key_value"], "modules_to_save": ["lm_head"]}),
    "lora on gpt_neox's head": ("gpt_neox", {"target_modules": ["query_key_value", "lm_head"]}),
    "ia3 and the head saved": ("qwen3", {"kind": "IA3Config", "modules_to_save": ["lm_head"]}),
    "gate of a shared expert": ("qwen2_moe", {"target_modules": ["shared_expert_gate", "q_proj"]}),
    "experts": (
        "qwen2_moe",
        {"target_modules": ["shared_expert.up_proj"], "target_parameters": list(EXPERTS), "use_rslora": True},
    ),
    "experts of one layer alone": (
        "olmoe",
        {"target_modules": [], "target_parameters": ["1.mlp.experts.down_proj"], "alpha_pattern": {"down_proj": 3}},
    ),
}


SLOW = {
    "saved",
    "tokens",
    "ia3 and the head saved",
    "tokens of the head alone",
    "tokens of one tied to them",
    "dora",
    "lora on gpt_neox's head",
    "gate of a shared expert",
    "head of a tied model",
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in IN])
def test_we_load_pefts_with_its_logits_and_write_it_back(case, tmp_path):
    name, settings = IN[case]
    expected = peft_adapter(name, tmp_path / "theirs", **settings)
    module, base = zoo.ours(name)
    params, mask, config = jaxtune.load_adapter(module, base, tmp_path / "theirs", base=zoo.directory(name))
    assert zoo.apart(our_logits(module, params), expected) < 1e-4
    trainable = sum(x.size for x in jax.tree.leaves(partition(params, mask).trainable))
    theirs = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert trainable >= sum(
        v.size for key, v in theirs.items() if "base_layer" not in key
    )  # a table is saved, untrained

    jaxtune.export_adapter(module, params, tmp_path / "again", base=zoo.directory(name), config=config, mask=mask)
    theirs, ours = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "again"))
    theirs = {k: v for k, v in theirs.items() if not k.endswith("lm_head.base_layer.weight")}  # the base's own
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[k], ours[k]) for k in theirs)
    read = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("theirs", "again")]
    assert read[0] == read[1]


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_leaves_the_base_and_is_written_at_twice_the_rank(rslora, tmp_path):
    """Against peft's own PiSSA, which changes the base, and its own conversion."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    module, base = zoo.ours("llama")
    settings = {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "init_lora_weights": "pissa",
        "lora_alpha": 6,
        "use_rslora": rslora,
        "r": 4,
    }
    params, mask = lora(base, jax.random.key(0), module=module, **settings)
    assert zoo.apart(our_logits(module, params), our_logits(module, base)) < 1e-5
    theirs = get_peft_model(copy.deepcopy(zoo.model("llama")), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if isinstance(m, LoraLayer)}
    for place in places(params, module):
        if place.name in layers:
            leaf = weights_by_path(params)[place.path]
            our_a, our_b = leaf.a[place.index], leaf.b[place.index]
            a, b = (getattr(layers[place.name], f)["default"].weight.detach().numpy().T for f in ("lora_A", "lora_B"))
            rank = a.shape[1]
            assert not our_a[:, rank:].any() and not our_b[rank:].any()
            assert zoo.apart(our_a @ our_b, a @ b) < 1e-4  # singular vectors have no sign

    params = shake(params, mask)
    out, config = tmp_path / "a", settings | {"rank_pattern": (("down_proj", 2),)}
    jaxtune.export_adapter(module, params, out, base=zoo.directory("llama"), config=config, mask=mask)
    with torch.no_grad():
        got = zoo.torch_logits(peft_model("llama", out), TOKENS)
    assert zoo.apart(got, our_logits(module, params)) < 1e-4
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["r"] == 8 and written["rank_pattern"] == {"down_proj": 4} and written["init_lora_weights"] is True
    assert zoo.apart(our_logits(module, merge(params)), got) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("settings", [OUT["patterns"], OUT["dora, fused and embedding"]], ids=["patterns", "dora"])
def test_baked_adapters_have_one_rank_and_no_scale(settings, tmp_path):
    name, settings = settings
    module, params, mask = tuned(name, **settings)
    where = {"base": zoo.directory(name), "config": settings, "mask": mask, "bake": True}
    notes = jaxtune.export_adapter(module, params, tmp_path / "a", **where)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and not config["rank_pattern"] and not config["alpha_pattern"]
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    assert {v.shape[0] for k, v in tensors.items() if "_A" in k} == {config["r"]}
    assert zoo.apart(zoo.torch_logits(peft_model(name, tmp_path / "a"), TOKENS), our_logits(module, params)) < 1e-4
    assert any("vLLM refuses" in note and "DoRA" in note for note in notes) == ("use_dora" in settings)


IA3 = {
    "llama": ("llama", {}),
    "biases": ("qwen2", {"target_modules": ("k_proj", "layers.1.self_attn.q_proj"), "feedforward_modules": ()}),
    "gpt2": ("gpt2", {"target_modules": ("c_attn", "mlp.c_proj"), "feedforward_modules": ("mlp.c_proj",)}),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "biases" else [pytest.mark.slow]) for c in IA3])
def test_ia3_both_ways(case, tmp_path):
    name, settings = IA3[case]
    module, base = zoo.ours(name)
    params, mask = METHODS["ia3"](base, None, module, settings)
    assert np.array_equal(our_logits(module, params), our_logits(module, base))
    params = shake(params, mask)
    jaxtune.export_adapter(module, params, tmp_path / "a", base=zoo.directory(name), config=settings, mask=mask)
    stored = sum(v.size for v in load_file(tmp_path / "a/adapter_model.safetensors").values())
    assert count(params, mask)[:2] == (stored, zoo.model(name).num_parameters() + stored)
    expected = zoo.torch_logits(peft_model(name, tmp_path / "a"), TOKENS)
    assert zoo.apart(our_logits(module, base), expected) > 0.01
    assert zoo.apart(our_logits(module, params), expected) < 1e-4
    assert zoo.apart(our_logits(module, merge(params)), expected) < 1e-4

    unset = {"target_modules": None, "feedforward_modules": None}  # as a run has them that names none
    assert complete(module, params, mask, unset) == complete(module, params, mask, {})

    theirs = {k: list(v) for k, v in settings.items()} or {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    }
    expected = peft_adapter(name, tmp_path / "theirs", kind="IA3Config", **theirs)
    again_and_back(name, tmp_path, expected)


HIRA = {
    "some layers": (
        "llama",
        {
            "r": 3,
            "target_modules": ("q_proj", "down_proj"),
            "layers_to_transform": (0, 1),
            "modules_to_save": ("norm",),
        },
    ),
    "gpt2": ("gpt2", {"r": 2, "target_modules": ("c_attn", "mlp.c_proj"), "init_weights": "gaussian"}),
}
LIKE_LORA = {f"hira, {case}": ("hira", "HiraConfig", *HIRA[case]) for case in HIRA}
# 5 divides neither side; a layer that is not adapted.
MISS = {"r": 5, "target_modules": ("k_proj", "down_proj"), "layers_to_transform": (1, 2)}
LIKE_LORA["miss"] = ("miss", "MissConfig", "llama", MISS)


@pytest.mark.parametrize("case", LIKE_LORA)
def test_relatives_of_lora_both_ways(case, tmp_path):
    """Logits and gradients of what is trained are live peft's, merged too, and peft's own adapters come in."""
    import torch

    method, kind, name, settings = LIKE_LORA[case]
    module, base = zoo.ours(name)
    params, mask = METHODS[method](base, jax.random.key(0), module, settings)
    assert np.array_equal(our_logits(module, params), our_logits(module, base))
    params = shake(params, mask)
    jaxtune.export_adapter(module, params, tmp_path / "a", base=zoo.directory(name), config=settings, mask=mask)
    theirs = peft_model(name, tmp_path / "a", is_trainable=True)
    expected = zoo.torch_logits(theirs, TOKENS)
    assert zoo.apart(our_logits(module, base), expected) > 0.01
    assert zoo.apart(our_logits(module, params), expected) < 1e-5
    assert zoo.apart(our_logits(module, merge(params)), expected) < 1e-5

    part, direction = partition(params, mask), np.random.default_rng(1).standard_normal(expected.shape, np.float32)
    whole = lambda trained: combine(trained, part.member, part.frozen)  # noqa: E731
    grads = jax.jit(jax.grad(lambda t: (module.apply({"params": whole(t)}, TOKENS) * direction).sum()))(part.trainable)
    ours = _arrays(whole(grads), _spots(module, params, complete(module, params, mask, dict(settings))))
    (theirs(torch.tensor(TOKENS, dtype=torch.long)).logits * torch.tensor(direction)).sum().backward()
    found = {k: p.grad.numpy() for k, p in theirs.named_parameters() if p.grad is not None}
    found = {k.replace(".modules_to_save.default", "").replace(".default", ""): v for k, v in found.items()}
    assert found.keys() == ours.keys() == load_file(tmp_path / "a/adapter_model.safetensors").keys()
    assert max(zoo.apart(ours[k], found[k]) for k in found) < 1e-5

    theirs = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    again_and_back(name, tmp_path, peft_adapter(name, tmp_path / "theirs", kind=kind, **theirs))


def again_and_back(name, folder, expected):
    """Load what peft wrote, compare, write it and compare the files."""
    module, base = zoo.ours(name)
    params, mask, config = jaxtune.load_adapter(module, base, folder / "theirs", base=zoo.directory(name))
    if prefix := virtual_tokens(params):
        ids = np.concatenate([np.tile(prefix, (len(TOKENS), 1)), TOKENS], axis=1).astype(np.int32)
        logits = jax.jit(lambda p: module.apply({"params": p}, ids))(params)
    else:
        logits = our_logits(module, params)
    assert zoo.apart(logits, expected) < 1e-4
    jaxtune.export_adapter(module, params, folder / "again", base=zoo.directory(name), config=config, mask=mask)
    theirs, ours = (load_file(folder / d / "adapter_model.safetensors") for d in ("theirs", "again"))
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[k], ours[k]) for k in theirs)
    read = [json.loads((folder / d / "adapter_config.json").read_text()) for d in ("theirs", "again")]
    assert read[0] == read[1]


@pytest.mark.parametrize(
    "name",
    ["qwen3", "gemma", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "gemma2", "gemma3", "granite"))],
)
def test_prompt_tuning_both_ways(name, tmp_path):
    module, base = zoo.ours(name)
    params, mask = METHODS["prompt_tuning"](base, jax.random.key(0), module, {"num_virtual_tokens": 3})
    params = shake(params, mask)
    assert virtual_tokens(params) == [zoo.VOCAB, zoo.VOCAB + 1, zoo.VOCAB + 2]
    jaxtune.export_adapter(module, params, tmp_path / "a", base=zoo.directory(name), mask=mask)
    model = peft_model(name, tmp_path / "a")
    expected = zoo.torch_logits(model, TOKENS)
    ids = np.concatenate([np.tile(virtual_tokens(params), (2, 1)), TOKENS], axis=1).astype(np.int32)
    logits = jax.jit(lambda p: module.apply({"params": p}, ids))(params)
    assert zoo.apart(logits, expected) < 1e-4
    assert zoo.apart(our_logits(module, base), expected[:, 3:]) > 0.01

    import torch

    new = model.generate(
        input_ids=torch.tensor(TOKENS, dtype=torch.long),
        attention_mask=torch.ones(TOKENS.shape, dtype=torch.long),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        use_cache=False,  # peft 0.21 with transformers 5.24 loses a prompt's positions in a cache
    )
    assert jaxtune.generate(module, params, TOKENS.tolist(), max_new_tokens=5) == new[:, -5:].tolist()
    with pytest.raises(UserError, match="soft prompt cannot be merged"):
        jaxtune.export_model(module, params, tmp_path / "whole", base=zoo.directory(name))
    expected = peft_adapter(name, tmp_path / "theirs", kind="PromptTuningConfig", num_virtual_tokens=2)
    again_and_back(name, tmp_path, expected)


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_an_adapter_of_a_bare_body(name, task, tmp_path):
    """Of a decoder saved without its head, which gives hidden states; "qwen3" has a tied head."""
    import peft
    import torch
    import transformers

    base = tmp_path / "body"
    zoo.model(name).base_model.save_pretrained(base)
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type=task, target_modules=["q_proj", "down_proj"], trainable_token_indices=[3, 1])
    model = peft.get_peft_model(transformers.AutoModel.from_pretrained(base), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * p.requires_grad * torch.randn_like(p)
    model.save_pretrained(tmp_path / "theirs")

    def states(model):
        with torch.no_grad():
            return model(torch.tensor(TOKENS, dtype=torch.long)).last_hidden_state.numpy()

    expected = states(model)
    module, params, mask, config = open_adapter(tmp_path / "theirs")
    assert zoo.apart(our_logits(module, params), expected) < 1e-5
    jaxtune.export_adapter(module, params, tmp_path / "again", base=base, config=config, mask=mask)
    again = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base), tmp_path / "again").eval()
    assert np.array_equal(states(again), expected)
    if not module.spec.hf_config["tie_word_embeddings"]:
        assert type(jaxtune.load(base)[0]) is type(module)


def resized_adapter(name, folder, **settings):
    """As `peft_adapter`, after `resize_token_embeddings`: (logits, the resized base as transformers saves it)."""
    import peft
    import torch

    torch.manual_seed(1)
    model = copy.deepcopy(zoo.model(name))
    model.resize_token_embeddings(zoo.VOCAB + 2)
    model.save_pretrained(folder / "resized")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **settings))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    model.peft_config["default"].base_model_name_or_path = str(zoo.directory(name))
    model.save_pretrained(folder / "theirs")
    ids = np.concatenate([TOKENS, np.tile([zoo.VOCAB, zoo.VOCAB + 1], (2, 1))], axis=1).astype(np.int32)
    return zoo.torch_logits(model.eval(), ids), ids


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"trainable_token_indices": [zoo.VOCAB, zoo.VOCAB + 1]}, marks=pytest.mark.slow),
        pytest.param({"modules_to_save": ["embed_tokens"]}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_an_adapter_of_a_resized_model(name, settings, tmp_path):
    """On the resized base, and on the base as it was, which gets the rows that the adapter's file holds."""
    expected, ids = resized_adapter(name, tmp_path, **settings)
    module, params = jaxtune.load(tmp_path / "resized")
    params, _, _ = jaxtune.load_adapter(module, params, tmp_path / "theirs")
    assert zoo.apart(jax.jit(lambda p: module.apply({"params": p}, ids))(params), expected) < 1e-4
    module, params = jaxtune.load(tmp_path / "theirs")
    assert zoo.apart(jax.jit(lambda p: module.apply({"params": p}, ids))(params), expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_new_tokens_are_rows_of_a_resized_table(name, tmp_path):
    """A tied head knows the new tokens too; an untied one keeps what the resizing gave it."""
    module, base = zoo.ours(name)
    new = list(range(zoo.VOCAB, zoo.VOCAB + 3))
    module, base = jaxtune.resize(module, base, zoo.VOCAB + 3)
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": new}
    params, mask = lora(base, jax.random.key(0), module=module, **settings)
    params = shake(params, mask)
    ids = np.concatenate([TOKENS, np.tile(new, (2, 1))], axis=1).astype(np.int32)
    ours = jax.jit(lambda p: module.apply({"params": p}, ids))(params)
    where = {"base": zoo.directory(name), "mask": mask}
    jaxtune.export_adapter(module, params, tmp_path / "a", config=settings, **where)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = copy.deepcopy(zoo.model(name))
    theirs.resize_token_embeddings(zoo.VOCAB + 3)
    model = PeftModel.from_pretrained(theirs, str(tmp_path / "a")).eval()
    known = slice(None) if module.spec.tied else slice(zoo.VOCAB)
    assert zoo.apart(zoo.torch_logits(model, ids)[..., known], ours[..., known]) < 1e-4

    jaxtune.export_model(module, params, tmp_path / "whole", base=zoo.directory(name))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", attn_implementation="eager").eval()
    assert whole.config.vocab_size == zoo.VOCAB + 3 and whole.config.tie_word_embeddings == module.spec.tied
    assert zoo.apart(zoo.torch_logits(whole, ids), ours) < 1e-4


def test_base_tables_beside_adapters_of_them(tmp_path):
    """peft saves `base_layer` of a table that it adapts; one that is not the base's own is refused."""
    expected = peft_adapter("llama", tmp_path / "a", target_modules=["embed_tokens", "lm_head", "q_proj"], r=4)
    keys = [k for k in load_file(tmp_path / "a/adapter_model.safetensors") if "base_layer" in k]
    assert len(keys) == 2
    module, base = zoo.ours("llama")
    params, _, _ = jaxtune.load_adapter(module, base, tmp_path / "a")
    assert zoo.apart(our_logits(module, params), expected) < 1e-4
    message = refused(rewrite(tmp_path / "a", lambda tensors: tensors.update({keys[0]: tensors[keys[0]] + 1})))
    assert f"other base   {keys[0]}" in message and keys[1] not in message


def test_config_says_what_the_tree_holds(tmp_path):
    module, params, mask = tuned("gpt2", r=4, lora_alpha=10, lora_dropout=0.05)
    jaxtune.export_adapter(module, params, tmp_path / "a", base=zoo.directory("gpt2"), mask=mask)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config.keys() == DEFAULTS.keys()
    differing = {k: v for k, v in config.items() if v != DEFAULTS[k]}
    assert differing == {
        "r": 4,
        "lora_alpha": 10,
        "lora_dropout": 0.05,
        "target_modules": ["c_attn", "c_fc", "c_proj"],
        "fan_in_fan_out": True,
        "base_model_name_or_path": str(zoo.directory("gpt2")),
    }


def test_old_files_lack_newer_fields_and_base_layer(tmp_path):
    expected = peft_adapter("qwen2", tmp_path / "a", target_modules=["q_proj"], bias="lora_only")

    def old(tensors):
        for key in [k for k in tensors if "base_layer" in k]:
            tensors[key.replace("base_layer.", "")] = tensors.pop(key)

    rewrite(tmp_path / "a", old)
    file = tmp_path / "a/adapter_config.json"
    known = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "peft_type", "task_type")
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k in known}))
    module, base = zoo.ours("qwen2")
    params, _, _ = jaxtune.load_adapter(module, base, tmp_path / "a")
    assert zoo.apart(our_logits(module, params), expected) < 1e-4


@pytest.mark.slow
def test_published_adapter_on_a_random_gpt2(assets, tmp_path):
    """The real file of another's making: 12 layers, 768 wide, on random weights with a small vocabulary."""
    import torch
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=zoo.VOCAB, n_positions=32)).eval()
    base.save_pretrained(tmp_path / "gpt2")
    folder = assets / "adapters/gpt2-tigrinya-lora"
    with torch.no_grad():
        expected = zoo.torch_logits(PeftModel.from_pretrained(base, str(folder)).eval(), TOKENS)
    del base  # of 340 MB: two of them at once are too many
    gc.collect()
    module, params = jaxtune.load(tmp_path / "gpt2")
    plain = our_logits(module, params)
    params, _, config = jaxtune.load_adapter(module, params, folder, base=tmp_path / "gpt2")
    assert config["lora_alpha"] == 32
    assert zoo.apart(plain, expected) > 0.01
    assert zoo.apart(our_logits(module, params), expected) < 1e-4


# ---------------------------------------------------------------------------------------------------------- bad input


def test_one_message_names_every_tensor_that_does_not_fit(adapter):
    def spoil(tensors):
        keys = sorted(tensors)
        del tensors[keys[0]]
        tensors[keys[1]] = tensors[keys[1]][:, :1].copy()
        tensors["base_model.model.score.weight"] = np.zeros((2, 2), np.float32)

    keys = sorted(load_file(adapter / "adapter_model.safetensors"))
    message = refused(rewrite(adapter, spoil))
    assert f"missing      {keys[0]} [2, 32]" in message
    assert f"misshapen    {keys[1]} [64, 1], expected [64, 2]" in message
    assert "extra        base_model.model.score.weight [2, 2]" in message


def test_base_of_another_depth_or_shape(adapter, tmp_path):
    for layers, word in (
        (2, "extra        base_model.model.model.layers.2."),
        (4, "missing      base_model.model.model.layers.3."),
    ):
        zoo.build("llama", num_hidden_layers=layers).save_pretrained(tmp_path / str(layers))
        with pytest.raises(UserError, match="does not fit") as error:
            load_adapter(*jaxtune.load(tmp_path / str(layers)), adapter)
        assert word in str(error.value)
    assert "misshapen" in refused(adapter, "qwen2")
    assert "wrong base" in refused(adapter, "gpt2") and "q_proj" in refused(adapter, "gpt2")


def test_base_of_another_name(adapter):
    module, params = zoo.ours("llama")
    message = refused(adapter, base="other/model")
    assert "other base" in message and str(zoo.directory("llama")) in message and "other/model" in message
    load_adapter(module, params, adapter, base=None)
    load_adapter(module, params, rewrite(adapter, base_model_name_or_path="meta/llama"), base=zoo.directory("llama"))
    assert "other base" in refused(
        rewrite(adapter, base_model_name_or_path="meta/llama-2"), base=zoo.directory("llama")
    )
    cached = "/home/x/.cache/huggingface/hub/models--meta--llama-2/snapshots/0123"
    assert "other base" in refused(adapter, base=cached)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_bias": True},
        {"modules_to_save": "lm_head"},
        {"init_lora_weights": "pissa"},
        {"peft_type": "LOHA"},
        {"trainable_token_indices": {"embed_tokens": ["1"]}},
        {"rank_pattern": {"q_proj": "4"}},
        {"lora_alpha": float("nan")},
        {"layers_to_transform": ["0"]},
        {"target_modules": [1]},
        {"rank_pattern": {"q_proj": 10**6}},
        {"peft_type": "PROMPT_TUNING", "modules_to_save": ["lm_head"]},
        {"something_newer": 3},
        {"r": "8"},
        {"lora_alpha": None, "target_modules": []},
        {"bias": "some"},
    ],
    ids=str,
)
def test_settings_that_are_not_supported(adapter, config):
    message = refused(rewrite(adapter, **config))
    assert all(f"{key}=" in message for key in config if config[key] is not None)


def test_dora_lacks_its_magnitudes(tmp_path):
    peft_adapter("llama", tmp_path / "a", target_modules=["q_proj"], use_dora=True)
    message = refused(rewrite(tmp_path / "a", use_dora=False))
    assert "extra        base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector [64]" in message


def test_directories_that_hold_no_adapter(adapter, tmp_path):
    assert "adapter_config.json" in refused(tmp_path)
    (adapter / "adapter_config.json").write_text("{")
    assert "not valid JSON" in refused(adapter)
    rewrite_config = DEFAULTS | {"target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(rewrite_config))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "pickle" in refused(adapter)
    (adapter / "adapter_model.bin").unlink()
    assert "no weights" in refused(adapter)


def test_tree_that_an_adapter_cannot_carry(tmp_path):
    module, params, mask = tuned("llama", r=2)
    out, base = tmp_path / "a", zoo.directory("llama")
    for wrong in ({"r": 4}, {"lora_alpha": 9}, {"target_modules": ["q_proj"]}, {"use_dora": True}):
        with pytest.raises(ValueError):
            jaxtune.export_adapter(module, params, out, base=base, config=wrong, mask=mask)
    more = mask | {"norm": {"scale": TRAIN}}
    with pytest.raises(ValueError, match="norm/scale"):
        jaxtune.export_adapter(module, params, out, base=base, mask=more, config={"modules_to_save": None})
    with pytest.raises(ValueError, match="no adapters"):
        jaxtune.export_adapter(module, full(zoo.ours("llama")[1])[0], out, base=base)
    assert not out.exists()


def test_replaced_only_on_request_and_whole(adapter):
    module, params, mask = tuned("llama", r=2, target_modules=["q_proj"])
    base = zoo.directory("llama")
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    with pytest.raises(UserError, match="exists"):
        jaxtune.export_adapter(module, params, adapter, base=base, mask=mask)
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    jaxtune.export_adapter(module, params, adapter, base=base, mask=mask, overwrite=True)
    assert json.loads((adapter / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]


def test_the_base_is_untouched_and_shared(adapter):
    module, base = zoo.ours("llama")
    params, _, _ = load_adapter(module, base, adapter)
    bare = flatten(map_weights(lambda w: w.w if is_weight(w) else w, params))
    assert all(bare[path] is leaf for path, leaf in flatten(base).items())


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("LoraConfig", {"target_modules": ["q_proj"], "use_dora": True, "rank_pattern": {"1.self_attn.q_proj": 2}}),
        ("HiraConfig", {"target_modules": ["q_proj"], "r": 3}),
        ("IA3Config", {"target_modules": ["k_proj", "down_proj"]}),
        ("PromptTuningConfig", {"num_virtual_tokens": 2}),
    ],
)
def test_front_door(kind, settings, tmp_path):
    from jaxtune import peft

    module, params = zoo.ours("llama")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **settings)
    base = peft.Model(module, params, str(zoo.directory("llama")))
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "a")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "a")
    assert again.mask == model.mask
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    with pytest.raises(UserError, match="'target_module' is not supported"):
        getattr(peft, kind)(target_module=["q_proj"])


def test_default_targets_are_pefts():
    from peft.utils import constants

    from jaxtune.methods import targets
    from jaxtune.models import FAMILIES

    theirs = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {f: list(t) for f, t in targets.LORA.items()} == {f: theirs[f] for f in FAMILIES if f in theirs}
    theirs = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    inputs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for family in [f for f in FAMILIES if f in theirs and f in inputs]:
        known = [[t for t in names if t != "w2"] for names in (theirs[family], inputs[family])]
        assert [list(t) for t in targets.IA3[family]] == known
    from jaxtune.peft import LoraConfig

    module, _ = zoo.ours("llama")
    assert LoraConfig().settings_for(module) == {"target_modules": ("q_proj", "v_proj")}
    with pytest.raises(UserError, match="no default targets for 'granite'"):
        LoraConfig().settings_for(zoo.ours("granite")[0])


def test_older_names_of_modules_are_understood():
    """GPT-NeoX's head was "embed_out", as it is in files."""
    module, base = zoo.ours("gpt_neox")
    params, _ = lora(base, jax.random.key(0), module=module, target_modules=["embed_out"], r=2)
    assert isinstance(params["lm_head"]["kernel"], LoraWeight)


def test_card(adapter):
    text = (adapter / "README.md").read_text()
    assert (
        str(zoo.directory("llama")) not in text and "library_name: peft" in text and "PeftModel.from_pretrained" in text
    )
