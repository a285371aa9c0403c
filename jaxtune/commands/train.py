"""`jaxtune train`: tune a model as a config says; start again to go on."""

import time
from pathlib import Path

from jaxtune.cli import Flag, parse
from jaxtune.errors import UserError

USAGE = """usage: jaxtune train --config=FILE.py [--config.section.key=value ...] --workdir=DIR [--dry-run]

Tune a model as the config says. The same command goes on with a run that was stopped."""

FLAGS = {
    "workdir": Flag("directory of the run; made if it is not there"),
    "dry-run": Flag(
        "make every check, show two rows with the trained tokens marked, and stop before compiling", bool, False
    ),
}


def main(argv: list[str]) -> None:
    clock = Clock(time.time())
    cfg, options = parse(argv, FLAGS, usage=USAGE)
    if options.workdir is None and not options.dry_run:
        raise UserError("--workdir=DIR is missing: the directory of the run.")
    from jaxtune.commands import plan
    from jaxtune.config import notes
    from jaxtune.run import job, sampling
    from jaxtune.run.workdir import check_room, check_workdir

    workdir = None if options.workdir is None else Path(options.workdir).expanduser()
    cfg = plan.settled(cfg, workdir)
    if workdir is not None:
        check_workdir(workdir, cfg)
    job.prepare_jax()
    clock("imports")
    model = job.open_model(cfg)
    data = job.open_data(cfg, model)
    if workdir is not None:
        check_workdir(workdir, cfg, data.report.fingerprint)
    clock("data")
    print(*job.data_lines(cfg, data, model), *notes(cfg), sep="\n")
    if cfg.train.micro_batch == "auto":
        cfg, said = plan.settle(cfg, model, data)
        print(said)
        model = job.open_model(cfg)  # its remat policy may be another
    j = job.build(cfg, model, data)
    clock("load")
    print(j.members[0].counts, *filter(None, [j.note]), *job.rate_hint(cfg, model), sep="\n")
    if workdir is not None:
        check_room(workdir, cfg, j)
    sampling.prompts(cfg, model, data)
    if options.dry_run:
        _show_rows(data, model.task.form)
        print(f"{j.steps} steps of {cfg.train.batch_size} rows; every check passed, nothing was compiled.")
        return
    from jaxtune.files import exclusive

    with job.explained_memory(cfg, data.length), exclusive(workdir):
        _run(cfg, argv, workdir, j, clock)


class Clock:
    """Seconds spent in each part of a run."""

    def __init__(self, began: float):
        self.last, self.parts = began, {}

    def branch(self) -> "Clock":
        """A clock that goes on from here by itself."""
        other = Clock(time.time())
        other.parts = dict(self.parts)
        return other

    def __call__(self, part: str) -> None:
        now = time.time()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.last
        self.last = now


def _show_rows(data, form) -> None:
    """Two rows as the model sees them, with the trained tokens marked, or with their labels."""
    from rich.console import Console

    from jaxtune.data import render_labelled, render_plain, render_rows

    console = Console(soft_wrap=True)
    if form is not None:
        console.print(render_labelled(data.train[0], data.tokenizer, form), markup=False, highlight=False)
        return
    render = render_rows if console.is_terminal else render_plain
    console.print(render(data.train[0], data.tokenizer), markup=False, highlight=False)


def _run(cfg, argv, workdir: Path, j, clock: Clock) -> None:
    from jaxtune.run import running

    place, checkpoints = running.Place("run", workdir, ["jaxtune", "train", *argv]), workdir / "checkpoints"
    [generated] = running.json_evaluations(j)
    ended = running.run(j, [place], running.Stretch(checkpoints), clock, [generated])
    [run], state = ended.runs, ended.state
    if run.best and run.best["step"] != ended.step:
        print(f"The best evaluation was at step {run.best['step']:.0f}; its weights are the result.")
        state = running.saved_state(j, 0, place.name, run.best["step"], [checkpoints])
    running.finish(j, 0, place, run, state, clock, generated)
