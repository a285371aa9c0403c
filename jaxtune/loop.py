"""The host loop: batches in, metrics, evaluations and checkpoints out. It knows no method, model or config."""

import math
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
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
class Result:
    """How a run ended.

    Attributes:
        state: the last state.
        best: {"step", "loss"} of the best evaluation; None where there was none.
        early: whether early stopping ended it.
    """

    state: TrainState
    best: dict[str, float] | None
    early: bool


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


def fresh_counters() -> dict[str, Any]:
    """What the loop remembers beside the state, saved with it."""
    return {
        "best": None,
        "waited": 0,
        "stopped": False,
        "window": {"loss": 0.0, "weight": 0.0, "tokens": 0},
        "tokens": 0,
    }


def fit(
    state: TrainState,
    frozen: Any,
    step_fn: Callable[..., Any],
    batch_at: Callable[[int], dict[str, np.ndarray]],
    plan: Plan,
    *,
    put: Callable[[Any], Any],
    checkpoints: Checkpoints,
    metrics: Metrics,
    progress: Progress,
    lr_at: Callable[[int], float],
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    counters: dict[str, Any] | None = None,
    places: Callable[[int], list[str]] | None = None,
) -> Result:
    """Train from `state.step` to `plan.steps`.

    Args:
        batch_at: the host batch of a step, a pure function of it.
        put: host batch -> device batch.
        lr_at: learning rate of a step, for the log.
        evaluate: state -> metrics, of which "eval/loss" decides what is best.
        counters: from a checkpoint, when a run goes on.
        places: where the rows of a step stand in the data, for error messages.

    Raises:
        Interrupted: a signal came; a checkpoint was saved.
        RunFailed: the loss is not finite.
    """
    counters = counters or fresh_counters()
    start = int(state.step)
    pending: tuple[int, dict] | None = None  # metrics of the step before, still on the device
    clock = time.monotonic()

    def settle(item):
        """Wait for a step's metrics and add them to the window."""
        nonlocal clock
        number, values = item
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            rows = ", ".join((places(number - 1) if places else [])[:8])
            checkpoints.wait()
            steps = checkpoints.steps()
            kept = f"The last good checkpoint is of step {steps[-1]}." if steps else "No checkpoint was saved."
            raise RunFailed(
                f"The loss is not finite at step {number} (loss {values['loss']}, gradient {values['grad_norm']}). "
                + (f"Its rows: {rows}. " if rows else "")
                + f"{kept} "
                "Lower optim.lr, set optim.grad_clip, or look at these rows."
            )
        window = counters["window"]
        window["loss"] += values["loss"] * values["weight"]
        window["weight"] += values["weight"]
        if number % plan.log_every == 0 or number == plan.steps:
            now = time.monotonic()
            logged = {
                "train/loss": window["loss"] / max(window["weight"], 1.0),
                "train/lr": lr_at(number - 1),
                "train/grad_norm": values["grad_norm"],
                "train/tokens": counters["tokens"],
                "train/tokens_per_second": round(window["tokens"] / max(now - clock, 1e-9), 1),
            }
            clock = now
            counters["window"] = fresh_counters()["window"]
            metrics.write(number, logged)
            progress.update(number, logged)

    def save(number):
        checkpoints.save(number, state, counters)

    def assess(number):
        values = evaluate(state)
        metrics.write(number, values)
        loss = values["eval/loss"]
        progress.say(f"step {number}  eval loss {loss:.4f}")
        best = counters["best"]
        if best is None or loss < best["loss"] or math.isnan(best["loss"]):
            counters["best"], counters["waited"] = {"step": number, "loss": loss}, 0
        else:
            counters["waited"] += 1

    def patience_ended():
        return bool(plan.early_stop and counters["waited"] >= plan.early_stop)

    counters["stopped"] = patience_ended()  # of a run that goes on; its patience may have been changed
    if start == 0 and evaluate is not None and not checkpoints.steps():
        metrics.write(0, evaluate(state))
    with stop_on_signal() as stopped, Prefetch(batch_at, start, plan.steps) as batches:
        for number, batch in enumerate(batches, start + 1):
            if counters["stopped"]:
                break
            state, values = step_fn(state, frozen, put(batch))
            if pending is not None:
                settle(pending)
            tokens = int((batch["segments"] > 0).sum())
            counters["window"]["tokens"] += tokens
            counters["tokens"] += tokens
            pending = (number, values)
            last = number == plan.steps
            evaluating = evaluate is not None and (last or (plan.eval_every and number % plan.eval_every == 0))
            stopping = stopped()  # asked once: a signal that comes after this is seen in the next step
            saving = last or evaluating or (plan.save_every and number % plan.save_every == 0) or stopping
            if saving or number % plan.log_every == 0:
                settle(pending)
                pending = None
            if evaluating:
                began = time.monotonic()
                assess(number)
                clock += time.monotonic() - began  # not the training's time
                counters["stopped"] = patience_ended()
            if saving:
                save(number)
            if stopping and not last and not counters["stopped"]:
                checkpoints.wait()
                raise Interrupted(
                    f"Stopped by a signal after step {number}; the checkpoint is saved. Start again to go on."
                )
    checkpoints.wait()
    return Result(state, counters["best"], counters["stopped"])


def make_evaluate(
    eval_step: Callable[..., Any], frozen: Any, batches: Iterable, put: Callable[[Any], Any], limit: int = 0
) -> Callable[[TrainState], dict[str, float]]:
    """Return `evaluate(state) -> {"eval/loss", "eval/perplexity", "eval/tokens"}` over at most `limit` batches."""

    def evaluate(state):
        sums = []
        for i, batch in enumerate(batches):
            if limit and i == limit:
                break
            sums.append(eval_step(state.trainable, state.member, frozen, put(batch)))
        total, weight = np.sum([[float(t), float(w)] for t, w in sums], axis=0)
        loss = total / weight if weight else math.nan
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0)), "eval/tokens": int(weight)}

    return evaluate


def out_of_memory(error: BaseException) -> bool:
    """Whether a JAX error says that the device has no memory left."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
