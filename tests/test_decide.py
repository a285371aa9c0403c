"""Prompt or fine-tune: prices, examples, the race, learning curves, costs and the decision; and whole decisions."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtune import cli, tiny
from jaxtune.data.formats import Conversation, Document
from jaxtune.decide import examples, learning, race, verdict
from jaxtune.decide.candidates import NEIGHBOURS, PROMPT, TUNED, Outcome
from jaxtune.decide.price import Price, parse_price
from jaxtune.errors import UserError
from jaxtune.evaluate import asks
from jaxtune.evaluate.asks import Ask, Instruction

ORDERS = tiny.ASSETS / "orders.jsonl"
QUESTION = Path(__file__).parents[1] / "examples/prompts/question.txt"

# ------------------------------------------------------------------------------------------------------------- prices


@pytest.mark.parametrize(
    ("text", "cost"),
    [
        ("0.2 USD per 1M tokens", 0.2 * 1.2),
        ("0.5 USD per 1M input tokens, 1.5 USD per 1M output tokens", 0.5 + 1.5 * 0.2),
        ("2 eur/1k output tokens, 1 EUR/1k input tokens", 1000 * (1 + 2 * 0.2)),
        ("3.6 $ per hour", 3.6 / 3600 * 7),
    ],
)
def test_prices(text, cost):
    assert parse_price(text).of(1e6, 0.2e6, 7.0) == pytest.approx(cost)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.2", "a price needs a unit"),
        ("0.2 USD", "expected '0.2 USD per 1M tokens'"),
        ("1 USD per tokens", "expected '0.2 USD per 1M tokens'"),
        ("1 USD per 0 tokens", "expected '0.2 USD per 1M tokens'"),
        ("1 USD per . tokens", "expected '0.2 USD per 1M tokens'"),
        ("1 USD per 1M input tokens", "expected '0.2 USD per 1M tokens'"),
        ("1 USD per 1M input tokens, 2 EUR per 1M output tokens", "one unit of money"),
    ],
)
def test_a_price_needs_a_unit(text, says):
    with pytest.raises(UserError, match=says):
        parse_price(text)


# ----------------------------------------------------------------------------------------------------------- examples


def test_bm25_is_lucenes():
    texts = ["the red kettle is red", "a blue kettle", "one lamp and the other lamp", "nothing of this"]
    split = [examples.words(text) for text in texts]
    mean, n = np.mean([len(words) for words in split]), len(texts)

    def score(query, words):
        total = 0.0
        for word in examples.words(query):
            df, tf = sum(word in other for other in split), words.count(word)
            weight = math.log(1 + (n - df + 0.5) / (df + 0.5))
            total += weight * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(words) / mean))
        return total

    search = examples.bm25(texts)
    for query in ("red kettle", "the lamp", "Kettle!", "unknown"):
        found = dict(search(query, 4))
        assert [found[i] for i in range(4)] == pytest.approx([score(query, words) for words in split], abs=1e-5)
    assert search("red kettle", 1)[0][0] == 0


def test_examples_of_each_label_in_turn():
    labels = ["a", "a", "a", "b", "a", "c", "b"]
    assert examples.balanced(labels, 5) == [0, 3, 5, 1, 6]
    assert examples.vote([(0, 1.0), (3, 0.9), (6, 0.8)], labels) == "b"


# ------------------------------------------------------------------------------------------------- rows under prompts


def ask(prompt="Two mugs?", answer="Yes."):
    return Ask("rows.jsonl:1", {}, 1, prompt, answer, Document(((prompt + "\n", False), (answer, True))))


def test_a_row_under_an_instruction_and_after_examples():
    shot = ask("One lamp?", "No.")
    plain = asks.put(ask(), Instruction("i", "Answer."), [shot])
    assert [text for text, _ in plain.pieces] == ["Answer.\n\nOne lamp? No.\n\nTwo mugs?", " Yes."]
    around = asks.put(ask(), Instruction("i", "Q: {input}\nA:"), [shot])
    assert [text for text, _ in around.pieces] == ["Q: One lamp?\nA: No.\n\nQ: Two mugs?\nA:", " Yes."]
    assert asks.put(ask("Two mugs?\n"), Instruction()).pieces == (("Two mugs?\n", False), ("Yes.", True))


def test_a_conversation_under_an_instruction_and_after_examples():
    def turns(asked, answer, system=()):
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return Ask("a", {}, 1, asked, answer, Conversation([*system, *messages]))

    own = turns("Two mugs?", "Yes.", [{"role": "system", "content": "A shop."}])
    found = asks.put(own, Instruction("i", "Answer."), [turns("One lamp?", "No.")])
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert found.messages[0]["content"] == "Answer.\n\nA shop."
    assert found.untrained == {2}
    assert asks.put(own, Instruction("i", "Q: {input}")).messages[1]["content"] == "Q: Two mugs?"


def test_held_out_rows_are_in_no_pool():
    from jaxtune.decide.run import split

    rows = [ask()._replace(digest=n % 40 << 32, answer="x") for n in range(80)]  # the upper half is of the prompt
    material = split(rows, None, 0.25, 100)
    assert {a.digest for a in material.held}.isdisjoint(a.digest for a in material.pool)
    assert len(material.held) + len(material.pool) == 80
    assert split(rows, rows[:4], 0.0, 3).lines == ["8 training rows are also held out, and are left out of training"]
    with pytest.raises(UserError, match="needs rows to tune on and rows held out; here are 0 and 2"):
        split(rows[:2], rows[:2], 0.0, 100)


# ----------------------------------------------------------------------------------------------------------- the race


def test_a_race_stops_what_is_behind_and_nothing_else():
    leader = [1.0] * 200
    asked = []

    def measure(start, stop, value=0.0):
        asked.append((start, stop))
        return [value] * (stop - start)

    raced = race.race(measure, 200, leader)
    assert (len(raced.scores), asked) == (50, [(0, 50)]) and "behind after 50 rows" in raced.stopped
    assert race.race(lambda a, b: measure(a, b, 1.0), 200, leader).stopped is None
    assert race.looks(200) == [50, 100, 200] and race.looks(30) == [30]


@pytest.mark.slow
def test_of_candidates_as_good_as_the_leader_few_are_stopped():
    rng = np.random.default_rng(0)
    stopped = 0
    for _ in range(300):
        leader, other = (rng.random((2, 200)) < 0.6).astype(float)
        stopped += race.race(lambda a, b, other=other: other[a:b].tolist(), 200, leader.tolist()).stopped is not None
    assert stopped / 300 < 0.05


# --------------------------------------------------------------------------------------------------------- the curve


def test_a_power_law_is_found():
    rows, held = [100, 400, 1600], 10_000
    errors = [0.8 * (n / 100) ** -0.5 for n in rows]
    scores = np.array([[0.0] * round(e * held) + [1.0] * (held - round(e * held)) for e in errors])
    curve = learning.fit(rows, scores, resamples=200)
    assert curve.b == pytest.approx(0.5, abs=0.01) and curve.holds
    assert curve.score(6400).value == pytest.approx(0.9, abs=0.002)
    assert curve.rows_for(0.9).value == pytest.approx(6400, rel=0.05)
    assert curve.score(6400).low < 0.9 < curve.score(6400).high


def test_scores_that_are_no_power_law_are_not_extrapolated():
    scores = np.array([[0.0] * 16 + [1.0] * 184, [0.0] * 17 + [1.0] * 183, [1.0] * 200])
    assert not learning.fit([250, 1000, 4000], scores, resamples=200).holds
    assert learning.fit([250, 1000], scores[:2]) is None and learning.fit([1, 2, 3], np.ones((3, 9))) is None


@pytest.mark.slow
def test_intervals_of_a_power_law_hold_the_truth():
    rng, rows = np.random.default_rng(0), [100, 400, 1600]
    errors = 2.0 * np.array(rows) ** -0.4
    held = 0
    for seed in range(1000):
        scores = (rng.random((3, 300)) > errors[:, None]).astype(float)
        found = learning.fit(rows, scores, seed=seed, resamples=400).score(6400)
        held += found.low <= 1 - 2.0 * 6400**-0.4 <= found.high
    assert 930 <= held <= 970, held


# ------------------------------------------------------------------------------------------------------- the decision


def outcome(name, side, scores, read=100.0, tokens=0, **more):
    training = {"seconds": 60.0, "tokens": tokens, "trainable": 1, "folder": "runs/a"} if side == TUNED else None
    return Outcome(name, side, name, list(scores), read, 10.0, 0.01, 0.02, training=training, **more)


def shares(right, of=200):
    return [1.0] * right + [0.0] * (of - right)


PRICE = Price("USD", 1e-6, 2e-6)


def test_tuning_wins_and_pays():
    prompt = outcome("4 examples", PROMPT, shares(120), read=900.0)
    tuned = outcome("LoRA on 1,000 rows", TUNED, shares(180), read=100.0, tokens=2_000_000)
    found = verdict.decide_between([prompt, tuned], PRICE, PRICE, 0.02)
    assert found["verdict"] == "tune" and found["break_even"] == pytest.approx(2.0 / (800 * 1e-6))
    assert found["sentence"].startswith("LoRA on 1,000 rows: +30.0 points [")
    assert found["sentence"].endswith(
        "over the best prompt (4 examples: 60.0% [53.5, 67.0]), and pays after 2,500 requests: tune."
    )
    assert [row["pareto"] for row in found["matrix"]] == [False, True]


def test_equal_candidates_keep_the_prompt():
    prompt, tuned = outcome("p", PROMPT, shares(150)), outcome("t", TUNED, shares(151), tokens=1000)
    found = verdict.decide_between([prompt, tuned], PRICE, PRICE, 0.02)
    assert found["verdict"] == "keep the prompt"
    assert found["sentence"].startswith(
        "No evidence that tuning helps: t has +0.5 points [0.0, 1.5] against the best prompt"
    )
    assert found["break_even"] is None


def test_a_gain_that_is_not_worth_it_keeps_the_prompt():
    prompt, tuned = outcome("p", PROMPT, shares(3900, 4000)), outcome("t", TUNED, shares(3930, 4000))
    assert "less than the 2 points" in verdict.decide_between([prompt, tuned], PRICE, PRICE, 0.02)["sentence"]


def test_what_lost_on_few_rows_is_not_the_best():
    found = verdict.best(
        [outcome("a", PROMPT, shares(10, 50), stopped="x"), outcome("b", NEIGHBOURS, shares(2))], PRICE
    )
    assert found.name == "b"


def test_break_even_by_answers():
    tuned, prompt = verdict.Cost(2.0, 30.0), verdict.Cost(1.0, 0.0)
    assert verdict.break_even(tuned, prompt) is None
    requests = verdict.break_even_by_answers(tuned, 0.9, prompt, 0.3)
    assert (30.0 + requests * 0.002) / (0.9 * requests) == pytest.approx(0.001 / 0.3)
    assert verdict.break_even_by_answers(tuned, 0.9, prompt, 0.0) == 0.0
    assert verdict.break_even_by_answers(tuned, 0.5, prompt, 0.3) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front(points):
    front = verdict.pareto(points)
    best = {}  # cost -> the best score at it or below
    for cost in {c for c, _ in points}:
        best[cost] = max(s for c, s in points if c <= cost)
    for (cost, score), there in zip(points, front, strict=True):
        cheaper = [s for c, s in points if c < cost]
        assert there == (score == best[cost] and all(s < score for s in cheaper))


# ---------------------------------------------------------------------------------------------------- whole decisions


@pytest.fixture
def orders(tmp_path):
    rows = ORDERS.read_text(encoding="utf-8").splitlines(keepends=True)[:48]
    file = tmp_path / "orders.jsonl"
    file.write_text("".join(rows), encoding="utf-8")
    return file


def run(*flags):
    return cli.main(["decide", f"--model={tiny.BASE}", *flags])


def test_a_task_that_the_base_knows_keeps_the_prompt(orders, tmp_path, capsys, monkeypatch):
    flags = (f"--data={orders}", f"--workdir={tmp_path / 'out'}", "--candidates=prompts", f"--prompt={QUESTION}")
    assert run(*flags, "--price=1 USD per 1M tokens") == 0
    report = json.loads((tmp_path / "out/decision.json").read_text())
    scores = {row["name"]: row["score"]["value"] for row in report["matrix"]}
    assert scores == {"rows as they are": 0.0, "prompt 'question'": 1.0}
    assert report["verdict"] == "keep the prompt" and report["held_out"] == 16
    assert "prompt &#39;question&#39;" in (tmp_path / "out/decision.html").read_text()
    first = capsys.readouterr().out
    # A second time nothing is measured, and nothing differs.
    monkeypatch.setattr("jaxtune.decide.candidates.generate", None)
    assert run(*flags, "--price=1 USD per 1M tokens") == 0
    again = json.loads((tmp_path / "out/decision.json").read_text())
    assert again == report
    assert "measured before" in capsys.readouterr().out and "measured before" not in first


def test_tuned_candidates_are_runs_of_their_own(orders, tmp_path, capsys):
    flags = (f"--data={orders}", f"--workdir={tmp_path / 'out'}", "--candidates=prompts,lora", "--sizes=32", "--rows=8")
    few = ("--config.train.steps=2", "--config.train.batch_size=2", "--config.optim.lr=1e-3", "--max-new-tokens=8")
    few += (f"--forgetting={tiny.ASSETS / 'general.jsonl'}",)
    assert run(*flags, *few) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out/decision.json").read_text())
    assert [row["name"] for row in report["matrix"]] == ["rows as they are", "LoRA on 32 rows"]
    tuned = report["matrix"][1]
    assert (tmp_path / "out/runs/lora-32/adapter").is_dir() and tuned["training"]["seconds"] > 0
    assert len((tmp_path / "out/data/rows-32.jsonl").read_text().splitlines()) == 32
    assert tuned["cost_of_training"] == tuned["training"]["seconds"]  # no price: seconds
    part = json.loads((tmp_path / "out/runs/lora-32/eval.json").read_text())["forgetting"]
    assert tuned["forgetting"]["loss"] == part["metrics"]["loss"]["difference"] and part["rows"] == 8
    assert f"{part['metrics']['loss']['difference']['value']:+.3f} nats" in (tmp_path / "out/decision.html").read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--price=0.2"], "a price needs a unit"),
        (["--candidates=promts"], "Did you mean 'prompts'"),
        (["--prompt=nowhere.txt"], "no such file"),
        (["--sizes=4000"], "there are 32 training rows"),
        (["--sizes=0,16"], "--sizes=0: there are 32 training rows"),
        (["--worth=2"], "expected a share"),
        (["--metric=rouge"], "unknown metric 'rouge'"),
        (["--training-price=1 EUR per hour"], "give both in one unit"),
        (["--config.objective.name=kto"], "decide compares answers"),
        (["--forgetting=nowhere.jsonl"], "nowhere.jsonl"),
        (["--forgetting={data}"], "nearly repeat a row of the tuning data"),
        (["--max-new-tokens=490"], "positions leave 22 beside an answer of 490"),
    ],
)
def test_wrong_input(orders, tmp_path, flags, says, capsys):
    flags = [flag.format(data=orders) for flag in flags]
    assert run(f"--data={orders}", f"--workdir={tmp_path / 'out'}", *flags) == 2
    assert says in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_named(orders, tmp_path, capsys):
    file = tmp_path / "long.txt"
    file.write_text("mug " * 600)
    assert run(f"--data={orders}", f"--workdir={tmp_path / 'out'}", f"--prompt={file}") == 2
    assert "with the prompt 'long' it has" in capsys.readouterr().err
    assert not (tmp_path / "out/candidates.jsonl").exists()


@pytest.mark.parametrize("labelled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_answers_that_are_labels(tmp_path, labelled):
    """Rows with a prompt and an answer, and rows with a text and a label, which a decoder's own task may be."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in tiny.TRAIN.read_text(encoding="utf-8").splitlines()[:400]]
    rows = [(row["prompt"].removesuffix("\nJSON:\n"), json.loads(row["completion"])["intent"]) for row in rows]
    rows = [row for row in rows if row[1] in ("return", "order")][:60]
    file = tmp_path / "intents.jsonl"
    rows = [{"text": p, "label": c} if labelled else {"prompt": f"{p}\nKind:", "completion": f" {c}"} for p, c in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--candidates=labels,balanced,lora" if labelled else "--candidates=labels,balanced,neighbours,head"]
    if labelled:
        asked += ["--config.objective.name=sequence_classification", "--sizes=48", "--config.optim.lr=1e-3"]
        asked += ["--config.train.steps=2", "--config.train.batch_size=4"]
    assert run(f"--data={file}", f"--workdir={tmp_path / 'out'}", *asked, "--rows=12", "--shots=2") == 0
    report = json.loads((tmp_path / "out/decision.json").read_text())
    found = {row["name"]: row for row in report["matrix"]}
    assert report["metric"] == "accuracy"
    if labelled:
        assert len(found) == 3 and found["LoRA on 48 rows"]["measured_on"] == 12
    else:
        head = found["head on 48 rows"]
        assert head["training"]["trainable"] == 2 * 128 and head["measured_on"] == 12 and head["score"]["value"] > 0.75
        assert len(found) == 4 and found["vote of 8 nearest rows by BM25"]["cost_of_training"] == 0

    # The likeliest label, by transformers, after an example of each.
    read = lambda name: [json.loads(line) for line in (tmp_path / "out/data" / name).read_text().splitlines()]  # noqa: E731
    part = "rows" if labelled else "labels"
    held, pool = ([dict(row) for row in read(name)] for name in (f"held-out-{part}.jsonl", f"{part}-48.jsonl"))
    for row in (*held, *pool) if labelled else ():
        row["text"] += "\nLabel:"
    labels = list(dict.fromkeys(row["label"] for row in pool))
    shots = [next(row for row in pool if row["label"] == label) for label in labels]
    shown = "".join(f"{row['text']} {row['label']}\n\n" for row in shots)
    tokenizer = AutoTokenizer.from_pretrained(tiny.BASE)
    model = AutoModelForCausalLM.from_pretrained(tiny.BASE, dtype=torch.float32).eval()

    def nats(prompt, label):
        first, rest = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f" {label}"))
        with torch.no_grad():
            logprobs = model(torch.tensor([first + rest])).logits[0].log_softmax(-1)
        return -sum(logprobs[len(first) - 1 + i, token].item() for i, token in enumerate(rest))

    likeliest = [min(labels, key=lambda label: nats(shown + row["text"], label)) for row in held]
    right = sum(label == row["label"] for label, row in zip(likeliest, held, strict=True))
    assert found["likeliest label"]["score"]["value"] == right / 12 and found["likeliest label"]["written"] == 0
