"""`jaxtune sweep`: train many settings over one base, in one step where they allow it; run again to resume."""

import time
from pathlib import Path
from typing import Any

from jaxtune.errors import UserError
from jaxtune.flags import Flag, parse
from jaxtune.run import points as pts

USAGE = """usage: jaxtune sweep --config=FILE.py --sweep.section.key=v1,v2 [--config.section.key=value] --workdir=DIR

Train every combination of the swept values (several --sweep flags make a grid). Points that differ only in
optim.lr, optim.weight_decay, train.seed, tune.lora.r, .lora_alpha, .lora_dropout or .use_rslora share one compiled
step over one frozen base; others run group after group. Each point has its own run directory in DIR. The same command
resumes a sweep that was stopped; with more values, it trains the new points only."""

FLAGS = {
    "workdir": Flag("directory of the sweep; made if it is not there"),
    "points": Flag("a .jsonl or .csv file of points, setting paths as keys; crossed with the --sweep flags", Path),
    "group-size": Flag("most points in one step; default: as many as fit the memory", int),
    "halving": Flag("successive halving: at growing numbers of steps keep 1 run in so many, by eval loss", int),
    "find-lr": Flag("find optim.lr: short runs around its default until the eval loss is bracketed", bool, False),
    "find-steps": Flag("steps of a run of --find-lr; default: a tenth of the config's, at least 20", int),
    "write-config": Flag("with --find-lr: write the config with the chosen rate to this new .py file", Path),
    "yes": Flag(f"allow more than {pts.LIMIT} points", bool, False),
    "dry-run": Flag("make every check, show the groups, and stop before compiling", bool, False),
}


def main(argv: list[str]) -> None:
    began = time.time()
    _, options = parse(argv, FLAGS, usage=USAGE, required=(), sweeps=True)
    if options.workdir is None and not options.dry_run:
        raise UserError("--workdir=DIR is missing: the directory of the sweep.")
    _check_flags(options)
    from jaxtune.commands.train import Clock
    from jaxtune.run.grid import Sweep
    from jaxtune.train.runtime import prepare_jax

    clock = Clock(began)
    prepare_jax()
    sweep = Sweep(
        folder=None if options.workdir is None else Path(options.workdir).expanduser(),
        resolve=options.resolve,
        argv=argv,
        clock=clock,
        group_size=options.group_size,
        halving=options.halving,
        limit=None if options.yes else pts.LIMIT,
    )
    from jaxtune.run.workdir import explained_disk, held

    with held(None if options.dry_run else sweep.folder, "sweep.json"):
        if options.find_lr:
            from jaxtune.run.find_lr import find_lr

            find_lr(sweep, options)
            return
        new = _check(sweep, options)
        if options.dry_run:
            sweep.show(new)
            return
        with explained_disk(sweep.folder, "What is finished is kept."):
            sweep.add(new)
            sweep.run()
            sweep.tell()


def _check(sweep: Any, options: Any) -> list[pts.Point]:
    """Check everything and return the requested points that are not in the sweep yet."""
    asked = pts.read_grid(options.sweep)
    if options.points:
        asked = pts.cross(asked, pts.read_points(options.points))
    if not options.sweep and not options.points:
        raise UserError("nothing is swept: give --sweep.section.key=v1,v2,... or --points=FILE")
    new = sweep.check(asked)
    sweep.clock("data")
    return new


def _check_flags(options: Any) -> None:
    if options.group_size is not None and options.group_size < 1:
        raise UserError(f"--group-size={options.group_size}: expected 1 or more")
    if options.halving is not None and options.halving < 2:
        raise UserError(f"--halving={options.halving}: expected 2 or more: one run in so many is kept")
    if options.find_lr:
        for name in ("points", "halving"):
            if getattr(options, name):
                raise UserError(f"--{name} has no effect with --find-lr, which chooses its points itself; remove it")
        if options.sweep:
            raise UserError(f"--sweep.{next(iter(options.sweep))} has no effect with --find-lr; remove it")
    for name in ("find_steps", "write_config"):
        if getattr(options, name) is not None and not options.find_lr:
            raise UserError(f"--{name.replace('_', '-')} has no effect without --find-lr; remove it")
    if options.find_steps is not None and options.find_steps < 2:
        raise UserError(f"--find-steps={options.find_steps}: expected 2 or more")
