"""Run a job in its directories: one run alone, or the members of a sweep in one step. Made to be started again."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from jaxtune import config
from jaxtune.errors import UserError
from jaxtune.files import atomic_write_text
from jaxtune.run import job, results, sampling
from jaxtune.run.job import Job, Member, with_features
from jaxtune.train import loop
from jaxtune.train.checkpoint import Checkpoints
from jaxtune.train.log import Metrics, Progress, read_metrics
from jaxtune.train.parallel import replicate, shard_batch
from jaxtune.train.stacked import stack, take
from jaxtune.train.step import TrainState
from jaxtune.train.watch import Watch


@dataclass
class Place:
    """Where one member's run lives, and how it is repeated alone."""

    name: str
    folder: Path
    argv: list[str]
    facts: dict[str, Any] = field(default_factory=dict)  # for summary.json


@dataclass
class Ended:
    """How a stretch of a job ended: the runs in the members' order, and the last state of those still in the step."""

    runs: list[loop.Run]
    state: TrainState

    @property
    def step(self) -> int:
        return _step(self.state)


@dataclass
class Stretch:
    """A part of a job's steps, with checkpoints of its own: all of them, or a sweep's up to its next cut.

    Attributes:
        checkpoints: the directory.
        until: the step it ends with; None: the job's last.
        begins: the states of all members and what the loop remembers of them, from the stretch before.
    """

    checkpoints: Path
    until: int | None = None
    begins: list[tuple[TrainState, dict[str, Any]]] | None = None


def run(j: Job, places: Sequence[Place], stretch: Stretch, clock: Any, generated: Sequence[Any]) -> Ended:
    """Train the members of `j` together, or go on with them, and say how they ended.

    Raises:
        UserError: more steps are done than the config asks for.
        RunFailed: no loss is finite any more.
        Interrupted: stopped by a signal, with a checkpoint.
    """
    last = stretch.until or j.steps
    for member, place in zip(j.members, places, strict=True):
        place.folder.mkdir(parents=True, exist_ok=True)
        if not (place.folder / "config.json").exists():  # before all else, so that what follows is known as a run
            _write_config(j, member, place)
    first = 0
    state, names = j.state, [place.name for place in places]
    records = [None] * len(names)
    if stretch.begins:
        states, records = zip(*stretch.begins, strict=True)
        state = replicate(stack(states), j.mesh)
        first = int(states[0].step)
    cfg = j.members[0].cfg
    abstract = _abstract(state)
    checkpoints = Checkpoints(stretch.checkpoints, cfg.train.keep, since=first)
    found = checkpoints.restore(lambda counters: _like(j, abstract, counters))
    in_step = names
    if found:
        state, counters = found
        in_step = [run["name"] for run in counters["runs"][: counters["in_step"]]]
        saved = {run.pop("name"): run for run in counters["runs"]}
        records = [saved[name] for name in names]
    start = _step(state)
    if start > last:
        raise UserError(
            f"The run in {places[0].folder} has done {start} steps, and this config asks for {last}; nothing was "
            "changed. Raise train.steps or train.epochs, or give another --workdir."
        )
    j = _without_change(j, places[0])
    with ExitStack() as opened:
        opened.callback(checkpoints.close)
        progress = Progress(last, start, bar=cfg.log.progress, plot=cfg.log.plot, several=j.stacked)
        opened.callback(progress.close)
        if found:
            progress.say(f"Going on after step {start} of {last}.")
        if start < last:
            with loop.stop_on_signal() as stopped:
                j = with_features(j, progress.say, stopped)
        clock("features")
        runs, after = [], start if found or first else -1
        for lane, (member, place, record) in enumerate(zip(j.members, places, records, strict=True)):
            _write_config(j, member, place)
            run = _open(j, member, place, lane, record, after)
            opened.callback(run.metrics.close)
            progress.recall(run.name, run.metrics.lines.kept)
            runs.append(run)
        samples = sampling.Samples(j, {place.name: place.folder for place in places}, after, progress.say)
        opened.callback(samples.close)
        if not found and not first:
            _generate_before(j, runs, generated)
        clock("setup")
        training = loop.Loop(
            state,
            j.frozen,
            j.step_fn,
            j.batch_at,
            _plan(j, last),
            [run for run in runs if run.name in in_step],
            dropped=[run for run in runs if run.name not in in_step],
            put=j.put,
            checkpoints=checkpoints,
            progress=progress,
            evaluate=_evaluation(j),
            sample=samples,
            take=take if j.stacked else None,
        )
        training.run()
    clock("train")
    return Ended(runs, training.state)


def _without_change(j: Job, place: Place) -> Job:
    """The job with features cached, or not, as they were when the run began: the last bits of its numbers differ.

    Raises:
        UserError: they were, and cannot be now.
    """
    file = place.folder / "config.json"
    before = json.loads(file.read_text()).get("versions", {}).get("features") if file.exists() else None
    if before is None or j.members[0].cfg.train.cache_features != "auto":
        return j
    if before == "none":
        return replace(j, features=None)
    if j.features is None:
        raise UserError(
            f"The run in {place.folder} began on cached features, and now it would not: {j.note or 'it is too short.'} "
            "Nothing was changed. Set train.cache_features=on or off; results differ in their last digits."
        )
    return j


def saved_state(j: Job, i: int, name: str, step: int | None, folders: Sequence[Path]) -> TrainState:
    """Read the state of member `i`, called `name`, from its checkpoint of `step`; None: its last.

    Args:
        folders: where its stretches kept their checkpoints, the last one first.
    """
    abstract = _abstract(j.state)
    for folder in folders:
        checkpoints = Checkpoints(folder, keep=1)
        try:
            found = [n for n in checkpoints.steps() if step in (None, n)]
            if found:
                state, counters = checkpoints.restore(lambda counters: _like(j, abstract, counters), found[-1])
                lane = [run["name"] for run in counters["runs"]].index(name)
                return j.alone(state, lane, j.members[i])
        finally:
            checkpoints.manager.close()
    raise FileNotFoundError(f"no checkpoint of {name} at step {step} in {', '.join(map(str, folders))}")


def finish(j: Job, i: int, place: Place, run: loop.Run, state: TrainState, clock: Any, generated: Any) -> None:
    """Score the result of member `i`, and write what a run leaves behind."""
    member = j.members[i]
    params = j.params(state)
    if generated:
        done = read_metrics(place.folder)
        steps = max(m["step"] for m in done)
        if not any("eval/json_valid" in m and m["step"] == steps for m in done):
            metrics = _metrics(member.cfg, place, steps)
            metrics.write(steps, generated(params))
            metrics.close()
    jax.block_until_ready(params)
    clock("evaluate")
    results.finish(member, place, j, params, run, clock, generated)


def json_evaluations(j: Job) -> list[Any]:
    """For each member, what generates and scores its answers; None where evaluate.json is off."""
    cfg = j.members[0].cfg
    if not cfg.evaluate.json:
        return [None] * len(j.members)
    from jaxtune.evaluate.json_fields import JsonEvaluation

    e = cfg.evaluate
    given = j.model.module, j.data.eval, j.data.tokenizer, e.rows, e.max_new_tokens, j.data.stops
    return [JsonEvaluation(*given) for _ in j.members]


def _write_config(j: Job, member: Member, place: Place) -> None:
    facts = {"data": j.data.report.fingerprint, "features": str(j.features.cut) if j.features else "none"}
    text = config.to_json(member.cfg, results.versions() | facts)
    atomic_write_text(place.folder / "config.json", text)


def _metrics(cfg: Any, place: Place, step: int, watch: Watch | None = None) -> Metrics:
    return Metrics(
        place.folder,
        step,
        watch=watch,
        tensorboard=cfg.log.tensorboard,
        wandb=cfg.log.wandb,
        config=json.loads(config.to_json(cfg)),
    )


def _open(j: Job, member: Member, place: Place, lane: int, record: dict | None, step: int) -> loop.Run:
    lr, shape = member.cfg.optim.lr, j.shape
    return loop.Run(
        place.name,
        _metrics(member.cfg, place, step, Watch(job.rate_hint(member.cfg, j.model))),
        lr_at=lambda step: float(lr * shape(step)),
        places=member.batches.places,
        lane=lane,
        record=record or loop.fresh_record(),
    )


def _generate_before(j: Job, runs: list[loop.Run], generated: Sequence[Any]) -> None:
    """All members of a job start as the base, so it is asked once."""
    if generated[0]:
        values = generated[0](j.params(j.alone(j.state, 0, j.members[0])))
        for run, one in zip(runs, generated, strict=True):
            one.answers = list(generated[0].answers[:1])
            run.metrics.write(0, values)


def _plan(j: Job, last: int) -> loop.Plan:
    cfg = j.members[0].cfg
    eval_every = cfg.train.eval_every or max(1, round(j.members[0].batches.steps_per_epoch))
    return loop.Plan(last, cfg.log.every, eval_every, cfg.train.save_every, cfg.train.early_stop)


def _evaluation(j: Job) -> Any:
    if j.eval_batches is None:
        return None
    limit = j.members[0].cfg.train.eval_batches
    put = lambda b: shard_batch(b, j.mesh)  # noqa: E731
    return loop.make_evaluate(j.eval_step, j.frozen, j.eval_batches, put, limit, j.model.task.metrics)


def _step(state: TrainState) -> int:
    return int(state.step.ravel()[0])


def _abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _like(j: Job, abstract: TrainState, counters: dict[str, Any]) -> TrainState:
    """An abstract state with as many members as the checkpoint has."""
    if not j.stacked:
        return abstract
    members = counters["in_step"]

    def cut(x):
        return jax.ShapeDtypeStruct((members, *x.shape[1:]), x.dtype, sharding=x.sharding)

    return jax.tree.map(cut, abstract)
