"""A sweep and its directory: planning it, running it and reporting it.

DIR/sweep.json holds the plan: the points, and rungs of groups. A group is a list of points that train in
one step, with stacked checkpoints in DIR/groups/RUNG-NUMBER; a rung is all groups up to a step. Without halving there
is one rung. A sweep that was killed reads its plan and resumes; new points become new groups.
"""

import copy
import itertools
import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from jaxtune import config
from jaxtune.config.recipe import experiment
from jaxtune.errors import RunFailed, UserError
from jaxtune.files import atomic_write_text
from jaxtune.reading import read_json
from jaxtune.run import fit, running
from jaxtune.run import points as pts
from jaxtune.run.experiment import Data, Experiment, data_lines, make_batches, one_order, open_data
from jaxtune.run.training import Job, build
from jaxtune.run.workdir import check_is_ours, check_room, check_workdir, dated
from jaxtune.train import loop
from jaxtune.train.best import sign
from jaxtune.train.checkpoint import Damaged
from jaxtune.train.cost import measure
from jaxtune.train.recipe import compiled_bytes
from jaxtune.train.runtime import free_bytes

AT_MOST = 1.5  # times the memory by formula: if that fits, no step is compiled to measure it


@dataclass
class Sweep:
    """A sweep and its directory.

    Attributes:
        folder: None: a dry run; nothing is written.
        resolve: settings as text -> config.
        argv: the command line without the swept settings, from which those of the points are made.
        limit: points at most; None: any number.
        points: name -> point, of all points in the plan.
        plan: the content of sweep.json: the points' values; halving; the date that the chat template writes, if any;
            and rungs, each with its last step `until` (None: the end), its groups of names, and `ended`, the loop's
            record of each name that has ended there.
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
    _experiments: dict[str, Experiment] = field(default_factory=dict)
    _rows: dict[str, Data] = field(default_factory=dict)
    _tuned: set[str] = field(default_factory=set)
    _built: tuple[list[str], Any, list[Any]] | None = None

    # ---------------------------------------------------------------------------------------------- what is to be done

    def check(self, asked: Sequence[dict[str, Any]]) -> list[pts.Point]:
        """Read the plan and check everything without changes; return the points that are not in the plan yet.

        Raises:
            UserError: the points, the directory, the models or the data are wrong.
        """
        self._read()
        known = [p.values for p in self.points.values()]
        new = [p for p in pts.resolve_points(asked, self._resolved, limit=self.limit) if p.values not in known]
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
        return [self._dated(point) for point in new]

    def _resolved(self, settings: dict[str, str]) -> Any:
        """The config of these settings, with the date of the sweep where its chat template writes one."""
        cfg, date = self.resolve(settings), self.plan.get("date")
        return config.replaced(cfg, {"data.date": date}) if date and not cfg.data.date else cfg

    def _dated(self, point: pts.Point) -> pts.Point:
        """The point with the date that its chat template writes, which is kept for another day."""
        rows = self.open(point)[1]
        if (cfg := dated(point.cfg, rows)) is point.cfg:
            return point
        self.plan["date"] = cfg.data.date
        point = replace(point, cfg=cfg)
        self._experiments[point.name] = found = experiment(cfg)
        self._rows[_rows_key(found, cfg)] = rows
        return point

    def _read(self) -> None:
        if self.folder is None or not check_is_ours(self.folder, "sweep.json"):
            return
        file = self.folder / "sweep.json"
        self.plan = read_json(file)
        points = self.plan.get("points")
        if (
            "halving" not in self.plan
            or not isinstance(points, dict)
            or not all(isinstance(values, dict) for values in points.values())
        ):
            raise UserError(
                f"{file} is not what jaxtune sweep writes; resume a sweep of launch/sweep_lr.sh with that script, "
                "else give another --workdir"
            )
        if self.plan["halving"] != self.halving:
            before, now = (f"--halving={h}" if h else "no --halving" for h in (self.plan["halving"], self.halving))
            raise UserError(f"the sweep in {self.folder} has {before}, and this command {now}; nothing was changed")
        for name, values in self.plan["points"].items():
            values = {path: tuple(v) if isinstance(v, list) else v for path, v in values.items()}
            cfg = self._resolved({path: pts.text_of(value) for path, value in values.items()})
            self.points[name] = pts.Point(name, values, cfg)

    def _check_point(self, point: pts.Point) -> None:

        if point.cfg.log.wandb:
            raise UserError("log.wandb: the members of a sweep share one process; switch it off, or use sweep_lr.sh")
        if point.cfg.optim.state == "host":
            raise UserError(
                "optim.state=host: the members of a sweep keep their moments on the device; use 8bit, or train one run "
                "at a time with sweep_lr.sh"
            )
        if point.cfg.train.micro_batch == "auto":
            raise UserError(
                "train.micro_batch=auto: the memory of a sweep decides how many runs share a step; give a number, "
                "such as `jaxtune plan` names"
            )
        found, rows = self.open(point)
        method = _sections(point.cfg, "model", "tune")
        if method not in self._tuned:  # targets that match nothing, ranks that are too large
            jax.eval_shape(lambda params: found.recipe.tuned(params)[0], found.recipe.abstract_base())
            self._tuned.add(method)
        if self.folder is not None:
            folder = self.folder / point.name
            check_workdir(folder, point.cfg, rows.report.fingerprint, found.base.files, member=True)

    def _check_halving(self, points: Sequence[pts.Point]) -> None:
        if any(p.cfg.data.eval is None and not p.cfg.data.eval_fraction for p in points):
            raise UserError("--halving compares eval losses: give data.eval or data.eval_fraction")
        steps = {self.steps_of(p) for p in points}
        if len(steps) > 1:
            raise UserError(f"--halving needs the same number of steps in every point; found {sorted(steps)}")
        if len(points) < 2 * self.halving:
            raise UserError(
                f"--halving={self.halving} has nothing to cut among {len(points)} points: at least two are kept"
            )

    def steps_of(self, point: pts.Point) -> int:
        """The number of steps of a point."""
        return make_batches(*self.open(point))[2]

    def open(self, point: pts.Point) -> tuple[Experiment, Data]:
        """The experiment of a point, without weights, and its rows, which are read once for all that share them."""
        if point.name not in self._experiments:
            self._experiments[point.name] = experiment(point.cfg)
        found = self._experiments[point.name]
        key = _rows_key(found, point.cfg)
        if key not in self._rows:
            first = not self._rows
            self._rows[key] = open_data(found)
            if first:
                print(*data_lines(found, self._rows[key]), sep="\n")
        return found, self._rows[key]

    def add(self, new: Sequence[pts.Point]) -> None:
        """Put new points into groups and write the plan."""
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
        """Names by group: points that may share a step, as many as fit, in groups of similar sizes."""
        groups = []
        for alike in pts.together(points):
            most = self.group_size or self._most(alike)
            count = math.ceil(len(alike) / most)
            bounds = [len(alike) * i // count for i in range(count + 1)]
            groups += [[p.name for p in alike[a:b]] for a, b in itertools.pairwise(bounds)]
        return groups

    def _most(self, alike: Sequence[pts.Point]) -> int:
        """How many of these points fit the memory in one step."""
        experiments = [self.open(point)[0] for point in alike]
        recipes, room = [e.recipe for e in experiments], free_bytes()
        widest = max(recipes, key=lambda recipe: sum(x.size for x in jax.tree.leaves(recipe.abstract.state.trainable)))
        bound = measure(widest, jax.default_backend()).bytes(widest.batch.rows, len(recipes)).total
        if AT_MOST * bound < room:
            return len(recipes)
        shared = one_order(experiments)
        while len(recipes) > 1 and compiled_bytes(recipes, shared_batch=shared) > room:
            recipes = recipes[: math.ceil(len(recipes) / 2)]
        return len(recipes)

    def _add_rung(self, groups: list[list[str]]) -> None:
        self.plan["rungs"].append({"until": self._cut(len(self.plan["rungs"])), "groups": groups, "ended": {}})

    def _cut(self, rung: int) -> int | None:
        """The last step of a rung; None: the end."""
        if not self.halving:
            return None
        cuts = round(math.log(len(self.points), self.halving), 9) // 1
        steps = self.steps_of(next(iter(self.points.values())))
        return max(1, round(steps * self.halving ** (rung - cuts))) if rung < cuts else None

    def _write(self) -> None:
        atomic_write_text(self.folder / "sweep.json", json.dumps(self.plan, indent=1) + "\n")

    # ------------------------------------------------------------------------------------------------------ doing it

    def run(self) -> None:
        """Run the rest of the plan.

        Raises:
            RunFailed: no point has a result.
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
            raise RunFailed("No point has a result: no loss is finite. Lower optim.lr.")

    def _survivors(self, rung: dict[str, Any]) -> list[str]:
        """The best of a rung by the metric of train.best, in the order of the points."""
        ended = {n: e["best"] for n, e in rung["ended"].items() if e["best"] and not _failed(e)}
        metric = next(iter(self.points.values())).cfg.train.best
        best = {name: -sign(metric) * found.get("value", found["loss"]) for name, found in ended.items()}
        left = sorted(best, key=best.get)[: max(2, len(rung["ended"]) // self.halving)]
        print(f"step {rung['until']}: {len(left)} of {len(rung['ended'])} are kept: {', '.join(left)}")
        return [name for name in self.points if name in left and not rung["ended"][name]["ended"]]

    def _train(self, number: int, names: list[str]) -> None:
        rung, before = self.plan["rungs"][number], self.plan["rungs"][number - 1] if number else None
        print(f"{len(names)} in one step: {', '.join(names)}" if len(names) > 1 else f"alone: {names[0]}")
        first, _ = self.open(self.points[names[0]])
        self.clock.parts.clear()  # times are recorded for a group as a whole
        with fit.explained_memory(first):
            job, scored = self._build(names)
            begins = None
            if before:
                folders = self._folders(number - 1, names)
                begins = [
                    (self._cut_state(job, i, name, number - 1, folders[name]), copy.deepcopy(before["ended"][name]))
                    for i, name in enumerate(names)
                ]
            for name in names:
                self._mark(name, "running")
            phase = running.Phase(self._checkpoints(number, names), rung["until"], begins)
            ended = running.run(job, [self._place(name) for name in names], phase, self.clock, scored)
        for name, run in zip(names, ended.runs, strict=True):
            if run.failed:
                self._mark(name, "failed", why=run.ended)
            rung["ended"][name] = run.record
        self._write()

    def _cut_state(self, job: Job, i: int, name: str, number: int, folders: Sequence[Path]) -> Any:
        """The state of a point at the end of a rung; if its checkpoint is damaged, it is marked to repeat the rung.

        Raises:
            Damaged: its checkpoint is damaged; the next start resumes from the one before.
        """
        rung = self.plan["rungs"][number]
        try:
            state = running.saved_state(job, i, name, None, folders)
            if int(state.step) == rung["until"]:
                return state
            why = f"The checkpoint of {name} at step {rung['until']} is gone."
        except Damaged as error:
            why = str(error)
        group = next(names for names in rung["groups"] if name in names)
        for other in group:
            rung["ended"].pop(other, None)
        self._write()
        raise Damaged(f"{why} Start again: {', '.join(group)} will be trained again up to there.")

    def _build(self, names: list[str]) -> tuple[Job, list[Any]]:
        """The job of these points, and the scorers of their answers; the latest are cached."""
        if self._built is None or self._built[0] != names:
            self._built = None  # frees its arrays first
            opened = [self.open(self.points[name]) for name in names]
            job = build([found for found, _ in opened], opened[0][1], stacked=True)
            if job.note:
                print(job.note)
            check_room(self.folder, job)
            self.clock("load")
            self._built = names, job, running.answer_scores(job)
        return self._built[1:]

    def _finish(self, number: int, group: list[str], names: list[str]) -> None:
        """Write the results of those of a group that end in this rung."""

        left = [name for name in names if status(self.folder / name) not in ("finished", "failed")]
        if not left:
            return
        (job, scored), rung = self._build(group), self.plan["rungs"][number]
        folders = self._folders(number, group)
        for name in left:
            i = group.index(name)
            run = loop.Run(name, None, None, record=rung["ended"][name])
            place = self._place(name)
            if rung["until"] is not None and not run.ended:
                place.facts["cut_at"] = rung["until"]
            state = running.best_state(job, i, run, folders[name])
            running.finish(job, i, place, run, state, self.clock.branch(), scored[i])
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

    def _place(self, name: str) -> running.RunFolder:
        point = self.points[name]
        flags, date = [*_alone(self.argv), *point.flags()], self.plan.get("date")
        flags += [f"--config.data.date={date}"] if date else []
        command = ["jaxtune", "train", *flags, f"--workdir={self.folder.name}-{name}"]
        return running.RunFolder(name, self.folder / name, command, {"point": point.values})

    def _mark(self, name: str, what: str, **facts: Any) -> None:
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
        """Print the table, write sweep.csv and report.html, and print the command that trains the best point alone."""
        from jaxtune.report import sweep_table, write_sweep

        sweep_table.main([str(self.folder)])
        print(f"report: {write_sweep(self.folder)}")
        rows = sweep_table.sweep_rows(self.folder)
        if rows[0]["status"] == "finished" and rows[0]["eval_loss"] is not None:
            print(f"again, alone:\n  {shlex.join(self._place(Path(rows[0]['run']).name).argv)}")


def _rows_key(found: Experiment, cfg: Any) -> str:
    return _sections(cfg, "model", "data", "objective") + str(found.prefix)


def _sections(cfg: Any, *names: str) -> str:
    """Some sections of a config as text: the key of objects that configs with equal sections share."""
    tree = json.loads(config.to_json(cfg))
    return json.dumps([tree[name] for name in names])


def status(folder: Path) -> str:
    """The status of a member: "running" unless it is known to have ended."""
    file = folder / "member.json"
    return str(read_json(file).get("status")) if file.exists() else "not started"


def _failed(record: dict[str, Any]) -> bool:
    return record["ended"] not in (None, loop.EARLY)


def _alone(argv: Sequence[str]) -> list[str]:
    """The flags of a sweep that also apply to a single run: those of the config."""
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
