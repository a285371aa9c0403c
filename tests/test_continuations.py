"""Continuations that share contexts against transformers, one whole row at a time, and the shapes that they take."""

import jax
import numpy as np
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.errors import UserError
from jaxtune.infer import continuations
from jaxtune.infer.continuations import scorer, shared_batches, sharing_pays
from jaxtune.methods.table import prompt_tuning


@pytest.fixture(autouse=True)
def compiles_are_cheap(monkeypatch):
    """Else such small models would rather read every row than compile one more program."""
    monkeypatch.setattr(continuations, "worth_a_compile", lambda params: 0)


def draw(seed=0, contexts=((9, 4), (1, 2), (30, 3), (17, 1)), longest=6, vocab=zoo.VOCAB):
    """Pairs of ids: for each (length, n) a context of that length, n times with something else behind it."""
    rng = np.random.default_rng(seed)
    pairs = []
    for length, n in contexts:
        context = rng.integers(3, vocab, length).tolist()
        pairs += [(context, rng.integers(3, vocab, rng.integers(1, longest + 1)).tolist()) for _ in range(n)]
    return [pairs[i] for i in rng.permutation(len(pairs))]


def scores(module, params, pairs):
    batches, score = scorer(module, params, pairs)
    assert sorted(i for batch in batches for i in batch) == list(range(len(pairs)))
    found = {i: result for batch in batches for i, result in zip(batch, score(batch), strict=True)}
    return [found[i] for i in range(len(pairs))]


def theirs(name, context, new):
    logits = zoo.torch_logits(zoo.model(name), np.array([[*context, *new]]))[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logprobs -= logits.max(-1, keepdims=True)
    rows = logprobs[len(context) - 1 : -1]
    return rows[np.arange(len(new)), new].sum(), bool((rows.argmax(-1) == new).all())


def greedy(name, context, n):
    """What the model itself would go on with, so that some of the continuations are the likeliest."""
    new = []
    for _ in range(n):
        new.append(int(zoo.torch_logits(zoo.model(name), np.array([[*context, *new]]))[0, -1].argmax()))
    return new


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_each_pair_as_transformers_scores_it_alone(name):
    """Also at the last position, where padding has none left, and behind sliding windows."""
    module, params = zoo.ours(name)
    pairs = draw(contexts=((9, 4), (1, 2), (61, 2), (40, 3)), longest=3)
    longest = max((context for context, _ in pairs), key=len)
    pairs += [(longest, [5, 9, 7]), (pairs[0][0], greedy(name, pairs[0][0], 3)), (pairs[0][0], pairs[0][1])]
    assert max(len(c) + len(n) for c, n in pairs) == 64 and sharing_pays(module, params, pairs)
    got = scores(module, params, pairs)
    for (context, new), (value, likeliest) in zip(pairs, got, strict=True):
        want = theirs(name, context, new)
        assert value == pytest.approx(want[0], abs=1e-4) and likeliest == want[1]
    assert {likeliest for _, likeliest in got} == {True, False}


def test_a_soft_prompt_stands_before_every_context(monkeypatch):
    """Shared or whole, the prompt's vectors are read first, and are not what the base says."""
    module, params = zoo.ours("llama")
    tuned, _ = prompt_tuning(params, jax.random.key(0), num_virtual_tokens=5, init="random", module=module)
    pairs = draw()
    shared = scores(module, tuned, pairs)
    monkeypatch.setattr(continuations, "sharing_pays", lambda *_: False)
    whole = scores(module, tuned, pairs)
    assert [v for v, _ in shared] == pytest.approx([v for v, _ in whole], abs=1e-4)
    ids = [module.spec.vocab + i for i in range(5)]
    context, new = pairs[0]
    logits = np.asarray(module.apply({"params": tuned}, np.array([[*ids, *context, *new]])), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = logprobs[len(ids) + len(context) - 1 : -1][np.arange(len(new)), new].sum()
    assert shared[0][0] == pytest.approx(want, abs=1e-4)
    assert abs(want - scores(module, params, pairs)[0][0]) > 1e-2


def test_what_is_longer_than_the_model_is_refused():
    module, params = zoo.ours("llama")
    with pytest.raises(UserError, match="66 tokens, and the model has 64 positions"):
        scorer(module, params, [([3] * 60, [4] * 6)] * 2)


def test_where_sharing_does_not_pay_or_cannot_be(monkeypatch):
    module, params = zoo.ours("llama")
    twice = draw(contexts=((20, 2), (25, 2), (30, 1)))  # 45 tokens are read once instead of twice
    assert not sharing_pays(module, params, draw(contexts=((20, 1), (25, 1), (30, 1))))
    assert sharing_pays(module, params, twice)
    assert not sharing_pays(*zoo.ours("phi3"), twice)  # longrope
    for room, pays in ((89, True), (90, False)):
        monkeypatch.setattr(continuations, "worth_a_compile", lambda params, room=room: room)
        assert sharing_pays(module, params, twice) is pays


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=60),
    st.integers(1, 20),
    st.sampled_from([0, 10**9]),
    st.integers(0, 99),
)
def test_batches_hold_every_pair_and_few_shapes(contexts, longest, room, seed):
    module, params = zoo.ours("llama")
    pairs = draw(seed, contexts, longest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuations, "worth_a_compile", lambda params: room)
        patch.setattr(continuations, "most_tokens", lambda: 512)
        batches = shared_batches(module, params, pairs)
    assert sorted(i for batch in batches for i in batch.members) == list(range(len(pairs)))
    for groups, shape in batches:
        assert len(groups) <= shape.contexts and sum(map(len, groups)) <= shape.rows
        assert all(len({tuple(pairs[i][0]) for i in group}) == 1 for group in groups)
        members = [pairs[i] for group in groups for i in group]
        assert max(len(c) - 1 for c, _ in members) <= shape.width and max(len(n) for _, n in members) <= shape.length
        assert len(members) == 1 or shape.rows * shape.length <= 512
    sizes = {shape for _, shape in batches}
    assert len(sizes) <= 2 or not room  # of the shapes before, one may hold too few contexts or rows
