"""The `jaxtune` command line: finds the command, and turns its outcome into an exit status.

A command is a module of `jaxtune/commands/` with `main(argv) -> int | None` (None meaning 0) that imports heavy modules
inside its functions. It reads its flags with `flags.parse` (a config and flags) or `flags.parse_options` (flags alone).
Nothing here imports jax, and `--help` imports next to nothing.
"""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence

from jaxtune import torchless
from jaxtune.errors import Help, Interrupted, RunFailed, UserError, disk_trouble, nearest, printable

COMMANDS = {
    "init": ("jaxtune.commands.init", "look at a data file and write a config for it"),
    "data": ("jaxtune.commands.data", "read the data of a config as training does, and report what is wrong with it"),
    "plan": ("jaxtune.commands.plan", "show what models and methods cost, and whether they fit a device"),
    "train": ("jaxtune.commands.train", "train a model as a config file says; run again to resume"),
    "sweep": ("jaxtune.commands.sweep", "train many settings together, in one step where they allow it"),
    "generate": ("jaxtune.commands.generate", "continue prompts, or chat, with a run or a model"),
    "eval": ("jaxtune.commands.eval", "compare a run with its base on held-out rows or tasks"),
    "decide": ("jaxtune.commands.decide", "prompt or fine-tune? both on the same held-out rows, with what they cost"),
    "export": ("jaxtune.commands.export", "write a run as a Hugging Face model directory"),
    "report": ("jaxtune.commands.report", "write the report page of a run or a sweep again"),
    "compare": ("jaxtune.commands.compare", "several runs in one table and on one page"),
    "embed": ("jaxtune.commands.embed", "write the vectors of texts"),
    "params": ("jaxtune.commands.params", "show which parameters a config would train"),
}

USAGE = """usage: jaxtune COMMAND [flags]

Fine-tune pretrained transformers in JAX."""

EXIT_STATUS = """exit status
  0  done
  1  an unexpected error, with a traceback
  2  the input is wrong; one message says what, where and what to do
  3  stopped by a signal with a checkpoint saved; the same command resumes"""


def run() -> None:
    """Console entry point."""
    if not any(word.startswith("--tasks") for word in sys.argv):  # the harness hashes data sets with torch's help
        torchless.hide()
    status = _without_streams() or main()
    try:
        sys.stdout.flush()
    except OSError:  # which `main` has told; what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _without_streams() -> int:
    """1 where the standard output is closed; another standard stream that is closed becomes /dev/null.

    The next file that is opened would get its number, and what is printed.
    """
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if closed:
        print("jaxtune: error: the standard output is closed; send it to /dev/null instead.", file=sys.stderr)
    return int(closed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: `sys.argv[1:]`) and return its exit status."""
    try:
        status, said = _outcome(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # of `jaxtune train --help | head`
        return 1
    except OSError as error:  # also where that was what the command ended by
        status, said = 1, f"error: the standard output cannot be written: {error.strerror}."
    if said:
        print(f"jaxtune: {said}", file=sys.stderr)
    return status


def _outcome(argv: list[str]) -> tuple[int, str]:
    """The exit status of a command, and what is to be said of it."""
    try:
        return _dispatch(argv), ""
    except Help as text:
        print(text)
        return 0, ""
    except UserError as error:
        return 2, f"error: {printable(str(error))}"
    except SystemExit as error:  # of a config or scorer file: what the command is for was not done
        return 2, f"error: a file of yours called sys.exit({error.code!r}); nothing was done."
    except RunFailed as error:
        return 1, f"error: {printable(str(error))}"
    except Interrupted as error:
        return 3, str(error)
    except KeyboardInterrupt:
        return 1, "interrupted"
    except BrokenPipeError:
        raise
    except Exception as error:
        if (said := disk_trouble(error)) is not None:
            return 2, f"error: {printable(said)}"
        sys.stdout.flush()  # what that cannot do is what the error is about
        traceback.print_exc()
        return 1, ""


def _dispatch(argv: list[str]) -> int:
    commands = {name: entry for name, entry in COMMANDS.items() if _exists(entry[0])}
    if argv and argv[0] in ("--help", "-h"):
        raise Help(_help(commands))
    if not argv:
        raise UserError(f"which command? One of: {', '.join(commands)}. See jaxtune --help.")
    name, *rest = argv
    if name not in commands:
        raise UserError(f"unknown command {name!r}.{nearest(name, commands)} Commands: {', '.join(commands)}.")
    return importlib.import_module(commands[name][0]).main(rest) or 0


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _help(commands: dict[str, tuple[str, str]]) -> str:
    lines = [f"  {name:<10} {meaning}" for name, (_, meaning) in commands.items()]
    return "\n".join([USAGE, "", "commands (each has its own --help)", *lines, "", EXIT_STATUS])
