"""Train a job in its directories: a single run, or the members of a sweep in one step. It can be resumed."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from jaxtune.errors import UserError
from jaxtune.files import atomic_write_text
from jaxtune.reading import read_text
from jaxtune.run import general, results, sampling, watched
from jaxtune.run.blame import cause_of
from jaxtune.run.drawing import redraw
from jaxtune.run.experiment import Experiment
from jaxtune.run.training import Job, Member, with_kept, with_reference
from jaxtune.run.workdir import versions_of
from jaxtune.train import loop, parallel, processes
from jaxtune.train.checkpoint import Checkpoints, Damaged
from jaxtune.train.log import Metrics, Progress, read_metrics
from jaxtune.train.stacked import stack, take
from jaxtune.train.step import TrainState
from jaxtune.train.watch import Watch


@dataclass
class RunFolder:
    """The directory of one member, and the command that trains it alone."""

    name: str
    folder: Path
    argv: list[str]
    facts: dict[str, Any] = field(default_factory=dict)  # for summary.json


@dataclass
class Ended:
    """How a phase of a job ended: the runs in the members' order, and the last state of those still in the step."""

    runs: list[loop.Run]
    state: TrainState

    @property
    def step(self) -> int:
        return _step(self.state)


@dataclass
class Phase:
    """A part of a job's steps, with its own checkpoints: all steps, or those of a sweep up to its next cut.

    Attributes:
        checkpoints: the directory.
        until: its last step; None: the job's last.
        begins: the states of all members and their loop records, from the phase before.
    """

    checkpoints: Path
    until: int | None = None
    begins: list[tuple[TrainState, dict[str, Any]]] | None = None


def run(job: Job, places: Sequence[RunFolder], phase: Phase, clock: Any, scored: Sequence[Any]) -> Ended:
    """Train the members of `job` together, or resume them; return how they ended.

    Raises:
        UserError: more steps are done than the config has, or they were done over another base.
        RunFailed: no loss is finite any more.
        Interrupted: stopped by a signal, with a checkpoint.
    """
    last = phase.until or job.steps
    for member, place in zip(job.members, places, strict=True):
        place.folder.mkdir(parents=True, exist_ok=True)
        job.experiment.base.files.check(place.folder, whole=True)
        job.experiment.base.files.record(place.folder)
        _check_others(job, place)
        if not (place.folder / "config.json").exists():  # first, so that the directory is recognised as a run
            _write_config(job, member, place)
    first = 0
    state, names = job.state, [place.name for place in places]
    records = [None] * len(names)
    if phase.begins:
        states, records = zip(*phase.begins, strict=True)
        state = parallel.place(stack(states), job.mesh)
        first = int(states[0].step)
    experiment = job.experiment
    abstract = _abstract(state)
    checkpoints = Checkpoints(phase.checkpoints, experiment.train.keep, since=first)
    found = checkpoints.restore(lambda counters: _like(job, abstract, counters))
    in_step = names
    if found:
        state, counters = found
        in_step = [run["name"] for run in counters["runs"][: counters["in_step"]]]
        saved = {run.pop("name"): run for run in counters["runs"]}
        records = [saved[name] for name in names]
    start = _step(state)
    if start > last:
        raise UserError(
            f"The run in {places[0].folder} has done {start} steps, and this config has {last}; nothing was "
            "changed. Raise train.steps or train.epochs, or give another --workdir."
        )
    job = _without_change(job, places[0])
    with ExitStack() as opened:
        opened.callback(checkpoints.close)
        progress = Progress(last, start, bar=experiment.log.progress, several=job.stacked)
        opened.callback(progress.close)
        if found:
            progress.say(f"Resuming after step {start} of {last}.")
        if start < last:
            with loop.stop_on_signal() as stopped:
                job = with_reference(with_kept(job, progress.say, stopped), progress.say, stopped)
        clock("features")
        runs, after = [], start if found or first else -1
        for index, (member, place, record) in enumerate(zip(job.members, places, records, strict=True)):
            _write_config(job, member, place)
            run = _open(job, member, place, index, record, after)
            opened.callback(run.metrics.close)
            progress.recall(run.name, run.metrics.lines.kept)
            runs.append(run)
        samples = sampling.Samples(job, {place.name: place.folder for place in places}, after, progress.say)
        opened.callback(samples.close)
        if not found and not first:
            _generate_before(job, runs, scored)
        clock("setup")
        training = loop.Loop(
            state,
            job.frozen,
            job.step_fn,
            job.batch_at,
            _plan(job, last),
            [run for run in runs if run.name in in_step],
            dropped=[run for run in runs if run.name not in in_step],
            put=job.put,
            checkpoints=checkpoints,
            progress=progress,
            evaluate=_evaluation(job),
            sample=samples,
            take=take if job.stacked else None,
            cause=cause_of(job),
            redraw=redraw(job),
        )
        training.run()
    clock("train")
    return Ended(runs, training.state)


def alone(job: Job, workdir: Path, argv: list[str], clock: Any) -> None:
    """Train the one run of `job` in its directory, or resume it, and write its result.

    Args:
        job: of one run.
        workdir: its directory.
        argv: the command that runs it again.
        clock: times each part.

    Raises:
        UserError, RunFailed, Interrupted: as `run`.
    """
    place, checkpoints = RunFolder("run", workdir, argv), processes.shared(workdir) / "checkpoints"
    [scored] = answer_scores(job)
    ended = run(job, [place], Phase(checkpoints), clock, [scored])
    [done], state = ended.runs, ended.state
    if done.best and done.best["step"] != ended.step:
        state = best_state(job, 0, done, [checkpoints])
        if done.best:
            print(f"The best evaluation was at step {done.best['step']:.0f}; its weights are the result.")
    finish(job, 0, place, done, state, clock, scored)


def _without_change(job: Job, place: RunFolder) -> Job:
    """The job with features cached or not, as when the run began, since that changes the last bits of results.

    Raises:
        UserError: they were cached, and cannot be now.
    """
    file = place.folder / "config.json"
    before = versions_of(read_text(file)).get("features") if file.exists() else None
    if before is None or job.experiment.train.cache_features != "auto":
        return job
    if before == "none":
        return replace(job, features=None)
    if job.features is None:
        raise UserError(
            f"The run in {place.folder} began with cached features, which it would not use now: "
            f"{job.note or 'it is too short.'} Nothing was "
            "changed. Set train.cache_features=on or off; results differ in their last digits."
        )
    return job


def best_state(job: Job, i: int, run: loop.Run, folders: Sequence[Path]) -> TrainState:
    """Read the state that is the result of member `i`: that of its best evaluation, else its last.

    Where the checkpoint of the best one is damaged, the last is taken and `run.best` becomes None.

    Args:
        job: that trained it.
        i: the member's index.
        run: its record.
        folders: as for `saved_state`.
    """
    if run.best:
        try:
            return saved_state(job, i, run.name, int(run.best["step"]), folders)
        except Damaged as error:
            print(f"{error} It was that of the best evaluation; the weights of the last step are the result.")
            run.record["best"] = None
    return saved_state(job, i, run.name, None, folders)


def saved_state(job: Job, i: int, name: str, step: int | None, folders: Sequence[Path]) -> TrainState:
    """Read the state of member `i`, called `name`, from its checkpoint of `step`; None: its last.

    Args:
        job: that trained it.
        i: the member's index in the job.
        name: the member's name in checkpoints.
        step: None: its last.
        folders: with the member's checkpoints, newest first: halving moves it to a new folder.

    Raises:
        Damaged: it cannot be read, and has been set aside, or is gone.
    """
    abstract = _abstract(job.state)
    for folder in folders:
        checkpoints = Checkpoints(folder, keep=1)
        try:
            found = [n for n in checkpoints.steps() if step in (None, n)]
            if found:
                state, counters = checkpoints.restore(lambda counters: _like(job, abstract, counters), found[-1])
                index = [run["name"] for run in counters["runs"]].index(name)
                return job.alone(state, index, job.members[i])
        finally:
            checkpoints.leave()
    which = "checkpoint" if step is None else f"checkpoint of step {step}"
    raise Damaged(f"There is no {which} of {name} in {', '.join(map(str, folders))}.")


def finish(job: Job, i: int, place: RunFolder, run: loop.Run, state: TrainState, clock: Any, scored: Any) -> None:
    """Score the result of member `i` and write its files."""
    member = job.members[i]
    params = job.params(state)
    if scored:
        done = read_metrics(place.folder)
        steps = max(m["step"] for m in done)
        name = f"eval/{next(iter(scored.metrics))}"
        if not any(name in m and m["step"] == steps for m in done):
            metrics = _metrics(member.experiment, place, steps)
            metrics.write(steps, scored(params))
            metrics.close()
    jax.block_until_ready(params)
    clock("evaluate")
    processes.beat("the end of training")
    params = results.readable(params, member.mask)
    if not processes.is_first():
        results.follow(member, job, params)
        return
    results.finish(member, place, job, params, run, clock, scored)


def answer_scores(job: Job) -> list[Any]:
    """For each member the scorer of its answers (`jaxtune.evaluate.answers.AnswerScores`); None without any metric."""
    e = job.experiment.evaluate
    if not e.metrics:
        return [None] * len(job.members)
    from jaxtune.evaluate.answers import AnswerScores

    rows = job.rows
    room = {"max_new_tokens": e.max_new_tokens, "eos_ids": rows.stops, "virtual": len(rows.prefix)}
    given = job.module, rows.eval, rows.tokenizer, e.metrics
    return [AnswerScores(*given, most_rows=e.rows, **room) for _ in job.members]


def _others(job: Job) -> str:
    return hashlib.sha256(json.dumps(dict(job.experiment.task.others)).encode()).hexdigest()[:40]


def _check_others(job: Job, place: RunFolder) -> None:
    """Raise UserError where the run in a directory depended on other files than it would now."""
    file = place.folder / "config.json"
    before = versions_of(read_text(file)).get("others") if file.exists() else None
    if before not in (None, _others(job)):
        names = " or ".join(job.experiment.task.others)
        raise UserError(
            f"{names}: its files are not those that the run in {place.folder} began with; nothing was changed. Put "
            "them back, or give another --workdir."
        )


def _write_config(job: Job, member: Member, place: RunFolder) -> None:
    facts = {"rows": job.rows.report.fingerprint, "features": str(job.features.cut) if job.features else "none"}
    facts |= {"others": _others(job)} if job.experiment.task.others else {}
    text = json.loads(member.experiment.text) | {"versions": results.versions() | facts}
    atomic_write_text(place.folder / "config.json", json.dumps(text, indent=2, ensure_ascii=False) + "\n")


def _metrics(experiment: Experiment, place: RunFolder, step: int, watch: Watch | None = None) -> Metrics:
    return Metrics(
        place.folder,
        step,
        watch=watch,
        tensorboard=experiment.log.tensorboard,
        wandb=experiment.log.wandb,
        config=json.loads(experiment.text),
    )


def _open(job: Job, member: Member, place: RunFolder, index: int, record: dict | None, step: int) -> loop.Run:
    lr, shape = member.experiment.lr, job.experiment.recipe.shape
    return loop.Run(
        place.name,
        _metrics(member.experiment, place, step, Watch(member.experiment.rate_hint())),
        lr_at=lambda step: float(lr * shape(step)),
        places=member.batches.places,
        index=index,
        record=record or loop.fresh_record(),
    )


def _generate_before(job: Job, runs: list[loop.Run], scored: Sequence[Any]) -> None:
    """Generate the base's answers, once for all members, which start from it."""
    if scored[0]:
        values = scored[0](job.params(job.alone(job.state, 0, job.members[0])))
        for run, one in zip(runs, scored, strict=True):
            one.answers = list(scored[0].answers[:1])
            run.metrics.write(0, values)


def _plan(job: Job, last: int) -> loop.Intervals:
    t = job.experiment.train
    eval_every = t.eval_every or max(1, round(job.members[0].batches.steps_per_epoch))
    return loop.Intervals(last, job.experiment.log.every, eval_every, t.save_every, t.early_stop, t.best)


def _evaluation(job: Job) -> Any:
    if job.eval_batches is None:
        return None
    limit = job.experiment.train.eval_batches
    put = lambda b: parallel.shard_batch(b, job.mesh)  # noqa: E731
    metrics = job.experiment.task.metrics
    evaluate = loop.make_evaluate(job.eval_step, job.frozen, job.eval_batches, put, limit, metrics)
    losses = None if job.rows.general is None else general.losses(job)
    measures = watched.measures(job)
    if losses is None and not measures:
        return evaluate

    def with_more(state):
        found = evaluate(state)
        if losses is not None:
            found = [own | {general.NAME: loss} for own, loss in zip(found, losses(state), strict=True)]
        for i, own in enumerate(found if measures else ()):
            params = job.params(job.alone(state, i, job.members[0]))  # members have the same shapes
            for measure in measures:
                own |= measure(params)
        return found

    return with_more


def _step(state: TrainState) -> int:
    return int(state.step.ravel()[0])


def _abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _like(job: Job, abstract: TrainState, counters: dict[str, Any]) -> TrainState:
    """An abstract state with as many members as the checkpoint has."""
    if not job.stacked:
        return abstract
    members = counters["in_step"]

    def cut(x):
        return jax.ShapeDtypeStruct((members, *x.shape[1:]), x.dtype, sharding=x.sharding)

    return jax.tree.map(cut, abstract)
