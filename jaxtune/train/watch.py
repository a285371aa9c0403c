"""Findings from the metrics of a run, each with what to do.

    metrics.jsonl, a line -- Watch.see --> findings that are new     reported once, kept in findings.jsonl

Findings are a pure function of the lines so far, so a resumed run and a report find the same. Each monitor below
reads one line after another and returns its current finding; thresholds are attributes of its class. No jax here.
"""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

WARNING, NOTE = "warning", "note"
Line = Mapping[str, Any]  # of metrics.jsonl: "step", and metrics by name


@dataclass(frozen=True)
class RunFinding:
    """One thing that is going wrong in a run.

    Attributes:
        check: the name of the monitor, "overfitting".
        severity: "warning": worth a look; "note": for information.
        step: the optimizer step since which it holds.
        message: what was found, in numbers.
        fix: what to do.
    """

    check: str
    severity: str
    step: int
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} {self.fix}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Watch:
    """The monitors over one run.

    Attributes:
        findings: those that hold now, the earliest first.
    """

    def __init__(self, before: Sequence[RunFinding] = ()):
        """`before`: findings from before the first line; see `rate_hint`."""
        self.before = list(before)
        self.monitors = [Overfitting(), LossSpikes(), ExplodingGradients(), VanishingGradients(), UpdateSize()]
        self.standing: dict[str, RunFinding] = {}

    @property
    def findings(self) -> list[RunFinding]:
        return sorted([*self.before, *self.standing.values()], key=lambda f: f.step)

    def see(self, line: Line) -> list[RunFinding]:
        """Read the next line; return the findings that are new with it."""
        new = []
        for monitor in self.monitors:
            name, finding = type(monitor).__name__, monitor.see(line)
            if finding is None:
                self.standing.pop(name, None)
                continue
            if name not in self.standing:
                new.append(finding)
            self.standing[name] = finding
        return new


def findings(lines: Iterable[Line], before: Sequence[RunFinding] = ()) -> list[RunFinding]:
    """The findings on all lines of a metrics.jsonl."""
    watch = Watch(before)
    for line in lines:
        watch.see(line)
    return watch.findings


def group(path: str, field: Any = None) -> str:
    """The part of a model that a trainable array belongs to: "attention", "mlp", "embeddings", "head" or "norms".

    A group that the leaf declares (`field`, a `tree.Field`) is appended: "attention/lora_A".
    """
    first, *_ = parts = path.split("/")
    if "self_attn" in parts:
        name = "attention"
    elif "mlp" in parts or "router" in parts:
        name = "mlp"
    elif first.startswith("embed_"):
        name = "embeddings"
    else:
        name = "head" if first in ("lm_head", "classifier", "pooled_dense") else "norms"
    return f"{name}/{field.group}" if field is not None and field.group else name


def _groups(line: Line, metric: str) -> dict[str, float]:
    """A metric by group: {"attention/lora_A": value}."""
    prefix = f"train/{metric}/"
    return {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ------------------------------------------------------------------------------------------------------ the monitors


class Overfitting:
    """The evaluation loss rises while the training loss falls.

    It has to exceed the best evaluation by a share that one evaluation seldom reaches by chance; a second
    one above the best may exceed it by less. The training loss is the mean of the lines between two evaluations.
    """

    ONCE, TWICE = 0.05, 0.01  # shares of the best loss, in one evaluation since the best and in more
    LEAST = 0.005  # nats; a smaller rise is ignored

    def __init__(self):
        self.best: tuple[int, float] | None = None
        self.kept: tuple[int, float] | None = None  # the best after step 0, whose weights are kept
        self.trained: list[float] = []  # losses since the last evaluation
        self.train = self.train_at_best = math.nan
        self.since = 0  # evaluations since the best
        self.found: RunFinding | None = None

    def see(self, line: Line) -> RunFinding | None:
        if "train/loss" in line:
            self.trained.append(line["train/loss"])
        if "eval/loss" in line:
            self._evaluated(line["step"], line["eval/loss"])
        return self.found

    def _evaluated(self, step: int, loss: float) -> None:
        if self.trained:
            self.train, self.trained = _mean(self.trained), []
        if math.isnan(self.train_at_best):  # nothing was trained before the first evaluation
            self.train_at_best = self.train
        if step and (self.kept is None or loss < self.kept[1]):
            self.kept = step, loss
        if self.best is None or loss < self.best[1]:
            self.best, self.since, self.train_at_best, self.found = (step, loss), 0, self.train, None
            return
        self.since += 1
        best_step, best = self.best
        rise = loss - best
        if (
            rise >= max(self.LEAST, (self.ONCE if self.since == 1 else self.TWICE) * best)
            and self.train < self.train_at_best
        ):
            self.found = RunFinding(
                "overfitting",
                WARNING,
                best_step,
                f"overfitting: the evaluation loss has risen since step {best_step}, from {best:.4f} to {loss:.4f} at "
                f"step {step}, while the training loss fell from {self.train_at_best:.4f} to {self.train:.4f}. The "
                f"weights of step {self.kept[0]} are kept.",
                "Train for fewer epochs or set train.early_stop; more data, a smaller rank, dropout or weight decay "
                "put it off.",
            )


class LossSpikes:
    """A training loss far above those before it.

    OLMo 2 counts values 7 standard deviations above a rolling mean (arXiv:2501.00656). Here logarithms are compared,
    since batches differ by factors: with the median of the last few, which follows a loss that falls, and by the
    median step from one to the next, which neither a falling loss nor a spike inflates.
    """

    WINDOW, LEAST, RECENT, FAR = 50, 10, 5, 7.0
    NARROW = 0.03  # the least deviation: losses that hardly differ have no spikes of a few percent

    def __init__(self):
        self.before: deque[float] = deque(maxlen=self.WINDOW)
        self.spikes: list[tuple[int, float, float]] = []  # step, loss, the median before it
        self.inside = False

    def see(self, line: Line) -> RunFinding | None:
        if "train/loss" in line:
            self._trained(line["step"], math.log(max(line["train/loss"], 1e-6)))
        if not self.spikes:
            return None
        since, loss, typical = self.spikes[0]
        many = ""
        if len(self.spikes) > 1:
            step, highest, below = max(self.spikes, key=lambda spike: spike[1] / spike[2])
            which = (
                "this is the highest"
                if step == since
                else f"the highest at step {step}: {highest:.4f} from {below:.4f}"
            )
            many = f" Of {len(self.spikes)} spikes {which}."
        stays = " It has not come back yet." if self.inside else ""
        return RunFinding(
            "loss_spike",
            WARNING if self.inside or len(self.spikes) > 2 else NOTE,
            since,
            f"loss spike: the training loss jumped to {loss:.4f} at step {since}, from {typical:.4f}.{many}{stays}",
            "Look at the rows around that step; a lower optim.lr, a longer optim.warmup or optim.grad_clip=1 prevent "
            "most spikes.",
        )

    def _trained(self, step: int, value: float) -> None:
        if len(self.before) >= self.LEAST:
            typical = statistics.median(list(self.before)[-self.RECENT :])
            jumps = [abs(b - a) for a, b in itertools.pairwise(self.before)]
            spread = 1.4826 * statistics.median(jumps) / math.sqrt(2)
            was, self.inside = self.inside, value > typical + self.FAR * max(spread, self.NARROW)
            if self.inside and not was:
                self.spikes.append((step, math.exp(value), math.exp(typical)))
            elif self.inside and math.exp(value) > self.spikes[-1][1]:
                self.spikes[-1] = self.spikes[-1][0], math.exp(value), self.spikes[-1][2]
        if not self.inside:
            self.before.append(value)


class ExplodingGradients:
    """The norm of the gradient exceeds its typical size by orders of magnitude, and stays there.

    The measure is the whole gradient, since a group may grow from nothing (LoRA's A, as long as B is zero); the message
    names the groups with most of it. A norm no higher than at the start is no explosion, however low it was in between.
    """

    WINDOW, LEAST, ROW = 20, 5, 3
    FACTOR, START = 10.0, 3.0  # times the median of the window, of the first lines

    def __init__(self):
        self.before: deque[float] = deque(maxlen=self.WINDOW)
        self.start: list[float] = []
        self.row: list[int] = []  # steps of the lines in a row that are too large
        self.found: RunFinding | None = None

    def see(self, line: Line) -> RunFinding | None:
        norm = line.get("train/grad_norm")
        if norm is None or self.found:
            return self.found
        if len(self.before) >= self.LEAST:
            typical, start = statistics.median(self.before), statistics.median(self.start)
            if norm > self.FACTOR * typical and norm > self.START * start:
                self.row.append(line["step"])
                if len(self.row) == self.ROW:
                    self.found = self._finding(line, norm, typical)
                return self.found
        self.row.clear()
        self.before.append(norm)
        if len(self.start) < self.LEAST:
            self.start.append(norm)
        return None

    def _finding(self, line: Line, norm: float, typical: float) -> RunFinding:
        groups = _groups(line, "grad_norm")
        most = [name for name in groups if groups[name] > 0.5 * norm]
        return RunFinding(
            "exploding_gradients",
            WARNING,
            self.row[0],
            f"exploding gradients: since step {self.row[0]} the norm is above {self.FACTOR:g} times its typical "
            f"{typical:.3g}; {norm:.3g} at step {line['step']}{', most of it in ' * bool(most)}{', '.join(most)}.",
            "Go back to a checkpoint before that step with a lower optim.lr, a longer optim.warmup, or "
            "optim.grad_clip=1.",
        )


class VanishingGradients:
    """A group without a gradient, or a whole gradient that has vanished while the loss is still high."""

    ROW, LEAST = 3, 5
    SHARE = 1e-6  # of the whole gradient: a group below it gets nothing
    FADED = 1e-3  # of the norm at the start,
    LEARNED = 0.5  # while the loss is still above this share of that at the start

    def __init__(self):
        self.start: list[tuple[float, float]] = []  # norm, loss
        self.rows: dict[str, list[int]] = {}  # group -> steps of the lines in a row without a gradient
        self.found: RunFinding | None = None

    def see(self, line: Line) -> RunFinding | None:
        norm = line.get("train/grad_norm")
        if norm is None or self.found:
            return self.found
        gone = {name for name, value in _groups(line, "grad_norm").items() if value <= self.SHARE * norm}
        if norm == 0 or self._faded(norm, line["train/loss"]):
            gone = {"the whole model"}
        self.rows = {name: [*self.rows.get(name, ()), line["step"]] for name in gone}
        if len(self.start) < self.LEAST:
            self.start.append((norm, line["train/loss"]))
        lost = sorted(name for name, steps in self.rows.items() if len(steps) >= self.ROW)
        if lost:
            self.found = RunFinding(
                "vanishing_gradients",
                WARNING,
                self.rows[lost[0]][0],
                f"vanishing gradients: {', '.join(lost)} has had next to no gradient since step "
                f"{self.rows[lost[0]][0]} (the norm of all is {norm:.3g}).",
                "Check that rows have trained tokens (jaxtune data), that model.dtype is not too coarse, and that the "
                "loss depends on what is trained.",
            )
        return self.found

    def _faded(self, norm: float, loss: float) -> bool:
        if len(self.start) < self.LEAST:
            return False
        norms, losses = zip(*self.start, strict=True)
        return norm < self.FADED * statistics.median(norms) and loss > self.LEARNED * statistics.median(losses)


class UpdateSize:
    """Steps too large or too small for the weights: ||update|| / ||weights||, if the loss confirms it.

    Only matrices that do not start at zero count: LoRA's B does, and a new head or a bias may.
    """

    PLAIN, FACTOR_A = ("attention", "mlp", "embeddings"), "lora_A"
    HIGH, HIGH_ROW = 1e-2, 5  # of the weights, in so many lines in a row
    LOW, LOW_ROW = 2e-5, 30
    LORA_HIGH, LORA_LOW = 1e-1, 2e-3  # a factor A takes rates ten times as high
    FALL = 0.01  # the share that a loss has fallen by at least, if anything was learned

    def __init__(self):
        self.start: list[float] = []  # losses
        self.last: deque[float] = deque(maxlen=self.HIGH_ROW)
        self.high: list[int] = []  # steps of the lines in a row that are too large
        self.low: list[int] = []
        self.found: RunFinding | None = None

    def see(self, line: Line) -> RunFinding | None:
        ratios = _groups(line, "update_ratio")
        plain = [value for name, value in ratios.items() if name in self.PLAIN]
        lora = [value for name, value in ratios.items() if name.endswith(self.FACTOR_A)]
        if self.found or "train/loss" not in line or not plain + lora:
            return self.found
        if len(self.start) < self.HIGH_ROW:
            self.start.append(line["train/loss"])
        self.last.append(line["train/loss"])
        is_high = max(plain, default=0) > self.HIGH or max(lora, default=0) > self.LORA_HIGH
        is_low = max(plain, default=0) < self.LOW and max(lora, default=0) < self.LORA_LOW
        self.high = [*self.high, line["step"]] if is_high else []
        self.low = [*self.low, line["step"]] if is_low else []
        now, start = _mean(self.last), _mean(self.start)
        since = next(iter(self.high or self.low), None)
        seen = (
            f"since step {since} updates are {'large' if is_high else 'small'}, {max(plain + lora):.2g} of the weights "
            f"they change at step {line['step']}"
        )
        if len(self.high) > self.HIGH_ROW and now > start:
            self._find(
                self.high, line, f"{seen}, and the training loss has risen from {start:.4f} to {now:.4f}", "lower"
            )
        elif len(self.low) > self.LOW_ROW and now > (1 - self.FALL) * start:
            self._find(self.low, line, f"{seen}, and the training loss has not moved from {start:.4f}", "raise")
        return self.found

    def _find(self, row: list[int], line: Line, seen: str, change: str) -> None:
        what = "high" if change == "lower" else "low"
        self.found = RunFinding(
            "update_size",
            WARNING,
            row[0],
            f"the learning rate looks too {what}: {seen}.",
            f"{change.capitalize()} optim.lr (now {line['train/lr']:.2g}); `jaxtune sweep --find-lr` brackets it.",
        )


# -------------------------------------------------------------------------------------------------- before the run

OFF = 9.0  # factor from the default rate
WIDE = 2048  # channels of a model from which the default rates apply; narrower models take higher ones


def rate_hint(
    lr: float, method: str, defaults: Mapping[str, float], *, width: int, scale: float = 1.0
) -> list[RunFinding]:
    """Whether AdamW's learning rate suits another method: a LoRA trained at a rate for full tuning, for example.

    LoRA's best rates are about ten times those of full fine-tuning (Biderman et al. 2024, arXiv:2405.09673).

    Args:
        lr: AdamW's learning rate.
        method: that is trained.
        defaults: method -> its rate for a model of `WIDE` channels or more.
        width: channels of the model.
        scale: the factor on the method's update, LoRA's alpha / r.
    """
    default_here = defaults[method] * max(1.0, WIDE / width)
    low, high = lr * max(scale, 1.0) / defaults[method], lr / default_here
    if low * OFF > 1 and high < OFF:
        return []
    off, where, than = (high, "above", default_here) if high >= OFF else (1 / low, "below", defaults[method])
    like = min(("full", "lora"), key=lambda name: abs(math.log(lr / defaults[name])))
    suits = f"; it suits tune.method={like}" if like != method and 0.3 < lr / defaults[like] < 3 else ""
    return [
        RunFinding(
            "learning_rate",
            WARNING,
            0,
            f"optim.lr={lr:g} is {off:.0f} times {where} the default for tune.method={method} and a model of this "
            f"width, {than:.1g}{suits}.",
            "Leave optim.lr out for the default, or let `jaxtune sweep --find-lr` bracket it.",
        )
    ]
