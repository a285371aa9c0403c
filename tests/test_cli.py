"""Exit statuses, flags and help, through `main` with a command that only reads its flags."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxtune import cli
from jaxtune.cli import main
from jaxtune.flags import Flag, parse_options

REPO = Path(__file__).parent.parent

PROBE = """
import json
from jaxtune.flags import Flag, parse
from jaxtune.config import to_json

FLAGS = {"workdir": Flag("the run directory", str), "dry-run": Flag("check only", bool, False)}

def main(argv):
    cfg, options = parse(argv, FLAGS, usage="usage: jaxtune train --config=FILE.py --workdir=DIR")
    print(json.dumps({"cfg": json.loads(to_json(cfg)), "options": vars(options)}))
"""
RAISES = """
from jaxtune.errors import Interrupted, UserError
def main(argv):
    raise {"Interrupted": Interrupted, "KeyboardInterrupt": KeyboardInterrupt, "ZeroDivisionError": ZeroDivisionError,
           "UserError": UserError}[argv[0]]("said so")
"""
GIVEN = ["--config.model.path=m", "--config.data.train=a.jsonl"]


@pytest.fixture(autouse=True)
def probe(tmp_path, monkeypatch):
    (tmp_path / "probe_train.py").write_text(PROBE)
    (tmp_path / "probe_raises.py").write_text(RAISES)
    (tmp_path / "mine.py").write_text("def get_config():\n    return {'tune': {'lora': {'r': 4}}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = {"train": ("probe_train", "tune"), "raises": ("probe_raises", "raise"), "later": ("probe_later", "no")}
    monkeypatch.setattr(cli, "COMMANDS", commands)
    yield
    sys.modules.pop("probe_train", None)
    sys.modules.pop("probe_raises", None)


def train(capsys, *argv):
    """Return (cfg, options) of a command line that must be accepted."""
    assert main(["train", *argv]) == 0
    said = json.loads(capsys.readouterr().out)
    return said["cfg"], said["options"]


def refused(capsys, *argv):
    """Return the message of a command line that must be refused in the one way we refuse."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jaxtune: error: ")
    assert "Traceback" not in err
    return err


# ---------------------------------------------------------------------------------------------------- exit statuses


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ("UserError", 2, "jaxtune: error: said so\n"),
        ("Interrupted", 3, "jaxtune: said so\n"),
        ("KeyboardInterrupt", 1, "jaxtune: interrupted\n"),
    ],
)
def test_exit_status_without_traceback(capsys, error, status, said):
    assert main(["raises", error]) == status
    assert capsys.readouterr().err == said


def test_anything_else_is_1_with_its_traceback(capsys):
    assert main(["raises", "ZeroDivisionError"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_help_lists_the_commands_that_exist_and_the_exit_statuses(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "train      tune" in out
    assert "later" not in out
    for line in ("0  done", "2  the input is wrong", "3  stopped by a signal"):
        assert line in out


def test_unknown_or_missing_command(capsys):
    assert "Did you mean 'train'?" in refused(capsys, "tain")
    assert "unknown command 'later'" in refused(capsys, "later")
    assert "which command?" in refused(capsys)


# -------------------------------------------------------------------------------------------------------- the flags


def test_flags_come_in_any_order(capsys):
    flags = [*GIVEN, "--config=mine.py", "--config.optim.lr", "1e-3", "--workdir", "runs/a", "--dry-run"]
    for argv in (flags, flags[5:] + flags[:5]):
        cfg, options = train(capsys, *argv)
        assert (cfg["tune"]["lora"]["r"], cfg["optim"]["lr"], cfg["model"]["path"]) == (4, 1e-3, "m")
        assert options == {"workdir": "runs/a", "dry_run": True, "config_file": "mine.py"}


def test_the_last_of_a_repeated_setting_holds(capsys):
    cfg, _ = train(capsys, *GIVEN, "--config.tune.lora.r=2", "--config=mine.py", "--config.tune.lora.r=3")
    assert cfg["tune"]["lora"]["r"] == 3


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--config.data.packing"], True),
        (["--config.data.packing=true"], True),
        (["--config.data.packing", "true"], True),
        (["--config.data.packing", "--config.data.packing=false"], False),
        (["--config.data.packing", "false"], False),
        (["--config.data.packing", "--noconfig.data.packing"], False),
        (["--config.data.packing", "--dry-run"], True),
    ],
)
def test_switches(capsys, argv, value):
    assert train(capsys, *GIVEN, *argv)[0]["data"]["packing"] is value


def test_a_negative_number_is_a_value_not_a_flag(capsys):
    assert "--config.train.seed=-1" in refused(capsys, "train", *GIVEN, "--config.train.seed", "-1")


def test_config_json_of_a_run_is_a_config(capsys, tmp_path):
    cfg, _ = train(capsys, *GIVEN, "--config=mine.py")
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    assert train(capsys, "--config=config.json")[0] == cfg


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--wrkdir=runs"], ["unknown flag --wrkdir", "'--workdir'"]),
        (["--lr=1e-4"], ["unknown flag --lr", "--config.optim.lr"]),
        (["--model.path=m"], ["unknown flag --model.path", "--config.model.path"]),
        (["--learning_rate", "1e-4"], ["--config.optim.lr"]),
        (["-v"], ["unknown flag -v", "--workdir"]),
        (["--xyzzy"], ["unknown flag --xyzzy", "Flags: --config, --workdir, --dry-run, --help"]),
        (["--config.optim.learning_rate=1"], ["no setting optim.learning_rate", "'optim.lr'", "Settings in optim"]),
        (["--config.trian.steps=1"], ["no setting trian.steps", "'train.steps'"]),
        (["--config.optim=adamw"], ["optim is a section"]),
        (["--config.optim.lr=fast"], ["--config.optim.lr=fast", "a finite number"]),
        (["--config.train.steps=1.5"], ["an integer"]),
        (["--config.data.packing=maybe"], ["true or false"]),
        (["--noconfig.optim.lr"], ["true/false"]),
        (["--config.optim.lr"], ["needs a value"]),
        (["--config.optim.lr", "--dry-run"], ["needs a value"]),
        (["--workdir"], ["needs a value"]),
        (["--workdir=a", "--workdir=b"], ["given twice"]),
        (["--dry-run=perhaps"], ["true or false"]),
        (["mine.py"], ["unexpected argument 'mine.py'", "--config.section.key=value"]),
        (["--config=mien.py"], ["--config=mien.py", "no such file", "'mine.py'"]),
        (["--config.train.grad_accum=3"], ["divisor"]),
        (["--config.tune.method=full", "--config.tune.lora.r=4"], ["tune.lora.r has no effect"]),
    ],
)
def test_bad_input_is_one_message_and_exit_2(capsys, argv, said):
    message = refused(capsys, "train", *GIVEN, *argv)
    assert all(part in message for part in said), message


def test_required_settings(capsys):
    message = refused(capsys, "train")
    assert "--config.model.path=" in message
    assert "--config.data.train=" in message


def test_a_string_where_a_number_belongs_in_a_file(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    return {'optim': {'lr': '2e-5'}}\n")
    message = refused(capsys, "train", *GIVEN, "--config=mine.py")
    assert "mine.py: optim.lr is '2e-5' (str)" in message
    assert "without the quotes" in message


def test_an_exception_in_a_config_file(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    return nope\n")
    assert "mine.py:2: NameError: name 'nope' is not defined" in refused(capsys, "train", "--config=mine.py")


def test_options_of_a_command_without_config():
    flags = {"stop": Flag("stop string", list), "top-k": Flag("k", int, 0), "mode": Flag("m", choices=("a", "b"))}
    arguments = {"run": Flag("a run", Path, required=True), "more": Flag("others", list, ())}
    options = parse_options(["r", "--stop=x", "--top-k", "5", "--stop", "y", "s", "t"], flags, arguments)
    assert vars(options) == {"stop": ["x", "y"], "top_k": 5, "mode": None, "run": Path("r"), "more": ["s", "t"]}
    for argv, said in (
        ([], "run is missing: a run"),
        (["r", "--mode=c"], "choose from a, b"),
        (["r", "--top-k=many"], "expected an integer"),
        (["r", "--config=x.py"], "unknown flag --config"),
    ):
        with pytest.raises(cli.UserError, match=said):
            parse_options(argv, flags, arguments)


# --------------------------------------------------------------------------------------------------------- the help


def test_help_of_a_command_shows_every_setting(capsys):
    from jaxtune.config import SECTIONS, SETTINGS

    assert main(["train", "--config=not_there.py", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: jaxtune train")
    assert "--workdir" in out
    assert max(map(len, out.splitlines())) <= 120
    blocks = {block.partition(":")[0]: block.splitlines() for block in out.split("\n\n")}
    for setting in SETTINGS:
        assert any(line.split()[:1] == [setting.key] and setting.doc[:20] in line for line in blocks[setting.section])
    assert set(SECTIONS) <= set(blocks)


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["trian"]])
def test_help_imports_neither_jax_nor_ml_collections(argv, tmp_path):
    done = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from jaxtune import cli\n"
        "cli.COMMANDS['train'] = ('probe_train', 'tune')\n"
        f"status = cli.main({argv!r})\n"
        "heavy = {'jax', 'numpy', 'ml_collections', 'absl', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(status)"
    )
    assert done.returncode == (0 if "--help" in argv else 2), done.stderr


def test_a_config_is_resolved_without_jax(tmp_path):
    done = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import probe_train\n"
        f"probe_train.main({GIVEN!r})\n"
        "assert 'ml_collections' in sys.modules and 'jax' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_python_m_jaxtune_is_the_command():
    done = subprocess.run([sys.executable, "-m", "jaxtune", "--help"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: jaxtune COMMAND")
    done = subprocess.run([sys.executable, "-m", "jaxtune", "tarin"], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_enough_is_no_error():
    """`jaxtune train --help | head -1`"""
    command = [sys.executable, "-m", "jaxtune", "train", "--help"]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""


@pytest.mark.parametrize("words", ["--help", "train --help"])  # within the buffer, and beyond it
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("> /dev/full", "the standard output cannot be written: No space left on device."),
        (">&-", "the standard output is closed; send it to /dev/null instead."),
    ],
)
def test_a_standard_output_that_takes_nothing(where, said, words):
    script = f"exec {sys.executable} -m jaxtune {words} {where}"
    done = subprocess.run(["bash", "-c", script], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"jaxtune: error: {said}\n")


def test_other_standard_streams_may_be_closed():
    done = subprocess.run(
        ["bash", "-c", f"exec {sys.executable} -m jaxtune train --nothing <&- 2>&-"], cwd=REPO, capture_output=True
    )
    assert (done.returncode, done.stdout) == (2, b"")


def test_what_a_command_could_not_print_is_told_in_place_of_its_own_words(monkeypatch, capsys):
    """It raised the same error, which is taken for the disk's."""

    def flush():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(flush=flush, write=lambda text: None))
    monkeypatch.setattr(cli, "_dispatch", lambda argv: flush())
    assert main(["train"]) == 1
    assert capsys.readouterr().err == (
        "jaxtune: error: the standard output cannot be written: No space left on device.\n"
    )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("INTERNAL: No space left on device"),
    ],
)
def test_a_full_disk_is_said_without_a_traceback(error, monkeypatch, capsys):
    def fails(argv):
        raise RuntimeError("asynchronous save failed") from error

    monkeypatch.setattr(cli, "_dispatch", fails)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "jaxtune: error: No room is left on the disk; free some.\n"


def test_the_command_does_not_import_torch(tmp_path):
    """transformers does so where torch is installed, which costs seconds and 300 MiB."""
    argv = ["jaxtune", "train", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}", "--dry-run"]
    done = python(
        "import sys; from importlib.util import find_spec; assert find_spec('torch')\n"
        f"sys.argv = {argv!r}\n"
        "from jaxtune.cli import run\n"
        "try: run()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'transformers' in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('torch.')]"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_libraries_that_trip_over_a_hidden_torch_are_told_of_it():
    """datasets hashes what it maps with torch's help, and scipy.stats, behind ROUGE, asks for a class of it."""
    done = python(
        "import sys\n"
        "from jaxtune import cli\n"
        "sys.argv = ['jaxtune', 'params', '--help']\n"
        "try: cli.run()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert sys.modules['torch'] is None\n"
        "from jaxtune.data.sources import _datasets\n"
        "assert len(_datasets().Dataset.from_list([{'a': 1}]).map(dict)) == 1\n"
        "sys.modules['torch'] = None\n"  # as for a command that reads no such data
        "from jaxtune.evaluate.metrics import METRICS\n"
        "print(METRICS['rouge_l'].score('two red mugs', 'two red mugs'))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1.0"
