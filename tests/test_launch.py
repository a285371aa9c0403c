"""The scripts of launch/ against stand-ins for jaxtune, nvidia-smi, sbatch and scontrol."""

import csv
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxtune.commands import train
from jaxtune.report.sweep_table import differing_settings, sweep_rows, write_points

REPO = Path(__file__).resolve().parent.parent
LAUNCH = REPO / "launch"
TOOLS = ("bash", "cat", "cp", "dirname", "env", "flock", "mkdir", "rm", "seq", "sleep")
SECONDS = 30  # a script that takes longer hangs

# Behaves as PLAN (JSON: learning rate -> behaviour; "" where no rate is given) tells: "ok LOSS [LOSS ...]" are
# evaluations; "exit N"; "wait" says so in the pipe, and at SIGTERM saves and exits with 3; the next time it finishes.
JAXTUNE = f"""#!{sys.executable} -SE
import json, os, signal, sys
from pathlib import Path

signals = [signal.SIGTERM, signal.SIGINT]
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
flags = dict(flag.partition("=")[::2] for flag in sys.argv[2:])
gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps({{"argv": sys.argv[1:], "gpu": gpu}}), file=calls)
workdir = Path(flags["--workdir"])
kind, *values = json.loads(os.environ["PLAN"])[flags.get("--config.optim.lr", "")].split()
if kind == "exit":
    print("it broke")
    sys.exit(int(values[0]))
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "config.json").write_text(json.dumps({{"optim": {{"lr": flags.get("--config.optim.lr")}}}}))
if kind == "wait" and not (workdir / "checkpoint").exists():
    with open(os.environ["PIPE"], "w") as pipe:
        print(os.getpid(), file=pipe)
    signal.sigwait(signals)
    (workdir / "checkpoint").touch()
    sys.exit(3)
with (workdir / "metrics.jsonl").open("w") as file:
    for step, loss in enumerate(values or ["1.0"], 1):
        print(json.dumps({{"step": step, "train/loss": 2.5}}), file=file)
        print(json.dumps({{"step": step, "eval/loss": float(loss)}}), file=file)
(workdir / "adapter").mkdir(exist_ok=True)
(workdir / "summary.json").write_text("{{}}")
"""
NVIDIA_SMI = """#!/usr/bin/env bash
[[ -z $SMI_FAILS ]] || { echo "no driver" >&2; exit 9; }
[[ "$*" == "--query-gpu=index,memory.used --format=csv,noheader,nounits" ]] || exit 2
echo "$SMI"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$SCONTROL_CALLS"
[[ $1 != show ]] || echo "JobId=$4 JobState=$JOB_STATE Reason=None"
"""
# As Slurm does, it runs a copy of the script in the folder it was called from.
SBATCH = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do [[ $1 != --array=* ]] || range=${1#*=}; shift; done
cp "$1" "$SPOOL/slurm_script"
export SLURM_JOB_ID=100
[[ -n ${range-} ]] || exec bash "$SPOOL/slurm_script" "${@:2}"
for index in $(seq "${range%-*}" "${range#*-}"); do
  SLURM_JOB_ID=$((100 + index)) SLURM_ARRAY_TASK_ID=$index bash "$SPOOL/slurm_script" "${@:2}" || status=$?
done
exit "${status-0}"
"""


class Place:
    """A folder with the stand-ins, where scripts run."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.stand_in("jaxtune", JAXTUNE)
        (folder / "config.py").write_text("")
        (folder / "launch").symlink_to(LAUNCH)
        os.mkfifo(folder / "pipe")
        self.pipe = os.open(folder / "pipe", os.O_RDWR)
        self.env = {
            "PATH": str(self.bin),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPO),
            "XDG_RUNTIME_DIR": str(folder),
            "CALLS": str(folder / "calls"),
            "PIPE": str(folder / "pipe"),
            "PLAN": "{}",
            "SMI_FAILS": "",
            "SCONTROL_CALLS": str(folder / "scontrol"),
            "JOB_STATE": "RUNNING",
            "SPOOL": str(folder / "spool"),
        }

    def stand_in(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def gpus(self, *used: int) -> None:
        self.stand_in("nvidia-smi", NVIDIA_SMI)
        self.env["SMI"] = "\n".join(f"{index}, {mib}" for index, mib in enumerate(used))

    def slurm(self) -> None:
        self.stand_in("scontrol", SCONTROL)
        self.stand_in("sbatch", SBATCH)
        (self.folder / "spool").mkdir()

    def start(self, *command: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        # A shell cannot trap what it inherits as ignored, and a test run may be under nohup or in the background.
        inherited = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT)}
        try:
            return subprocess.Popen(command, cwd=self.folder, env=self.env, text=True, **pipes)
        finally:
            for number, handler in inherited.items():
                signal.signal(number, handler)

    def run(self, *command: str, status: int = 0) -> tuple[str, str]:
        return self.end(self.start(*command), status)

    def end(self, process: subprocess.Popen, status: int) -> tuple[str, str]:
        try:
            out, err = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        assert process.returncode == status, out + err
        return out, err

    def wait_for_runs(self, count: int) -> list[int]:
        """Wait until this many stand-ins wait for a signal; return their process ids."""
        text = b""
        while text.count(b"\n") < count:
            assert select.select([self.pipe], [], [], SECONDS)[0], "no run has started"
            text += os.read(self.pipe, 4096)
        return [int(line) for line in text.split()]

    def calls(self) -> list[dict]:
        calls = self.folder / "calls"
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    def scontrol(self) -> list[str]:
        calls = self.folder / "scontrol"
        return calls.read_text().splitlines() if calls.exists() else []

    def plan(self, **behaviours: str) -> None:
        self.env["PLAN"] = json.dumps({name.replace("lr", "").replace("_", "-"): b for name, b in behaviours.items()})

    def rows(self) -> list[tuple[str, str]]:
        with (self.folder / "out" / "sweep.csv").open() as file:
            return [(row["lr"], row["status"]) for row in csv.DictReader(file)]

    def trained(self) -> list[str]:
        """The rates of the calls so far."""
        flags = [flag for call in self.calls() for flag in call["argv"]]
        return [flag.partition("=")[2] for flag in flags if flag.startswith("--config.optim.lr=")]


@pytest.fixture
def place(tmp_path):
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the scripts need {', '.join(missing)}")
    place = Place(tmp_path)
    yield place
    os.close(place.pipe)


SWEEP = ("launch/sweep_lr.sh", "config.py", "out")


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted(str(path) for path in LAUNCH.iterdir() if path.is_file() and path.suffix != ".yaml")
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- train, quickstart


@pytest.mark.parametrize("status", [0, 1, 2, 3])
def test_train_passes_its_arguments_and_the_exit_status_on(place, status):
    place.plan(lr=f"exit {status}" if status else "ok 1")
    place.run("launch/train.sh", "--workdir=a run", "--config.data.system=be  kind", status=status)
    assert place.calls() == [{"argv": ["train", "--workdir=a run", "--config.data.system=be  kind"], "gpu": None}]


def test_train_passes_a_signal_on(place):
    place.plan(lr="wait")
    process = place.start("launch/train.sh", "--workdir=run")
    assert place.wait_for_runs(1) == [process.pid]
    process.send_signal(signal.SIGTERM)
    place.end(process, 3)


def test_train_takes_the_first_free_gpu(place):
    place.plan(lr="ok 1")
    place.gpus(30000, 1024, 1023, 0)
    _, err = place.run("launch/train.sh", "--workdir=run")
    assert place.calls()[0]["gpu"] == "2"
    assert "GPU 2" in err


def test_two_trainings_take_two_gpus(place):
    """The second starts while the first has allocated nothing yet; the first gives its GPU back at its end."""
    place.plan(lr="wait")
    place.gpus(0, 0)
    first = place.start("launch/train.sh", "--workdir=first")
    place.wait_for_runs(1)
    second = place.start("launch/train.sh", "--workdir=second")
    place.wait_for_runs(1)
    _, err = place.run("launch/train.sh", "--workdir=third", status=1)
    assert "no GPU is free" in err
    for process in (first, second):
        process.send_signal(signal.SIGTERM)
        place.end(process, 3)
    place.run("launch/train.sh", "--workdir=first")
    assert [call["gpu"] for call in place.calls()] == ["0", "1", "0"]


@pytest.mark.parametrize("devices", ["1", "GPU-5a7b", ""])
def test_train_keeps_the_devices_that_are_set(place, devices):
    place.plan(lr="ok 1")
    place.gpus(30000)
    place.env["CUDA_VISIBLE_DEVICES"] = devices
    place.run("launch/train.sh", "--workdir=run")
    assert place.calls()[0]["gpu"] == devices


def test_train_goes_on_without_nvidia_smi_working(place):
    place.plan(lr="ok 1")
    place.gpus(0)
    place.env["SMI_FAILS"] = "yes"
    _, err = place.run("launch/train.sh", "--workdir=run")
    assert place.calls()[0]["gpu"] is None
    assert "nvidia-smi fails" in err


def test_train_says_that_no_gpu_is_free(place):
    place.gpus(30000, 20000)
    _, err = place.run("launch/train.sh", "--workdir=run", status=1)
    assert "CUDA_VISIBLE_DEVICES" in err and "1, 20000" in err
    assert place.calls() == []


@pytest.mark.parametrize(
    ("arguments", "workdir", "rest"),
    [
        ([], "runs/quickstart", []),
        (["elsewhere"], "elsewhere", []),
        (["--config.train.steps=2"], "runs/quickstart", ["--config.train.steps=2"]),
        (["elsewhere", "--config.train.steps=2"], "elsewhere", ["--config.train.steps=2"]),
    ],
)
def test_quickstart_runs_the_packaged_config(place, arguments, workdir, rest):
    place.plan(lr="ok 1")
    place.run("launch/quickstart.sh", *arguments)
    command, config, *others = place.calls()[0]["argv"]
    assert command == "train" and others == [f"--workdir={workdir}", *rest]
    config = Path(place.folder, config.removeprefix("--config="))
    assert config.samefile(REPO / "configs" / "quickstart.py")


# ------------------------------------------------------------------------------------------------------------- sweep


def test_sweep_trains_each_rate_and_sorts_by_eval_loss(place):
    """The loss of a run is its best evaluation, as that is what it exports."""
    place.plan(**{"1e_5": "ok 2.0 1.5", "3e_5": "ok 1.0 1.25", "1e_4": "ok nan 1.75"})
    out, _ = place.run(*SWEEP, "1e-5", "3e-5", "1e-4", "--", "--config.train.steps=2", "--config.data.system=a b")
    assert place.calls()[0]["argv"] == [
        "train",
        "--config=config.py",
        "--workdir=out/lr=1e-5",
        "--config.train.steps=2",
        "--config.data.system=a b",
        "--config.optim.lr=1e-5",
    ]
    assert (place.folder / "out" / "sweep.csv").read_text() == (
        "lr,status,eval_loss,step,train_loss,run\n"
        "3e-5,finished,1.0,1,2.5,out/lr=3e-5\n"
        "1e-5,finished,1.5,2,2.5,out/lr=1e-5\n"
        "1e-4,finished,1.75,2,2.5,out/lr=1e-4\n"
    )
    table = out[out.index("eval loss") :]
    assert table.index("3e-5  finished     1.0000") < table.index("1e-5  finished") < table.index("1e-4  finished")
    assert "best: out/lr=3e-5\n" in out


def test_sweep_skips_what_is_finished(place):
    place.plan(**{"1e_5": "ok 1", "3e_5": "ok 2"})
    place.run(*SWEEP, "1e-5")
    out, _ = place.run(*SWEEP, "1e-5", "3e-5")
    assert place.trained() == ["1e-5", "3e-5"]
    assert "lr=1e-5: finished before" in out
    assert place.rows() == [("1e-5", "finished"), ("3e-5", "finished")]
    place.gpus(30000)  # with nothing to train no GPU is needed
    place.run(*SWEEP, "1e-5", "3e-5")
    (place.folder / "out" / "lr=1e-5" / "adapter").rename(place.folder / "out" / "lr=1e-5" / "model")
    place.run(*SWEEP, "1e-5", "3e-5")
    assert place.trained() == ["1e-5", "3e-5"]


@pytest.mark.parametrize("lost", ["summary.json", "adapter"])
def test_sweep_trains_what_lacks_a_result(place, lost):
    place.plan(**{"1e_5": "ok 1"})
    place.run(*SWEEP, "1e-5")
    (place.folder / "out" / "lr=1e-5" / lost).rename(place.folder / "lost")
    place.run(*SWEEP, "1e-5")
    assert place.trained() == ["1e-5", "1e-5"]


def test_sweep_goes_on_when_a_rate_fails_and_tries_it_again_the_next_time(place):
    place.plan(**{"1e_5": "exit 1", "3e_5": "ok 1"})
    out, _ = place.run(*SWEEP, "1e-5", "3e-5", status=1)
    assert "lr=1e-5: failed with exit status 1" in out
    assert "lr=1e-5 failed (1): it broke\n" in out
    assert place.rows() == [("3e-5", "finished"), ("1e-5", "failed (1)")]
    place.plan(**{"1e_5": "ok 0.5"})
    place.run(*SWEEP, "1e-5", "3e-5")
    assert place.rows() == [("1e-5", "finished"), ("3e-5", "finished")]
    assert (place.folder / "out" / "lr=1e-5" / "exit_status").read_text() == "0\n"


def test_a_new_run_is_given_a_folder_that_jaxtune_takes_for_new(place):
    """`jaxtune train` refuses a folder without config.json that holds anything but jaxtune.log."""
    place.plan(**{"1e_5": "exit 2"})
    place.run(*SWEEP, "1e-5", status=1)
    place.stand_in("jaxtune", '#!/usr/bin/env bash\ncd "${3#*=}" && echo * >"$CALLS"\n')
    place.run(*SWEEP, "1e-5")
    assert (place.folder / "calls").read_text() == "jaxtune.log\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_sweep_and_the_same_command_goes_on(place, number):
    place.plan(**{"1e_5": "ok 3", "3e_5": "wait", "1e_4": "ok 2"})
    process = place.start(*SWEEP, "1e-5", "3e-5", "1e-4")
    place.wait_for_runs(1)
    process.send_signal(number)
    out, err = place.end(process, 3)
    assert "lr=3e-5: stopped" in out and "the same command goes on" in err
    assert place.rows() == [("1e-5", "finished"), ("3e-5", "stopped"), ("1e-4", "not started")]
    place.run(*SWEEP, "1e-5", "3e-5", "1e-4")
    assert place.trained() == ["1e-5", "3e-5", "3e-5", "1e-4"]
    assert place.rows() == [("3e-5", "finished"), ("1e-4", "finished"), ("1e-5", "finished")]


def test_a_rate_stopped_by_another_does_not_stop_the_sweep(place):
    place.plan(**{"1e_5": "wait", "3e_5": "ok 1"})
    process = place.start(*SWEEP, "1e-5", "3e-5")
    os.kill(place.wait_for_runs(1)[0], signal.SIGTERM)
    place.end(process, 3)
    assert place.rows() == [("3e-5", "finished"), ("1e-5", "stopped")]


def test_sweep_runs_one_process_a_gpu(place):
    place.plan(**{"1e_5": "wait", "3e_5": "wait", "1e_4": "ok 1", "3e_4": "ok 2"})
    place.gpus(0, 30000, 0)
    process = place.start(*SWEEP, "1e-5", "3e-5", "1e-4", "3e-4")
    place.wait_for_runs(2)
    assert sorted(call["gpu"] for call in place.calls()) == ["0", "2"]
    process.send_signal(signal.SIGTERM)
    place.end(process, 3)
    assert sorted(place.rows()) == sorted(
        [("1e-5", "stopped"), ("3e-5", "stopped"), ("1e-4", "not started"), ("3e-4", "not started")]
    )
    place.run(*SWEEP, "1e-5", "3e-5", "1e-4", "3e-4")
    assert {call["gpu"] for call in place.calls()} == {"0", "2"}
    assert {status for _, status in place.rows()} == {"finished"}


def test_sweep_uses_the_devices_that_are_set(place):
    place.plan(**{"1e_5": "wait", "3e_5": "wait"})
    place.env["CUDA_VISIBLE_DEVICES"] = "5,7"
    process = place.start(*SWEEP, "1e-5", "3e-5")
    place.wait_for_runs(2)
    process.send_signal(signal.SIGTERM)
    place.end(process, 3)
    assert {call["gpu"] for call in place.calls()} == {"5", "7"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["launch/train.sh"], "usage:"),
        (["launch/quickstart.sh", "a", "b"], "usage:"),
        (["launch/requeue.sh"], "usage:"),
        (["launch/train.sbatch", "--workdir=a"], "usage: sbatch"),
        (["launch/sweep_lr.sbatch", "config.py", "out", "1e-5"], "no array index"),
        (["launch/sweep_lr.sh"], "usage:"),
        ([*SWEEP], "usage:"),
        ([*SWEEP, "--", "--config.train.steps=2"], "no learning rate"),
        ([*SWEEP, "high"], "'high' is not a learning rate"),
        ([*SWEEP, "-1e-5"], "'-1e-5' is not a learning rate"),
        ([*SWEEP, "0.0e5"], "'0.0e5' is not a learning rate"),
        ([*SWEEP, "nan"], "'nan' is not a learning rate"),
        ([*SWEEP, "1e-5", "--config.train.steps=2"], "flags follow a --"),
        ([*SWEEP, "1e-4", "0.0001"], "0.0001 is given twice"),
        (["launch/sweep_lr.sh", "other.py", "out", "1e-5"], "there is no file other.py"),
        ([*SWEEP, "1e-5", "--", "--workdir=x"], "--workdir=x: the sweep sets this itself"),
        ([*SWEEP, "1e-5", "--", "--config.optim.lr", "1"], "--config.optim.lr: the sweep sets this itself"),
    ],
)
def test_a_wrong_command_line_trains_nothing(place, command, message):
    _, err = place.run("bash", *command, status=2)
    assert message in err and "usage:" in err
    assert place.calls() == [] and not (place.folder / "out").exists()


def test_sweep_checks_its_tools_first(place):
    (place.bin / "jaxtune").rename(place.bin / "other")
    assert "pip install" in place.run(*SWEEP, "1e-5", status=2)[1]
    assert "pip install" in place.run("launch/train.sh", "--workdir=run", status=2)[1]
    (place.bin / "other").rename(place.bin / "jaxtune")
    place.env["PYTHON"] = "no-python"
    assert "PYTHON=" in place.run(*SWEEP, "1e-5", status=2)[1]
    assert not (place.folder / "out").exists()


# ------------------------------------------------------------------------------------------------------------- Slurm


def directives(script: Path) -> list[str]:
    """What Slurm reads: the #SBATCH lines before the first command."""
    lines = script.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    return [line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH ")]


@pytest.mark.parametrize("name", ["train.sbatch", "sweep_lr.sbatch"])
def test_slurm_signals_the_script_in_time_and_may_requeue(name):
    options = directives(LAUNCH / name)
    assert {"--signal=B:TERM@120", "--requeue", "--open-mode=append", "--gres=gpu:1"} <= set(options)
    assert sum("#SBATCH" in line for line in (LAUNCH / name).read_text().splitlines()) == len(options)


def test_a_job_that_is_stopped_goes_back_in_the_queue_and_goes_on(place):
    place.slurm()
    place.plan(lr="wait")
    job = ("sbatch", "--time=1:00:00", "launch/train.sbatch", "--config=config.py", "--workdir=run")
    process = place.start(*job)
    place.wait_for_runs(1)
    process.send_signal(signal.SIGTERM)
    place.end(process, 3)
    assert place.scontrol()[-1] == "requeue 100"
    place.run(*job)
    assert (place.folder / "run" / "summary.json").exists()
    assert place.scontrol().count("requeue 100") == 1


def test_a_job_of_several_tasks_starts_one_process_each(place):
    place.slurm()
    place.stand_in(
        "srun", '#!/usr/bin/env bash\n[[ $1 == --kill-on-bad-exit=0 && $2 == --wait=60 ]] && exec "${@:3}"\n'
    )
    place.plan(lr="ok 1.0")
    place.env["SLURM_NTASKS"] = "2"
    place.run("sbatch", "launch/train.sbatch", "--config=config.py", "--workdir=run")
    assert [call["argv"] for call in place.calls()] == [["train", "--config=config.py", "--workdir=run"]]


def test_the_pods_of_a_job_find_one_another():
    service, job = yaml.safe_load_all((LAUNCH / "k8s" / "train.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    flags = dict(word.partition("=")[::2] for word in container["command"] if word.startswith("--"))
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["metadata"]["name"] == pod["subdomain"]
    assert flags["--coordinator"].startswith(f"{job['metadata']['name']}-0.{pod['subdomain']}:")
    assert spec["completionMode"] == "Indexed" and flags["--process-id"] == "$(JOB_COMPLETION_INDEX)"
    assert int(flags["--num-processes"]) == spec["completions"] == spec["parallelism"]
    assert {flag.removeprefix("--") for flag in flags} <= {"config", *train.FLAGS}
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("nodes", ["10.0.0.1", "10.0.0.1\n10.0.0.2"])
def test_nodes_of_skypilot_start_one_process_each(place, nodes):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    place.plan(lr="ok 1.0")
    count = nodes.count("\n") + 1
    place.env |= task["envs"] | {
        "SKYPILOT_NODE_IPS": nodes,
        "SKYPILOT_NUM_NODES": str(count),
        "SKYPILOT_NODE_RANK": "0",
    }
    place.run("bash", "-c", task["run"])
    [call] = place.calls()
    own = ["--coordinator=10.0.0.1:8476", f"--num-processes={count}", "--process-id=0"]
    assert call["argv"] == ["train", *own, f"--config={task['envs']['CONFIG']}", "--workdir=/data/run"]
    assert (LAUNCH.parent / task["envs"]["CONFIG"]).is_file()
    assert task["envs"]["WORKDIR"].startswith(tuple(task["volumes"]))


def test_a_job_that_ends_at_the_signal_keeps_its_status(place):
    place.slurm()
    place.env["SLURM_JOB_ID"] = "100"
    # The command sends the signal itself and ends: the two meet.
    place.stand_in("ends", '#!/usr/bin/env bash\ntrap "" TERM\nkill -s TERM $PPID\nexit 3\n')
    runs = 30
    for process in [place.start("launch/requeue.sh", "ends") for _ in range(runs)]:
        place.end(process, 3)
    assert place.scontrol().count("requeue 100") == runs


def test_a_job_that_was_cancelled_stays_so(place):
    place.slurm()
    place.plan(lr="exit 3")
    place.env["JOB_STATE"] = "COMPLETING"
    place.run("sbatch", "launch/train.sbatch", "--workdir=run", status=3)
    assert place.scontrol() == ["show job --oneliner 100"]


@pytest.mark.parametrize(
    ("tasks", "status", "restarts", "again"),
    [(1, 1, 0, False), (2, 1, 0, True), (2, 134, 19, True), (2, 1, 20, False), (2, 2, 0, False), (2, 0, 0, False)],
)
def test_a_job_that_fails_is_queued_again_where_one_of_several_tasks_may_have_died(
    place, tasks, status, restarts, again
):
    place.slurm()
    place.env |= {"SLURM_JOB_ID": "100", "SLURM_NTASKS": str(tasks), "SLURM_RESTART_COUNT": str(restarts)}
    place.run("launch/requeue.sh", "bash", "-c", f"exit {status}", status=status)
    assert ("requeue 100" in place.scontrol()) == again


def test_an_array_trains_a_rate_an_index(place):
    place.slurm()
    place.plan(**{"1e_5": "ok 3", "3e_5": "exit 3", "1e_4": "ok 1"})
    command = ("sbatch", "--array=0-2", "launch/sweep_lr.sbatch", *SWEEP[1:], "1e-5", "3e-5", "1e-4")
    place.run(*command, "--", "--config.train.steps=2", status=3)
    assert place.trained() == ["1e-5", "3e-5", "1e-4"]
    assert all("--config.train.steps=2" in call["argv"] for call in place.calls())
    assert [call for call in place.scontrol() if call.startswith("requeue")] == ["requeue 101"]
    assert place.rows() == [("1e-4", "finished"), ("1e-5", "finished"), ("3e-5", "stopped")]
    place.plan(**{"3e_5": "ok 2"})
    place.run(*command)
    assert place.rows() == [("1e-4", "finished"), ("3e-5", "finished"), ("1e-5", "finished")]


def test_an_array_longer_than_the_rates_is_refused(place):
    place.slurm()
    _, err = place.run("sbatch", "--array=1-1", "launch/sweep_lr.sbatch", *SWEEP[1:], "1e-5", "--", "-x", status=2)
    assert "--array=0-0" in err


# ------------------------------------------------------------------------------------------------------------- table


def write_run(folder: Path, metrics: str, config: dict, *results: str) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(metrics)
    (folder / "config.json").write_text(json.dumps(config))
    for name in results:
        (folder / name).mkdir() if name in ("adapter", "model") else (folder / name).write_text("{}")


def test_runs_without_evaluation_come_after_those_with_one(tmp_path):
    config = {"optim": {"lr": 1e-5}, "train": {"steps": 2}}
    result = ("summary.json", "model")
    write_run(tmp_path / "lr=1e-5", '{"step": 1, "train/loss": 2.0}\n', config, *result)
    lines = '{"step": 0, "eval/loss": 8.0}\n{"step": 1, "eval/loss": NaN}\n{"step": 2, "eval/loss": 9.0}\n{"ste'
    write_run(tmp_path / "lr=1", lines, config, *result)
    write_run(tmp_path / "lr=2", '{"step": 1, "eval/loss": 0.5}\n', config)
    for name in ("lr=notes", "lr=0", "lr=nan"):
        (tmp_path / name).mkdir()
    write_points(tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text()) == {
        "points": {"lr=1e-5": {"optim.lr": 1e-5}, "lr=1": {"optim.lr": 1.0}, "lr=2": {"optim.lr": 2.0}}
    }
    rows = sweep_rows(tmp_path)
    assert [(row["lr"], row["status"], row["eval_loss"], row["step"], row["train_loss"]) for row in rows] == [
        ("1", "finished", 9.0, 2, None),
        ("1e-5", "finished", None, None, 2.0),
        ("2", "unfinished", 0.5, 1, None),
    ]


def test_settings_that_differ_besides_the_rate_are_named(tmp_path):
    for rate, steps in ((1e-5, 2), (1e-4, 3)):
        config = {"optim": {"lr": rate}, "train": {"steps": steps, "seed": 0}, "versions": {"jax": str(rate)}}
        write_run(tmp_path / f"lr={rate}", "", config)
    assert differing_settings([*tmp_path.iterdir()]) == ["train.steps"]


def test_the_table_of_no_sweep_is_an_error(tmp_path):
    command = [sys.executable, "-m", "jaxtune.report.sweep_table", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and "no runs of a sweep" in done.stderr
    assert not (tmp_path / "sweep.csv").exists()
