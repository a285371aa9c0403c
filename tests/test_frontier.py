"""Strengths of the tuning: losses as peft has them at other scales, weights on the line between, what is exported."""

import json
from dataclasses import replace

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import runs
from hypothesis import given
from runs import compiled, home, write_jsonl  # noqa: F401
from test_eval import refused, report_of
from test_forgetting import general

import jaxtune
from jaxtune import cli
from jaxtune.evaluate import statistics, strengths
from jaxtune.evaluate.frontier import STRENGTHS, bisect, by_cost, choose
from jaxtune.hf.export import export_model
from jaxtune.hf.load import load
from jaxtune.hf.peft import export_adapter
from jaxtune.infer.source import find, open_source, tokenizer_of
from jaxtune.methods.vocabulary import untie
from jaxtune.tree import flatten
from jaxtune.weights.adapters import DoraWeight
from jaxtune.weights.leaf import map_weights, merge


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):  # noqa: F811
    """A LoRA run, measured at all strengths. Do not change it."""
    folder = tmp_path_factory.mktemp("frontier")
    write_jsonl(folder / "general.jsonl", general(6))
    workdir = runs.write_run(home, folder / "run", eval=str(home / "eval.jsonl"))
    assert cli.main(["eval", str(workdir), f"--frontier={folder / 'general.jsonl'}"]) == 0
    return workdir


def loss(model, tokenizer, rows):
    """Nats a trained token, by transformers."""
    import torch

    total = count = 0
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = torch.tensor([[*prompt, *tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
        nats = -logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total, count = total + float(nats.sum()), count + len(nats)
    return total / count


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it
def test_losses_at_each_strength_are_those_of_peft(home, run, tmp_path):  # noqa: F811
    """peft with its scalings multiplied; and an adapter exported at that strength, read by peft as it is."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = report_of(run, "frontier")
    assert found["strengths"] == [round(i / 10, 1) for i in range(13)]
    rows = {"task": runs.sums(40, 48), "general": general(6)}
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    for strength in (0.0, 0.7, 1.0, 1.2):
        base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, run / "adapter")
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):  # of attention it is a number
                module.scaling = {name: strength * scale for name, scale in module.scaling.items()}
        at = found["strengths"].index(strength)
        for name in rows:
            assert found["losses"][name][at]["value"] == pytest.approx(loss(model, tokenizer, rows[name]), rel=2e-5)
    for flags, into in ((["--adapter"], "adapter"), ([], "merged")):
        assert cli.main(["export", str(run), str(tmp_path / into), "--scale=0.7", *flags]) == 0
    base = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for model in (PeftModel.from_pretrained(base, tmp_path / "adapter"), merged):
        wanted = found["losses"]["task"][7]["value"]
        assert loss(model, tokenizer, rows["task"]) == pytest.approx(wanted, rel=2e-5)


def test_what_is_shown(run):
    page, card = (run / "report.html").read_text(), (run / "adapter" / "README.md").read_text()
    why = report_of(run, "frontier")["why"]
    assert "Strength" in page and "loss on general text" in page and why in card


@pytest.mark.parametrize("kind", ["full", "head", "dora"])
def test_other_kinds_are_mixed_weight_by_weight(home, tmp_path, kind):  # noqa: F811
    """W(s) = base + s (tuned - base), computed here with numpy."""
    module, base = load(home / "model")
    folder = runs.write_run(home, tmp_path / "run", eval=str(home / "eval.jsonl"))
    if kind in ("full", "head"):
        keys = iter(jax.random.split(jax.random.key(1), 200))
        base = untie(base) if kind == "head" else base  # of a tied model, the table is where its head began
        tuned = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape, x.dtype), base)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tune": {"method": "full"}}))
        (folder / "adapter").rename(tmp_path / "aside")
        export_model(module, tuned, folder / "model", base=home / "model", tuned_from=str(home / "model"))
    else:
        tuned, _ = jaxtune.lora(base, jax.random.key(0), r=2, target_modules=["q_proj", "down_proj"], use_dora=True)
        tuned = map_weights(
            lambda w: replace(w, b=w.b + 0.1, magnitude=1.1 * w.magnitude) if isinstance(w, DoraWeight) else w, tuned
        )
        export_adapter(module, tuned, folder / "adapter", base=str(home / "model"), overwrite=True)
        _, tuned, _ = open_source(find(folder))
        tuned = merge(tuned)
    assert cli.main(["export", str(folder), str(tmp_path / "out"), "--scale=0.25"]) == 0
    _, found = load(tmp_path / "out")
    before, after = flatten(base), flatten(tuned)
    for path, leaf in flatten(found).items():
        wanted = np.asarray(before[path]) + 0.25 * (np.asarray(after[path]) - np.asarray(before[path]))
        np.testing.assert_allclose(leaf, wanted, atol=1e-6, err_msg=path)
    if kind == "full":
        write_jsonl(tmp_path / "general.jsonl", general(4))
        assert cli.main(["eval", str(folder), f"--frontier={tmp_path / 'general.jsonl'}", "--rows=4"]) == 0
        assert cli.main(["eval", str(folder), "--metrics=loss", "--rows=4"]) == 0
        losses, held_out = report_of(folder, "frontier")["losses"]["task"], report_of(folder)["metrics"]["loss"]
        assert losses[0]["value"] == pytest.approx(held_out["base"]["value"], rel=2e-5)
        assert losses[10]["value"] == pytest.approx(held_out["tuned"]["value"], rel=2e-5)


def test_the_strength_that_forgets_least_among_those_that_keep_enough():
    scales = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    kept = dict(enumerate([0.0, 0.5, 0.9, 0.975, 1.0, 0.85]))
    cost = [0.0, 0.01, 0.05, 0.2, 0.5, 1.0]
    assert choose(scales, kept, cost, keep=0.9).strength == 0.5
    assert choose(scales, kept, cost, keep=0.95).strength == 0.75
    assert choose(scales, kept, cost, keep=0.95, within=0.25).strength == 0.75
    none = choose(scales, kept, cost, keep=0.95, within=0.1)
    assert none.strength is None and "at most 90% of the gain is kept, at 0.5" in none.why


@given(st.lists(st.floats(-1, 2), min_size=13, max_size=13), st.floats(0.01, 1), st.data())
def test_bisection_finds_what_a_scan_finds(cost, keep, data):
    """Where a costlier scale keeps more, with four measurements at most."""
    order = by_cost(STRENGTHS, cost)
    shares = sorted(data.draw(st.lists(st.floats(-0.5, 1), min_size=len(order) - 1, max_size=len(order) - 1)))
    kept = dict(zip(order, [*shares, 1.0], strict=True))
    asked = []
    found = bisect(order, lambda i: asked.append(i) or kept[i], keep)
    assert len(asked) <= 4 and STRENGTHS[found] == choose(STRENGTHS, kept, cost, keep).strength


@pytest.mark.parametrize("curved, binary", [(0.3, False), (1.0, True)])
def test_what_a_sample_says_of_all_rows_is_unbiased_and_its_interval_covers(curved, binary):
    """Rows whose value in between depends on both ends, bent and with noise; 95% intervals hold the true mean."""
    rng = np.random.default_rng(0)
    many = 400_000
    ends = rng.gamma(2.0, 1.0, (many, 2))
    between = ends.mean(1) + curved * ends[:, 0] * ends[:, 1] / 4 + 0.3 * rng.normal(size=many)
    if binary:
        between = (between > 3).astype(float)
    true, hits, off = between.mean(), 0, []
    for _ in range(200):
        rows = rng.integers(0, many, 700)
        sample = rng.choice(700, 256, replace=False)
        known = np.column_stack([ends[rows], np.ones(700)])
        values = statistics.spread_out(known, sample, between[rows][sample][:, None])
        (found,) = statistics.means(values, np.ones(700), 200).intervals()
        hits += found.low <= true <= found.high
        off.append(found.value - true)
    assert 0.905 <= hits / 200 <= 0.99  # 0.95 within three standard errors
    assert abs(np.mean(off)) < 4 * np.std(off) / np.sqrt(200)


def test_the_gain_is_counted_in_answers(home, run, tmp_path, monkeypatch):  # noqa: F811
    """Expected answers are those of the tuned model: exact match at each scale is that of the exported model."""
    from jaxtune.infer.generation import generate_text

    source = find(run)
    module, params, _ = open_source(source)
    tokenizer = tokenizer_of(source)
    prompts = [row["prompt"] for row in runs.sums(60, 84)]
    answers = generate_text(module, params, tokenizer, prompts, max_new_tokens=3)
    rows = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True) if a.strip()]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    write_jsonl(tmp_path / "general.jsonl", general(6))
    argv_of_frontier = ["eval", str(run), f"--frontier={tmp_path / 'general.jsonl'}", f"--data={data}"]
    argv_of_frontier += ["--max-new-tokens=3", "--keep=0.7"]
    assert cli.main([*argv_of_frontier, f"--out={tmp_path / 'out'}"]) == 0
    found = report_of(tmp_path / "out", "frontier")
    scores = [entry and entry["value"] for entry in found["score"]["values"]]
    assert found["score"]["metric"] == "exact_match" and scores[10] == 1 > scores[0] and scores.count(None) >= 7
    kept = [s and (s - scores[0]) / (1 - scores[0]) for s in scores]
    at = found["strengths"].index(found["chosen"])
    assert kept[at] >= 0.7 - 1e-9 and found["why"].startswith(
        f"At scale {found['chosen']:g} the model keeps {kept[at]:.0%}"
    )
    assert all(k < 0.7 for k in kept[:at] if k)  # what forgets less keeps less, of those that were measured
    assert cli.main(["export", str(run), str(tmp_path / "weaker"), f"--scale={found['chosen']:g}"]) == 0
    argv = ["eval", str(tmp_path / "weaker"), f"--data={data}", f"--out={tmp_path / 'alone'}", "--max-new-tokens=3"]
    assert cli.main(argv) == 0
    assert report_of(tmp_path / "alone")["metrics"]["exact_match"]["model"]["value"] == pytest.approx(scores[at])
    # A sample at all scales: the ends are of all rows, and what lies between is near what all rows have.
    monkeypatch.setattr(strengths, "SAMPLE", 12)
    assert cli.main([*argv_of_frontier, f"--out={tmp_path / 'few'}"]) == 0
    few = report_of(tmp_path / "few", "frontier")
    assert few["score"]["rows"][0] == len(rows) and few["score"]["rows"][few["strengths"].index(few["chosen"])] == 12
    whole, some = (np.array([i["value"] for i in part["losses"]["task"]]) for part in (found, few))
    np.testing.assert_allclose(some[[0, 10]], whole[[0, 10]], rtol=1e-5)
    np.testing.assert_allclose(some, whole, rtol=0.03)
    assert any("a sample of 12 rows" in note for note in few["notes"])


def test_means_of_columns_have_the_intervals_of_each_alone():
    rng = np.random.default_rng(0)
    values, weights = rng.random((40, 3)), rng.integers(1, 9, 40).astype(float)
    found = statistics.means(values, weights).intervals()
    for column, one in zip(values.T, found, strict=True):
        np.testing.assert_allclose(one, statistics.interval(np.stack([column, weights], 1)), rtol=1e-12)
    assert statistics.means(values[:1], weights[:1]).intervals()[0].low is None


def test_what_is_refused(home, run, tmp_path, capsys):  # noqa: F811
    file = home / "train.jsonl"
    assert "--keep and --within" in refused(capsys, run, "--keep=0.8")
    assert "a share above 0" in refused(capsys, run, f"--frontier={file}", "--keep=1.5")
    assert "--schema has no effect" in refused(capsys, run, f"--frontier={file}", "--schema=a.json")
    assert "unknown metric 'rouge'" in refused(capsys, run, f"--frontier={file}", "--metrics=rouge")
    assert "names no base" in refused(capsys, home / "model", f"--frontier={file}", f"--data={home / 'eval.jsonl'}")
    assert cli.main(["export", str(home / "model"), str(tmp_path / "a"), "--scale=0.5"]) == 2
    assert "names no base" in capsys.readouterr().err
    assert cli.main(["export", str(run), str(tmp_path / "a"), "--scale=-1"]) == 2
    assert "--scale=-1" in capsys.readouterr().err and not (tmp_path / "a").exists()
