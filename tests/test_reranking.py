"""Cross-encoders: their losses beside torch's, and whole runs that load in live sentence-transformers."""

from functools import partial

import jax
import numpy as np
import pytest
from runs import command, read, write_jsonl
from test_classification_runs import write_encoder

from jaxtune.cli import main
from jaxtune.objectives.reranking import RANKINGS


@pytest.mark.parametrize("name", RANKINGS)
def test_losses_and_gradients_are_those_of_torch(name):
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, softplus

    rng = np.random.default_rng(0)
    scores, label = rng.normal(size=(5, 4)).astype(np.float32), rng.integers(0, 2, (5, 4)).astype(np.float32)
    label[:, :2] = (0, 1)
    there = np.ones((5, 4), np.float32)
    there[3:, 3] = 0
    value, grad = jax.value_and_grad(lambda x: RANKINGS[name](x, label, there).sum())(scores)
    x, total = torch.tensor(scores, requires_grad=True), 0.0
    for row in range(5):
        n = int(there[row].sum())
        s, y = x[row, :n], torch.tensor(label[row, :n])
        if name == "binary":
            total = total + binary_cross_entropy_with_logits(s, y)
        elif name == "listwise":
            total = total - (y.softmax(0) * s.log_softmax(0)).sum()
        else:
            apart = [softplus(s[j] - s[i]) for i in range(n) for j in range(n) if y[i] > y[j]]
            total = total + sum(apart) / len(apart)
    total.backward()
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-5)
    np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-6)


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerank")
    (folder / "model").mkdir()
    write_encoder(folder / "model")
    words = ("red", "blue", "green", "round", "square")
    rows = [{"query": f"a {a} one", "positive": f"it is {a}", "negative": [f"it is {b}"]} for a in words for b in words]
    rows = [row for row in rows if row["positive"] != row["negative"][0]]
    file = write_jsonl(folder / "rows.jsonl", rows)
    given = {"model__path": folder / "model", "data__train": file, "data__eval": file}
    return partial(command, folder, objective__name="reranking", **given)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_run_loads_in_cross_encoder(argv, tmp_path, ranking):
    packing = {"data__packing": ranking == "binary"}
    assert main(argv(tmp_path / "run", objective__ranking=ranking, train__steps=4, **packing)) == 0
    evaluations = [line for line in read(tmp_path / "run") if "eval/loss" in line]
    assert np.isfinite([line["eval/loss"] for line in evaluations]).all() and 0 <= evaluations[-1]["eval/accuracy"] <= 1
    if ranking != "binary":
        return
    from sentence_transformers import CrossEncoder
    from transformers import AutoTokenizer

    from jaxtune.infer.source import find, open_source

    assert main(["export", str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    module, params, _ = open_source(find(tmp_path / "run"))
    pairs = [("a red one", "it is red"), ("a red one", "it is blue, or so they say")]
    found = AutoTokenizer.from_pretrained(tmp_path / "model")(
        [a for a, _ in pairs], [b for _, b in pairs], padding=True
    )
    given = {"segments": np.array(found["attention_mask"]), "types": np.array(found["token_type_ids"])}
    ours = module.apply({"params": params}, np.array(found["input_ids"]), **given)[:, 0]
    theirs = CrossEncoder(str(tmp_path / "model"), device="cpu").predict(pairs)
    np.testing.assert_allclose(1 / (1 + np.exp(-np.asarray(ours))), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "ranking", "words"),
    [
        ([{"query": "a", "document": "b", "label": 1}] * 4, "binary", "all 4 documents have the label 1"),
        ([{"query": "a", "document": "b", "label": 1}] * 4, "listwise", "has one with a label"),
        ([{"query": "a", "document": "b", "label": 3}] * 4, "binary", "is no probability"),
        ([{"query": "a"}], "binary", "needs two texts"),
    ],
    ids=str,
)
def test_rows_that_are_refused(argv, tmp_path, capsys, rows, ranking, words):
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    given = {"data__train": file, "data__eval": None, "train__eval_every": None, "objective__ranking": ranking}
    assert main(argv(tmp_path / "no", **given)) == 2
    assert words in capsys.readouterr().err
