"""`jaxtune train` from the command line to the bytes on the disk, killed, resumed, and refused."""

import errno
import json
import os
import random
import re
import shutil
import signal
import textwrap
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs
from runs import STEPS, adapter, checkpoints, command, compiled, everything, home, read, sums, write_jsonl  # noqa: F401
from safetensors.numpy import load_file, save_file

from jaxtune.cli import main
from jaxtune.config import resolve
from jaxtune.config.recipe import experiment
from jaxtune.run import devices, fit
from jaxtune.run.workdir import check_workdir
from jaxtune.train import log, loop, recipe


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):  # noqa: F811
    """The workdir of a run that nothing disturbed. Copy it before changing it."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    assert main(command(home, workdir, log__tensorboard="true")) == 0
    return workdir


@pytest.fixture
def copy(alone, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(alone, tmp_path / "copy")


@pytest.fixture
def run(home, capsys):  # noqa: F811
    """`run(workdir, **settings) -> (status, stdout, stderr)`."""

    def call(workdir, *flags, **settings):
        capsys.readouterr()
        status = main(command(home, workdir, *flags, **settings))
        return status, *capsys.readouterr()

    return call


def same(workdir, alone):
    return adapter(workdir) == adapter(alone) and read(workdir) == read(alone)


# --- a run


def test_metrics_are_those_of_the_contract(alone):
    lines = read(alone)
    steps = [m for m in lines if "train/loss" in m]
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1))
    groups = [f"{part}/lora_{factor}" for part in ("attention", "mlp") for factor in "AB"]
    by_group = {f"train/{metric}/{group}" for metric in ("grad_norm", "update_ratio") for group in groups}
    named = {"step", "train/loss", "train/lr", "train/grad_norm", "train/tokens"}
    assert all(set(m) == named | by_group for m in steps)
    for m in steps:
        squares = sum(m[f"train/grad_norm/{group}"] ** 2 for group in groups)
        assert m["train/grad_norm"] == pytest.approx(squares**0.5, rel=1e-3)
    raw = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert all(m["train/tokens_per_second"] > 0 for m in raw if "train/loss" in m)
    evaluations = [m for m in lines if "eval/loss" in m]
    assert [m["step"] for m in evaluations] == [0, 4, 8, 12]
    assert all(set(m) == {"step", "eval/loss", "eval/perplexity", "eval/tokens"} for m in evaluations)
    assert all(m["eval/perplexity"] == pytest.approx(np.exp(m["eval/loss"])) for m in evaluations)
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"]
    # completions "83" .. "97" and the end token
    assert evaluations[0]["eval/tokens"] == sum(len(row["completion"]) + 1 for row in sums(40, 48))
    assert steps[0]["train/lr"] == pytest.approx(0.01)


def test_a_run_directory_is_complete(alone):
    assert {p.name for p in alone.iterdir()} == {
        "base.json",
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "checkpoints",
        "adapter",
        "tensorboard",
        ".lock",
    }
    config = json.loads((alone / "config.json").read_text())
    assert config["tune"]["lora"]["r"] == 2
    assert config["optim"]["lr"] == 0.01
    assert config["versions"]["jax"] == jax.__version__
    assert json.loads((alone / "summary.json").read_text())["best"]["step"] == 12


def test_tensorboard_events_say_what_the_metrics_say(alone):
    from tensorboardX.proto.event_pb2 import Event

    [file] = (alone / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")  # a record: length, its checksum, data, checksum
        event = Event.FromString(data[12 : 12 + length])
        found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        data = data[16 + length :]
    for line in read(alone):
        for name, value in line.items():
            if name != "step":
                assert found[name, line["step"]] == pytest.approx(value, rel=1e-5)


def test_two_runs_are_the_same_bytes(run, alone, tmp_path):
    assert run(tmp_path / "again")[0] == 0
    assert same(tmp_path / "again", alone)


@pytest.mark.slow
def test_batches_split_in_two_have_the_same_losses(run, alone, tmp_path):
    assert run(tmp_path / "split", train__grad_accum=2)[0] == 0
    for a, b in zip(read(tmp_path / "split"), read(alone), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def best_at(monkeypatch, best):
    """Let every evaluation find the step's distance from `best`."""
    evaluate = lambda state: [{"eval/loss": float(abs(int(state.step) - best))}]  # noqa: E731
    monkeypatch.setattr(loop, "make_evaluate", lambda *args: evaluate)


def test_the_newest_checkpoints_and_the_best_are_kept(alone, run, tmp_path, monkeypatch):
    assert checkpoints(alone) == [9, 12]
    best_at(monkeypatch, 4)
    status, out, _ = run(tmp_path / "one", train__keep=1)
    assert status == 0
    assert checkpoints(tmp_path / "one") == [4, 12]
    # What is exported are the weights of the best, not the last.
    assert "The best evaluation was at step 4;" in out
    assert exported(tmp_path / "one") == saved(tmp_path / "one", 4) != saved(tmp_path / "one", 12)


def exported(workdir):
    """The numbers of all factors in an adapter, sorted."""
    found = load_file(workdir / "adapter" / "adapter_model.safetensors")
    return sorted(np.concatenate([x.ravel() for x in found.values()]).tolist())


def saved(workdir, step):
    """The numbers of all factors in a checkpoint, sorted."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        found = reader.restore((workdir / "checkpoints" / str(step) / "state").absolute())
    return sorted(np.concatenate([np.ravel(x) for k, x in found.items() if k.startswith("trainable/")]).tolist())


# --- killed, stopped, gone on


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_with_the_same_bytes(home, run, alone, tmp_path):  # noqa: F811
    workdir, seed = tmp_path / "killed", random.SystemRandom().randrange(10**6)
    steps = sorted(random.Random(seed).sample(range(1, STEPS - 2), 2))
    print(f"killed at steps {steps} (seed {seed})")
    killed = [kill_at(command(home, workdir), workdir, at) for at in steps]
    assert any(killed)
    assert run(workdir)[0] == 0
    assert same(workdir, alone)


@pytest.mark.slow
def test_killed_again_and_again(home, run, alone, tmp_path):  # noqa: F811
    for trial in range(3):
        workdir, rng = tmp_path / f"killed{trial}", random.Random(trial)
        killed = [kill_at(command(home, workdir), workdir, at) for at in sorted(rng.sample(range(1, STEPS), 3))]
        assert any(killed)
        assert run(workdir)[0] == 0
        assert same(workdir, alone), trial


def kill_at(argv, workdir, step):
    """Start a run and kill it as soon as metrics.jsonl holds a line of `step`; return whether it was still running.

    It prints a line when it has written one.
    """
    process = runs.start(argv)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step ") and any(m["step"] >= step for m in read(workdir)):
            break
    process.kill()
    process.stdout.close()
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0), "".join(said)
    return process.exitcode != 0


def during(monkeypatch, step, act):
    """Call `act` when `step` is logged."""
    update = log.Progress.update

    def acting(self, number, values):
        update(self, number, values)
        if number == step:
            act()

    monkeypatch.setattr(log.Progress, "update", acting)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_3_and_the_same_command_goes_on(number, run, alone, tmp_path, monkeypatch):
    workdir = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        during(patch, 5, lambda: os.kill(os.getpid(), number))
        status, _, err = run(workdir)
    assert status == 3
    assert "Run the same command to resume." in err
    assert "Traceback" not in err
    assert checkpoints(workdir)[-1] in (5, 6)
    assert not (workdir / "adapter").exists()
    status, out, _ = run(workdir)
    assert status == 0
    assert f"Resuming after step {6} of {STEPS}" in out
    assert same(workdir, alone)


def test_a_finished_run_started_again_changes_no_number(run, alone, copy):
    before = everything(copy / "checkpoints")
    status, out, _ = run(copy, log__tensorboard="true")
    assert status == 0
    assert f"Resuming after step {STEPS} of {STEPS}" in out
    assert same(copy, alone)
    assert everything(copy / "checkpoints") == before


def test_a_checkpoint_cut_short_gives_way_to_the_one_before(run, alone, copy):
    files = [p for p in (copy / "checkpoints" / "12" / "state").rglob("*") if p.is_file()]
    for file in [p for p in files if p.parent.name == "d"]:  # not all are read: orbax keeps what it merged
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    shutil.rmtree(copy / "adapter")
    status, out, _ = run(copy)
    assert status == 0
    assert "The checkpoint of step 12 cannot be read" in out
    assert "Resuming after step 9" in out
    assert same(copy, alone)


def test_more_steps_and_other_logging_may_go_on(run, copy):
    status, out, _ = run(copy, train__steps=STEPS + 4, log__every=2, train__eval_every=8, train__keep=1)
    assert status == 0
    assert "Resuming after step 12 of 16" in out
    lines = read(copy)
    assert [m["step"] for m in lines if "train/loss" in m] == [*range(1, 13), 14, 16]
    assert json.loads((copy / "config.json").read_text())["train"]["steps"] == 16


def test_every_other_difference_is_refused_by_name(run, copy):
    before = everything(copy)
    status, _, err = run(copy, optim__lr=0.02, tune__lora__r=4, train__seed=1, log__every=3)
    assert status == 2
    for line in ("optim.lr: 0.01 -> 0.02", "tune.lora.r: 2 -> 4", "train.seed: 0 -> 1", "nothing was changed"):
        assert line in err
    assert "log.every" not in err
    assert everything(copy) == before


def test_fewer_steps_than_were_done_are_refused(run, copy):
    before = everything(copy)
    status, _, err = run(copy, train__steps=7)
    assert status == 2
    assert "has done 12 steps, and this config has 7" in err
    assert everything(copy) == before


def test_data_that_changed_on_the_disk_are_refused(run, home, tmp_path):  # noqa: F811
    file, workdir = write_jsonl(tmp_path / "train.jsonl", sums(0, 30)), tmp_path / "run"
    assert run(workdir, data__train=file)[0] == 0
    write_jsonl(file, [*sums(0, 29), {"prompt": "29 and 32 make ", "completion": "62"}])
    before = everything(workdir)
    status, _, err = run(workdir, data__train=file)
    assert status == 2
    assert "has changed since it started" in err
    assert everything(workdir) == before


def test_early_stopping_exports_the_best(run, tmp_path, monkeypatch):
    """Also where it stops before the first line of losses is due."""
    workdir = tmp_path / "early"
    best_at(monkeypatch, 3)
    status, out, err = run(workdir, train__eval_every=1, train__early_stop=2, log__every=100)
    assert status == 0, err
    assert [m["step"] for m in read(workdir)] == [0, 1, 2, 3, 4, 5]
    assert exported(workdir) == saved(workdir, 3)
    assert "\n5 steps" in out
    summary = json.loads((workdir / "summary.json").read_text())
    assert (summary["early_stop"], summary["best"]) == (True, {"step": 3, "loss": 0.0})


# --- what fails while it runs


def test_a_loss_that_is_not_finite(run, home, tmp_path):  # noqa: F811
    workdir = tmp_path / "nan"
    status, _, err = run(workdir, optim__lr=1e30, train__save_every=1)
    assert status == 1
    assert "not finite at step 2" in err
    assert "train.jsonl:" in err
    assert "last good checkpoint is of step 1" in err
    assert "Traceback" not in err
    assert checkpoints(workdir) == [1]
    assert not (workdir / "adapter").exists()


def test_a_base_that_is_not_finite_is_blamed_and_not_the_rate(run, home, tmp_path):  # noqa: F811
    """Where it shows at once, and where it shows with the row that has the one token."""
    folder = shutil.copytree(home / "model", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="numbers that are not finite"):
        status, _, err = run(tmp_path / "nan", model__path=folder)
    assert status == 1
    assert f"The base {folder} itself is damaged: " in err and "mlp/up_proj/kernel holds 1 number that is not" in err
    assert "optim.lr" not in err


def test_a_best_checkpoint_that_is_damaged_gives_way_to_the_last(run, tmp_path, monkeypatch):
    best_at(monkeypatch, 4)
    assert run(tmp_path / "one", train__keep=1)[0] == 0
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "4" / "state")
    status, out, _ = run(tmp_path / "one", train__keep=1)
    assert status == 0
    assert "cannot be read" in out and "the weights of the last step are the result" in out
    assert exported(tmp_path / "one") == saved(tmp_path / "one", STEPS)
    assert json.loads((tmp_path / "one" / "summary.json").read_text())["best"] is None


def test_out_of_device_memory(run, tmp_path, monkeypatch):
    def make(*args, **kwargs):
        def step(*args):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 GiB")

        return step

    monkeypatch.setattr(recipe, "make_train_step", make)
    status, _, err = run(tmp_path / "oom")
    assert status == 1
    assert "Traceback" not in err
    ways = [line.strip() for line in err.splitlines()[1:]]
    assert len(ways) == 3
    assert ways[0] == "--config.train.grad_accum=2 (2 rows at a time, the same result)"
    for way in ways:  # what is printed is taken
        flags = [flag for flag in way.partition(" (")[0].split() if flag.startswith("--")]
        assert flags
        assert run(tmp_path / "again", "--dry-run", *flags)[0] == 0


def test_a_disk_that_fills_up(run, tmp_path, monkeypatch):
    """Also while an event for TensorBoard is written, by whatever thread."""
    from tensorboardX.record_writer import RecordWriter

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    during(monkeypatch, 5, lambda: monkeypatch.setattr(RecordWriter, "write", full))
    status, _, err = run(tmp_path / "full", log__tensorboard="true")
    assert status == 1
    assert "No room is left on the disk" in err
    assert "Traceback" not in err
    assert checkpoints(tmp_path / "full") == [3, 4]


def test_remedies_after_running_out_change_what_the_config_asks_for(home):  # noqa: F811
    flags = {"train.batch_size": 4, "train.grad_accum": 4, "model.remat": "full", "tune.method": "full"}
    flags |= {"model.path": home / "model", "data.train": home / "train.jsonl"}
    cfg = resolve(flags={path: str(value) for path, value in flags.items()})
    ways = fit.after_running_out(experiment(cfg))
    assert 1 <= len(ways) <= 3
    for way in ways:
        assert "grad_accum" not in way and "remat=none" not in way  # nothing is left to split or to recompute


# --- wrong input: exit 2, one message, nothing written


@pytest.fixture
def refused(run, tmp_path, monkeypatch):
    """`refused(**settings) -> message`: nothing may be compiled or written."""

    def never(*args):
        raise AssertionError("a step was called")

    def call(**settings):
        workdir = tmp_path / "refused"
        monkeypatch.setattr(recipe, "make_train_step", lambda *args, **kwargs: never)
        monkeypatch.setattr(recipe, "make_eval_step", lambda *args, **kwargs: never)
        status, _, err = run(workdir, **settings)
        assert status == 2, err
        assert err.startswith("jaxtune: error: ")
        assert "Traceback" not in err
        assert not workdir.exists()
        return err

    return call


def test_max_length_above_the_positions(refused):
    assert "data.max_length=65 exceeds the 64 positions" in refused(data__max_length=65)


def test_a_missing_model(refused, tmp_path):
    assert f"The model directory '{tmp_path / 'none'}' does not exist" in refused(model__path=tmp_path / "none")


@pytest.fixture
def other_model(home, tmp_path):  # noqa: F811
    """A copy of the model, to spoil."""
    return shutil.copytree(home / "model", tmp_path / "model")


def test_a_pickled_checkpoint(refused, other_model):
    (other_model / "model.safetensors").unlink()
    (other_model / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    err = refused(model__path=other_model)
    assert "pytorch_model.bin" in err
    assert "safetensors" in err


def test_weights_cut_short(refused, other_model):
    file = other_model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cut short" in refused(model__path=other_model)


def test_an_unsupported_family(refused, other_model):
    (other_model / "config.json").write_text(json.dumps(runs.CONFIG | {"model_type": "lama"}))
    err = refused(model__path=other_model)
    assert "'lama' is not supported" in err
    assert "Did you mean 'llama'" in err


def test_a_tokenizer_larger_than_the_embedding(refused, other_model):
    weights = load_file(other_model / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:200]
    save_file(weights, other_model / "model.safetensors")
    (other_model / "config.json").write_text(json.dumps(runs.CONFIG | {"vocab_size": 200, "eos_token_id": 1}))
    err = refused(model__path=other_model)
    assert "tokenizer (258 tokens) is larger than the model's embedding (200 rows)" in err


def test_a_missing_file(refused, tmp_path):
    assert "none.jsonl" in refused(data__train=tmp_path / "none.jsonl")


def test_a_missing_column(refused, tmp_path):
    file = write_jsonl(tmp_path / "qa.jsonl", [{"question": "a", "answer": "b"}])
    err = refused(data__train=file)
    assert "question" in err
    assert "Set data.columns, for example prompt=question,completion=answer" in err


def test_a_malformed_line(refused, tmp_path):
    file = write_jsonl(tmp_path / "torn.jsonl", sums(0, 3))
    file.write_text(file.read_text() + '{"prompt": "4')
    assert f"{file}:4" in refused(data__train=file)


def test_no_trained_token_at_all(refused, tmp_path):
    rows = [{"prompt": "a" * 70, "completion": "b"}] * 3
    err = refused(data__train=write_jsonl(tmp_path / "long.jsonl", rows))
    assert "none of its 3 rows has a token to train on" in err


def test_a_target_that_matches_nothing(refused):
    err = refused(tune__lora__target_modules="q_proj,qproj")
    assert "'qproj'" in err
    assert "Did you mean 'q_proj'" in err


def test_an_unknown_setting(refused):
    assert "optim.lr" in refused(optim__learning_rate=1)


def test_a_batch_that_does_not_divide_over_the_devices(refused, monkeypatch):
    monkeypatch.setattr(devices, "make_mesh", lambda **sizes: SimpleNamespace(shape={"data": 8}))
    err = refused(train__batch_size=12)
    assert "micro-batch of 12 rows" in err
    assert "8 devices; choose a multiple of 8" in err


def test_no_room_on_the_disk(refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=2**40, used=0, free=1000))
    assert "0.0 MiB free" in refused()


def test_a_workdir_that_is_no_run(run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    before = everything(tmp_path)
    status, _, err = run(tmp_path / "thesis")
    assert status == 2
    assert "is not empty and holds no run" in err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("left", [".lock", ".config.json.1f2e.tmp"])
def test_what_a_kill_before_the_first_step_left_is_no_obstacle(left, tmp_path):
    (tmp_path / left).write_text("{")
    assert check_workdir(tmp_path, None) is False


@pytest.mark.parametrize("inside", ["", "run"])
def test_a_workdir_that_is_a_file(inside, run, tmp_path):
    (tmp_path / "thesis").write_text("precious")
    status, _, err = run(tmp_path / "thesis" / inside)
    assert status == 2
    assert "thesis is a file, not a directory" in err
    assert (tmp_path / "thesis").read_text() == "precious"


def test_no_workdir(run):
    status, _, err = run(None)
    assert status == 2
    assert "--workdir=DIR is missing" in err


# --- before the run


def test_a_dry_run_checks_all_shows_rows_and_compiles_nothing(run, tmp_path, monkeypatch):
    for name in ("make_train_step", "make_eval_step"):
        monkeypatch.setattr(recipe, name, lambda *args, **kwargs: None)
    status, out, _ = run(tmp_path / "dry", "--dry-run")
    assert status == 0
    assert not (tmp_path / "dry").exists()
    assert "12 steps of 4 rows; every check passed, nothing was compiled." in out
    assert out.count(" make ") >= 2
    assert run(tmp_path / "dry", "--dry-run", tune__lora__target_modules="qproj")[0] == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=2**40, used=0, free=1000))
    assert run(tmp_path / "dry", "--dry-run")[0] == 2


def test_params_tells_what_train_will_tell(run, home, tmp_path, capsys):  # noqa: F811
    for targets in ("all-linear", r"model\.layers\.1\..*_proj"):
        _, out, _ = run(tmp_path / "dry", "--dry-run", tune__lora__target_modules=targets)
        [line] = [x for x in out.splitlines() if x.startswith("trainable params")]
        argv = [f"--config.model.path={home / 'model'}", "--config.tune.lora.r=2"]
        assert main(["params", *argv, f"--config.tune.lora.target_modules={targets}"]) == 0
        assert line in capsys.readouterr().out


# --- other methods, real data


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "head"])
def test_whole_models_come_out(method, run, tmp_path):
    """And killed on the way they come out the same."""
    none = {"tune__lora__r": None, "tune__lora__lora_dropout": None}
    status, _, err = run(tmp_path / "run", tune__method=method, **none)
    assert status == 0, err
    import jaxtune

    _, params = jaxtune.load(tmp_path / "run" / "model")
    assert ("lm_head" in params) == (method == "head")
    losses = [m["eval/loss"] for m in read(tmp_path / "run") if "eval/loss" in m]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # peft tells of the base's name
@pytest.mark.parametrize("saved", [None, "embed_tokens,lm_head"])
def test_new_tokens_of_a_config_have_rows_that_are_trained(saved, run, home, tmp_path, capsys):  # noqa: F811
    """From the tokenizer of the run to its result in peft, and further training of that."""
    import torch
    import transformers

    from jaxtune.infer.source import load_target

    rows = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": f"{i}<add>", "completion": f"<is>{i + 1}"} for i in range(24)]
    )
    settings = {"data__train": rows, "data__eval": rows, "model__new_tokens": "<add>,<is>", "train__steps": 4}
    settings |= {"tune__lora__modules_to_save": saved, "tune__lora__lora_dropout": 0, "optim__lr": 0.1}
    status, out, err = run(tmp_path / "run", **settings)
    assert status == 0, err
    adapter = tmp_path / "run" / "adapter"
    target = load_target(tmp_path / "run")
    new = target.tokenizer.convert_tokens_to_ids(["<add>", "<is>"])
    assert new == [258, 259] and target.module.spec.vocab == 260
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert said["trainable_token_indices"] == (None if saved else new)
    tokens = np.array([[49, 258, 259, 50]], np.int32)
    ours = np.asarray(target.module.apply({"params": target.params}, tokens))
    [code] = re.findall(r"load it with peft:\n((?:  .*\n|\n)+)", out)
    names = {}
    exec(textwrap.dedent(code), names)
    with torch.no_grad():
        theirs = names["model"].eval()(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert names["tokenizer"]("<is>").input_ids == [259]
    assert main(["eval", str(tmp_path / "run"), "--rows=4"]) == 0, capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        np.testing.assert_allclose(merged(torch.tensor(tokens, dtype=torch.long)).logits.numpy(), ours, atol=1e-4)

    own = {f"tune__lora__{name}": None for name in ("r", "lora_dropout", "modules_to_save")}
    further = settings | own | {"model__path": adapter, "model__new_tokens": None, "optim__lr": 0.01}
    status, _, err = run(tmp_path / "further", **further)
    assert status == 0, err
    losses = [[m["eval/loss"] for m in read(tmp_path / name) if "eval/loss" in m] for name in ("run", "further")]
    assert losses[1][0] == pytest.approx(losses[0][-1], rel=1e-3) and losses[1][-1] < losses[1][0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model__new_tokens": "</s>"}, "model.new_tokens: '</s>' is a token already"),
        ({"model__new_tokens": "<a>,<a>"}, "model.new_tokens: '<a>' is empty or given twice"),
        ({"model__new_tokens": "<a>", "tune__method": "ia3"}, "nothing trains the row"),
    ],
)
def test_new_tokens_that_cannot_be(settings, said, run, tmp_path):
    none = {"tune__lora__r": None, "tune__lora__lora_dropout": None} if "tune__method" in settings else {}
    status, _, err = run(tmp_path / "run", "--dry-run", **settings, **none)
    assert status == 2 and said in err


REAL = {
    "gsm8k": {"data__train": "gsm8k/train.jsonl", "data__columns": "prompt=question,completion=answer"},
    "wikisql": {"data__train": "wikisql/train.jsonl"},
    "toolcall": {"data__train": "toolcall/glaive_toolcall_en_demo.json", "data__max_length": 512},
}


@pytest.mark.optimised
@pytest.mark.parametrize("name", REAL)
def test_held_out_loss_falls_on_real_data(name, assets, run, tmp_path):
    settings = {"data__max_length": 256} | REAL[name] | {"data__train": assets / "data" / REAL[name]["data__train"]}
    status, out, err = run(
        tmp_path / "run",
        **settings,
        model__path=assets / "models" / "stories260k",
        data__eval=None,
        data__eval_fraction=0.02,
        tune__lora__r=8,
        tune__lora__lora_dropout=None,
        optim__lr=3e-3,
        train__steps=30,
        train__batch_size=8,
        train__eval_every=30,
        train__eval_batches=4,
        train__save_every=None,
        log__every=10,
    )
    assert status == 0, err
    losses = [m["eval/loss"] for m in read(tmp_path / "run") if "eval/loss" in m]
    assert losses[-1] < 0.9 * losses[0]
    assert f"over {settings['data__max_length']} tokens dropped" in out
