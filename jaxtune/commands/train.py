"""`jaxtune train`: train a model as a config says; run again to resume."""

import contextlib
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from jaxtune.errors import Interrupted, RunFailed, UserError, printable
from jaxtune.flags import Flag, parse

USAGE = """usage: jaxtune train --config=FILE.py [--config.section.key=value ...] --workdir=DIR [--dry-run]

Train a model as the config says. The same command resumes a run that was stopped."""

FLAGS = {
    "workdir": Flag("directory of the run; made if it is not there"),
    "dry-run": Flag(
        "check everything, show two rows with the trained tokens marked, and stop before compiling", bool, False
    ),
    "coordinator": Flag("several processes: host:port of process 0; Slurm and Open MPI need no flag"),
    "process-id": Flag("several processes: this one's number, from 0", int),
    "num-processes": Flag("several processes: how many; 1: tasks of Slurm are runs of their own", int),
    "wait": Flag("several processes: seconds for all of them to come", int, 300),
    "stuck-after": Flag(
        "several processes: seconds without a step, or a part of the setup, before the job ends with status 1",
        float,
        900.0,
    ),
}


def main(argv: list[str]) -> None:
    clock = Clock(time.time())
    cfg, options = parse(argv, FLAGS, usage=USAGE)
    if options.workdir is None and not options.dry_run:
        raise UserError("--workdir=DIR is missing: the directory of the run.")
    from jaxtune.run.workdir import held

    workdir = None if options.workdir is None else Path(options.workdir).expanduser()
    from jaxtune.train.processes import own_folder

    with (
        _processes(options) as first,
        held(workdir if first and not options.dry_run else None),
        own_folder(workdir) as folder,
    ):
        _train(cfg, options, folder, argv, clock)


@contextlib.contextmanager
def _processes(options) -> Iterator[bool]:
    """Meet the other processes, if there are any; yield whether this one writes.

    A process that fails ends at once, and with it the job: a proper end would wait for the others.
    """
    if min(options.wait, options.stuck_after) <= 0:
        raise UserError(f"--wait={options.wait} --stuck-after={options.stuck_after:g}: expected seconds above 0")
    from jaxtune.train import processes
    from jaxtune.train.runtime import prepare_jax

    if not processes.start(options.coordinator, options.process_id, options.num_processes, options.wait):
        yield True
        return
    prepare_jax()
    processes.watch(options.stuck_after)
    try:
        yield processes.is_first()
    except Interrupted:
        processes.wait("stopped")
        raise
    except (UserError, RunFailed) as error:
        processes.end(printable(str(error)), 2 if isinstance(error, UserError) else 1)
    except Exception as error:
        traceback.print_exc()
        processes.end(f"{type(error).__name__}, as above")
    processes.wait("end")


def _train(cfg, options, workdir: Path | None, argv: list[str], clock: "Clock") -> None:
    import jax

    from jaxtune import config
    from jaxtune.config.recipe import experiment
    from jaxtune.run import fit, running, sampling
    from jaxtune.run.experiment import data_lines, open_data
    from jaxtune.run.results import versions
    from jaxtune.run.training import build
    from jaxtune.run.workdir import as_begun, check_room, check_workdir, dated, explained_disk
    from jaxtune.train import processes
    from jaxtune.train.runtime import prepare_jax

    cfg = as_begun(cfg, workdir)
    if workdir is not None:
        check_workdir(workdir, cfg)
    prepare_jax()
    clock("imports")
    run = experiment(cfg)
    rows = open_data(run)
    facts = {"their settings": run.text, "their data": rows.report.fingerprint, "versions": versions()}
    facts["their --workdir"] = str(workdir and processes.shared(workdir))
    processes.agree(facts | {"their mesh of devices": [d.platform for d in jax.devices()]})
    if workdir is not None:
        check_workdir(workdir, cfg, rows.report.fingerprint, run.base.files)
    clock("data")
    if (resolved := dated(cfg, rows)) is not cfg:
        cfg, run = resolved, experiment(resolved)
    print(*data_lines(run, rows), *config.notes(cfg), sep="\n")
    if run.train.micro_batch == "auto":
        values, note = fit.resolve_micro_batch(run, rows)
        print(note)
        run = experiment(config.replaced(cfg, values))
    job = build([run], rows)
    clock("load")
    print(job.members[0].counts, *filter(None, [job.note]), *run.rate_hint(), sep="\n")
    if workdir is not None:
        check_room(workdir, job)
    sampling.prompts(run, rows)
    running.answer_scores(job)
    if options.dry_run:
        _show_rows(rows, run.task.form)
        print(f"{job.steps} steps of {run.train.batch_size} rows; every check passed, nothing was compiled.")
        return
    with fit.explained_memory(run), explained_disk(workdir):
        running.alone(job, workdir, ["jaxtune", "train", *argv], clock)


class Clock:
    """Seconds spent in each part of a run."""

    def __init__(self, began: float):
        self.last, self.parts = began, {}

    def branch(self) -> "Clock":
        """An independent clock that starts with this one's times."""
        other = Clock(time.time())
        other.parts = dict(self.parts)
        return other

    def __call__(self, part: str) -> None:
        from jaxtune.train import processes

        now = time.time()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now
        processes.beat(part)


def _show_rows(data, form) -> None:
    """Two rows as the model sees them, with the trained tokens marked, or with their labels."""
    from rich.console import Console

    from jaxtune.data import render_plain, render_rows

    console = Console(soft_wrap=True, emoji=False)
    if form is not None:
        console.print(printable(form.render(data.train[0], data.tokenizer)), markup=False, highlight=False)
        return
    render = render_rows if console.is_terminal else render_plain
    console.print(render(data.train[0], data.tokenizer), markup=False, highlight=False)
