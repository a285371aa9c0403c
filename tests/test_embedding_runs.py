"""Whole runs of embeddings: from rows to what live sentence-transformers loads, its measures and vectors."""

import json
import re
from functools import partial

import jax
import numpy as np
import pytest
from runs import command, read, write_jsonl, write_model

from jaxtune import models
from jaxtune.cli import main
from jaxtune.data.embeddings import class_numbers
from jaxtune.evaluate.retrieval import measures, rank, read_beir
from jaxtune.hf.vectors import Pooled, read_pooled
from jaxtune.infer.vectors import open_embedder

BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def pairs(first, last):
    return [{"anchor": f"what is {i}?", "positive": f"{i} is {i + 1} less one"} for i in range(first, last)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A directory of sentence-transformers: two narrow layers, mean pooling, a prompt for queries."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    folder.mkdir()
    write_model(folder)  # its tokenizer
    (folder / "config.json").write_text(json.dumps(BERT))
    module = models.build(BERT)
    params = jax.jit(module.init_params)(jax.random.key(0))
    from jaxtune.hf.export import export_model

    export_model(module, params, folder.parent / "st", base=folder, vectors=Pooled("mean", True, {"query": "q: "}, 48))
    return folder.parent / "st"


@pytest.fixture(scope="module")
def argv(bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    given = {
        **{"model__path": bert, "objective__name": "embedding", "optim__lr": 5e-3},
        "data__train": write_jsonl(folder / "train.jsonl", pairs(0, 24)),
        "data__eval": write_jsonl(folder / "eval.jsonl", pairs(24, 36)),
    }
    return partial(command, bert.parent, **given)


@pytest.fixture(scope="module")
def trained(argv, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "lora"
    assert main(argv(workdir)) == 0
    return workdir


def test_it_learns(trained):
    first, *_, last = [line for line in read(trained) if "eval/loss" in line]
    assert last["eval/loss"] < first["eval/loss"] and last["eval/rows"] == 12


@pytest.mark.filterwarnings("ignore")  # sentence-transformers' and transformers' own
@pytest.mark.parametrize("form", ["adapter", "merged", "copied"])
def test_live_sentence_transformers_has_our_vectors(trained, tmp_path, form):
    from sentence_transformers import SentenceTransformer

    out = trained / "adapter"
    if form != "adapter":
        out = tmp_path / "out"
        assert main(["export", str(trained), str(out), *(["--adapter"] if form == "copied" else [])]) == 0
    texts = ["what is 7?", "x", "a longer text that goes on and on, until it is cut somewhere near its end"]
    theirs, ours = SentenceTransformer(str(out), device="cpu"), open_embedder(trained)
    np.testing.assert_allclose(ours(texts), theirs.encode(texts), atol=1e-5)
    np.testing.assert_allclose(ours(texts, "q: "), theirs.encode_query(texts), atol=1e-5)
    assert theirs.max_seq_length == 48 and read_pooled(out).prompts == {"query": "q: "}


@pytest.mark.filterwarnings("ignore")
def test_the_lines_of_the_card_run(trained, monkeypatch):
    card = (trained / "adapter" / "README.md").read_text()
    monkeypatch.chdir(trained)
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2 and "library_name: sentence-transformers" in card
    for block in blocks:
        exec(block, {})


def test_eval_ranks_the_held_out_texts_by_base_and_tuned(trained):
    assert main(["eval", str(trained)]) == 0
    found = json.loads((trained / "eval.json").read_text())["held_out"]
    for name in ("hit@1", "recall@10", "mrr@10", "ndcg@10", "map@100"):
        assert 0 <= found["metrics"][name]["tuned"]["low"] <= found["metrics"][name]["tuned"]["value"] <= 1
        assert "difference" in found["metrics"][name]
    assert "less one" in found["samples"][0]["after"] and "✓" in (trained / "report.html").read_text()


def test_embed_writes_the_vectors_of_a_file(trained, tmp_path):
    rows = [{"text": f"what is {i}" + " and so on" * (i % 3), "n": i} for i in range(9)]
    file = write_jsonl(tmp_path / "texts.jsonl", rows)
    assert main(["embed", str(trained), str(file), f"--out={tmp_path}/v.npy", "--as=query"]) == 0
    want = open_embedder(trained)([row["text"] for row in rows], "q: ")
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), want, atol=1e-6)
    assert main(["embed", str(trained), str(file), f"--out={tmp_path}/v.parquet", "--width=8"]) == 0
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "v.parquet").to_pydict()
    short = np.array(table["vector"])
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-5)
    assert short.shape == (9, 8) and table["text"] == [row["text"] for row in rows]


def test_embed_goes_on_where_it_stopped(trained, tmp_path, monkeypatch):
    from jaxtune.commands import embed
    from jaxtune.infer.vectors import Embedder

    monkeypatch.setattr(embed, "PART", 4)
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"what is {i}"} for i in range(10)])
    command_line = ["embed", str(trained), str(file), f"--out={tmp_path}/v.npy"]
    whole, calls = Embedder.vectors_of, []

    def stops(self, *given):
        calls.append(len(given[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *given)

    monkeypatch.setattr(Embedder, "vectors_of", stops)
    assert main(command_line) == 1 and calls == [4, 4, 2]
    assert main(command_line) == 0 and calls == [4, 4, 2, 2]
    assert np.load(tmp_path / "v.npy").shape == (10, 16) and not list(tmp_path.glob("*.parts*"))


def test_it_resumes_to_the_same_bytes(argv, tmp_path):
    given = {"optim__schedule": "constant", "optim__warmup": 0, "train__grad_accum": 2, "train__save_every": 4}
    assert main(argv(tmp_path / "whole", **given)) == 0
    assert main(argv(tmp_path / "cut", train__steps=4, **given)) == 0
    assert main(argv(tmp_path / "cut", **given)) == 0
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "whole", tmp_path / "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


LOSSES = {
    "cosent": [{"sentence1": f"{i}", "sentence2": f"{i} {i % 3}", "score": i % 3 / 2} for i in range(12)],
    "contrastive": [{"query": f"{i}", "document": f"{i} {i % 3}", "label": i % 2} for i in range(12)],
    "batch_hard": [{"text": f"{i} {i % 3}", "label": f"c{i % 3}"} for i in range(12)],
    "triplet": [{"anchor": f"{i}", "positive": f"{i}.", "negative": f"no {i}"} for i in range(12)],
    "infonce": [{"query": f"{i}", "pos": f"{i}.", "neg": [f"no {i}"] * (1 + i % 2)} for i in range(12)],
    "kl": [{"query": f"{i}", "positive": f"{i}.", "negative": f"no {i}", "scores": [2.0, i % 3]} for i in range(12)],
}


@pytest.mark.parametrize("contrast", LOSSES)
def test_every_form_of_rows_trains_and_is_measured(argv, tmp_path, contrast):
    file = write_jsonl(tmp_path / "rows.jsonl", LOSSES[contrast])
    given = {"data__train": file, "data__eval": file, "objective__contrast": contrast, "train__steps": 2}
    assert main(argv(tmp_path / "run", **given)) == 0
    assert main(["eval", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "eval.json").read_text())["held_out"]["metrics"]
    assert {"cosent": "spearman", "contrastive": "pearson", "triplet": "triplets"}.get(contrast, "mrr@10") in found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_decoder_gives_the_vectors_of_sentence_transformers(tmp_path):
    """The form of Qwen3-Embedding: a causal model, the last token, normalised; whole weights and an adapter."""
    from sentence_transformers import SentenceTransformer

    model, file = tmp_path / "llama", write_jsonl(tmp_path / "rows.jsonl", pairs(0, 12))
    model.mkdir()
    write_model(model)
    given = {"model__path": model, "data__train": file, "data__eval": None, "train__eval_every": None}
    for method in ("lora", "full"):
        run = tmp_path / method
        more = {} if method == "lora" else {"tune__lora__r": None, "tune__lora__lora_dropout": None}
        line = command(tmp_path, run, objective__name="embedding", tune__method=method, train__steps=2, **given, **more)
        assert main(line) == 0
        theirs = SentenceTransformer(str(run / ("adapter" if method == "lora" else "model")), device="cpu")
        texts = ["what is 7?", "x"]
        np.testing.assert_allclose(open_embedder(run)(texts), theirs.encode(texts), atol=1e-5)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__batch_size": 1, "train__grad_accum": 1}, "one row has nothing"),
        ({"objective__query_prefix": "query: "}, "prompt of its own"),
        ({"objective__matryoshka": "8,32"}, "names a width of 32"),
        ({"objective__contrast": "cosent"}, "needs a number for how alike"),
        ({"objective__contrast": "triplet"}, "a column negative"),
        ({"objective__margin": 0.2}, "objective.margin has no effect"),
        ({"data__packing": "true"}, "data.packing has no effect"),
        ({"data__overlength": "split"}, "split has no meaning"),
    ],
    ids=str,
)
def test_what_is_refused_before_the_run(argv, tmp_path, capsys, changes, words):
    assert main(argv(tmp_path / "no", **changes)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("contrast", "rows", "words"),
    [
        ("cosent", [{"sentence1": "a", "sentence2": "b", "score": 0.5}] * 4, "scores are 0.5"),
        ("infonce", [{"anchor": "a", "positive": " "}], "'positive' is empty"),
        ("infonce", [{"sentence1": "a", "sentence2": "b", "score": 0.5}], "says how alike"),
        ("batch_hard", [{"text": f"{i}", "label": "x"} for i in range(4)], "texts are of one class"),
        ("contrastive", [{"query": "a", "document": "b", "label": 0.5}], "needs 1 (alike) or 0"),
        ("cosine_mse", [{"sentence1": "a", "sentence2": "b", "score": 4}], "which no cosine reaches"),
        ("kl", [{"query": "a", "positive": "b", "negative": "c", "scores": [1]}], "1 scores for 2 texts"),
        ("infonce", [{"prompt": "a", "completion": "b"}], "needs two texts"),
    ],
    ids=str,
)
def test_rows_that_are_refused(argv, tmp_path, capsys, contrast, rows, words):
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    given = {"data__train": file, "data__eval": None, "train__eval_every": None, "objective__contrast": contrast}
    assert main(argv(tmp_path / "no", **given)) == 2
    assert words in capsys.readouterr().err


def beir(folder, corpus=("one", "two"), qrels=("q1\td0\t1",)):
    folder.mkdir()
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(corpus)])
    write_jsonl(folder / "queries.jsonl", [{"_id": "q1", "text": "which?"}])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("\n".join(("query-id\tcorpus-id\tscore", *qrels)) + "\n")
    return folder


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"corpus": ("one", "")}, "document 'd1' has no text"),
        ({"qrels": ("q1\td7\t1",)}, "document 'd7' has no text"),
        ({"qrels": ("q1\td0\t0",)}, "no document is relevant"),
        ({"qrels": ("q1 d0 1",)}, "divided by tabs"),
    ],
    ids=str,
)
def test_a_corpus_that_is_refused(tmp_path, given, words):
    from jaxtune.errors import UserError

    with pytest.raises(UserError, match=re.escape(words)):
        read_beir(beir(tmp_path / "beir", **given))


def test_a_corpus_is_measured(trained, tmp_path):
    assert main(["eval", str(trained), f"--data={beir(tmp_path / 'beir')}", f"--out={tmp_path}/out"]) == 0
    found = json.loads((tmp_path / "out" / "eval.json").read_text())["held_out"]["metrics"]
    assert found["recall@10"]["tuned"]["value"] == 1


# ------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.filterwarnings("ignore")
def test_measures_are_those_of_sentence_transformers():
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    rng = np.random.default_rng(0)
    ranking = [rng.permutation(30) for _ in range(6)]
    relevant = [{int(d): 1.0 for d in rng.choice(30, n, replace=False)} for n in (1, 2, 5, 12, 3, 1)]
    names = {i: f"d{i}" for i in range(30)}
    theirs = InformationRetrievalEvaluator(
        {f"q{i}": "q" for i in range(6)},
        {name: name for name in names.values()},
        {f"q{i}": {names[d] for d in found} for i, found in enumerate(relevant)},
        map_at_k=[100],
    )
    found = [[{"corpus_id": names[d], "score": -float(r)} for r, d in enumerate(ranks)] for ranks in ranking]
    want = theirs.compute_metrics(found)
    ours = [measures(ranks, rel) for ranks, rel in zip(ranking, relevant)]
    mean = {name: np.mean([row[name] for row in ours]) for name in ours[0]}
    assert mean["hit@1"] == pytest.approx(want["accuracy@k"][1])
    assert mean["recall@10"] == pytest.approx(want["recall@k"][10])
    assert mean["mrr@10"] == pytest.approx(want["mrr@k"][10])
    assert mean["ndcg@10"] == pytest.approx(want["ndcg@k"][10])
    assert mean["map@100"] == pytest.approx(want["map@k"][100])


def test_ranking_leaves_a_query_itself_out():
    x = np.eye(4, dtype=np.float32) + 0.1
    own = np.arange(4)
    found = rank(x, x, own, depth=10)
    assert found.shape == (4, 3) and not (found == own[:, None]).any()
    assert rank(x, x, np.full(4, -1))[:, 0].tolist() == own.tolist()


def test_classes_have_numbers_of_their_own():
    assert len({class_numbers(f"class {i}") for i in range(5000)}) == 5000
    assert all(np.float32(n) == n for n in class_numbers("card_arrival"))
