"""`jaxtune eval` on label heads: figures as training logged them and as transformers and scikit-learn find them."""

import json

import numpy as np
import pytest
import torch
from runs import compiled  # noqa: F401
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from test_classification_runs import evaluations, home, texts, train  # noqa: F401

from jaxtune import cli
from jaxtune.data import LabelForm
from jaxtune.evaluate.classifiers import columns, summed
from jaxtune.evaluate.labels import ece

FILES = {"train": "train.conll", "eval": "eval.conll"}


def report_of(folder):
    return json.loads((folder / "eval.json").read_text())["held_out"]


def tuned(report, metric):
    return report["metrics"][metric]["tuned"]["value"]


@pytest.fixture(scope="module")
def classified(home, tmp_path_factory):  # noqa: F811
    """A run that is not done learning, evaluated; with a column to group by."""
    folder = tmp_path_factory.mktemp("run")
    rows = [json.dumps(row | {"size": "odd" if i % 2 else "even"}) for i, row in enumerate(texts(48, 60))]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    flags = ("--config.train.steps=4", "--config.optim.lr=0.005", f"--config.data.eval={folder / 'rows.jsonl'}")
    assert train(home, *flags, workdir=folder / "run") == 0
    assert cli.main(["eval", str(folder / "run"), "--group-by=size"]) == 0
    return folder / "run"


def test_texts_are_scored_as_transformers_and_scikit_learn_score_them(classified):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    report, rows = report_of(classified), texts(48, 60)
    folder = classified / "model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    true = [model.config.label2id[row["label"]] for row in rows]
    with torch.no_grad():
        said = model(**inputs, labels=torch.tensor(true))
    probabilities = said.logits.softmax(-1).numpy()
    best = probabilities.argmax(-1)
    assert tuned(report, "loss") == pytest.approx(float(said.loss), rel=1e-4)
    assert tuned(report, "accuracy") == accuracy_score(true, best)
    assert tuned(report, "macro_f1") == pytest.approx(f1_score(true, best, average="macro"))
    assert tuned(report, "ece") == pytest.approx(ece(probabilities.max(-1), best == true), abs=1e-4)
    assert report["labels"]["confusion"]["tuned"] == confusion_matrix(true, best, labels=[0, 1, 2]).tolist()
    assert 0 < tuned(report, "accuracy") < 1, "a case in which figures can differ"
    records = [json.loads(line) for line in (classified / "eval" / "rows.jsonl").read_text().splitlines()]
    assert [record["tuned"]["label"] for record in records] == [model.config.id2label[int(i)] for i in best]
    assert [record["tuned"]["confidence"] for record in records] == pytest.approx(probabilities.max(-1), abs=1e-4)
    even = report["groups"]["metrics"]["accuracy"]["even"]["tuned"]["value"]
    assert even == accuracy_score(true[::2], best[::2])


def test_they_are_those_that_training_logged(classified):
    last = evaluations(classified)[-1]
    for metric in ("loss", "accuracy", "macro_f1"):
        assert tuned(report_of(classified), metric) == pytest.approx(last[f"eval/{metric}"], rel=1e-4)


def test_a_new_head_has_no_base_to_compare_with(classified):
    report = report_of(classified)
    assert set(report["metrics"]["loss"]) & {"base", "tuned"} == {"tuned"}
    assert "no head for these labels" in report["notes"][0]
    assert report["notes"][1] == "Always saying 'blue' would be right in 33.3% of the rows."
    page = (classified / "report.html").read_text()
    assert "<h2>Labels</h2>" in page and "no head for these labels" in page


def test_tags_and_entities(home, tmp_path):  # noqa: F811
    flags = ("--config.tune.method=lora", "--config.optim.lr=0.02", "--config.train.steps=8")
    assert train(home, *flags, workdir=tmp_path / "run", kind="token", **FILES) == 0
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    report, logged = report_of(tmp_path / "run"), evaluations(tmp_path / "run")[-1]
    for metric in ("loss", "accuracy", "macro_f1", "entity_f1"):
        assert tuned(report, metric) == pytest.approx(logged[f"eval/{metric}"], rel=1e-4)
    assert np.sum(report["labels"]["confusion"]["tuned"]) == sum(len(row["text"].split()) for row in texts(48, 60))
    assert ": B-col" in report["samples"][0]["expected"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--metrics=exact_match"], "--metrics has no effect"),
        (["--labels"], "--labels has no effect"),
        (["--tasks=a"], "does not continue text"),
        (["--group-by=sise"], "Did you mean 'size'"),
    ],
)
def test_what_is_refused(classified, capsys, flags, said):
    assert cli.main(["eval", str(classified), *flags]) == 2
    assert said in capsys.readouterr().err


def test_an_encoder_without_a_head_is_refused(home, capsys):  # noqa: F811
    assert cli.main(["eval", str(home / "model"), f"--data={home / 'eval.jsonl'}"]) == 2
    assert "does not continue text" in capsys.readouterr().err


def test_scores_of_summed_counts_are_those_of_the_rows_drawn():
    """Of a draw with repeats: the counts of its rows, each as often as it was drawn."""
    counts = {"base": np.array([[1.0, 2], [3, 4], [5, 6]]), "tuned": np.array([[7.0, 8], [9, 10], [11, 12]])}
    statistic, values = summed(counts, lambda total: total[0] / total[1])
    draw = np.array([values["base"][[0, 2, 2]], values["tuned"][[1, 1, 0]]])
    assert statistic(draw) == pytest.approx([(1 + 5 + 5) / (2 + 6 + 6), (9 + 9 + 7) / (10 + 10 + 8)])


def test_several_labels_count_as_scikit_learn_counts_them(monkeypatch):
    from jaxtune.evaluate import classifiers

    rng = np.random.default_rng(0)
    true, said = rng.random((2, 40, 5)) < 0.4
    form = LabelForm(per_token=False, names=tuple("abcde"), several=True)
    monkeypatch.setattr(classifiers, "truth", lambda rows, i, form: np.flatnonzero(true[i]).tolist())
    given = [classifiers.Predictions(1.0, np.flatnonzero(row).tolist(), []) for row in said]
    found = columns(range(40), {"tuned": given}, form)
    for name, want in (("accuracy", accuracy_score(true, said)), ("macro_f1", f1_score(true, said, average="macro"))):
        column = found[name]
        assert column.statistic(column.values["tuned"][None])[0] == pytest.approx(want)
