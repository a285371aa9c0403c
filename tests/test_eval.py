"""`jaxtune eval` on small runs: losses as training logged them, answers as generated, resumes, what is refused."""

import json
import math

import numpy as np
import pytest
import runs
from runs import command, compiled, home, read, write_jsonl  # noqa: F401

from jaxtune import cli, data
from jaxtune.errors import UserError
from jaxtune.evaluate import answers, kept, metrics
from jaxtune.files import exclusive
from jaxtune.hf.card import model_card
from jaxtune.infer.generation import generate_text
from jaxtune.infer.source import load_target


def rows_of(folder):
    return [json.loads(line) for line in (folder / "eval" / "rows.jsonl").read_text().splitlines()]


def report_of(folder, part="held_out"):
    return json.loads((folder / "eval.json").read_text())[part]


def refused(capsys, *argv):
    """The message of a command line that must be refused."""
    capsys.readouterr()
    assert cli.main(["eval", *map(str, argv)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxtune: error: ") and "Traceback" not in said
    return said


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):  # noqa: F811
    """A LoRA run, with held-out rows in groups; evaluated. Do not change it."""
    folder = tmp_path_factory.mktemp("eval")
    rows = [row | {"size": "odd" if i % 2 else "even"} for i, row in enumerate(runs.sums(40, 48))]
    write_jsonl(folder / "eval.jsonl", rows)
    workdir = runs.write_run(home, folder / "run", eval=str(folder / "eval.jsonl"))
    assert cli.main(["eval", str(workdir), "--group-by=size", "--batch-size=4"]) == 0
    return workdir


# ---------------------------------------------------------------------------------------------------------- the figures


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it
def test_losses_are_those_of_transformers_and_peft(home, run):  # noqa: F811
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    for who in ("base", "tuned"):
        model = PeftModel.from_pretrained(model, run / "adapter") if who == "tuned" else model
        total = count = 0
        for record in rows_of(run):
            prompt = tokenizer(record["prompt"]).input_ids
            ids = torch.tensor([[*prompt, *tokenizer(record["expected"]).input_ids, tokenizer.eos_token_id]])
            with torch.no_grad():
                logprobs = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
            nats = -logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            assert record[who]["loss"] == pytest.approx(float(nats.mean()), rel=2e-5)
            assert record[who]["tokens"] == len(nats)
            total, count = total + float(nats.sum()), count + len(nats)
        found = report_of(run)["metrics"]
        assert found["loss"][who]["value"] == pytest.approx(total / count, rel=2e-5)
        assert found["perplexity"][who]["value"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_losses_are_those_that_training_logged(home, tmp_path, method):  # noqa: F811
    workdir = tmp_path / "run"
    settings = {"tune__method": method, "tune__prompt_tuning__num_virtual_tokens": 6, "optim__lr": 0.3}
    if method == "prompt_tuning":
        settings |= {"tune__lora__r": None, "tune__lora__lora_dropout": None}
    else:
        settings = {}
    assert cli.main(command(home, workdir, data__cache="false", **settings)) == 0
    assert cli.main(["eval", str(workdir), "--metrics=loss"]) == 0
    logged = [m["eval/loss"] for m in read(workdir) if "eval/loss" in m]
    loss = report_of(workdir)["metrics"]["loss"]
    if method == "lora":  # a soft prompt says something from the start
        assert loss["base"]["value"] == pytest.approx(logged[0], rel=2e-5)
    assert loss["tuned"]["value"] == pytest.approx(min(logged), rel=2e-5)
    assert loss["verdict"] == "better" and loss["rows"] == 8


def test_answers_are_those_that_the_models_generate(home, run):  # noqa: F811
    records = rows_of(run)
    prompts = [record["prompt"] for record in records]
    longest = max(len(record["expected"]) + 1 for record in records)
    room = longest + max(4, longest // 4)
    for name, place in [("base", home / "model"), ("tuned", run)]:
        target = load_target(place)
        texts = generate_text(*target[:3], prompts, max_new_tokens=room, eos_ids=target.eos_ids, batch_size=4)
        assert [record[name]["answer"] for record in records] == [text.strip() for text in texts]
    assert any(record["base"]["answer"] != record["tuned"]["answer"] for record in records)


def test_scores_are_those_of_the_answers(run):
    records, found = rows_of(run), report_of(run)["metrics"]
    assert {"exact_match", "token_f1", "rouge_l", "numeric"} < set(found)  # the answers are numbers
    for name in ("exact_match", "token_f1", "numeric"):
        for who in ("base", "tuned"):
            scores = [metrics.METRICS[name].score(r[who]["answer"], r["expected"]) for r in records]
            assert found[name][who]["value"] == pytest.approx(np.mean(scores))
            assert [r[who][name] for r in records] == scores


def test_a_run_scores_the_same_answers(home, run):  # noqa: F811
    """`evaluate.metrics`, asked of base and tuned model in turn, as before and after a run."""
    records, found = rows_of(run), report_of(run)["metrics"]
    longest = max(len(record["expected"]) + 1 for record in records)
    base, tuned = load_target(home / "model"), load_target(run)
    rows = data.prepare(base.tokenizer, report_of(run)["data"], max_length=64)[0][0]
    asked = {"most_rows": 8, "max_new_tokens": longest + max(4, longest // 4), "eos_ids": base.eos_ids}
    scored = answers.AnswerScores(base.module, rows, base.tokenizer, ["exact_match", "token_f1"], **asked)
    for who, params in (("base", base.params), ("tuned", tuned.params)):
        values = scored(params)
        assert values == {f"eval/{m}": pytest.approx(found[m][who]["value"]) for m in ("exact_match", "token_f1")}
    assert [s["after"] for s in scored.samples()] == [r["tuned"]["answer"] for r in records]
    assert scored.scores()["token_f1"]["difference"] == found["token_f1"]["difference"]
    with pytest.raises(UserError, match=r"evaluate.metrics=json_valid: it applies to no row"):
        answers.AnswerScores(base.module, rows, base.tokenizer, ["json_valid"], **asked)


def test_groups_add_up_to_the_whole(run):
    report = report_of(run)
    groups, whole = report["groups"], report["metrics"]
    assert groups["column"] == "size" and groups["rows"] == {"even": 4, "odd": 4}
    tokens = {g: sum(r["tuned"]["tokens"] for r in rows_of(run) if r["group"] == g) for g in groups["rows"]}
    for name, weights in [("loss", tokens), ("token_f1", groups["rows"])]:
        cells = groups["metrics"][name]
        total = sum(cells[g]["tuned"]["value"] * n for g, n in weights.items()) / sum(weights.values())
        assert total == pytest.approx(whole[name]["tuned"]["value"])
    assert all(r["group"] == ("odd" if int(r["where"].rpartition(":")[2]) % 2 == 0 else "even") for r in rows_of(run))


def test_the_page_and_the_card_carry_the_figures(run):
    page, card = (run / "report.html").read_text(), (run / "adapter" / "README.md").read_text()
    loss = report_of(run)["metrics"]["loss"]["tuned"]["value"]
    assert f"{loss:.4g}" in page and f"{loss:.4g}" in card
    assert card.count("## Evaluation") == 1 and card.index("## Evaluation") < card.index("## How to load it")


def test_an_exported_model_carries_them_too(run, tmp_path):
    assert cli.main(["export", str(run), str(tmp_path / "merged")]) == 0
    loss = report_of(run)["metrics"]["loss"]["tuned"]["value"]
    assert f"{loss:.4g}" in (tmp_path / "merged" / "README.md").read_text()


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    words = ["ham", "spam", "eggs"]
    rows = [{"prompt": f"{i * 7 % 11} of {words[i % 3]}: ", "completion": words[(i // 2) % 3]} for i in range(9)]
    return write_jsonl(tmp_path_factory.mktemp("labels") / "labels.jsonl", rows)


def test_labels_are_scored_as_transformers_scores_them(home, labelled, tmp_path):  # noqa: F811
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert cli.main(["eval", str(home / "model"), f"--data={labelled}", "--labels", f"--out={tmp_path}"]) == 0
    model = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    names, wrong, confidences = ["eggs", "ham", "spam"], 0, []
    report = report_of(tmp_path)
    table = np.zeros((3, 3), int)
    for record in rows_of(tmp_path):
        sums = []
        for name in names:
            prompt = tokenizer(record["prompt"]).input_ids
            whole = torch.tensor([[*prompt, *tokenizer(name).input_ids, tokenizer.eos_token_id]])
            with torch.no_grad():
                logprobs = torch.log_softmax(model(whole).logits[0, :-1].double(), -1)
            sums.append(logprobs.gather(1, whole[0, 1:, None])[len(prompt) - 1 :].sum())
        shares = torch.softmax(torch.stack(sums), 0)
        best = int(shares.argmax())
        assert record["model"]["label"] == names[best]
        assert record["model"]["confidence"] == pytest.approx(float(shares[best]), abs=1e-4)
        table[names.index(record["expected"]), best] += 1
        wrong += record["expected"] != names[best]
        confidences.append(float(shares[best]))
    assert report["labels"]["names"] == names
    assert report["labels"]["confusion"]["model"] == table.tolist()
    assert report["metrics"]["accuracy"]["model"]["value"] == pytest.approx(1 - wrong / 9)
    assert {"macro_f1", "ece"} < set(report["metrics"]) and "exact_match" not in report["metrics"]


# ------------------------------------------------------------------------------------------------------------ going on


def test_killed_and_started_again_it_ends_with_the_same_bytes(run, monkeypatch, tmp_path):
    """Killed in the middle of a line, at three places."""
    argv = ["eval", str(run), "--group-by=size", "--batch-size=4", f"--out={tmp_path / 'out'}"]
    add, computed = kept.Kept.add, []

    def counted(self, pairs):
        pairs = list(pairs)
        computed.append(len(pairs))
        if dies and len(computed) == 2:
            self.file.write(b'{"key": "torn", "rec')
            self.file.flush()
            raise KeyboardInterrupt
        add(self, pairs)

    monkeypatch.setattr(kept.Kept, "add", counted)
    dies = True
    for _ in range(3):
        computed.clear()
        assert cli.main(argv) == 1
        assert not (tmp_path / "out" / "eval.json").exists()
    dies = False
    computed.clear()
    assert cli.main(argv) == 0
    assert len(computed) == 6 - 3  # two models, a batch of losses and two of answers each; one more kept at each start
    assert (tmp_path / "out" / "eval" / "rows.jsonl").read_bytes() == (run / "eval" / "rows.jsonl").read_bytes()
    computed.clear()
    assert cli.main(argv) == 0
    assert computed == []


def test_other_weights_are_other_answers(home, run, tmp_path):  # noqa: F811
    """What is kept of one model is never taken for another's."""
    with kept.Kept(run / "eval" / "kept.jsonl") as records:
        answers = [r for r in records.records.values() if isinstance(r, str)]
    assert len(records.records) == 2 * 8 * 2 and len(answers) == 2 * 8


# ----------------------------------------------------------------------------------------------- other runs, own scores


def test_a_scorer_of_yes_and_no_is_a_share():
    def column(*scores):
        return answers._column(metrics.Metric("own", len, share=False), {"base": scores, "tuned": scores})

    assert column(True, None, False).share and column(True, None, False).at.tolist() == [0, 2]
    assert not column(True, 0.5).share and not column(1.0, 0.0).share


def test_a_run_of_all_weights_against_its_base_with_a_schema_and_a_scorer(home, tmp_path):  # noqa: F811
    workdir = tmp_path / "run"
    (workdir / "model").mkdir(parents=True)
    runs.write_model(workdir / "model", initializer_range=0.5)
    (workdir / "model" / "README.md").write_text(model_card(name="model", base="b", adapter=False))
    data = {"train": str(home / "train.jsonl"), "eval_fraction": 0.2}
    settings = {"model": {"path": str(home / "model")}, "tune": {"method": "full"}, "data": data}
    (workdir / "config.json").write_text(json.dumps(settings))
    schema = tmp_path / "number.json"
    schema.write_text('{"type": "integer"}')
    tone = runs.REPO / "examples" / "tone.py"
    argv = [f"--schema={schema}", f"--scorer={tone}:polite", "--metrics=loss,exact_match", "--rows=5"]
    assert cli.main(["eval", str(workdir), *argv]) == 0
    report = report_of(workdir)
    assert list(report["metrics"]) == ["loss", "perplexity", "exact_match", "json_schema", "polite"]
    assert report["rows"] == 5
    for record in rows_of(workdir):
        for who in ("base", "tuned"):
            answer = record[who]["answer"]
            assert record[who]["json_schema"] == answer.lstrip("-").isdigit()
            assert record[who]["polite"] in (0, 0.5, 1)
    assert "## Evaluation" in (workdir / "model" / "README.md").read_text()
    losses = {who: report["metrics"]["loss"][who]["value"] for who in ("base", "tuned")}
    argv = [f"--data={home / 'train.jsonl'}", "--metrics=loss", f"--out={tmp_path / 'alone'}"]
    wheres = {record["where"] for record in rows_of(workdir)}
    assert cli.main(["eval", str(workdir / "model"), *argv]) == 0
    alone = [r["model"] for r in rows_of(tmp_path / "alone") if r["where"] in wheres]
    total = sum(r["loss"] * r["tokens"] for r in alone) / sum(r["tokens"] for r in alone)
    assert losses["tuned"] == pytest.approx(total, rel=1e-5) and abs(losses["base"] - total) > 0.01


def test_plain_text_has_a_loss_alone(home, tmp_path, capsys):  # noqa: F811
    rows = write_jsonl(tmp_path / "texts.jsonl", [{"text": "one two three"}, {"text": "four"}])
    assert cli.main(["eval", str(home / "model"), f"--data={rows}", f"--out={tmp_path / 'out'}"]) == 0
    assert list(report_of(tmp_path / "out")["metrics"]) == ["loss", "perplexity"]
    assert "no row has a prompt" in refused(capsys, home / "model", f"--data={rows}", "--metrics=rouge_l")


def test_the_tone_example():
    _, tone = metrics.load_scorer(f"{runs.REPO / 'examples' / 'tone.py'}:polite")
    said = ["Of course, happy to help.", "It ships on Monday.", "CALM down!!", ""]
    assert [tone.score(text, "Yes.") for text in said] == [1.0, 0.5, 0.0, 0.5]
    assert tone.score("Thanks", "") is None


# ------------------------------------------------------------------------------------------------------ what is refused


def test_wrong_input_is_refused(home, run, labelled, tmp_path, capsys):  # noqa: F811
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    other = write_jsonl(tmp_path / "other.jsonl", [{"question": "x", "answer": "y"}])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "objekt"}')
    model = home / "model"
    for argv, *words in [
        ([run, f"--data={chat}"], "chat.jsonl:1", "this file is chat", "trained on prompt_completion", "--columns"),
        ([run, f"--data={other}"], "other.jsonl:1", "question, answer", "prompt=question,completion=answer"),
        ([run, "--group-by=colour"], "--group-by=colour", "eval.jsonl:1", "prompt, completion, size"),
        ([run, "--metrics=json_fields"], "json_fields", "applies to no row"),
        ([run, "--metrics=rogue_l"], "Did you mean 'rouge_l'"),
        ([run, f"--schema={schema}"], "schema.json", "$.type", "objekt"),
        ([run, f"--data={empty}"], "empty.jsonl", "empty"),
        ([run, "--labels", "--metrics=numeric"], "--labels"),
        ([run, "--max-new-tokens=1000"], "--max-new-tokens", "64 positions"),
        ([run, "--rows=0"], "--rows=0"),
        ([run, "--limit=3"], "--limit needs --tasks"),
        ([run, "--tasks=a", "--rows=3"], "--rows has no effect with --tasks"),
        ([run, "--columns=prompt"], "--columns=prompt", "ours=theirs"),
        ([model], "--data=FILE"),
        ([tmp_path / "absent"], "absent", "does not exist"),
    ]:
        said = refused(capsys, *argv)
        assert all(word in said for word in words), said


def test_a_run_without_a_finished_adapter(home, run, tmp_path, capsys):  # noqa: F811
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    assert "has no result yet" in refused(capsys, tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text((run / "adapter" / "adapter_config.json").read_text())
    assert "adapter_model.safetensors" in refused(capsys, tmp_path)


def test_a_run_that_held_nothing_out(home, run, tmp_path, capsys):  # noqa: F811
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["eval"] = None
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter").symlink_to(run / "adapter")
    assert "held out no rows; give --data=FILE" in refused(capsys, tmp_path)


def test_more_than_a_few_labels_are_none(run, capsys):
    assert "8 different expected answers" not in refused(capsys, run, "--labels", "--rows=1")


def test_columns_may_be_given_for_other_names(home, run, tmp_path):  # noqa: F811
    data = write_jsonl(tmp_path / "d.jsonl", [{"q": "1 and 4 make ", "a": "5"}, {"q": "2 and 5 make ", "a": "7"}])
    argv = ["eval", str(run), f"--data={data}", "--columns=prompt=q,completion=a", f"--out={tmp_path / 'out'}"]
    assert cli.main([*argv, "--tuned-only", "--metrics=numeric"]) == 0
    assert [(r["prompt"], r["expected"]) for r in rows_of(tmp_path / "out")] == [
        ("1 and 4 make ", "5"),
        ("2 and 5 make ", "7"),
    ]
    assert "tuned" in report_of(tmp_path / "out")["metrics"]["numeric"]


def test_prompts_that_leave_no_room_are_counted_by_their_loss_only():
    row = answers.Row
    rows = [row("a", [1] * n, [False] * n, [1] * n, [1], "", "") for n in (5, 12, 13)]
    rows.append(row("b", [1], [False], None, [1], "", ""))
    assert answers.answerable(rows, 16, answers.Request({}, max_new_tokens=4)) == [0, 1]


def test_a_folder_that_another_process_holds(home, run, tmp_path, capsys):  # noqa: F811
    """Two commands at once on one folder: the second ends before it reads or writes anything there."""
    for folder, argv in (
        (run / "eval", ["eval", str(run)]),
        (tmp_path / "a", command(home, tmp_path / "a")),
        (tmp_path / "a", ["sweep", *command(home, tmp_path / "a", "--sweep.optim.lr=0.01,0.02")[1:]]),
    ):
        with exclusive(folder):
            before = runs.everything(folder)
            assert cli.main(argv) == 2
            assert f"Another process is running in {folder}" in capsys.readouterr().err
            assert runs.everything(folder) == before
