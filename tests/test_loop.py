"""The host loop with a step of three lines: when it logs, evaluates, saves and stops, and what it says."""

import copy
import json
import math
import os
import signal
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxtune.errors import Interrupted, RunFailed, UserError
from jaxtune.objectives.causal_lm import metrics as language_metrics
from jaxtune.train import loop
from jaxtune.train.log import Metrics, read_metrics
from jaxtune.train.runtime import out_of_memory
from jaxtune.train.step import TrainState


class Memory:
    """Checkpoints that are kept in memory, as JSON where the real ones are."""

    def __init__(self):
        self.saved = {}

    def save(self, step, state, counters):
        self.saved[step] = state, json.dumps(counters)

    def wait(self):
        pass

    def steps(self):
        return sorted(self.saved)

    def last(self):
        state, counters = self.saved[self.steps()[-1]]
        return state, record_in(counters)


def record_in(counters):
    """What the loop remembers of the one run in saved counters."""
    [run] = json.loads(counters)["runs"]
    return {k: v for k, v in run.items() if k != "name"}


class Silent:
    """A progress bar that remembers, and may act at a logged step."""

    def __init__(self, act=None):
        self.logged, self.said, self.act = [], [], act or (lambda step: None)

    def update(self, step, lines):
        self.logged.append(step)
        self.act(step)

    def evaluated(self, step, lines):
        pass

    def say(self, text):
        self.said.append(text)


def batch_at(step):
    segments = np.ones((1, 2, 4), np.int32)
    segments[0, 1, step % 4 :] = 0
    return {"step": step, "segments": segments, "row": np.zeros((1, 2), np.int32)}


def step_fn(state, frozen, batch):
    """A weight that counts the steps; the loss of a step is its number, its weight cycles."""
    n = batch["step"] + 1
    metrics = {"loss": np.float32(n), "weight": np.float32(n % 3), "grad_norm": np.float32(2 * n)}
    return state._replace(step=state.step + 1, trainable=state.trainable + n), metrics


def start(step=0, value=0):
    return TrainState(np.int32(step), value, None, None, None)


class Alone:
    """How one run ended."""

    def __init__(self, training):
        [run] = training.runs
        self.state, self.best, self.early = training.state, run.best, run.ended == loop.EARLY


def run(folder, plan, state=None, *, record=None, checkpoints=None, progress=None, evaluate=None, fn=step_fn):
    state = start() if state is None else state
    metrics = Metrics(folder, int(state.step) if record else -1)
    one = loop.Run(
        "run",
        metrics,
        lr_at=lambda step: 0.1 * (step + 1),
        places=lambda step: [f"file:{step}", f"file:{step + 100}"],
        record=record or loop.fresh_record(),
    )
    training = loop.Loop(
        state,
        None,
        fn,
        batch_at,
        plan,
        [one],
        put=lambda batch, lanes: batch,
        checkpoints=checkpoints or Memory(),
        progress=progress or Silent(),
        evaluate=evaluate and (lambda state: [evaluate(state)]),
    )
    try:
        training.run()
    finally:
        metrics.close()
    return Alone(training)


def losses(*values):
    """An evaluation that finds these losses, one after another."""
    left = iter(values)
    return lambda state: {"eval/loss": next(left), "eval/seen": int(state.step)}


def deterministic(folder):
    return [{k: v for k, v in m.items() if k != "train/tokens_per_second"} for m in read_metrics(folder)]


# --- what happens when


def test_logged_losses_are_means_over_trained_tokens_since_the_last_line(tmp_path):
    run(tmp_path, loop.Intervals(steps=7, log_every=3))
    lines = read_metrics(tmp_path)
    assert [m["step"] for m in lines] == [3, 6, 7]
    assert [m["train/loss"] for m in lines] == pytest.approx(
        [(1 * 1 + 2 * 2 + 3 * 0) / 3, (4 * 1 + 5 * 2 + 6 * 0) / 3, 7.0]
    )
    assert [m["train/grad_norm"] for m in lines] == [6, 12, 14]
    assert [m["train/lr"] for m in lines] == pytest.approx([0.3, 0.6, 0.7])
    tokens = [int((batch_at(i)["segments"] > 0).sum()) for i in range(7)]
    assert [m["train/tokens"] for m in lines] == [sum(tokens[:3]), sum(tokens[:6]), sum(tokens)]
    assert all(m["train/tokens_per_second"] > 0 for m in lines)


def test_it_evaluates_before_at_its_interval_and_at_the_end(tmp_path):
    memory = Memory()
    result = run(
        tmp_path, loop.Intervals(steps=7, eval_every=3), evaluate=losses(9.0, 5.0, 6.0, 7.0), checkpoints=memory
    )
    evaluations = [(m["step"], m["eval/loss"], m["eval/seen"]) for m in read_metrics(tmp_path) if "eval/loss" in m]
    assert evaluations == [(0, 9.0, 0), (3, 5.0, 3), (6, 6.0, 6), (7, 7.0, 7)]
    assert result.best == {"step": 3, "loss": 5.0}
    assert int(result.state.step) == 7
    assert not result.early
    assert memory.steps() == [3, 6, 7]


def test_it_saves_at_its_interval_and_at_the_end(tmp_path):
    memory = Memory()
    run(tmp_path, loop.Intervals(steps=7, save_every=2), checkpoints=memory)
    assert memory.steps() == [2, 4, 6, 7]
    assert {n: (int(s.step), s.trainable) for n, (s, _) in memory.saved.items()} == {
        n: (n, n * (n + 1) // 2) for n in (2, 4, 6, 7)
    }


def test_early_stopping_counts_evaluations_without_improvement(tmp_path):
    result = run(
        tmp_path,
        loop.Intervals(steps=50, eval_every=2, early_stop=2, log_every=100),
        evaluate=losses(9.0, 5.0, 6.0, 4.0, 4.0, 4.5),
    )
    assert result.early
    assert int(result.state.step) == 10
    assert result.best == {"step": 6, "loss": 4.0}


def test_an_evaluation_that_is_no_number_is_never_the_best(tmp_path):
    result = run(tmp_path, loop.Intervals(steps=3, eval_every=1), evaluate=losses(1.0, math.nan, 5.0, math.nan))
    assert result.best == {"step": 2, "loss": 5.0}


# --- going on


PLAN = loop.Intervals(steps=11, log_every=4, eval_every=5, save_every=3, early_stop=9)


def scripted(state):
    return {"eval/loss": [9.0, 4.0, 6.0, 5.0][(0, 5, 10, 11).index(int(state.step))]}


@pytest.mark.parametrize("stop", [3, 5, 6, 9, 10, 11])
def test_from_any_checkpoint_it_ends_as_one_left_alone(stop, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    undisturbed = run(whole, PLAN, evaluate=scripted)
    memory = Memory()
    run(parts, PLAN, evaluate=scripted, checkpoints=memory)
    with (parts / "metrics.jsonl").open("a") as f:
        f.write('{"step": 11, "train/lo')  # the line that a kill has torn
    state, counters = memory.saved[stop]
    after = Memory()
    result = run(parts, PLAN, state, record=record_in(counters), evaluate=scripted, checkpoints=after)
    assert deterministic(parts) == deterministic(whole)
    assert (result.best, result.state.trainable) == (undisturbed.best, undisturbed.state.trainable)
    assert after.steps() == [n for n in memory.steps() if n > stop]


def test_patience_may_be_changed_when_it_goes_on(tmp_path):
    memory, worse = Memory(), lambda state: {"eval/loss": float(state.step)}
    first = run(tmp_path, loop.Intervals(steps=9, eval_every=1, early_stop=2), evaluate=worse, checkpoints=memory)
    assert (first.early, int(first.state.step)) == (True, 3)
    state, record = memory.last()
    again = run(
        tmp_path,
        loop.Intervals(steps=9, eval_every=1, early_stop=2),
        state,
        record=copy.deepcopy(record),
        evaluate=worse,
    )
    assert (again.early, int(again.state.step)) == (True, 3)
    longer = run(tmp_path, loop.Intervals(steps=9, eval_every=1), state, record=copy.deepcopy(record), evaluate=worse)
    assert (longer.early, int(longer.state.step)) == (False, 9)


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("log_every", [1, 5])
def test_a_signal_finishes_the_step_saves_and_stops(number, log_every, tmp_path):
    memory = Memory()

    def fn(state, frozen, batch):
        if batch["step"] == 3:
            os.kill(os.getpid(), number)
        return step_fn(state, frozen, batch)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="after step 4; the checkpoint is saved"):
        run(tmp_path, loop.Intervals(steps=9, log_every=log_every), fn=fn, checkpoints=memory)
    assert memory.steps() == [4]
    assert signal.getsignal(number) is before


def test_a_signal_while_a_step_is_logged_is_not_taken_for_saved(tmp_path):
    """It comes after the question whether to save: the next step answers it."""
    memory = Memory()
    progress = Silent(lambda step: step == 4 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path, loop.Intervals(steps=9, log_every=4), checkpoints=memory, progress=progress)
    assert memory.steps() == [5]
    assert "after step 5" in str(stopped.value)


def test_a_signal_in_the_last_step_changes_nothing(tmp_path):
    def fn(state, frozen, batch):
        if batch["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_fn(state, frozen, batch)

    assert int(run(tmp_path, loop.Intervals(steps=3), fn=fn).state.step) == 3


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), loop.stop_on_signal() as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        os.kill(os.getpid(), signal.SIGINT)


# --- what is not finite


@pytest.mark.parametrize("log_every", [1, 50])
@pytest.mark.parametrize("name, value", [("loss", math.nan), ("grad_norm", math.inf)])
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(name, value, log_every, tmp_path):
    memory = Memory()

    def fn(state, frozen, batch):
        state, metrics = step_fn(state, frozen, batch)
        return state, metrics | ({name: np.float32(value)} if batch["step"] == 6 else {})

    with pytest.raises(RunFailed) as failed:
        run(tmp_path, loop.Intervals(steps=20, log_every=log_every, save_every=3), fn=fn, checkpoints=memory)
    text = str(failed.value)
    assert "not finite at step 7" in text
    assert "Its rows: file:6, file:106." in text
    assert "last good checkpoint is of step 6" in text
    assert memory.steps() == [3, 6]


def test_it_says_so_where_nothing_was_saved(tmp_path):
    def fn(state, frozen, batch):
        return state, {"loss": np.float32("nan"), "weight": np.float32(1), "grad_norm": np.float32(1)}

    with pytest.raises(RunFailed, match="No checkpoint was saved"):
        run(tmp_path, loop.Intervals(steps=5), fn=fn)


def test_an_error_of_the_data_is_raised_in_its_step(tmp_path):
    def broken(state, frozen, batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, loop.Intervals(steps=5), fn=broken)


# --- evaluation, memory, metrics


def test_an_evaluation_is_a_mean_over_all_trained_tokens():
    batches = [{"n": 1.0, "w": 1.0}, {"n": 2.0, "w": 3.0}, {"n": 10.0, "w": 0.0}]

    def eval_step(trainable, member, frozen, batch):
        return trainable * batch["n"] * batch["w"], batch["w"], {}

    state = start(value=0.5)
    [values] = loop.make_evaluate(eval_step, None, batches, lambda b: b, metrics=language_metrics)(state)
    assert values == {
        "eval/loss": pytest.approx(0.5 * 7 / 4),
        "eval/perplexity": pytest.approx(math.exp(0.875)),
        "eval/tokens": 4,
    }
    [values] = loop.make_evaluate(eval_step, None, batches, lambda b: b, limit=1)(state)
    assert values["eval/loss"] == 0.5


def test_what_is_out_of_memory():
    assert out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"))
    assert out_of_memory(RuntimeError("CUDA: out of memory"))
    assert not out_of_memory(ValueError("shapes differ"))


def test_metrics_keep_what_lies_before_the_step_they_go_on_from(tmp_path):
    metrics = Metrics(tmp_path, -1)
    for i in range(5):
        metrics.write(i, {"x": i, "note": "a"})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 5, "x"')
    metrics = Metrics(tmp_path, 2)
    metrics.write(3, {"x": 30})
    metrics.close()
    assert [(m["step"], m["x"]) for m in read_metrics(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]


def test_a_run_finds_itself_again_in_wandb(tmp_path, monkeypatch):
    """Folders of one name are different runs; the same folder is the same run."""
    inits = []

    def init(**given):
        inits.append(given)
        return SimpleNamespace(log=lambda numbers, step: inits[-1].update({step: numbers}), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for parent in ("a", "b", "a"):
        folder = tmp_path / parent / "run"
        folder.mkdir(parents=True, exist_ok=True)
        metrics = Metrics(folder, -1, wandb=True, config={"seed": 1})
        metrics.write(3, {"x": 1.5, "note": "text"})
        metrics.close()
    a, b, again = inits
    assert a["id"] == again["id"] != b["id"]
    assert (a["name"], a["resume"], a["config"], a[3]) == ("run", "allow", {"seed": 1}, {"x": 1.5})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install"):
        Metrics(tmp_path, -1, wandb=True)
