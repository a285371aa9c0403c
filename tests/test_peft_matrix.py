"""Every family under the forms that peft's own tests give an adapter: live peft makes and saves it, jaxtune reads it,
writes it, and peft reads that again; logits are the same throughout. What is refused is refused for a reason told here.
"""

import copy
import functools
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
import zoo
from test_models import FIRST

import jaxtune
from jaxtune.errors import UserError
from jaxtune.methods.adapters import HEAD, TABLE
from jaxtune.methods.places import places
from jaxtune.weights.adapters import (
    DoraWeight,
    HeadTokensWeight,
    Ia3Weight,
    LoraWeight,
    PromptWeight,
    TokensWeight,
    virtual_tokens,
)
from jaxtune.weights.leaf import is_weight, map_paths, weights_by_path

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TOKENS = zoo.tokens(2, 10)
RESIZED = zoo.VOCAB + 2


@functools.cache
def named(name: str) -> dict[str, Any]:
    """What configurations name in a family: modules of its first layer, its table, head and a norm."""
    module, params = zoo.ours(name)
    every = places(params, module)
    linear = [p.name for p in every if p.linear and p.index is not None and not p.parameter]
    first = [n for n in linear if re.search(r"\.0\.", n)]
    ends = list(dict.fromkeys(n.rpartition(".")[2] for n in first))
    attention = first[0].rpartition(".")[2]
    torch_names = [n for n, _ in zoo.model(name).named_modules()]
    norms = [n.rpartition(".")[2] for n in torch_names if re.search(r"\.0\..*(norm|ln_1)", n)]
    return {
        "attention": attention,
        "last": ends[-1],
        "ends": ends,
        "full": first[0],
        "table": next(p.name for p in every if not p.linear).rpartition(".")[2],
        "norm": norms[0],
    }


# name: what of peft's configuration a family's names make. "kind" is peft's class, "resize" comes before it.
CONFIGS = {
    "no targets": lambda n: {},
    "all-linear": lambda n: {"target_modules": "all-linear"},
    "one target": lambda n: {"target_modules": [n["attention"]]},
    "two targets": lambda n: {"target_modules": [n["attention"], n["last"]], "r": 4, "lora_alpha": 3},
    "a regex": lambda n: {"target_modules": re.escape(n["full"])},
    "whole names": lambda n: {"target_modules": [n["full"]]},
    "a high rank": lambda n: {"target_modules": [n["attention"]], "r": 80},
    "rslora": lambda n: {"target_modules": [n["attention"]], "use_rslora": True, "r": 4},
    "patterns": lambda n: {
        "target_modules": [n["attention"], n["last"]],
        "rank_pattern": {n["attention"]: 3},
        "alpha_pattern": {n["full"]: 5},
    },
    "one layer": lambda n: {"target_modules": [n["attention"]], "layers_to_transform": [1]},
    "an exclusion": lambda n: {"target_modules": n["ends"], "exclude_modules": [n["attention"]]},
    "all biases": lambda n: {"target_modules": [n["attention"]], "bias": "all"},
    "own biases": lambda n: {"target_modules": [n["attention"]], "bias": "lora_only"},
    "dora": lambda n: {"target_modules": [n["attention"], n["last"]], "use_dora": True},
    "a norm saved": lambda n: {"target_modules": [n["attention"]], "modules_to_save": [n["norm"]]},
    "the head saved": lambda n: {"target_modules": [n["attention"]], "modules_to_save": ["lm_head"]},
    "the head": lambda n: {"target_modules": [n["attention"], "lm_head"]},
    "the table": lambda n: {"target_modules": [n["attention"], n["table"]]},
    "the table saved": lambda n: {"target_modules": [n["attention"]], "modules_to_save": [n["table"]]},
    "the table in both": lambda n: {"target_modules": [n["attention"], n["table"]], "modules_to_save": [n["table"]]},
    "tokens": lambda n: {"target_modules": [n["attention"]], "trainable_token_indices": [3, 1]},
    "tokens, named": lambda n: {"target_modules": [n["attention"]], "trainable_token_indices": {n["table"]: [3, 1]}},
    "tokens of both": lambda n: {
        "target_modules": [n["attention"]],
        "trainable_token_indices": {n["table"]: [3, 1], "lm_head": [2]},
    },
    "resized": lambda n: {"resize": True, "target_modules": [n["attention"]]},
    "resized, tokens": lambda n: {
        "resize": True,
        "target_modules": [n["attention"]],
        "trainable_token_indices": [zoo.VOCAB, zoo.VOCAB + 1],
    },
    "ia3": lambda n: {"kind": "IA3Config"},
    "ia3, named": lambda n: {
        "kind": "IA3Config",
        "target_modules": [n["attention"], n["last"]],
        "feedforward_modules": [n["last"]],
    },
    "ia3, saved": lambda n: {"kind": "IA3Config", "modules_to_save": [n["norm"]]},
    "prompt": lambda n: {"kind": "PromptTuningConfig", "num_virtual_tokens": 3},
    "lora_bias": lambda n: {"target_modules": [n["attention"]], "lora_bias": True},
    "tied weights": lambda n: {
        "target_modules": [n["attention"]],
        "modules_to_save": [n["table"]],
        "ensure_weight_tying": True,
    },
}
# What jaxtune refuses, by what its message says: it has no such leaf.
REFUSED = {
    "lora_bias": "lora_bias=True",
    "tied weights": "ensure_weight_tying=True",
    "own biases": "in some layers only|bias",
    # Of Phi and GPT-J, whose head has a bias, which peft writes along.
    "the head": r"extra +base_model\.model\.lm_head\.base_layer\.bias",
    "tokens of both": "the output head has a bias",
    "resized": r"extra +base_model\.model\.lm_head\.bias",
    "resized, tokens": r"extra +base_model\.model\.lm_head\.bias",
}


def theirs(name: str, config: dict[str, Any], folder: Any) -> tuple[Any, np.ndarray] | None:
    """Live peft's adapter, saved: its logits; None where peft itself refuses, or changes nothing."""
    import peft
    import torch

    torch.manual_seed(0)
    model = copy.deepcopy(zoo.model(name))
    if config.pop("resize", False):
        model.resize_token_embeddings(RESIZED)
    kind = config.pop("kind", "LoraConfig")
    try:
        tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **config)).eval()
    except (ValueError, TypeError, NotImplementedError, RuntimeError, KeyError, AttributeError) as error:
        return str(error), None
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    tuned.peft_config["default"].base_model_name_or_path = str(zoo.directory(name))
    tuned.save_pretrained(folder)
    return model, zoo.torch_logits(tuned, TOKENS)


def folded(params: Any) -> Any:
    """Plain arrays in place of leaves, by the equations of their papers: one program of a family does for all.

    A soft prompt stays, which no table is, and LoRA of a table that is the head, too: there it counts in one place.
    """
    tied = HEAD not in weights_by_path(params)

    def walk(tree, path):
        if isinstance(tree, Mapping):
            out = {name: walk(child, f"{path}/{name}") for name, child in tree.items()}
            if getattr(tree.get("kernel"), "bias", None) is not None:  # (IA)^3 scales it
                kernel = tree["kernel"]
                out["bias"] = jax.device_put(np.asarray(tree["bias"]) * adapted(kernel, kernel.out))
            return out
        if not is_weight(tree) or isinstance(tree, PromptWeight) or (tied and lora_at(tree, path.strip("/"))):
            return tree
        return jax.device_put(plain_array(tree))

    return walk(params, "")


def lora_at(leaf: Any, path: str) -> bool:
    return isinstance(leaf, LoraWeight) and path == TABLE


def adapted(leaf: Any, vector: Any) -> np.ndarray:
    """A vector of each layer, ones where a layer is not adapted."""
    return np.where(np.asarray(leaf.scale)[..., None] != 0, np.asarray(vector), np.float32(1))


def plain_array(leaf: Any) -> np.ndarray:
    w = np.asarray(leaf.w, np.float32)
    if isinstance(leaf, LoraWeight):
        a, b, scale = (np.asarray(x, np.float32) for x in (leaf.a, leaf.b, leaf.scale))
        w = w + scale[..., None, None] * (a @ b)
        if isinstance(leaf, DoraWeight):
            w = w * adapted(leaf, np.asarray(leaf.magnitude) / np.sqrt(np.square(w).sum(-2)))[..., None, :]
    elif isinstance(leaf, Ia3Weight):
        w = w * (adapted(leaf, leaf.out)[..., None, :] if leaf.inp is None else adapted(leaf, leaf.inp)[..., None])
    else:
        w = w.copy()  # some rows of a table, or columns of a head
        (w.T if isinstance(leaf, HeadTokensWeight) else w)[list(leaf.ids)] = np.asarray(leaf.rows)
    return w


def logits(module: Any, params: Any) -> np.ndarray:
    prefix = np.tile(virtual_tokens(params), (2, 1)).astype(np.int32)
    return np.asarray(_apply(module, params, np.concatenate([prefix, TOKENS], axis=1)))


@functools.partial(jax.jit, static_argnums=0)
def _apply(module: Any, params: Any, tokens: Any) -> Any:
    """One program for all configurations that give trees of one structure."""
    return module.apply({"params": params}, tokens)


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("name", FIRST)
def test_an_adapter_of_peft_comes_in_and_goes_out(name, case, tmp_path):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said, expected = theirs(name, CONFIGS[case](named(name)), tmp_path / "theirs")
    if expected is None:
        pytest.skip(f"peft refuses: {said}")
    saved = json.loads((tmp_path / "theirs/adapter_config.json").read_text())
    if saved.get("target_parameters"):
        pytest.skip("peft adapts experts, which are no modules")
    try:
        module, params, mask, config = jaxtune.hf.peft.open_adapter(tmp_path / "theirs")
    except UserError as error:
        assert case in REFUSED and re.search(REFUSED[case], str(error)), error
        pytest.skip(f"refused: {REFUSED[case]}")
    assert zoo.apart(logits(module, params if case == "all-linear" else folded(params)), expected) < 1e-4
    jaxtune.export_adapter(module, params, tmp_path / "ours", base=zoo.directory(name), config=config, mask=mask)
    model = copy.deepcopy(zoo.model(name))
    if module.spec.vocab != zoo.VOCAB:
        model.resize_token_embeddings(module.spec.vocab)
    again = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours")).eval()
    assert zoo.apart(zoo.torch_logits(again, TOKENS), expected) < 1e-4


@pytest.mark.parametrize("name", FIRST)
def test_leaves_compute_what_they_stand_for(name):
    """Each kind of leaf in each place of a family, two programs for all; one layer is not adapted."""
    module, params = zoo.ours(name)
    rng = np.random.default_rng(0)
    bodies = {p.path for p in places(params, module) if p.linear and p.index is not None and not p.parameter}
    leaves = weights_by_path(params)

    def draw(*shape, around=0.0):
        return jax.device_put(np.float32(around + 0.3 * rng.standard_normal(shape)))

    def low_rank(w, kind=LoraWeight, **more):
        *layers, k, n = w.shape
        scale = jax.device_put(np.float32(0.5 * (np.arange(layers[0]) != 1)) if layers else np.float32(0.5))
        return kind(w, draw(*layers, k, 2), draw(*layers, 2, n), scale, **more)

    def first(path, w):
        if path in bodies:
            return low_rank(w, DoraWeight, magnitude=draw(*w.shape[:-2], w.shape[-1], around=2.0))
        return low_rank(w) if path == HEAD or (path == TABLE and HEAD in leaves) else w

    def second(path, w):
        if path in bodies:
            *layers, k, n = w.shape
            scale = jax.device_put(np.float32(np.arange(layers[0]) != 1))
            if sorted(bodies).index(path) % 2:
                return Ia3Weight(w, scale, inp=draw(*layers, k, around=1.0))
            bias = leaves.get(path.removesuffix("kernel") + "bias")
            return Ia3Weight(w, scale, out=draw(*layers, n, around=1.0), bias=bias)
        kind = {TABLE: TokensWeight, HEAD: HeadTokensWeight}.get(path)
        return w if kind is None else kind(w, draw(2, zoo.LLAMA["hidden_size"]), (3, 1))

    bare = logits(module, params)
    for change in (first, second):
        tree = map_paths(change, params)
        got = logits(module, tree)
        assert zoo.apart(got, logits(module, folded(tree))) < 1e-4
        assert zoo.apart(got, bare) > 0.01
