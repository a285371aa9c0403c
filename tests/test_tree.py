import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import UserError
from jaxtune.tree import (
    FROZEN,
    MEMBER,
    TRAIN,
    Role,
    combine,
    count,
    flatten,
    match,
    partition,
    split_stack,
)
from jaxtune.weights.adapters import LoraWeight
from jaxtune.weights.packed import QuantWeight

PARAMS = {
    "embed_tokens": {"embedding": np.zeros((7, 4))},
    "segment_0": {
        "block_0": {
            "q_proj": {"kernel": np.zeros((2, 4, 4)), "bias": np.zeros((2, 4))},
            "norm": {"scale": np.ones((2, 4))},
        }
    },
    "norm": {"scale": np.ones(4)},
}


def lora(n=2, k=4, m=4, r=3, dropout=True, w=None):
    rate = np.zeros(n, np.float32) if dropout else None
    base = np.zeros((n, k, m)) if w is None else w
    return LoraWeight(base, np.zeros((n, k, r)), np.zeros((n, r, m)), np.ones(n, np.float32), rate)


# --- rules


def test_first_matching_rule_wins():
    mask = match([(".*/bias", TRAIN), ("segment_0/.*", MEMBER), (".*", FROZEN)], PARAMS)
    assert flatten(mask) == {
        "embed_tokens/embedding": FROZEN,
        "norm/scale": FROZEN,
        "segment_0/block_0/norm/scale": MEMBER,
        "segment_0/block_0/q_proj/bias": TRAIN,
        "segment_0/block_0/q_proj/kernel": MEMBER,
    }


def test_a_rule_matches_whole_paths():
    mask = match([("norm/scale", 1), (".*", 0)], PARAMS)
    assert [path for path, value in flatten(mask).items() if value] == ["norm/scale"]


def test_rules_reach_the_fields_of_polymorphic_leaves():
    mask = match([(".*/(a|b)", TRAIN), (".*/(scale|dropout)", MEMBER), (".*", FROZEN)], {"q": {"kernel": lora()}})
    leaf = mask["q"]["kernel"]
    assert isinstance(leaf, LoraWeight)
    assert (leaf.w, leaf.a, leaf.b, leaf.scale, leaf.dropout) == (FROZEN, TRAIN, TRAIN, MEMBER, MEMBER)


def test_a_rule_that_matches_nothing_names_the_nearest_paths():
    with pytest.raises(UserError, match="matches none of the 5 parameters") as e:
        match([("segment_0/block_0/q_prj/kernel", TRAIN), (".*", FROZEN)], PARAMS)
    assert "'segment_0/block_0/q_prj/kernel'" in str(e.value)
    assert "Did you mean 'segment_0/block_0/q_proj/kernel'" in str(e.value)


def test_a_shadowed_rule_still_counts_as_matching():
    match([(".*", FROZEN), ("norm/scale", TRAIN)], PARAMS)


def test_a_leaf_that_no_rule_covers_is_named():
    with pytest.raises(UserError, match=r"No rule covers the parameter 'norm/scale'"):
        match([("embed.*", FROZEN), ("segment_0/.*", TRAIN)], PARAMS)


def test_a_malformed_rule_is_named():
    with pytest.raises(UserError, match=re.escape("'*/bias' is not a regular expression")):
        match([("*/bias", TRAIN), (".*", FROZEN)], PARAMS)


# --- partition


def leaves():
    array = st.builds(lambda n: np.arange(n, dtype=np.float32), st.integers(0, 3))
    weight = st.builds(lambda dropout: lora(dropout=dropout), st.booleans())
    quantised = st.builds(lambda: lora(w=QuantWeight(np.zeros((2, 4, 4), np.int8), np.ones((2, 1, 4)))))
    return st.one_of(array, st.none(), weight, quantised)


def trees():
    names = st.sampled_from(["w", "kernel", "a", "segment_0", "x/y"])
    return st.recursive(
        leaves(), lambda t: st.one_of(st.dictionaries(names, t, max_size=3), st.lists(t, max_size=3), st.tuples(t, t))
    )


@hypothesis.given(trees(), st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_combine_undoes_partition_leaf_by_leaf(tree, data):
    flat, structure = jax.tree.flatten(tree)
    hypothesis.assume(flat)
    roles = data.draw(st.lists(st.sampled_from(Role), min_size=len(flat), max_size=len(flat)))
    roles[data.draw(st.integers(0, len(flat) - 1))] = TRAIN
    parts = partition(tree, structure.unflatten(roles))

    for part, role in zip(parts, (TRAIN, MEMBER, FROZEN), strict=True):
        want = [leaf for leaf, r in zip(flat, roles, strict=True) if r is role]
        got = jax.tree.leaves(part)
        assert len(got) == len(want)
        assert all(a is b for a, b in zip(got, want, strict=True))

    back = combine(*parts)
    assert jax.tree.structure(back) == structure
    assert all(a is b for a, b in zip(jax.tree.leaves(back), flat, strict=True))


def test_partition_passes_through_jit_and_grad():
    params = {"q": {"kernel": lora()}, "norm": jnp.ones(4)}
    mask = match([(".*/(a|b)", TRAIN), (".*/(scale|dropout)", MEMBER), (".*", FROZEN)], params)
    trainable, member, frozen = partition(params, mask)

    @jax.jit
    def loss(trainable, member, frozen):
        p = combine(trainable, member, frozen)
        return jnp.sum(p["q"]["kernel"].a) * 3 + jnp.sum(p["norm"])

    gradient = jax.grad(loss)(trainable, member, frozen)
    assert list(flatten(gradient)) == ["q/kernel/a", "q/kernel/b"]
    assert np.all(gradient["q"]["kernel"].a == 3)


def test_partition_refuses_another_structure_and_an_empty_selection():
    with pytest.raises(ValueError, match="structure"):
        partition(PARAMS, {"norm": TRAIN})
    with pytest.raises(UserError, match="Nothing is left to train"):
        partition(PARAMS, match([(".*", FROZEN)], PARAMS))


def test_split_stack_cuts_every_field():
    stacked = {"q": LoraWeight(*(jnp.arange(5 * n).reshape(5, n) for n in (1, 2, 3)), jnp.arange(5.0), None)}
    low, high = split_stack(stacked, 2)
    assert [x.shape[0] for x in jax.tree.leaves(low)] == [2] * 4
    assert [x.shape[0] for x in jax.tree.leaves(high)] == [3] * 4
    back = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), low, high)
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(stacked)))


# --- counts


def test_counts_and_the_line_that_peft_prints():
    import torch
    from peft import LoraConfig, get_peft_model

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.up_proj = torch.nn.Linear(400, 400), torch.nn.Linear(400, 800, bias=False)

    peft_model = get_peft_model(Toy(), LoraConfig(r=3, target_modules=["q_proj"]))
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", printed.append)
        peft_model.print_trainable_parameters()

    shape = jax.ShapeDtypeStruct
    f32 = jnp.float32
    params = {
        "segment_0": {
            "block_0": {
                "self_attn": {
                    "q_proj": {
                        "kernel": LoraWeight(
                            shape((1, 400, 400), f32),
                            shape((1, 400, 3), f32),
                            shape((1, 3, 400), f32),
                            shape((1,), f32),
                            shape((1,), f32),
                        ),
                        "bias": shape((1, 400), f32),
                    }
                },
                "mlp": {"up_proj": {"kernel": shape((1, 400, 800), f32)}},
            }
        }
    }
    mask = match([(".*/(a|b)", TRAIN), (".*/kernel/(scale|dropout)", MEMBER), (".*", FROZEN)], params)
    counts = count(params, mask)
    assert [str(counts)] == printed
    assert str(counts) == "trainable params: 2,400 || all params: 482,800 || trainable%: 0.4971"
    assert counts.groups == {"self_attn/q_proj": (2400, 162_800), "mlp/up_proj": (0, 320_000)}


def test_groups_forget_the_depth_but_keep_the_norms_apart():
    params = {f"segment_{i}": {"block_0": {"input_norm": {"scale": np.ones((2, 4))}}} for i in range(2)}
    params["norm"] = {"scale": np.ones(4)}
    counts = count(params, match([("norm/scale", TRAIN), (".*", FROZEN)], params))
    assert counts.groups == {"input_norm": (0, 16), "norm": (4, 4)}
