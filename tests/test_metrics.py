"""Scores of answers and labels against other implementations and closed forms; intervals and tests against scipy."""

import json
import math
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from jaxtune.errors import UserError
from jaxtune.evaluate import labels, statistics
from jaxtune.evaluate.metrics import METRICS, choose, final_number, load_scorer, schema_metric


def score(name, prediction, reference):
    return METRICS[name].score(prediction, reference)


# ---------------------------------------------------------------------------------------------------------------- text


@given(st.lists(st.sampled_from("bcd"), max_size=8), st.lists(st.sampled_from("bcd"), max_size=8))
def test_token_f1_by_the_definition(a, b):
    """Words in common, each once for each pair of it; precision and recall; SQuAD's rule where a side is empty."""
    left, common = list(b), 0
    for word in a:
        if word in left:
            left.remove(word)
            common += 1
    if not a or not b:
        want = float(a == b)
    elif not common:
        want = 0.0
    else:
        precision, recall = common / len(a), common / len(b)
        want = 2 * precision * recall / (precision + recall)
    assert score("token_f1", " ".join(a), " ".join(b)) == pytest.approx(want)


def test_token_f1_leaves_out_what_squad_does():
    assert score("token_f1", "The cat, a DOG!", "cat dog") == 1
    assert score("token_f1", "there", "the re") == 0
    assert score("token_f1", "the", "a") == 1


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_rouge_l_by_the_definition(a, b):
    """The longest common subsequence by its recurrence."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    both = table[-1, -1]
    want = 2 * both / (len(a) + len(b)) if both else 0.0
    assert score("rouge_l", " ".join(a), " ".join(b)) == pytest.approx(want)


def test_rouge_l_is_googles_on_english_and_reads_other_scripts():
    from rouge_score.rouge_scorer import RougeScorer

    a, b = "The cat's 3 kittens (all grey) sat down.", "the cats: 3 grey kittens sat, all of them, down!"
    want = RougeScorer(["rougeL"]).score(b, a)["rougeL"].fmeasure
    assert score("rouge_l", a, b) == pytest.approx(want) and 0 < want < 1
    assert score("rouge_l", "Здравствуй, мир", "здравствуй мир") == 1.0
    assert score("rouge_l", "ሰላም ዓለም", "ሰላም") == pytest.approx(2 / 3)


def test_exact_match_minds_everything_but_the_white_space_around():
    assert score("exact_match", " yes\n", "yes") == 1
    assert score("exact_match", "Yes", "yes") == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "want"),
    [
        ("6 * 7 = 42\n#### 42", "so it is\n#### 42", 1),
        ("The answer is 42.", "#### 42", 1),
        ("#### 1,042.50", "#### 1042.5", 1),
        ("#### $18 a day for 5 days", "#### 18", 1),
        ("#### -3", "#### 3", 0),
        ("first 42, then 43", "#### 42", 0),
        ("none", "#### 42", 0),
        ("#### ", "#### 42", 0),
        ("12", "no number", None),
        ("1e9999999999 x 7", "7", 1),
    ],
)
def test_numbers(prediction, reference, want):
    assert score("numeric", prediction, reference) == want


def test_numbers_of_gsm8k(assets):
    """The pattern that its authors publish."""
    for line in (assets / "data" / "gsm8k" / "test.jsonl").read_text().splitlines():
        answer = json.loads(line)["answer"]
        published = re.search(r"#### (\-?[0-9\.\,]+)", answer)[1].replace(",", "")
        assert final_number(answer) == float(published)


# ---------------------------------------------------------------------------------------------------------------- JSON

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
)


@given(JSON, JSON)
def test_json_exact_is_equality_of_what_is_written(a, b):
    def written(value):
        return json.dumps(value, sort_keys=True)

    got = score("json_exact", json.dumps(a, indent=1), json.dumps(b))
    assert got == (float(written(a) == written(b)) if isinstance(b, dict | list) else None)


@pytest.mark.parametrize(
    ("prediction", "valid"),
    [('{"a": 1}', 1), (' {"a": NaN}', 0), ('{"a": 1} and more', 0), ("[1]", 0), ("{'a': 1}", 0), ("[" * 10**6, 0)],
)
def test_json_validity(prediction, valid):
    assert score("json_valid", prediction, '{"a": 2}') == valid
    assert score("json_valid", prediction, "plain text") is None


@pytest.mark.parametrize(
    ("prediction", "share"),
    [
        ('{"a": 1, "b": {"c": "x", "d": [1, 2]}}', 1),
        ('{"a": 1}', 1 / 3),
        ('{"a": true, "b": {"c": "x", "d": [1, 2]}}', 2 / 3),  # Python: True == 1
        ('{"a": 1, "b": {"c": "x", "d": [2, 1]}, "e": 0}', 2 / 4),
        ('{"a": 1, "b": 7}', 1 / 4),
        ("nothing", 0),
    ],
)
def test_fields(prediction, share):
    assert score("json_fields", prediction, '{"a": 1, "b": {"c": "x", "d": [1, 2]}}') == pytest.approx(share)


def test_schema(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text('{"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}, "required": ["n"]}')
    conforms = schema_metric(file).score
    got = [conforms(text, "") for text in ('{"n": 3}', '{"n": -1}', '{"n": "3"}', "{}", '{"n": 3', "null")]
    assert got == [1, 0, 0, 0, 0, 0]
    file.write_text('{"type": "null"}')
    assert [schema_metric(file).score(text, "") for text in ("null", "0", "nul")] == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"type": "objekt"}', "$.type"),
        ('{"properties": {"a": {"minimum": "x"}}}', "$.properties.a.minimum"),
        ("{", "not valid JSON"),
        ("[1]", "not a JSON schema"),
        (None, "no such file"),
    ],
)
def test_schemas_that_are_wrong(tmp_path, text, said):
    file = tmp_path / "schema.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        schema_metric(file)


def test_a_schema_never_reaches_for_the_network(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text('{"$ref": "https://example.com/other.json"}')
    with pytest.raises(UserError, match=r"example\.com/other\.json"):
        schema_metric(file).score("{}", "")


# ------------------------------------------------------------------------------------------------------------ choosing


def test_the_metrics_fit_the_answers():
    text = {"exact_match", "token_f1", "rouge_l"}
    assert set(choose(None, ["a dog", "a cat"])) == text
    assert set(choose(None, ["so\n#### 3", "4"])) == text | {"numeric"}
    assert set(choose(None, ["in 3 days", "4"])) == text
    assert set(choose(None, ['{"a": 1}', "{}"])) == text | {"json_valid", "json_exact", "json_fields"}
    assert set(choose(None, ["[1]", "[]"])) == text | {"json_valid", "json_exact"}
    assert list(choose(["rouge_l"], ["x"])) == ["rouge_l"]
    with pytest.raises(UserError, match="Did you mean 'rouge_l'"):
        choose(["rougel"], ["x"])
    with pytest.raises(UserError, match="applies to no row"):
        choose(["numeric"], ["x", "y"])


def test_a_scorer_of_ones_own(tmp_path):
    file = tmp_path / "tone.py"
    file.write_text(
        "def polite(prediction, reference):\n    return 'please' in prediction if reference else None\n"
        "def broken(prediction, reference):\n    return 1 / 0\n"
        "def wordy(prediction, reference):\n    return 'good'\n"
        "def narrow(prediction):\n    return 1\n"
    )
    name, metric = load_scorer(f"{file}:polite")
    assert name == "polite"
    assert [metric.score(*pair) for pair in (("please go", "x"), ("go", "x"), ("go", ""))] == [1.0, 0.0, None]
    for function, said in [
        ("broken", "ZeroDivisionError"),
        ("wordy", "'good'"),
        ("narrow", r"\(prediction, reference\)"),
        ("polit", "Did you mean 'polite'"),
    ]:
        with pytest.raises(UserError, match=said):
            load_scorer(f"{file}:{function}")[1].score("a", "b")
    for given_, said in [("tone.py", "FILE.py:FUNCTION"), (f"{tmp_path}/no.py:f", "no such file")]:
        with pytest.raises(UserError, match=said):
            load_scorer(given_)


# -------------------------------------------------------------------------------------------------------------- labels

LABELS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=1, max_size=40)


@given(LABELS)
def test_label_scores_are_scikit_learns(pairs):
    oracle = pytest.importorskip("sklearn.metrics")
    true, predicted = zip(*pairs)
    assert labels.accuracy(true, predicted) == pytest.approx(oracle.accuracy_score(true, predicted))
    want = oracle.f1_score(true, predicted, average="macro", zero_division=0)
    assert labels.macro_f1(true, predicted) == pytest.approx(want)
    got = labels.confusion(true, predicted, list("abcd"))
    np.testing.assert_array_equal(got, oracle.confusion_matrix(true, predicted, labels=list("abcd")))


def test_a_label_outside_of_the_table():
    with pytest.raises(ValueError, match="'c'"):
        labels.confusion("ab", "ac", "ab")


def test_calibration_in_closed_form():
    assert labels.ece([1.0, 1.0], [True, True]) == 0
    assert labels.ece([0.9] * 10, [True] * 7 + [False] * 3) == pytest.approx(0.2)
    assert labels.ece([0.95] * 4 + [0.25] * 4, [True] * 4 + [False] * 4) == pytest.approx((0.05 + 0.25) / 2)
    # 0.1 is the upper edge of the first bin: its gap and that of 0.05 cancel there, and would not in two bins.
    assert labels.ece([0.1, 0.05], [False, False]) == pytest.approx(0.075)
    assert labels.ece([0.0, 0.1], [True, False], bins=10) == pytest.approx(0.45)


def test_calibration_by_the_definition():
    rng = random.Random(0)
    confidence = [rng.random() for _ in range(200)]
    right = [rng.random() < c**2 for c in confidence]
    want = 0.0
    for m in range(15):
        inside = [i for i, c in enumerate(confidence) if m / 15 < c <= (m + 1) / 15]
        if inside:
            gap = sum(right[i] for i in inside) / len(inside) - sum(confidence[i] for i in inside) / len(inside)
            want += len(inside) / 200 * abs(gap)
    assert labels.ece(confidence, right, bins=15) == pytest.approx(want)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_intervals_and_p_values_are_scipys():
    """Both are Monte Carlo: they agree within what the draws leave open."""
    import scipy.stats

    rng = np.random.default_rng(0)
    base = rng.normal(size=60)
    tuned = base + rng.normal(0.1, 0.5, 60)
    ours = statistics.paired(base, tuned, resamples=5000)
    draw = {"n_resamples": 5000, "method": "percentile", "rng": np.random.default_rng(1)}
    low, high = scipy.stats.bootstrap((tuned - base,), np.mean, **draw).confidence_interval
    width = high - low
    assert ours.difference.value == pytest.approx((tuned - base).mean())
    assert abs(ours.difference.low - low) < 0.05 * width and abs(ours.difference.high - high) < 0.05 * width
    low, high = scipy.stats.bootstrap((base,), np.mean, **draw).confidence_interval
    assert abs(ours.base.low - low) < 0.05 * (high - low) and abs(ours.base.high - high) < 0.05 * (high - low)
    theirs = scipy.stats.permutation_test(
        (tuned, base), lambda a, b: a.mean() - b.mean(), permutation_type="samples", n_resamples=5000, rng=2
    )
    assert 0.01 < theirs.pvalue < 0.2
    assert abs(ours.p - theirs.pvalue) < 4 * math.sqrt(theirs.pvalue / 5000)


def test_a_loss_is_weighted_by_its_tokens():
    values = np.array([[2.0, 1.0], [3.0, 3.0]])
    assert statistics.mean(values[None]) == [5 / 4]
    assert statistics.interval(values, resamples=200).low == 1.0


def test_equal_models_are_found_different_as_often_as_the_level_says():
    rng = np.random.default_rng(3)
    ps = [statistics.paired(*rng.normal(size=(2, 20)), resamples=99, seed=i).p for i in range(200)]
    assert 0.01 < np.mean(np.array(ps) <= 0.05) < 0.11
    assert 0.4 < np.mean(ps) < 0.6


@pytest.mark.parametrize("n", [2, 10, 60])
def test_shares_of_none_and_all_have_the_exact_binomial_interval(n):
    import scipy.stats

    for right in (0, n):
        want = scipy.stats.binomtest(right, n).proportion_ci(0.95, method="exact")
        got = statistics.exact_at_the_edge(statistics.interval(np.full(n, right / n)), n)
        assert got == pytest.approx((right / n, want.low, want.high))
    inner = statistics.Interval(0.5, 0.4, 0.6)
    assert statistics.exact_at_the_edge(inner, n) == inner


def test_a_difference_of_which_a_bootstrap_sees_no_other_has_newcombes_interval():
    def difference(base, tuned):
        base, tuned = np.array(base, float), np.array(tuned, float)
        result = statistics.paired(base, tuned)
        return statistics.paired_at_the_edge(result, base, tuned)

    z2 = norm.ppf(0.975) ** 2
    for n in (2, 10, 300):  # Wilson's interval of 0 of n ends at z2 / (n + z2); pairs that are all alike say no more
        reach = math.sqrt(2) * z2 / (n + z2)
        assert difference([0] * n, [1] * n) == pytest.approx((1, max(-1, 1 - reach), 1))
        assert difference([1] * n, [0] * n) == pytest.approx((-1, -1, min(1, reach - 1)))
        alone = z2 / (n + z2)
        assert difference([1] * n, [1] * n) == pytest.approx((0, -alone, alone))
    mixed = np.arange(40) % 2
    same = difference(mixed, mixed)
    assert same.value == 0 and -0.2 < same.low < 0 < same.high < 0.2
    assert same.low == pytest.approx(-same.high)
    ordinary = statistics.paired(np.zeros(40), mixed.astype(float))
    assert statistics.paired_at_the_edge(ordinary, np.zeros(40), mixed) is ordinary.difference
    grades = np.full(40, 0.5)  # neither right nor wrong
    assert difference(grades, grades) == (0, 0, 0)


@pytest.mark.parametrize("table", [(20, 12, 2, 16), (14, 5, 0, 22), (0, 3, 0, 9), (40, 1, 0, 0)])
def test_newcombes_interval_by_the_paper(table):
    """Method 10, in the paper's letters: pairs that are right twice, first only, second only, never."""
    a, b, c, d = table
    n = sum(table)
    first, second = np.repeat([1, 1, 0, 0], table), np.repeat([1, 0, 1, 0], table)
    flat = statistics.Interval((b - c) / n, 0.0, 0.0)  # as if no resample differed
    shares = statistics.Interval((a + c) / n, None, None), statistics.Interval((a + b) / n, None, None)
    found = statistics.paired_at_the_edge(statistics.Paired(*shares, flat, None), second, first)
    (l2, u2), (l3, u3) = (tuple(binomtest(k, n).proportion_ci(method="wilson")) for k in (a + b, a + c))
    p2, p3, theta, product = (a + b) / n, (a + c) / n, (b - c) / n, a * d - b * c
    root = math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
    phi = 0 if not root else (product if product < 0 else max(product - n / 2, 0)) / root
    delta = math.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u3 - p3) + (u3 - p3) ** 2)
    epsilon = math.sqrt((u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p3 - l3) + (p3 - l3) ** 2)
    assert found == pytest.approx((theta, theta - delta, min(1, theta + epsilon)))


def test_one_row_has_no_interval_and_no_verdict():
    found = statistics.paired(np.array([0.0]), np.array([1.0]))
    assert found.difference == (1.0, None, None) and found.p is None
    assert statistics.verdict(1.0, found.p, 1) == "no evidence"


def test_verdicts():
    assert [statistics.verdict(d, p, b) for d, p, b in [(-1, 0.01, -1), (1, 0.01, -1), (1, 0.04, 1), (1, 0.06, 1)]] == [
        "better",
        "worse",
        "better",
        "no evidence",
    ]


@given(st.lists(st.floats(0, 0.06) | st.floats(0, 1), min_size=1, max_size=8))
def test_holm_refuses_what_the_step_down_procedure_refuses(ps):
    got = statistics.holm([*ps, None])
    assert got[-1] is None
    refused, order = set(), sorted(range(len(ps)), key=lambda i: ps[i])
    for rank, i in enumerate(order):  # the procedure as Holm writes it, at 5%
        if ps[i] * (len(ps) - rank) > 0.05:
            break
        refused.add(i)
    assert {i for i, p in enumerate(got[:-1]) if p <= 0.05} == refused


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])


def test_calibration_errors_by_chance():
    """Of answers that are right by the toss of a coin: the mean distance of their share from a half."""
    assert labels.ece_by_chance([0.5]) == pytest.approx(0.5)
    assert labels.ece_by_chance([0.5] * 2) == pytest.approx(0.25, abs=0.03)
    assert labels.ece_by_chance([1.0] * 9) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rows, gap", [(1000, 0.1), (300, 0.1), (300, 0.03)])
def test_the_interval_of_a_calibration_error_covers(rows, gap):
    """Of answers that are right so much less often than they say: 95% intervals hold that error as often."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        confidence = rng.uniform(0.5, 1, rows)
        found = labels.ece_interval(confidence, rng.random(rows) < confidence - gap)
        hits += found.low <= gap <= found.high
    assert 930 <= hits <= 970
