"""`jaxtune sweep`: many settings over one base, in one step where they allow it; start again to go on.

What is to be done stands in DIR/sweep.json: the points, and rungs of groups. A group is a list of points that train in
one step, with stacked checkpoints in DIR/groups/RUNG-NUMBER; a rung is all groups up to a step. Without halving there
is one rung. So a sweep that was killed reads what it had decided, and goes on; new points are new groups.
"""

import copy
import itertools
import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtune.cli import Flag, parse
from jaxtune.errors import RunFailed, UserError
from jaxtune.run import points as pts

USAGE = """usage: jaxtune sweep --config=FILE.py --sweep.section.key=v1,v2 [--config.section.key=value] --workdir=DIR

Train every combination of the swept values (several --sweep flags make a grid). Points that differ only in
optim.lr, optim.weight_decay, train.seed, tune.lora.r, .lora_alpha, .lora_dropout or .use_rslora share one compiled
step over one frozen base; others run group after group. Each point has a run directory of its own in DIR. The same
command goes on with a sweep that was stopped; with more values, it trains the new points only."""

FLAGS = {
    "workdir": Flag("directory of the sweep; made if it is not there"),
    "points": Flag("a .jsonl or .csv file of points, setting paths as keys; crossed with the --sweep flags", Path),
    "group-size": Flag("most points in one step; default: as many as fit the memory", int),
    "halving": Flag("cut to 1 in so many at growing numbers of steps, by eval loss (successive halving)", int),
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
    from jaxtune.run import job

    clock = Clock(began)
    job.prepare_jax()
    sweep = Sweep(
        folder=None if options.workdir is None else Path(options.workdir).expanduser(),
        resolve=options.resolve,
        argv=argv,
        clock=clock,
        group_size=options.group_size,
        halving=options.halving,
        limit=None if options.yes else pts.LIMIT,
    )
    if options.find_lr:
        from jaxtune.run.find_lr import find_lr

        find_lr(sweep, options)
        return
    asked = pts.read_grid(options.sweep)
    if options.points:
        asked = pts.cross(asked, pts.read_points(options.points))
    if not options.sweep and not options.points:
        raise UserError("nothing is swept: give --sweep.section.key=v1,v2,... or --points=FILE")
    new = sweep.check(asked)
    clock("data")
    if options.dry_run:
        sweep.show(new)
        return
    from jaxtune.files import exclusive

    with exclusive(sweep.folder):
        sweep.add(new)
        sweep.run()
        sweep.tell()


def _check_flags(options: Any) -> None:
    if options.group_size is not None and options.group_size < 1:
        raise UserError(f"--group-size={options.group_size}: expected 1 or more")
    if options.halving is not None and options.halving < 2:
        raise UserError(f"--halving={options.halving}: expected 2 or more: one point in so many goes on")
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


@dataclass
class Sweep:
    """A sweep and its directory.

    Attributes:
        folder: None: nothing is planned yet, and nothing will be written.
        resolve: settings as text -> config.
        argv: the command line without what is swept, of which the points' own are made.
        limit: most points that may be asked for; None: any number.
        points: name -> point, of those that are planned.
        plan: what sweep.json holds: the points' values; halving; and rungs, each with the step it goes `until` (None:
            the end), its groups of names, and for each name that has `ended` there, what the loop remembers.
    """

    folder: Path | None
    resolve: Callable[[dict[str, str]], Any]
    argv: list[str]
    clock: Any
    group_size: int | None = None
    halving: int | None = None
    limit: int | None = None
    points: dict[str, pts.Point] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=lambda: {"points": {}, "halving": None, "rungs": []})
    _opened: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    _tuned: set[str] = field(default_factory=set)
    _built: tuple[list[str], Any, list[Any]] | None = None

    # ---------------------------------------------------------------------------------------------- what is to be done

    def check(self, asked: Sequence[dict[str, Any]]) -> list[pts.Point]:
        """Read the plan, make every check, change nothing; return the points that are not planned yet.

        Raises:
            UserError: the points, the directory, the models or the data are wrong.
        """
        self._read()
        known = [p.values for p in self.points.values()]
        new = [p for p in pts.resolve_points(asked, self.resolve, limit=self.limit) if p.values not in known]
        if clash := [p.name for p in new if p.name in self.points]:
            raise UserError(f"{self.folder} holds another point called {clash[0]}; give another --workdir")
        if new and self.plan["halving"]:
            raise UserError(
                f"the sweep in {self.folder} is cut by halving and takes no more points; give another --workdir"
            )
        everyone = [*self.points.values(), *new]
        if len(everyone) < 1:
            raise UserError("the sweep has no point")
        for point in everyone:
            self._check_point(point)
        if self.halving:
            self._check_halving(everyone)
        return new

    def _read(self) -> None:
        from jaxtune.run.workdir import check_is_folder

        if self.folder is None:
            return
        check_is_folder(self.folder)
        file = self.folder / "sweep.json"
        if not file.exists():
            if self.folder.exists() and any(not p.name.startswith(".") for p in self.folder.iterdir()):
                raise UserError(
                    f"--workdir={self.folder} is not empty and holds no sweep (no sweep.json); nothing was changed."
                )
            return
        self.plan = json.loads(file.read_text())
        if self.plan["halving"] != self.halving:
            before, now = (f"--halving={h}" if h else "no --halving" for h in (self.plan["halving"], self.halving))
            raise UserError(f"the sweep in {self.folder} has {before}, and this command {now}; nothing was changed")
        for name, values in self.plan["points"].items():
            values = {path: tuple(v) if isinstance(v, list) else v for path, v in values.items()}
            cfg = self.resolve({path: pts.text_of(value) for path, value in values.items()})
            self.points[name] = pts.Point(name, values, cfg)

    def _check_point(self, point: pts.Point) -> None:
        import jax

        from jaxtune.run import job
        from jaxtune.run.workdir import check_workdir

        if point.cfg.log.wandb:
            raise UserError("log.wandb: the members of a sweep share one process; switch it off, or use sweep_lr.sh")
        if point.cfg.train.micro_batch == "auto":
            raise UserError(
                "train.micro_batch=auto: the memory of a sweep decides how many runs share a step; give a number, "
                "such as `jaxtune plan` names"
            )
        model, data = self.open(point.cfg)
        method = _sections(point.cfg, "model", "tune")
        if method not in self._tuned:  # targets that match nothing, ranks that are too large
            jax.eval_shape(lambda params: job.tuned(point.cfg, model, params)[0], model.abstract())
            self._tuned.add(method)
        if self.folder is not None:
            check_workdir(self.folder / point.name, point.cfg, data.report.fingerprint, member=True)

    def _check_halving(self, points: Sequence[pts.Point]) -> None:
        if any(p.cfg.data.eval is None and not p.cfg.data.eval_fraction for p in points):
            raise UserError("--halving compares eval losses: give data.eval or data.eval_fraction")
        steps = {self._steps(p) for p in points}
        if len(steps) > 1:
            raise UserError(f"--halving needs the same number of steps in every point; found {sorted(steps)}")
        if len(points) < 2 * self.halving:
            raise UserError(
                f"--halving={self.halving} has nothing to cut among {len(points)} points: at least two go on"
            )

    def _steps(self, point: pts.Point) -> int:
        from jaxtune.run import job

        return job.make_batches(point.cfg, *self.open(point.cfg))[2]

    def open(self, cfg: Any) -> tuple[Any, Any]:
        """The model, without weights, and the data of a config; read once for all configs that share them."""
        from jaxtune.run import job

        key = _sections(cfg, "model", "data", "objective")
        if key not in self._opened:
            model = job.open_model(cfg)
            data = job.open_data(cfg, model)
            if not self._opened:
                print(*job.data_lines(cfg, data, model), sep="\n")
            self._opened[key] = model, data
        return self._opened[key]

    def add(self, new: Sequence[pts.Point]) -> None:
        """Put new points into groups, and remember that."""
        if not new:
            return
        groups = self._groups(new)
        self.points |= {p.name: p for p in new}
        self.plan["points"] |= {p.name: p.values for p in new}
        if not self.plan["rungs"]:
            self.plan["halving"] = self.halving
            self._add_rung([])
        self.plan["rungs"][0]["groups"] += groups
        self._write()

    def _groups(self, points: Sequence[pts.Point]) -> list[list[str]]:
        """Names by group: of those that may share a step, as many as fit, in groups of like sizes."""
        groups = []
        for alike in pts.together(points):
            most = self.group_size or self._most(alike)
            count = math.ceil(len(alike) / most)
            bounds = [len(alike) * i // count for i in range(count + 1)]
            groups += [[p.name for p in alike[a:b]] for a, b in itertools.pairwise(bounds)]
        return groups

    def _most(self, alike: Sequence[pts.Point]) -> int:
        """How many of these fit the memory in one step."""
        from jaxtune.run import job

        model, data = self.open(alike[0].cfg)
        cfgs = [p.cfg for p in alike]
        room = job.free_bytes()
        if job.step_bytes_bound(cfgs, model, data) < room:
            return len(cfgs)
        while len(cfgs) > 1 and job.step_bytes(cfgs, model, data) > room:
            cfgs = cfgs[: math.ceil(len(cfgs) / 2)]
        return len(cfgs)

    def _add_rung(self, groups: list[list[str]]) -> None:
        self.plan["rungs"].append({"until": self._cut(len(self.plan["rungs"])), "groups": groups, "ended": {}})

    def _cut(self, rung: int) -> int | None:
        """The step that a rung goes to; None: the end."""
        if not self.halving:
            return None
        cuts = round(math.log(len(self.points), self.halving), 9) // 1
        steps = self._steps(next(iter(self.points.values())))
        return max(1, round(steps * self.halving ** (rung - cuts))) if rung < cuts else None

    def _write(self) -> None:
        from jaxtune.files import atomic_write_text

        atomic_write_text(self.folder / "sweep.json", json.dumps(self.plan, indent=1) + "\n")

    # ------------------------------------------------------------------------------------------------------ doing it

    def run(self) -> None:
        """Do what is left of the plan.

        Raises:
            RunFailed: no point came to a result.
            Interrupted: stopped by a signal; what was done is saved.
        """
        number = 0
        while number < len(self.plan["rungs"]):
            rung = self.plan["rungs"][number]
            for names in rung["groups"]:
                if not all(name in rung["ended"] for name in names):
                    self._train(number, names)
            if rung["until"] is not None and number + 1 == len(self.plan["rungs"]):
                self._add_rung(self._groups([self.points[name] for name in self._survivors(rung)]))
                self._write()
            later = {name for after in self.plan["rungs"][number + 1 :] for group in after["groups"] for name in group}
            for names in rung["groups"]:
                self._finish(number, names, [name for name in names if name not in later])
            number += 1
        if all(status(self.folder / name) == "failed" for name in self.points):
            raise RunFailed("No point came to a result: the loss of every one is not finite. Lower optim.lr.")

    def _survivors(self, rung: dict[str, Any]) -> list[str]:
        """The best of a rung by eval loss, in the order of the points."""
        best = {n: e["best"]["loss"] for n, e in rung["ended"].items() if e["best"] and not _failed(e)}
        left = sorted(best, key=best.get)[: max(2, len(rung["ended"]) // self.halving)]
        print(f"step {rung['until']}: {len(left)} of {len(rung['ended'])} go on: {', '.join(left)}")
        return [name for name in self.points if name in left and not rung["ended"][name]["ended"]]

    def _train(self, number: int, names: list[str]) -> None:
        from jaxtune.run import job, running

        rung, before = self.plan["rungs"][number], self.plan["rungs"][number - 1] if number else None
        print(f"{len(names)} in one step: {', '.join(names)}" if len(names) > 1 else f"alone: {names[0]}")
        cfg = self.points[names[0]].cfg
        self.clock.parts.clear()  # the members of a group tell the time of their group
        with job.explained_memory(cfg, self.open(cfg)[1].length):
            j, generated = self._build(names)
            begins = None
            if before:
                folders = self._folders(number - 1, names)
                begins = [
                    (running.saved_state(j, i, name, None, folders[name]), copy.deepcopy(before["ended"][name]))
                    for i, name in enumerate(names)
                ]
            for name in names:
                self._mark(name, "running")
            stretch = running.Stretch(self._checkpoints(number, names), rung["until"], begins)
            ended = running.run(j, [self._place(name) for name in names], stretch, self.clock, generated)
        for name, run in zip(names, ended.runs, strict=True):
            if run.failed:
                self._mark(name, "failed", why=run.ended)
            rung["ended"][name] = run.record
        self._write()

    def _build(self, names: list[str]) -> tuple[Any, list[Any]]:
        """The job of these points, and what scores their answers; the last ones are kept."""
        from jaxtune.run import job, running
        from jaxtune.run.workdir import check_room

        if self._built is None or self._built[0] != names:
            self._built = None  # its arrays go first
            cfgs = [self.points[name].cfg for name in names]
            j = job.build_group(cfgs, *self.open(cfgs[0]))
            if j.note:
                print(j.note)
            check_room(self.folder, cfgs[0], j)
            self.clock("load")
            self._built = names, j, running.json_evaluations(j)
        return self._built[1:]

    def _finish(self, number: int, group: list[str], names: list[str]) -> None:
        """Write the results of those of a group that end in this rung."""
        from jaxtune.run import running
        from jaxtune.train import loop

        left = [name for name in names if status(self.folder / name) not in ("finished", "failed")]
        if not left:
            return
        (j, generated), rung = self._build(group), self.plan["rungs"][number]
        folders = self._folders(number, group)
        for name in left:
            i = group.index(name)
            run = loop.Run(name, None, None, record=rung["ended"][name])
            place = self._place(name)
            if rung["until"] is not None and not run.ended:
                place.facts["cut_at"] = rung["until"]
            best = run.best and int(run.best["step"])
            state = running.saved_state(j, i, name, best, folders[name])
            running.finish(j, i, place, run, state, self.clock.branch(), generated[i])
            self._mark(name, "finished")

    def _checkpoints(self, number: int, names: list[str]) -> Path:
        at = self.plan["rungs"][number]["groups"].index(names)
        return self.folder / "groups" / f"{number}-{at}" / "checkpoints"

    def _folders(self, number: int, names: Sequence[str]) -> dict[str, list[Path]]:
        """For each name, where its checkpoints are, those of the last rung first."""
        found: dict[str, list[Path]] = {name: [] for name in names}
        for n in range(number, -1, -1):
            for group in self.plan["rungs"][n]["groups"]:
                for name in set(group) & set(names):
                    found[name].append(self._checkpoints(n, group))
        return found

    def _place(self, name: str) -> Any:
        from jaxtune.run import running

        point = self.points[name]
        command = ["jaxtune", "train", *_alone(self.argv), *point.flags(), f"--workdir={self.folder.name}-{name}"]
        return running.Place(name, self.folder / name, command, {"point": point.values})

    def _mark(self, name: str, what: str, **facts: Any) -> None:
        from jaxtune.files import atomic_write_text

        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / "member.json", json.dumps({"status": what, **facts}) + "\n")

    # ---------------------------------------------------------------------------------------------------- telling it

    def show(self, new: Sequence[pts.Point]) -> None:
        """Print what would be trained together."""
        left = [p for p in self.points.values() if status(self.folder / p.name) != "finished"]
        groups = self._groups([*left, *new])
        for names in groups:
            print(f"{len(names)} in one step: {', '.join(names)}" if len(names) > 1 else f"alone: {names[0]}")
        plural = "s" if len(groups) > 1 else ""
        print(f"{len(left) + len(new)} runs in {len(groups)} group{plural}; every check passed, nothing was compiled.")

    def tell(self) -> None:
        """Print the table, write sweep.csv and report.html, and say how to go on with the best."""
        from jaxtune.report import sweep_table, write_sweep

        sweep_table.main([str(self.folder)])
        print(f"report: {write_sweep(self.folder)}")
        rows = sweep_table.sweep_rows(self.folder)
        if rows[0]["status"] == "finished" and rows[0]["eval_loss"] is not None:
            print(f"again, alone:\n  {shlex.join(self._place(Path(rows[0]['run']).name).argv)}")


def _sections(cfg: Any, *names: str) -> str:
    """Some sections of a config as text: what is read or built once for all configs that share them."""
    from jaxtune import config

    tree = json.loads(config.to_json(cfg))
    return json.dumps([tree[name] for name in names])


def status(folder: Path) -> str:
    """How a member stands: "running" covers all that is not known to have ended."""
    file = folder / "member.json"
    return json.loads(file.read_text())["status"] if file.exists() else "not started"


def _failed(record: dict[str, Any]) -> bool:
    from jaxtune.train.loop import EARLY

    return record["ended"] not in (None, EARLY)


def _alone(argv: Sequence[str]) -> list[str]:
    """The flags of a sweep that a run alone takes: those of the config."""
    kept, tokens = [], list(argv)
    while tokens:
        token = tokens.pop(0)
        mine = token.startswith(("--config", "--noconfig"))
        value = "=" not in token and tokens and not tokens[0].startswith("--")
        if mine:
            kept.append(token)
        if value:
            text = tokens.pop(0)
            if mine:
                kept.append(text)
    return kept
