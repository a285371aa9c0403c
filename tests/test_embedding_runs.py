"""Whole runs of embeddings: from rows to what live sentence-transformers loads, its measures and vectors."""

import json
import re
from functools import partial

import jax
import numpy as np
import pytest
from runs import command, read, write_jsonl, write_model

from jaxtune import data, models
from jaxtune.cli import main
from jaxtune.curate.texts import in_one_batch
from jaxtune.data.embeddings import CONTRASTS, TextsForm, class_numbers
from jaxtune.evaluate import clusters
from jaxtune.evaluate.retrieval import measures, rank, read_beir
from jaxtune.hf.vectors import Pooled, read_pooled
from jaxtune.infer.vectors import open_embedder
from jaxtune.objectives.embedding import adaptive, embedding, infonce, matryoshka
from jaxtune.train.optim import optimizer
from jaxtune.train.step import init_state, make_train_step, value_and_grad
from jaxtune.tree import TRAIN, partition

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
    if form == "merged":  # they name the length elsewhere than we do
        theirs.max_seq_length = 6
        theirs.save(str(tmp_path / "theirs"))
        np.testing.assert_allclose(open_embedder(tmp_path / "theirs")(texts), theirs.encode(texts), atol=1e-5)


@pytest.fixture(scope="module")
def dense(bert):
    """The same with a dense layer, as sentence-transformers writes it."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    base = SentenceTransformer(str(bert), device="cpu")
    layer = Dense(16, 6, activation_function=torch.nn.Tanh())
    SentenceTransformer(modules=[base[0], base[1], layer, Normalize()], device="cpu").save(str(bert.parent / "dense"))
    return bert.parent / "dense"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "wide"), [("lora", None), ("head", None), ("head", 8)])
def test_a_dense_layer_is_read_trained_and_written(argv, dense, tmp_path, method, wide):
    """It, or a new one, is trained with an adapter or alone; base, run and what is exported of it have its vectors."""
    from sentence_transformers import SentenceTransformer

    texts = ["what is 7?", "x"]
    if wide is None:
        theirs = SentenceTransformer(str(dense), device="cpu").encode(texts)
        np.testing.assert_allclose(open_embedder(dense)(texts), theirs, atol=1e-5)
    more = {} if method == "lora" else {"tune__lora__r": None, "tune__lora__lora_dropout": None}
    more |= {"objective__dense": wide} if wide else {"model__path": dense}
    run = tmp_path / "run"
    assert main(argv(run, tune__method=method, train__steps=2, **more)) == 0
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    ours = open_embedder(run)(texts)
    assert ours.shape == (2, wide or 6)
    for folder in (run / ("adapter" if method == "lora" else "model"), tmp_path / "out"):
        theirs = SentenceTransformer(str(folder), device="cpu")
        np.testing.assert_allclose(ours, theirs.encode(texts), atol=1e-5)
    base = open_embedder(run, base=True)
    assert base(texts).shape == (2, 16 if wide else 6)
    tuned = open_embedder(run)
    moved = [np.abs(np.asarray(tuned.params["pooled_dense"]["0"][k])).max() for k in ("kernel", "bias")]
    assert min(moved) > 0 and np.abs(ours - base(texts)[:, : wide or 6]).max() > 1e-4
    digests = json.loads((run / "base.json").read_text())["whole"]
    assert ("2_Dense/model.safetensors" in digests) == (wide is None)  # a run is not resumed over another layer
    same = np.array_equal(*(np.asarray(e.params["embed_tokens"]["embedding"]) for e in (base, tuned)))
    assert same  # a head alone, and LoRA, leave the tables


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
    page = (trained / "report.html").read_text()
    assert "less one" in found["samples"][0]["after"] and "✓" in page
    assert "<h3>relevant</h3>" in page and "differs</span>" not in page  # neighbours are no answers to compare


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


@pytest.mark.filterwarnings("ignore")
def test_prompts_of_other_names_and_a_default_are_kept(bert, tmp_path):
    """E5 calls the prompt of documents "passage"; a default stands before texts of which nothing is said."""
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(bert), device="cpu")
    theirs.prompts = {"query": "q: ", "passage": "p: "}
    theirs.default_prompt_name = "passage"
    theirs.save(str(tmp_path / "e5"))
    pooled = read_pooled(tmp_path / "e5")
    assert pooled.prompts == {"query": "q: ", "passage": "p: ", "document": "p: "} and pooled.default == "passage"
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": "what is 7?"}])
    for flags, want in (([], theirs.encode), (["--as=query"], theirs.encode_query)):
        assert main(["embed", str(tmp_path / "e5"), str(file), f"--out={tmp_path}/{len(flags)}.npy", *flags]) == 0
        np.testing.assert_allclose(np.load(tmp_path / f"{len(flags)}.npy"), want(["what is 7?"]), atol=1e-5)


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
    "kl": [
        {
            "query": f"{i}",
            "positive": f"{i}.",
            "negative": [f"no {i}"] * (1 + i % 2),
            "scores": [2.0, i % 3, 1.0][: 2 + i % 2],
        }
        for i in range(12)
    ],
}


def report_on(argv, folder, rows, held=None, contrast="infonce"):
    """check -> finding, of `jaxtune data` on rows."""
    file = write_jsonl(folder / "train.jsonl", rows)
    more = {"data__eval": held and write_jsonl(folder / "held.jsonl", held)}
    more |= {} if held else {"train__eval_every": None}
    given = argv(folder, data__train=file, objective__contrast=contrast, **more)
    config = [flag for flag in given if flag.startswith("--config")]
    assert main(["data", *config, f"--workdir={folder}", "--near=0"]) == 0
    report = json.loads((folder / "data_report.json").read_text())
    assert report["summary"]["rows_trained"] == len(rows)
    return {finding["check"]: finding for finding in report["findings"]}


def test_data_reports_on_texts_that_belong_together(argv, tmp_path):
    rows = [{"query": f"how do I reset number {i}?", "document": f"hold button {i}"} for i in range(30)]
    rows += [
        {"query": f"why does light {i} blink?", "document": "the battery  is LOW" if i else "The battery is low"}
        for i in range(10)
    ]
    rows += [
        {"query": "how do I reset number 3?", "document": "call us"},
        {"query": "the same", "document": "The  same"},
    ]
    rows += [{"query": "which?", "document": "this", "negative": ["that", "This"]}]
    rows = [{"negative": [], **row} for row in rows]
    held = [
        {"query": "what does 9 do?", "document": "hold button 9", "negative": []},
        {"query": "fresh", "document": "new", "negative": []},
    ]
    found = report_on(argv, tmp_path, rows, held)
    counts = {name: found[name]["count"] for name in found}
    wanted = {"shared_documents": 10, "several_documents": 2, "leaked_documents": 1, "same_texts": 1, "own_negative": 1}
    assert wanted.items() <= counts.items() and "conflicts" not in found
    assert found["own_negative"]["rows"] == [f"{tmp_path}/train.jsonl:43"]


def test_rows_meet_others_of_their_group_as_often_as_in_drawn_batches():
    size, rng = np.repeat([1, 3, 10], [27, 3, 10]), np.random.default_rng(0)
    group = np.r_[np.arange(27), [27] * 3, [28] * 10]
    meets = []
    for _ in range(4000):
        drawn = group[rng.permutation(40)[:8]]
        meets.append(np.mean([(drawn == g).sum() > 1 for g in drawn]))
    assert in_one_batch(size, 40, 8) == pytest.approx(np.mean(meets), abs=0.01)
    assert in_one_batch(size, 40, 1) == 0 and in_one_batch(np.full(40, 40), 40, 8) == 1


@pytest.mark.parametrize("contrast", ["cosent", "batch_hard", "kl"])
def test_data_reports_on_texts_with_labels(argv, tmp_path, contrast):
    """Labels are as wide as the longest list; a text with two classes, or a pair with two scores, is a conflict."""
    rows = [dict(row) for row in LOSSES[contrast]]
    if contrast == "kl":
        rows[5] |= {"negative": ["no", "nor"], "scores": [2.0, 1.0, 0.5]}
    else:
        rows.append(dict(rows[4], **({"score": 0.0} if contrast == "cosent" else {"label": "c0"})))
    found = report_on(argv, tmp_path, rows, contrast=contrast)
    assert ("conflicts" in found) == (contrast != "kl")


def test_lists_of_scores_are_as_wide_in_every_file_and_negatives_do_not_move_a_row(bert, tmp_path):
    tokenizer, each = data.load_tokenizer(str(bert)), LOSSES["kl"]
    files = [write_jsonl(tmp_path / f"{n}.jsonl", each[n::2]) for n in range(2)]  # two scores a row, then three
    fewer = [{**row, "negative": row["negative"][:1], "scores": row["scores"][:2]} for row in each]
    held = []
    for sources in (files, files[::-1], [write_jsonl(tmp_path / "fewer.jsonl", fewer)]):
        form = TextsForm("kl", CONTRASTS["kl"])
        train, rows, _ = data.prepare(tokenizer, list(map(str, sources)), labels=form, eval_fraction=0.4, max_length=48)
        assert {part.target.shape[1] for part in (*train, rows)} == {2 if len(sources) == 1 else 3}
        held.append({tokenizer.decode(rows[i][0][:4].tolist()) for i in range(len(rows))})
    assert held[0] == held[1] == held[2]


@pytest.mark.parametrize("contrast", LOSSES)
def test_every_form_of_rows_trains_and_is_measured(argv, tmp_path, contrast):
    """The held-out rows of lists have fewer negatives than those of training."""
    each = 2 if contrast in ("infonce", "kl") else 1
    file, held = (write_jsonl(tmp_path / f"{name}.jsonl", LOSSES[contrast][::n]) for name, n in (("a", 1), ("b", each)))
    given = {"data__train": file, "data__eval": held, "objective__contrast": contrast, "train__steps": 2}
    assert main(argv(tmp_path / "run", **given)) == 0
    assert main(["eval", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "eval.json").read_text())["held_out"]["metrics"]
    assert {"cosent": "spearman", "contrastive": "pearson", "triplet": "triplets"}.get(contrast, "mrr@10") in found
    assert contrast != "batch_hard" or {"v_measure", "probe"} <= found.keys()


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


# ----------------------------------------------------------------------------------------- beside sentence-transformers


def laid(embedder, rows, length=24):
    """A batch of pairs of texts as the step takes it, [1, B, 2, T], and what sentence-transformers is given of it."""
    tokens = np.zeros((1, len(rows), 2, length), np.int32)
    segments = np.zeros_like(tokens)
    for b, row in enumerate(rows):
        for s, ids in enumerate(embedder.tokens(row)):
            tokens[0, b, s, : len(ids)], segments[0, b, s, : len(ids)] = ids, 1
    batch = {
        **{"tokens": tokens, "segments": segments, "positions": np.arange(length, dtype=np.int32) + 0 * tokens},
        **{"there": segments[..., 0].astype(np.float32), "label": np.zeros((1, len(rows), 0), np.float32)},
        "same": np.arange(2 * len(rows), dtype=np.int32).reshape(1, -1, 2),
        "weights": np.ones((1, len(rows)), np.float32),
        "row": np.arange(len(rows), dtype=np.int32)[None],
    }
    import torch

    features = [
        {"input_ids": torch.tensor(tokens[0, :, s]).long(), "attention_mask": torch.tensor(segments[0, :, s])}
        for s in range(2)
    ]
    return batch, features


def step_of(embedder, loss, layers=False):
    """Our loss on all parameters of a model: (the parts of its tree, the loss)."""
    params = jax.tree.map(lambda x: x.astype("float32"), embedder.params)
    part = partition(params, jax.tree.map(lambda x: TRAIN, params))
    return part, embedding(embedder.module, embedder.pooled, loss, layers)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("widths", [None, (4, 16)])
def test_adaptive_layers_are_those_of_sentence_transformers(bert, widths):
    """Value and gradient of all parameters, of every layer in each step; with widths the 2D Matryoshka loss."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    from jaxtune.hf.export import hf_tensor
    from jaxtune.weights.leaf import weights_by_path

    embedder, theirs = open_embedder(bert), SentenceTransformer(str(bert), device="cpu")
    batch, features = laid(embedder, [tuple(row.values()) for row in pairs(0, 6)])
    part, loss_fn = step_of(embedder, adaptive(matryoshka(infonce, widths) if widths else infonce), layers=True)
    total, weight, grads = jax.jit(value_and_grad(loss_fn))(*part, batch, None)
    inner = losses.MultipleNegativesRankingLoss(theirs, scale=20.0)
    inner = losses.MatryoshkaLoss(theirs, inner, list(widths)) if widths else inner
    want = losses.AdaptiveLayerLoss(theirs, inner, n_layers_per_step=-1)(features, None)
    want.backward()
    assert float(total) / float(weight) == pytest.approx(float(want.detach()), rel=1e-5)
    found = dict(theirs[0].auto_model.named_parameters())
    leaves, names = weights_by_path(grads), models.names(embedder.module)
    for tensor in names.tensors(embedder.module.spec, set(leaves)):
        ours, wanted = hf_tensor(tensor, leaves, np.dtype("float32")) / float(weight), found[tensor.name].grad.numpy()
        np.testing.assert_allclose(ours, wanted, atol=1e-5 * max(1.0, np.abs(wanted).max()), err_msg=tensor.name)


@pytest.mark.filterwarnings("ignore")
def test_thirty_steps_are_those_of_sentence_transformers(bert):
    """The losses of 30 steps of AdamW on all parameters, with in-batch negatives: within 1e-4."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    embedder, theirs = open_embedder(bert), SentenceTransformer(str(bert), device="cpu")
    part, loss_fn = step_of(embedder, infonce)
    tx = optimizer("adamw", lr=2e-3, weight_decay=0.0, grad_clip=0.0)
    state = init_state(part.trainable, part.member, tx, jax.random.key(0))
    step = make_train_step(loss_fn, tx)
    loss = losses.MultipleNegativesRankingLoss(theirs, scale=20.0)
    adam = torch.optim.AdamW(theirs.parameters(), lr=2e-3, weight_decay=0.0)
    found = []
    for i in range(30):
        batch, features = laid(embedder, [tuple(row.values()) for row in pairs(8 * i, 8 * i + 8)])
        state, metrics = step(state, part.frozen, batch)
        adam.zero_grad()
        want = loss(features, None)
        want.backward()
        adam.step()
        found.append((float(metrics["loss"]), float(want.detach())))
    ours, wanted = np.array(found).T
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    assert wanted[-5:].mean() < wanted[:5].mean()


@pytest.mark.filterwarnings("ignore")
def test_mined_negatives_are_those_of_sentence_transformers_and_train(argv, bert, tmp_path, capsys):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    rows = [*pairs(0, 24), {"anchor": "what is 3?", "positive": "three"}]
    file, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "mined.jsonl"
    given = argv(tmp_path / "no", data__train=file, data__eval=None, train__eval_every=None)
    config = [flag for flag in given if flag.startswith("--config")]
    assert main(["data", *config, f"--mine-negatives={out}", "--negatives=2", "--margin=0.02"]) == 0
    mined = [json.loads(line) for line in out.read_text().splitlines()]
    theirs = mine_hard_negatives(
        *(Dataset.from_list(rows), SentenceTransformer(str(bert), device="cpu")),
        **{"relative_margin": 0.02, "num_negatives": 2, "range_max": 24, "output_format": "n-tuple", "verbose": False},
        query_prompt="q: ",
    )
    full = [row for row in mined if len(row["negative"]) == 2 and row["anchor"] != "what is 3?"]
    assert [(row["anchor"], *row["negative"]) for row in full] == [
        (row["anchor"], row["negative_1"], row["negative_2"]) for row in theirs if row["anchor"] != "what is 3?"
    ]  # of a query with two positives theirs takes the margin from the nearer one, ours from each row's own
    assert len(full) > 0 and all(row.keys() == {"anchor", "positive", "negative"} for row in mined)
    of_3 = next(row for row in mined if row["anchor"] == "what is 3?")
    assert "three" not in of_3["negative"]
    assert main(["data", *config, f"--mine-negatives={out}"]) == 2 and "exists" in capsys.readouterr().err
    again = argv(tmp_path / "run", data__train=out, data__eval=None, train__eval_every=None, train__steps=1)
    assert main(again) == 0


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


def test_clusters_and_probe_are_those_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import v_measure_score

    rng = np.random.default_rng(0)
    classes = rng.permutation(np.repeat(np.arange(4), 15))
    x = (rng.normal(size=(4, 6))[classes] + 0.9 * rng.normal(size=(60, 6))).astype(np.float32)
    fold, want = clusters.folds(classes), np.zeros(60, int)
    for one in range(clusters.FOLDS):
        here = fold == one
        assert np.bincount(classes[here], minlength=4).tolist() == [3] * 4
        want[here] = LogisticRegression(C=1.0, max_iter=1000).fit(x[~here], classes[~here]).predict(x[here])
    np.testing.assert_array_equal(clusters.probe(x, classes), want)
    assert 0.5 < (want == classes).mean() < 1
    for other in (rng.integers(0, 3, 60), classes, np.zeros(60, int), clusters.clusters(x, 4)):
        found = clusters.v_measure(np.stack([classes, other], 1))
        assert found == pytest.approx(v_measure_score(classes, other), abs=1e-12)
    apart = np.eye(4)[classes] * 9 + 0.1 * rng.normal(size=(60, 4))
    assert clusters.v_measure(np.stack([classes, clusters.clusters(apart, 4)], 1)) == pytest.approx(1)


def test_ranking_leaves_a_query_itself_out():
    x = np.eye(4, dtype=np.float32) + 0.1
    own = np.arange(4)
    found = rank(x, x, own, depth=10)
    assert found.shape == (4, 3) and not (found == own[:, None]).any()
    assert rank(x, x, np.full(4, -1))[:, 0].tolist() == own.tolist()


def test_classes_have_numbers_of_their_own():
    assert len({class_numbers(f"class {i}") for i in range(5000)}) == 5000
    assert all(np.float32(n) == n for n in class_numbers("card_arrival"))
