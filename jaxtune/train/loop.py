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

from jaxtune.data import Prefetch
from jaxtune.errors import Interrupted, RunFailed
from jaxtune.train import processes
from jaxtune.train.best import is_better
from jaxtune.train.checkpoint import Checkpoints
from jaxtune.train.log import Metrics, Progress
from jaxtune.train.step import TrainState


@dataclass(frozen=True)
class Intervals:
    """How long to train, and how often to log, evaluate and save, in optimizer steps; 0 switches an event off."""

    steps: int
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    early_stop: int = 0  # evaluations without improvement
    best: str = "eval/loss"  # the metric that decides which evaluation is the best


@dataclass
class Run:
    """A run of the loop's step, which is a single run's or shared by the members of a sweep.

    Attributes:
        name: its name in messages and checkpoints.
        metrics: where its lines go.
        lr_at: learning rate of a step, for the log.
        places: step -> the places of its rows in the data, for messages.
        index: its place in the first state of the sweep, and so in a batch that has rows for each member.
        record: the loop's record of it, saved with the state; see `fresh_record`.
    """

    name: str
    metrics: Metrics
    lr_at: Callable[[int], float]
    places: Callable[[int], list[str]] | None = None
    index: int = 0
    record: dict[str, Any] = field(default_factory=lambda: fresh_record())

    @property
    def best(self) -> dict[str, float] | None:
        """{"step", "loss"} of the best evaluation, with the "value" of another metric that decided; None: none was."""
        return self.record["best"]

    @property
    def ended(self) -> str | None:
        """Why it ended before the last step: "early" stopping, or a sentence on what went wrong; else None."""
        return self.record["ended"]

    @property
    def failed(self) -> bool:
        return self.ended not in (None, EARLY)


EARLY = "early"
FIXED = ("loss", "weight", "grad_norm")  # of a step's metrics; the others are logged as they are


def fresh_record() -> dict[str, Any]:
    """The record of a run that has not begun: best evaluation, patience, end, loss window, tokens."""
    return {"best": None, "waited": 0, "ended": None, "window": fresh_window(), "tokens": 0}


def fresh_window() -> dict[str, float]:
    """Sums since the last logged line."""
    return {"loss": 0.0, "weight": 0.0, "tokens": 0}


@contextmanager
def stop_on_signal():
    """Yield a function that tells whether SIGTERM or SIGINT was received; a second SIGINT interrupts at once."""
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


@dataclass
class Loop:
    """The loop over the steps of a single run, or of several that share the step.

    Attributes:
        state: the last state.
        frozen: the frozen parameters, for `step_fn(state, frozen, batch) -> (state, metrics)`.
        batch_at: the host batch of a step, a pure function of it.
        runs: the run, or the runs that are stacked in the state, in order.
        put: (host batch, indices of the runs) -> device batch.
        evaluate: state -> metrics of each run; `plan.best` decides which is the best.
        sample: called with (step, state, its runs) after each evaluation.
        dropped: runs that were removed from the step, also before a resume.
        redraw: (steps done, state, its runs, host batch) -> the host batch that the step takes in its place; None: the
            same.
        cause: step whose loss is not finite -> the cause, if it is not the learning rate.
        take: returns the state of some of its runs. After an evaluation, ended runs leave the step, which never holds
            fewer than two, because results of a single member differ in the last bits. None: a single run.
    """

    state: TrainState
    frozen: Any
    step_fn: Callable[..., Any]
    batch_at: Callable[[int], dict[str, np.ndarray]]
    plan: Intervals
    runs: list[Run]
    put: Callable[[Any, list[int]], Any]
    checkpoints: Checkpoints
    progress: Progress
    evaluate: Callable[[TrainState], list[dict[str, float]]] | None = None
    sample: Callable[[int, TrainState, Sequence[Run]], None] | None = None
    dropped: list[Run] = field(default_factory=list)
    take: Callable[[TrainState, list[int]], TrainState] | None = None
    cause: Callable[[int], str | None] | None = None
    redraw: Callable[[int, TrainState, Sequence[Run], Any], Any] | None = None
    clock: float = field(default_factory=time.monotonic)  # of the last logged line
    unread: tuple[int, dict] | None = None  # a step whose metrics are still on the device

    def run(self) -> None:
        """Train from `state.step` to `plan.steps`; `state`, `runs` and `dropped` then hold the outcome.

        Raises:
            Interrupted: a signal came; a checkpoint was saved.
            RunFailed: the loss of a single run is not finite. In a sweep such a run has `ended`; the others continue.
        """
        start, last = int(np.ravel(jax.device_get(self.state.step))[0]), self.plan.steps
        self._judge_patience()
        if start == 0 and self.evaluate is not None and not self.checkpoints.steps():
            self._assess(0)
        if self._evaluates(start):
            self._regroup()
        with stop_on_signal() as stopped, Prefetch(self.batch_at, start, last) as batches:
            for number, batch in enumerate(batches, start + 1):
                if not self._live():
                    break
                self._step(number, batch)
                stopping = processes.any_of(stopped())  # read once: a later signal is handled in the next step
                processes.beat(f"step {number}")
                self._after(number, stopping)
                if stopping and number < last and self._live():
                    self.checkpoints.wait()
                    raise Interrupted(
                        f"Stopped by a signal after step {number}; the checkpoint is saved. "
                        "Run the same command to resume."
                    )
                if self._evaluates(number):
                    self._regroup()
        self.checkpoints.wait()

    def _live(self) -> list[Run]:
        return [run for run in self.runs if not run.ended]

    def _evaluates(self, number: int) -> bool:
        due = number == self.plan.steps or _every(self.plan.eval_every, number)
        return self.evaluate is not None and due

    def _step(self, number: int, batch: dict[str, np.ndarray]) -> None:
        """Start a step, and read the metrics of the previous one while it runs."""
        members = [run.index for run in self.runs]
        if self.redraw is not None:
            batch = self.redraw(number - 1, self.state, self.runs, batch)
        self.state, metrics = self.step_fn(self.state, self.frozen, self.put(batch, members))
        self._read()
        for run, tokens in zip(self.runs, _tokens(batch, members), strict=True):
            if not run.ended:
                run.record["window"]["tokens"] += tokens
                run.record["tokens"] += tokens
        self.unread = number, metrics

    def _after(self, number: int, stopping: bool) -> None:
        """Log, evaluate and save when due; a checkpoint includes what was logged and evaluated before it."""
        evaluates, last = self._evaluates(number), number == self.plan.steps
        saves = last or evaluates or stopping or _every(self.plan.save_every, number)
        if saves or _every(self.plan.log_every, number):
            self._read()
        if evaluates:
            began = time.monotonic()
            self._assess(number)
            self.clock += time.monotonic() - began  # does not count as training time
            self._judge_patience()
        if saves:
            counters = [run.record | {"name": run.name} for run in [*self.runs, *self.dropped]]
            self.checkpoints.save(number, self.state, {"runs": counters, "in_step": len(self.runs)})

    def _read(self) -> None:
        """Wait for the metrics of the last step, add them to the windows, and log those at their end."""
        if self.unread is None:
            return
        (number, arrays), self.unread = self.unread, None
        arrays = {k: np.atleast_1d(v) for k, v in jax.device_get(arrays).items()}
        logs = number == self.plan.steps or _every(self.plan.log_every, number)
        now, lines = time.monotonic(), {}
        for i, run in enumerate(self.runs):
            if run.ended:
                continue
            values = {k: float(v[i]) for k, v in arrays.items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                self._fail(run, number, _not_finite(run, number, values))
                continue
            window = run.record["window"]
            window["loss"] += values["loss"] * values["weight"]
            window["weight"] += values["weight"]
            if logs:
                lines[run.name] = _line(run, number, values, now - self.clock)
                run.record["window"] = fresh_window()
                self._log(run, number, lines[run.name])
        if lines:
            self.clock = now
            self.progress.update(number, lines)

    def _log(self, run: Run, number: int, values: dict[str, Any]) -> None:
        for finding in run.metrics.write(number, values):
            self._say(run, str(finding))

    def _say(self, run: Run, text: str) -> None:
        self.progress.say(text if self.take is None else f"{run.name}: {text}")

    def _fail(self, run: Run, number: int, why: str) -> None:
        cause = None if self.cause is None else self.cause(number)
        if self.take is not None:
            run.record["ended"] = f"{why} {cause}" if cause else why
            self._say(run, run.record["ended"])
            return
        run.record["ended"] = why
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        kept = f"The last good checkpoint is of step {steps[-1]}." if steps else "No checkpoint was saved."
        raise RunFailed(f"{why} {kept} {cause or REMEDY}")

    def _assess(self, number: int) -> None:
        """Evaluate every run. The evaluation at step 0 is of the base, for comparison; it cannot be the best."""
        found = {}
        for run, values in zip(self.runs, self.evaluate(self.state), strict=True):
            if run.ended:
                continue
            self._log(run, number, values)
            found[run.name] = values
            if not number:
                continue
            loss, value = values["eval/loss"], values.get(self.plan.best, math.nan)
            if run.best is None or is_better(self.plan.best, value, run.best.get("value", run.best["loss"])):
                other = {} if self.plan.best == "eval/loss" else {"value": value}
                run.record["best"], run.record["waited"] = {"step": number, "loss": loss} | other, 0
            else:
                run.record["waited"] += 1
        self.progress.evaluated(number, found)
        if self.sample is not None:
            self.sample(number, self.state, self.runs)

    def _judge_patience(self) -> None:
        """Apply early stopping; in a resumed run the patience may have been changed."""
        for run in self.runs:
            if not run.failed:
                spent = self.plan.early_stop and run.record["waited"] >= self.plan.early_stop
                run.record["ended"] = EARLY if spent else None

    def _regroup(self) -> None:
        """Remove ended runs from a sweep's step."""
        kept = [i for i, run in enumerate(self.runs) if not run.ended]
        kept = sorted([*kept, *(i for i in range(len(self.runs)) if i not in kept)][: max(2, len(kept))])
        if self.take is not None and len(kept) < len(self.runs):
            self.dropped.extend(run for i, run in enumerate(self.runs) if i not in kept)
            self.state, self.runs = self.take(self.state, kept), [self.runs[i] for i in kept]


REMEDY = "Lower optim.lr, set optim.grad_clip, or look at these rows."


def _not_finite(run: Run, number: int, values: dict[str, float]) -> str:
    rows = ", ".join((run.places(number - 1) if run.places else [])[:8])
    return (
        f"The loss is not finite at step {number} (loss {values['loss']}, gradient {values['grad_norm']})."
        + f" Its rows: {rows}." * bool(rows)
    )


def _every(interval: int, number: int) -> bool:
    """Whether an event with this interval is due at a step; 0 switches it off."""
    return bool(interval) and number % interval == 0


def _line(run: Run, number: int, values: dict[str, float], seconds: float) -> dict[str, float]:
    """The logged metrics of a run at a step, after `seconds` of training since the last line."""
    window = run.record["window"]
    line = {
        "train/loss": window["loss"] / max(window["weight"], 1.0),
        "train/lr": run.lr_at(number - 1),
        "train/grad_norm": values["grad_norm"],
        "train/tokens": run.record["tokens"],
        "train/tokens_per_second": round(window["tokens"] / max(seconds, 1e-9), 1),
    }
    return line | {f"train/{k}": float(f"{v:.4g}") for k, v in values.items() if k not in FIXED}


def _tokens(batch: dict[str, np.ndarray], members: list[int]) -> list[int]:
    """Tokens of each run in a batch: [A, B, ...] for all, or [K, A, B, ...]."""
    there, shared = batch["segments"] > 0, batch["row"].ndim == 2
    return [int(there.sum())] * len(members) if shared else [int(there[i].sum()) for i in members]


def make_evaluate(
    eval_step: Callable[..., Any],
    frozen: Any,
    batches: Iterable,
    put: Callable[[Any], Any],
    limit: int = 0,
    metrics: Callable[[float, float, dict[str, np.ndarray]], dict[str, float]] = lambda loss, weight, aux: {},
) -> Callable[[TrainState], list[dict[str, float]]]:
    """Return `evaluate(state) -> [{"eval/loss", ...}]`, one for each run in the state.

    It evaluates at most `limit` batches; 0: all. `metrics(loss, weight, aux)` gives further values to log, from
    sums over all rows.
    """

    def evaluate(state):
        sums = []
        for batch in itertools.islice(batches, limit or None):
            processes.beat("a batch of an evaluation")
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
