"""From experiments to a job that the loop can train: load weights, fill the devices, make the step functions."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxtune import data, tree
from jaxtune.data.batches import GRAIN
from jaxtune.errors import UserError, nearest
from jaxtune.models.attention import trial
from jaxtune.objectives.task import OBJECTIVE
from jaxtune.run import caching, reference
from jaxtune.run.devices import open_mesh
from jaxtune.run.experiment import Data, Experiment, batch_at, make_batches, one_order
from jaxtune.train import processes
from jaxtune.train.features import Extractor, Features, OncePerRow, above
from jaxtune.train.parallel import place, row_parts, shard_batch
from jaxtune.train.recipe import start_group
from jaxtune.train.reference import Reference
from jaxtune.train.stacked import shard_members, unstack
from jaxtune.train.step import TrainState, make_eval_step

# On a CPU a member's results are the same bits in a group of any size if rows have 32 tokens, but not 24.
STACKED_GRAIN = 32


@dataclass
class Member:
    """One run of a job, which may share the step with others.

    Attributes:
        experiment: its settings.
        like: its abstract state outside of the group.
        batches: its stream of batches.
    """

    experiment: Experiment
    mask: Any
    counts: tree.Counts
    like: TrainState
    batches: data.Batches


@dataclass
class Job:
    """Everything that the loop needs.

    Attributes:
        experiment: that of the first member, for the settings that all share.
        state: of the single member, or of all, stacked.
        frozen: what the step takes as frozen, with a companion's parameters beside it where the task has one.
        features: computes the features below all trained layers once; None: they are computed in each step.
        once: computes what else is kept of each row; None: nothing is.
        note: lines on both for the user.
        reference: computes the log-probabilities of answers as the run begins; None: none are needed.
    """

    experiment: Experiment
    rows: Data
    members: list[Member]
    stacked: bool
    state: TrainState
    frozen: Any
    mesh: Any
    steps: int
    batch_at: Callable[[int], Any]
    put: Callable[[Any, list[int]], Any]
    eval_batches: data.EvalBatches | None
    step_fn: Any
    eval_step: Any
    features: Extractor | None = None
    once: OncePerRow | None = None
    note: str | None = None
    reference: Reference | None = None

    @property
    def module(self) -> Any:
        return self.experiment.module

    @property
    def shared(self) -> bool:
        """Whether a batch is one for all members, and not rows for each."""
        return not self.stacked or one_order([m.experiment for m in self.members])

    def alone(self, state: TrainState, index: int, member: Member) -> TrainState:
        """The state of `member`, which has place `index` in a state of this job."""
        return unstack(state, index, member.like) if self.stacked else state

    def params(self, state: TrainState) -> Any:
        """The parameters of a single run, without what only the loss reads."""
        params = tree.combine(state.trainable, state.member, tree.without_other(self.frozen))
        return {name: leaf for name, leaf in params.items() if name != OBJECTIVE}


def build(experiments: Sequence[Experiment], rows: Data, *, stacked: bool = False) -> Job:
    """Load the weights and put everything on the devices.

    Args:
        experiments: one; or several that differ in values only, which train in one step (`stacked`).
        rows: their data.
        stacked: put the members into one state with a leading axis.
    """
    first = experiments[0]
    mesh, placed = open_mesh(first)
    reference.check(first)
    _check_processes(first)
    otherwise = trial(first.module)
    grain = STACKED_GRAIN if stacked else GRAIN
    streams = {e.train.seed: make_batches(e, rows, grain=grain, parts=row_parts(mesh.shape)) for e in experiments}
    shared = not stacked or one_order(experiments)
    batches, held_out, steps = streams[first.train.seed]
    experiments = [e.in_steps(steps) for e in experiments]
    first = experiments[0]
    base = first.base.load(first.recipe, mesh)
    if stacked:
        state, starts = start_group([e.recipe for e in experiments], base)
    else:
        starts = [first.recipe.start(base)]
        state = starts[0].state
    members = [
        Member(e, start.mask, start.counts, jax.eval_shape(lambda x: x, start.state), streams[e.train.seed][0])
        for e, start in zip(experiments, starts, strict=True)
    ]
    frozen = place(starts[0].frozen, mesh)
    compared = reference.plan(first, base, starts[0], rows.sets, mesh)
    passes = caching.passes(first, rows, batches, held_out, steps)
    features, note = caching.plan(first, rows, members[0].mask, frozen, passes, mesh)
    once, told = caching.plan_once(first, rows, base, mesh)
    step_fn, eval_step = _programs(experiments, mesh, stacked)
    if held_out is not None:
        _check_best(first)

    def put(batch, members):
        if shared:
            return shard_batch(batch, mesh)
        return shard_members({k: v[members] for k, v in batch.items()}, mesh)

    return Job(
        experiment=first,
        rows=rows,
        members=members,
        stacked=stacked,
        state=place(state, mesh),
        frozen=place(first.recipe.given(frozen), mesh),
        mesh=mesh,
        steps=steps,
        batch_at=batch_at([m.batches for m in members], shared),
        put=put,
        eval_batches=held_out,
        step_fn=step_fn,
        eval_step=eval_step,
        features=features,
        once=once,
        note="\n".join(filter(None, (placed, otherwise, note, told))) or None,
        reference=compared,
    )


def _check_processes(experiment: Experiment) -> None:
    """Raise UserError where several processes share a run whose method or task computes something of its own before."""
    if not processes.several():
        return
    for found, what in (
        (experiment.train.cache_features == "on", "train.cache_features=on"),
        (experiment.task.once is not None, "objective.top_k"),
        (experiment.task.reference == "precomputed", "objective.reference=precomputed"),
        (experiment.task.draws is not None, "objective.lmbda"),
    ):
        if found:
            raise UserError(f"{what}: a run of several processes cannot do this; start one process.")


def _check_best(experiment: Experiment) -> None:
    """Raise UserError where train.best is no metric that evaluations log. Nothing is compiled."""
    asked, recipe = experiment.train.best, experiment.recipe
    if asked == "eval/loss":
        return
    start, evaluate = recipe.abstract, make_eval_step(recipe.loss(), jit=False)
    batch = recipe.task.batch_like(recipe.batch)
    state = start.state.trainable, start.state.member, start.frozen
    _, _, aux = jax.eval_shape(evaluate, *state, batch)
    found = recipe.task.metrics(1.0, 1.0, jax.tree.map(lambda x: np.ones(x.shape), aux))
    names = ["eval/loss", *(name for name in found if name.rpartition("/")[2] not in ("rows", "tokens"))]
    if asked not in names:
        raise UserError(
            f"train.best={asked}: evaluations of this run log no such metric.{nearest(asked, names, n=1)} "
            f"They log {', '.join(names)}."
        )


def _programs(experiments: Sequence[Experiment], mesh: Any, stacked: bool, module: Any = None) -> tuple[Any, Any]:
    members = len(experiments) if stacked else None
    recipe = experiments[0].recipe
    return recipe.programs(mesh, members=members, shared_batch=one_order(experiments), above=module)


def with_kept(job: Job, say: Callable[[str], None], stop: Callable[[], bool]) -> Job:
    """Return the same job over what is kept of its rows, which is computed if it is not there.

    Raises:
        Interrupted: `stop` returned True; what is done is kept.
    """
    return with_features(_with_once(job, say, stop), say, stop)


def with_features(job: Job, say: Callable[[str], None], stop: Callable[[], bool]) -> Job:
    """Return the same job over features in place of tokens, as `with_kept`."""
    if job.features is None:
        return job
    job = _laid(job, _opened(job, job.features, say, stop), data.with_features)
    module = above(job.module, job.features.cut)
    step_fn, eval_step = _programs([m.experiment for m in job.members], job.mesh, job.stacked, module)
    return replace(job, step_fn=step_fn, eval_step=eval_step)


def _with_once(job: Job, say: Callable[[str], None], stop: Callable[[], bool]) -> Job:
    """Return the same job with what its task computes of each row once beside the tokens."""
    if job.once is None:
        return job
    if job.once.found is None:
        job.once.found = _opened(job, job.once, say, stop)
        job.once.params = None  # the training needs the room
    return _laid(job, job.once.found, partial(data.with_beside, name=job.once.name))


def _opened(job: Job, once: OncePerRow, say: Callable[[str], None], stop: Callable[[], bool]) -> list[Features]:
    """What is kept of the rows of each set."""
    began = time.monotonic()

    def progress(done, total):
        say(f"{once.what}: {done:,} of {total:,} tokens, {done / (time.monotonic() - began):,.0f} tokens/s")

    found = [once.open(rows, stop, progress, say) for rows in job.rows.sets]
    say(f"{once.what}: ready after {time.monotonic() - began:.1f} s")
    return found


def _laid(job: Job, found: Sequence[Features], lay: Callable[[Any, Features], Any]) -> Job:
    """The same job with batches that hold what was found."""
    train, *rest = found
    streams = {id(m.batches): lay(m.batches, train) for m in job.members}
    members = [replace(m, batches=streams[id(m.batches)]) for m in job.members]
    return replace(
        job,
        members=members,
        batch_at=batch_at([m.batches for m in members], job.shared),
        eval_batches=None if job.eval_batches is None else lay(job.eval_batches, *rest),
    )


def with_reference(job: Job, say: Callable[[str], None], stop: Callable[[], bool]) -> Job:
    """Return the same job with the reference's log-probabilities in its batches, computed if they are not there.

    Raises:
        Interrupted: `stop` said so; what is done is kept.
    """
    if job.reference is None:
        return job
    began = time.monotonic()

    def progress(done, total):
        say(f"reference: {done:,} of {total:,} tokens, {done / (time.monotonic() - began):,.0f} tokens/s")

    found = [job.reference.sums(rows, stop, progress, say) for rows in job.rows.sets]
    say(
        f"reference: log-probabilities of {sum(x.size for x in found):,} answers after {time.monotonic() - began:.1f} s"
    )
    return _compared(job, *found)


def _compared(job: Job, train: Any, held_out: Any = None) -> Job:
    """The job with these log-probabilities, f32[texts, R], of its rows."""
    streams = {id(m.batches): data.with_reference(m.batches, train) for m in job.members}
    members = [replace(m, batches=streams[id(m.batches)]) for m in job.members]
    held_out = None if job.eval_batches is None else data.with_reference(job.eval_batches, held_out)
    return replace(
        job, members=members, batch_at=batch_at([m.batches for m in members], job.shared), eval_batches=held_out
    )


def as_it_ran(job: Job) -> Job:
    """Return the job with batches of the shapes that it ran on; what the reference said of them is 0 here."""
    if job.reference is not None:
        job = _compared(job, *(np.zeros((2, sum(map(len, rows))), np.float32) for rows in job.rows.sets))
    job = _with_once(job, lambda line: None, lambda: False)
    if job.features is None:
        return job
    sizes = {job.features.key(rows): job.features.layout(rows).nbytes for rows in job.rows.sets}
    found = all(job.features.store.has(key, size) for key, size in sizes.items())
    return with_features(job, lambda line: None, lambda: False) if found else job


def as_stored(job: Job, params: Any, mask: Any) -> Any:
    """Undo the cast to the compute dtype before a whole model is written: read frozen leaves again from the base."""
    if tree.FROZEN not in jax.tree.leaves(mask):
        return params
    stored, _ = job.experiment.recipe.tuned(job.experiment.base.load(job.experiment.recipe, job.mesh))
    return jax.tree.map(lambda new, old, role: old if role is tree.FROZEN else new, params, stored, mask)
