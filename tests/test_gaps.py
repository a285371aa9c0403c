"""Gaps between groups, groups that were not trained on, and answers that depend on a group."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from jaxtune.curate.balance import independence
from jaxtune.evaluate import statistics
from jaxtune.evaluate.comparison import Column, gap
from jaxtune.evaluate.evaluation import absent_groups
from jaxtune.report.evaluation import gaps


def column(**values):
    values = {who: np.asarray(v, float) for who, v in values.items()}
    return Column("accuracy", 1, True, statistics.mean, values, np.arange(len(next(iter(values.values())))))


def test_a_gap_and_its_change():
    groups = ["a"] * 100 + ["b"] * 100 + ["rare"] * 3
    base = [1] * 90 + [0] * 10 + [1] * 50 + [0] * 50 + [0] * 3
    tuned = [1] * 95 + [0] * 5 + [1] * 90 + [0] * 10 + [0] * 3
    found = gap(column(base=base, tuned=tuned), groups)
    assert (found["base"]["value"], found["base"]["highest"], found["base"]["lowest"]) == (pytest.approx(0.4), "a", "b")
    assert found["base"]["low"] < 0.4 < found["base"]["high"] and found["base"]["p"] < 0.01
    assert found["tuned"]["value"] == pytest.approx(0.05) and found["tuned"]["p"] > 0.05
    # The spread of a difference of two independent shares, sqrt(.9 .1 / 100 + .5 .5 / 100).
    spread = (found["base"]["high"] - found["base"]["low"]) / (2 * 1.96)
    assert spread == pytest.approx(0.0583, rel=0.1)
    assert found["difference"]["value"] == pytest.approx(-0.35) and found["difference"]["high"] < 0
    assert gap(column(base=[1, 0], tuned=[1, 0]), ["a", "b"]) == {}


def test_a_gap_is_told():
    part = {
        "metrics": {"exact_match": {"label": "exact match", "share": True, "better": 1}},
        "groups": {"column": "lang", "absent_from_training": ["fr"], "gaps": {}},
    }
    groups = ["en"] * 50 + ["fr"] * 50
    part["groups"]["gaps"]["exact_match"] = gap(column(model=[1] * 75 + [0] * 25), groups)
    told = gaps(part)
    assert told[0] == "No training row is of lang fr."
    assert (
        told[1].startswith("Gap of exact match between groups: model 50.0 points [")
        and "highest en, lowest fr" in told[1]
    )


@pytest.mark.slow
def test_chance_gaps_are_rarely_significant():
    rng = np.random.default_rng(0)
    groups = ["a"] * 40 + ["b"] * 60 + ["c"] * 50
    ps = [gap(column(model=rng.random(150) < 0.7), groups, resamples=200)["model"]["p"] for _ in range(300)]
    assert np.mean(np.array(ps) < 0.05) < 0.08


def test_groups_that_no_training_row_is_of(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"lang": "en", "text": "a"}\n{"lang": null, "text": "b"}\n')
    cfg = SimpleNamespace(data=SimpleNamespace(train=(str(file),)))
    assert absent_groups(cfg, "lang", ["en", "fr", "(none)", "fr"]) == ["fr"]
    assert absent_groups(cfg, "domain", ["x"]) == [] and absent_groups(None, "lang", ["x"]) == []
    file.unlink()
    assert absent_groups(cfg, "lang", ["x"]) == []


def test_independence_is_scipys():
    from scipy.stats import chi2_contingency

    table = np.array([[30, 10, 5], [12, 25, 9]])
    pairs = Counter({(a, b): int(table[a, b]) for a in range(2) for b in range(3)})
    assert independence(pairs) == pytest.approx(chi2_contingency(table, correction=False).pvalue)
    assert independence(Counter({("a", 1): 5})) == 1.0
