"""Known or new, sure or not, grounded or not: against scikit-learn, by hand, and on rows whose truth is known."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_decide import ORDERS, QUESTION

from jaxtune import cli, data, tiny
from jaxtune.evaluate import confidence, knowledge
from jaxtune.evaluate.evaluation import Options
from jaxtune.evaluate.knowledge import Recall
from jaxtune.evaluate.unpaired import write_unpaired
from jaxtune.infer.source import find


@pytest.mark.parametrize(
    ("recall", "name"),
    [((1, 0), "HighlyKnown"), ((0.25, 0), "MaybeKnown"), ((0, 0.1), "WeaklyKnown"), ((0, 0), "Unknown")],
)
def test_classes(recall, name):
    assert knowledge.class_of(Recall(*recall)) == name


@given(st.lists(st.sampled_from(knowledge.CLASSES), min_size=1), st.floats(0, 0.9))
def test_unknown_rows_are_capped_and_no_more_are_dropped(classes, most):
    drops = knowledge.over_cap(classes, most)
    left = [name for i, name in enumerate(classes) if i not in drops]
    unknown = left.count("Unknown")
    assert set(drops) <= {i for i, name in enumerate(classes) if name == "Unknown"}
    assert unknown <= most * len(left) + 1e-6
    if drops:  # one more would be too many
        assert unknown + 1 > most * (len(left) + 1) - 1e-6


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=2, max_size=30))
def test_auroc_is_scikit_learns(rows):
    from sklearn.metrics import roc_auc_score

    right, sure = np.array([r for r, _ in rows]), np.array([c / 4 for _, c in rows])
    expected = roc_auc_score(right, sure) if 0 < right.sum() < len(right) else 0.5
    assert confidence.auroc(right, sure) == pytest.approx(expected)


def test_risk_and_coverage():
    right, sure = np.array([True, False, True, True]), np.array([0.9, 0.1, 0.8, 0.2])
    assert confidence.risk_coverage(right, sure).tolist() == [0, 0, 0, 0.25]
    assert confidence.aurc(right, sure) == pytest.approx(1 / 16)
    # Of equal confidence the order is by chance: the expected risk is the same at every coverage.
    assert confidence.risk_coverage(right, np.ones(4)).tolist() == pytest.approx([0.25] * 4)
    # Chance order among all permutations of ties gives the same area on average.
    rng = np.random.default_rng(0)
    sure = np.array([0.9, 0.5, 0.5, 0.5])
    drawn = [confidence.aurc(right, sure + 1e-6 * rng.random(4)) for _ in range(2000)]
    assert confidence.aurc(right, sure) == pytest.approx(np.mean(drawn), abs=0.01)


def test_what_is_not_in_the_prompt():
    context = "Two blue mugs from order A4821 cost 12.50 pounds."
    assert confidence.ungrounded("The mugs cost 12.50 pounds", context) == 0
    assert confidence.ungrounded("The mugs cost 13.50 and were broken", context) == pytest.approx(2 / 4)
    assert confidence.ungrounded("It is.", context) is None
    assert confidence.ungrounded('{"product": "mugs", "order": "A9999", "colour": null}', context) == 0.5


def test_abstentions():
    assert (
        confidence.abstains("I don’t  know.") and confidence.abstains("") and confidence.abstains("It is not mentioned")
    )
    assert not confidence.abstains("Perth") and confidence.abstains("PASS", ["pass"])


@pytest.fixture
def orders(tmp_path):
    """Rows whose answer stands in the message, and as many with one that no reader could know."""
    rows = [json.loads(line) for line in ORDERS.read_text(encoding="utf-8").splitlines()[:24]]
    for i, row in enumerate(rows):
        row["invented"] = bool(i % 2)
        if i % 2:
            row["completion"] = f"X{7000 + i}"
    file = tmp_path / "orders.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_known_and_unknown_rows_are_told_apart(orders, tmp_path, capsys):
    flags = (f"--config.model.path={tiny.BASE}", f"--config.data.train={orders}", f"--workdir={tmp_path / 'out'}")
    known = ("--known", "--shots=0", f"--prompt={QUESTION}", "--near=0", "--config.data.eval_fraction=0.25")
    clean = (f"--write-clean={tmp_path / 'clean.jsonl'}", "--most-unknown=0.2")
    assert cli.main(["data", *flags, *known, *clean]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/known.jsonl").read_text().splitlines()]
    held = [json.loads(line) for line in (tmp_path / "out/known_held_out.jsonl").read_text().splitlines()]
    assert len(rows) + len(held) == 24 and len(held) == 6
    assert {(row["invented"], row["known"]) for row in rows + held} == {(False, "HighlyKnown"), (True, "Unknown")}
    unknown = sum(row["invented"] for row in rows)
    report = json.loads((tmp_path / "out/data_report.json").read_text())
    want = {"HighlyKnown": 1 - unknown / 18, "MaybeKnown": 0, "WeaklyKnown": 0, "Unknown": unknown / 18}
    assert report["summary"]["known"] == pytest.approx(want)
    [finding] = [f for f in report["findings"] if f["check"] == "known"]
    assert finding["severity"] == "warning" and finding["count"] == unknown
    kept = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    asked = {row["prompt"] for row in rows}
    left = sum(row["invented"] for row in kept if row["prompt"] in asked)
    assert len(kept) == 6 + 18 - unknown + left and left == (18 - unknown) // 4  # at most a fifth of those trained on


def test_confidence_of_a_model(orders, tmp_path, capsys):
    out = tmp_path / "out"
    flags = (f"--data={orders}", "--samples=2", "--unanswerable=invented", "--abstain=X", f"--out={out}")
    assert cli.main(["eval", str(tiny.BASE), "--confidence", *flags]) == 0, capsys.readouterr().err
    part = json.loads((out / "eval.json").read_text())["confidence"]
    rows = [json.loads(line) for line in (out / "eval/confidence.jsonl").read_text().splitlines()]
    assert len(rows) == part["rows"] == 24
    for row in rows:
        own = row["model"]
        assert 0 < own["lowest"] <= own["mean"] <= 1
        assert own["agreement"] == np.mean([s == own["answer"] for s in own["samples"]])
    wrong = [not row["model"]["right"] and row["model"]["mean"] >= confidence.SURE for row in rows]
    assert part["metrics"]["wrong_and_sure"]["model"]["value"] == np.mean(wrong)
    assert set(part["risk_coverage"]) == {"mean", "lowest", "agreement"}
    assert part["metrics"]["abstained"]["rows"] == 12
    # The mean is the geometric mean of the greedy tokens' probabilities: as transformers has them.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny.BASE).eval(), AutoTokenizer.from_pretrained(tiny.BASE)
    prompt = tokenizer(rows[0]["prompt"], return_tensors="pt")["input_ids"]
    new = part_length(prompt, model, 10)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(new).logits[0], -1)
    chosen = logprobs[torch.arange(prompt.shape[1] - 1, new.shape[1] - 1), new[0, prompt.shape[1] :]]
    assert tokenizer.decode(new[0, prompt.shape[1] :], skip_special_tokens=True).strip() == rows[0]["model"]["answer"]
    assert rows[0]["model"]["mean"] == pytest.approx(float(chosen.mean().exp()), abs=1e-4)
    assert rows[0]["model"]["lowest"] == pytest.approx(float(chosen.min().exp()), abs=1e-4)


def part_length(prompt, model, most):
    import torch

    with torch.no_grad():
        return model.generate(prompt, do_sample=False, max_new_tokens=most, attention_mask=torch.ones_like(prompt))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--samples=2"], "--samples has no effect without --confidence"),
        (["--confidence", "--memory"], "--confidence has no effect with --memory"),
        (["--confidence", "--labels"], "--labels has no effect on --confidence"),
        (["--confidence", "--unanswerable=completion"], "the column is true in no row"),
    ],
)
def test_wrong_input(orders, tmp_path, flags, says, capsys):
    assert cli.main(["eval", str(tiny.BASE), f"--data={orders}", *flags]) == 2
    assert says in capsys.readouterr().err


def test_questions_beside_another_rows_context(tmp_path, capsys):
    """Every question stands with its own context, and again with another, in which its answer does not stand."""
    where = ["Anna lives in Leeds.", "Ben lives in York.", "Cara lives in Leeds.", "Dan lives in Leeds and York."]
    file = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": f"Where does {text.split()[0]} live?", "input": text, "output": text.split()[3].rstrip(".")}
        for text in where
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, tokenizer = find(str(tiny.BASE)), data.load_tokenizer(str(tiny.BASE))
    made = tmp_path / "eval" / "made.jsonl"
    options = write_unpaired(source, None, tokenizer, Options(data=[str(file)]), "input", made)
    found = [json.loads(line) for line in made.read_text().splitlines()]
    assert options.data == [str(made)]
    assert sorted((r for r in found if not r.pop("unanswerable")), key=str) == sorted(rows, key=str)
    [york, *others] = sorted(found[4:], key=lambda row: row["output"] != "York")
    assert len(others) == 3 and york["input"] in (where[0], where[2]) and {r["input"] for r in others} == {where[1]}
    for column, says in (
        ("context", "has no text in a column 'context'"),
        ("output", "all are equal or hold its answer"),
    ):
        if column == "output":
            file.write_text(json.dumps(rows[0]) + "\n")
        flags = (f"--data={file}", f"--unpaired={column}", f"--out={tmp_path / 'out'}")
        assert cli.main(["eval", str(tiny.BASE), "--confidence", *flags]) == 2
        assert says in capsys.readouterr().err
