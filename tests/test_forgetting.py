"""What tuning cost: nats and divergence as transformers and scipy have them, flips as counted, copies named."""

import json

import numpy as np
import pytest
import runs
from runs import compiled, home, write_jsonl  # noqa: F401
from test_eval import refused, report_of

from jaxtune import cli
from jaxtune.curate.overlap import Copy, copies
from jaxtune.evaluate import statistics

WORDS = [f"word{i}" for i in range(20)]


def general(n):
    """Rows with two domains."""
    return [
        {"prompt": f"after {i} comes ", "completion": str(i + 1), "domain": "odd" if i % 2 else "even"}
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):  # noqa: F811
    """A LoRA run, measured on general rows, of which two stand in its training data. Do not change it."""
    folder = tmp_path_factory.mktemp("forgetting")
    mixed = [*general(12), *runs.sums(3, 5)]
    write_jsonl(folder / "general.jsonl", [row | {"domain": row.get("domain", "task")} for row in mixed])
    workdir = runs.write_run(home, folder / "run", eval=str(home / "eval.jsonl"))
    argv = ["eval", workdir, f"--forgetting={folder / 'general.jsonl'}", "--group-by=domain", "--max-new-tokens=4"]
    assert cli.main([*map(str, argv)]) == 0
    return workdir


def rows_of(run):
    return [json.loads(line) for line in (run / "eval" / "forgetting.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it
def test_losses_and_divergence_are_those_of_transformers_peft_and_scipy(home, run):  # noqa: F811
    import torch
    from peft import PeftModel
    from scipy.special import rel_entr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(home / "model")

    def logprobs(model, ids):
        with torch.no_grad():
            return torch.log_softmax(model(ids).logits[0, :-1].double(), -1).numpy()

    inputs, own = [], {}
    for record in rows_of(run):
        prompt = tokenizer(record["prompt"]).input_ids
        ids = torch.tensor([[*prompt, *tokenizer(record["expected"]).input_ids, tokenizer.eos_token_id]])
        inputs.append((record, ids, len(prompt) - 1))
    own["base"] = [logprobs(base, ids) for _, ids, _ in inputs]
    tuned = PeftModel.from_pretrained(base, run / "adapter")
    own["tuned"] = [logprobs(tuned, ids) for _, ids, _ in inputs]
    apart = tokens = 0
    for i, (record, ids, first) in enumerate(inputs):
        after, before = own["tuned"][i][first:], own["base"][i][first:]
        for who, found in (("base", before), ("tuned", after)):
            nats = -np.take_along_axis(found, ids[0, first + 1 :, None].numpy(), 1)
            assert record[who]["loss"] == pytest.approx(nats.mean(), rel=2e-5)
        kl = rel_entr(np.exp(after), np.exp(before)).sum(1)
        assert record["tuned"]["kl"] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-7)
        apart, tokens = apart + kl.sum(), tokens + len(kl)
    found = report_of(run, "forgetting")["metrics"]["kl"]
    assert apart > 1e-3 and found["tuned"]["value"] == pytest.approx(apart / tokens, rel=1e-3)
    assert "base" not in found and found["tuned"]["low"] <= found["tuned"]["value"] <= found["tuned"]["high"]


def test_text_that_was_tuned_on_is_left_out_by_name(run, home):  # noqa: F811
    report = report_of(run, "forgetting")
    assert report["rows"] == 12
    [note] = [note for note in report["notes"] if "nearly repeat" in note]
    assert "2 of 14 general rows" in note and "general.jsonl:13 ~" in note and "train.jsonl:4" in note


def test_domains_flips_and_where_they_are_shown(run):
    report, records = report_of(run, "forgetting"), rows_of(run)
    assert report["groups"]["column"] == "domain" and report["groups"]["rows"] == {"even": 6, "odd": 6}
    assert set(report["groups"]["metrics"]["kl"]) == {"even", "odd"}
    flips = report["flips"]["exact_match"]
    lost = sum(r["base"]["exact_match"] > r["tuned"]["exact_match"] for r in records)
    gained = sum(r["base"]["exact_match"] < r["tuned"]["exact_match"] for r in records)
    assert (flips["lost"], flips["gained"], flips["rows"]) == (lost, gained, 12)
    page, card = (run / "report.html").read_text(), (run / "adapter" / "README.md").read_text()
    assert "Outside the task" in page and "right to wrong" in page and "by domain" in page
    assert "12 rows outside the task" in card and "KL(tuned ‖ base)" in card


@pytest.mark.parametrize("lost, gained", [(0, 0), (1, 0), (8, 1), (3, 9), (5, 5), (40, 12)])
def test_mcnemar_is_the_binomial_test(lost, gained):
    from scipy.stats import binomtest

    base = np.repeat([True, False, True, False], [lost, gained, 7, 3])
    tuned = np.repeat([False, True, True, False], [lost, gained, 7, 3])
    found = statistics.mcnemar(base, tuned)
    assert found[:2] == (lost, gained)
    assert found.p == pytest.approx(binomtest(lost, lost + gained).pvalue if lost + gained else 1.0)


def test_copies_are_those_whose_runs_of_words_agree():
    def text(seed, n=40):
        return " ".join(np.random.default_rng(seed).choice(WORDS, n))

    others = [text(i) for i in range(30)]
    near = others[7].split()
    near[11] = "LAMPS"  # three of 38 runs differ
    far = [word if i % 5 else "tin" for i, word in enumerate(others[3].split())]
    texts = [text(100), " ".join(near), " ".join(far), others[4].upper(), "the shop", text(101)]
    assert copies(texts, [*others, "The  shop"]) == [Copy(1, 7), Copy(3, 4), Copy(4, 30)]
    assert copies(texts, []) == [] and copies([], others) == []


def test_what_is_refused(home, run, tmp_path, capsys):  # noqa: F811
    assert "data.train" in refused(capsys, run, "--forgetting") and "--forgetting=FILE" in refused(
        capsys, run, "--forgetting"
    )
    said = refused(capsys, run, f"--forgetting={home / 'train.jsonl'}")
    assert "40 of 40 general rows nearly repeat" in said and "name other files" in said
    assert "names no base" in refused(capsys, home / "model", f"--forgetting={home / 'eval.jsonl'}")
    assert "--data has no effect" in refused(capsys, run, "--forgetting=a.jsonl", "--data=b.jsonl")
    assert "leave out --tuned-only" in refused(capsys, run, "--forgetting=a.jsonl", "--tuned-only")
    assert "no column 'kind'" in refused(capsys, run, f"--forgetting={home / 'eval.jsonl'}", "--group-by=kind")


def test_by_default_it_is_what_was_held_out_of_mixed_in_sources(home, tmp_path):  # noqa: F811
    write_jsonl(tmp_path / "replay.jsonl", general(30))
    sources = [str(home / "train.jsonl"), str(tmp_path / "replay.jsonl")]
    run = runs.write_run(home, tmp_path / "run", train=sources, eval_fraction=0.2)
    assert cli.main(["eval", str(run), "--forgetting", "--metrics=loss"]) == 0
    records = rows_of(run)
    assert 1 <= len(records) < 15 and all("replay.jsonl:" in record["where"] for record in records)
    assert "flips" not in report_of(run, "forgetting")


def test_a_run_logs_the_loss_of_general_text(home, tmp_path):  # noqa: F811
    """At each evaluation, and as `--forgetting` measures it of base and result."""
    file = write_jsonl(tmp_path / "general.jsonl", [*general(10), *runs.sums(1, 2)])
    workdir = tmp_path / "run"
    assert cli.main(runs.command(home, workdir, train__steps=4, train__eval_every=2, evaluate__general=file)) == 0
    logged = {m["step"]: m["eval/general_loss"] for m in runs.read(workdir) if "eval/loss" in m}
    best = min((m["eval/loss"], m["step"]) for m in runs.read(workdir) if m.get("eval/loss") and m["step"])[1]
    assert sorted(logged) == [0, 2, 4]
    assert cli.main(["eval", str(workdir), f"--forgetting={file}", "--metrics=loss"]) == 0
    report = report_of(workdir, "forgetting")
    assert report["rows"] == 10
    assert report["metrics"]["loss"]["base"]["value"] == pytest.approx(logged[0], rel=2e-5)
    assert report["metrics"]["loss"]["tuned"]["value"] == pytest.approx(logged[best], rel=2e-5)
    assert "Loss on general text" in (workdir / "report.html").read_text()
    capped = runs.command(home, tmp_path / "other", evaluate__general=home / "train.jsonl")
    assert cli.main(capped) == 2 and not (tmp_path / "other" / "metrics.jsonl").exists()
