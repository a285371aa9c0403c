"""Runs of two real processes with two simulated devices each: the numbers of one process, one writer, one end."""

import os
import signal
import socket
import time

import numpy as np
import pytest
import runs
from runs import compiled, home  # noqa: F401
from safetensors.numpy import load_file

from jaxtune.cli import main
from jaxtune.errors import UserError
from jaxtune.train import processes

FULL = {"tune__method": "full", "tune__lora__r": None, "tune__lora__lora_dropout": None, "optim__lr": 0.003}
SECONDS = 150


def pair(monkeypatch, home, workdir, *flags, each=({}, {}), **settings):  # noqa: F811
    """Start two processes; `each`: settings of one of them."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    own = (f"--coordinator=localhost:{port}", "--num-processes=2", "--wait=60", *flags)
    return [runs.start(runs.command(home, workdir, *own, f"--process-id={i}", **settings | each[i])) for i in range(2)]


def end(pair):
    """The exit statuses and what was said."""
    said = []
    for process in pair:
        with process.stdout:
            said.append(process.stdout.read())
        process.join(SECONDS)
    return [process.exitcode for process in pair], said


def wait_for_checkpoint(started, workdir, after=0):
    """The step of a checkpoint later than `after`."""
    while not (workdir / "checkpoints").exists() or max([0, *runs.checkpoints(workdir)]) <= after:
        assert all(process.is_alive() for process in started), end(started)
        time.sleep(0.05)
    return max(runs.checkpoints(workdir))


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_together(home, tmp_path, monkeypatch):  # noqa: F811
    """Full fine-tuning over fsdp 4, stopped in the middle by a signal to one, against one device."""
    steps = {"train__steps": 6, "train__eval_every": 3, "train__save_every": 3, **FULL}
    assert main(runs.command(home, tmp_path / "one", **steps)) == 0
    started = pair(monkeypatch, home, tmp_path / "two", mesh__fsdp=4, **steps)
    wait_for_checkpoint(started, tmp_path / "two")
    os.kill(started[1].pid, signal.SIGTERM)
    codes, said = end(started)
    assert codes in ([3, 3], [0, 0]), said  # the run may have been over
    if codes == [3, 3]:
        codes, said = end(pair(monkeypatch, home, tmp_path / "two", mesh__fsdp=4, **steps))
        assert codes == [0, 0], said
        assert "Resuming" in said[0]
    assert "loss" not in said[1]  # one process speaks
    ours, want = runs.read(tmp_path / "two"), runs.read(tmp_path / "one")
    assert [sorted(m) for m in ours] == [sorted(m) for m in want]
    for name in ("train/loss", "eval/loss", "train/grad_norm"):
        np.testing.assert_allclose(*([m[name] for m in lines if name in m] for lines in (ours, want)), rtol=1e-5)
    ours, want = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("two", "one"))
    assert ours.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(ours[name], want[name], atol=2e-5)


@pytest.mark.slow
def test_one_that_dies_or_is_stuck_ends_the_other_and_both_go_on_to_the_same_bytes(home, tmp_path, monkeypatch):  # noqa: F811
    steps = {"train__steps": 200, "train__save_every": 5, "train__eval_every": 100}
    assert end(pair(monkeypatch, home, tmp_path / "alone", **steps))[0] == [0, 0]
    saved = 0
    for who, how in ((1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL)):
        started = pair(monkeypatch, home, tmp_path / "run", "--stuck-after=60", **steps)
        saved = wait_for_checkpoint(started, tmp_path / "run", after=saved)
        os.kill(started[who].pid, how)
        other = started[1 - who]
        other.join(150)
        assert other.exitcode in ((1,) if who else (1, -signal.SIGABRT)), end(started)  # JAX's runtime may abort
        started[who].kill()
        _, said = end(started)
        assert "The job ends. Start all processes again" in said[1 - who] or other.exitcode != 1
    assert end(pair(monkeypatch, home, tmp_path / "run", **steps))[0] == [0, 0]
    assert runs.read(tmp_path / "run") == runs.read(tmp_path / "alone")
    assert runs.adapter(tmp_path / "run") == runs.adapter(tmp_path / "alone")


def test_processes_that_differ_are_refused(home, tmp_path, monkeypatch):  # noqa: F811
    codes, said = end(pair(monkeypatch, home, tmp_path / "run", each=({}, {"optim__lr": 0.02})))
    assert codes == [2, 2], said
    assert all("differ in their settings: process 0 has another than 1" in text for text in said)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1", None, 2), "--process-id is missing"),
        (("localhost:1", 2, 2), "expected a number from 0 to 1"),
        (("localhost", 0, 2), "expected host:port"),
    ],
)
def test_flags_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=message):
        processes.start(*given)


def test_launchers_are_recognised():
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}
    assert processes._launched(slurm)
    assert not processes._launched(slurm | {"SLURM_NTASKS": "1"})
    assert processes._launched({"OMPI_COMM_WORLD_SIZE": "4"})
    assert not processes._launched({})
    assert not processes._launched(slurm | {"SLURM_STEP_NUM_TASKS": "1"})  # a shell in an allocation of two tasks


def test_tasks_may_be_runs_of_their_own(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert processes.start(None, None, 1) is False
