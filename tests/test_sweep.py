"""Sweeps: members in one step are what they are alone; killed, cut, extended, and refused."""

import csv
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import STEPS, adapter, command, compiled, everything, home, read, write_jsonl  # noqa: F401

from jaxtune import tree
from jaxtune.cli import main
from jaxtune.config import resolve
from jaxtune.config.recipe import experiment
from jaxtune.errors import RunFailed, UserError
from jaxtune.objectives.causal_lm import causal_lm
from jaxtune.run import find_lr, grid, points
from jaxtune.run.experiment import open_data
from jaxtune.run.training import build
from jaxtune.train import loop
from jaxtune.train import stacked as sweep
from jaxtune.train.recipe import compiled_bytes
from jaxtune.train.step import TrainState, value_and_grad

slow = pytest.mark.slow

# Each differs from the first in one thing that may differ within a step, the last in all of them.
VARIED = (
    {},
    {"optim.lr": 1e-4},
    {"optim.weight_decay": 0.3},
    {"train.seed": 3},
    {"tune.lora.lora_alpha": 32.0},
    {"tune.lora.lora_dropout": 0.2},
    {"tune.lora.r": 3},
    {"tune.lora.use_rslora": True},
    {
        **{"optim.lr": 5e-4, "optim.weight_decay": 0.1, "train.seed": 7, "tune.lora.lora_alpha": 4.0},
        **{"tune.lora.lora_dropout": 0.4, "tune.lora.r": 5, "tune.lora.use_rslora": True},
    },
)


def config(home, values, **more):  # noqa: F811
    chosen = {
        "model.path": str(home / "model"),
        "data.train": str(home / "train.jsonl"),
        "data.eval": str(home / "eval.jsonl"),
        "tune.lora.r": 2,
        "optim.lr": 1e-3,
        "train.steps": 50,
        "train.batch_size": 4,
    }
    text = {path: points.text_of(v) for path, v in (chosen | more | values).items()}
    return resolve(flags=text)


def built(*cfgs, stacked=True):
    experiments = [experiment(cfg) for cfg in cfgs]
    return build(experiments, open_data(experiments[0]), stacked=stacked)


def advance(j, lanes, steps=50):
    """Losses and gradient norms of each member, [steps, K], and the last state."""
    state, rows = j.state, []
    for i in range(steps):
        state, values = j.step_fn(state, j.frozen, j.put(j.batch_at(i), list(range(lanes))))
        rows.append([np.atleast_1d(values["loss"]), np.atleast_1d(values["grad_norm"])])
    return np.array(rows), state


# --- the same as alone


@pytest.mark.parametrize(
    "name, lr", [pytest.param("adamw", 1e-3, marks=slow), ("sgd", 0.05), pytest.param("lion", 1e-4, marks=slow)]
)
def test_losses_are_those_of_runs_alone(home, name, lr):  # noqa: F811
    varied = [v | ({"optim.lr": v["optim.lr"] * lr / 1e-3} if "optim.lr" in v else {}) for v in VARIED]
    more = {"optim.name": name, "optim.lr": lr}
    cfgs = [config(home, values, **more) for values in varied]
    together, _ = advance(built(*cfgs), len(cfgs))
    steps = {}  # by shapes: what else differs between the runs is in their states
    for i in range(len(cfgs)) if name == "adamw" else (0, len(cfgs) - 1):
        one = built(cfgs[i], stacked=False)
        step = steps.setdefault(str(jax.eval_shape(lambda state: state, one.state)), one.step_fn)
        alone, _ = advance(dataclasses.replace(one, step_fn=step), 1)
        # Lion's sign turns a difference in the last bit into one of two steps.
        tolerance = 1e-5 if name != "lion" else 1e-3
        assert together[:, 0, i] == pytest.approx(alone[:, 0, 0], rel=tolerance), varied[i]
        if i:
            assert together[:, 0, i] != pytest.approx(together[:, 0, 0], rel=1e-4), "the setting had no effect"


@slow
def test_gradients_at_equal_parameters_are_those_alone(home):  # noqa: F811
    """After 20 steps, so that nothing is at its start any more."""
    cfgs = [config(home, values) for values in VARIED]
    group = built(*cfgs)
    _, state = advance(group, len(cfgs), steps=20)
    batch = jax.tree.map(jnp.asarray, group.batch_at(20))
    gradients = value_and_grad(causal_lm(group.module))

    def of(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        return gradients(state.trainable, state.member, group.frozen, batch, key)

    together = jax.jit(jax.vmap(of))(state, batch)[2]
    alone = jax.jit(of)
    for i, member in enumerate(group.members):
        single = group.alone(state, i, member)
        want = alone(single, jax.tree.map(lambda x, i=i: x[i], batch))[2]
        stacked = state._replace(trainable=together)
        got = group.alone(stacked, i, member).trainable
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert float(jnp.abs(a - b).max()) <= 1e-5 * float(jnp.abs(b).max()), VARIED[i]


def test_padding_stays_zero(home):  # noqa: F811
    cfgs = [config(home, {"tune.lora.r": r, "optim.weight_decay": 0.1}) for r in (2, 5)]
    group = built(*cfgs)
    _, state = advance(group, 2, steps=5)
    factors = {k: v for k, v in tree.flatten(state.trainable).items() if k.endswith("/a")}
    assert factors
    for a in factors.values():
        assert a.shape[-1] == 5
        assert not np.any(a[0, ..., 2:])
        assert np.all(np.any(np.asarray(a[1]) != 0, axis=tuple(range(a.ndim - 2))))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_unstack_undoes_stack(ranks, seed):
    rng = np.random.default_rng(seed)

    def state(r):
        tree = {"a": jnp.asarray(rng.normal(size=(2, 3, r))), "n": jnp.asarray(rng.normal()), "hole": None}
        rate = None if r % 2 else jnp.float32(0.1)
        return TrainState(jnp.int32(r), tree, {"rate": rate}, (jnp.zeros((r,)),), jax.random.key(r))

    states = [state(r) for r in ranks]
    stacked = sweep.stack(states)
    for i, one in enumerate(states):
        back = sweep.unstack(stacked, i, jax.eval_shape(lambda s: s, one))
        assert jax.tree.structure(back) == jax.tree.structure(one)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(one), strict=True):
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)


def test_states_of_other_structures_do_not_stack():
    state = TrainState(jnp.int32(0), {"a": jnp.ones(2)}, None, (), jax.random.key(0))
    with pytest.raises(ValueError, match="structure"):
        sweep.stack([state, state._replace(trainable={"b": jnp.ones(2)})])


def test_one_program_serves_all_values_and_all_steps(home):  # noqa: F811
    cfgs = [config(home, values) for values in VARIED]
    group = built(*cfgs)
    advance(group, len(cfgs), steps=20)
    widths = {group.batch_at(i)["tokens"].shape[-1] for i in range(20)}
    assert group.step_fn._cache_size() == len(widths)


# --- from the command line


@pytest.fixture
def run(home, capsys):  # noqa: F811
    """`run(workdir, *flags, **settings) -> (status, stdout, stderr)` of `jaxtune sweep`.

    All points make one group, as they do where the memory is measured: `finished` and `halved` show that.
    """

    def call(workdir, *flags, **settings):
        capsys.readouterr()
        if {RATES[0], EIGHT} & set(flags) and not {"--dry-run", "--group-size=2"} & set(flags):
            flags += ("--group-size=8",)
        status = main(["sweep", *command(home, workdir, *flags, **settings)[1:]])
        return status, *capsys.readouterr()

    return call


RATES = ("--sweep.optim.lr=0.001,0.01,0.003",)
NAMES = ("lr=0.001", "lr=0.01", "lr=0.003")


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):  # noqa: F811
    """A sweep that nothing disturbed. Copy it before changing it."""
    workdir = tmp_path_factory.mktemp("sweeps") / "finished"
    assert main(["sweep", *command(home, workdir, *RATES)[1:]]) == 0
    return workdir


def table(workdir):
    """The rows of sweep.csv."""
    return list(csv.DictReader((workdir / "sweep.csv").read_text().splitlines()))


def results(workdir, names=NAMES):
    """What a sweep comes to: the bytes of the adapters and the metrics."""
    return {name: (adapter(workdir / name), read(workdir / name)) for name in names}


def test_a_member_is_left_as_a_run_alone(finished, home, tmp_path):  # noqa: F811
    assert main(command(home, tmp_path / "alone", optim__lr=0.001)) == 0
    ours, alone = finished / "lr=0.001", tmp_path / "alone"
    assert {p.name for p in alone.iterdir()} - {"checkpoints", ".lock"} == {p.name for p in ours.iterdir()} - {
        "member.json"
    }
    assert (ours / "config.json").read_text() == (alone / "config.json").read_text()
    for a, b in zip(read(ours), read(alone), strict=True):
        assert a == pytest.approx(b, rel=1e-4)  # gradient norms too
    files = ("adapter/adapter_config.json", "adapter/README.md")
    assert json.loads((ours / files[0]).read_text()) == json.loads((alone / files[0]).read_text())
    assert (ours / files[1]).exists()


def test_a_sweep_ends_with_a_table(finished):
    rows = table(finished)
    losses = [float(row["eval_loss"]) for row in rows]
    assert losses == sorted(losses)
    assert {row["lr"] for row in rows} == {"0.001", "0.01", "0.003"}
    assert all(row["status"] == "finished" for row in rows)
    assert (finished / "report.html").exists()


def test_the_table_names_the_command_for_the_best_alone(run, home, tmp_path):  # noqa: F811
    status, out, err = run(tmp_path / "s", *RATES, train__steps=4)
    assert status == 0, err
    assert "again, alone:" in out
    words = out.splitlines()[-1].split()
    assert words[:2] == ["jaxtune", "train"]
    assert not any(word.startswith("--sweep") for word in words)
    best = min(table(tmp_path / "s"), key=lambda row: float(row["eval_loss"]))
    assert f"--config.optim.lr={best['lr']}" in words


@pytest.mark.optimised
def test_members_are_the_same_in_groups_of_any_size(run, finished, tmp_path):
    status, out, _ = run(tmp_path / "two", *RATES, "--group-size=2")
    assert status == 0
    assert out.count("in one step:") == 1
    assert out.count("alone:") == 2  # the group of one, and the command at the end
    two = [name for name in NAMES if f"alone: {name}" not in out]
    assert results(tmp_path / "two", two) == results(finished, two)


@slow
def test_other_settings_run_group_after_group(run, tmp_path):
    status, out, err = run(
        tmp_path / "s", "--sweep.train.batch_size=2,4", "--sweep.optim.lr=0.01,0.001", train__steps=4
    )
    assert status == 0, err
    assert "2 in one step: batch_size=2,lr=0.01, batch_size=2,lr=0.001" in out
    assert len([p for p in (tmp_path / "s").iterdir() if (p / "adapter").is_dir()]) == 4
    assert len(list((tmp_path / "s" / "groups").iterdir())) == 2


@slow
def test_a_swept_seed_changes_the_order_of_the_data(run, home, tmp_path):  # noqa: F811
    status, _, err = run(tmp_path / "s", "--sweep.train.seed=0,1")
    assert status == 0, err
    assert main(command(home, tmp_path / "alone", train__seed=1)) == 0
    for a, b in zip(read(tmp_path / "s" / "seed=1"), read(tmp_path / "alone"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)  # lr 0.01
    assert read(tmp_path / "s" / "seed=0") != read(tmp_path / "s" / "seed=1")


@slow
def test_full_tuning_sweeps_too(run, home, tmp_path):  # noqa: F811
    lora = {"tune__lora__r": None, "tune__lora__lora_dropout": None}
    status, _, err = run(
        tmp_path / "s", "--sweep.optim.lr=0.001,0.0001", tune__method="full", train__steps=4, **lora, optim__lr=None
    )
    assert status == 0, err
    flags = {"tune__method": "full", "train__steps": 4, "optim__lr": 0.001, **lora}
    assert main(command(home, tmp_path / "alone", **flags)) == 0
    for a, b in zip(read(tmp_path / "s" / "lr=0.001"), read(tmp_path / "alone"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert (tmp_path / "s" / "lr=0.001" / "model" / "model.safetensors").exists()


# --- one that fails


@pytest.mark.optimised
def test_a_member_that_diverges_leaves_the_others_as_they_were(run, finished, tmp_path):
    status, _out, err = run(tmp_path / "s", "--sweep.optim.lr=0.001,0.01,1e30,0.003")
    assert status == 0, err
    assert results(tmp_path / "s") == results(finished)
    bad = tmp_path / "s" / "lr=1e+30"
    said = json.loads((bad / "member.json").read_text())
    assert said["status"] == "failed"
    assert "not finite at step 2" in said["why"]
    assert "train.jsonl:" in said["why"]
    assert not (bad / "adapter").exists()
    assert [row["status"] for row in table(tmp_path / "s")][-1] == "failed"
    # It left the step at the first evaluation: the checkpoints after that hold three.
    saved = tmp_path / "s" / "groups" / "0-0" / "checkpoints"
    in_step = {int(p.name): json.loads((p / "counters" / "metadata").read_text())["in_step"] for p in saved.iterdir()}
    assert in_step[12] == 3


@slow
def test_two_stay_in_the_step(run, tmp_path):
    status, _, err = run(tmp_path / "s", "--sweep.optim.lr=0.001,1e30,1e29")
    assert status == 0, err
    saved = tmp_path / "s" / "groups" / "0-0" / "checkpoints" / "12"
    assert json.loads((saved / "counters" / "metadata").read_text())["in_step"] == 2


def test_all_failed_is_a_failure(run, tmp_path):
    status, _out, err = run(tmp_path / "s", "--sweep.optim.lr=1e30,1e29")
    assert status == 1
    assert "No point has a result" in err
    assert "Traceback" not in err


def test_early_stopping_is_each_members_own(run, tmp_path, monkeypatch):
    """The first member is best at step 3, the others at the end."""

    def evaluate(state):
        steps, lanes = np.asarray(state.step), np.arange(len(state.step))
        return [{"eval/loss": float(abs(s - 3) if i == 0 else 100 - s)} for i, s in zip(lanes, steps, strict=True)]

    def make(*args):
        first = []

        def once(state):
            found = evaluate(state)
            if first and len(found) < first[0]:  # the first has left
                return [{"eval/loss": float(100 - s)} for s in np.asarray(state.step)]
            first.append(len(found))
            return found

        return once

    monkeypatch.setattr(loop, "make_evaluate", make)
    status, _out, err = run(tmp_path / "s", *RATES, train__eval_every=1, train__early_stop=2)
    assert status == 0, err
    last = {name: max(m["step"] for m in read(tmp_path / "s" / name)) for name in NAMES}
    assert last == {"lr=0.001": 5, "lr=0.01": 12, "lr=0.003": 12}
    summary = json.loads((tmp_path / "s" / "lr=0.001" / "summary.json").read_text())
    assert (summary["early_stop"], summary["best"]["step"]) == (True, 3)


# --- going on


def kill_when(argv, workdir, step):
    """Start a sweep and kill it once a member has logged `step`; return whether it was still running."""
    process = runs.start(argv)
    for line in process.stdout:
        if (found := re.match(r"step (\d+)/", line)) and int(found[1]) >= step:
            break
    process.kill()
    process.stdout.close()
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0)
    return process.exitcode != 0


@slow
def test_killed_at_random_steps_it_ends_with_the_same_bytes(run, home, finished, tmp_path):  # noqa: F811
    workdir, seed = tmp_path / "killed", random.SystemRandom().randrange(10**6)
    steps = sorted(random.Random(seed).sample(range(1, STEPS - 2), 2))
    print(f"killed at steps {steps} (seed {seed})")
    argv = ["sweep", *command(home, workdir, *RATES)[1:]]
    killed = [kill_when(argv, workdir, at) for at in steps]
    assert any(killed)
    assert run(workdir, *RATES)[0] == 0
    assert results(workdir) == results(finished)


def test_killed_while_results_are_written(run, finished, tmp_path):
    """Two of three are there; the third is read from the group's checkpoint."""
    workdir = shutil.copytree(finished, tmp_path / "copy")
    for name in ("adapter", "report.html"):
        path = workdir / "lr=0.003" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (workdir / "lr=0.003" / "member.json").write_text('{"status": "running"}')
    status, out, err = run(workdir, *RATES)
    assert status == 0, err
    assert "step 1/" not in out
    assert results(workdir) == results(finished)


def test_a_signal_saves_and_exits_3(run, finished, tmp_path, monkeypatch):
    from jaxtune.train import log

    update = log.Progress.update

    def acting(self, number, values):
        update(self, number, values)
        if number == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(log.Progress, "update", acting)
        status, _, err = run(tmp_path / "s", *RATES)
    assert status == 3
    assert "Run the same command to resume" in err
    assert run(tmp_path / "s", *RATES)[0] == 0
    assert results(tmp_path / "s") == results(finished)


def test_new_points_train_alone_and_change_nothing_else(run, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    before = everything(workdir)
    status, out, err = run(workdir, "--sweep.optim.lr=0.001,0.03,0.002")
    assert status == 0, err
    assert "2 in one step: lr=0.03, lr=0.002" in out
    assert "lr=0.001," not in out.split("in one step")[1]
    after = everything(workdir)
    touched = {k for k in before if after[k] != before[k]}
    assert touched == {"sweep.json", "sweep.csv", "report.html"}
    assert len(table(workdir)) == 5


def test_a_finished_sweep_started_again_does_nothing(run, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    before = everything(workdir)
    status, out, _ = run(workdir, *RATES)
    assert status == 0
    assert "in one step" not in out
    paths = {"sweep.csv": b"", "report.html": b""}  # they name the directory
    assert everything(workdir) | paths == before | paths


# --- halving


EIGHT = "--sweep.optim.lr=0.0001,0.0002,0.001,0.002,0.01,0.02,0.03,0.003"


@pytest.fixture(scope="module")
def halved(home, tmp_path_factory):  # noqa: F811
    """A sweep cut by halving that nothing disturbed. Do not change it."""
    workdir = tmp_path_factory.mktemp("sweeps") / "halved"
    assert main(["sweep", *command(home, workdir, EIGHT, "--halving=2")[1:]]) == 0
    return workdir


def test_halving_keeps_the_best_at_each_cut(halved):
    plan = json.loads((halved / "sweep.json").read_text())
    # 8 points, halved 3 times: cuts at 12/8, 12/4 and 12/2 steps; never below two.
    assert [rung["until"] for rung in plan["rungs"]] == [2, 3, 6, None]
    assert [sum(map(len, rung["groups"])) for rung in plan["rungs"]] == [8, 4, 2, 2]
    for rung, after in zip(plan["rungs"][:3], plan["rungs"][1:], strict=True):
        scores = {name: end["best"]["loss"] for name, end in rung["ended"].items()}
        left = [name for group in after["groups"] for name in group]
        assert max(scores[n] for n in left) <= min(
            (s for n, s in scores.items() if n not in left), default=float("inf")
        )
    [winners] = plan["rungs"][-1]["groups"]
    assert all(max(m["step"] for m in read(halved / name)) == 12 for name in winners)
    for name in plan["points"]:  # also what was cut has its adapter
        assert (halved / name / "adapter").is_dir()
    cut = next(name for name in plan["rungs"][0]["groups"][0] if name not in plan["rungs"][1]["groups"][0])
    assert json.loads((halved / cut / "summary.json").read_text())["cut_at"] == 2


@pytest.mark.optimised
def test_survivors_are_what_they_would_have_been(halved, run, tmp_path):
    assert run(tmp_path / "whole", EIGHT)[0] == 0
    plan = json.loads((halved / "sweep.json").read_text())
    [winners] = plan["rungs"][-1]["groups"]
    for name in winners:
        assert adapter(halved / name) == adapter(tmp_path / "whole" / name)


@slow
def test_halving_goes_on_where_it_was_killed(halved, run, home, tmp_path):  # noqa: F811
    flags, killed = (EIGHT, "--halving=2"), tmp_path / "killed"
    assert kill_when(["sweep", *command(home, killed, *flags)[1:]], killed, 4)  # in the third rung of four
    assert run(killed, *flags)[0] == 0
    plans = [json.loads((folder / "sweep.json").read_text()) for folder in (halved, killed)]
    assert json.dumps(plans[0], indent=1).splitlines() == json.dumps(plans[1], indent=1).splitlines()
    assert results(killed, plans[0]["points"]) == results(halved, plans[0]["points"])


@slow
@pytest.mark.parametrize("rung", [0, 1])
def test_a_checkpoint_that_is_damaged_at_a_cut_is_made_again(rung, halved, run, tmp_path):
    """As a sweep that was killed right after the cut: the group is trained again up to there, and nothing differs."""
    again, flags = shutil.copytree(halved, tmp_path / "again"), (EIGHT, "--halving=2")
    plan = json.loads((again / "sweep.json").read_text())
    del plan["rungs"][rung + 2 :]
    plan["rungs"][rung + 1]["ended"] = {}
    (again / "sweep.json").write_text(json.dumps(plan))
    for name in (name for group in plan["rungs"][rung + 1]["groups"] for name in group):
        shutil.rmtree(again / name / "adapter")
        (again / name / "summary.json").unlink()  # what was logged until the cut stays
    for folder in (again / "groups").iterdir():
        if int(folder.name.partition("-")[0]) > rung:
            shutil.rmtree(folder)
    [kept] = sorted((again / "groups" / f"{rung}-0" / "checkpoints").glob("[0-9]*"))[-1:]
    for file in kept.rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    status, _, err = run(again, *flags)
    assert status == 1
    assert f"The checkpoint of step {kept.name} cannot be read" in err and "will be trained again up to there" in err
    assert "Traceback" not in err
    assert run(again, *flags)[0] == 0
    assert results(again, plan["points"]) == results(halved, plan["points"])


# --- points


def test_points_of_a_file(run, home, tmp_path):  # noqa: F811
    file = write_jsonl(
        tmp_path / "points.jsonl",
        [{"optim.lr": 0.001, "tune.lora.r": 2}, {"optim.lr": 0.01, "tune.lora.target_modules": ["q_proj", "v_proj"]}],
    )
    status, out, err = run(tmp_path / "s", f"--points={file}", "--dry-run", "--sweep.train.seed=1,2")
    assert status == 0, err
    assert "2 in one step: seed=1,lr=0.001,r=2, seed=2,lr=0.001,r=2" in out
    assert "4 runs in 2 groups" in out
    assert not (tmp_path / "s").exists()
    status, out, err = run(None, *RATES, "--dry-run")
    assert status == 0, err
    assert "3 runs in 1 group;" in out
    (tmp_path / "points.csv").write_text("optim.lr,train.seed\n1e-3,0\n1e-2,1\n")
    status, out, err = run(tmp_path / "s", f"--points={tmp_path / 'points.csv'}", "--dry-run")
    assert status == 0, err
    assert "2 in one step: lr=0.001,seed=0, lr=0.01,seed=1" in out


def test_what_may_share_a_step(home):  # noqa: F811
    base = config(home, {})
    same = [config(home, values) for values in VARIED]
    assert {points.signature(cfg) for cfg in same} == {points.signature(base)}
    for values in (
        {"train.batch_size": 2},
        {"optim.b1": 0.8},
        {"tune.lora.target_modules": ("q_proj",)},
        {"train.steps": 49},
    ):
        assert points.signature(config(home, values)) != points.signature(base)
    random_init = [config(home, {"train.seed": s}, **{"model.init": "random"}) for s in (0, 1)]
    assert points.signature(random_init[0]) != points.signature(random_init[1])


@slow
def test_a_group_is_as_large_as_memory_allows(home, monkeypatch):  # noqa: F811
    """The compiled program decides where the formula does not."""
    found = points.resolve_points(
        [{"optim.lr": 10.0**-i} for i in range(1, 5)],
        lambda more: config(home, {}, **{k: float(v) for k, v in more.items()}),
    )
    s = grid.Sweep(home, None, [], lambda part: None)
    recipes = [s.open(point)[0].recipe for point in found]
    exact = {k: compiled_bytes(recipes[:k]) for k in (1, 2, 4)}
    assert exact[1] < exact[2] < exact[4]
    monkeypatch.setattr(grid, "free_bytes", lambda: exact[2])
    assert s._most(found) == 2
    monkeypatch.setattr(grid, "free_bytes", lambda: 10**15)
    monkeypatch.setattr(grid, "compiled_bytes", None)  # not asked
    assert s._most(found) == 4


# --- finding the rate


def valley(best, width):
    """A loss over rates with its lowest point at `best`; it diverges a hundred times above."""
    return lambda rate: math.inf if rate > 100 * best else 2 + (math.log10(rate / best) / width) ** 2


@given(st.floats(-7, 1), st.floats(-5, -2), st.floats(0.1, 3))
def test_the_rate_is_bracketed_wherever_one_starts(best, start, width):
    loss = valley(10.0**best, width)
    losses = {rate: loss(rate) for rate in (float(f"{10.0 ** (start + i / 2):.1e}") for i in range(-2, 3))}
    for _ in range(20):
        if not (new := find_lr.next_rates(losses)):
            break
        assert not set(new) & set(losses)
        losses |= {rate: loss(rate) for rate in new}
    chosen, told = find_lr.conclude(losses)
    assert losses[chosen] <= min(losses.values()) * 1.005
    assert f"optim.lr={chosen:g}" in told
    assert "was tried" not in told


def test_all_rates_diverged():
    with pytest.raises(RunFailed, match="look at the data"):
        find_lr.next_rates({1e-10: math.inf, 1e-5: math.inf})
    assert max(find_lr.next_rates({1e-4: math.inf, 1e-3: math.inf})) < 1e-4


def test_of_equal_rates_the_lowest_is_taken():
    chosen, told = find_lr.conclude({1e-4: 3.0, 1e-3: 2.001, 3e-3: 2.0, 1e-2: math.inf})
    assert chosen == 1e-3
    assert "0.003 has 2.0000, no more than 0.5% better" in told
    assert "0.0001 learns less" in told
    assert "0.01 diverged" in told


@slow
def test_find_lr_writes_a_config_that_trains(run, tmp_path):
    out = tmp_path / "found.py"
    flags = ("--find-lr", "--find-steps=4", f"--write-config={out}")
    status, said, err = run(tmp_path / "s", *flags)
    assert status == 0, err
    assert "round 1, 4 steps: 0.001, 0.0032, 0.01, 0.032, 0.1" in said
    scores = {float(row["lr"]): float(row["eval_loss"]) for row in table(tmp_path / "s") if row["eval_loss"]}
    rate = float(re.search(r"config.optim.lr = (\S+)", out.read_text())[1])
    assert scores[rate] <= min(scores.values()) * 1.005
    status = main(["train", f"--config={out}", f"--workdir={tmp_path / 'run'}"])
    assert status == 0
    made = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (made["optim"]["lr"], made["train"]["steps"]) == (rate, STEPS)
    assert run(tmp_path / "s", *flags)[0] == 2  # the file is there


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--find-lr", "--sweep.optim.lr=1,2"), "--sweep.optim.lr has no effect with --find-lr"),
        (("--find-lr", "--halving=2"), "--halving has no effect with --find-lr"),
        (("--find-lr", "--config.data.eval=none"), "compares eval losses"),
        (("--find-lr", "--write-config=a.txt"), "expected a new .py file"),
        (("--find-lr", "--find-steps=1"), "expected 2 or more"),
    ],
)
def test_bad_input_to_find_lr(run, tmp_path, flags, said):
    status, _, err = run(tmp_path / "s", *flags, train__eval_every=None)
    assert status == 2
    assert said in err


# --- bad input


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "nothing is swept"),
        (("--sweep.optim.lr=",), "an empty value"),
        (("--sweep.optim.lr=1e-3,,1e-2",), "an empty value"),
        (("--sweep.optim.lr=1e-3,0.001",), "0.001 is given twice"),
        (("--sweep.optim.lr=1e-3,fast",), "expected a finite number"),
        (("--sweep.optim.learning_rate=1",), "Did you mean 'optim.lr'?"),
        (("--sweep.log.every=1,2",), "log.every cannot be swept"),
        (("--sweep.data.eval_fraction=0.1,0.2",), "cannot be swept"),
        (("--sweep.optim.momentum=0.1,0.2",), "optim.momentum has no effect: optim.name is adamw"),
        (("--sweep.optim.lr=1e-3,1e-2", "--sweep.optim.lr=1"), "given twice"),
        (("--sweep.train.seed=" + ",".join(map(str, range(65))),), "65 runs, more than 64; add --yes"),
        (("--sweep.tune.lora.r=2,1000",), "exceeds both sides"),
        (("--sweep.tune.lora.target_modules=q_proj,qproj", "--sweep.train.batch_size=2,4"), "Did you mean 'q_proj'"),
        (("--sweep.optim.lr=1e-3,1e-2", "--halving=1"), "expected 2 or more"),
        (("--sweep.optim.lr=1e-3,1e-2", "--halving=2"), "nothing to cut among 2 points"),
        (("--sweep.optim.lr=1e-3,1e-2", "--group-size=0"), "expected 1 or more"),
        (("--sweep.optim.lr=1e-3,1e-2", "--config.log.wandb=true"), "log.wandb"),
        (("--sweep.optim.lr=1e-3,1e-2", "--find-steps=9"), "has no effect without --find-lr"),
        (("--points=nowhere.jsonl",), "cannot be read"),
    ],
)
def test_bad_input(run, tmp_path, flags, said):
    status, _, err = run(tmp_path / "s", *flags)
    assert status == 2, err
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no point in it"),
        ("{}", "an empty point"),
        ('{"optim.lr": 1e-3}\n{"optim.lr": 1e-3}', "the point lr=0.001 twice"),
        ('{"optim.lr": "fast"}', "points.jsonl:1"),
        ('{"optim.lr": 1', "points.jsonl:1: not valid JSON"),
        ("[1]", "expected an object"),
    ],
)
def test_bad_points_files(run, tmp_path, text, said):
    (tmp_path / "points.jsonl").write_text(text)
    status, _, err = run(tmp_path / "s", f"--points={tmp_path / 'points.jsonl'}")
    assert status == 2
    assert said in err


def test_a_member_of_another_config_is_refused(run, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "copy")
    before = everything(workdir)
    status, _, err = run(workdir, *RATES, tune__lora__r=4)
    assert status == 2
    assert "tune.lora.r: 2 -> 4" in err
    assert everything(workdir) == before
    status, _, err = run(workdir, *RATES, "--halving=3")
    assert status == 2
    assert "no --halving" in err


def test_a_member_is_not_trained_on_alone(finished, home, capsys):  # noqa: F811
    assert main(command(home, finished / "lr=0.001", optim__lr=0.001)) == 2
    assert "member of a sweep" in capsys.readouterr().err


def test_a_directory_that_is_no_sweep_is_left_alone(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    status, _, err = run(tmp_path, *RATES)
    assert status == 2
    assert "holds no sweep" in err


@pytest.mark.parametrize(("name", "together"), [("adamw", True), ("muon", False), ("adafactor", False)])
def test_optimizers_that_mix_entries_keep_ranks_apart(home, name, together):  # noqa: F811
    cfgs = [config(home, {"tune.lora.r": r, "optim.name": name}) for r in (2, 4)]
    assert (points.signature(cfgs[0]) == points.signature(cfgs[1])) == together


def test_points_have_names_that_a_file_system_takes():
    made = points.resolve_points(
        [{"model.path": "a/b c", "tune.lora.target_modules": ("x" * 200,)}, {"model.path": "a_b c"}], lambda more: more
    )
    assert all("/" not in p.name and len(p.name) <= 120 for p in made)
    assert made[0].name != made[1].name
    with pytest.raises(UserError, match="twice"):
        points.resolve_points([{"train.seed": 1}, {"train.seed": 1}], lambda more: more)
