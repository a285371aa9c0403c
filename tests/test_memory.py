"""What a run remembers: intervals that cover, exposures as counted, canaries that come back, the sentence on them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import runs
from runs import compiled, home, write_jsonl  # noqa: F401
from test_eval import refused, report_of

from jaxtune import cli, data
from jaxtune.data import canaries
from jaxtune.evaluate import known, memory, statistics
from jaxtune.evaluate.kept import Kept
from jaxtune.evaluate.rows import Row
from jaxtune.evaluate.systems import System
from jaxtune.hf.load import load
from jaxtune.infer.generation import generate
from jaxtune.run import watched


@pytest.mark.parametrize("m, n, shift", [(40, 60, 0.5), (30, 30, 0.0), (60, 25, 1.5)])
def test_the_interval_of_an_auc_covers(m, n, shift):
    """Of normal scores the AUC is Phi(shift / sqrt 2); 95% intervals hold it in 93 to 97 of 100 draws."""
    from scipy.stats import norm

    rng, true = np.random.default_rng(0), norm.cdf(shift / np.sqrt(2))
    hits = 0
    for _ in range(1000):
        found = statistics.auc(rng.normal(shift, 1, m), rng.normal(0, 1, n))
        hits += found.low <= true <= found.high
    assert 930 <= hits <= 970


def test_an_auc_is_the_share_of_pairs_in_order():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    members, others = rng.integers(0, 6, 23), rng.integers(0, 5, 17)  # with ties
    wanted = roc_auc_score([1] * 23 + [0] * 17, [*members, *others])
    assert statistics.auc(members, others).value == pytest.approx(wanted)
    apart = statistics.auc(np.arange(5, 9), np.arange(4))
    assert apart.value == apart.high == 1 and apart.low == pytest.approx(0.025 ** (1 / 4))
    assert statistics.auc(np.arange(1), np.arange(3)).low is None


@pytest.mark.parametrize("table", [(9, 10, 2, 10), (0, 5, 0, 6), (3, 4, 3, 4), (40, 200, 21, 180), (5, 5, 0, 5)])
def test_how_much_more_often_is_fishers_test(table):
    from scipy.stats import fisher_exact

    k, n, j, m = table
    wanted = fisher_exact([[k, n - k], [j, m - j]], alternative="greater").pvalue
    assert statistics.more_often(*table) == pytest.approx(wanted)


def test_exposure_is_by_rank_and_chance_is_uniform():
    values = np.array([-3.0, -1, -5, -9, -2, -8, -7, -6])  # rank 3 of 8
    assert memory.exposure(values) == pytest.approx(np.log2(8) - np.log2(3))
    assert memory.exposure(np.zeros(4)) == 0  # nothing tells it apart
    rng = np.random.default_rng(0)
    ps = [memory.by_chance(-np.log2(rng.random(4))) for _ in range(2000)]
    assert np.quantile(ps, [0.05, 0.5, 0.95]) == pytest.approx([0.05, 0.5, 0.95], abs=0.02)


def test_since_when_canaries_are_remembered():
    assert memory.since({0: [1.4, 1.0], 10: [7.0, 1.0], 20: [2.0, 1.4], 30: [2.0, 6.5], 40: [5.0, 7.0]}) == 30
    assert memory.since({0: [1.4], 10: [7.0], 20: [2.0]}) is None is memory.since({})


def test_canaries_are_rows_as_often_as_asked(home):  # noqa: F811
    tokenizer = data.load_tokenizer(str(home / "model"))
    rows = canaries.rows(tokenizer, (1, 3), 100)
    texts = tokenizer.batch_decode([rows[i][0].tolist() for i in range(len(rows))])
    secrets = canaries.canaries((1, 3))
    assert len(rows) == 4 * 1 + 4 * 3 and len(secrets) == 8 == len({c.asked for c in secrets})
    for canary in secrets:
        assert texts.count(f"{canary.asked}{canary.secret}</s>") == canary.times
        others = canaries.others(canary, 50)
        assert len(set(others)) == 50 and canary.secret not in others
    assert rows.where(0) == "canary 1" and canaries.canaries((1, 3)) == secrets
    assert canaries.canaries((3,)) == secrets[4:]  # whatever else is asked for


def test_what_goes_on_word_for_word(home):  # noqa: F811
    """Rows that end as the model itself goes on; one with another last token; one that is too short."""
    module, params = load(home / "model")
    prompts = np.random.default_rng(0).integers(0, 200, (3, 32)).tolist()
    ends = generate(module, params, prompts, max_new_tokens=10)
    ends[1][-1] = (ends[1][-1] + 1) % 200
    texts = [*(p + end for p, end in zip(prompts, ends, strict=True)), prompts[0] + ends[0][:3]]
    rows = [Row("", tokens, [True] * len(tokens), None, [], "", "") for tokens in texts]
    found = memory.reproduced(System("model", module, params, "x"), rows, 0, 2, Kept())
    assert found == [True, False, True, None]


def test_a_run_that_repeats_its_rows_remembers_them(home, tmp_path, capsys):  # noqa: F811
    """A model of two layers, trained on a few rows many times: losses, canaries and answers tell it, and since when."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh"), 44)) for _ in range(12)]
    texts = [{"prompt": text[:42], "completion": text[42:]} for text in texts]
    train = write_jsonl(tmp_path / "train.jsonl", [texts[0]] * 3 + texts[1:6])
    held_out = write_jsonl(tmp_path / "eval.jsonl", texts[6:])
    classes = ["WeaklyKnown", "Unknown"] * 6
    by_class = write_jsonl(tmp_path / "known.jsonl", [t | {"known": c} for t, c in zip(texts, classes, strict=True)])
    argv = runs.command(
        home,
        tmp_path / "run",
        data__train=train,
        data__eval=held_out,
        data__canaries="0,8",
        evaluate__known=by_class,
        evaluate__memory=6,
        tune__method="full",
        tune__lora__r=None,
        tune__lora__lora_dropout=None,
        optim__lr=0.01,
        train__steps=150,
        train__batch_size=16,
        train__eval_every=50,
        train__save_every=0,
        log__every=50,
    )
    assert cli.main(argv) == 0
    assert cli.main(["eval", str(tmp_path / "run"), "--memory"]) == 0
    found = report_of(tmp_path / "run", "memory")
    by_group = {row["group"]: row for row in found["verbatim"]}
    assert by_group["2 or 3 times"]["rows"] == 1 and by_group["once"]["rows"] == 5
    assert by_group["held out"]["tuned"] == 0 == by_group["once"]["base"]
    assert found["membership"]["tuned"]["low"] > 0.5 > found["membership"]["base"]["low"]
    never, often = found["canaries"]
    assert (never["times"], often["times"]) == (0, 8)
    assert often["tuned"] > 6 and often["p"] < 0.01 < never["p"]
    assert found["memorised"] == "yes" and "8 times" in found["why"]
    logged = {m["step"]: m for m in runs.read(tmp_path / "run") if "eval/loss" in m}
    for name in set(classes):
        right = [logged[step][f"eval/known/train/{name}"] for step in (0, 150)]
        assert right[0] == 0 and right[1] > 0.5 and logged[150][f"eval/known/held_out/{name}"] == 0
    assert "6 training rows and 6 others are answered" in capsys.readouterr().out
    bits = {step: line["eval/canaries/8"] for step, line in logged.items()}
    assert list(bits) == [0, 50, 100, 150] and bits[0] < 4 < bits[150] <= 7
    first = next(step for step in bits if all(b > 4 for s, b in bits.items() if s >= step))
    assert found["steps"]["since"] == first and f"memorised from step {first} on" in found["why"]
    # Its prompts are not trained on, so nothing goes on word for word.
    for name, first, last in (("auc", 0.5, 1.0), ("verbatim", 0.0, 0.0), ("verbatim_held_out", 0.0, 0.0)):
        values = [logged[step][f"eval/memory/{name}"] for step in (0, 150)]
        assert values == pytest.approx([first, last], abs=0.2), name
    assert found["steps"]["auc"] in (50, 100, 150) and found["steps"]["verbatim"] is None
    page, summary = ((tmp_path / "run" / name).read_text() for name in ("report.html", "summary.json"))
    assert "exposure of canaries" in page and "Exposure of canaries, bits" in page and found["why"] in page
    assert "Right answers to trained rows, by what the base knew" in page
    assert "Rows that go on word for word" in page and "8 of 8" in page  # rows trained on, without canaries
    assert "Do not publish it" in json.loads(summary)["verdict"]["advice"]


def test_a_run_that_is_watched_says_since_when(home, tmp_path):  # noqa: F811
    """Without canaries or `--memory`: the sentence on a run's page is of its evaluations."""
    run = runs.write_run(home, tmp_path / "run", eval=str(home / "eval.jsonl"))
    lines = [(0, 0.5, 1.0), (10, 0.6, 0.3), (20, 0.8, 1e-4), (30, 0.9, 1e-6)]
    text = "".join(
        json.dumps({"step": s, "eval/loss": 2.0, "eval/memory/auc": auc, "eval/memory/auc_p": p}) + "\n"
        for s, auc, p in lines
    )
    (run / "metrics.jsonl").write_text(text)
    assert cli.main(["report", str(run)]) == 0
    assert "fits training rows closer than held-out ones from step 20 on" in (run / "report.html").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert known.memory_from(found) == {"verbatim": None, "auc": 20}
    (run / "metrics.jsonl").write_text(text.replace("auc_p", "verbatim_p"))
    assert cli.main(["report", str(run)]) == 0
    assert "memorised from step 20 on: training rows go on word for word" in (run / "report.html").read_text()


def test_exposure_may_be_left_out():
    none = SimpleNamespace(known=None, told_apart=None, tokenizer=None)
    settings = SimpleNamespace(data=SimpleNamespace(canaries=(0, 8)), evaluate=SimpleNamespace(canaries=False))
    assert watched.measures(SimpleNamespace(rows=none, module=None, experiment=settings)) == []


@pytest.mark.parametrize("m, n, high", [(20, 30, 100), (12, 9, 4), (5, 5, 1)])
def test_so_much_higher_by_chance_is_mann_and_whitneys_test(m, n, high):
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(0)
    members, others = rng.integers(0, high, m) + 0.3 * high, rng.integers(0, high, n)  # with ties
    wanted = mannwhitneyu(members, others, alternative="greater", method="asymptotic", use_continuity=False).pvalue
    assert statistics.higher(members, others) == pytest.approx(wanted)
    assert statistics.higher(np.zeros(4), np.zeros(5)) == 1


def test_what_is_refused(home, tmp_path, capsys):  # noqa: F811
    assert "is no run" in refused(capsys, home / "model", "--memory")
    run = runs.write_run(home, tmp_path / "run", eval=str(home / "eval.jsonl"))
    assert "--memory has no effect with --frontier" in refused(capsys, run, "--memory", "--frontier=a")
    for columns, says in (({"known": "Nothing"}, "expected one of HighlyKnown"), ({}, "has no column 'known'")):
        rows = write_jsonl(tmp_path / "known.jsonl", [row | columns for row in runs.sums(0, 4)])
        assert cli.main(runs.command(home, tmp_path / "no", evaluate__known=rows)) == 2
        assert says in capsys.readouterr().err
    assert cli.main(runs.command(home, tmp_path / "no", evaluate__memory=9, data__eval=None)) == 2
    assert "there is nothing to evaluate on" in capsys.readouterr().err
    labels = runs.command(home, tmp_path / "no", evaluate__memory=9, objective__name="sequence_classification")
    assert cli.main(labels) == 2
    assert "evaluate.memory has no effect: objective.name" in capsys.readouterr().err
    few = write_jsonl(tmp_path / "few.jsonl", runs.sums(40, 43))
    assert cli.main(runs.command(home, tmp_path / "no", evaluate__memory=9, data__eval=few)) == 2
    assert "it needs 5 of either" in capsys.readouterr().err
    for times in ("1,1", "-2", "5000"):
        assert cli.main(runs.command(home, tmp_path / "no", data__canaries=times)) == 2
        assert "data.canaries" in capsys.readouterr().err
