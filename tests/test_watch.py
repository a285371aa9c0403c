"""Findings on the metrics of a run: synthetic histories with known answers, and runs that are made to go wrong."""

import json
import math

import jax
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import command, compiled, home, read, sums, write_jsonl  # noqa: F401

from jaxtune import tree
from jaxtune.cli import main
from jaxtune.config import DEFAULT_LR
from jaxtune.train import watch
from jaxtune.train.log import Metrics
from jaxtune.train.plot import BITS, plot

RATIOS = {"train/update_ratio/attention": 1e-3, "train/update_ratio/mlp": 1e-3}


def history(losses, norms=None, evals=(), every=1, **groups):
    """Lines of metrics.jsonl; `evals`: {step: loss}; `groups`: "metric/group" -> values."""
    lines, evals = [], dict(evals)
    for i, loss in enumerate(losses):
        step = (i + 1) * every
        extra = {f"train/{name.replace('__', '/')}": values[i] for name, values in groups.items()}
        norm = 1.0 if norms is None else norms[i]
        lines.append({"step": step, "train/loss": loss, "train/lr": 1e-4, "train/grad_norm": norm, **RATIOS, **extra})
        if step in evals:
            lines.append({"step": step, "eval/loss": evals[step]})
    return [{"step": 0, "eval/loss": evals[0]}, *lines] if 0 in evals else lines


def found(lines):
    return {f.check: f for f in watch.findings(lines)}


def falling(n, first=3.0, last=1.0):
    return np.linspace(first, last, n).tolist()


# --- overfitting


def test_overfitting_names_the_best_step():
    evals = {0: 3.0, 10: 2.0, 20: 1.5, 30: 1.52, 40: 1.6}
    lines = history(falling(40), evals=evals)
    assert "overfitting" not in found(lines[:-1])  # 1.3% in one evaluation may be chance
    finding = found(lines)["overfitting"]
    assert finding.step == 20
    for said in ("since step 20", "from 1.5000 to 1.6000 at step 40", "weights of step 20 are kept"):
        assert said in finding.message


@pytest.mark.parametrize(
    "train, evals",
    [
        (falling(40), {10: 2.0, 20: 1.5, 30: 1.4, 40: 1.41}),  # 0.7%
        (falling(40, 1.0, 3.0), {10: 2.0, 20: 2.5, 30: 3.0, 40: 3.5}),  # both rise
        (falling(40, 0.5, 0.01), {10: 1e-3, 20: 2e-3, 30: 3e-3, 40: 4e-3}),  # of no account
        (falling(40), {10: 2.0, 20: 2.5, 30: 2.6, 40: 1.9}),  # it came back
    ],
)
def test_no_overfitting(train, evals):
    assert not found(history(train, evals=evals))


def test_overfitting_from_the_first_step_keeps_trained_weights():
    finding = found(history(falling(40), evals={0: 1.0, 10: 1.5, 20: 1.4, 30: 1.9, 40: 2.0}))["overfitting"]
    assert finding.step == 0
    assert "weights of step 20 are kept" in finding.message


# --- spikes


def noisy(seed, sigma, n=120):
    rng = np.random.default_rng(seed)
    return (3 * np.exp(-np.arange(n) / 40) + 0.5) * np.exp(sigma * rng.standard_normal(n))


@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.2, 1.0])
def test_noise_of_any_size_is_no_spike(sigma):
    fired = sum("loss_spike" in found(history(noisy(seed, sigma).tolist())) for seed in range(50))
    assert fired <= 1


@given(st.integers(0, 1000), st.integers(20, 110))
@settings(max_examples=30, deadline=None)
def test_a_spike_is_found_where_it_is(seed, at):
    losses = noisy(seed, 0.02)
    losses[at] *= 5
    finding = found(history(losses.tolist(), every=10))["loss_spike"]
    assert finding.step == 10 * (at + 1)
    assert f"jumped to {losses[at]:.4f} at step {10 * (at + 1)}" in finding.message
    assert finding.severity == watch.NOTE


def test_a_loss_that_stays_up_is_worse_than_one_that_comes_back():
    losses = [2.0] * 30 + [8.0] * 5
    finding = found(history(losses))["loss_spike"]
    assert (finding.step, finding.severity) == (31, watch.WARNING)
    assert "has not come back" in finding.message
    assert found(history([*losses, 2.0]))["loss_spike"].severity == watch.NOTE


def test_of_many_spikes_the_finding_is_where_the_first_is():
    losses = [2.0] * 60
    losses[19], losses[39] = 6.0, 9.0
    finding = found(history(losses))["loss_spike"]
    assert finding.step == 20 and "jumped to 6.0000 at step 20" in finding.message
    assert "Of 2 spikes the highest at step 40: 9.0000 from 2.0000." in finding.message
    losses[39] = 5.0
    assert "Of 2 spikes this is the highest." in found(history(losses))["loss_spike"].message


# --- gradients


def test_exploding_gradients_name_the_group():
    norms = [1.0] * 20 + [30.0, 40.0, 50.0]
    groups = {"grad_norm__attention": [0.5] * 23, "grad_norm__mlp": norms}
    finding = found(history(falling(23), norms, **groups))["exploding_gradients"]
    assert finding.step == 21
    assert "most of it in mlp." in finding.message


@pytest.mark.parametrize(
    "norms",
    [
        [1.0] * 10 + [30.0, 30.0] + [1.0] * 10,  # two in a row
        [2.0] * 5 + [0.01] * 30 + [0.2] * 5,  # still below the start
        np.geomspace(0.5, 4.0, 60).tolist(),
    ],
)
def test_no_explosion(norms):
    assert not found(history(falling(len(norms)), norms))


def test_a_group_may_grow_from_nothing():
    """LoRA's A has no gradient before B has left zero."""
    a = [0.0, *np.geomspace(1e-4, 0.5, 39)]
    assert not found(history(falling(40), **{"grad_norm__attention/lora_A": a}))


def test_a_group_without_a_gradient():
    mlp = [0.1] * 10 + [0.0] * 3
    finding = found(history(falling(13), grad_norm__mlp=mlp, grad_norm__attention=[1.0] * 13))["vanishing_gradients"]
    assert finding.step == 11
    assert "mlp has had next to no gradient since step 11" in finding.message
    assert not found(history(falling(13), grad_norm__mlp=[*mlp[:12], 0.1], grad_norm__attention=[1.0] * 13))


def test_a_gradient_that_fades_with_the_loss_is_convergence():
    norms = np.geomspace(1.0, 1e-5, 40).tolist()
    assert not found(history(np.geomspace(3.0, 1e-3, 40).tolist(), norms))
    assert "the whole model" in found(history([3.0] * 40, norms))["vanishing_gradients"].message


# --- sizes of updates


@pytest.mark.parametrize("group, high, low", [("mlp", 0.03, 1e-6), ("mlp/lora_A", 0.3, 1e-4)])
def test_update_sizes(group, high, low):
    def run(losses, ratio):
        lines = history(losses, **{f"update_ratio__{group}": [ratio] * len(losses)})
        return found([{k: v for k, v in line.items() if k not in RATIOS or group in k} for line in lines])

    rising, still = falling(40, 2.0, 4.0), [2.0] * 40
    finding = run(rising, high)["update_size"]
    assert "too high" in finding.message and f"since step {finding.step} updates are large" in finding.message
    assert "too low" in run(still, low)["update_size"].message
    assert not run(falling(40), high) and not run(falling(40), low)  # it learns
    middle = math.sqrt(high * low)
    assert not run(rising, middle) and not run(still, middle)


@pytest.mark.parametrize(
    "method, lr, width, scale, said",
    [
        ("lora", 2e-5, 4096, 1.0, "suits tune.method=full"),
        ("full", 2e-4, 4096, 1.0, "suits tune.method=lora"),
        ("full", 3e-3, 4096, 1.0, "300 times above"),
        ("lora", 2e-5, 4096, 8.0, None),  # alpha makes up for it
        ("full", 1e-4, 768, 1.0, None),  # a narrow model
        ("lora", 4e-3, 128, 2.0, None),
        *((method, lr, width, 1.0, None) for method, lr in DEFAULT_LR.items() for width in (64, 768, 8192)),
    ],
)
def test_rates_of_other_methods(method, lr, width, scale, said):
    hints = watch.rate_hint(lr, method, DEFAULT_LR, width=width, scale=scale)
    assert [said in hint.message for hint in hints] == ([] if said is None else [True])


# --- the mechanism


def test_every_trainable_leaf_has_a_group():
    for method, want in {
        "lora": {f"{part}/lora_{factor}" for part in ("attention", "mlp") for factor in "AB"},
        "full": {"attention", "mlp", "embeddings", "norms"},
        "head": {"head", "norms"},
    }.items():
        part, _ = small.tuned(method)
        found = tree.map_fields(lambda path, array, field: watch.group(path, field), part.trainable)
        assert set(jax.tree.leaves(found)) == want


def test_findings_survive_a_kill_and_are_said_once(tmp_path):
    lines = history(falling(50), evals={10: 2.0, 20: 1.5, 30: 1.9, 40: 1.8, 50: 1.95})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    said = []
    for folder, cuts in ((whole, [50]), (parts, [27, 33, 50])):
        folder.mkdir()
        last = -1
        for cut in cuts:
            metrics = Metrics(folder, last, watch=watch.Watch())
            todo = [line for line in lines if last < line["step"] <= min(cut + 3, 50)]  # the last 3 are lost in a kill
            said += [new.check for line in todo for new in metrics.write(line["step"], line)]
            metrics.close()
            last = cut
    assert said == ["overfitting", "overfitting", "overfitting"]  # in parts once more: the line of step 30 was lost
    assert (whole / "findings.jsonl").read_bytes() == (parts / "findings.jsonl").read_bytes()
    [finding] = [json.loads(line) for line in (whole / "findings.jsonl").read_text().splitlines()]
    assert finding == found(lines)["overfitting"].as_json()


def test_a_run_that_overfits_says_so_and_writes_samples(home, tmp_path, capsys):  # noqa: F811
    """With the numbers of one that is not looked at, and healthy runs are left in peace."""
    few = write_jsonl(tmp_path / "few.jsonl", sums(0, 4))
    loud = {"optim__lr": 0.05, "optim__schedule": "constant", "tune__lora__lora_dropout": 0.0}
    flags = {**loud, "data__train": few, "train__steps": 48, "train__eval_every": 12, "evaluate__max_new_tokens": 4}
    asked = {"evaluate__samples": 2, "evaluate__prompts": "1 and 4 make,7"}
    assert main(command(home, tmp_path / "a", **flags, **asked)) == 0
    evals = {m["step"]: m["eval/loss"] for m in read(tmp_path / "a") if "eval/loss" in m}
    best = min(evals, key=evals.get)
    assert 0 < best < 48  # it memorises four rows; when is a matter of rounding at such a rate
    assert f"warning: overfitting: the evaluation loss has risen since step {best}" in capsys.readouterr().out
    findings = json.loads((tmp_path / "a" / "summary.json").read_text())["findings"]
    assert [f["step"] for f in findings if f["check"] == "overfitting"] == [best]
    samples = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [step for step in (0, 12, 24, 36, 48) for _ in range(4)]
    assert [s["prompt"].strip() for s in samples[:4]] == ["40 and 43 make", "41 and 44 make", "1 and 4 make", "7"]
    assert [s["expected"] for s in samples[:4]] == ["83", "85", None, None]

    del flags["evaluate__max_new_tokens"]
    assert main(command(home, tmp_path / "b", **flags)) == 0
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert not (tmp_path / "b" / "samples.jsonl").exists()

    assert main(command(home, tmp_path / "healthy", train__steps=24)) == 0
    assert not (tmp_path / "healthy" / "findings.jsonl").exists()
    assert json.loads((tmp_path / "healthy" / "summary.json").read_text())["findings"] == []


def test_samples_without_room_are_refused(home, tmp_path, capsys):  # noqa: F811
    for settings_, said in (
        ({"evaluate__samples": 1, "evaluate__max_new_tokens": 60}, "no held-out row leaves room"),
        ({"evaluate__prompts": "a" * 50, "evaluate__max_new_tokens": 20}, "exceeds the 64 positions"),
        ({"evaluate__samples": 1, "data__eval": None, "train__eval_every": None}, "nothing to evaluate on"),
    ):
        assert main(command(home, tmp_path / "run", "--dry-run", **settings_)) == 2
        assert said in capsys.readouterr().err


# --- the plot


def dots(text, width, labels=9):
    """Which dots are set, as (x, y) from below on the left."""
    lines, found = text.plain.split("\n")[:-1], set()
    for row, line in enumerate(lines):
        for column, char in enumerate(line[labels:width]):
            bits = ord(char) - 0x2800 if char != " " else 0
            at = [(x, y) for x in range(2) for y in range(4) if bits & BITS[x][y]]
            found |= {(2 * column + x, 4 * (len(lines) - row) - 1 - y) for x, y in at}
    return found


def test_a_straight_line_is_straight():
    text = plot({"train": [(0, 1.0), (100, 3.0)]}, 100, width=9 + 20, height=11)
    assert dots(text, 29) == {(i, i) for i in range(40)}
    lines = text.plain.split("\n")
    assert "3 |" in lines[0] and "1 |" in lines[9] and lines[-1].strip() == "train"


def test_plots_of_little_or_nothing():
    for series in ({}, {"train": []}, {"train": [(5, 2.0)]}, {"a": [(0, 1.0), (9, 1.0)], "b": [(3, 1.0)]}):
        assert len(plot(series, 10, width=40, height=6).plain.split("\n")) == 6
