"""Strengths of the tuning: losses as peft has them at other scales, weights on the line between, what is exported."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import runs
from runs import compiled, home, write_jsonl  # noqa: F401
from test_eval import refused, report_of
from test_forgetting import general

import jaxtune
from jaxtune import cli
from jaxtune.evaluate.frontier import choose
from jaxtune.hf.export import export_model
from jaxtune.hf.load import load
from jaxtune.hf.peft import export_adapter
from jaxtune.infer.source import find, open_source
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


@pytest.mark.parametrize("kind", ["full", "dora"])
def test_other_kinds_are_mixed_weight_by_weight(home, tmp_path, kind):  # noqa: F811
    """W(s) = base + s (tuned - base), computed here with numpy."""
    module, base = load(home / "model")
    folder = runs.write_run(home, tmp_path / "run", eval=str(home / "eval.jsonl"))
    if kind == "full":
        keys = iter(jax.random.split(jax.random.key(1), 200))
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
    task = [3.0, 2.0, 1.2, 1.05, 1.0, 1.3]  # gain 2: kept 0, 50, 90, 97.5, 100, 85%
    general = [2.0, 2.01, 2.05, 2.2, 2.5, 3.0]
    assert choose(scales, task, general, keep=0.9).strength == 0.5
    assert choose(scales, task, general, keep=0.95).strength == 0.75
    assert choose(scales, task, general, keep=0.95, within=0.25).strength == 0.75
    none = choose(scales, task, general, keep=0.95, within=0.1)
    assert none.strength is None and "at most 90% of the gain is kept, at 0.5" in none.why
    assert choose(scales, task[::-1], general).strength is None  # nothing gained


def test_what_is_refused(home, run, tmp_path, capsys):  # noqa: F811
    file = home / "train.jsonl"
    assert "--keep and --within" in refused(capsys, run, "--keep=0.8")
    assert "a share above 0" in refused(capsys, run, f"--frontier={file}", "--keep=1.5")
    assert "--metrics has no effect" in refused(capsys, run, f"--frontier={file}", "--metrics=loss")
    assert "names no base" in refused(capsys, home / "model", f"--frontier={file}", f"--data={home / 'eval.jsonl'}")
    assert cli.main(["export", str(home / "model"), str(tmp_path / "a"), "--scale=0.5"]) == 2
    assert "names no base" in capsys.readouterr().err
    assert cli.main(["export", str(run), str(tmp_path / "a"), "--scale=-1"]) == 2
    assert "--scale=-1" in capsys.readouterr().err and not (tmp_path / "a").exists()
