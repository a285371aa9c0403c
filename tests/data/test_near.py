"""Near duplicates against exact Jaccard similarities."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.curate import near
from jaxtune.curate.balance import cramers_v
from jaxtune.curate.sets import first_of

WORDS = st.lists(st.sampled_from(["red", "green", "blue", "black", "white", "pink", "grey", "brown"]), max_size=12)


@settings(max_examples=50, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=6))
def test_shingles_are_the_sets_of_runs_of_three_words(texts):
    hashes, owner = near.shingles(texts)
    for i, words in enumerate(texts):
        runs = {tuple(words[k : k + 3]) for k in range(len(words) - 2)}
        own = hashes[owner == i]
        assert len(own) == len(set(own.tolist())) == len(runs)
    by_run = {}
    for i, words in enumerate(texts):
        single = [tuple(words[k : k + 3]) for k in range(len(words) - 2)]
        for run in single:
            [h], _ = near.shingles([run])
            assert by_run.setdefault(run, h) == h
            assert h in hashes[owner == i]


def test_signatures_estimate_jaccard_similarity():
    rng = np.random.default_rng(0)
    errors = []
    for shared in (0, 30, 60, 90):
        base = rng.integers(0, 2**63, 200).astype(np.uint64)
        a, b = base[:100], np.concatenate([base[:shared], base[100 : 200 - shared]])
        kept = near.signatures(np.concatenate([a, b]), np.array([100, 100]))
        errors.append((kept[0] == kept[1]).mean() - shared / (200 - shared))
    assert max(map(abs, errors)) < 4 * np.sqrt(0.25 / near.PERMUTATIONS)


def test_copies_are_found_and_strangers_are_not():
    rng = np.random.default_rng(1)
    words = [f"w{i}" for i in range(500)]
    texts = [list(rng.choice(words, 40)) for _ in range(300)]
    for i in range(20):  # one word of 40 changed: 35 of 41 runs are shared
        texts.append([*texts[i][:20], "new", *texts[i][21:]])
    hashes, owner = near.shingles(texts)
    later, earlier = near.similar_pairs(near.signatures(hashes, np.bincount(owner)), 0.7)
    copies, originals = near.superfluous(later, earlier)
    assert dict(zip(copies.tolist(), originals.tolist())) == {300 + i: i for i in range(20)}


def test_many_copies_of_one_text_keep_the_first():
    kept = np.tile(np.arange(near.PERMUTATIONS, dtype=np.uint16), (1000, 1))
    copies, originals = near.superfluous(*near.similar_pairs(kept, 0.8))
    assert copies.tolist() == list(range(1, 1000))
    assert set(originals.tolist()) == {0}


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).filter(lambda p: p[0] > p[1]), max_size=40))
def test_no_row_goes_without_its_original_staying(pairs):
    later, earlier = (np.array([p[k] for p in sorted(set(pairs))], np.int64) for k in (0, 1))
    copies, originals = near.superfluous(later, earlier)
    assert not set(copies.tolist()) & set(originals.tolist())
    assert set(zip(copies.tolist(), originals.tolist())) <= set(pairs)
    lonely = {j for j, i in pairs if all(k in set(copies.tolist()) for l, k in pairs if l == j)}
    assert {j for j, _ in pairs} - set(copies.tolist()) == lonely


def test_the_words_of_a_template_do_not_count():
    class Rows(list):
        first = 0

    template = "you are given a long and very polite message of a customer and you shall answer it in one word "
    chunk = Rows(range(200))
    chunk.prompts = [template + " ".join(f"{w}{i}" for w in "abcdefgh") for i in range(200)]
    chunk.answers = [""] * 200
    chunk.words = [text.split() for text in chunk.prompts], [[]] * 200
    check = near.NearDuplicates()
    check.see(chunk)
    [kept] = check._signatures
    assert len(near.similar_pairs(kept, 0.5)[0]) == 0
    hashes, owner = near.shingles(chunk.words[0])
    assert len(near.similar_pairs(near.signatures(hashes, np.bincount(owner)), 0.5)[0]) > 0


@given(st.lists(st.integers(0, 5), min_size=1))
def test_first_of(values):
    assert first_of(np.array(values)).tolist() == [values.index(v) for v in values]


def test_cramers_v():
    from scipy.stats.contingency import association

    assert cramers_v({("a", 0): 50, ("b", 1): 50}) == 1.0
    assert cramers_v({(a, b): 50 for a in "ab" for b in (0, 1)}) == 0.0
    table = np.array([[90, 10], [30, 70]]) * 100
    pairs = {(i, j): int(table[i, j]) for i in range(2) for j in range(2)}
    assert abs(cramers_v(pairs) - association(table, method="cramer")) < 1e-3
