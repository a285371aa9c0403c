"""`jaxtune init`: what it makes of a file, and that the config it writes is one that training takes."""

import ast
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_classification_runs import texts, write_encoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import jaxtune
from jaxtune import cli, config, data
from jaxtune.commands.init import read_model
from jaxtune.errors import UserError
from jaxtune.run import propose
from jaxtune.run.recognise import open_source, recognise

POSITIONS = 256


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model directory whose tokenizer makes a token of each byte; of its weights the narrowest matrix is there."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 257,
        "max_position_embeddings": POSITIONS,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({"model.layers.0.self_attn.k_proj.weight": np.zeros((8, 16), np.float32)}, folder / "model.safetensors")
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(n, start=0):
    return [{"question": f"What is {i}?", "answer": str(i)} for i in range(start, start + n)]


def init(model, file, *more):
    return cli.main(["init", f"--model={model}", f"--data={file}", *more])


def written(path="config.py"):
    overrides, source = config.load_file(str(path))
    return config.resolve(overrides, source=source)


# ---------------------------------------------------------------------------------------------- the written file


def test_a_written_config_resolves_to_what_the_file_holds(model, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", pairs(100))
    assert init(model, file) == 0
    cfg = written()
    assert cfg.model.path == str(model)
    assert cfg.data.train == (str(file),)
    assert dict(cfg.data.columns) == {"prompt": "question", "completion": "answer"}
    assert cfg.data.format == "prompt_completion"
    assert cfg.tune.method == "lora"
    assert cfg.tune.lora.target_modules == "all-linear"
    assert (cfg.tune.lora.r, cfg.tune.lora.lora_alpha) == (8, 16)  # no more than the narrowest matrix

    _, held_out, report = data.prepare(
        data.load_tokenizer(cfg.model.tokenizer),
        cfg.data.train,
        eval_fraction=cfg.data.eval_fraction,
        format=cfg.data.format,
        columns=cfg.data.columns,
        max_length=cfg.data.max_length,
        overlength=cfg.data.overlength,
    )
    assert len(held_out) == 20  # where 5% would be fewer
    assert report.train_rows == 80

    shown = capsys.readouterr().out
    steps = math.ceil(cfg.train.epochs * 80 / cfg.train.batch_size)
    assert f"{steps} steps of {cfg.train.batch_size} rows" in shown
    assert shown.count("⟦") == 2  # two rows, of which the answers are trained
    answers = [part.partition("⟧")[0] for part in shown.split("⟦")[1:]]
    assert all(answer.removesuffix("</s>").isdigit() and answer.endswith("</s>") for answer in answers)


def test_training_takes_the_written_config(model, tmp_path):
    assert init(model, write(tmp_path / "rows.jsonl", pairs(30))) == 0
    train = ["train", "--config=config.py", "--config.model.init=random", "--dry-run"]
    assert cli.main(train) == 0


def test_the_docstring_holds_the_command_and_the_file_imports_only_ml_collections(model, tmp_path):
    assert init(model, write(tmp_path / "my rows.jsonl", pairs(30)), "--out=sub folder/c.py") == 0
    tree = ast.parse((tmp_path / "sub folder" / "c.py").read_text())
    assert "jaxtune train --config='sub folder/c.py' --workdir=runs/c" in ast.get_docstring(tree)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in imports] == ["ml_collections"]


@pytest.mark.parametrize("name", ['a"""b\\n.jsonl', "a,b.jsonl", "it's \\ {x}.jsonl"])
def test_any_file_name_survives_in_the_config(model, tmp_path, name):
    file = write(tmp_path / name, pairs(30))
    assert init(model, file, "--out=c.py") == 0
    assert written("c.py").data.train == (str(file),)


def _environment():
    return os.environ | {"PYTHONPATH": str(Path(jaxtune.__file__).parents[1])}


# ---------------------------------------------------------------------------------------------- lengths, settings


def test_the_length_is_the_99th_percentile_rounded_up_and_what_is_dropped_is_said(model, tmp_path, capsys):
    # Tokens of a row: the bytes, a newline between them, EOS.
    rows = [{"prompt": "p" * 30, "completion": "c" * 18}] * 197 + [{"prompt": "p", "completion": "c" * 200}] * 1
    rows = [{**row, "prompt": f"{i:03}{row['prompt']}"} for i, row in enumerate(rows)]  # 53 tokens, one of 206
    assert init(model, write(tmp_path / "rows.jsonl", rows)) == 0
    assert written().data.max_length == 64
    assert "1 over 64 tokens dropped" in capsys.readouterr().out
    assert "at most 206; 1 of 198 rows" in (tmp_path / "config.py").read_text()


def test_the_length_is_at_most_the_positions_of_the_model(model, tmp_path, capsys):
    rows = [{"prompt": f"{i}", "completion": "c" * (100 if i % 2 else 300)} for i in range(240)]
    assert init(model, write(tmp_path / "rows.jsonl", rows)) == 0
    assert written().data.max_length == POSITIONS
    shown = capsys.readouterr().out
    assert "50% of the rows are longer than the model's 256 positions and are dropped" in shown
    assert "evaluation: 24 rows" in shown  # a fifth of the 120 that are left


@pytest.mark.parametrize("lengths", [[5], [33] * 10, [100] * 99 + [5000], list(range(1, 2000))])
def test_max_length_keeps_99_rows_of_100_where_the_model_can(lengths):
    lengths = np.array(lengths)
    length = propose.max_length(lengths, positions=4096)
    assert (lengths <= length).mean() >= 0.99
    assert length % 32 == 0
    assert (lengths <= length - 32).mean() < 0.99


def test_plain_text_is_packed_and_split_and_all_weights_of_a_small_model_are_trained(model, tmp_path):
    file = tmp_path / "stories.txt"
    file.write_text("\n\n".join(f"Story {i}. " + "It went on. " * 40 for i in range(40)))
    assert init(model, file) == 0
    cfg = written()
    assert (cfg.tune.method, cfg.data.format, cfg.data.packing, cfg.data.overlength) == ("full", "text", True, "split")
    assert cfg.data.max_length == POSITIONS
    assert cfg.train.epochs == 1


def test_the_rate_follows_the_width_and_the_method():
    assert propose.learning_rate("lora", 4096) == propose.learning_rate("lora", 2048) == 2e-4
    assert propose.learning_rate("lora", 1024) == 4e-4
    assert propose.learning_rate("full", 1024) == 2e-5


@pytest.mark.parametrize("rows", [0, 19, 20, 57, 100, 399, 1000, 19_999, 50_000, 3_000_000])
def test_the_evaluation_share(rows):
    held = propose.eval_fraction(rows) * rows
    assert (held > 0) == (rows >= 20)
    assert held <= min(0.2 * rows, 1000)
    if rows >= 100:
        assert held >= 19  # the share is rounded to one digit


# ---------------------------------------------------------------------------------------------- the evaluation file


def test_a_validation_file_beside_the_data_is_taken_before_a_test_file(model, tmp_path):
    file = write(tmp_path / "gsm_train.jsonl", pairs(30))
    write(tmp_path / "gsm_test.jsonl", pairs(5, 100))
    valid = write(tmp_path / "gsm_valid.jsonl", pairs(5, 200))
    assert init(model, file) == 0
    assert written().data.eval == (str(valid),)
    assert written().data.eval_fraction == 0


def test_a_test_file_with_training_rows_in_it_is_used_with_a_warning(model, tmp_path, capsys):
    file = write(tmp_path / "train.jsonl", pairs(30))
    test = write(tmp_path / "test.jsonl", pairs(5, 27))
    assert init(model, file) == 0
    assert written().data.eval == (str(test),)
    shown = capsys.readouterr().out
    assert "3 of the 5 evaluation rows are also among the training rows" in shown
    assert "so it is no test" in shown


def test_a_test_file_with_other_columns_is_left_alone(model, tmp_path, capsys):
    file = write(tmp_path / "train.jsonl", pairs(30))
    write(tmp_path / "test.jsonl", [{"question": "no answer"}])
    assert init(model, file) == 0
    assert written().data.eval is None
    assert written().data.eval_fraction == 0.2
    assert "test.jsonl lies beside it but is not read the same way" in capsys.readouterr().out


def test_a_few_rows_are_all_trained(model, tmp_path, capsys):
    assert init(model, write(tmp_path / "rows.jsonl", pairs(5))) == 0
    assert written().data.eval_fraction == 0
    assert "5 rows are too few" in capsys.readouterr().out


def test_no_training_file_is_taken_for_evaluation(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "retrain.jsonl"):
        write(tmp_path / name, pairs(1))
    assert propose.siblings("train.jsonl") == ["test.jsonl"]
    assert propose.siblings("test.jsonl") == []
    assert propose.siblings("retrain.jsonl") == ["test.jsonl"]


# ---------------------------------------------------------------------------------------------- recognising rows

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIR = "prompt_completion"


@pytest.mark.parametrize(
    ("row", "format", "columns"),
    [
        ({"messages": MESSAGES}, "chat", {}),
        ({"dialog": MESSAGES, "id": 1}, "chat", {"messages": "dialog"}),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sharegpt", {}),
        ({"prompt": "a", "completion": "b"}, PAIR, {}),
        ({"answer": "b", "question": "a"}, PAIR, {"prompt": "question", "completion": "answer"}),
        ({"Input": "a", "Output": "b"}, PAIR, {"prompt": "Input", "completion": "Output"}),
        ({"query": "a", "response": "b"}, PAIR, {"prompt": "query", "completion": "response"}),
        ({"text": "a", "label": "b"}, PAIR, {"prompt": "text", "completion": "label"}),
        ({"text": "a", "label": 1}, PAIR, {"prompt": "text", "completion": "label"}),
        ({"instruction": "a", "input": "", "output": "b", "text": "ab"}, "instruction", {}),
        (
            {"instruction": "a", "context": "c", "response": "b", "category": "d"},
            "instruction",
            {"input": "context", "output": "response"},
        ),
        ({"text": "a", "url": "b"}, "text", {}),
        (
            {"question": "a", "document": "c", "answer": "b"},
            "instruction",
            {"instruction": "question", "input": "document", "output": "answer"},
        ),
        ({"document": "a", "summary": "b"}, PAIR, {"prompt": "document", "completion": "summary"}),
        ({"source": "web", "text": "a", "summary": "b"}, PAIR, {"prompt": "text", "completion": "summary"}),
        ({"source": "a", "target": "b"}, PAIR, {"prompt": "source", "completion": "target"}),
        ({"Text": "a"}, "text", {"text": "Text"}),
    ],
)
def test_columns_are_known_by_their_names(tmp_path, row, format, columns):
    layout = recognise(data.read(str(write(tmp_path / "rows.jsonl", [row, row]))))
    assert (layout.format, layout.columns) == (format, columns)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "id": 1}, "prompts ('prompt') without answers"),
        ({"turns": ["a", "b"], "category": "c"}, "prompts ('turns') without answers"),
        ({"question": [[MESSAGES[0]]], "function": []}, "prompts ('question') without answers"),
        ({"question": "a", "answer": {"text": ["b"]}}, "column 'answer' is an object, expected text"),
        ({"body": "a"}, "--columns=text=body"),
        ({"x": "a", "y": "b"}, "--columns=prompt=THEIRS,completion=THEIRS"),
    ],
)
def test_rows_that_cannot_be_tuned_on_are_named(tmp_path, row, said):
    file = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as error:
        recognise(data.read(str(file)))
    assert said in str(error.value)
    assert f"{file}:1: " in str(error.value)


@pytest.mark.parametrize(
    ("row", "format", "columns"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", {}),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "preference", {"prompt": "question"}),
        ({"prompt": "a", "preferred": "b", "Dispreferred": "c"}, "preference",
         {"chosen": "preferred", "rejected": "Dispreferred"}),
        ({"messages": MESSAGES, "label": True}, "kto", {}),
        ({"prompt": "a", "completion": "b", "label": False}, "kto", {}),
    ],
)  # fmt: skip
def test_judged_rows_are_recognised(tmp_path, row, format, columns):
    layout = recognise(data.read(str(write(tmp_path / "rows.jsonl", [row]))))
    assert (layout.format, dict(layout.columns)) == (format, columns)


def test_one_side_of_pairs_may_be_tuned_on(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    layout = recognise(data.read(str(file)), {"prompt": "prompt", "completion": "chosen"})
    assert layout.format == "prompt_completion"


def test_named_columns_are_used(model, tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"x": f"{i}", "y": f"{i * i}"} for i in range(30)])
    assert init(model, file, "--columns=prompt=x,completion=y") == 0
    assert dict(written().data.columns) == {"prompt": "x", "completion": "y"}


def test_what_is_not_used_is_named_once(encoder, model, tmp_path, capsys):
    rows = [{"id": i, "source": "x", **row} for i, row in enumerate(pairs(30))]
    assert init(model, write(tmp_path / "rows.jsonl", rows)) == 0
    said = capsys.readouterr().out
    assert said.count("not used") == 1 and "source (30)" in said
    rows = [{"id": i, "source": "x", **row} for i, row in enumerate(texts(0, 30))]
    assert init(encoder, write(tmp_path / "labels.jsonl", rows), "--out=labels.py") == 0
    said = capsys.readouterr().out
    assert said.count("not used") == 1 and "id, source" in said


TALK = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "thinking": "two twos"}]
SHORT = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("row", "flags", "settings"),
    [
        ({"messages": TALK}, ["data.allow_left_out=thoughts"], {"data.allow_left_out": ("thoughts",)}),
        ({"messages": [{"role": "customer", "content": "a"}, TALK[1]]}, ["data.roles=customer=user"], {}),
        ({"prompt": "a", "completion": "b", "images": ["x"]}, ["data.ignore=images"], {"data.ignore": ("images",)}),
        ({"text": "a", "summary": "b"}, ["data.format=text"], {"data.format": "text"}),
        ({"a": "b", "c": "d"}, ["data.template={a}: {c}"], {"data.template": "{a}: {c}"}),
        ({"prompt": "a", "completion": "b"}, ["train.steps=7", "tune.method=full"], {"train.steps": 7}),
    ],
)
def test_settings_that_are_given_are_used_and_written(model, tmp_path, row, flags, settings):
    (tmp_path / "t.jinja").write_text(SHORT)
    flags = [f"model.chat_template={tmp_path / 't.jinja'}", *flags] if "messages" in row else flags
    flags = [*flags, "data.allow_left_out=thoughts"] if "roles" in flags[-1] else flags
    assert init(model, write(tmp_path / "rows.jsonl", [row] * 4), *(f"--config.{flag}" for flag in flags)) == 0
    cfg = written()
    for path, value in settings.items():
        section, _, key = path.partition(".")
        assert cfg[section][key] == value


def test_settings_that_have_flags_of_their_own_are_refused(model, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", pairs(30))
    assert init(model, file, "--config.data.columns=prompt=question,completion=answer") == 2
    assert "here it is --columns=prompt=question,completion=answer" in capsys.readouterr().err


def test_a_marker_before_every_answer_is_found(model, tmp_path):
    rows = [{"text": f"Q: {i}?\nA: {i}"} for i in range(30)]
    assert init(model, write(tmp_path / "rows.jsonl", rows)) == 0
    assert written().data.completion_from == "\nA:"
    assert not written().data.packing


@pytest.mark.parametrize(
    ("asks", "answers"),
    [
        ("### Human:", "### Assistant:"),
        ("\nUser:", "\nAssistant:"),
        ("[INST]", "[/INST]"),
        ("<|user|>", "<|assistant|>"),
    ],
)
def test_a_conversation_in_one_text_is_trained_on_one_side(model, tmp_path, capsys, asks, answers):
    rows = [{"text": "".join(f"{asks} {j}?{answers} {j}." for j in range(1 + i % 3))} for i in range(30)]
    assert init(model, write(tmp_path / "rows.jsonl", rows)) == 0
    assert (written().data.completion_from, written().data.prompt_from) == (answers.strip(), asks.strip())
    said = capsys.readouterr().out
    assert f"{answers}⟦ 0.⟧{asks} 1?{answers}⟦ 1.</s>⟧" in said or f"{answers}⟦ 0.\n⟧{asks.strip()} 1?" in said


@pytest.mark.parametrize("odd", ["no answer", "Q\nA: 1\nA: 2"])
def test_a_marker_that_is_not_once_in_every_text_is_none(tmp_path, odd):
    rows = [{"text": f"Q: {i}?\nA: {i}"} for i in range(30)] + [{"text": odd}]
    assert recognise(data.read(str(write(tmp_path / "rows.jsonl", rows)))).completion_from is None


def test_a_column_of_few_labels_is_an_objective_of_its_own(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("message,topic\n" + "".join(f"t{i},{i % 3}\n" for i in range(9)))
    layout = recognise(data.read(str(file)))
    assert str(layout) == "sequence_classification, text=message, label=topic"
    assert layout.labels.names == ("0", "1", "2")
    assert "'topic' has 3 labels" in layout.notes[0]
    command = layout.notes[1].partition("--columns=")[2]
    pair = recognise(data.read(str(file)), dict(p.split("=") for p in command.split(",")))
    assert str(pair) == "prompt_completion, prompt=message, completion=topic"
    assert "the labels are numbers" in " ".join(pair.notes)


@pytest.mark.parametrize("labels", [[f"{i}" for i in range(20)], ["one"] * 20])
def test_a_column_that_holds_no_labels_is_an_answer(tmp_path, labels):
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    assert recognise(data.read(str(write(tmp_path / "rows.jsonl", rows)))).labels is None


def test_tagged_words_are_an_objective_of_their_own(tmp_path):
    (tmp_path / "train.conll").write_text("Two\tO\nmugs\tB-item\n\nblue\tO\n")
    assert recognise(data.read(str(tmp_path / "train.conll"))).labels.names == ("O", "B-item")
    file = write(tmp_path / "rows.jsonl", [{"words": ["a", "b"], "ner_tags": [0, 1]}])
    layout = recognise(data.read(str(file)))
    assert str(layout) == "token_classification, tokens=words, labels=ner_tags"


def recognised(tmp_path, rows, columns=None):
    return recognise(data.read(str(write(tmp_path / "rows.jsonl", rows))), columns)


def many(**columns):
    """30 rows: texts with a number in place of {i}, and of a pair of values one after the other."""
    return [{k: v[i % 2] if isinstance(v, tuple) else v.format(i=i) for k, v in columns.items()} for i in range(30)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            many(question="q{i}", sentence="s", label=(0, 1)),
            "sequence_classification, text=question, text_pair=sentence",
        ),
        (
            many(premise="p{i}", hypothesis="h", gold_label=("no", "yes")),
            "sequence_classification, text=premise, text_pair=hypothesis, label=gold_label",
        ),
        (many(text="t{i}", text_pair="u", label=(0, 1)), "sequence_classification"),
        (many(text="t{i}", labels=("pos", "neg")), "sequence_classification, label=labels"),
        (many(text="t{i}", rating=(1, 5)), "sequence_classification, label=rating"),
        (
            many(question="q{i}", context="c{i}", answer="a{i}"),
            "instruction, instruction=question, input=context, output=answer",
        ),
        (
            many(id="x", system_prompt="s{i}", question="q{i}", response="r{i}"),
            "instruction, instruction=question, output=response, system=system_prompt",
        ),
    ],
)
def test_what_a_person_would_propose(tmp_path, rows, said):
    assert str(recognised(tmp_path, rows)) == said


@pytest.mark.parametrize(
    ("labels", "names", "problem"),
    [
        ([["a", "b"], ["b"]], ("a", "b"), "multi_label_classification"),
        ([[1, 0, 1], [0, 1, 0]], ("LABEL_0", "LABEL_1", "LABEL_2"), "multi_label_classification"),
        ([0.5, 0.25], ("LABEL_0",), "regression"),
        ([3, 3.8], ("LABEL_0",), "regression"),
        (["a", "b"], ("a", "b"), None),
    ],
)
def test_labels_of_every_kind_are_an_objective(encoder, tmp_path, labels, names, problem):
    rows = [{"text": f"a {i} car", "label": labels[i % 2]} for i in range(30)]
    layout = recognised(tmp_path, rows)
    assert (layout.labels.names, layout.problem) == (names, problem)
    assert init(encoder, tmp_path / "rows.jsonl") == 0
    assert written().objective.problem_type == problem or problem is None


def test_a_labelled_file_is_never_trained_as_plain_text(tmp_path):
    for label in ({"x": 1}, None):
        with pytest.raises(UserError, match="cannot be read as labels"):
            recognised(tmp_path, [{"text": f"t{i}", "labels": label} for i in range(30)])


def test_the_models_labels_are_kept_where_the_data_has_them(encoder, tmp_path, capsys):
    folder = tmp_path / "fine-tuned"
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "neg", "1": "pos", "2": "other"}}
    (folder / "config.json").write_text(json.dumps(config))
    write(tmp_path / "names.jsonl", [{"text": f"a {i} car", "label": ("pos", "neg")[i % 2]} for i in range(30)])
    write(tmp_path / "ids.jsonl", [{"text": f"a {i} car", "label": i % 2} for i in range(30)])
    for name in ("names", "ids"):
        assert init(folder, f"{name}.jsonl", f"--out={name}.py") == 0
        assert written(f"{name}.py").objective.labels is None
    assert "ids: 0 = neg, 1 = pos" in capsys.readouterr().out
    write(tmp_path / "stars.jsonl", [{"text": f"a {i} car", "label": 1 + i % 2} for i in range(30)])
    assert init(folder, "stars.jsonl", "--out=stars.py") == 0
    assert written("stars.py").objective.labels == ("1", "2")
    assert "set objective.first_label" in capsys.readouterr().out


def test_the_rank_is_no_wider_than_a_matrix_of_the_layers(encoder):
    """Not than BERT's two token types."""
    from safetensors.numpy import load_file

    shapes = {name: x.shape for name, x in load_file(encoder / "model.safetensors").items()}
    assert min(map(min, (s for s in shapes.values() if len(s) == 2))) == 2
    _, _, narrowest = read_model(encoder)
    assert narrowest == min(min(s) for name, s in shapes.items() if "layer." in name and len(s) == 2) > 2


def test_what_looks_like_an_emoji_is_shown_as_it_stands(model, tmp_path, capsys):
    (tmp_path / "rows.json").write_text(json.dumps({"train": [{"prompt": "a :smile:", "completion": "b"}] * 3}))
    assert init(model, "rows.json:train") == 0
    shown = capsys.readouterr().out
    assert "rows.json:train: prompt_completion" in shown and "a :smile:" in shown


def test_evaluation_files_of_a_folder(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", pairs(1))
    assert propose.siblings(str(tmp_path)) == [f"{tmp_path}:test"]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    write_encoder(folder)
    return folder


def test_training_takes_the_config_of_labelled_rows(encoder, model, tmp_path, capsys):
    """On an encoder and on a decoder; a file beside it with the same labels is held out, one with others is not."""
    write(tmp_path / "train.jsonl", texts(0, 60))
    write(tmp_path / "test.jsonl", texts(60, 80))
    assert init(encoder, "train.jsonl") == 0
    shown = capsys.readouterr().out
    assert "[SEP] ⟦red⟧" in shown and "[SEP] ⟦blue⟧" in shown
    cfg = written()
    assert (cfg.objective.name, cfg.data.overlength) == ("sequence_classification", "truncate")
    assert cfg.data.eval == ("test.jsonl",)
    assert init(model, "train.jsonl", "--out=decoder.py") == 0
    write(tmp_path / "test.jsonl", [{"text": "a big car", "label": "pink"}])
    assert init(encoder, "train.jsonl", "--out=other.py") == 0
    assert written("other.py").data.eval is None
    assert "the label 'pink' is in no training row" in capsys.readouterr().out


def test_an_encoder_does_not_continue_text(encoder, tmp_path, capsys):
    assert init(encoder, write(tmp_path / "rows.jsonl", pairs(30))) == 2
    assert "which predicts labels" in capsys.readouterr().err


def test_the_command_that_mends_a_bare_table_mends_it(tmp_path):
    file = tmp_path / "SMS Collection"
    file.write_text("".join(f"{'spam' if i % 3 else 'ham'}\tmessage {i}\t\t{i}\n" for i in range(50)))
    with pytest.raises(UserError, match="tab-separated lines without a header") as error:
        open_source(str(file))
    subprocess.run(["sh", "-c", str(error.value).partition("for example: ")[2]], check=True)
    source = data.read(f"{file}.tsv")
    assert [row for _, row in source][1] == {"label": "spam", "text": "message 1"}
    assert recognise(source).labels.names == ("ham", "spam")


# ---------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.jsonl", b"\n\n", "no rows in it"),
        ("binary.jsonl", b"\xff\xfe\x00\x01", "not UTF-8"),
        ("broken.jsonl", b'{"text": ', "broken.jsonl:1: malformed JSON"),
        ("one.csv", b"body\nhello\n", "--columns=text=body"),
        ("bare.csv", b"hello,world\na,b\n", "If the first line is no header"),
        ("tags.conll", b"Paris\tB-location\n", "every row has the same label"),
        ("rows.pkl", b"x", "never read"),
        ("rows.xml", b"<a/>", "cannot read a .xml"),
    ],
)
def test_a_wrong_file_is_one_message(model, tmp_path, capsys, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert init(model, tmp_path / name) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert name in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "config.py").exists()


def _without(model, tmp_path, *names, **settings):
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in model.iterdir():
        if file.name not in names:
            (folder / file.name).write_bytes(file.read_bytes())
    if settings:
        held = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(held | settings))
    return folder


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (("tokenizer.json", "tokenizer_config.json"), {}, "--tokenizer=DIR_OR_ID"),
        (("model.safetensors",), {}, "safetensors"),
        (("config.json",), {}, "no config.json"),
        ((), {"architectures": ["LlamaForSequenceClassification"]}, "which predicts labels"),
        ((), {"model_type": "lama"}, "Did you mean 'llama'"),
        ((), {"max_position_embeddings": None}, "max_position_embeddings"),
        ((), {"vocab_size": 5}, "larger than the model's embedding"),
        ((), {"max_position_embeddings": 4}, "every row is longer than the 4 positions"),
    ],
)
def test_a_wrong_model_is_one_message(model, tmp_path, capsys, names, settings, said):
    broken = _without(model, tmp_path, *names, **settings)
    assert init(broken, write(tmp_path / "rows.jsonl", pairs(30))) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "config.py").exists()


def test_a_tokenizer_from_elsewhere_is_used_and_written_down(model, tmp_path):
    bare = _without(model, tmp_path, "tokenizer.json", "tokenizer_config.json")
    assert init(bare, write(tmp_path / "rows.jsonl", pairs(30)), f"--tokenizer={model}") == 0
    assert written().model.tokenizer == str(model)


def test_a_missing_model_is_one_message(tmp_path, capsys):
    assert init("./nowhere", write(tmp_path / "rows.jsonl", pairs(3))) == 2
    assert "no such directory" in capsys.readouterr().err


def test_an_existing_file_is_never_overwritten(model, tmp_path, capsys):
    (tmp_path / "config.py").write_text("mine")
    assert init(model, write(tmp_path / "rows.jsonl", pairs(30))) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "config.py").read_text() == "mine"


def test_the_target_is_a_python_file(model, tmp_path, capsys):
    assert init(model, write(tmp_path / "rows.jsonl", pairs(30)), "--out=config.json") == 2
    assert "ends in .py" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- real data


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("banking77/train.csv", "sequence_classification, label=category"),
        ("wnut17/train.conll", "token_classification"),
        ("gsm8k/train.jsonl", "prompt_completion, prompt=question, completion=answer"),
        ("tinystories/tinystories_sample.txt", "text"),
        ("toolcall/glaive_toolcall_en_demo.json", "sharegpt"),
        ("wikisql/train.jsonl", "text"),
        ("wikitext2/valid.txt", "text"),
        ("preference/dpo_en_demo.json", "preference"),
        ("preference/kto_en_demo.json", "kto"),
    ],
)
def test_real_data_is_recognised(assets, file, found):
    layout = recognise(open_source(str(assets / "data" / file)))
    assert str(layout) == found
    assert layout.completion_from == ("\nA:" if "wikisql" in file else None)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("bfcl/BFCL_v4_simple_python.json", "prompts ('question') without answers"),
        ("bfcl/simple_python_answers.json", "no column has a name that says what it is"),
        ("ifeval/input_data.jsonl", "prompts ('prompt') without answers"),
        ("mt_bench/question.jsonl", "prompts ('turns') without answers"),
        ("sms_spam/SMSSpamCollection", r"printf 'label\ttext\n'; cut -f1,2"),
    ],
)
def test_real_data_for_other_objectives_is_refused(assets, file, said):
    with pytest.raises(UserError) as error:
        recognise(open_source(str(assets / "data" / file)))
    assert said in str(error.value)
