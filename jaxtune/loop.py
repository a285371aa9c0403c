"""The host loop: batches in, metrics, evaluations and checkpoints out. It knows no method, model or config."""

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxtune.checkpoint import Checkpoints
from jaxtune.data import Prefetch
from jaxtune.errors import Interrupted, RunFailed
from jaxtune.log import Metrics, Progress
from jaxtune.step import TrainState


@dataclass(frozen=True)
class Plan:
    """How long, how often. All in optimizer steps; 0 switches a thing off."""

    steps: int
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    early_stop: int = 0  # evaluations without improvement


@dataclass
class Run:
    """One run of those that share the loop's step: one alone, or the members of a sweep.

    Attributes:
        name: what messages and checkpoints call it.
        metrics: where its lines go.
        lr_at: learning rate of a step, for the log.
        places: where the rows of a step stand in the data, for messages.
        lane: its row in a batch that holds rows for each member, counted at the start.
        record: what the loop remembers of it beside the state, saved with it; see `fresh_record`.
    """

    name: str
    metrics: Metrics
    lr_at: Callable[[int], float]
    places: Callable[[int], list[str]] | None = None
    lane: int = 0
    record: dict[str, Any] = field(default_factory=lambda: fresh_record())

    @property
    def best(self) -> dict[str, float] | None:
        """{"step", "loss"} of the best evaluation; None where there was none."""
        return self.record["best"]

    @property
    def ended(self) -> str | None:
        """Why it ended before the last step: "early" stopping, or a sentence on what went wrong; else None."""
        return self.record["ended"]

    @property
    def failed(self) -> bool:
        return self.ended not in (None, EARLY)


EARLY = "early"


def fresh_record() -> dict[str, Any]:
    return {"best": None, "waited": 0, "ended": None, "window": fresh_window(), "tokens": 0}


def fresh_window() -> dict[str, float]:
    """Sums since the last logged line."""
    return {"loss": 0.0, "weight": 0.0, "tokens": 0}


@dataclass
class Result:
    """How it ended.

    Attributes:
        state: the last state; that of a sweep holds those of `runs`, stacked in this order.
        runs: the runs that were in the step to the end.
        dropped: the runs that were taken out of the step before.
    """

    state: TrainState
    runs: list[Run]
    dropped: list[Run]


@contextmanager
def stop_on_signal():
    """Yield a function that tells whether SIGTERM or SIGINT came; a second SIGINT interrupts at once."""
    came: list[int] = []

    def note(number, frame):
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(
    state: TrainState,
    frozen: Any,
    step_fn: Callable[..., Any],
    batch_at: Callable[[int], dict[str, np.ndarray]],
    plan: Plan,
    runs: Sequence[Run],
    *,
    put: Callable[[Any, list[int]], Any],
    checkpoints: Checkpoints,
    progress: Progress,
    evaluate: Callable[[TrainState], list[dict[str, float]]] | None = None,
    dropped: Sequence[Run] = (),
    take: Callable[[TrainState, list[int]], TrainState] | None = None,
) -> Result:
    """Train from `state.step` to `plan.steps`.

    Args:
        batch_at: the host batch of a step, a pure function of it.
        runs: whose state this is: one, or those that are stacked in it, in their order.
        put: (host batch, the runs' lanes) -> device batch.
        evaluate: state -> metrics of each run, of which "eval/loss" decides what is best.
        dropped: runs that ended in an earlier part of a run that goes on.
        take: state with the given of its runs; after an evaluation, what has ended leaves the step, which never holds
            less than two because the numbers of a single member differ in the last bits. None: a run alone.

    Raises:
        Interrupted: a signal came; a checkpoint was saved.
        RunFailed: the loss of a run alone is not finite. In a sweep, that run has `ended`, and the others go on.
    """
    runs, dropped = list(runs), list(dropped)
    start = int(np.ravel(jax.device_get(state.step))[0])
    pending: tuple[int, dict] | None = None  # metrics of the step before, still on the device
    clock = time.monotonic()

    def live():
        return [run for run in runs if not run.ended]

    def evaluates(number):
        due = number == plan.steps or (plan.eval_every and number % plan.eval_every == 0)
        return evaluate is not None and bool(due)

    def settle(item):
        """Wait for a step's metrics and add them to the windows."""
        nonlocal clock
        number, arrays = item
        arrays = {k: np.atleast_1d(v) for k, v in jax.device_get(arrays).items()}
        lines = {}
        now = time.monotonic()
        for i, run in enumerate(runs):
            if run.ended:
                continue
            values = {k: float(v[i]) for k, v in arrays.items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                run.record["ended"] = _not_finite(run, number, values)
                if take is not None:
                    progress.say(f"{run.name}: {run.ended}")
                continue
            window = run.record["window"]
            window["loss"] += values["loss"] * values["weight"]
            window["weight"] += values["weight"]
            if number % plan.log_every == 0 or number == plan.steps:
                lines[run.name] = {
                    "train/loss": window["loss"] / max(window["weight"], 1.0),
                    "train/lr": run.lr_at(number - 1),
                    "train/grad_norm": values["grad_norm"],
                    "train/tokens": run.record["tokens"],
                    "train/tokens_per_second": round(window["tokens"] / max(now - clock, 1e-9), 1),
                }
                run.metrics.write(number, lines[run.name])
                run.record["window"] = fresh_window()
        if take is None and runs[0].failed:
            checkpoints.wait()
            steps = checkpoints.steps()
            kept = f"The last good checkpoint is of step {steps[-1]}." if steps else "No checkpoint was saved."
            raise RunFailed(f"{runs[0].ended} {kept} {REMEDY}")
        if lines:
            clock = now
            progress.update(number, lines)

    def save(number):
        counters = {"runs": [run.record | {"name": run.name} for run in [*runs, *dropped]], "in_step": len(runs)}
        checkpoints.save(number, state, counters)

    def assess(number):
        for run, values in zip(runs, evaluate(state), strict=True):
            if run.ended:
                continue
            run.metrics.write(number, values)
            loss = values["eval/loss"]
            progress.say(f"step {number}  {run.name + '  ' if len(runs) > 1 else ''}eval loss {loss:.4f}")
            best = run.best
            if best is None or loss < best["loss"] or math.isnan(best["loss"]):
                run.record["best"], run.record["waited"] = {"step": number, "loss": loss}, 0
            else:
                run.record["waited"] += 1

    def lose_patience():
        for run in runs:
            if not run.failed:  # of a run that goes on, the patience may have been changed
                spent = plan.early_stop and run.record["waited"] >= plan.early_stop
                run.record["ended"] = EARLY if spent else None

    def regroup():
        nonlocal state, runs
        kept = [i for i, run in enumerate(runs) if not run.ended]
        kept = sorted([*kept, *(i for i in range(len(runs)) if i not in kept)][: max(2, len(kept))])
        if take is not None and len(kept) < len(runs):
            dropped.extend(run for i, run in enumerate(runs) if i not in kept)
            state, runs = take(state, kept), [runs[i] for i in kept]

    lose_patience()
    if start == 0 and evaluate is not None and not checkpoints.steps():
        for run, values in zip(runs, evaluate(state), strict=True):
            run.metrics.write(0, values)
    if evaluates(start):
        regroup()
    with stop_on_signal() as stopped, Prefetch(batch_at, start, plan.steps) as batches:
        for number, batch in enumerate(batches, start + 1):
            if not live():
                break
            lanes = [run.lane for run in runs]
            state, values = step_fn(state, frozen, put(batch, lanes))
            if pending is not None:
                settle(pending)
            for run, tokens in zip(runs, _tokens(batch, lanes), strict=True):
                if not run.ended:
                    run.record["window"]["tokens"] += tokens
                    run.record["tokens"] += tokens
            pending = (number, values)
            last = number == plan.steps
            evaluating = evaluates(number)
            stopping = stopped()  # asked once: a signal that comes after this is seen in the next step
            saving = last or evaluating or (plan.save_every and number % plan.save_every == 0) or stopping
            if saving or number % plan.log_every == 0:
                settle(pending)
                pending = None
            if evaluating:
                began = time.monotonic()
                assess(number)
                clock += time.monotonic() - began  # not the training's time
                lose_patience()
            if saving:
                save(number)
            if stopping and not last and live():
                checkpoints.wait()
                raise Interrupted(
                    f"Stopped by a signal after step {number}; the checkpoint is saved. Start again to go on."
                )
            if evaluating:
                regroup()
    checkpoints.wait()
    return Result(state, runs, dropped)


REMEDY = "Lower optim.lr, set optim.grad_clip, or look at these rows."


def _not_finite(run: Run, number: int, values: dict[str, float]) -> str:
    rows = ", ".join((run.places(number - 1) if run.places else [])[:8])
    return (
        f"The loss is not finite at step {number} (loss {values['loss']}, gradient {values['grad_norm']})."
        + f" Its rows: {rows}." * bool(rows)
    )


def _tokens(batch: dict[str, np.ndarray], lanes: list[int]) -> list[int]:
    """Tokens of each run in a batch: [A, B, T] for all, or [K, A, B, T]."""
    there = batch["segments"] > 0
    return [int(there.sum())] * len(lanes) if there.ndim == 3 else [int(there[lane].sum()) for lane in lanes]


def language_metrics(loss: float, weight: float, aux: Any) -> dict[str, float]:
    """Of a language model: its perplexity, and how many tokens were predicted."""
    return {"eval/perplexity": math.exp(min(loss, 700.0)), "eval/tokens": int(weight)}


def make_evaluate(
    eval_step: Callable[..., Any],
    frozen: Any,
    batches: Iterable,
    put: Callable[[Any], Any],
    limit: int = 0,
    metrics: Callable[[float, float, dict[str, np.ndarray]], dict[str, float]] = language_metrics,
) -> Callable[[TrainState], list[dict[str, float]]]:
    """Return `evaluate(state) -> [{"eval/loss", ...}]`, one for each run in the state.

    It goes over at most `limit` batches; 0: all. `metrics(loss, weight, aux)` says what is logged beside the loss, from
    sums over all rows.
    """

    def evaluate(state):
        sums = []
        for batch in itertools.islice(batches, limit or None):
            sums.append(_columns(jax.device_get(eval_step(state.trainable, state.member, frozen, put(batch)))))
        totals, weights, aux = jax.tree.map(lambda *x: np.sum(x, axis=0), *sums)
        found = []
        for i, (total, weight) in enumerate(zip(totals, weights, strict=True)):
            loss = float(total / weight) if weight else math.nan
            found.append({"eval/loss": loss} | metrics(loss, float(weight), jax.tree.map(lambda x, i=i: x[i], aux)))
        return found

    return evaluate


def _columns(sums: tuple[Any, Any, Any]) -> tuple[np.ndarray, np.ndarray, Any]:
    """(total, weight, aux) in float64, [K, ...] each."""
    total, weight, aux = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    if not total.ndim:
        aux = jax.tree.map(lambda x: x[None], aux)
    total = np.atleast_1d(total)
    return total, np.broadcast_to(weight, total.shape), aux


def out_of_memory(error: BaseException) -> bool:
    """Whether a JAX error says that the device has no memory left."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
