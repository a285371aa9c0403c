"""Classification from labelled files to a result that transformers loads: whole commands on a tiny BERT."""

import json
import re
import textwrap
import warnings

import numpy as np
import pytest
import small
import torch
from runs import compiled, write_jsonl  # noqa: F401
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from jaxtune import cli, data
from jaxtune.config import from_json, resolve
from jaxtune.config.recipe import experiment, open_model
from jaxtune.data.label_rows import LabelAssembler
from jaxtune.data.labels import LabelForm
from jaxtune.errors import UserError

AUTO = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
WORDS = ["red", "blue", "green", "big", "small", "car", "bus", "tree", "house", "sky", "very", "un", "##able"]
WORDS += ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]


def write_encoder(folder, **changes):
    """An HF directory of a random BERT whose tokenizer knows WORDS."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordPiece
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    special = [(token, vocab[token]) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    tokens = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **tokens).save_pretrained(folder)
    torch.manual_seed(0)
    config = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 24, "max_position_embeddings": 24, "initializer_range": 0.3, "pad_token_id": 14}
    BertModel(BertConfig(**config | changes)).eval().save_pretrained(folder)


def texts(first, last):
    """A text's label is its colour."""
    rng, rows = np.random.default_rng(first), []
    for i in range(first, last):
        colour = ("red", "blue", "green")[i % 3]
        others = rng.choice(["big", "small", "car", "bus", "very", "sky"], 1 + i % 5).tolist()
        rows.append({"text": " ".join([*others[:2], colour, *others[2:]]), "label": colour})
    return rows


def tagged(first, last):
    """Colours are tagged B-col, and what follows them I-col."""
    rows = []
    for row in texts(first, last):
        words = row["text"].split()
        at = words.index(row["label"])
        tags = ["B-col" if i == at else "I-col" if i == at + 1 else "O" for i in range(len(words))]
        rows.append({"tokens": words, "labels": tags})
    return rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "model").mkdir()
    write_encoder(folder / "model")
    write_jsonl(folder / "train.jsonl", texts(0, 48))
    write_jsonl(folder / "eval.jsonl", texts(48, 60))
    for name, rows in {"train": tagged(0, 48), "eval": tagged(48, 60)}.items():
        lines = ["\n".join(f"{w}\t{t}" for w, t in zip(row["tokens"], row["labels"])) for row in rows]
        (folder / f"{name}.conll").write_text("\n\n".join(lines) + "\n")
    return folder


def train(home, *flags, workdir=None, kind="sequence", train="train.jsonl", eval="eval.jsonl"):
    chosen = {
        "model.path": home / "model",
        "data.train": home / train,
        "data.eval": home / eval,
        "objective.name": f"{kind}_classification",
        "tune.method": "full",
        "optim.lr": 0.01,
        "train.steps": 30,
        "train.batch_size": 16,
        "train.eval_every": 30,
        "log.tensorboard": False,
        "log.progress": False,
    }
    argv = [f"--config.{path}={value}" for path, value in chosen.items() if not any(f"{path}=" in f for f in flags)]
    return cli.main(["train", *argv, *flags, f"--workdir={workdir}" if workdir else "--dry-run"])


def evaluations(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/loss" in line]


@pytest.mark.slow
def test_texts_are_learnt_and_transformers_agrees_on_each(home, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert train(home, workdir=tmp_path / "run") == 0, capsys.readouterr().err
    before, after = evaluations(tmp_path / "run")
    assert before["eval/accuracy"] < 0.7 and after["eval/accuracy"] == after["eval/macro_f1"] == 1.0
    assert after["eval/rows"] == 12 and "eval/perplexity" not in after
    folder = tmp_path / "run" / "model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = texts(48, 60)
    inputs = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        said = model(**inputs, labels=torch.tensor([model.config.label2id[row["label"]] for row in rows]))
    assert [model.config.id2label[i] for i in said.logits.argmax(-1).tolist()] == [row["label"] for row in rows]
    assert float(said.loss) == pytest.approx(after["eval/loss"], rel=1e-3)
    assert "AutoModelForSequenceClassification" in (folder / "README.md").read_text()

    # A second run goes on from the labels and the head of the first.
    capsys.readouterr()
    more = tmp_path / "more"
    assert train(home, f"--config.model.path={folder}", "--config.train.steps=1", workdir=more) == 0
    assert evaluations(more)[0]["eval/accuracy"] == 1.0


def pairs(first, last):
    """Whether two texts have the same colour."""
    rows = []
    for row, other in zip(texts(first, last), texts(first + 1, last + 1)):
        second = other if len(rows) % 2 else row
        label = "same" if row["label"] == second["label"] else "other"
        rows.append({"sentence1": row["text"], "sentence2": f"very {second['text']}", "label": label})
    return rows


@pytest.mark.parametrize("method", ["head", pytest.param("full", marks=pytest.mark.slow)])
def test_pairs_of_texts_from_training_to_a_result_that_transformers_agrees_with(method, home, tmp_path, capsys):
    """Token types reach the step, the features that are kept, the evaluation, the export and `jaxtune eval`."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    write_jsonl(tmp_path / "train.jsonl", pairs(0, 48))
    write_jsonl(tmp_path / "eval.jsonl", rows := pairs(48, 60))
    files = [f"--config.data.{split}={tmp_path}/{split}.jsonl" for split in ("train", "eval")]
    flags = [*files, f"--config.tune.method={method}", "--config.train.steps=8", "--config.train.eval_every=8"]
    assert train(home, *flags, "--config.train.cache_features=auto", workdir=tmp_path / "run") == 0, capsys.readouterr()
    after = evaluations(tmp_path / "run")[-1]
    folder = tmp_path / "run" / "model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts_of = [[row[side] for row in rows] for side in ("sentence1", "sentence2")]
    inputs = tokenizer(*texts_of, padding=True, return_tensors="pt")
    assert inputs["token_type_ids"].max() == 1
    with torch.no_grad():
        said = model(**inputs, labels=torch.tensor([model.config.label2id[row["label"]] for row in rows]))
        inputs["token_type_ids"][:] = 0
        blind = model(**inputs).logits
    assert float(said.loss) == pytest.approx(after["eval/loss"], rel=1e-3)
    assert (said.logits - blind).abs().max() > 1e-3  # the types say something
    accuracy = np.mean([model.config.id2label[i] == r["label"] for i, r in zip(said.logits.argmax(-1).tolist(), rows)])
    assert after["eval/accuracy"] == pytest.approx(accuracy)
    recipe = experiment(from_json((tmp_path / "run" / "config.json").read_text())).recipe
    assert "types" in recipe.task.batch_like(recipe.batch)  # what `jaxtune plan` counts
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "eval.json").read_text())["held_out"]["metrics"]
    assert found["loss"]["tuned"]["value"] == pytest.approx(float(said.loss), rel=1e-3)
    assert found["accuracy"]["tuned"]["value"] == pytest.approx(accuracy)


def test_tags_are_learnt_by_lora_and_the_adapter_holds_the_head(home, tmp_path, capsys):
    flags = ("--config.tune.method=lora", "--config.optim.lr=0.03", "--config.tune.lora.r=4")
    files = {"train": "train.conll", "eval": "eval.conll"}
    assert train(home, *flags, workdir=tmp_path / "run", kind="token", **files) == 0, capsys.readouterr().err
    before, after = evaluations(tmp_path / "run")
    assert after["eval/entity_f1"] > 0.9 > before["eval/entity_f1"]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("TOKEN_CLS", ["classifier"])


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_a_run_with_a_label_head_is_exported_and_loads_as_it_says(kind, home, tmp_path, capsys, monkeypatch):
    """`jaxtune export RUN OUT`, merged and --adapter, and the lines that `train` prints, with three labels."""
    import jaxtune

    flags = ("--config.tune.method=lora", "--config.tune.lora.r=2", "--config.train.steps=1")
    files = {"train": "train.conll", "eval": "eval.conll"} if kind == "token" else {}
    run = tmp_path / "run"
    assert train(home, *flags, workdir=run, kind=kind, **files) == 0, capsys.readouterr().err
    printed = re.findall(r"load it with (\w+):\n((?:  .*\n|\n)+)", capsys.readouterr().out)
    assert [library for library, _ in printed] == ["peft", "jaxtune"]
    for flag, name in ((), "merged"), (("--adapter",), "adapter"):
        assert cli.main(["export", str(run), str(tmp_path / name), *flag]) == 0, capsys.readouterr().err
    auto = AUTO[kind].from_pretrained(tmp_path / "merged").eval()
    tokens = np.array([[15, 0, 3, 4, 16], [15, 1, 10, 8, 16]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and transformers tell of new heads
        loaded = [textwrap.dedent(code) for _, code in printed]
        loaded = [exec(code, names := {}) or names for code in loaded]
    with torch.no_grad():
        expected = auto(torch.tensor(tokens)).logits.numpy()
        theirs = loaded[0]["model"].eval()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(theirs, expected, atol=1e-5)
    names = {row["label"] for row in texts(0, 3)} if kind == "sequence" else {"O", "B-col", "I-col"}
    assert set(auto.config.id2label.values()) == set(loaded[0]["model"].config.id2label.values()) == names
    ours = [(loaded[1]["module"], loaded[1]["params"])]
    ours += [jaxtune.load(folder) for folder in (tmp_path / "merged", tmp_path / "adapter", run / "adapter")]
    for module, params in ours:
        assert set(module.labels.names) == names
        got = module.apply({"params": params}, tokens.astype(np.int32))
        np.testing.assert_allclose(got, expected, atol=1e-5)


SEQUENCE_ERRORS = {
    "labels outside the config's": (
        ["--config.objective.labels=red,blue"],
        {},
        "label 'green' is not one of the 2 labels",
    ),
    "an unknown label in evaluation data": ([], {"label": "grey"}, "eval.jsonl:1: label 'grey' is not one of the 3"),
    "no label column": (["--config.data.columns=label=class"], {}, "no column 'class'"),
    "a column that is not ours": (
        ["--config.data.columns=prompt=text"],
        {},
        "'prompt' is not a column that jaxtune knows",
    ),
    "a label that is none": ([], {"label": None}, "eval.jsonl:1: column 'label' is null; expected a label"),
    "a text that is none": ([], {"text": 3}, "eval.jsonl:1: column 'text' is a number, expected text"),
    "a value that is none": (["--config.objective.problem_type=regression"], {}, "a regression needs a number"),
    "several labels as one": (
        ["--config.objective.problem_type=multi_label_classification"],
        {},
        "must be a list of labels",
    ),
    "too few weights": (["--config.objective.class_weights=1,2"], {}, "has 2 numbers for 3 labels"),
    "a label without rows": (
        ["--config.objective.class_weights=balanced", "--config.objective.labels=red,blue,green,grey"],
        {},
        "no row with the label 'grey'",
    ),
    "an encoder that should go on writing": (
        ["--config.objective.name=causal_lm"],
        {},
        "model_type='bert') is an encoder",
    ),
    "rows in pieces": (["--config.data.overlength=split"], {}, "data.overlength=split has no meaning"),
}


@pytest.mark.parametrize("case", SEQUENCE_ERRORS)
def test_bad_input_is_named_before_anything_is_compiled(case, home, tmp_path, capsys):
    flags, change, said = SEQUENCE_ERRORS[case]
    write_jsonl(tmp_path / "eval.jsonl", [texts(48, 49)[0] | change])
    assert train(home, *flags, f"--config.data.eval={tmp_path}/eval.jsonl") == 2
    assert said in capsys.readouterr().err


def test_data_of_one_class(home, tmp_path, capsys):
    write_jsonl(tmp_path / "one.jsonl", [row for row in texts(0, 12) if row["label"] == "red"])
    assert train(home, f"--config.data.train={tmp_path}/one.jsonl") == 2
    assert "data.train has only the label 'red'" in capsys.readouterr().err
    assert train(home, f"--config.data.train={tmp_path}/one.jsonl", "--config.objective.labels=red,blue,green") == 2
    assert "every row has the same label, 'red'" in capsys.readouterr().err


def test_bad_tags(home, tmp_path, capsys):
    write_jsonl(tmp_path / "eval.jsonl", [{"tokens": ["red", "car"], "labels": ["O"]}])
    files = {"kind": "token", "train": "train.conll"}
    assert train(home, f"--config.data.eval={tmp_path}/eval.jsonl", **files) == 2
    assert "eval.jsonl:1: 2 tokens, but 1 labels" in capsys.readouterr().err
    (tmp_path / "eval.conll").write_text("red\tB-col\ncar\n")
    assert train(home, f"--config.data.eval={tmp_path}/eval.conll", **files) == 2
    assert "eval.conll:2: expected a word and its label, found 'car'" in capsys.readouterr().err
    assert train(home, "--config.objective.pooling=mean", eval="eval.conll", **files) == 2
    assert "objective.pooling has no effect" in capsys.readouterr().err


# --- rows and batches


def tokenizer_of(home):
    return data.load_tokenizer(str(home / "model"))


def prepared(home, rows, form, tmp_path, **settings):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = {"max_length": 24, "cache_dir": tmp_path / "cache"} | settings
    [read], _, _ = data.prepare(tokenizer_of(home), str(tmp_path / "rows.jsonl"), labels=form, **settings)
    return read


def test_only_the_first_piece_of_a_word_has_its_tag(home, tmp_path):
    form = LabelForm(per_token=True, names=("O", "B-x"))
    rows = [{"tokens": ["very", "unable", "car"], "labels": ["O", "B-x", "O"]}] * 2
    tokens, marks = prepared(home, rows, form, tmp_path)[1]
    assert [WORDS[i] for i in tokens] == ["[CLS]", "very", "un", "##able", "car", "[SEP]"]
    assert marks.tolist() == [0, 1, 2, 0, 1, 0]


def test_a_row_that_is_cut_short_still_ends_as_the_tokenizer_ends_it(home, tmp_path):
    form = LabelForm(per_token=False, names=("a", "b"))
    rows = [{"text": "red blue green car bus", "label": "a"}, {"text": "red blue", "label": "b"}]
    read = prepared(home, rows, form, tmp_path, max_length=5, overlength="truncate")
    assert [[WORDS[i] for i in read[j][0]] for j in (0, 1)] == [
        ["[CLS]", "red", "blue", "green", "[SEP]"],
        ["[CLS]", "red", "blue", "[SEP]"],
    ]
    again = prepared(home, rows, form, tmp_path, max_length=24)  # from the cache, whole
    assert len(again[0][0]) == 7


def test_batches_of_several_labels_and_of_values(home, tmp_path):
    form = LabelForm(per_token=False, names=("a", "b", "c"), several=True)
    rows = [{"text": "red", "label": ["c", "a"]}, {"text": "blue sky", "label": []}]
    read = prepared(home, rows, form, tmp_path)
    batch = data.EvalBatches(read, batch_size=4, max_length=24, assembler=LabelAssembler).batch(0)
    assert batch["label"].tolist() == [[[1, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]]
    assert batch["weights"].tolist() == [[1, 1, 0, 0]]
    assert batch["segments"].sum(-1).tolist() == [[3, 4, 0, 0]]

    form = LabelForm(per_token=False, names=("score",), value=True)
    read = prepared(home, [{"text": "red", "label": 2.5}, {"text": "blue", "label": -1}], form, tmp_path)
    assert read.target.tolist() == [[2.5], [-1.0]]


def test_ids_instead_of_names(home, tmp_path):
    form = LabelForm(per_token=False, names=("a", "b"))
    read = prepared(home, [{"text": "red", "label": 1}, {"text": "blue", "label": 0}], form, tmp_path)
    assert read.target.tolist() == [[1.0], [0.0]]
    with pytest.raises(UserError, match="'2' is not one of the 2 labels"):
        prepared(home, [{"text": "red", "label": 2}, {"text": "blue", "label": 0}], form, tmp_path)
    stars = LabelForm(per_token=False, names=("1", "2", "3"))  # numbers that are names
    read = prepared(home, [{"text": "red", "label": 1}, {"text": "blue", "label": 3}], stars, tmp_path)
    assert read.target.tolist() == [[0.0], [2.0]]
    with pytest.raises(UserError, match="'0' is not one of the 3 labels"):
        prepared(home, [{"text": "red", "label": 0}, {"text": "blue", "label": 1}], stars, tmp_path)


def test_balanced_weights_are_scikit_learns(home):
    flags = {"model.path": home / "model", "data.train": home / "train.jsonl", "objective.class_weights": "balanced"}
    flags |= {"objective.name": "sequence_classification", "tune.method": "head"}
    cfg = resolve(flags={path: str(value) for path, value in flags.items()})
    from jaxtune.data.label_counts import count_labels
    from jaxtune.objectives import labels

    form = open_model(cfg)[1].form
    assert form.names == ("blue", "green", "red")
    counted = count_labels([data.read(str(home / "train.jsonl"))], form)
    counted.labels["red"] += 16  # 16, 16, 32
    assert labels._class_weights("balanced", form, counted) == pytest.approx((64 / 48, 64 / 48, 64 / 96))


@pytest.mark.slow
def test_a_decoder_is_a_classifier_by_its_last_token(home, tmp_path, capsys):
    from runs import write_model

    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model")
    flags = [f"--config.model.path={tmp_path}/model", "--config.train.steps=2", "--config.tune.method=head"]
    assert train(home, *flags, workdir=tmp_path / "run") == 0, capsys.readouterr().err
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path / "run" / "model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = texts(48, 60)
    inputs = tokenizer([row["text"] for row in rows], padding=True, padding_side="right", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        loss = model(**inputs, labels=torch.tensor([model.config.label2id[row["label"]] for row in rows])).loss
    assert float(loss) == pytest.approx(evaluations(tmp_path / "run")[-1]["eval/loss"], rel=1e-3)
    assert small.CONFIG["hidden_size"] == model.score.in_features
